"""Each layer pruned alone: what is measured, what it proposes, and amounts by layer in ``prune``."""

import copy
from collections import OrderedDict

import pandas as pd
import pytest
import torch
from torch import nn

from prunelab import plots
from prunelab.errors import PrunelabError
from prunelab.pruners import prune
from prunelab.pruners.sensitivity import Scan, sensitivity


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = {"first": nn.Linear(6, 12), "relu": nn.ReLU(), "second": nn.Linear(12, 10), "tanh": nn.Tanh()}
    return nn.Sequential(OrderedDict(layers, out=nn.Linear(10, 3)))


@pytest.fixture
def data(net):
    x = torch.randn(200, 6)
    with torch.no_grad():
        return x, net(x).argmax(1)


def test_a_row_is_the_accuracy_with_that_layer_pruned_and_the_others_whole(net, data):
    scan = sensitivity(net, data, "magnitude", amounts=(0.5, 0.9), jobs=2)
    x, y = data
    for row in scan.frame.itertuples():
        pruned = copy.deepcopy(net)
        if row.amount:
            prune(net, "magnitude", row.amount, layers=[row.layer]).apply_(pruned)
        with torch.no_grad():
            assert row.accuracy == pytest.approx((pruned(x).argmax(1) == y).float().mean().item())
        assert row.sparsity == pytest.approx(row.amount, abs=0.02)
    assert list(scan.frame["layer"].unique()) == ["first", "second", "out"]
    assert (scan.frame[scan.frame["amount"] == 0]["accuracy"] == 1).all()


def test_methods_that_remove_units_leave_the_last_layer_out(net, data):
    scan = sensitivity(net, data, "taylor", amounts=(0.5,), granularity="neuron", batches=[data])
    assert list(scan.frame["layer"].unique()) == ["first", "second"]


def test_the_model_is_left_as_it_was(net, data):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    threads = torch.get_num_threads()
    sensitivity(net, data, "random", amounts=(0.9,))
    assert net.training
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def rows(accuracies):
    amounts = [0.0, 0.3, 0.6, 0.9]
    return pd.DataFrame(
        {"layer": layer, "amount": a, "accuracy": v, "samples": 10, "sparsity": a}
        for layer, values in accuracies.items()
        for a, v in zip(amounts, values, strict=True)
    )


def test_the_proposed_amount_ends_before_the_first_that_loses_too_much():
    scan = Scan(rows({"a": [0.9, 0.9, 0.895, 0.5], "b": [0.9, 0.7, 0.9, 0.9], "c": [0.9, 0.91, 0.92, 0.93]}))
    assert scan.amounts(0.01) == {"a": 0.6, "b": 0.0, "c": 0.9}
    assert scan.amounts(0.0) == {"a": 0.3, "b": 0.0, "c": 0.9}
    with pytest.raises(PrunelabError, match="tolerance = 5: should be a share"):
        scan.amounts(5)


def test_amounts_by_layer_prune_each_layer_by_itself(net):
    masks = prune(net, "magnitude", {"first": 0.5, "out": 0.2})
    assert masks.counts == {"first.weight": 36, "out.weight": 24}
    alone = prune(net, "magnitude", 0.5, layers=["first"])
    assert torch.equal(masks["first.weight"], alone["first.weight"])


def test_amounts_by_layer_go_on_from_earlier_masks(net):
    current = prune(net, "magnitude", 0.5)
    masks = prune(net, "magnitude", {"first": 0.5}, current=current)
    assert masks.counts["first.weight"] == current.counts["first.weight"] - round(current.counts["first.weight"] / 2)
    assert torch.equal(masks["out.weight"], current["out.weight"])
    assert not (masks["first.weight"] & ~current["first.weight"]).any()


@pytest.mark.parametrize(
    ("amount", "layers", "complaint"),
    [
        ({}, (), "amount names no layer"),
        ({"firs": 0.5}, (), "did you mean 'first'"),
        ({"first": 1.5}, (), "amount = 1.5"),
        ({"first": 0.5}, ("out",), "amount and layers differ at 'first'"),
    ],
)
def test_amounts_that_make_no_sense_are_refused(net, amount, layers, complaint):
    with pytest.raises(PrunelabError, match=complaint):
        prune(net, "magnitude", amount, layers=layers)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"method": "nnrelief"}, "has no scores to rank"),
        ({"method": "magnitud"}, "did you mean 'magnitude'"),
        ({"amounts": (0.5, 1.0)}, "amount = 1.0"),
        ({"layers": ["nope"]}, "nope"),
        ({"jobs": 0}, "jobs = 0"),
    ],
)
def test_a_scan_that_cannot_be_made_is_refused(net, data, how, complaint):
    with pytest.raises(PrunelabError, match=complaint):
        sensitivity(net, data, **how)


