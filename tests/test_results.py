"""The run store: what survives a kill, who may train what, what a table looks like, and what damage says."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prunelab.errors import PrunelabError
from prunelab.runs import Busy, Checkpoint, Store, StoreError, frames, provenance, records
from prunelab.settings import Data, Prune, Run, Train

RUN = Run(seed=3, prune=Prune(method="dropnet", rounds=2))
WEIGHTS = {"hidden_1.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
MASKS = {"hidden_1.weight": np.array([[True, False, True], [False, True, True]])}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


def checkpoint(rounds=1, size=3, **columns):
    """What a run knows after so many rounds; every part of it tells the number of rounds."""
    return Checkpoint(
        tensors={"weight": np.full(size, rounds, np.float32)},
        state={"finished": rounds},
        rounds=[{"round": r, "test_accuracy": 0.9 - r / 10, "seconds": 2.0, **columns} for r in range(rounds)],
        epochs=[{"round": r, "epoch": r + 1, "train_loss": 1.0 / (r + 1), "pruned": True} for r in range(rounds)],
    )


def complete(store, run=RUN, **columns):
    with store.claim(run) as writer:
        writer.save(checkpoint(2, **columns))
        writer.finish(WEIGHTS, MASKS, provenance={"device": "cpu"})
    return run.id


def fail(store, run, reason="the loss was nan"):
    with store.claim(run) as writer:
        writer.save(checkpoint())
        writer.fail(reason)
    return run.id


def python(code, *arguments, **options):
    """Another process that has the store of its first argument, and RUN, WEIGHTS, MASKS and checkpoint as here."""
    lines = (
        "import os, pathlib, sys, time",
        "import numpy as np",
        "from prunelab.runs import records",
        "from prunelab.runs import *",
        "from prunelab.settings import Prune, Run",
        f"RUN = Run.fromdict({RUN.asdict()!r})",
        "WEIGHTS, MASKS = {'w': np.ones(3)}, {'w': np.ones(3, bool)}",
        inspect.getsource(checkpoint),
        "store = Store(sys.argv[1])",
    )
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines) + "\n" + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def done(process):
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return out


# ---- a run, from the first round to its place ----


def test_a_run_comes_back_as_it_was_saved(store):
    with store.claim(RUN) as writer:
        assert (writer.complete, writer.failed, writer.checkpoint) == (False, None, None)
        writer.save(checkpoint(2))
        writer.finish(WEIGHTS, MASKS, {"hidden_1.weight.round": np.array([-1, 1], np.int16)}, {"device": "cpu"})
    assert store.status(RUN) == store.status(RUN.id) == "complete"
    assert store.settings(RUN.id) == RUN
    for kind, expected in (("weights", WEIGHTS), ("masks", MASKS)):
        found = getattr(store, kind)(RUN)
        assert found.keys() == expected.keys()
        np.testing.assert_array_equal(found["hidden_1.weight"], expected["hidden_1.weight"], strict=True)
    assert store.removals(RUN)["hidden_1.weight.round"].tolist() == [-1, 1]
    rounds = store.rounds()
    assert rounds["round"].tolist() == [0, 1]
    assert rounds["test_accuracy"].tolist() == [0.9, 0.8]
    assert (rounds["id"] == RUN.id).all()
    assert store.epochs()["train_loss"].tolist() == [1.0, 0.5]
    assert store.show(RUN)["provenance"] == {"device": "cpu"}


def test_nothing_lies_under_the_final_name_before_the_end(store, monkeypatch):
    def seen():
        return sorted(path.name for path in store.root.iterdir() if path.name != ".locks")

    with store.claim(RUN) as writer:
        assert seen() == []
        for rounds in (1, 2):
            writer.save(checkpoint(rounds))
            assert seen() == [f"{RUN.id}.partial"]
        assert [path.name for path in (store.root / f"{RUN.id}.partial").iterdir()] == ["checkpoint.safetensors"]

        real = records.write

        def full_disk(path, data):
            if path.name == "masks.safetensors":
                raise StoreError("no space left")
            real(path, data)

        monkeypatch.setattr(records, "write", full_disk)
        with pytest.raises(StoreError, match="no space left"):
            writer.finish(WEIGHTS, MASKS)
        assert seen() == [f"{RUN.id}.partial"]
        monkeypatch.undo()
        assert writer.checkpoint.state == {"finished": 2}
        writer.finish(WEIGHTS, MASKS)
        assert seen() == [RUN.id]
    names = {path.name for path in (store.root / RUN.id).iterdir()}
    assert names == set(records.FILES) - {"removals.safetensors"}
    assert list((store.root / ".locks").iterdir()) == []


def test_a_finished_run_is_not_trained_again(store):
    complete(store)
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*.safetensors")}
    with store.claim(RUN) as writer:
        assert writer.complete
        with pytest.raises(StoreError, match="not held any more"):
            writer.save(checkpoint())
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*.safetensors")} == before


def test_a_run_without_a_round_cannot_be_finished(store):
    with store.claim(RUN) as writer, pytest.raises(StoreError, match="no round was saved"):
        writer.finish(WEIGHTS, MASKS)
    assert store.status(RUN) == "missing"


def test_a_failed_run_keeps_its_rows_and_is_not_retrained(store):
    fail(store, RUN, reason="the loss was nan\nin epoch 2")
    assert store.status(RUN) == "failed"
    with store.claim(RUN) as writer:
        assert writer.failed == "the loss was nan in epoch 2"
        assert not writer.complete
    rows = store.rounds()
    assert (rows["status"].tolist(), rows["round"].tolist()) == (["failed"], [0])
    assert store.show(RUN)["reason"] == "the loss was nan in epoch 2"
    with pytest.raises(StoreError, match=r"has no weights: it failed \(the loss was nan"):
        store.weights(RUN)
    store.discard(RUN)
    assert store.status(RUN) == "missing"
    with store.claim(RUN) as writer:
        assert (writer.failed, writer.checkpoint) == (None, None)


def test_a_run_that_fails_before_its_first_round_is_on_record(store):
    with store.claim(RUN) as writer:
        writer.fail("no memory")
    assert store.status(RUN) == "failed"
    assert store.settings(RUN) == RUN
    assert len(store.rounds()) == 0
    assert store.list()[["status", "rounds"]].values.tolist() == [["failed", 0]]


# ---- killed, full, concurrent ----


def test_the_checkpoint_of_another_run_is_not_gone_on_with(store):
    with store.claim(RUN) as writer:
        writer.save(checkpoint())
    other = Run(seed=4, prune=RUN.prune)
    store.place(RUN.id).partial.rename(store.place(other.id).partial)
    with pytest.raises(StoreError, match=f"holds the settings of {RUN.id}, not of {other.id}"), store.claim(other):
        pass
    assert store.place(other.id).partial.is_dir()


@pytest.mark.parametrize("patience", [0.0, 0.005])
def test_a_kill_in_the_middle_of_saving_leaves_the_last_round_whole(store, patience):
    code = """
