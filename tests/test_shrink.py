"""Smaller models of any kind: equal outputs under random masks, the reasons for what stays, optimisers carried over."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunelab.chains import ShrinkError
from prunelab.graph import GraphError, trace
from prunelab.masks import MaskError, Masks
from prunelab.models import mlp
from prunelab.pruners import prune
from prunelab.shrink import carry, remove_dead, shrink

IMAGES = (3, 2, 8, 8)


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
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
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
    assert found.stayed == {"0": "1 of 5 units: constant but not 0, and module '3' (Conv2d) pads its input with zeros"}


def test_a_constant_is_folded_where_that_is_exact():
    model, x = made("unpadded"), torch.randn(IMAGES)
    found = remove_dead(model, without_row(model, "0", 1, bias=False), x)  # the sigmoid of its bias goes on
    assert found.model[0].out_channels == 4
    assert not torch.equal(found.model[2].bias, model[2].bias)


def test_nothing_pruned_gives_the_same_object():
    for name in ARCHITECTURES:
        model = made(name)
        assert shrink(model, Masks.ones(model), torch.randn(IMAGES)) is model
    assert shrink(net := mlp(4, 3, 2)) is net


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


def test_a_model_that_branches_on_values_is_refused_in_one_line():
    net = Net(lambda net, x: net.head(x.flatten(1)) if x.sum() > 0 else x, head=nn.Linear(128, 4))
    with pytest.raises(GraphError, match=r"cannot be traced .*should not branch on values") as caught:
        shrink(net, None, torch.randn(IMAGES))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_chain_needs_an_example():
    with pytest.raises(ShrinkError, match="give an example, shrink"):
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


def test_the_graph_names_what_it_does_not_understand():
    net = Net(
        lambda net, x: net.head(torch.fft.fft(net.first(x)).real.flatten(1)), first=conv(2, 3), head=nn.Linear(192, 4)
    )
    odd = [node for node in trace(net, torch.randn(IMAGES)) if node.kind == "opaque"]
    assert odd
    assert shrink(net, without_row(net, "first", 0), torch.randn(IMAGES)).first.out_channels == 3
