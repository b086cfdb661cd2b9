"""Methods beside each other: the grid, the controls made from finished masks, and what the checklist finds."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from acting import looked_at
from torch import nn

from prunelab import cli
from prunelab.data import load
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.papers.related import in_one_training
from prunelab.papers.reported import literature
from prunelab.plots.checklist import checklist
from prunelab.plots.tradeoff import forms, tradeoffs
from prunelab.pruners.units import keep_as_many, unit_masks
from prunelab.runs import Store
from prunelab.training.comparison import comparable, compare, costs, leads, method_of, speedups, trainings
from prunelab.training.experiment import run_all

SMALL = {"data": "digits", "rounds": 2, "seeds": 1, "epochs": 1, "recovery": 1, "train_size": 200}


def test_a_method_is_written_with_its_options():
    assert method_of("snip") == ("snip", "snip", {})
    assert method_of("taylor:granularity=unit,allow_empty=True") == (
        "taylor, granularity unit, allow_empty True",
        "taylor",
        {"granularity": "unit", "allow_empty": True},
    )


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("snip:scope", "write options as name=value, as in snip:scope="),
        ("snipp", "did you mean 'snip'"),
        ("snip:scop=layer", "no option 'scop': did you mean 'scope'"),
        ("dyprune", "has no rounds to compare"),
        ("none", "has no rounds to compare"),
    ],
)
def test_a_method_that_cannot_be_compared_is_refused(spec, complaint):
    with pytest.raises(PrunelabError, match=complaint):
        compare([spec])


def test_baselines_of_the_same_kind_stand_beside_every_method_once():
    (study,) = compare(["snip", "wanda", "dropnet", "magnitude"], seeds=2).values()
    assert list(study) == ["random", "magnitude", "random units", "L1 units", "snip", "wanda", "dropnet"]
    assert [run.seed for run in study["snip"]] == [0, 1]
    assert len({(run.train, run.retrain) for runs in study.values() for run in runs}) == 1


def test_several_amounts_are_several_curves():
    (study,) = compare(["snip"], amounts=(0.5, 0.8), seeds=1).values()
    assert {name: runs[0].prune.amount for name, runs in study.items() if name.startswith("snip")} == {
        "snip, 50% a round": 0.5,
        "snip, 80% a round": 0.8,
    }
    (study,) = compare(["snip"], amounts=(0.2, 0.204, 0.29), seeds=1).values()  # rounded, two would be one
    assert [name for name in study if name.startswith("snip")] == [f"snip, {x}% a round" for x in ("20", "20.4", "29")]


def test_counts_of_another_mask_are_met_layer_by_layer_with_the_highest_scores():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    names = ["0.weight", "1.weight"]
    other = Masks({names[0]: torch.tensor([[1, 0], [0, 0]]).bool(), names[1]: torch.tensor([[1, 1], [1, 0]]).bool()})
    scores = {names[0]: torch.tensor([[1.0, 4], [3, 2]]), names[1]: torch.tensor([[4.0, 1], [2, 3]])}
    kept = keep_as_many(looked_at(model), scores, other)
    assert kept[names[0]].tolist() == [[False, True], [False, False]]
    assert kept[names[1]].tolist() == [[True, False], [True, True]]


def test_counts_of_units_are_met_with_whole_units():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    other = Masks.ones(model) & unit_masks(model, {"0": torch.tensor([True, False, False])})
    kept = keep_as_many(looked_at(model), {"0": torch.tensor([1.0, 3, 2])}, other, "unit")
    assert kept["0.weight"].tolist() == [[False, False], [True, True], [False, False]]
    assert kept["2.weight"].all()


def test_what_is_gone_stays_gone_when_the_other_mask_keeps_more():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    current = Masks({"0.weight": torch.tensor([[True, False], [False, False]])})
    kept = keep_as_many(looked_at(model, masks=current), {"0.weight": torch.ones(2, 2)}, Masks.ones(model))
    assert kept["0.weight"].tolist() == current["0.weight"].tolist()


@pytest.mark.parametrize("method", ["snip", "dropnet"])
def test_controls_follow_the_layer_proportions_of_their_method(method, tmp_path):
    (study,) = compare([method], controls=True, **SMALL).values()
    store = Store(tmp_path)
    results = run_all(study, store=store, jobs=1, progress=False)
    assert not results.failed
    masks = {name: store.masks(runs[0].id) for name, runs in study.items()}

    def units(mask, layer):
        return int(mask[f"{layer}.weight"].any(1).sum())

    own = masks[method]
    weights = [name for name in own if name.endswith("weight")]
    for control in (f"random, layers as {method}", f"magnitude, layers as {method}"):
        for name in weights:
            if method == "snip":
                assert masks[control][name].sum() == own[name].sum()
            else:
                assert units(masks[control], name[:-7]) == units(own, name[:-7])
    assert any((masks[f"random, layers as {method}"][n] != own[n]).any() for n in weights)
    for name in own:
        np.testing.assert_array_equal(masks[f"{method}, new weights"][name], own[name])


def test_a_method_without_scores_cannot_follow_counts(tmp_path):
    (study,) = compare(["nnrelief"], **SMALL).values()
    prune = dataclasses.replace(study["nnrelief"][0].prune, masks_of=study["random"][0].id, follow="counts")
    run = dataclasses.replace(study["nnrelief"][0], prune=prune)
    with pytest.raises(PrunelabError, match="'nnrelief' has no scores to rank"):
        run_all([study["random"][0], run], store=Store(tmp_path), jobs=1, progress=False)


def curve(strategy, points, seed=0):
    """Compression -> accuracy, after a dense round of which nothing may be seen; a negative one: no unit is left."""
    rows = [(strategy, seed, 0, 1.0, 1.0, 570.0, 0.0)]
    rows += [(strategy, seed, n, x, 0.5**n, 9.0 * (x > 0), y) for n, (x, y) in enumerate(points.items(), 1)]
    names = ["strategy", "seed", "round", "compression_ratio", "fraction", "units", "test_accuracy"]
    return pd.DataFrame(rows, columns=names).assign(compression_ratio=lambda t: t["compression_ratio"].abs())


@pytest.mark.parametrize(
    ("points", "lead"),
    [
        ({2: 0.9, 4: 0.8, 8: 0.7}, 0.1),  # b has 0.8, 0.7, 0.6
        ({4: 0.8, 16: 0.6}, 0.1),  # on a log scale 0.7 at 8; by rounds 0.0
        ({2: 0.9, 4: 0.8, -8: 0.1}, 0.1),  # not the round in which the last unit is gone, which would make -0.07 of it
        ({2: 0.9, -4: 0.1, 8: 0.9}, 0.1),  # nor what comes behind it
        ({8: 0.7, 16: 0.7}, 0.1),  # they touch in one place
        ({-2: 0.1, -4: 0.1}, np.nan),
        ({9: 0.7, 16: 0.7}, np.nan),
    ],
)
def test_methods_are_compared_at_equal_compression_while_both_are_connected(points, lead):
    frame = pd.concat([curve("a", points), curve("b", {2: 0.8, 4: 0.7, 8: 0.6})])
    assert leads(frame, {"x": ("a", "b")})["x"].mean == pytest.approx(lead, nan_ok=True)
    assert leads(frame, {"x": ("b", "a")})["x"].mean == pytest.approx(-lead, nan_ok=True)


def test_leads_are_paired_by_seed_and_can_be_taken_at_another_cost():
    frame = pd.concat([curve("a", {2: 0.9, 4: 0.9}), curve("a", {2: 0.9, 4: 0.9}, 1), curve("b", {4: 0.8, 8: 0.6})])
    frame = pd.concat([frame, curve("b", {4: 0.9, 8: 0.9}, 1), curve("b", {4: 0.1, 8: 0.1}, 2)])
    found = leads(frame, {"x": ("a", "b"), "y": ("a", "c")})
    assert (found["x"].mean, found["x"].n) == (pytest.approx(0.05), 2)
    assert (np.isnan(found["y"].mean), found["y"].n) == (True, 0)
    assert leads(frame, {"x": ("a", "b")}, cost="fraction")["x"].mean == pytest.approx(0.1)  # (0.1 + 0.3) / 2 and 0
    with pytest.raises(PrunelabError, match="no column 'fractoin': did you mean 'fraction'"):
        leads(frame, {}, cost="fractoin")


def rows(models=("a", "b", "c"), seeds=3, compressions=(2, 4, 8, 16, 32), names=("random", "magnitude", "snip")):
    return pd.DataFrame(
        {
            "id": f"{model}{name}{seed}",
            "strategy": name,
            "seed": seed,
            "data": "mnist",
            "model": model,
            "method": name,
            "round": number,
            "epoch": 6 + 2 * number,
            "compression_ratio": ratio,
            "test_accuracy": 0.9 if number == 0 else 0.5 + 0.01 * seed,
            "effective_macs": 100 / ratio,
        }
        for model in models
        for name in names
        for seed in range(seeds)
        for number, ratio in enumerate((1, *compressions))
    )


def found(frame):
    return checklist(frame).numbers.set_index("point")["kept"].to_dict()


def test_the_checklist_ticks_what_is_there():
    ticks = found(rows(names=("random", "magnitude", "snip", "random, layers as snip", "snip, new weights")))
    assert all(ticks.values())
    several = rows().assign(strategy=lambda f: f["model"] + ": " + f["strategy"])  # as the command line names them
    assert found(several) == found(rows())


@pytest.mark.parametrize(
    ("point", "frame"),
    [
        ("three or more pairs of data and architecture", rows(models=("a", "b"))),
        ("compressions 2, 4, 8, 16, 32", rows(compressions=(2, 4, 8, 16))),
        ("several seeds with their spread", rows(seeds=2)),
        ("random and magnitude pruning beside them", rows(names=("magnitude", "snip"))),
        ("both with the layer proportions of the method", rows()),
        ("the masks on new weights", rows()),
        ("one dense baseline for all", rows().assign(test_accuracy=lambda f: f.index / 1000)),
        ("one training budget for all", rows().assign(epoch=lambda f: f["epoch"] + (f["strategy"] == "snip"))),
        ("one dense baseline for all", rows().query("round > 0")),
        ("one training budget for all", rows().query("round == 0")),
        ("compression and multiply-accumulates of every network", rows().query("round == 0")),
        ("raw accuracies", rows().assign(test_accuracy=lambda f: f["test_accuracy"].where(f.index > 0))),
        ("raw accuracies", pd.concat([rows(), rows()])),
    ],
)
def test_the_checklist_crosses_what_is_not(point, frame):
    assert not found(frame)[point]


def test_compare_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRUNELAB_RUNS", str(tmp_path / "runs"))
    words = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["compare", "snip", *words, "--jobs", "1", "--save", str(tmp_path / "rows.csv")]) == 0
    said = capsys.readouterr().out
    assert "snip" in said
    assert "After Blalock et al." in said
    assert set(pd.read_csv(tmp_path / "rows.csv")["strategy"]) == {"random", "magnitude", "snip"}
    for wrong in ("", str(tmp_path), "/proc/rows.csv"):
        monkeypatch.setattr("prunelab.training.experiment.run_all", lambda *_, **__: pytest.fail("it trained"))
        assert cli.main(["compare", "snip", *words, "--save", wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.main(["compare"]) == 2
    assert "Name one method or more of" in capsys.readouterr().err


def test_whatever_is_called_comparable_can_be_compared():
    (study,) = compare(comparable(), seeds=1).values()
    assert len(study) >= len(comparable()) - 2


def test_only_some_of_the_methods(tmp_path):
    (study,) = compare({"a": "snip", "b": "wanda"}, only=["b"], seeds=1).values()
    assert list(study) == ["random", "magnitude", "b"]
    with pytest.raises(PrunelabError, match="only 'c'"):
        compare({"a": "snip"}, only=["c"])
    with pytest.raises(PrunelabError, match="controls of 'c'"):
        compare({"a": "snip"}, controls=["c"])


def test_costs_and_measured_speedups_of_a_small_bench(tmp_path):
    (study,) = compare(["snip", "dropnet"], controls=["dropnet"], **SMALL).values()
    results = run_all(study, store=Store(tmp_path), jobs=1, progress=False)
    rounds = costs(study, results)
    assert set(rounds[rounds["kind"] == "units"]["strategy"]) == {name for name in study if "units" in name} | {
        name for name in study if "dropnet" in name
    }
    assert (rounds[rounds["round"] == 0]["theoretical_speedup"] == 1).all()
    assert rounds[rounds["round"] == 2]["fraction"].unique().tolist() == [0.25]
    fast = speedups(study, results.store, load(study["snip"][0].data), batch=16, repeats=3)
    assert set(fast["strategy"]) == {"random units", "L1 units", "dropnet"}
    assert (fast["speedup"] > 0).all()


def test_whole_trainings_cost_what_their_rounds_cost(tmp_path):
    study = in_one_training(1, data="digits", hidden=(12, 8), epochs=4, train_size=100)
    results = run_all(study, store=Store(tmp_path), jobs=1, progress=False)
    assert not results.failed
    spent = trainings(results, 100).set_index("strategy")
    dense = 64 * 12 + 12 * 8 + 8 * 10
    assert spent.loc["unpruned", "training_macs"] == dense * 4 * 100 * 3
    assert spent.loc["L1 while training", "training_macs"] < spent.loc["unpruned", "training_macs"]


def test_the_literature_has_a_source_and_a_cost():
    rows = literature("CIFAR-10", "ResNet-")
    assert (rows["source"] == "literature").all()
    assert rows[["compression_ratio", "theoretical_speedup"]].notna().any(axis=1).all()
    assert rows["accuracy"].between(0.5, 1).all()
    with pytest.raises(PrunelabError, match="no results in the literature on 'CIFAR'"):
        literature("CIFAR")


def test_the_sheet_of_trade_offs_says_what_it_shows():
    frame = rows(models=("a",))
    frame = frame.assign(strategy=frame["strategy"].astype(str))
    picture = tradeoffs({"weights": (frame, "compression_ratio"), "operations": (frame, "effective_macs")})
    assert "weights: 3 methods, the best mean 90.00 %" in picture.alt


def test_results_of_the_literature_are_rings_where_they_have_that_cost():
    frame = rows(models=("a",))
    others = literature("CIFAR-10", "ResNet-")
    picture = tradeoffs({"weights": (frame, "compression_ratio"), "seconds": (frame, "epoch")}, literature=others)
    labels = [ax.get_legend_handles_labels()[1] for ax in picture.axes]
    assert any("literature: " in label and "papers" in label for label in labels[0])
    assert not any("literature" in label for label in labels[1])


def test_the_sheet_of_forms_has_a_mark_for_each():
    cost = {"parameters": 10, "macs": 20, "latency": 0.1, "bytes": 40}
    frame = pd.DataFrame(
        {"network": net, "form": form, "test_accuracy": 0.5, "correct": 5, "samples": 10, **cost}
        for net in ("a", "b")
        for form in ("dense", "shrunk", "folded")
    )
    picture = forms(frame[(frame["network"] == "b") | (frame["form"] != "folded")])  # not every network has every form
    assert len(picture.axes) == 8
    assert "a: dense 50.0 %, shrunk 50.0 %; b: dense 50.0 %, shrunk 50.0 %, folded 50.0 %" in picture.alt
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["dense", "shrunk", "folded"]
