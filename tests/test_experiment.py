"""From settings to stored rows: rounds, recovery, failure, resume after a kill, and two processes at one run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from prunelab import models, pruners
from prunelab.data import load
from prunelab.errors import PrunelabError
from prunelab.runs import Checkpoint, Store
from prunelab.runs.scratch import scratch
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training import experiment, train, versions
from prunelab.training.experiment import run_all, train_population
from prunelab.training.load import masks_at
from prunelab.training.load import trained as trained_network

DIGITS = Data("digits", train_size=200, test_size=200)
NET = Model("mlp", (16, 12))
QUICK = Train(epochs=6, batch_size=32, lr=3e-3)
VOLATILE = ["seconds", "seconds_spent", "prune_seconds", "finished", "git_commit"]


def run(method="none", seed=0, train=QUICK, **prune):
    return Run(DIGITS, NET, train, Prune(method, **prune), seed=seed)


def test_a_second_call_trains_nothing_and_gives_the_same_table(tmp_path):
    store = Store(tmp_path)
    first = run_all([run(seed=0), run(seed=1)], store=store, jobs=1, progress=False)
    again = run_all([run(seed=0), run(seed=1)], store=store, jobs=1, progress=False)
    assert (first.trained, again.trained, again.loaded) == (2, 0, 2)
    pd.testing.assert_frame_equal(first.rounds, again.rounds)
    assert len(first.epochs) == 2 * 6


def test_what_is_damaged_or_of_another_version_is_trained_again_and_the_rest_is_not(tmp_path, caplog, monkeypatch):
    sound, broken, half, leader = run(), run(seed=1), run("magnitude", rounds=2), run("magnitude", seed=3, rounds=1)
    first = run_all([sound, broken, half, leader], store=str(tmp_path), jobs=1, progress=False)  # a store as text
    store = first.store
    numbers = first.rounds.drop(columns=VOLATILE)
    for name, one in (("epochs.parquet", broken), ("removals.safetensors", leader)):
        path = store.root / one.id / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    heir = run("magnitude", seed=3, rounds=1, masks_of=leader.id, recover="rewind")
    with store.claim(heir) as writer:  # a checkpoint that a program of another kind left
        writer.save(Checkpoint({"w": np.ones(3)}, {"round": 1}, [{"round": 0}], []))
    before = {path: path.stat().st_mtime_ns for path in (store.root / sound.id).iterdir()}
    again = run_all([sound, broken, half, leader, heir], store=store, jobs=1, progress=False)
    assert (again.loaded, again.trained, again.failed) == (2, 3, {})
    assert {path: path.stat().st_mtime_ns for path in (store.root / sound.id).iterdir()} == before
    said = " ".join(caplog.messages)
    assert "epochs.parquet is damaged (its bytes are not those that were written): it is trained again" in said
    assert "removals.safetensors is damaged" in said
    assert f"the checkpoint of {heir.id} does not fit its settings ('requested'): the run begins again" in said
    rows = again.rounds[again.rounds["id"] != heir.id].drop(columns=VOLATILE)
    pd.testing.assert_frame_equal(rows.reset_index(drop=True), numbers, rtol=1e-3)

    caplog.clear()
    mended = {**pruners.METHODS, "none": pruners.METHODS["none"]._replace(version=2)}
    monkeypatch.setitem(versions._REGISTRIES, "method", mended)
    third = run_all([sound, broken, half], store=store, jobs=1, progress=False)
    assert (third.loaded, third.trained) == (1, 2)
    assert all("was made by another version (method of version 1, now 2)" in line for line in caplog.messages)
    assert third.rounds.groupby("method")["version.method"].first().to_dict() == {"magnitude": 1, "none": 2}


def test_failed_runs_are_not_counted_as_trained_or_loaded(tmp_path):
    runs = [run(), run(train=dataclasses.replace(QUICK, optimiser="sgd", lr=1e30))]
    for loaded, trained in ((0, 1), (1, 0)):
        found = run_all(runs, store=tmp_path, jobs=1, progress=False)
        assert (found.loaded, found.trained, list(found.failed)) == (loaded, trained, [runs[1].id])


def test_rounds_of_iterative_pruning_remove_what_was_asked_for(tmp_path):
    result = run_all([run("magnitude", amount=0.5, rounds=3)], store=Store(tmp_path), jobs=1, progress=False).rounds
    total = 64 * 16 + 16 * 12 + 12 * 10
    assert result["round"].tolist() == [0, 1, 2, 3]
    assert result["weights"].tolist() == [total, total / 2, total / 4, total / 8]
    np.testing.assert_allclose(result["requested_sparsity"], [0, 0.5, 0.75, 0.875])
    np.testing.assert_allclose(result["sparsity"], result["requested_sparsity"])
    np.testing.assert_allclose(result["compression_ratio"], [1, 2, 4, 8])
    assert (result["epochs"] == 6).all()


def test_the_stored_network_is_the_one_that_was_measured(tmp_path):
    store = Store(tmp_path)
    one = run("magnitude", amount=0.8, rounds=1)
    last = run_all([one], store=store, jobs=1, progress=False).last.iloc[0]
    weights, masks = store.weights(one.id), store.masks(one.id)
    assert sum(int(m.sum()) for m in masks.values()) == last["weights"]
    for name, mask in masks.items():
        assert (weights[name][~mask] == 0).all()


def test_every_removal_is_on_record(tmp_path):
    store = Store(tmp_path)
    one = run("magnitude", amount=0.5, rounds=2)
    run_all([one], store=store, jobs=1, progress=False)
    record = store.removals(one.id)
    rounds = np.concatenate([record[n].ravel() for n in record if n.startswith("round/")])
    total = len(rounds)
    assert [(rounds == r).sum() for r in (1, 2, -1)] == [total / 2, total / 4, total / 4]
    scores = np.concatenate([record[n].ravel() for n in record if n.startswith("score/")])
    assert np.isfinite(scores[rounds > 0]).all()


def test_rewinding_starts_from_the_first_weights_and_reinit_from_others(tmp_path):
    """With a learning rate of next to nothing the weights of the last round are those it began with."""
    store = Store(tmp_path)
    still = Train(epochs=1, batch_size=200, optimiser="sgd", lr=1e-12)
    runs = {
        how: run("magnitude", train=still, amount=0.5, rounds=1, recover=how)
        for how in ("rewind", "reinit", "finetune", "none")
    }
    run_all([run(train=still), *runs.values()], store=store, jobs=1, progress=False)
    dense = store.weights(run(train=still).id)["hidden_1.weight"]
    for how, one in runs.items():
        mask, weights = store.masks(one.id)["hidden_1.weight"], store.weights(one.id)["hidden_1.weight"]
        assert np.allclose(weights[mask], dense[mask], atol=1e-6) is (how != "reinit"), how


def test_pruning_while_training_counts_epochs_through_and_shrinks_the_network(tmp_path):
    store = Store(tmp_path)
    one = run(
        "dyprune", train=Train(epochs=9, batch_size=16, lr=3e-3), options={"trigger": "static", "every": 2, "rate": 0.5}
    )
    result = run_all([one], store=store, jobs=1, progress=False)
    assert result.epochs["epoch"].tolist() == list(range(1, 10))
    assert result.epochs.loc[result.epochs["pruned"], "epoch"].tolist() == [3, 5, 7]
    assert result.rounds["epoch"].tolist() == [3, 5, 7, 9]
    last = result.last.iloc[0]
    assert last["units"] <= 28
    assert last["macs"] == sum(w.size for n, w in store.weights(one.id).items() if n.endswith("weight"))
    record = store.removals(one.id)
    left = sum((record[n] == -1).sum() for n in record if n.startswith("round/"))
    assert left == last["weights"]


def test_early_stopping_ends_a_round(tmp_path):
    train = Train(epochs=60, batch_size=16, lr=0.05, patience=2)
    epochs = run_all([run(train=train)], store=Store(tmp_path), jobs=1, progress=False).epochs
    assert 3 <= len(epochs) < 60
    best = epochs["validation_loss"].idxmin()
    assert len(epochs) - 1 - best == 2


@pytest.mark.parametrize("also_after", [(), (2,)])
def test_validation_may_be_measured_where_a_round_ends_only(tmp_path, monkeypatch, also_after):
    sizes, evaluate = [], train.Population.evaluate

    def counted(self, members, split):
        sizes.extend(len(split) for _ in members)
        return evaluate(self, members, split)

    monkeypatch.setattr(train.Population, "evaluate", counted)
    settings = [QUICK, dataclasses.replace(QUICK, validate_every_epoch=False)]
    often, seldom = (
        run_all(
            [run("magnitude", train=one, amount=0.5, rounds=1, also_after=also_after)],
            store=Store(tmp_path),
            jobs=1,
            progress=False,
        )
        for one in settings
    )
    same = ["weights", "validation_loss", "validation_accuracy", "test_accuracy", "train_loss", "epochs"]
    pd.testing.assert_frame_equal(often.rounds[same], seldom.rounds[same])
    ends = seldom.rounds["epoch"] - 1
    assert seldom.epochs["validation_loss"].notna().to_numpy().nonzero()[0].tolist() == ends.tolist()
    pd.testing.assert_series_equal(seldom.epochs.loc[ends, "test_loss"], often.epochs.loc[ends, "test_loss"])
    validated = sizes.count(len(load(DIGITS).validation))
    assert validated == len(often.epochs) + len(seldom.rounds)


def test_a_method_that_decides_by_validation_has_it_every_epoch(tmp_path):
    train = dataclasses.replace(QUICK, validate_every_epoch=False)
    one = run("dyprune", train=train, options={"trigger": "static", "every": 2})
    assert run_all([one], store=Store(tmp_path), jobs=1, progress=False).epochs["validation_loss"].notna().all()


def test_progress_counts_a_round_that_ends_early_as_whole(tmp_path):
    """So that the estimate of what is left does not count on epochs that will never be."""
    early = Train(epochs=30, batch_size=32, lr=0.5, patience=1)
    one, seen = run("magnitude", train=early, amount=0.5, rounds=2), []
    ticks = tmp_path / "ticks"

    def look(state):
        seen.append((len(state.rounds), ticks.stat().st_size if ticks.exists() else 0))
        return "go on"

    train_population([one], Store(tmp_path / "runs"), ticks=ticks, watch=look)
    assert ticks.stat().st_size == 90
    in_last_round = [done for rounds, done in seen if rounds == 2]
    assert min(in_last_round[1:]) >= 60 > len(Store(tmp_path / "runs").epochs([one.id]))


def test_a_diverging_run_is_marked_failed_and_the_others_go_on(tmp_path):
    wild = run(train=Train(epochs=3, batch_size=32, optimiser="sgd", lr=1e18))
    result = run_all([wild, run()], store=Store(tmp_path), jobs=1, progress=False)
    assert "not finite" in result.failed[wild.id]
    assert Store(tmp_path).status(run()) == "complete"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: run("magnitud"), "did you mean 'magnitude'"),
        (lambda: run("magnitude", options={"scop": "layer"}), "did you mean 'scope'"),
        (lambda: run("magnitude", layers=("hidden_3",)), "hidden_3"),
        (lambda: Run(Data("mnits")), "did you mean 'mnist'"),
        (lambda: Run(DIGITS, Model("lenet_55")), "did you mean 'lenet_5'"),
        (lambda: Run(Data("digits", validation=0)), "digits: Data.validation = 0 holds no sample out"),
        (lambda: Run(Data("digits", validation=0.0001)), "Data.validation = 0.0001 holds no sample out"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_trains(tmp_path, wrong, message):
    with pytest.raises(PrunelabError, match=message):
        run_all([run(), wrong()], store=Store(tmp_path / "runs"), jobs=1, progress=False)
    assert not (tmp_path / "runs").exists() or Store(tmp_path / "runs").ids(unfinished=True) == []


def test_processes_share_the_work(tmp_path):
    result = run_all([run(seed=s) for s in range(3)], store=Store(tmp_path), jobs=2, progress=False)
    alone = run_all([run(seed=s) for s in range(3)], store=Store(tmp_path / "alone"), jobs=1, progress=False)
    np.testing.assert_allclose(result.last["test_loss"], alone.last["test_loss"], rtol=1e-3)


def test_processes_keep_to_the_threads_of_the_one_that_asks(tmp_path, one_thread):
    result = run_all([run(seed=s) for s in range(2)], store=Store(tmp_path), jobs=2, progress=False)
    assert set(result.rounds["threads"]) == {1}  # though two cores each would be there on a machine of four


@pytest.fixture
def trained(monkeypatch):
    """How many members each epoch of each stack had."""
    seen, epoch = [], train._Lockstep.epoch

    def counted(stack, data):
        seen.append(len(stack.members))
        return epoch(stack, data)

    monkeypatch.setattr(train._Lockstep, "epoch", counted)
    return seen


def test_a_stack_is_made_once_for_a_whole_round(tmp_path, monkeypatch):
    made, stack = [], train._Lockstep.__init__

    def counted(self, members, parts):
        made.append(len(members))
        stack(self, members, parts)

    monkeypatch.setattr(train._Lockstep, "__init__", counted)
    run_all(
        [run("magnitude", amount=0.5, rounds=1, seed=s) for s in (0, 1)], store=Store(tmp_path), jobs=1, progress=False
    )
    assert made == [2, 1, 1, 2]  # a round, each run alone right after its pruning, a round


ADAM = Train(epochs=6, batch_size=32, lr=3e-3, optimiser="adam", augment="none", patience=4, restore_best=True)


@pytest.mark.parametrize(
    "methods",
    [
        [{"method": "magnitude", "amount": a, "rounds": 1} for a in (0.5, 0.8)],
        [{"method": "dyprune", "options": {"trigger": "static", "every": k}} for k in (2, 3)],
        [{"method": "none"}, {"method": "magnitude", "amount": 0.5, "rounds": 1}],
    ],
)
def test_runs_that_begin_alike_are_trained_once_until_they_part(tmp_path, trained, one_thread, methods):
    runs = [run(train=ADAM, **method) for method in methods]
    together = run_all(runs, store=Store(tmp_path / "together"), jobs=1, progress=False)
    shared = sum(trained)
    trained.clear()
    for one in runs:
        run_all([one], store=Store(tmp_path / "alone"), jobs=1, progress=False)
    alone = Store(tmp_path / "alone").epochs([one.id for one in runs])
    common = together.epochs[together.epochs["round"] == 0].groupby("id").size().min()
    assert shared == sum(trained) - common
    timing = ["seconds", "lockstep", "alike"]
    first = [frame[frame["epoch"] <= common].drop(columns=timing) for frame in (together.epochs, alone)]
    pd.testing.assert_frame_equal(*first, check_exact=True)
    later = [frame.drop(columns=timing).reset_index(drop=True) for frame in (together.epochs, alone)]
    pd.testing.assert_frame_equal(*later, rtol=2e-2)
    assert (together.epochs["alike"] == 2).sum() == 2 * common
    first = together.rounds[together.rounds["round"] == 0]
    within = first["epochs"] == common  # of a round that goes on after they part, less is shared
    np.testing.assert_allclose(first["seconds_spent"][within], first["seconds"][within] / 2)
    assert (first["seconds_spent"] <= first["seconds"]).all()


def test_a_penalty_makes_another_beginning(tmp_path, trained):
    run_all([run(), run("dropneuron")], store=Store(tmp_path), jobs=1, progress=False)
    assert sum(trained) == 2 * 6


def test_runs_are_dealt_so_that_those_that_begin_alike_stay_together():
    runs = [run("magnitude", seed=seed, amount=a, rounds=1) for a in (0.2, 0.4, 0.6, 0.8) for seed in range(3)]
    hands = experiment._deal(runs, 3)
    assert [{one.seed for one in hand} for hand in hands] == [{0}, {1}, {2}]
    assert [len(hand) for hand in experiment._deal(runs, 4)] == [3, 3, 3, 3]
    alone = [dataclasses.replace(one, model=Model("resnet20"), data=Data("digits", train_size=200)) for one in runs]
    lots = experiment._deal(alone, 2)
    assert {len({one.seed for one in lot}) for lot in lots} == {1}
    assert sorted(one.id for lot in lots for one in lot) == sorted(one.id for one in alone)


def test_the_network_of_a_run_is_built_once(tmp_path, monkeypatch):
    built, build = [], models.build
    monkeypatch.setattr(models, "build", lambda *asked: built.append(asked) or build(*asked))
    train_population([run("magnitude", amount=0.5, rounds=2)], Store(tmp_path))
    assert len(built) == 1


def test_strategies_by_name_become_a_column(tmp_path):
    half = run("magnitude", amount=0.5, rounds=1)
    asked = {"dense": [run(seed=0), run(seed=1)], "half": [half], "also half": [half]}
    result = run_all(asked, store=Store(tmp_path), jobs=1, progress=False)
    last = result.last
    assert last["strategy"].tolist() == ["dense", "dense", "half", "also half"]
    assert last["round"].tolist() == [0, 0, 1, 1]
    assert last["epochs"].tolist() == [6, 6, 12, 12]  # of both rounds, once


KILLED = """
import sys
from prunelab.training.experiment import run_all, train_population
from prunelab.runs import Store
from prunelab.settings import Run
import json
run_all([Run.fromdict(r) for r in json.loads(sys.argv[2])], store=Store(sys.argv[1]), jobs=1, progress=False)
"""


@pytest.fixture
def one_thread():
    """As in the process that is killed: other numbers of threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["dyprune", "magnitude"])
