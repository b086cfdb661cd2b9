"""Smaller models of any kind: equal outputs under random masks, the reasons for what stays, optimisers carried over."""

import contextlib
import copy
import functools
import math
import operator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from prunelab.masks import MaskError, Masks
from prunelab.models import mlp
from prunelab.pruners import prune
from prunelab.structure import NotRemoved, ShrinkError, StructureError
from prunelab.structure.shrink import TOLERANCE, carry, dead_units, remove_dead, shrink

IMAGES = (3, 2, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore::prunelab.structure.NotRemoved")


class Net(nn.Module):
    """A network whose forward is a function of its layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


def conv(inputs, outputs, **more):
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **more})


def head(width):
    return nn.Linear(width, 4)


def identity_skip(net, x):
    x = F.relu(net.norm_1(net.first(x)))
    x = F.relu(x + net.norm_3(net.third(F.relu(net.norm_2(net.second(x))))))
    return net.head(x.mean((2, 3)))


def projection_skip(net, x):
    x = F.relu(net.first(x))
    return net.head((net.second(x) + net.shortcut(x)).relu().mean([2, 3]))


def option_a(net, x):
    x = F.relu(net.first(x))
    return net.head(
        torch.flatten(F.adaptive_avg_pool2d(net.second(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)), 1), 1)
    )


def concatenation(net, x):
    a = F.relu(net.first(x))
    b = F.relu(net.second(a))
    return net.head(net.third(torch.cat([a, b], 1)).relu().mean((2, 3)))


def gate(net, x):
    x = F.relu(net.first(x))
    return net.head((x * torch.sigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1)))))).mean((2, 3)))


def through(*names):
    def forward(net, x):
        for name in names:
            x = net.get_submodule(name)(x)
        return x

    return forward


ARCHITECTURES = {
    "dense": lambda: mlp(128, 7, 6, 4),
    "sigmoid": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(128, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Tanh(), head(5)
    ),
    "chain": lambda: nn.Sequential(
        conv(2, 5), nn.ReLU(), nn.MaxPool2d(2), conv(5, 6), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), head(24)
    ),
    "unpadded": lambda: nn.Sequential(
        conv(2, 5, padding=0), nn.Sigmoid(), conv(5, 6, padding=0, stride=2), nn.GELU(), nn.Flatten(), head(24)
    ),
    "batchnorm": lambda: nn.Sequential(
        conv(2, 5, bias=False), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 6, bias=False, padding=0), nn.BatchNorm2d(6),
        nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), head(6)
    ),
    "depthwise": lambda: nn.Sequential(
        conv(2, 6), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 6, groups=6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(),
        nn.Flatten(), head(320)
    ),
    "grouped": lambda: nn.Sequential(conv(2, 6), nn.ReLU(), conv(6, 6, groups=2), nn.ReLU(), nn.Flatten(), head(384)),
    "channel multiplier": lambda: nn.Sequential(
        conv(2, 4), nn.ReLU(), conv(4, 8, groups=4), nn.ReLU(), conv(8, 6, groups=2), nn.Flatten(), head(384)
    ),
    "reflection": lambda: nn.Sequential(
        conv(2, 5, padding_mode="reflect"), nn.Sigmoid(), nn.ReflectionPad2d(1), conv(5, 4, padding=0), nn.Upsample(2),
        nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), head(16)
    ),
    "written sizes": lambda: Net(
        lambda net, x: net.head((net.second(net.first(x).relu() * 2 + 1) - 1).relu().view(-1, 5 * 64)),
        first=conv(2, 6), second=nn.Conv2d(6, 5, 1), head=head(320)
    ),
    "identity skip": lambda: Net(
        identity_skip, first=conv(2, 5), norm_1=nn.BatchNorm2d(5), second=conv(5, 6), norm_2=nn.BatchNorm2d(6),
        third=conv(6, 5), norm_3=nn.BatchNorm2d(5), head=head(5)
    ),
    "projection skip": lambda: Net(
        projection_skip, first=conv(2, 5), second=conv(5, 6, stride=2), shortcut=nn.Conv2d(5, 6, 1, stride=2),
        head=head(6)
    ),
    "option A": lambda: Net(option_a, first=conv(2, 4), second=conv(4, 6, stride=2), head=head(6)),
    "concatenation": lambda: Net(concatenation, first=conv(2, 4), second=conv(4, 3), third=conv(7, 5), head=head(5)),
    "gate": lambda: Net(
        gate, first=conv(2, 6), down=nn.Conv2d(6, 3, 1), up=nn.Conv2d(3, 6, 1), head=head(6)
    ),
    "layer norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(128, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), head(6)
    ),
    "last axis": lambda: nn.Sequential(
        nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.GELU(), nn.Flatten(), head(80)
    ),
    "pooling that sums": lambda: nn.Sequential(
        conv(2, 5), nn.Sigmoid(), nn.AvgPool2d(2, divisor_override=1), conv(5, 6, padding=0), nn.Flatten(), head(24)
    ),
    "arguments by name": lambda: Net(
        lambda net, x: net.head(
            F.gelu(torch.tanh(torch.cat(tensors=[net.first(x), x], dim=1)), approximate="tanh").mean((2, 3))
        ),
        first=conv(2, 5), head=head(7)
    ),
}  # fmt: skip


def made(name, seed=0):
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def random_masks(model, seed, whole_units):
    """Some weights gone, whole rows and whole columns among them; a row's bias sometimes goes with it."""
    draw = torch.Generator().manual_seed(seed)
    masks = {}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        keep = torch.ones(weight.shape, dtype=torch.bool)
        if not whole_units:
            keep &= torch.rand(weight.shape, generator=draw) < 0.6
        rows = torch.rand(len(weight), generator=draw) < 0.6
        rows[0] = True
        if name != list(dict(model.named_parameters()))[-2]:  # the outputs stay
            keep &= rows.view(-1, *[1] * (weight.dim() - 1))
            bias = name.replace("weight", "bias")
            if bias in dict(model.named_parameters()) and torch.rand(1, generator=draw) < 0.5:
                masks[bias] = rows
        columns = torch.rand(weight.shape[1], generator=draw) < 0.8
        columns[0] = True
        masks[name] = keep & columns.view(1, -1, *[1] * (weight.dim() - 2))
    return Masks(masks)


def check_equal(name, seed, whole_units):
    model, x = made(name, seed), torch.randn(IMAGES, generator=torch.Generator().manual_seed(seed))
    masks = random_masks(model, seed, whole_units)
    before = copy.deepcopy(model.state_dict())
    masked = copy.deepcopy(model)
    masks.apply_(masked)
    try:
        small = shrink(model, masks, x)
    except ShrinkError as error:
        assert "no live unit left" in str(error)  # noqa: PT017
        return
    with torch.no_grad():
        expected = masked(x)
        assert float((small(x) - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(small.state_dict()) == list(model.state_dict())
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("whole_units", [True, False])
def test_outputs_are_those_of_the_masked_model(name, whole_units):
    for seed in range(4):
        check_equal(name, seed, whole_units)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(ARCHITECTURES)), seed=st.integers(0, 10**6), whole_units=st.booleans())
def test_outputs_are_those_of_the_masked_model_for_any_masks(name, seed, whole_units):
    check_equal(name, seed, whole_units)


def without_row(model, layer, row, bias=True):
    """Everything is kept but one row of a layer."""
    masks = {}
    for part in ("weight", "bias") if bias else ("weight",):
        keep = torch.ones_like(model.get_parameter(f"{layer}.{part}"), dtype=torch.bool)
        keep[row] = False
        masks[f"{layer}.{part}"] = keep
    return Masks(masks)


def test_a_filter_takes_its_normalisation_and_the_inputs_of_the_next_layer_with_it():
    model, x = made("identity skip"), torch.randn(IMAGES)
    masks = prune(model, "l1_filter", 0.2, layers=["second"])
    found = remove_dead(model, masks, x)
    assert [tuple(found.model.get_submodule(n).weight.shape) for n in ("second", "norm_2", "third")] == [
        (5, 5, 3, 3), (5,), (5, 5, 3, 3),
    ]  # fmt: skip
    assert found.model.norm_2.num_features == found.model.third.in_channels == len(found.model.norm_2.running_mean) == 5
    assert len(found.units["second"]) == 5
    assert found.stayed == {}


def test_a_network_of_16_bits_is_held_to_what_16_bits_can_tell():
    model, x = made("unpadded").bfloat16(), torch.randn(IMAGES).bfloat16()
    small = shrink(model, without_row(model, "0", 1, bias=False), x)
    assert (small[0].out_channels, small[0].weight.dtype) == (4, torch.bfloat16)


def test_what_an_addition_joins_goes_together_or_not_at_all():
    model, x = made("projection skip"), torch.randn(IMAGES)
    one = without_row(model, "second", 2)
    assert remove_dead(model, one, x).model.second.out_channels == 6
    both = one & without_row(model, "shortcut", 2)
    small = remove_dead(model, both, x).model
    assert (small.second.out_channels, small.shortcut.out_channels, small.head.in_features) == (5, 5, 5)


def test_a_constant_before_a_padded_convolution_stays_and_the_reason_is_given():
    model, x = made("chain"), torch.randn(IMAGES)
    found = remove_dead(model, without_row(model, "0", 1, bias=False), x)
    with torch.no_grad():
        positive = bool(model[0].bias[1] > 0)
    assert found.model[0].out_channels == (5 if positive else 4)
    model[0].bias.data[1] = 1.0
    found = remove_dead(model, without_row(model, "0", 1, bias=False), x)
    assert found.model[0].out_channels == 5
    assert found.stayed == {"0": "1 of 5 units: constant but not 0, and module '3' pads its input with zeros"}


def test_a_constant_is_folded_where_that_is_exact():
    model, x = made("unpadded"), torch.randn(IMAGES)
    found = remove_dead(model, without_row(model, "0", 1, bias=False), x)  # the sigmoid of its bias goes on
    assert found.model[0].out_channels == 4
    assert not torch.equal(found.model[2].bias, model[2].bias)


def test_nothing_pruned_gives_the_same_object():
    for name in ARCHITECTURES:
        model = made(name)
        assert shrink(model, Masks.ones(model), torch.randn(IMAGES)) is model


def test_widths_are_rounded_up_with_dead_units():
    model, x = made("projection skip"), torch.randn(IMAGES)
    masks = prune(model, "l1_filter", 0.6, layers=["first"])  # 2 of 5 are left
    assert shrink(model, masks, x).first.out_channels == 2
    assert shrink(model, masks, x, round_to=4).first.out_channels == 4


def test_an_empty_layer_is_refused_by_name():
    model = made("chain")
    masks = prune(model, "l1_filter", 0.99, layers=["0"], allow_empty=True)
    assert not masks["0.weight"].any()
    with pytest.raises(ShrinkError, match="layer '0' has no live unit left"):
        remove_dead(model, masks, torch.randn(IMAGES))


def test_a_model_needs_an_example():
    with pytest.raises(ShrinkError, match="give a batch of inputs, shrink"):
        shrink(made("gate"))


def test_masks_of_another_model_are_refused():
    with pytest.raises(MaskError, match=r"no parameter '1\.weight'"):
        shrink(made("gate"), {"1.weight": torch.ones(2, 2)}, torch.randn(IMAGES))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_optimiser_is_carried_over_and_goes_on_as_before(kind):
    model, x = made("identity skip"), torch.randn(IMAGES)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimiser = kind(model.parameters(), lr=0.01, **options)
    masks = prune(model, "l1_filter", 0.34, layers=["second"])
    masks.apply_(model)

    def step(net, rule):
        rule.zero_grad()
        net(x).square().sum().backward()
        rule.step()

    with masks.hold(model, optimiser):
        step(model, optimiser)
        found = remove_dead(model, masks, x)
        rule = carry(optimiser, model, found)
        live = {id(parameter) for group in rule.param_groups for parameter in group["params"]}
        assert live == {id(parameter) for parameter in found.model.parameters()}
        step(model, optimiser)
    step(found.model, rule)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model(x), rtol=1e-3, atol=1e-4)


