"""Scores of the field on numbers by hand, against autograd, and what they do not do to the model."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from acting import looked_at
from torch import nn

from prunelab import pruners
from prunelab.errors import PrunelabError
from prunelab.masks import MaskError, Masks
from prunelab.models import mlp
from prunelab.pruners import METHODS, erk, prune
from prunelab.pruners.criterion import Criterion
from prunelab.pruners.scores import input_norms, loss_gradients
from prunelab.settings import Prune


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
    assert input_norms(looked_at(model, [(x, x)]), ["0"])["0"].tolist() == pytest.approx([8**0.5, 2**0.5])
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
    torch.testing.assert_close(loss_gradients(looked_at(model, batches), ["hidden_1.weight"])["hidden_1.weight"], slope)
    found = pruners.build(Prune(method)).scores(looked_at(model, batches))
    expected = (model.hidden_1.weight * slope).abs()
    torch.testing.assert_close(found["hidden_1.weight"], expected if method == "snip" else expected.square())


def test_taylor_of_a_unit_is_the_square_of_its_sum():
    torch.manual_seed(0)
    model, x, y = mlp(5, 4, 3), torch.randn(6, 5), torch.randint(0, 3, (6,))
    slope = torch.autograd.grad(F.cross_entropy(model(x), y), model.hidden_1.weight)[0]
    total = (model.hidden_1.weight * slope).sum(1).square()
    criterion = Criterion("taylor", "neuron")
    found = criterion.scores(looked_at(model, [(x, y)]))["hidden_1"]
    torch.testing.assert_close(found, total / total.mean())


def test_slimming_takes_the_filters_with_the_smallest_scales():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model[1].weight.data = torch.tensor([0.1, -3.0, 0.2, 1.0])
    masks = prune(model, "slimming", 0.5)
    assert masks["0.weight"].flatten(1).any(1).tolist() == [False, True, False, True]
    assert masks["1.bias"].tolist() == [False, True, False, True]
    with pytest.raises(MaskError, match="no layer that may be pruned has a BatchNorm"):
        prune(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), "slimming", 0.5)


def test_lamp_is_the_share_of_the_squares_that_are_at_least_as_large():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 2, bias=False))
    model[0].weight.data = torch.tensor([[2.0, -1.0, 4.0, 3.0]])
    model[1].weight.data = torch.tensor([[30.0], [40.0]])
    scores = pruners.build(Prune("lamp")).scores(looked_at(model))
    assert scores["0.weight"].tolist() == [pytest.approx([4 / 29, 1 / 30, 1.0, 9 / 25])]
    assert scores["1.weight"].flatten().tolist() == pytest.approx([900 / 2500, 1.0])
    gone = Masks({"0.weight": torch.tensor([[True, True, False, True]])})  # what is gone counts for nothing
    scores = pruners.build(Prune("lamp")).scores(looked_at(model, masks=Masks.ones(model) & gone))
    assert scores["0.weight"].tolist() == [pytest.approx([4 / 13, 1 / 14, 0.0, 1.0])]
    units = pruners.build(Prune("lamp", options={"granularity": "neuron"}))
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].weight.data = torch.tensor([[1.0, 2.0], [1.0, 1.0], [3.0, 0.0]])  # squared lengths 5, 2, 9
    assert units.scores(looked_at(model))["0"].tolist() == pytest.approx([5 / 14, 2 / 16, 1.0])


def test_the_filter_nearest_to_all_others_goes_first():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data = torch.tensor([[1.0, 1.0], [4.0, 1.0], [4.0, 5.0], [1.0, 9.0]])
    # distances: 3, 5, 8 | 3, 4, 73 ** 0.5 | 5, 4, 5 | 8, 73 ** 0.5, 5
    total = torch.tensor([16.0, 7 + 73**0.5, 14.0, 13 + 73**0.5])
    found = pruners.build(Prune("fpgm", options={"granularity": "neuron"})).scores(looked_at(model))
    torch.testing.assert_close(found["0"], total / total.mean())
    masks = prune(model, "fpgm", 0.25, granularity="neuron")
    assert masks["0.bias"].tolist() == [True, True, False, True]
    model[0].weight.data[2] = 0  # it is gone, and is near nobody any more
    found = pruners.build(Prune("fpgm", options={"granularity": "neuron"})).scores(looked_at(model, masks=masks))
    left = torch.tensor([11.0, 3 + 73**0.5, 0.0, 8 + 73**0.5])
    torch.testing.assert_close((found["0"] * left.sum() / 3)[masks["0.bias"]], left[masks["0.bias"]])


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("obd", [0.25, 4.0, 2.25, 16.0]),  # w^2 h / 2 with h = x^2 / 2
        ("fisher", [0.5, 8.0, 18.0, 32.0]),  # w^2 / 2 times the mean of (2 r x)^2 over four samples
        ("grasp", [0.25, -4.0, 13.5, 32.0]),  # w h g with g = r x / 2
        ("snip", [0.5, 2.0, 3.0, 4.0]),
        ("taylor", [0.25, 4.0, 9.0, 16.0]),
    ],
)
def test_scores_of_the_squared_error_by_hand(score, expected):
    model = one_row(1.0, 2.0, 1.0, 2.0)
    x, r = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])), torch.tensor([[1.0], [-1.0], [2.0], [1.0]])
    y = x @ model[0].weight.detach().T - r  # so that the outputs are off by r
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    now = looked_at(model, batches, loss=F.mse_loss)
    assert Criterion(score).scores(now)["0.weight"][0].tolist() == pytest.approx(expected)
    keep = torch.tensor(expected).argsort() >= 0
    keep[torch.tensor(expected).argmin()] = False
    assert kept(model, score, 0.25, batches=batches, loss=F.mse_loss) == keep.tolist()
    with pytest.raises(PrunelabError, match=r"the targets are torch\.float32, no classes: give loss="):
        prune(model, score, 0.25, batches=batches)


def test_synflow_conserves_the_flow_and_is_measured_again_on_the_way():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.data, model[1].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[-1.0, 2.0]])
    now = looked_at(model, example=torch.randn(1, 2))
    scores = Criterion("synflow").scores(now)
    assert scores["0.weight"].tolist() == [[1, 2], [6, 8]]  # each layer has 17 in all
    assert scores["1.weight"].tolist() == [[3, 14]]
    assert scores["0.weight"].dtype == torch.float64
    # The flow of a path ends with its last weight: measured once, the 6 stays before the 3 goes; measured again, what
    # leads to a weight that is gone has no flow, and goes first.
    model[0].weight.data, model[1].weight.data = torch.tensor([[9.0, 8.0], [5.0, 6.0]]), torch.tensor([[1.0, 2.0]])
    # 9, 8 | 10, 12 and 17 | 22
    assert prune(model, "synflow", 0.5, example=torch.ones(1, 2), steps=1)["0.weight"].tolist() == [[0, 0], [0, 1]]
    masks = prune(model, "synflow", 0.5, example=torch.ones(1, 2))
    assert masks["0.weight"].tolist() == [[False, False], [True, True]]
    assert masks["1.weight"].tolist() == [[False, True]]
    with pytest.raises(PrunelabError, match="give example=, one batch of inputs"):
        prune(model, "synflow", 0.5)


@pytest.mark.parametrize("amount", [0.3, 0.55, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_however_often_scores_are_measured_the_amount_is_exact(amount, scope, granularity):
    torch.manual_seed(0)
    model, x = mlp(10, 11, 13, 3), torch.randn(4, 10)
    masks = prune(model, "synflow", amount, example=x, scope=scope, granularity=granularity, steps=7, allow_empty=True)
    kept = {name: int(mask.flatten(1).any(1).sum()) if granularity == "neuron" else int(mask.sum())
            for name, mask in masks.items() if mask.dim() > 1}  # fmt: skip
    sizes = {"hidden_1.weight": 110, "hidden_2.weight": 143, "output.weight": 39}
    if granularity == "neuron":
        sizes, kept = {"hidden_1.weight": 11, "hidden_2.weight": 13}, {n: kept[n] for n in kept if n != "output.weight"}
    if scope == "layer":
        assert kept == {name: size - round(amount * size) for name, size in sizes.items()}
    assert sum(kept.values()) == sum(sizes.values()) - (
        round(amount * sum(sizes.values())) if scope == "global" else sum(round(amount * n) for n in sizes.values())
    )


def test_erk_keeps_weights_by_the_sum_of_the_sizes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Conv2d(2, 4, 3))  # sums 16, 12, 12; weights 64, 32, 72
    found = erk(model, 0.75)  # 42 of 168 stay: 16.8, 12.6, 12.6
    assert found == pytest.approx({"0": 1 - 16.8 / 64, "1": 1 - 12.6 / 32, "2": 1 - 12.6 / 72})
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 2))  # sums 16, 10, 4; weights 64, 16, 4
    # 42 stay: 22.4, 14 and 5.6; so the last is dense, and the others share 38
    assert erk(model, 0.5) == pytest.approx({"0": 1 - 16 * 38 / 26 / 64, "1": 1 - 10 * 38 / 26 / 16, "2": 0.0})
    masks = prune(model, "magnitude", erk(model, 0.5))
    assert masks.counts == {"0.weight": 23, "1.weight": 15, "2.weight": 4}


@pytest.mark.parametrize("method", ["snip", "taylor", "obd", "fisher", "grasp"])
def test_scores_that_would_say_nothing_are_refused(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(6, 4)
    with pytest.raises(PrunelabError, match=r"outputs of shape \(\d, 1\), for which cross entropy is 0"):
        prune(model, method, 0.5, batches=[(x, torch.zeros(6, dtype=torch.long))])
    loss = lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], y)  # noqa: E731
    masks = [prune(model, method, 0.5, batches=[(x, torch.ones(6))], loss=loss, seed=seed) for seed in (0, 1)]
    assert masks[0] == masks[1] or method == "obd"  # its probes are drawn
    with pytest.raises(PrunelabError, match="the slope of the loss is 0 for every weight"):
        prune(model, method, 0.5, batches=[(x, x)], loss=lambda out, y: (0 * out).sum())
    with pytest.raises(PrunelabError, match="is the forward of the model under no_grad"):
        prune(model, method, 0.5, batches=[(x, x)], loss=lambda out, y: out.detach().sum())
    with pytest.raises(PrunelabError, match=r"loss= gave shape \(\d, 8\)"):
        prune(model[:2], method, 0.5, batches=[(x, x)], loss=lambda out, y: out)
    three = nn.Sequential(nn.Linear(4, 3))
    for y, what in (
        (torch.full((6,), 3), "a target is class 3, and the model gives 3"),
        (torch.zeros(6, 1, dtype=torch.long), r"targets of shape \(\d, 1\) for outputs \(\d, 3\)"),
        (torch.zeros(6), "no classes: give loss="),
    ):
        with pytest.raises(PrunelabError, match=what):
            prune(three, method, 0.5, batches=[(x, y)])


@pytest.mark.parametrize("method", sorted(n for n, m in METHODS.items() if issubclass(m.pruner, pruners.Ranking)))
def test_inputs_that_the_model_does_not_take_are_told_in_one_line(method):
    torch.manual_seed(0)
    model, y = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.arange(6) % 3
    how = {"granularity": "neuron"} if method == "fpgm" else {}
    if pruners.build(Prune(method, options=how)).reads == "nothing":
        return
    for x, y_, words in (
        (torch.randn(6, 5), y, "Sequential does not take"),
        (torch.zeros(6, 4, dtype=torch.long), y, "Sequential does not take"),
        (torch.randn(6, 4), y[:5], "a batch has 6 inputs and 5 targets: should be as many"),
    ):
        if len(y_) < 6 and pruners.build(Prune(method, options=how)).reads == "inputs":
            continue
        with pytest.raises(PrunelabError, match=words) as caught:
            prune(model, method, 0.5, batches=[(x, y_)], **how)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["wanda", "taylor", "apoz", "magnitude", "nnrelief", "dropnet", "random", "n_of_m"])
def test_nan_is_refused_before_anything_is_ranked(method):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(6, 4), torch.arange(6) % 3
    if pruners.build(Prune(method)).reads != "nothing":
        bad = x.clone()
        bad[3, 1] = torch.nan
        with pytest.raises(PrunelabError, match="batch 1 has NaN"):
            prune(model, method, 0.5, batches=[(x, y), (bad, y)])
    model[2].weight.data[1, 1] = torch.nan
    with pytest.raises(PrunelabError, match=r"2\.weight has NaN among its weights"):
        prune(model, method, 0.5, batches=[(x, y)])


class Counting(nn.Module):
    """It counts its calls in a buffer and an attribute, works in place, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.body, self.seen = nn.ReLU(inplace=True), mlp(4, 8, 3), 0
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.last = x.mean().detach()
        return F.dropout(self.body(self.relu(x)), 0.1)


