"""A study stops when its time is used, says what is left, and ends with the numbers of one that did not stop."""

import time

import numpy as np
import pytest

from prunelab import budget
from prunelab.budget import OutOfTime
from prunelab.errors import PrunelabError
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training.experiment import run_all

RUNS = [
    Run(Data("digits", train_size=200), Model("mlp", (8, 6)), Train(epochs=4, batch_size=20), prune, seed=seed)
    for seed in range(2)
    for prune in (Prune("magnitude", amount=0.4, rounds=2, recover="rewind"), Prune("dyprune"))
]


@pytest.mark.parametrize(("text", "found"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (30, 30), ("7", 7)])
def test_a_length_of_time(text, found):
    assert budget.seconds(text) == found


@pytest.mark.parametrize("wrong", ["", "0", "-3m", "10 weeks", "inf", True, float("nan")])
def test_what_is_no_length_of_time_is_one_line(wrong):
    with pytest.raises(PrunelabError, match="should be a length of time like 90s, 10m or 2h"):
        budget.seconds(wrong)


def test_a_study_that_stops_after_every_epoch_ends_with_the_numbers_of_one_that_does_not(tmp_path, monkeypatch):
    whole, parts = Store(tmp_path / "whole"), Store(tmp_path / "parts")
    run_all(RUNS, store=whole, jobs=1, progress=False)
    calls, said, held = 0, [], []
    for _ in range(30):
        # Used once the first epoch has begun: the study itself looks once before.
        ticking = iter([False, False, False, *[True] * 100])
        monkeypatch.setattr("prunelab.training.experiment.over", lambda end, ticking=ticking: next(ticking))
        calls += 1
        try:
            run_all(RUNS, store=parts, jobs=1, progress=False, budget="1h")
            break
        except OutOfTime as error:
            said.append(str(error))
        held += [run for run in RUNS if parts.place(run.id).held()]
    assert not held
    assert all("of 4 runs are left; the same call goes on with them" in line for line in said)
    assert calls > 5
    for run in RUNS:
        assert parts.status(run) == "complete"
        assert list(parts.rounds(run).test_loss) == list(whole.rounds(run).test_loss)
        assert list(parts.epochs(run).train_loss) == list(whole.epochs(run).train_loss)
        for name, array in whole.weights(run).items():
            np.testing.assert_array_equal(parts.weights(run)[name], array)


def test_a_notebook_learns_of_the_budget_of_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv(budget.VARIABLE, str(time.time() - 1))
    with pytest.raises(OutOfTime, match="the time is used: 4 of 4 runs are left"):
        run_all(RUNS, store=Store(tmp_path), jobs=1, progress=False)
    monkeypatch.setenv(budget.VARIABLE, str(time.time() + 600))
    assert run_all(RUNS[:1], store=Store(tmp_path), jobs=1, progress=False).trained == 1