def test_what_is_not_understood_stays():
    net = Net(
        lambda net, x: net.head(torch.fft.fft(net.first(x)).real.flatten(1)), first=conv(2, 3), head=nn.Linear(192, 4)
    )
    with pytest.warns(NotRemoved, match=r"1 of 1 .*_fft_r2c in the forward of the model mixes channels"):
        assert shrink(net, without_row(net, "first", 0), torch.randn(IMAGES)).first.out_channels == 3


def test_groups_stay_of_one_size_and_what_fills_up_is_zero():
    model, x = made("grouped"), torch.randn(IMAGES)
    masks = without_row(model, "2", 0) & without_row(model, "2", 1) & without_row(model, "2", 3)
    found = remove_dead(model, masks, x)  # of 3 filters in each of 2 groups, 1 and 2 are left
    assert found.units["2"].tolist() == [0, 2, 4, 5]
    layer = found.model[2]
    assert (layer.groups, layer.in_channels, layer.out_channels, tuple(layer.weight.shape)) == (2, 6, 4, (4, 3, 3, 3))
    assert not layer.weight[0].any()
    assert not layer.bias[0].any()
    assert found.stayed["2"] == "1 of 6 units: kept to fill up"
    whole_group = masks & without_row(model, "2", 2)
    layer = remove_dead(model, whole_group, x).model[2]
    assert (layer.groups, layer.in_channels, layer.out_channels) == (1, 3, 2)