with store.claim(RUN) as writer:
    for rounds in range(1, 10_000):
        writer.save(checkpoint(1 + rounds % 50, size=1_000_000))
        print(rounds, flush=True)
"""
    process = python(code, store.root)
    for _ in range(5):
        assert process.stdout.readline(), process.stderr.read()
    time.sleep(patience)
    assert store.status(RUN) == "running"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()

    assert store.status(RUN) == "partial"
    with store.claim(RUN, wait=False) as writer:
        found = writer.checkpoint
        rounds = found.state["finished"]
        assert rounds >= 5
        assert len(found.rounds) == len(found.epochs) == rounds
        assert (found.tensors["weight"] == rounds).all()
        assert len(found.tensors["weight"]) == 1_000_000
        writer.save(checkpoint(rounds + 1))
        writer.finish(WEIGHTS, MASKS)
    assert len(store.rounds(RUN)) == rounds + 1
    assert sorted(path.name for path in store.root.iterdir()) == [".locks", RUN.id]


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "rounds.parquet", "masks.safetensors", "removed"])
def test_a_kill_at_any_step_of_the_end_is_made_good(store, name):
    code = """
import signal
with store.claim(RUN) as writer:
    writer.save(checkpoint(1))
    write, write_bytes, unlink = records.write, pathlib.Path.write_bytes, pathlib.Path.unlink
    def half(path, data):
        if path.name.startswith("." + sys.argv[2].split(".")[0]):
            write_bytes(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_bytes(path, data)
    def die(path, *arguments, **options):
        if path.name == "checkpoint.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        return unlink(path, *arguments, **options)
    pathlib.Path.write_bytes = half
    writer.save(checkpoint(2))
    if sys.argv[2] == "removed":
        pathlib.Path.unlink = die  # moved into place, the checkpoint still to be deleted
    writer.finish(WEIGHTS, MASKS)
"""
    process = python(code, store.root, name)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, err
    with store.claim(RUN, wait=False) as writer:
        assert writer.complete == (name == "removed")
        if not writer.complete:
            assert writer.checkpoint.state["finished"] == (1 if name.startswith("checkpoint") else 2)
            writer.save(checkpoint(2))
            writer.finish(WEIGHTS, MASKS)
            assert {path.name for path in (store.root / RUN.id).iterdir()} < set(records.FILES)
    assert len(store.rounds()) == 2
    assert store.masks(RUN)


def test_a_full_disk_keeps_the_checkpoint_before(store):
    code = """
import resource
with store.claim(RUN) as writer:
    writer.save(checkpoint(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        writer.save(checkpoint(2, size=1_000_000))
    except StoreError as error:
        print(error)
    print(writer.checkpoint.state, os.listdir(store.root / f"{RUN.id}.partial"))
"""
    message, left = done(python(code, store.root)).splitlines()
    assert "File too large; the rounds before are kept" in message
    assert "prunelab runs gc" in message
    assert left == "{'finished': 1} ['checkpoint.safetensors']"


def test_of_two_processes_one_trains_and_the_other_finds_it_complete(store, tmp_path, caplog):
    code = """
with store.claim(RUN) as writer:
    pathlib.Path(sys.argv[2], "held").touch()
    while not pathlib.Path(sys.argv[2], "go").exists():
        time.sleep(0.01)
    writer.save(checkpoint(2))
    time.sleep(0.3)
    writer.finish(WEIGHTS, MASKS)
"""
    process = python(code, store.root, tmp_path)
    wait_for((tmp_path / "held").exists)
    assert store.status(RUN) == "running"
    with pytest.raises(Busy, match="being trained already"), store.claim(RUN, wait=False):
        pass
    (tmp_path / "go").touch()
    with caplog.at_level(logging.INFO), store.claim(RUN) as writer:
        assert writer.complete
    assert "which another process trains" in caplog.text
    done(process)


def test_who_waits_for_a_process_that_dies_goes_on_from_its_last_round(store):
    process = python(
        "with store.claim(RUN) as w:\n    w.save(checkpoint(4))\n    print('ok', flush=True)\n    time.sleep(60)",
        store.root,
    )
    assert process.stdout.readline() == "ok\n"
    with pytest.raises(Busy):
        store.discard(RUN)
    assert store.rounds().empty
    assert store.rounds(unfinished=True)["status"].tolist() == ["running"] * 4
    waiting = python("with store.claim(RUN) as w:\n    print(w.checkpoint.state, flush=True)", store.root)
    time.sleep(0.8)
    process.kill()
    assert done(waiting) == "{'finished': 4}\n"
    process.communicate()


def test_one_process_holds_a_population_of_ninety(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # five hundred of them are most of the time, and not the matter
    runs = [Run(seed=seed) for seed in range(90)]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(store.claim(run, wait=False)) for run in runs]
        for writer in writers:
            writer.save(checkpoint(1))
        code = """
busy = 0
for seed in range(91):
    try:
        with store.claim(Run(seed=seed), wait=False):
            pass
    except Busy:
        busy += 1
print(busy, {store.status(Run(seed=seed)) for seed in range(90)})
"""
        assert done(python(code, store.root)) == "90 {'running'}\n"
        for writer in writers[:60]:
            writer.finish(WEIGHTS, MASKS)
        assert len(store.rounds()) == 60
        assert store.status(runs[0]) == "complete"
        assert store.status(runs[60]) == "running"
    assert store.list()["status"].value_counts().to_dict() == {"complete": 60, "partial": 30}


def test_three_processes_train_every_run_exactly_once(store, tmp_path):
    code = """
import random
runs = [Run(seed=seed) for seed in range(25)]
random.Random(sys.argv[2]).shuffle(runs)
trained = []
for run in runs:
    with store.claim(run) as writer:
        if not writer.complete:
            trained.append(run.seed)
            time.sleep(0.005)
            writer.save(checkpoint(1))
            writer.finish(WEIGHTS, MASKS)
print(*trained)
"""
    processes = [python(code, store.root, number) for number in range(3)]
    trained = [int(seed) for process in processes for seed in done(process).split()]
    assert sorted(trained) == list(range(25))


def test_a_process_that_names_a_run_twice_is_told(store):
    with store.claim(RUN), pytest.raises(Busy, match="claimed twice by the same process"), store.claim(RUN):
        pass
    with store.claim(RUN) as writer:
        assert not writer.complete


def test_a_reader_never_misses_a_run_that_is_being_moved_into_place(store):
    code = """
for seed in range(60):
    with store.claim(Run(seed=seed)) as writer:
        writer.save(checkpoint(1))
        writer.finish(WEIGHTS, MASKS)
print("done")
"""
    process = python(code, store.root)
    seen = 0
    while process.poll() is None:
        found = store.rounds(unfinished=True)
        assert len(found) >= seen
        seen = len(found)
    done(process)
    assert len(store.rounds()) == 60


# ---- what can be stored ----


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensor=st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int16, np.uint8, np.bool_]).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    )
)
def test_any_array_comes_back_bit_for_bit(tmp_path, tensor):
    (tmp_path / "t").write_bytes(records.encode_tensors({"as it is": tensor, "turned": tensor.T}))
    found = records.decode_tensors((tmp_path / "t").read_bytes())
    for name, expected in (("as it is", tensor), ("turned", tensor.T)):
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert found[name].tobytes() == np.ascontiguousarray(expected).tobytes()
        assert found[name].flags.writeable  # torch.from_numpy warns about others


def test_state_and_rows_keep_nan_infinity_and_numpy_scalars(store):
    saved = Checkpoint(
        tensors={},
        state={"best": math.inf, "lost": math.nan, "patience": np.int64(3), "big": 2**100, "layers": ("a", "b")},
        rounds=[{"round": np.int64(0), "test_loss": np.float32(0.5), "units_by_layer": [40, 40]}],
        epochs=[],
    )
    with store.claim(RUN) as writer:
        writer.save(saved)
        found = writer.checkpoint
        assert math.isnan(found.state.pop("lost"))
        assert found.state == {"best": math.inf, "patience": 3, "big": 2**100, "layers": ["a", "b"]}
        writer.finish({}, {})
    row = store.rounds().iloc[0]
    assert (row["test_loss"], row["units_by_layer"]) == (0.5, "[40, 40]")
    assert store.epochs().empty


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": {"units": {3: "x"}}}, "state.units: the key 3 is not text"),
        ({"state": {"model": object()}}, "state.model: JSON cannot keep object"),
        ({"rounds": [{"test_loss": 1.0}]}, "no 'round'"),
        ({"epochs": [{"round": 0}]}, "no 'epoch'"),
        (
            {"rounds": [{"round": 0, "test_loss": "low"}]},
            "'test_loss' of the results holds 'low': it should hold numbers",
        ),
        ({"epochs": [{"round": 0, "epoch": 1, "pruned": 2}]}, "'pruned' of the results holds 2"),
        ({"rounds": [{"round": 0, "mine": 1}, {"round": 1, "mine": "x"}]}, "'mine' of the results"),
        ({"tensors": {"w": np.array(["text"])}}, "tensor 'w' is <U4"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(store, change, says):
    parts = {"tensors": {}, "state": {}, "rounds": [{"round": 0}], "epochs": [], **change}
    with store.claim(RUN) as writer:
        with pytest.raises(PrunelabError) as caught:
            writer.save(Checkpoint(**parts))
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (store.root / f"{RUN.id}.partial").exists()


# ---- tables ----


def test_columns_and_types_are_the_same_whatever_runs_are_asked_for(store):
    empty = {what: getattr(store, what)() for what in ("rounds", "epochs")}
    plain = Run(seed=0)
    rich = Run(seed=1, train=Train(patience=3), retrain=Train(epochs=2), prune=Prune(options={"k": 2, "rewind": True}))
    complete(store, plain)
    complete(store, rich, units=7, units_by_layer="[7]", note="fine", macs=None)
    for what, nothing in empty.items():
        query = getattr(store, what)
        one, two, both = query(plain), query(rich), query()
        own = {"prune.k", "prune.rewind", *(name for name in both if name.startswith("retrain."))}
        usual = [name for name in both if name not in own]
        assert list(nothing) == list(one) == usual == [name for name in two if name not in own]
        assert (nothing.dtypes == one.dtypes).all()
        assert (one.dtypes == both[usual].dtypes).all()
        assert (two.dtypes == both[list(two)].dtypes).all()
        assert list(both)[:6] == ["id", "status", "seed", "data", "model", "method"]
        assert both["prune.k"].tolist()[-1] == 2.0
        assert math.isnan(both["prune.k"][0])
        assert both["prune.rewind"].isna().tolist()[0]
    rounds = store.rounds()
    assert rounds["units"].dtype == float
    assert math.isnan(rounds["units"][0])
    assert rounds["round"].dtype == rounds["train.epochs"].dtype == "int64"
    assert rounds["train.patience"].tolist()[-1] == 3.0
    assert store.epochs()["pruned"].dtype == bool


def test_settings_win_over_rows_of_the_same_name(store):
    complete(store, seed=77, method="another", id="x")
    rows = store.rounds()
    assert (rows["seed"].iloc[0], rows["method"].iloc[0], rows["id"].iloc[0]) == (3, "dropnet", RUN.id)
    assert rows.columns.is_unique


def test_a_column_of_ones_own_comes_last_and_may_be_missing_elsewhere(store):
    complete(store, Run(seed=0), snr=3)
    complete(store, Run(seed=1))
    rows = store.rounds()
    assert list(rows)[-1] == "snr"
    assert rows["snr"].dtype == float
    assert rows["snr"].isna().tolist() == [False, False, True, True]


def test_filters(store):
    for seed in range(3):
        complete(store, Run(seed=seed, prune=Prune(method="dropnet", amount=0.2)))
    complete(store, Run(seed=0, data=Data(name="iris"), prune=Prune(method="dyprune", amount=0.5)))
    assert set(store.rounds(method="dyprune")["data"]) == {"iris"}
    assert set(store.rounds(seed=[0, 2], data="mnist")["seed"]) == {0, 2}
    assert len(store.rounds(**{"prune.amount": 0.5})) == 2
    assert store.rounds(round=1)["test_accuracy"].tolist() == [0.8] * 4
    assert len(store.epochs(pruned=True, seed=0)) == 4
    assert len(store.rounds(**{"train.patience": None})) == 8
    assert store.rounds(seed=99).empty
    with pytest.raises(PrunelabError, match="no column 'metod': did you mean 'method'"):
        store.rounds(metod="dropnet")


def test_runs_come_in_the_order_asked_for_and_seeds_by_number(store):
    runs = [Run(seed=seed) for seed in (10, 9, 2)]
    for run in runs:
        complete(store, run)
    assert store.rounds(round=0)["seed"].tolist() == [2, 9, 10]
    assert store.rounds(runs, round=0)["seed"].tolist() == [10, 9, 2]
    assert store.rounds([runs[0].id, runs[0]], round=0)["seed"].tolist() == [10]
    assert store.rounds([]).empty


def test_the_list_sums_up_every_run(store):
    complete(store, Run(seed=0), finished="2026-11-20T10:00:00Z", prune_seconds=0.5)
    fail(store, Run(seed=1))
    with store.claim(Run(seed=2)) as writer:
        writer.save(checkpoint(1))
        found = store.list().set_index("seed")
    assert found["status"].to_dict() == {0: "complete", 1: "failed", 2: "running"}
    assert found["rounds"].to_dict() == {0: 2, 1: 1, 2: 1}
    assert (found["best_test_accuracy"][0], found["last_test_accuracy"][0]) == (0.9, 0.8)
    assert found["seconds"].to_dict() == {0: 5.0, 1: 2.0, 2: 2.0}
    assert found["finished"][0] == "2026-11-20T10:00:00Z"
    assert found["bytes"][0] == sum(path.stat().st_size for path in (store.root / Run(seed=0).id).iterdir())
    assert Store(store.root / "none").list().dtypes.equals(store.list().dtypes)


def test_folders_that_are_no_runs_are_left_alone(store):
    complete(store)
    (store.root / "notes").mkdir()
    (store.root / "archive.tar").touch()
    assert store.ids() == [RUN.id]
    assert store.status("notes") == "missing"


# ---- naming a run ----


def test_the_beginning_of_an_id_is_enough(store):
    complete(store)
    complete(store, Run(seed=4))
    assert store.settings("dropnet") == RUN
    complete(store, Run(seed=40))
    with pytest.raises(StoreError, match=r"begins 2 ids .*: give more of it") as caught:
        store.rounds("none-")
    assert "none-mlp-mnist-s4" in str(caught.value)
    with pytest.raises(StoreError, match="did you mean 'dropnet-mlp-mnist-s3-"):
        store.weights("dropnt-mlp-mnist-s3")
    assert store.status("nothing") == "missing"


def test_the_state_of_a_run_is_found_without_a_look_at_the_others(store, monkeypatch):
    complete(store)
    monkeypatch.setattr(Store, "ids", lambda *_, **__: pytest.fail("all runs were listed"))
    assert (store.status(RUN), store.status(Run(seed=9))) == ("complete", "missing")


def test_an_unknown_run_in_a_large_store_gets_one_short_line(store):
    for seed in range(8):
        fail(store, Run(seed=seed))
    with pytest.raises(StoreError, match="'prunelab runs list' shows the 8 runs"):
        store.show("quite different")


# ---- damage ----


def damaged(store, call):
    with pytest.raises(StoreError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert str(store.root) in message
    assert "'prunelab runs check --repair' drops the run" in message
    return message


@pytest.mark.parametrize("name", ["rounds.parquet", "settings.json", "weights.safetensors", "masks.safetensors"])
@pytest.mark.parametrize("harm", ["truncated", "empty", "noise", "missing"])
def test_a_damaged_file_is_named_with_the_remedy(store, name, harm):
    path = store.root / complete(store) / name
    data = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "noise": bytes(range(256)) * 4}[harm])
    calls = {"weights.safetensors": store.weights, "masks.safetensors": store.masks}
    message = damaged(store, lambda: calls.get(name, store.rounds)(RUN))
    assert name in message
    assert ("is missing" if harm == "missing" else "is damaged") in message


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_a_damaged_checkpoint_is_dropped_with_a_word_before_training(store, caplog, keep):
    with store.claim(RUN) as writer:
        writer.save(checkpoint())
    path = store.root / f"{RUN.id}.partial" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "checkpoint.safetensors is damaged" in damaged(store, lambda: store.check(RUN))
    with store.claim(RUN) as writer:
        assert (writer.checkpoint, writer.complete, writer.failed) == (None, False, None)
    assert re.fullmatch(r"\S+checkpoint.safetensors is damaged \(.*\): it is trained again", caplog.messages[0])


def aged(folder):
    """The run as it was written before there were digests."""
    record = json.loads((folder / "settings.json").read_text())
    record = {"format": 1, "id": record["id"], "run": record["run"]}
    (folder / "settings.json").write_text(json.dumps(record))
    return record


def test_settings_that_belong_to_another_run_are_refused(store):
    folder = store.root / complete(store)
    (folder / "settings.json").write_text((folder / "settings.json").read_text().replace('"seed": 3', '"seed": 4'))
    assert "settings.json is damaged (its bytes are not" in damaged(store, store.rounds)
    record = aged(folder)
    for change, says in (({"seed": 4}, f"not those of {RUN.id}"), ({"sed": 4}, "has no setting 'sed'")):
        (folder / "settings.json").write_text(json.dumps({**record, "run": {**record["run"], **change}}))
        assert says in damaged(store, store.rounds)
    (folder / "settings.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(StoreError, match="has format 99, not 2: it needs another prunelab"):
        store.rounds()


def test_runs_from_before_there_were_digests_are_read_and_say_so(store):
    folder = store.root / complete(store)
    expected, weights = store.rounds(), store.weights(RUN)
    assert store.check(RUN) == "sound"
    aged(folder)
    assert store.check(RUN) == "no digest (older)"
    pd.testing.assert_frame_equal(store.rounds(), expected)
    assert store.weights(RUN).keys() == weights.keys()
    assert store.unusable(RUN, {"method": 1}) == ""
    with store.claim(RUN) as writer:
        assert writer.complete
    shutil.copy(folder / "rounds.parquet", folder / "epochs.parquet")
    assert "epochs.parquet is damaged (column 'epoch'" in damaged(store, store.epochs)


def test_an_id_that_two_settings_share_hands_out_neither(store, monkeypatch):
    complete(store)
    other = Run(seed=3, train=Train(lr=0.5), prune=RUN.prune)
    shared, own = RUN.id, Run.id.fget
    monkeypatch.setattr(Run, "id", property(lambda run: shared if run == other else own(run)))
    for call in (store.rounds, store.weights, store.settings, store.unusable, lambda run: store.claim(run).__enter__()):
        with pytest.raises(StoreError, match=r"is stored with other settings \({'train': 'default'}\)"):
            call(other)
    assert len(store.rounds(RUN)) == 2


def test_what_another_version_made_is_named_and_made_again(store, caplog):
    now = {"method": 2, "model": 1, "data": 1}
    with store.claim(RUN, versions={"method": 1, "model": 1, "data": 1}) as writer:
        writer.save(checkpoint())
    assert store.rounds(unfinished=True)["version.method"].tolist() == [1]
    assert store.unusable(RUN, now) == f"{RUN.id} was made by another version (method of version 1, now 2)"
    with store.claim(RUN, versions=now) as writer:
        assert writer.checkpoint is None
        writer.save(checkpoint(2))
        writer.finish(WEIGHTS, MASKS)
    assert len(caplog.messages) == 1
    assert (store.unusable(RUN, now), store.rounds()["version.method"].tolist()) == ("", [2, 2])
    fail(store, Run(seed=8))
    assert "method of version 1" in store.unusable(Run(seed=8), now)


def test_who_holds_a_run_is_said_after_a_while_and_that_it_is_stopped(store, monkeypatch, caplog):
    process = python("with store.claim(RUN) as w:\n    print('ok', flush=True)\n    time.sleep(60)", store.root)
    assert process.stdout.readline() == "ok\n"
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("prunelab.runs.locks.PATIENCE", 0.3)
    threading.Timer(1.0, lambda: os.kill(process.pid, signal.SIGKILL)).start()
    with store.claim(RUN) as writer:
        assert writer.checkpoint is None
    process.communicate()
    if Path("/proc/locks").exists():
        (said,) = caplog.messages
        assert f"which process {process.pid}, which is stopped (kill -CONT {process.pid} lets it go on" in said


def test_a_store_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PRUNELAB_RUNS", str(tmp_path / "file" / "runs"))
    store = Store()
    assert (store.ids(), store.status(RUN)) == ([], "missing")
    with pytest.raises(StoreError, match=r"cannot be written .*: set PRUNELAB_RUNS") as caught, store.claim(RUN):
        pass
    assert str(tmp_path / "file" / "runs") in str(caught.value)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_without_permission_is_read_but_not_written(store):
    complete(store)
    store.root.chmod(0o555)
    try:
        assert len(Store(store.root).rounds()) == 2
        with pytest.raises(StoreError, match="Permission denied"):
            store.discard(RUN)
        with pytest.raises(StoreError, match="Permission denied"), store.claim(Run(seed=99)):
            pass
    finally:
        store.root.chmod(0o755)


# ---- leaves ----


def test_importing_the_store_loads_no_torch():
    code = "import sys, prunelab.runs, prunelab.runs.archive, prunelab.runs.provenance; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_provenance_says_what_the_numbers_were_made_with_and_not_where(tmp_path):
    import platform

    import torch

    found = provenance.collect("cpu", 2)
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__ == found["versions"]["torch"]
    )
    assert found["python"] == platform.python_version()
    assert set(provenance.row("cpu", 2)) <= set(frames.ROUNDS)
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert pd.Timestamp(found["created"]).tzinfo is not None


def test_the_commit_is_that_of_the_checkout_alone(tmp_path, monkeypatch):
    def git(*arguments):
        own = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *own, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    package = tmp_path / "prunelab"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    monkeypatch.setattr(provenance.paths, "PACKAGE", package)
    ask = provenance.git_commit.__wrapped__
    assert ask() == "unknown"
    git("init", "-q")
    assert ask() == "unknown"
    git("add", ".")
    git("commit", "-q", "-m", "x")
    head = git("rev-parse", "HEAD").strip()
    assert len(ask()) == 12
    assert head.startswith(ask())
    (package / "a.py").write_text("2\n")
    assert ask().endswith("+")
    installed = tmp_path / "venv" / "prunelab"  # a package inside a repository of the user's
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance.paths, "PACKAGE", installed)
    assert ask() == "unknown"
