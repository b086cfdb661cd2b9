"""The papers' protocols give the settings that their code was read to use."""

import pandas as pd
import pytest

from prunelab.data import load
from prunelab.errors import PrunelabError
from prunelab.papers.dyprune import both_halves, dyprune, dyprune_strategies


def test_iris_is_divided_as_published():
    data, train = dyprune("iris")
    parts = load(data)
    assert [len(part.y) for part in (parts.train, parts.validation, parts.test)] == [100, 25, 25]
    assert (train.batch_size, train.optimiser, train.lr, train.weight_decay) == (12, "adamw", 1e-3, 0.01)
    assert parts.train.x.min() == 0
    assert parts.train.x.max() == 1


def test_fashion_mnist_is_divided_as_published(data_root):
    parts = load(dyprune("fashion_mnist")[0])
    assert [len(part.y) for part in (parts.train, parts.validation, parts.test)] == [50_000, 10_000, 10_000]


def test_eight_strategies_and_their_names():
    names = list(dyprune_strategies())
    assert len(names) == 8
    assert names[0] == "dynamic trigger, dynamic rate, L1"
    assert "static trigger, rate 0.5, random" in names
    faithful = dyprune_strategies(variant="faithful")
    assert all(name.endswith("(as published)") for name in faithful)
    assert {prune.options["variant"] for prune in faithful.values()} == {"faithful"}
    assert len(dyprune_strategies(also_rising=True)) == 10


def test_a_smaller_study_cuts_every_part():
    data, _ = dyprune("digits", train_size=100)
    parts = load(data)
    assert [len(part.y) for part in (parts.train, parts.validation, parts.test)] == [100, 100, 100]


def test_an_unknown_trigger_is_named():
    with pytest.raises(PrunelabError, match="did you mean 'dynamic'"):
        dyprune_strategies(triggers=["dynamik"])


def test_the_headline_is_judged_by_the_half_that_holds_least():
    def runs(weights, accuracy):
        rows = {"seed": range(3), "weights": weights, "weights_total": 1000, "test_accuracy": accuracy}
        return pd.DataFrame(rows)

    dense = runs(1000, [0.90, 0.90, 0.90])
    kept, seen = both_halves(runs([10, 11, 12], [0.90, 0.899, 0.901]), dense)
    assert kept.mean == pytest.approx(98.9 - 98)  # accuracy holds by 1 ± 0.25: its interval ends lower
    assert seen == "98.90 % gone, +0.00 ± 0.25 points" or kept.mean == pytest.approx(1.0)
    lost, _ = both_halves(runs([10, 11, 12], [0.8, 0.8, 0.8]), dense)
    assert lost.high == pytest.approx(-9)
    small, seen = both_halves(runs([100, 100, 100], [0.5, 0.9, 1.0]), dense)  # accuracy says nothing, the size fails
    assert (small.mean, small.half) == (pytest.approx(90 - 98), 0)
    assert seen.startswith("90.00 % gone, -10.00 ± ")