def test_moments_of_a_grouped_layer_are_cut_to_the_same_places():
    model, x = made("channel multiplier"), torch.randn(IMAGES)
    masks = functools.reduce(operator.and_, (without_row(model, "2", row) for row in (0, 1, 6, 7)))
    found = remove_dead(model, masks, x)
    name = "4.weight"
    assert found.index[name][1].dim() == 2
    numbered = torch.arange(model.get_parameter(name).numel()).view(model.get_parameter(name).shape)
    places = found.cut(name, numbered).flatten()
    small = found.model.get_parameter(name).flatten()
    same = model.get_parameter(name).flatten()[places] == small
    assert bool((same | (small == 0)).all())


def test_a_module_that_pads_channels_keeps_its_class():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.pad, self.conv = nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), conv(4, 6)

        def forward(self, x):
            return F.relu(self.conv(x) + self.pad(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(conv(2, 4), nn.ReLU(), Skip(), nn.Flatten(), head(384)), torch.randn(IMAGES)
    small = shrink(model, without_row(model, "2.conv", 0), x)
    assert small[2].pad.padding == (0, 0, 0, 0, 0, 1)
    assert type(small[2]) is Skip
    assert model[2].pad.padding == (0, 0, 0, 0, 1, 1)


def test_a_constant_goes_through_pooling_and_concatenation_into_the_next_norms():
    def forward(net, x):
        a = F.avg_pool2d(net.first(torch.sigmoid(net.start(x))), 2)
        return net.head(net.second(F.relu(net.norm(torch.cat([F.avg_pool2d(x, 2), a], 1)))).mean((2, 3)))

    torch.manual_seed(0)
    model = Net(
        forward, start=conv(2, 4), first=nn.Conv2d(4, 3, 1, bias=False), norm=nn.BatchNorm2d(5), second=conv(5, 4),
        head=head(4)
    )  # fmt: skip
    x = torch.randn(IMAGES)
    small = shrink(model.eval(), without_row(model, "start", 1, bias=False), x)
    assert small.start.out_channels == 3
    assert torch.equal(small.norm.running_mean[:2], model.norm.running_mean[:2])
    assert not torch.equal(small.norm.running_mean[2:], model.norm.running_mean[2:])


def test_weights_that_two_layers_share_stay_as_they_are():
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[5].weight = model[3].weight
    x = torch.randn(IMAGES)
    small = shrink(model, without_row(model, "1", 0), x)
    assert small[1].out_features == 5
    assert small[5].weight is small[3].weight


def test_several_outputs_are_all_kept_and_compared():
    def forward(net, x):
        x = net.first(x).relu()
        return {"logits": net.head(x.mean((2, 3))), "maps": [net.second(x)]}

    model = Net(forward, first=conv(2, 6), second=conv(6, 3), head=head(6))
    small = shrink(model, without_row(model, "first", 2), x := torch.randn(IMAGES))
    assert small.first.out_channels == 5
    assert small(x)["maps"][0].shape == (3, 3, 8, 8)


def test_masks_of_torch_have_to_come_off_first():
    model = made("chain")
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(ShrinkError, match=r"torch\.nn\.utils\.prune is at work on '0': .*from_torch_prune"):
        shrink(model, None, torch.randn(IMAGES))


def test_the_smaller_model_can_be_channels_last_and_comes_with_its_optimiser():
    model, x = made("identity skip").train(), torch.randn(IMAGES)
    rule = torch.optim.Adam(model.parameters())
    small, own = shrink(model, without_row(model, "second", 0), x, memory_format=torch.channels_last, optimizer=rule)
    assert small.training
    assert small.second.weight.is_contiguous(memory_format=torch.channels_last)
    assert {id(p) for group in own.param_groups for p in group["params"]} == {id(p) for p in small.parameters()}
    same = shrink(model, None, x, memory_format=torch.channels_last)
    assert same is not model
    assert model.second.weight.is_contiguous()


def test_dead_units_of_a_model_are_counted_with_the_reason():
    model, x = made("projection skip"), torch.randn(IMAGES)
    one = without_row(model, "second", 2)
    one.apply_(model)
    assert dead_units(model, x) == {"second": "1 of 6 units: what they are joined with is alive"}


class Block(nn.Module):
    """What follows attention in a transformer, on [N, tokens, features]."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


def test_the_feed_forward_part_of_a_transformer_shrinks():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), Block(), Block()), torch.randn(2, 3, 6)
    masks = without_row(model, "1.up", 2, bias=False) & without_row(model, "2.up", 3) & without_row(model, "0", 1)
    found = remove_dead(model, masks, x)  # unit 2 is constant and goes into the bias of the next layer
    assert [len(found.units[name]) for name in ("0", "1.up", "1.down", "2.up", "2.down")] == [8, 15, 8, 15, 8]
    assert found.model[1].down.weight.shape == (8, 15)
    assert list(found.stayed) == ["0"]


def test_a_first_layer_that_works_in_place_leaves_the_example_alone():
    model, x = nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Linear(5, 6), nn.Linear(6, 3)), torch.randn(4, 5)
    before = x.clone()
    assert shrink(model, without_row(model, "1", 0), x)[1].out_features == 5
    assert torch.equal(x, before)


def test_one_sample_without_a_batch_does_as_well():
    model = nn.Sequential(conv(2, 5), nn.ReLU(), nn.MaxPool2d(2), conv(5, 3))
    found = remove_dead(model, without_row(model, "0", 1), torch.randn(2, 5, 8))
    assert (len(found.units["0"]), found.stayed) == (4, {})


def test_a_head_whose_outputs_are_thrown_away_stays_whole():
    def forward(net, x):
        x = F.relu(net.first(x))
        net.aux(F.relu(net.inner(x)))
        return net.head(x.mean((2, 3)))

    model = Net(forward, first=conv(2, 6), inner=conv(6, 5), aux=conv(5, 3), head=head(6))
    x = torch.randn(IMAGES)
    assert shrink(model, None, x) is model
    small = shrink(model, without_row(model, "first", 1) & without_row(model, "inner", 2), x)
    assert [small.get_submodule(n).in_channels for n in ("inner", "aux")] == [5, 4]
    assert [len(small.get_submodule(n).weight) for n in ("first", "inner", "aux")] == [5, 4, 3]


@dataclass
class Outputs:
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("made_of", "why"),
    [
        (lambda net, y: y + torch.tensor([0.0, -math.inf, 0.0, 0.0]), None),
        (lambda net, y: Outputs(y * net.factor), None),
        (lambda net, y: y * math.nan, "the model gives nan for the example"),
        (lambda net, y: SimpleNamespace(logits=y), "gives a SimpleNamespace, in which no tensor is found"),
    ],
    ids=["infinite", "in a dataclass", "nan before", "unknown"],
)
def test_every_output_is_compared(made_of, why):
    model = Net(lambda net, x: made_of(net, net.head(net.first(x))), first=nn.Linear(5, 5), head=head(5))
    model.factor = 5.0
    masks, x = without_row(model, "first", 1), torch.randn(3, 5)
    with pytest.raises(StructureError, match=why) if why else contextlib.nullcontext():
        assert shrink(model, masks, x).first.out_features == 4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"round_to": 0}, "round_to = 0: should be a whole number, 1 or more"),
        ({"round_to": "8"}, "round_to = '8': should be a whole number"),
        ({"memory_format": "channels_last"}, "memory_format = 'channels_last': should be None, or torch"),
    ],
)
def test_options_of_another_kind_are_refused(options, why):
    with pytest.raises(ShrinkError, match=why):
        shrink(made("chain"), None, torch.randn(IMAGES), **options)


def test_moments_that_cannot_be_cut_are_refused():
    example, model = torch.randn(3, 9), mlp(9, 7, 4)
    rule = torch.optim.Adafactor(model.parameters())  # which keeps moments of rows and of columns
    model(torch.randn(3, 9)).sum().backward()
    rule.step()
    assert shrink(model, None, example, optimizer=rule)[1].state
    with pytest.raises(ShrinkError, match=r"Adafactor holds 'row_var'.*cannot be cut .*build a new one"):
        shrink(model, without_row(model, "hidden_1", 2), example, optimizer=rule)