def test_a_killed_run_ends_with_the_numbers_of_one_that_was_not(tmp_path, method, one_thread):
    train = Train(epochs=14, batch_size=4, lr=1e-3, weight_decay=0.01)
    if method == "dyprune":
        one = run(method, train=train, options={"trigger": "static", "every": 2, "rate": 0.3})
    else:
        one = run(method, train=train, amount=0.3, rounds=4, recover="rewind")
    store = Store(tmp_path / "killed")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(store.root), json.dumps([one.asdict()])]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoint = store.root / f"{one.id}.partial" / "checkpoint.safetensors"
    for _ in range(3000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert store.status(one) == "partial"
    whole = Store(tmp_path / "whole")
    for where in (store, whole):
        run_all([one], store=where, jobs=1, progress=False)
    volatile = ["seconds", "seconds_spent", "prune_seconds", "finished", "git_commit"]
    for table in ("rounds", "epochs"):
        a, b = (getattr(s, table)([one.id]).drop(columns=volatile, errors="ignore") for s in (store, whole))
        pd.testing.assert_frame_equal(a, b)
    for name, array in whole.weights(one.id).items():
        np.testing.assert_array_equal(store.weights(one.id)[name], array)


@pytest.mark.parametrize("when", ["training", "starting"])
def test_workers_end_with_the_process_that_started_them(tmp_path, when, monkeypatch):
    code = """
import sys
from prunelab.training.experiment import run_all
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
runs = [Run(Data("digits"), Model("mlp", (16,)), Train(epochs=10**6), Prune("none"), seed=s) for s in range(2)]
run_all(runs, store=Store(sys.argv[1]), jobs=2, progress=False)
"""
    store, temporary = tmp_path / "store", tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = psutil.Popen([sys.executable, "-c", code, str(store)], env=environment)

    def started():
        return [p for p in process.children(recursive=True) if "popen_loky" in " ".join(p.cmdline())]

    until = time.monotonic() + 60
    while (len(list(store.glob(".locks/*"))) if when == "training" else len(started())) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    workers = started()
    assert len(workers) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    # One that nothing was sent to waits for work, until joblib's own limit, and trains nothing.
    busy = [one.cpu_percent(interval=1) for one in alive if one.is_running()]
    for one in alive:
        one.kill()
    assert max(busy, default=0) < 20
    assert not list(store.glob(".locks/*")) if when == "starting" else not alive
    assert list(temporary.glob("prunelab-*"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with scratch() as mine, scratch() as other:  # what was left goes with the next start; nothing of whoever lives
        assert {mine, other} == set(temporary.glob("prunelab-*"))
    assert not list(temporary.glob("prunelab-*"))


def test_a_killed_worker_is_one_line(tmp_path):
    runs = [run("none", seed=s, train=Train(epochs=10**6)) for s in range(2)]

    def kill():
        until = time.monotonic() + 60
        while not (locks := list(tmp_path.glob(".locks/*"))) and time.monotonic() < until:
            time.sleep(0.1)
        worker = next(p for p in psutil.Process().children(recursive=True) if "popen_loky" in " ".join(p.cmdline()))
        assert locks
        worker.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(PrunelabError, match=r"a process that trained was killed.*fewer jobs than 2"):
        run_all(runs, store=Store(tmp_path), jobs=2, progress=False)
    thread.join()


def test_a_killed_population_goes_on_with_every_run_where_it_was(tmp_path, one_thread):
    train = Train(epochs=9, batch_size=4, lr=1e-3, patience=1)
    runs = [
        run("dropnet", seed=seed, train=train, amount=0.3, rounds=4, recover="rewind", options={"metric": metric})
        for seed in range(2)
        for metric in ("minimum", "random")
    ]
    store, whole = Store(tmp_path / "killed"), Store(tmp_path / "whole")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(store.root), json.dumps([r.asdict() for r in runs])]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    places = [store.root / f"{r.id}.partial" / "checkpoint.safetensors" for r in runs]
    for _ in range(1000):
        if all(place.exists() for place in places) or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = store.rounds([r.id for r in runs], unfinished=True)
    assert set(reached["id"]) == {r.id for r in runs}
    for where in (store, whole):
        run_all(runs, store=where, jobs=1, progress=False)
    ids = [r.id for r in runs]
    kept = store.rounds(ids).merge(reached[["id", "round", "seconds"]], on=["id", "round"], suffixes=("", "_before"))
    assert (kept["seconds"] == kept["seconds_before"]).all()  # what had ended was not trained again
    a, b = (s.rounds(ids).set_index(["id", "round"]).sort_index() for s in (store, whole))
    pd.testing.assert_series_equal(a["units"], b["units"])
    pd.testing.assert_series_equal(a["epochs"], b["epochs"])
    pd.testing.assert_series_equal(a["test_loss"], b["test_loss"])
    for one in ids:
        for name, array in whole.weights(one).items():
            np.testing.assert_array_equal(store.weights(one)[name], array)


def test_of_two_processes_at_one_run_one_trains_and_the_other_waits(tmp_path):
    one = run(train=Train(epochs=10, batch_size=4))
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), json.dumps([one.asdict()])]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0]
    assert Store(tmp_path).ids(unfinished=True) == [one.id]
    assert len(Store(tmp_path).rounds([one.id])) == 1


