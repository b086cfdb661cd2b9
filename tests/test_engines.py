"""A study on a cluster gives the numbers that it gives on this machine, whoever dies on the way."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest

from prunelab import Data, Model, Prune, Run, Train, run_all
from prunelab.errors import PrunelabError
from prunelab.runs import Store
from prunelab.training import engines

TIMES = ["seconds", "prune_seconds", "seconds_spent", "lockstep", "alike"]


def study(runs=24, epochs=3, rounds=2):
    """Small networks of two methods on Digits."""
    methods = [Prune("magnitude", amount=0.5, rounds=rounds), Prune("dropnet", amount=0.3, rounds=rounds)]
    train = Train(epochs=epochs, batch_size=64, lr=0.1)
    return [Run(Data("digits"), Model("mlp", (12, 10)), train, methods[i % 2], seed=i // 2) for i in range(runs)]


def same(one, two):
    """Whether two stores hold the same numbers of the same runs, bit for bit."""
    assert one.ids() == two.ids() != []
    for frame in ("rounds", "epochs"):
        tables = [getattr(store, frame)(one.ids()) for store in (one, two)]
        tables = [table.drop(columns=[c for c in TIMES if c in table]) for table in tables]
        tables = [t[[c for c in t if c not in ("git_commit", "finished")]] for t in tables]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    for run_id in one.ids():
        for what in ("weights", "masks", "removals"):
            mine, theirs = getattr(one, what)(run_id), getattr(two, what)(run_id)
            assert mine.keys() == theirs.keys()
            assert [n for n in mine if np.asarray(mine[n]).tobytes() != np.asarray(theirs[n]).tobytes()] == [], what


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("spark", "engine = 'spark'"),
        ("dask://", "dask://HOST:PORT"),
        ("dask://host", "dask://HOST:PORT"),
        ("local://host:1", "HOST:PORT"),
    ],
)
def test_a_word_that_is_no_engine_is_one_line(word, why):
    with pytest.raises(PrunelabError, match=why) as caught:
        run_all(study(1), engine=word)
    assert "\n" not in str(caught.value)


def test_what_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(PrunelabError, match=r"pip install 'prunelab\[dask\]'"):
        run_all(study(1), engine="dask")


def free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Cluster:
    """A Dask scheduler and workers on loopback, each with folders of its own."""

    def __init__(self, folder, workers=3):
        self.folder, self.port, self.workers = folder, free_port(), []
        self.start_scheduler()
        for i in range(workers):
            self.add_worker(f"worker{i}")

    @property
    def engine(self):
        return f"dask://127.0.0.1:{self.port}"

    def start(self, name, *command):
        own = self.folder / name
        own.mkdir(exist_ok=True)
        env = {**os.environ, "PRUNELAB_RUNS": str(own / "runs"), "PRUNELAB_CACHE": str(own / "cache")}
        env |= {"OMP_NUM_THREADS": "1", "PRUNELAB_DATA": "", "TMPDIR": str(own)}
        with (own / "log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "dask", *command], cwd=own, env=env, stdout=log, stderr=log)

    def start_scheduler(self):
        place = ("--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        self.scheduler = self.start("scheduler", "scheduler", *place)

    def add_worker(self, name):
        how = ("--nthreads", "1", "--no-dashboard", "--no-nanny", "--death-timeout", "60")
        self.workers.append(self.start(name, "worker", f"tcp://127.0.0.1:{self.port}", *how))

    def close(self):
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path):
    pytest.importorskip("distributed")
    one = Cluster(tmp_path)
    yield one
    one.close()


@pytest.fixture(scope="module")
def at_home(tmp_path_factory):
    """The study on this machine."""
    store = Store(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        run_all(study(), store=store, jobs=1, progress=False)
    return store


@pytest.mark.cluster
def test_workers_with_folders_of_their_own_give_the_numbers_of_this_machine(cluster, at_home, tmp_path):
    store = Store(tmp_path / "runs")
    found = run_all(study(), store=store, engine=cluster.engine, progress=False)
    assert (found.trained, found.failed) == (24, {})
    same(store, at_home)
    for i in range(3):  # nothing is left on the workers
        assert not (tmp_path / f"worker{i}" / "runs").exists()
        assert not list((tmp_path / f"worker{i}").glob("prunelab-*"))


def when(condition, act, seconds=300):
    """Do something as soon as a condition holds; gives a function that waits for it and says whether it was done."""
    done = threading.Event()

    def watch():
        end = time.monotonic() + seconds
        while time.monotonic() < end and not condition():
            time.sleep(0.05)
        if time.monotonic() < end:
            act()
            done.set()

    thread = threading.Thread(target=watch)
    thread.start()
    return lambda: (thread.join(), done.is_set())[1]


@pytest.mark.cluster
def test_a_worker_that_is_killed_loses_nothing(cluster, at_home, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "TURN", 0.5)
    store = Store(tmp_path / "runs")
    killed = when(lambda: len(store.ids()) >= 2, cluster.workers[0].kill)
    found = run_all(study(), store=store, engine=cluster.engine, progress=False)
    assert killed()
    assert (found.trained, found.failed) == (24, {})
    same(store, at_home)


@pytest.mark.cluster
def test_a_scheduler_that_is_started_again_loses_nothing(cluster, at_home, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "TURN", 0.5)
    store = Store(tmp_path / "runs")

    def again():
        cluster.scheduler.kill()
        cluster.scheduler.wait()
        for worker in cluster.workers:
            worker.kill()
            worker.wait()
        cluster.start_scheduler()
        for i in range(3):
            cluster.add_worker(f"new{i}")

    killed = when(lambda: len(store.ids()) >= 2, again)
    found = run_all(study(), store=store, engine=cluster.engine, progress=False)
    assert killed()
    assert (found.trained, found.failed) == (24, {})
    same(store, at_home)


HEAD = """\
import sys
sys.path.insert(0, sys.argv[3])
from test_engines import study
from prunelab import run_all
from prunelab.runs import Store
from prunelab.training import engines
engines.TURN = 0.5
run_all(study(), store=Store(sys.argv[1]), engine=sys.argv[2], progress=False)
"""


@pytest.mark.cluster
def test_a_head_that_is_killed_goes_on_with_what_came_home(cluster, at_home, tmp_path):
    from pathlib import Path

    store = Store(tmp_path / "runs")
    command = [sys.executable, "-c", HEAD, str(store.root), cluster.engine, str(Path(__file__).parent)]
    head = subprocess.Popen(command)
    killed = when(lambda: len(store.ids()) >= 2, lambda: head.send_signal(signal.SIGKILL))
    head.wait()
    assert killed()
    there = len(store.ids())
    assert 2 <= there < 24
    found = run_all(study(), store=store, engine=cluster.engine, progress=False)
    assert found.loaded == there
    same(store, at_home)


@pytest.mark.cluster
def test_a_worker_of_another_version_is_refused_in_one_line(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "software", lambda: {"prunelab": "9.9", "torch": "1.0"})
    with pytest.raises(PrunelabError, match=r"has prunelab .*, this machine 9\.9: install the same there") as caught:
        run_all(study(2), store=Store(tmp_path / "runs"), engine=cluster.engine, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_ray_gives_the_numbers_of_this_machine(at_home, tmp_path):
    pytest.importorskip("ray")
    store = Store(tmp_path / "runs")
    found = run_all(study(), store=store, engine="ray", progress=False)
    assert (found.trained, found.failed) == (24, {})
    same(store, at_home)
