"""Scores of the field on numbers by hand, against autograd, and what they do not do to the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunelab import pruners
from prunelab.errors import PrunelabError
from prunelab.masks import MaskError
from prunelab.models import mlp
from prunelab.pruners import prune
from prunelab.pruners.criterion import Criterion, input_norms, loss_gradients


def one_row(*weights):
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return nn.Sequential(layer)


def kept(model, method, amount, **more):
    return prune(model, method, amount, **more)["0.weight"].tolist()[0]


def test_scores_since_the_start_by_hand():
    model, start = one_row(1.0, -2.0, 0.5, 3.0), {"0.weight": torch.tensor([[1.0, 0.0, -2.0, 4.0]])}
    # |w - w0| = 0, 2, 2.5, 1;  |w| - |w0| = 0, 2, -1.5, -1;  |w (w - w0)| = 0, 4, 1.25, 3
    assert kept(model, "movement", 0.5, start=start) == [False, True, True, False]
    assert kept(model, "magnitude_increase", 0.5, start=start) == [True, True, False, False]
    assert kept(model, "moved_magnitude", 0.5, start=start) == [False, True, False, True]
    with pytest.raises(PrunelabError, match="compares with the weights before training: give start="):
        prune(model, "movement", 0.5)


def test_wanda_by_hand_within_each_unit():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 1.5], [10.0, 1.0]])
    x = torch.tensor([[2.0, 1.0], [2.0, 1.0]])  # norms: sqrt(8), sqrt(2)
    assert input_norms(model, ["0"], [(x, x)])["0"].tolist() == pytest.approx([8**0.5, 2**0.5])
    # scores 2.83, 2.12 | 28.3, 1.41: of each row the smaller goes, though 1.41 < 2.12 < 2.83 over all
    masks = prune(model, "wanda", 0.5, batches=[(x, torch.tensor([0, 1]))])
    assert masks["0.weight"].tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("method", ["snip", "taylor"])
def test_gradient_scores_are_weights_times_the_gradient(method):
    torch.manual_seed(0)
    model = mlp(5, 4, 3)
    batches = [(torch.randn(6, 5), torch.randint(0, 3, (6,))), (torch.randn(2, 5), torch.randint(0, 3, (2,)))]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    slope = torch.autograd.grad(F.cross_entropy(model(x), y), model.hidden_1.weight)[0]
    torch.testing.assert_close(loss_gradients(model, ["hidden_1.weight"], batches)["hidden_1.weight"], slope)
    pruner, draw = pruners.METHODS[method], torch.Generator()
    found = pruner.pruner(**pruner.preset).scores(model, batches, pruners.first_masks(model, Criterion()), draw)
    expected = (model.hidden_1.weight * slope).abs()
    torch.testing.assert_close(found["hidden_1.weight"], expected if method == "snip" else expected.square())


def test_taylor_of_a_unit_is_the_square_of_its_sum():
    torch.manual_seed(0)
    model, x, y = mlp(5, 4, 3), torch.randn(6, 5), torch.randint(0, 3, (6,))
    slope = torch.autograd.grad(F.cross_entropy(model(x), y), model.hidden_1.weight)[0]
    total = (model.hidden_1.weight * slope).sum(1).square()
    criterion = Criterion("taylor", "neuron")
    found = criterion.scores(model, [(x, y)], pruners.first_masks(model, criterion), torch.Generator())["hidden_1"]
    torch.testing.assert_close(found, total / total.mean())


def test_slimming_takes_the_filters_with_the_smallest_scales():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model[1].weight.data = torch.tensor([0.1, -3.0, 0.2, 1.0])
    masks = prune(model, "slimming", 0.5)
    assert masks["0.weight"].flatten(1).any(1).tolist() == [False, True, False, True]
    assert masks["1.bias"].tolist() == [False, True, False, True]
    with pytest.raises(MaskError, match="no layer that may be pruned has a BatchNorm"):
        prune(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), "slimming", 0.5)


def test_two_of_four_along_the_inputs():
    model = one_row(1.0, -2.0, 0.5, 3.0, 4.0, 4.5, -5.0, 0.0)
    assert kept(model, "n_of_m", 0.0) == [False, True, False, True, False, True, True, False]
    assert kept(model, "n_of_m", 0.0, n=1, m=2) == [False, True, False, True, False, True, True, False]
    conv = nn.Sequential(nn.Conv2d(4, 3, 3))
    assert (prune(conv, "n_of_m", 0.0)["0.weight"].sum(1) == 2).all()
    with pytest.raises(MaskError, match="no layer has inputs in multiples of 4"):
        prune(one_row(1.0, 2.0, 3.0), "n_of_m", 0.0)
    with pytest.raises(PrunelabError, match="n = 4, m = 4"):
        prune(model, "n_of_m", 0.0, n=4)


def test_names_that_make_no_sense_together_are_refused():
    for bad, message in (("batchnorm", "one of whole units"), ("wanda", "compares the weights of one unit")):
        with pytest.raises(PrunelabError, match=message):
            Criterion(bad, "weight" if bad == "batchnorm" else "filter")
    with pytest.raises(PrunelabError, match="looks at data: give batches="):
        prune(mlp(3, 2, 2), "snip", 0.5)


@pytest.mark.parametrize(
    "method", ["movement", "magnitude_increase", "moved_magnitude", "snip", "taylor", "wanda", "slimming", "n_of_m"]
)
def test_invariants(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    nn.init.uniform_(model[1].weight)
    start = {name: p + 0.1 * torch.randn_like(p) for name, p in model.state_dict().items() if p.is_floating_point()}
    batches = [(torch.randn(8, 4, 4, 4), torch.randint(0, 3, (8,))) for _ in range(2)]
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    options = {"batches": batches, "start": start}
    first = prune(model, method, 0.3, **options)
    assert first == prune(model, method, 0.3, **options)
    second = prune(model, method, 0.3, current=first, **options)
    assert all((mask <= first[name]).all() for name, mask in second.items() if name in first)
    if method not in ("slimming", "n_of_m"):
        assert first.weights.kept == first.weights.total - round(0.3 * first.weights.total) or method == "wanda"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks and m.training for m in model.modules())


class Attention(nn.Module):
    """One layer is called by the attention itself, and one by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return {"logits": self.b(self.a(x))}


