"""Retraining-free pruning on numbers by hand: the thresholds of the rules, and what is chosen on held-out data."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

import prunelab
from prunelab import papers
from prunelab.data import load
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.papers.related import without_retraining as protocol
from prunelab.pruners.retraining_free import (
    RULES,
    above,
    candidates,
    chosen,
    frontier,
    levels,
    report,
    search,
    sweep,
    thresholds,
)
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training.experiment import run_all
from prunelab.training.load import trained

FIRST = torch.tensor([[-1.0, 0.2], [0.05, 1.0]])  # span 2
MIDDLE = torch.tensor([[0.3, -0.1], [0.02, -0.2]])  # span 0.5
LAST = torch.tensor([[4.0, -0.5], [0.45, -2.0]])  # span 6


def chain() -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    for layer, weight in zip(model, (FIRST, MIDDLE, LAST), strict=True):
        layer.weight.data = weight.clone()
    return model


def learnt() -> tuple[nn.Sequential, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A network that is right on all of its data, which says which of its weights matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))
    x = torch.randn(400, 8)
    return model, [(x, model(x).argmax(1))]


# --------------------------------------------------------------------------------------------------- thresholds


def test_thresholds_by_hand():
    weights = [FIRST, MIDDLE, LAST]
    assert thresholds("flat", weights, (1.0,)) == pytest.approx([0.05] * 3)  # a tenth of the smallest span
    assert thresholds("flat", weights, (0.5,)) == pytest.approx([0.025] * 3)
    assert thresholds("triangular", weights, (1.0, 1.0)) == pytest.approx([0.2, 0.4, 0.6])
    assert thresholds("triangular", weights, (1.0, 0.0)) == pytest.approx([0.2, 0.1, 0.0])
    assert thresholds("triangular", weights, (0.5, 1.0), limit=0.2) == pytest.approx([0.2, 0.7, 1.2])
    assert thresholds("triangular", [FIRST], (1.0, 0.0)) == pytest.approx([0.2])  # the only layer is the first
    assert thresholds("relative", weights, (0.5,)) == pytest.approx([1.0, 0.2, 2.0])  # two of four lie below
    assert thresholds("relative", weights, (0.25,)) == pytest.approx([0.2, 0.1, 0.5])


def test_relative_thresholds_are_quantiles():
    weight = torch.randn(40, 25, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.2, 0.55, 0.95):
        (ours,) = thresholds("relative", [weight], (share,))
        assert int((weight.abs() < ours).sum()) == round(1000 * share)
        assert ours == pytest.approx(weight.abs().quantile(share, interpolation="higher").item(), rel=0.05)


def test_what_is_tried():
    assert levels("flat", 4) == [(0.0,), (0.25,), (0.5,), (0.75,), (1.0,)]
    assert levels("relative", 4) == [(0.0,), (0.25,), (0.5,), (0.75,)]
    assert levels("triangular", 4) == [(a, b) for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    assert [len(levels(rule, 20)) for rule in RULES] == [21, 121, 20]  # as specified


def test_weights_below_the_threshold_go_and_those_at_it_stay():
    model = chain()
    current = Masks.ones(model)
    flat = candidates(model, current, "flat", steps=4)
    assert [c.level for c in flat if c.kept == 11] == [(0.5,), (0.75,), (1.0,)]  # 0.02 goes, 0.05 is not below 0.05
    for rule in RULES:
        for candidate in candidates(model, current, rule, steps=4):
            masks = above(model, current, candidate.thresholds)
            assert masks.kept == candidate.kept
            assert all(masks.counts.values())


def test_thresholds_that_would_empty_a_layer_are_not_tried():
    tried = {c.level for c in candidates(chain(), Masks.ones(chain()), "triangular", steps=4)}
    assert set(levels("triangular", 4)) - tried == {(0.5, 1.0), (1.0, 1.0)}  # 0.35 and 0.4 are above 0.3, its largest


# --------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("rule", RULES)
def test_the_sparsest_setting_within_the_tolerance_is_chosen(rule):
    model, batches = learnt()
    table = sweep(model, batches, [rule], steps=10)
    for tolerance in (0.0, 0.05, 0.2):
        masks = prunelab.prune(model, "retraining_free", 0.5, batches=batches, rule=rule, tolerance=tolerance, steps=10)
        assert masks.sparsity == pytest.approx(table.loc[table["loss"] <= tolerance + 1e-9, "sparsity"].max())
        lost = copy.deepcopy(model)
        masks.apply_(lost)
        right = (lost(batches[0][0]).argmax(1) == batches[0][1]).float().mean().item()
        assert 1 - right <= tolerance + 1e-6
    assert not table.loc[(table["sparsity"] > masks.sparsity + 1e-9), "loss"].le(0.2).any()


def test_a_sweep_measures_what_the_pruned_network_answers():
    model, batches = learnt()
    before = copy.deepcopy(model.state_dict())
    table = sweep(model, batches, steps=4)
    assert list(table.groupby("rule", sort=False).size()) == [5, 9, 4]
    assert table.loc[table["sparsity"] == 0, "loss"].eq(0).all()
    for row in table.itertuples():
        own = copy.deepcopy(model)
        above(own, Masks.ones(own), row.thresholds).apply_(own)
        assert row.accuracy == pytest.approx((own(batches[0][0]).argmax(1) == batches[0][1]).float().mean().item())
    again = report(model, batches, table)
    assert again["test_accuracy"].tolist() == table["accuracy"].tolist()
    assert again["test_difference"].tolist() == pytest.approx((-table["loss"]).tolist())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_right_class_among_the_first_few_counts_when_it_is_to():
    model = nn.Sequential(nn.Linear(1, 3, bias=False))
    model[0].weight.data = torch.tensor([[3.0], [2.0], [1.0]])
    batches = [(torch.ones(4, 1), torch.tensor([0, 1, 1, 2]))]
    whole = pd.DataFrame({"thresholds": [{}]})
    found = [report(model, batches, whole, top)["test_accuracy"].item() for top in (1, 2, 3, 9)]
    assert found == [0.25, 0.75, 1, 1]


def test_the_choice_and_the_frontier_by_hand():
    table = pd.DataFrame(
        {
            "rule": ["flat", "flat", "flat", "relative", "relative"],
            "sparsity": [0.0, 0.3, 0.5, 0.0, 0.9],
            "loss": [0.0, 0.02, 0.01, 0.0, 0.3],
        }
    )
    best = chosen(table, [0.01, 0.5])
    assert list(best.itertuples(index=False, name=None)) == [
        ("flat", 0.5, 0.01, 0.01),
        ("relative", 0.0, 0.0, 0.01),
        ("flat", 0.5, 0.01, 0.5),
        ("relative", 0.9, 0.3, 0.5),
    ]
    least = frontier(table, [0.0, 0.3, 0.6])
    assert list(least.itertuples(index=False, name=None)) == [
        ("flat", 0.0, 0.0),
        ("flat", 0.3, 0.01),  # 0.5 is sparser and loses less
        ("relative", 0.0, 0.0),
        ("relative", 0.3, 0.3),
        ("relative", 0.6, 0.3),
    ]


def test_in_a_run_the_validation_part_decides(tmp_path):
    data = Data("digits", train_size=300, validation=400)
    options = {"rule": "relative", "tolerance": 0.02}
    one = Run(
        data, Model("mlp", (24,)), Train(8, 32), Prune("retraining_free", 0.0, 1, recover="none", options=options)
    )
    results = run_all([one], store=Store(tmp_path), jobs=1, progress=False)
    dense, last = results.rounds.iloc[0], results.last.iloc[0]
    assert dense["validation_accuracy"] - last["validation_accuracy"] <= 0.02 + 1e-6
    assert last["sparsity"] > 0.2
    dataset = load(data)
    model = trained(results.store, one, dataset)  # thresholds of the pruned network are those of the dense one
    table = sweep(model, [(dataset.scale(dataset.validation.x), dataset.validation.y)], ["relative"])
    sparser = table.loc[table["sparsity"] > last["sparsity"] + 1e-6, "accuracy"]
    assert (dense["validation_accuracy"] - sparser > 0.02 - 1e-6).all()


def test_several_networks_are_searched_one_by_one():
    (one, batches), two = learnt(), chain()
    other = [(torch.randn(20, 2), torch.arange(20) % 2)]
    curves, best = search({3: one}, batches, batches, [0.02, 0.1], steps=4)
    assert set(curves["seed"]) == set(best["seed"]) == {3}
    assert best.groupby("tolerance").size().to_dict() == {0.02: 3, 0.1: 3}
    assert (best["test_difference"] == -best["loss"]).all()  # the same samples here
    assert (curves.groupby("rule")["loss"].diff().dropna() >= 0).all()  # more sparsity never costs less
    wide = copy.deepcopy(one)
    wide[0].weight.data[0, 0] = 50.0  # a span with which flat thresholds remove more
    both, _ = search({0: one, 1: wide}, batches, batches, [0.5], rules=["flat"], steps=4)
    assert 0 < both["sparsity"].max() <= curves.loc[curves["rule"] == "flat", "sparsity"].max()
    assert (both.groupby("sparsity").size() == 2).all()
    again, _ = search({0: two, 1: two}, iter(other), iter(other), [0.5], steps=4)
    assert again[again["seed"] == 0]["loss"].tolist() == again[again["seed"] == 1]["loss"].tolist()


def test_the_reference_and_what_the_claims_ask_for_by_hand():
    study = protocol.retraining_free(2, epochs=3, rounds=2)
    assert {name: [run.prune.method for run in runs] for name, runs in study.items()} == {
        "dense": ["none", "none"],
        protocol.RETRAINED: ["magnitude", "magnitude"],
    }
    rounds = pd.DataFrame(
        [
            (protocol.RETRAINED, s, r, 1 - 0.5**r, 0.9 - 0.01 * r + s / 10, 0.8 - 0.02 * r)
            for s in (0, 1)
            for r in range(3)
        ]
        + [("dense", 0, 0, 0.0, 0.9, 0.8)],
        columns=["strategy", "seed", "round", "sparsity", "validation_accuracy", "test_accuracy"],
    )
    usual = protocol.retrained(rounds)
    assert usual["loss"].tolist() == pytest.approx([0, 0.01, 0.02] * 2)
    assert usual["test_difference"].tolist() == pytest.approx([0, -0.02, -0.04] * 2)
    sparsity = {"flat": 0.3, "triangular": 0.6, "relative": 0.7, protocol.RETRAINED: 0.9}
    best = pd.DataFrame(
        [
            (rule, tolerance, seed, level + tolerance * 2 + seed / 10, -0.005 * (1 + seed))
            for rule, level in sparsity.items()
            for tolerance in (0.01, 0.03)
            for seed in (0, 1)
        ],
        columns=["rule", "tolerance", "seed", "sparsity", "test_difference"],
    )
    found = protocol.retraining_free_findings(best)
    assert {name: interval.mean for name, interval in found.items()} == pytest.approx(
        {
            "most_at_three": 81,
            "gain_of_fine_tuning": 20,
            "test_loss_at_one": 0.75,
            "triangular_over_flat": 30,
            "triangular_over_relative": -10,
        }
    )
    asked = {claim.quantity for claim in papers.artefact("related/retraining_free").claims}
    assert set(found) == asked - {"top_five"}  # of networks for ImageNet, which nobody trains here


@pytest.mark.parametrize(
    ("options", "batches", "words"),
    [
        ({}, None, "give batches="),
        ({}, [], "give batches="),
        ({}, [(torch.randn(4, 8), torch.randn(4))], "the targets are numbers"),
        ({"rule": "round"}, None, "rule = 'round'"),
        ({"tolerance": -0.1}, None, "tolerance = -0.1"),
        ({"steps": 1}, None, "steps = 1"),
    ],
)
def test_a_mistake_is_one_clear_line(options, batches, words):
    with pytest.raises(PrunelabError) as error:
        prunelab.prune(learnt()[0], "retraining_free", 0.5, batches=batches, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
