"""NNrelief's experiment from protocol to table: the published code's selection, and its csv, beside honest numbers."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from prunelab import models, papers
from prunelab.data import load
from prunelab.papers.nnrelief.published_counts import counted_parameters, flops, published_rows
from prunelab.papers.nnrelief.study import error_at, nnrelief, worse_change
from prunelab.papers.reported import best_test_epochs, mnist_comparison
from prunelab.plots import tables
from prunelab.runs import Store
from prunelab.training.experiment import run_all
from prunelab.training.load import masks_at

SIZES = {"data": "digits", "hidden": (12, 8), "epochs": 3, "rounds": 2, "train_size": 200}
COLUMNS = ["seed", "iter", "acc_pruned", "acc_retrained", "cr", "remained_percentage", "architecture", "FLOPs"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("runs"))
    named = {variant: nnrelief("lenet_300_100", 2, variant=variant, **SIZES) for variant in ("faithful", "corrected")}
    return run_all(named, store=store, jobs=1, progress=False)


def test_only_the_faithful_protocol_looks_at_the_test_part_in_every_epoch():
    faithful, corrected = (nnrelief("lenet_5", 1, variant=variant)[0] for variant in ("faithful", "corrected"))
    assert faithful.train.test_every_epoch
    assert faithful.retrain.test_every_epoch
    assert not corrected.train.test_every_epoch
    before = dataclasses.replace(corrected.train, test_every_epoch=False)
    assert dataclasses.replace(corrected, train=before).id == corrected.id


def test_the_best_test_epoch_stands_beside_the_honest_accuracy(study):
    found = best_test_epochs(study.rounds, study.epochs)
    assert len(found) == len(study.rounds)
    faithful = found[found["strategy"] == "faithful"]
    for row in faithful.to_dict("records"):
        own = study.epochs[(study.epochs["id"] == row["id"]) & (study.epochs["round"] == row["round"])]
        assert len(own) == 3
        assert row["best_test_epoch_accuracy"] == own["test_accuracy"].max()
        assert row["test_accuracy"] == own["test_accuracy"].iloc[-1]
    assert (faithful["best_test_epoch_accuracy"] >= faithful["test_accuracy"]).all()
    assert found.loc[found["strategy"] == "corrected", "best_test_epoch_accuracy"].isna().all()
    honest = found[found["strategy"] == "corrected"]
    for rows, there in ((faithful, True), (honest, False)):
        table = tables.comparison(rows, by="round", metrics=["test_accuracy", "best_test_epoch_accuracy"])
        assert any("selected on the test set" in column for column in table.frame) == there
        assert ("best_test_epoch_accuracy" in table.numbers) == there


def test_rows_have_the_columns_of_the_published_csv(study):
    honest = study.rounds[study.rounds["strategy"] == "corrected"]
    rows = published_rows(study.store, honest)
    assert list(rows.columns) == COLUMNS
    assert rows["seed"].tolist() == [0, 0, 0, 1, 1, 1]
    assert rows["iter"].tolist() == [0, 1, 2, 0, 1, 2]
    assert rows["acc_pruned"].isna().tolist() == [True, False, False] * 2
    np.testing.assert_array_equal(rows["acc_retrained"], honest["test_accuracy"])
    np.testing.assert_allclose(rows["cr"] * rows["remained_percentage"], 100)
    assert rows["architecture"].iloc[0] == "12-8"
    run = study.store.settings(honest["id"].iloc[0])
    data = load(run.data)
    model = models.build(run.model, data.shape, 10, 0)
    masks = masks_at(study.store.removals(run.id), 2)
    assert rows["cr"].iloc[2] == counted_parameters(model) / counted_parameters(model, masks)
    assert rows["FLOPs"].iloc[2] == flops(model, data.shape, masks)


def test_rows_of_several_strategies_say_which_and_count_as_their_variant_does(study):
    rows = published_rows(study.store, best_test_epochs(study.rounds, study.epochs))
    assert list(rows.columns) == ["strategy", *COLUMNS, "best_test_epoch_accuracy"]
    dense = rows[rows["iter"] == 0].groupby("strategy")["FLOPs"].first()
    assert dense["corrected"] - dense["faithful"] == 12 + 8 + 10  # an addition less for every output
    assert rows.groupby("strategy")["best_test_epoch_accuracy"].count().to_dict() == {"corrected": 0, "faithful": 6}


def test_rows_of_runs_from_before_it_was_measured_lack_the_accuracy_after_pruning(study):
    old = study.rounds.assign(pruned_test_accuracy=np.nan)
    assert published_rows(study.store, old)["acc_pruned"].isna().all()


def test_the_first_convolution_of_a_residual_network_counts_where_counting_is_right():
    model = models.build(nnrelief("resnet20", 1)[0].model, (3, 32, 32), 10, 0)
    assert counted_parameters(model, faithful=False) - counted_parameters(model) == 432


def test_the_optimiser_that_loses_more_decides_and_nobody_does_before_the_networks_know_anything():
    def rounds(dense, last):
        rows = [
            (rule, seed, r, values[rule][seed])
            for r, values in enumerate((dense, last))
            for rule in dense
            for seed in range(2)
        ]
        return pd.DataFrame(rows, columns=["strategy", "seed", "round", "test_accuracy"])

    dense = {"adam": [0.60, 0.62], "sgd": [0.50, 0.54]}
    found = worse_change(rounds(dense, {"adam": [0.61, 0.63], "sgd": [0.47, 0.53]}))
    assert (found.mean, found.n) == (pytest.approx(-0.02), 2)  # (-0.03 - 0.01) / 2, of SGD
    assert worse_change(rounds(dense | {"sgd": [0.1, 0.2]}, dense)) is None


def sized(strategy, seed, *points):
    rows = [(strategy, seed, n, size, right) for n, (size, right) in enumerate(points)]
    return pd.DataFrame(rows, columns=["strategy", "seed", "round", "compression_ratio", "test_accuracy"])


def test_an_error_is_taken_at_the_first_round_that_is_compressed_enough():
    runs = [sized("a", 0, (1, 0.99), (12, 0.98), (70, 0.9)), sized("a", 1, (1, 0.99), (11, 0.5), (15, 0.96))]
    found = error_at(pd.concat([*runs, sized("a", 2, (1, 0.99), (5, 0.9))]), 12)
    assert (found.mean, found.n) == (pytest.approx(3), 2)


@pytest.mark.parametrize("network", ["lenet_300_100", "lenet_5"])
def test_what_is_compared_with_is_the_row_of_the_table(network):
    row = mnist_comparison(network).set_index("method").loc["Pruning (Han 2015)"]
    claims = [c for c in papers.artefact(f"nnrelief/{network}").claims if c.id == "han"]
    assert [c.reported for c in claims] == [row["test_error"]]
    assert all(f" {row['compression']:.0f}," in c.text for c in claims)


def test_faithful_trains_on_all_of_the_training_part_but_one_sample():
    assert nnrelief("lenet_5", 1, variant="faithful")[0].data.validation == 1
    assert nnrelief("lenet_5", 1)[0].data.validation == 0.1