@pytest.mark.parametrize("method", sorted({n for n, m in pruners.METHODS.items() if not m.pruner.while_training}))
def test_a_model_that_is_looked_at_is_as_it_was_and_so_are_the_data(method):
    if method in ("coreset", "slimming", "none") or "filter" in method:
        return  # not for this model
    model, x, y = Counting(), torch.randn(6, 4), torch.arange(6) % 3
    before, state, given = copy.deepcopy(model.state_dict()), torch.random.get_rng_state(), x.clone()
    how = {"granularity": "neuron"} if method == "fpgm" else {}
    with contextlib.suppress(PrunelabError):  # nnrelief does not understand a functional dropout
        one, two = (
            prune(model, method, 0.3, batches=[(x, y)], start=model.state_dict(), example=x, **how) for _ in range(2)
        )
        assert one == two
    assert torch.equal(x, given)
    assert model.seen == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


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
    "method",
    [
        "movement",
        "magnitude_increase",
        "moved_magnitude",
        "snip",
        "taylor",
        "wanda",
        "slimming",
        "n_of_m",
        "lamp",
        "fpgm",
        "obd",
        "fisher",
        "grasp",
        "synflow",
    ],
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
    if method not in ("slimming", "fpgm", "n_of_m"):
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
    slopes = loss_gradients(looked_at(model, batches), ["out.weight", "unused.weight"])
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
