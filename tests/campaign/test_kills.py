"""Kills at random points, full disks, stores that cannot be written, wrong clocks: what was finished is still there.

A trial survives where everything that is left can be read and is sound, the work then goes on to its end, nothing that
was finished was done again, and nothing but one line was said.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import campaign_work as work
import numpy as np
import psutil
import pytest

from prunelab import paths
from prunelab.plots import gallery
from prunelab.runs import Store, archive
from prunelab.settings import Run

pytestmark = pytest.mark.slow
VOLATILE = ["seconds", "seconds_spent", "prune_seconds", "finished"]


class Workers:
    """Children that do what ``campaign_work`` knows."""

    def __init__(self, folder):
        self.folder = folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        here = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(paths.PACKAGE.parent)}
        environment = {**os.environ, **here}
        self._process = subprocess.Popen([sys.executable, work.__file__], env=environment, **pipes)
        assert self._process.stdout.readline() == "ready\n"

    def _ask(self, **order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, do, limits=None, **arguments):
        handle, log = tempfile.mkstemp(dir=self.folder)
        os.close(handle)
        Path(log).chmod(0o666)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        return self._ask(do=do, log=log, **{"with": arguments}, **(limits or {})), Path(log)

    def end(self, child, kill=None):
        """How it ended, 0 done, 3 refused in one line, 4 a traceback, or minus a signal; and what it said."""
        if kill is not None:
            time.sleep(kill)
            os.kill(child[0], signal.SIGKILL)
        return self._ask(wait=child[0]), child[1].read_text()

    def run(self, do, limits=None, **arguments):
        return self.end(self.start(do, limits, **arguments))

    def seconds(self, do, **arguments):
        begin = time.monotonic()
        code, said = self.run(do, **arguments)
        assert code == 0, said
        return time.monotonic() - begin

    def close(self):
        self._process.communicate()


@pytest.fixture(scope="module")
def workers():
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))  # not below pytest's, which only its owner may enter
    folder.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELAB_CACHE", str(folder / "cache"))
        found = Workers(folder)
        yield found
        found.close()
    shutil.rmtree(folder, ignore_errors=True)


def unsound(root):
    """What of a store is not as it was written."""
    return [found.problem for found in archive.check(Store(root)) if found.state != "sound"]


def finished(root):
    """(id, round) -> its row, of all rounds that are in a store."""
    rows = Store(root).rounds(unfinished=True)
    return {(row["id"], row["round"]): row for row in rows.to_dict("records")}


def kept(before, after, *columns):
    """Whether rounds that were finished are there as they were."""
    return all(key in after and all(after[key][c] == row[c] for c in columns) for key, row in before.items())


def test_a_sweep_in_one_process(workers, tmp_path, tally):
    count, draw = tally("kill: a sweep in one process"), random.Random(1)
    ids = [run.id for run in work.studied(3)]
    whole = tmp_path / "whole"
    takes = workers.seconds("sweep", root=whole, count=3)
    expected, until, trial = Store(whole).rounds(ids), time.monotonic() + 150, 0
    while trial < 60 and time.monotonic() < until:
        root, kills = tmp_path / f"killed{trial}", draw.choice([1, 2, 3])
        ends, problems, before = [], [], {}
        for _ in range(kills):
            ends.append(workers.end(workers.start("sweep", root=root, count=3), kill=draw.uniform(0, takes)))
            problems += unsound(root)
            again = finished(root)
            problems += [key for key, row in before.items() if again.get(key, {}).get("seconds") != row["seconds"]]
            before = again
        code, said = workers.run("sweep", root=root, count=3)
        after = Store(root).rounds(ids)
        count.judge(
            (ends, said, problems),
            kills,
            quiet=all(code in (0, -signal.SIGKILL) and "Traceback" not in said for code, said in ends),
            sound=not problems and not unsound(root),
            ended=code == 0 and after[["id", "round"]].equals(expected[["id", "round"]]),
            kept=kept(before, finished(root), "seconds", "test_loss"),
            pruned_alike=after["weights"].equals(expected["weights"]),
            # a population that goes on in other company adds up in another order
            learnt_alike=np.allclose(after["test_loss"], expected["test_loss"], rtol=0.05),
        )
        trial += 1
        shutil.rmtree(root)


def test_two_processes_at_one_sweep(workers, tmp_path, tally):
    count, draw = tally("kill: one of two processes at one sweep"), random.Random(2)
    takes = workers.seconds("sweep", root=tmp_path / "whole", count=4)
    for trial in range(15):
        root = tmp_path / f"killed{trial}"
        pair = [workers.start("sweep", root=root, count=4) for _ in range(2)]
        workers.end(pair[trial % 2], kill=draw.uniform(0, takes))
        code, said = workers.end(pair[1 - trial % 2])
        states = {Store(root).status(run) for run in work.studied(4)}
        count.judge(
            said, ended=code == 0 and states == {"complete"}, sound=not unsound(root), whole=len(finished(root)) == 12
        )


@pytest.mark.parametrize("who", ["worker", "parent"])
def test_processes_of_a_pool(workers, tmp_path, tally, who):
    count, draw = tally(f"kill: the {who} of a pool"), random.Random(who)
    for trial in range(3):
        root = tmp_path / f"killed{trial}"
        child = workers.start("sweep", root=root, count=4, jobs=2, epochs=40)
        parent, until = psutil.Process(child[0]), time.monotonic() + 60
        while len(list(root.glob(".locks/*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        pool = [one for one in parent.children(recursive=True) if "popen_loky" in " ".join(one.cmdline())]
        time.sleep(draw.uniform(0, 1))
        (pool[trial % len(pool)] if who == "worker" else parent).kill()
        code, _ = workers.end(child)
        alive = psutil.wait_procs(pool, timeout=30)[1]
        for one in alive:
            one.kill()
        before, stopped, sound = finished(root), code != 0, not unsound(root)
        code, said = workers.run("sweep", root=root, count=4, epochs=40)
        count.judge(
            said,
            pool_ended=not alive,
            stopped=stopped,
            sound=sound and not unsound(root),
            ended=code == 0 and len(finished(root)) == 12,
            kept=kept(before, finished(root), "seconds"),
        )


@pytest.fixture
def filled(workers, tmp_path):
    """A store with twelve complete runs, and its archive."""
    root = tmp_path / "filled"
    code, said = workers.run("fake", root=root, count=12, seed=0)
    assert code == 0, said
    archive.export(Store(root), tmp_path / "runs.tar")
    return root


def killed_often(workers, trials, takes, seed, start):
    draw = random.Random(seed)
    for trial in range(trials):
        child = start(trial)
        code, said = workers.end(child, kill=draw.uniform(0, takes))
        yield trial, code in (0, -signal.SIGKILL) and "Traceback" not in said


def test_an_export(workers, tmp_path, tally, filled):
    count, path = tally("kill: an export"), tmp_path / "out.tar"
    shutil.copy(tmp_path / "runs.tar", path)
    takes = workers.seconds("export", root=filled, path=tmp_path / "try.tar")
    for _, fine in killed_often(workers, 40, takes, 3, lambda _: workers.start("export", root=filled, path=path)):
        fine &= path.read_bytes() == (tmp_path / "runs.tar").read_bytes() and not unsound(filled)
        count.add("survived" if fine else "lost")
        assert fine


def test_an_import(workers, tmp_path, tally, filled):
    count, ids = tally("kill: an import"), Store(filled).ids()
    takes = workers.seconds("bring", root=tmp_path / "try", path=tmp_path / "runs.tar")
    roots = [tmp_path / f"other{trial}" for trial in range(40)]

    def start(trial):
        return workers.start("bring", root=roots[trial], path=tmp_path / "runs.tar")

    for trial, fine in killed_often(workers, 40, takes, 4, start):
        store = Store(roots[trial])
        fine &= not unsound(store.root)
        archive.import_(store, tmp_path / "runs.tar")
        archive.gc(store, days=0, dry_run=False)
        fine &= store.ids() == ids and not unsound(store.root)
        fine &= sorted(p.name for p in store.root.iterdir() if p.name != ".locks") == sorted(ids)
        count.add("survived" if fine else "lost")
        assert fine


def test_a_clearing(workers, tmp_path, tally, filled):
    count, ids = tally("kill: gc"), Store(filled).ids()

    def litter(trial):
        for seed in range(100, 110):
            store = Store(filled)
            with store.claim(Run(seed=seed + trial)) as writer:
                if not writer.failed:
                    writer.fail("nan")
        return workers.start("clear", root=filled)

    workers.end(litter(0))
    takes = workers.seconds("clear", root=filled)
    for _, fine in killed_often(workers, 40, takes, 5, litter):
        fine &= not unsound(filled) and set(ids) <= set(Store(filled).ids())
        count.add("survived" if fine else "lost")
        assert fine
    archive.gc(Store(filled), days=0, failed=True, dry_run=False)
    assert Store(filled).ids(unfinished=True) == ids


def test_the_writing_of_a_figure(workers, tmp_path, tally, monkeypatch):
    monkeypatch.setenv("PRUNELAB_FIGURES", str(tmp_path))
    count = tally("kill: the writing of a figure")
    takes = workers.seconds("figure", folder=tmp_path, number=0)
    mixed = 0
    for trial, fine in killed_often(
        workers, 60, takes, 6, lambda trial: workers.start("figure", folder=tmp_path, number=trial + 1)
    ):
        number, damage = gallery.saved("toy/line")["n"], gallery.damage("toy/line")
        base = tmp_path / "toy" / "line"
        numbers = {
            number,
            float(base.with_suffix(".csv").read_text().split()[1]),
            base.with_suffix(".png").read_bytes()[0],
        }
        mixed += bool(damage)
        count.judge((damage, numbers), quiet=fine, whole_or_named=bool(damage) or len(numbers) == 1)
        if damage:
            workers.run("figure", folder=tmp_path, number=trial + 1)
    assert mixed < 20


def test_eight_processes_on_one_store(workers, tmp_path, tally):
    count, draw = tally("eight processes on one store, two of them killed"), random.Random(7)
    for trial in range(4):
        root = tmp_path / f"shared{trial}"
        children = [workers.start("fake", root=root, count=30, seed=seed, size=2_000) for seed in range(8)]
        for child in children[:2]:
            workers.end(child, kill=draw.uniform(0, 1))
        ends = [workers.end(child) for child in children[2:]]
        store = Store(root)
        fine = all(code == 0 for code, _ in ends) and not unsound(root) and len(store.ids()) == 30
        rows = store.rounds()
        fine &= np.allclose(rows["test_accuracy"], rows["seed"] + rows["round"] / 10) and len(rows) == 90
        fine &= all((store.weights(Run(seed=seed))["w"] == seed).all() for seed in range(30))
        count.add("survived" if fine else "lost", 8)
        assert fine, ends


@pytest.mark.parametrize("do", ["fake", "sweep", "export", "bring", "figure"])
def test_a_full_disk(workers, tmp_path, tally, monkeypatch, filled, do):
    monkeypatch.setenv("PRUNELAB_FIGURES", str(tmp_path / "figures"))
    count, draw = tally("a full disk"), random.Random(do)
    refused = 0
    for trial in range(15):
        root = tmp_path / f"full{trial}"
        arguments = {
            "fake": {"root": root, "count": 2, "seed": 0},
            "sweep": {"root": root, "count": 2},
            "export": {"root": filled, "path": tmp_path / "full.tar"},
            "bring": {"root": root, "path": tmp_path / "runs.tar"},
            "figure": {"folder": tmp_path / "figures", "number": trial},
        }[do]
        room = int(10 ** draw.uniform(3.3, 5))  # what it says goes into a file too
        code, said = workers.run(do, {"bytes": room}, **arguments)
        refused += code == 3
        quiet, sound = code in (0, 3) and "Traceback" not in said, not unsound(root) and not unsound(filled)
        again, told = workers.run(do, **arguments)
        whole = not unsound(root) and (do != "figure" or not gallery.damage("toy/line"))
        count.judge((said, told), quiet=quiet, sound=sound, ended=again == 0 and whole)
    assert refused


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become nobody")
def test_a_store_that_cannot_be_written(workers, tally, filled):
    count, nobody = tally("a store that cannot be written"), {"nobody": True}
    root = workers.folder / "readonly"
    shutil.copytree(filled, root)
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (workers.folder / "open").mkdir(mode=0o777)
    (workers.folder / "open").chmod(0o777)
    shutil.copy(filled.parent / "runs.tar", workers.folder / "runs.tar")
    (workers.folder / "runs.tar").chmod(0o444)
    for do, arguments, expected in (
        ("fake", {"root": root, "count": 12, "seed": 0}, 0),  # all is there: only read
        ("fake", {"root": root, "count": 13, "seed": 0}, 3),
        ("sweep", {"root": root, "count": 1}, 3),
        ("export", {"root": root, "path": workers.folder / "open" / "out.tar"}, 0),
        ("export", {"root": root, "path": root / "out.tar"}, 3),
        ("bring", {"root": root, "path": workers.folder / "runs.tar"}, 3),
        ("figure", {"folder": root, "number": 1}, 3),
    ):
        code, said = workers.run(do, nobody, **arguments)
        fine = code == expected and not unsound(root)
        count.add("survived" if fine else "lost")
        assert fine, (do, said)


@pytest.mark.parametrize("days", [-30, -1, 1, 30])
def test_a_clock_that_was_set(tmp_path, tally, monkeypatch, filled, days):
    """Everything was written when the clock was wrong by so many days."""
    count, store = tally("a clock set back or forward"), Store(filled)
    with store.claim(Run(seed=50)) as writer:
        work_left = tmp_path / "left.tar"
        archive.export(store, work_left)
        writer.save(work.Checkpoint({}, {}, [{"round": 0}], []))
        when = time.time() + days * 86400
        for path in (filled, *filled.rglob("*")):
            os.utime(path, (when, when))
        real = archive._unpack

        def while_importing(path, staging):
            ids = real(path, staging)
            for entry in (staging, *staging.rglob("*")):
                os.utime(entry, (when, when))
            archive.gc(Store(filled / "into"), days=0, dry_run=False)
            return ids

        monkeypatch.setattr(archive, "_unpack", while_importing)
        fine = len(archive.import_(Store(filled / "into"), work_left).new) == 12
        archive.gc(store, days=0, failed=True, dry_run=False)
        fine &= len(store.ids()) == 12 and store.status(Run(seed=50)) == "running" and writer.checkpoint is not None
        fine &= not unsound(filled)
    gone = [garbage.what for garbage in archive.gc(store, days=7)]
    fine &= ("interrupted run" in gone) == (days == -30)
    count.add("survived" if fine else "lost")
    assert fine