def test_a_layer_that_takes_no_part_has_no_slope_and_one_whose_inputs_nobody_sees_is_named():
    model, batches = Attention(), [(torch.randn(6, 5, 4), torch.arange(6) % 3)]
    slopes = loss_gradients(model, ["out.weight", "unused.weight"], batches)
    assert slopes["out.weight"].any()
    assert not slopes["unused.weight"].any()
    layers = ["mix.out_proj", "out", "unused"]
    masks = prune(
        model, "taylor", 0.1, batches=batches, layers=layers
    )  # 16 of the 16 that are unused would be 3 of 32 too many
    assert masks.counts["unused.weight"] == 1
    for chosen, named in ((layers, "mix.out_proj"), (["out", "unused"], "unused")):
        with pytest.raises(PrunelabError, match=f"layer '{named}' is not called as a module"):
            prune(model, "wanda", 0.5, batches=batches, layers=chosen)
    assert prune(model, "wanda", 0.5, batches=batches, layers=["out"]).kept == 6


@pytest.mark.parametrize("method", ["snip", "taylor", "dropnet_oracle", "retraining_free"])
def test_a_model_that_gives_no_logits_is_refused_in_one_line(method):
    batches = [(torch.randn(6, 4), torch.arange(6) % 3)]
    with pytest.raises(PrunelabError, match=r"^Answers gives a dict: should be logits \[N, classes\][^\n]*$"):
        prune(Answers(), method, 0.5, batches=batches)