def test_a_run_can_take_the_masks_of_another_round_by_round(tmp_path):
    store = Store(tmp_path)
    leader = run("magnitude", amount=0.5, rounds=2, recover="rewind")
    follower = run("magnitude", seed=7, amount=0.5, rounds=2, recover="rewind", masks_of=leader.id)
    run_all([follower, leader], store=store, jobs=1, progress=False)
    for name, mask in store.masks(leader.id).items():
        np.testing.assert_array_equal(mask, store.masks(follower.id)[name])
    assert any((store.weights(leader.id)[n] != store.weights(follower.id)[n]).any() for n in store.masks(leader.id))


def test_a_run_that_follows_an_unknown_one_is_refused(tmp_path):
    with pytest.raises(PrunelabError, match="takes the masks of 'nobody', which is neither stored nor among the runs"):
        run_all([run("magnitude", rounds=1, masks_of="nobody")], store=Store(tmp_path), jobs=1, progress=False)


def test_no_runs_and_no_jobs_are_refused(tmp_path):
    with pytest.raises(PrunelabError, match="no runs were asked for"):
        run_all([], store=Store(tmp_path))
    with pytest.raises(PrunelabError, match=r"no runs of 'dense' were asked for: .* is the number of seeds 0"):
        run_all({"pruned": [run("magnitude")], "dense": []}, store=Store(tmp_path))
    for jobs in (0, 1.5, "2"):
        with pytest.raises(PrunelabError, match=f"jobs = {jobs!r}: should be 1 or more"):
            run_all([run()], store=Store(tmp_path), jobs=jobs)
    for wrong in (run(), {"dense": run()}, ["dense"], None):
        with pytest.raises(
            PrunelabError, match=r"runs = .*: should be a list of Run\(\.\.\.\), or name -> such a list"
        ):
            run_all(wrong, store=Store(tmp_path))


