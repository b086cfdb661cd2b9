"""Costs, against counts done by hand."""

import time

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from prunelab import settings
from prunelab.errors import PrunelabError
from prunelab.models import build, mlp
from prunelab.structure import cost

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)

LENET_5_MACS = {
    "conv_1.weight": 24 * 24 * 25 * 20,
    "conv_2.weight": 8 * 8 * 25 * 20 * 50,
    "dense.weight": 800 * 500,
    "output.weight": 500 * 10,
}


@pytest.fixture(scope="module")
def lenet_5() -> nn.Sequential:
    return build(settings.Model("lenet_5"), MNIST, 10, seed=0)


def four_numbers() -> nn.Sequential:
    model = mlp(2, 2, 1)
    with torch.no_grad():
        model.hidden_1.weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        model.hidden_1.bias.zero_()
        model.output.weight.copy_(torch.tensor([[5.0, 6.0]]))
        model.output.bias.fill_(7.0)
    return model


def test_the_network_of_dyprune_has_the_published_counts():
    found = cost.summarise(build(settings.Model("mlp"), MNIST, 10, seed=0), MNIST, {})
    assert (found.parameters, found.weights_total) == (2_797_010, 2_794_000)
    assert found.macs == found.effective_macs == 2_794_000  # each weight of a fully connected network works once
    assert (found.sparsity, found.compression_ratio) == (0.0, 1.0)


def test_macs_of_lenet_5_are_those_counted_by_hand_layer_by_layer(lenet_5):
    assert cost.layer_macs(lenet_5, MNIST) == LENET_5_MACS
    assert cost.macs(lenet_5, MNIST) == sum(LENET_5_MACS.values()) == 2_293_000


@pytest.mark.parametrize(("name", "flops"), [("lenet_300_100", 531_990), ("lenet_5", 4_614_930)])
def test_macs_agree_with_the_flops_of_nnrelief_once_its_biases_are_taken_out(name, flops):
    # NNrelief counts 2 (inputs + 1) per position and filter in a convolution and 2 inputs - 1 per neuron.
    model = build(settings.Model(name), MNIST, 10, seed=0)
    maps = {"conv_1": 24 * 24, "conv_2": 8 * 8}
    biases = sum(
        2 * maps[layer] * module.out_channels if isinstance(module, nn.Conv2d) else -module.out_features
        for layer, module in model.named_children()
        if isinstance(module, nn.Conv2d | nn.Linear)
    )
    assert 2 * cost.macs(model, MNIST) + biases == flops


def test_macs_of_the_small_lenet_5_are_those_that_fvcore_gives():
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)),
    )
    assert cost.macs(model, MNIST) == 281_640


def test_macs_count_padding_stride_and_groups():
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, stride=2))
    assert cost.macs(depthwise, (4, 8, 8)) == 4 * 4 * 9 * 4
    assert cost.layer_macs(depthwise, (4, 8, 8)) == {"0.weight": 4 * 4 * 9 * 4}
    model = build(settings.Model("dropnet_b"), MNIST, 10, seed=0)
    assert cost.macs(model, MNIST) == 28 * 28 * 9 * 64 + 14 * 14 * 9 * 64 * 64 + 49 * 64 * 10


def test_effective_macs_weight_each_layer_by_its_own_density(lenet_5):
    conv = torch.ones(50, 20, 5, 5, dtype=torch.bool)
    conv[:, :15] = False  # a quarter of the kernels stays
    dense = torch.zeros(500, 800, dtype=torch.bool)
    dense[:10, :7] = True
    left = LENET_5_MACS["conv_1.weight"] + LENET_5_MACS["conv_2.weight"] // 4 + 70 + 5_000
    masks = {"conv_2.weight": conv, "dense.weight": dense}
    assert cost.summarise(lenet_5, MNIST, masks).effective_macs == left
    assert cost.summarise(lenet_5, MNIST, {}).effective_macs == cost.macs(lenet_5, MNIST)


def test_masks_decide_what_is_zero_and_the_values_do_where_there_are_none():
    model = four_numbers()
    masks = {
        "hidden_1.weight": torch.tensor([[True, True], [False, False]]),
        "hidden_1.bias": torch.tensor([True, False]),
    }
    by_values, unpruned, found = (cost.summarise(model, (2,), given) for given in (None, {}, masks))
    assert (by_values.nonzero, by_values.effective_macs) == (3 + 0 + 2 + 1, 5)
    assert unpruned.nonzero == 4 + 2 + 2 + 1  # the zeros that are there were not pruned
    assert found == cost.Cost(9, 2 + 1 + 2 + 1, 4, 6, 6, 4, 9 * 4)
    assert found.sparsity == pytest.approx(1 / 3)
    assert found.compression_ratio == 1.5