def test_the_picture_says_in_words_what_it_shows():
    scan = Scan(rows({"a": [0.9, 0.9, 0.895, 0.5], "b": [0.9, 0.7, 0.9, 0.9]}))
    picture = plots.sensitivity(scan.frame, scan.amounts())
    assert "a: 90.0 % at 0, 50.0 % at 0.9" in picture.alt


@pytest.mark.parametrize("method", ["magnitude", "l1_neuron", "dropnet"])
def test_a_small_layer_keeps_one_whatever_the_amount(method):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3)),
        torch.randn(30, 2),
    )
    scan = sensitivity(model, (x, torch.arange(30) % 3), method, batches=[(x, None)], jobs=1)
    most = scan.frame.groupby("layer", sort=False)["sparsity"].max()
    assert most.to_dict() == pytest.approx(
        {"0": 7 / 8, "2": 3 / 4, "4": 2 / 3} if method == "magnitude" else {"0": 3 / 4, "2": 0}
    )
    wild = sensitivity(model, (x, torch.arange(30) % 3), "magnitude", amounts=(0.95,), allow_empty=True, jobs=1)
    assert wild.frame["sparsity"].max() == 1


def test_a_model_that_gives_no_logits_is_refused():
    class Answers(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    with pytest.raises(PrunelabError, match="outputs are a dict, which is no classification: give metric="):
        sensitivity(nn.Sequential(nn.Linear(4, 4), Answers(4, 2))[1], (torch.randn(9, 4), torch.arange(9) % 2))


TASKS = {
    "column": (nn.Linear(4, 3), torch.randn(20, 4), torch.zeros(20, 1, dtype=torch.long), r"labels should be \[N\]"),
    "segmentation": (nn.Conv2d(1, 3, 1), torch.randn(20, 1, 4, 4), torch.zeros(20, 4, 4, dtype=torch.long), "no class"),
    "regression": (nn.Linear(4, 1), torch.randn(20, 4), torch.randn(20, 1), "no classification"),
    "regression, flat": (nn.Linear(4, 1), torch.randn(20, 4), torch.randn(20), "no classification"),
    "one logit": (nn.Linear(4, 1), torch.randn(20, 4), torch.zeros(20, dtype=torch.long), "no classification"),
    "too few outputs": (
        nn.Linear(4, 3),
        torch.randn(20, 4),
        torch.arange(20) % 4,
        "label 3 of sample 3 is out of range",
    ),
}


@pytest.mark.parametrize(("layer", "x", "y", "complaint"), TASKS.values(), ids=TASKS)
def test_what_is_no_classification_needs_a_measure(layer, x, y, complaint):
    model = nn.Sequential(layer)
    with pytest.raises(PrunelabError, match=complaint) as caught:
        sensitivity(model, (x, y), jobs=1)
    assert "give metric=" in str(caught.value)
    assert "\n" not in str(caught.value)

    def error(outputs, targets):
        assert len(outputs) == len(targets) == 20, "all samples at once"
        return outputs.square().mean()

    as_loss = sensitivity(model, (x, y), amounts=(0.5,), loss=error, jobs=1)
    as_metric = sensitivity(model, (x, y), amounts=(0.5,), metric=lambda *pair: -error(*pair), jobs=1)
    with torch.no_grad():
        dense = model(x).square().mean().item()
    assert as_loss.frame["loss"].iloc[0] == pytest.approx(dense, rel=1e-5)
    assert (as_metric.frame["metric"] == -as_loss.frame["loss"]).all()
    rise = as_loss.frame["loss"].iloc[1] - as_loss.frame["loss"].iloc[0]
    enough = max(rise, 0) + 1e-6
    assert as_loss.amounts(enough) == as_metric.amounts(enough) == {"0": 0.5}
    assert as_loss.amounts(0) == {"0": 0.5 if rise <= 0 else 0.0}
    assert plots.sensitivity(as_loss.frame).alt.startswith("Loss with one layer pruned. 0: ")


def test_a_measure_that_gives_no_number_is_named(net, data):
    for wrong, words in (
        (lambda *_: "good", "metric gives no number"),
        (lambda *_: float("nan"), "metric is NaN on 200"),
    ):
        with pytest.raises(PrunelabError, match=words):
            sensitivity(net, data, metric=wrong, jobs=1)
    with pytest.raises(PrunelabError, match="metric= and loss= are given"):
        sensitivity(net, data, metric=max, loss=min)