@pytest.mark.parametrize("recover", ["finetune", "rewind", "none"])
def test_accuracy_right_after_a_pruning_is_on_record(tmp_path, recover):
    store = Store(tmp_path)
    one = run("magnitude", amount=0.6, rounds=1, recover=recover)
    rows = run_all([one], store=store, jobs=1, progress=False).rounds
    run_all([run()], store=store, jobs=1, progress=False)
    images = load(DIGITS)
    model = trained_network(store, run(), images)
    masks_at(store.removals(one), 1).apply_(model)
    with torch.no_grad():
        right = (model(images.scale(images.test.x)).argmax(1) == images.test.y).double().mean().item()
    assert rows["pruned_test_accuracy"].isna().tolist() == [True, False]
    assert rows["pruned_test_accuracy"].iloc[1] == pytest.approx(right)
    assert (rows["pruned_test_accuracy"].iloc[1] == rows["test_accuracy"].iloc[1]) == (recover == "none")


@pytest.mark.parametrize("knows", [True, False])
def test_a_machine_that_computes_bfloat16_by_detours_says_so(tmp_path, monkeypatch, caplog, knows):
    monkeypatch.setattr("prunelab.training.experiment.knows_bfloat16", lambda where: knows)
    reduced = run(train=Train(epochs=1, batch_size=32, precision="bfloat16"))
    done = run_all([reduced], store=Store(tmp_path), jobs=1, progress=False, device="cpu")
    assert ("bfloat16" in caplog.text) is not knows
    assert done.rounds["train.precision"].tolist() == ["bfloat16"]