def test_bytes_include_buffers_and_the_width_of_the_numbers():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).half()
    assert cost.summarise(model, (3,)).bytes == 2 * (6 + 2 + 2 + 2 + 2 + 2) + 8  # num_batches_tracked is one int64


def test_a_weight_that_works_twice_costs_twice():
    layer = nn.Linear(3, 3)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    assert cost.layer_macs(twice, (3,)) == {"0.weight": 18}
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    one_left = torch.zeros(3, 3, dtype=torch.bool)
    one_left[0, 0] = True
    found = cost.summarise(tied, (3,), {"0.weight": one_left})
    assert (found.parameters, found.effective_macs) == (9 + 6, 2)


def test_pooling_that_comes_twice_halves_twice():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), pool, nn.Conv2d(2, 3, 1), pool, nn.Conv2d(3, 1, 1))
    assert cost.layer_macs(model, (1, 8, 8)) == {"0.weight": 64 * 2, "2.weight": 16 * 6, "4.weight": 4 * 3}


class Attention(nn.Module):
    def forward(self, x):
        return x @ x.transpose(-1, -2)


def test_products_without_a_weight_count_and_stay_dense():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), Attention())
    assert cost.macs(model, (7, 5)) == 7 * 25 + 7 * 7 * 5
    nothing = {"0.weight": torch.zeros(5, 5, dtype=torch.bool)}
    assert cost.summarise(model, (7, 5), nothing).effective_macs == 7 * 7 * 5


def test_counting_changes_neither_the_model_nor_the_generator():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert cost.macs(model, (1, 3, 3)) == 18 + 4  # batch norm in training refuses a single value; counting does not
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_torch_prunes_can_be_counted():
    model = torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
    assert cost.macs(model, (4,)) == 16
    assert model.weight.device.type == "cpu"


def test_a_mask_that_fits_nothing_is_refused_in_one_line(lenet_5):
    with pytest.raises(PrunelabError, match=r"'conv_1.weigth'.*did you mean 'conv_1.weight'"):
        cost.summarise(lenet_5, MNIST, {"conv_1.weigth": torch.ones(20, 1, 5, 5)})
    with pytest.raises(PrunelabError, match=r"'conv_1.bias' has shape \(3,\), its parameter \(20,\)"):
        cost.summarise(lenet_5, MNIST, {"conv_1.bias": torch.ones(3)})


def test_an_input_that_does_not_fit_is_refused_in_one_line(lenet_5):
    with pytest.raises(PrunelabError, match=r"takes no input of shape \(3, 32, 32\)") as caught:
        cost.macs(lenet_5, CIFAR)
    assert "\n" not in str(caught.value)


def test_a_summary_of_lenet_5_is_cheap_enough_for_every_round(lenet_5):
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in lenet_5.named_parameters()}

    def seconds() -> float:
        start = time.perf_counter()
        cost.summarise(lenet_5, MNIST, masks)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(30)) < 0.02  # 3 ms where nothing else runs


@pytest.mark.parametrize("name", ["mlp", "lenet_300_100", "lenet_5", "dropnet_a", "dropnet_b", "dropnet_c"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 40)])
def test_a_chain_is_reckoned_as_the_flop_counter_counts_it(name, shape):
    class Wrapped(nn.Module):  # no chain, so it is counted
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = build(settings.Model(name), shape, 7, 0)
    by_shape, counted = cost.layer_macs(model, shape), cost.layer_macs(Wrapped(model), shape)
    assert {f"inner.{layer}": macs for layer, macs in by_shape.items()} == counted
    assert cost.macs(model, shape) == cost.macs(Wrapped(model), shape) == sum(by_shape.values())


def gone(model, example, masks):
    found = cost.summarise(model, example, masks)
    return found.macs - found.effective_macs


