"""Intervals against hand-computed numbers, scipy.stats, and what they promise: coverage."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from prunelab.errors import PrunelabError
from prunelab.stats import Interval, mean_interval, paired_difference, summarise

T_2 = 4.302652729749462  # t(0.975, 2), from a printed table: 4.303


def test_three_values_by_hand():
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n, found.sd) == (2.0, 3, 1.0)
    assert found.half == pytest.approx(T_2 / math.sqrt(3), rel=1e-9)  # SciPy 1.13 has ten digits
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)


def test_four_values_at_another_level_by_hand():
    # mean 5, deviations -3 -1 1 3, sd sqrt(20/3), t(0.95, 3) = 2.3534
    found = mean_interval([2, 4, 6, 8], level=0.9)
    assert found.half == pytest.approx(2.353363434801823 * math.sqrt(20 / 3) / 2, rel=1e-9)


def test_one_value_has_a_mean_and_no_interval():
    found = mean_interval([0.9])
    assert (found.mean, found.n) == (0.9, 1)
    assert math.isnan(found.half)
    assert math.isnan(found.sd)
    assert str(found) == "0.9 (n = 1)"


def test_no_value_at_all():
    found = mean_interval([])
    assert found.n == 0
    assert math.isnan(found.mean)


def test_what_was_not_measured_is_no_run():
    assert mean_interval([1.0, math.nan, 3.0, 2.0]) == mean_interval([1.0, 3.0, 2.0])


def test_a_loss_that_grew_to_infinity_stays_infinite():
    found = mean_interval([1.0, math.inf])
    assert found.mean == math.inf
    assert math.isnan(found.half)


def test_text_names_mean_half_width_and_n():
    assert str(Interval(0.91234567, 0.0041, 3, 0.002)) == "0.9123 ± 0.0041 (n = 3)"


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30),
    level=st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_agrees_with_scipy_stats(values, level):
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    assert mean_interval(values, level).half == pytest.approx(half, rel=1e-9, abs=1e-9)


def test_three_runs_cover_the_true_mean_as_often_as_promised():
    groups = 20_000
    values = np.random.default_rng(0).normal(0.9, 0.01, size=(groups, 3))
    frame = pd.DataFrame({"group": np.repeat(np.arange(groups), 3), "accuracy": values.ravel()})
    found = summarise(frame, "group", "accuracy")
    covered = (found["accuracy"] - 0.9).abs() <= found["accuracy_half"]
    assert covered.mean() == pytest.approx(0.95, abs=0.006)  # four standard errors
    normal = found["accuracy_half"] / T_2 * 1.96  # what 1.96 standard errors would have covered
    assert ((found["accuracy"] - 0.9).abs() <= normal).mean() < 0.85


@pytest.mark.parametrize("level", [0, 1, 95, -0.1])
def test_a_level_that_is_no_fraction_is_refused(level):
    with pytest.raises(PrunelabError, match=r"level = .*between 0 and 1"):
        mean_interval([1, 2], level)


def test_paired_difference_by_hand():
    found = paired_difference([3.0, 5.0, 10.0], [1.0, 2.0, 6.0])
    assert (found.mean, found.sd, found.n) == (3.0, 1.0, 3)
    assert found.half == pytest.approx(T_2 / math.sqrt(3))


def test_pairs_are_matched_by_seed():
    a = pd.Series([3.0, 5.0, 10.0], index=[0, 1, 2])
    b = pd.Series([6.0, 1.0, 2.0], index=[2, 0, 1])
    assert paired_difference(a, b) == paired_difference(dict(a), dict(b)) == paired_difference([3, 5, 10], [1, 2, 6])


def test_pairing_removes_what_seeds_share():
    seeds = np.random.default_rng(1).normal(0, 10, 8)
    noise = np.random.default_rng(2).normal(0, 0.1, 8)
    found = paired_difference(seeds + 1 + noise, seeds)
    assert abs(found.mean - 1) < 0.2
    assert found.half < 0.2 < mean_interval(seeds).half


def test_a_pair_with_a_missing_number_counts_as_none():
    assert paired_difference([3.0, math.nan, 5.0], [1.0, 2.0, 2.0]).n == 2


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ([1, 2, 3], [1, 2], "there are 3 and 2 numbers"),
        ({0: 1.0, 1: 2.0}, {0: 1.0, 4: 2.0}, "is only on one side"),
        (pd.Series([1.0, 2.0], index=[0, 0]), pd.Series([1.0], index=[0]), "a seed occurs twice"),
    ],
)
def test_numbers_without_a_partner_are_refused(a, b, says):
    with pytest.raises(PrunelabError, match=says):
        paired_difference(a, b)


def test_summary_agrees_with_the_interval_of_each_group():
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(
        {"method": ["a"] * 5 + ["b"] * 3, "round": 0, "accuracy": rng.random(8), "loss": rng.random(8)},
    )
    found = summarise(frame, ["method", "round"], ["accuracy", "loss"])
    assert list(found) == ["method", "round", "accuracy", "accuracy_half", "loss", "loss_half", "n"]
    assert found["n"].tolist() == [5, 3]
    for row in found.itertuples():
        expected = mean_interval(frame.loc[frame["method"] == row.method, "accuracy"])
        assert (row.accuracy, row.accuracy_half) == pytest.approx((expected.mean, expected.half), rel=1e-12)


def test_summary_says_the_fewest_runs_and_keeps_groups_without_a_key():
    frame = pd.DataFrame(
        {
            "patience": [math.nan, math.nan, math.nan, 3.0],
            "accuracy": [1.0, 2.0, math.nan, 4.0],
            "loss": [1.0, 2.0, 3.0, 4.0],
            "trigger": math.nan,
        }
    )
    found = summarise(frame, "patience", ["accuracy", "loss", "trigger"]).set_index("patience")
    assert found["n"].tolist() == [1, 2]
    assert math.isnan(found["loss_half"].iloc[0])
    assert found["loss"].iloc[1] == 2.0
    assert found["trigger"].isna().all()


def test_summary_of_no_rows_has_its_columns():
    found = summarise(pd.DataFrame({"a": [], "b": []}), "a", "b")
    assert list(found) == ["a", "b", "b_half", "n"]
    assert found.empty


def test_summary_names_the_nearest_column():
    with pytest.raises(PrunelabError, match="did you mean 'test_accuracy'"):
        summarise(pd.DataFrame({"seed": [0], "test_accuracy": [1.0]}), "seed", "test_acuracy")
    with pytest.raises(PrunelabError, match="at least one column to group by"):
        summarise(pd.DataFrame({"test_accuracy": [1.0]}), [], "test_accuracy")


def test_importing_stats_loads_no_scipy():
    code = "import sys, prunelab.stats; print([m for m in sys.modules if m.split('.')[0] in ('scipy', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_equal_numbers_have_no_spread_at_all():
    found = mean_interval([100 * (1 - 0.9825)] * 3)
    assert (found.mean, found.half) == (100 * (1 - 0.9825), 0.0)
