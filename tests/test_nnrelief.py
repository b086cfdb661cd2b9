"""NNrelief against an oracle that is written as the published rule reads, in loops, and on numbers by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from prunelab import models
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.models import mlp
from prunelab.pruners import prune
from prunelab.pruners.nnrelief import NNrelief
from prunelab.pruners.signals import carries, pruning_set, signals
from prunelab.settings import Model

SEEDS = range(50)


def loop_dense(weight, x):
    """mean |w x| of every connection."""
    return np.array([[np.mean([abs(w * sample[i]) for sample in x]) for i, w in enumerate(row)] for row in weight])


def loop_response(kernel, image, stride, padding):
    """|K| * |x|, window by window."""
    image = np.pad(np.abs(image), padding)
    size = kernel.shape[0]
    rows = (image.shape[0] - size) // stride + 1
    columns = (image.shape[1] - size) // stride + 1
    return np.array([
        [
            (np.abs(kernel) * image[r * stride : r * stride + size, c * stride : c * stride + size]).sum()
            for c in range(columns)
        ]
        for r in range(rows)
    ])  # fmt: skip


def loop_conv(weight, x, stride, padding, reduce):
    found = np.zeros(weight.shape[:2])
    for j, filters in enumerate(weight):
        for i, kernel in enumerate(filters):
            if reduce == "mean_of_norm":
                found[j, i] = np.mean([np.linalg.norm(loop_response(kernel, s[i], stride, padding)) for s in x])
            else:
                response = loop_response(kernel, np.mean([np.abs(s[i]) for s in x], axis=0), stride, padding)
                found[j, i] = np.linalg.norm(response) if reduce == "norm_of_mean" else response.sum()
    return found


def loop_keep(row, alpha, faithful):
    """The rule for one unit: section 1.2 (the text) and 1.3 (the code)."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    total, running, count = sum(row), 0.0, 0
    sums = []
    for i in order:
        running += row[i]
        sums.append(running)
    count = sum(s < alpha * total for s in sums)
    if faithful:
        threshold = row[order[count + 1 if count < len(row) - 1 else len(row) - 1]]
        return [value > threshold for value in row]
    kept = set(order[: count + 1])
    return [i in kept and row[i] > 0 for i in range(len(row))]


@pytest.mark.parametrize("faithful", [False, True])
def test_the_rule_on_random_units_is_that_of_the_loops(faithful):
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        signal = draw.random((4, 7)) * (draw.random((4, 7)) < 0.8)
        found = carries(torch.tensor(signal), 0.9, faithful).numpy()
        assert found.tolist() == [loop_keep(row.tolist(), 0.9, faithful) for row in signal]


def test_the_rule_by_hand():
    signal = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert carries(signal, 0.7).tolist() == [[True, True, False, False]]  # 4 + 3 is 70 %
    assert carries(signal, 0.71).tolist() == [[True, True, True, False]]
    assert carries(signal, 1.0).tolist() == [[True] * 4]
    assert carries(signal, 1.0, faithful=True).tolist() == [[True, True, True, False]]  # at least one goes
    ties = torch.tensor([[4.0, 2.0, 2.0, 2.0]])
    assert carries(ties, 0.55).sum() == 2
    assert carries(ties, 0.55, faithful=True).tolist() == [[True, False, False, False]]  # what equals it goes too
    assert carries(torch.zeros(1, 3), 0.9).tolist() == [[False] * 3]


def test_fully_connected_signals_are_those_of_the_loops():
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(6, 5)
        signal, bias = signals(model, ["0"], x)["0"]
        expected = loop_dense(model[0].weight.detach().numpy(), x.numpy())
        np.testing.assert_allclose(signal.numpy(), expected, rtol=1e-4)
        np.testing.assert_allclose(bias.numpy(), model[0].bias.detach().abs().numpy())


@pytest.mark.parametrize("reduce", ["mean_of_norm", "norm_of_mean", "sum"])
def test_convolution_signals_are_those_of_the_loops(reduce):
    for seed in SEEDS:
        torch.manual_seed(seed)
        stride, padding = 1 + seed % 2, seed % 3
        model, x = nn.Sequential(nn.Conv2d(2, 3, 3, stride, padding)), torch.randn(4, 2, 6, 5)
        signal, bias = signals(model, ["0"], x, reduce)["0"]
        expected = loop_conv(model[0].weight.detach().numpy(), x.numpy(), stride, padding, reduce)
        np.testing.assert_allclose(signal.numpy(), expected, rtol=1e-3)
        area = model(x)[0, 0].numel()
        factor = area if reduce == "sum" else math.sqrt(area)
        np.testing.assert_allclose(bias.numpy(), factor * model[0].bias.detach().abs().numpy(), rtol=1e-5)


def test_groups_are_convolutions_side_by_side():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(3, 4, 6, 6)
    for reduce in ("mean_of_norm", "norm_of_mean", "sum"):
        whole, _ = signals(nn.Sequential(layer), ["0"], x, reduce)["0"]
        for half in range(2):
            own = nn.Conv2d(2, 3, 3)
            own.weight.data = layer.weight.data[3 * half : 3 * half + 3]
            part, _ = signals(nn.Sequential(own), ["0"], x[:, 2 * half : 2 * half + 2], reduce)["0"]
            torch.testing.assert_close(whole[3 * half : 3 * half + 3], part)