def rows_of(parameter, kept):
    """A mask that keeps the first rows."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    mask[:kept] = True
    return mask


class Attending(nn.Module):
    def __init__(self, queries=None):
        super().__init__()
        self.attend, self.head, self.queries = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 2), queries

    def forward(self, x):
        return self.head(self.attend(x[:, : self.queries], x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Paired(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(4, 5, 3)

    def forward(self, x):
        return self.both(x[:, :4], x[:, 4:])


class Adapted(nn.Linear):
    """Low-rank additions, merged before the product."""

    def __init__(self):
        super().__init__(4, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return nn.functional.linear(x, torch.cat([self.weight[:3], self.weight[3:]]) + 0 * (self.up @ self.down))


def scaled():
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6), dim=0))


@pytest.mark.parametrize(
    ("model", "shape", "name", "kept", "right"),
    [
        (Attending(), (5, 16), "attend.out_proj.weight", 8, 5 * 8 * 16),
        (Attending(), (5, 16), "attend.in_proj_weight", 32, 5 * 16 * 16),
        (Attending(1), (5, 16), "attend.in_proj_weight", 32, 5 * 16 * 16),  # the last third: values of all five
        (Recurrent(nn.LSTM), (5, 4), "rnn.weight_ih_l0", 8, 5 * 24 * 4),
        (Recurrent(nn.GRU), (5, 4), "rnn.weight_hh_l0", 8, 5 * 16 * 8),
        (Paired(), (9,), "both.weight", 1, 2 * 4 * 5),
        (nn.Conv1d(3, 8, 3), (3, 10), "weight", 6, 2 * 9 * 8),
        (nn.Conv3d(3, 8, 2), (3, 4, 4, 4), "weight", 6, 2 * 24 * 27),
        (nn.ConvTranspose2d(3, 8, 3, stride=2), (3, 6, 6), "weight", 1, 36 * 2 * 8 * 9),
        (Adapted(), (4,), "weight", 2, 4 * 4),
        (scaled(), (4,), "0.parametrizations.weight.original1", 2, 4 * 4),
    ],
)
def test_work_falls_with_any_weight_that_a_product_uses(model, shape, name, kept, right):
    model = nn.Sequential(model) if isinstance(model, nn.Conv1d | nn.Conv3d | nn.ConvTranspose2d) else model
    name = name if name in dict(model.named_parameters()) else f"0.{name}"
    work = cost.work(model, shape)
    mask = rows_of(model.get_parameter(name), kept)
    assert work.macs - work.effective({name: mask}, {name: int(mask.sum())}) == right
    assert work.effective({}, {}) == work.macs


def test_a_query_of_one_token_uses_its_part_of_the_weights_once():
    model = Attending(1)
    third = torch.ones(48, 16, dtype=torch.bool)
    third[:16] = False
    work = cost.work(model, (5, 16))
    assert work.macs - work.effective({"attend.in_proj_weight": third}, {"attend.in_proj_weight": 512}) == 16 * 16


def test_all_work_is_what_the_flop_counter_of_torch_sees():
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    nets = [
        (nn.Sequential(Recurrent(nn.GRU)), (5, 4)),
        (
            nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 3)),
            (4, 6, 6),
        ),
        (build(settings.Model("resnet20"), (1, 8, 8), 10, 0), (1, 8, 8)),
    ]
    for net, shape in nets:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net.eval()(torch.randn(1, *shape))
        assert cost.macs(net, shape) == counter.get_total_flops() // 2
    # One fast operation hides all of them from torch's counter.
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    assert cost.macs(layer, (5, 16)) == 5 * (4 * 256 + 2 * 512) + 2 * 25 * 16, (
        "one fast operation hides them from torch"
    )


def test_a_model_that_looks_at_values_is_counted_in_a_real_run():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.rnn = nn.Linear(4, 6), nn.LSTM(6, 8, batch_first=True)

        def forward(self, x):
            x = self.a(x - torch.tensor([0.1, 0.2, 0.3, 0.4]))
            return x if x.sum().item() > 1e9 else self.rnn(x[:, None])[0]

    assert cost.layer_macs(Looks(), (4,)) == {"a.weight": 24, "rnn.weight_ih_l0": 192, "rnn.weight_hh_l0": 256}


def test_inputs_wrappers_and_packed_weights_are_taken_as_they_come():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(5, 8)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    x, y = torch.randn(3, 4), torch.randn(3, 5)
    assert cost.macs(Two(), (x, y)) == cost.macs(Two(), {"y": y, "x": x}) == 72
    wrappers = {"module.": nn.DataParallel, "_orig_mod.": lambda net: torch.compile(net, backend="eager")}
    for prefix, wrap in (wrappers | {"module. ": torch.optim.swa_utils.AveragedModel}).items():
        assert cost.layer_macs(wrap(nn.Linear(4, 8)), (4,)) == {f"{prefix.strip()}weight": 32}