def loop_masks(model, x, alpha, faithful):
    """The whole step on a net of two hidden layers: the rule, silent units, then backwards."""
    layers = [model.hidden_1, model.hidden_2, model.output]
    weights = [layer.weight.detach().numpy().copy() for layer in layers]
    biases = [layer.bias.detach().numpy().copy() for layer in layers]
    inputs, keeps = x.numpy(), []
    activations = []
    for weight, bias in zip(weights, biases, strict=True):
        signal = np.concatenate([loop_dense(weight, inputs), np.abs(bias)[:, None]], 1)
        keeps.append(np.array([loop_keep(row.tolist(), alpha, faithful) for row in signal]))
        inputs = np.maximum(inputs @ weight.T + bias, 0)
        activations.append(inputs)
    pruned = x.numpy()
    for number, keep in enumerate(keeps[:-1]):
        pruned = np.maximum(pruned @ (weights[number] * keep[:, :-1]).T + biases[number] * keep[:, -1], 0)
        keep[pruned.sum(0) == 0] = False
    while True:
        before = sum(int(keep.sum()) for keep in keeps)
        for number in (1, 0):
            keeps[number][~keeps[number + 1][:, :-1].any(0)] = False
        if faithful or before == sum(int(keep.sum()) for keep in keeps):
            return keeps


@pytest.mark.parametrize("variant", ["corrected", "faithful"])
def test_masks_of_a_perceptron_are_those_of_the_loops(variant):
    for seed in SEEDS:
        torch.manual_seed(seed)
        model, x = mlp(6, 5, 4, 3), torch.rand(8, 6)
        found = prune(model, "nnrelief", 0.0, batches=[x], alpha_fc=0.8, variant=variant, samples=0, allow_empty=True)
        for layer, keep in zip(
            ("hidden_1", "hidden_2", "output"), loop_masks(model, x, 0.8, variant == "faithful"), strict=True
        ):
            np.testing.assert_array_equal(found[f"{layer}.weight"].numpy(), keep[:, :-1], err_msg=f"{seed} {layer}")
            np.testing.assert_array_equal(found[f"{layer}.bias"].numpy(), keep[:, -1], err_msg=f"{seed} {layer} bias")


@pytest.mark.parametrize("name", ["lenet_5", "vgg_like", "resnet20"])
def test_any_model_is_pruned_and_left_as_it_was(name):
    hidden = {"lenet_5": (4, 5, 6), "vgg_like": (8, 8, 12, 12, 12, 16), "resnet20": (4, 4, 8)}[name]
    model = models.build(Model(name, hidden, "kaiming_normal"), (3, 32, 32), 10, 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.rand(12, 3, 32, 32)
    first = prune(model, "nnrelief", 0.0, batches=[x[:5], x[5:]])
    again = prune(model, "nnrelief", 0.0, batches=[x], current=first)
    assert 0 < first.kept < first.total
    assert again.kept <= first.kept
    for mask_name, mask in first.items():
        if mask.dim() == 4:  # whole kernels go
            flat = mask.flatten(2)
            assert (flat.all(2) == flat.any(2)).all(), mask_name
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


def test_in_a_residual_block_the_weaker_side_loses():
    torch.manual_seed(0)
    model = models.build(Model("resnet20", (4, 4, 4)), (3, 16, 16), 10, 0)
    block = model.stage_1.block_2
    with torch.no_grad():
        block.norm_2.weight[1] = 1e-6
        block.norm_2.bias[1] = 0
    masks = prune(model, "nnrelief", 0.0, batches=[torch.rand(6, 3, 16, 16)])
    assert not masks["stage_1.block_2.conv_2.weight"][1].any()
    assert not masks["stage_1.block_2.norm_2.weight"][1]
    assert masks["stage_1.block_2.conv_2.weight"][0].any()


def test_the_pruning_set_is_drawn_evenly_whatever_the_batches():
    x = torch.arange(1000.0)
    one = pruning_set([x], 100, 3)
    assert len(one) == len(set(one.tolist())) == 100
    assert 400 < one.mean() < 600
    assert sorted(pruning_set(list(x.split(7)), 1000, 3).tolist()) == x.tolist()
    assert len(pruning_set([(x, x)], 0, 0)) == 1000


def test_what_it_cannot_do_is_refused_in_one_line():
    model = mlp(4, 3, 2)
    with pytest.raises(PrunelabError, match="give batches"):
        prune(model, "nnrelief", 0.0)
    with pytest.raises(PrunelabError, match=r"alpha_fc = 1\.2: should be above 0 and at most 1"):
        NNrelief(alpha_fc=1.2)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.fft.fft(self.first(x)).abs())

    odd = Odd()
    before = {key: value.clone() for key, value in odd.state_dict().items()}
    with pytest.raises(PrunelabError, match=r"nnrelief does not understand 'fft_fft'.*choose the layers before it"):
        prune(odd, "nnrelief", 0.0, batches=[torch.rand(3, 4)])
    assert all(torch.equal(before[key], value) for key, value in odd.state_dict().items())
    assert isinstance(Masks.ones(odd), Masks)


def test_faithful_takes_the_norm_of_the_code_that_has_such_a_network(monkeypatch):
    from prunelab.pruners import nnrelief

    asked = []

    def recorded(model, layers, data, reduce):
        asked.append(reduce)
        return signals(model, layers, data, reduce)

    monkeypatch.setattr(nnrelief, "signals", recorded)
    x = torch.rand(5, 1, 8, 8)
    lenet = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    vgg = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *lenet[1:])
    for model, variant, theirs in (
        (lenet, "faithful", "sum"),
        (vgg, "faithful", "norm_of_mean"),
        (lenet, "corrected", "mean_of_norm"),
    ):
        asked.clear()
        prune(model, "nnrelief", 0.0, batches=[x], variant=variant, allow_empty=True)
        assert set(asked) == {theirs}
    asked.clear()
    prune(lenet, "nnrelief", 0.0, batches=[x], variant="faithful", conv_reduce="norm_of_mean", allow_empty=True)
    assert set(asked) == {"norm_of_mean"}
