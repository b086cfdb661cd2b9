"""Progress across processes: a file that only grows, a bar fed by it, and nothing in the way where nobody looks."""

import subprocess
import sys
import threading

import pytest

from prunelab.runs import progress
from prunelab.runs.progress import look, shown, tick


@pytest.fixture(autouse=True)
def nobody_watches(monkeypatch):
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    monkeypatch.setattr(progress, "EVERY", 0.01)


def test_before_a_study_there_is_nothing_to_see(tmp_path):
    assert look(tmp_path / "progress") == (0, 0)
    (tmp_path / "progress").write_bytes(b"...")
    assert look(tmp_path / "progress") == (0, 0)
    (tmp_path / "progress.total").write_text("")  # caught while it is being written
    assert look(tmp_path / "progress") == (0, 0)


def test_ticks_add_up_and_no_tick_is_no_write(tmp_path):
    path = tmp_path / "progress"
    for count in (1, 3, 0, -2):
        tick(path, count)
    assert path.stat().st_size == 4
    tick(tmp_path / "other", 0)
    tick(None, 5)
    assert list(tmp_path.iterdir()) == [path]


def test_the_study_counts_what_its_workers_did():
    with shown(10, visible=False) as path:
        assert look(path) == (0, 10)
        tick(path, 4)
        assert look(path) == (4, 10)
    assert look(path) == (0, 0)
    assert not path.parent.exists()


def test_threads_and_processes_lose_no_tick():
    program = "import sys\nfrom prunelab.runs.progress import tick\nfor _ in range(200): tick(sys.argv[1])"
    with shown(1000, visible=False) as path:
        workers = [subprocess.Popen([sys.executable, "-c", program, str(path)]) for _ in range(2)]
        threads = [threading.Thread(target=lambda: [tick(path) for _ in range(200)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [worker.wait(60) for worker in workers] == [0, 0]
        assert look(path) == (1000, 1000)


@pytest.mark.parametrize("visible", [True, False])
def test_the_bar_ends_where_the_ticks_end(capsys, visible):
    with shown(8, visible=visible) as path:
        tick(path, 6)  # and at once to the end, before the watcher looks again
    err = capsys.readouterr().err
    assert ("6/8" in err) is visible
    assert ("training" in err) is visible


def test_the_bar_goes_on_while_the_study_runs(monkeypatch):
    seen, moved = [], threading.Event()

    class Bar:
        n = 0

        def __init__(self, **options):
            seen.append(options["total"])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.n += count
            if count:
                seen.append(self.n)
                moved.set()

    monkeypatch.setattr(progress, "tqdm", Bar)
    with shown(8) as path:
        tick(path, 3)
        assert moved.wait(20)
        tick(path, 2)
    assert seen == [8, 3, 5]


def test_a_study_that_fails_ends_its_watcher_and_its_folder():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), shown(5, visible=False) as path:
        raise ZeroDivisionError
    assert threading.active_count() == before
    assert not path.parent.exists()


def test_whoever_named_a_file_can_watch_from_outside(monkeypatch, tmp_path):
    path = tmp_path / "progress"
    monkeypatch.setenv(progress.VARIABLE, str(path))
    with shown(10, visible=False) as given:
        assert given == path
        tick(given, 10)
    assert look(path) == (10, 10)
    with shown(4, visible=False) as given:  # the next study of the same notebook adds to it
        assert look(path) == (10, 14)
        tick(given, 1)  # and ends early
    assert look(path) == (14, 14)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["progress", "progress.total"]


def test_every_epoch_that_is_trained_ticks_once_and_loaded_runs_are_not_in_the_total(monkeypatch, tmp_path):
    from prunelab import Data, Model, Prune, Run, Train, run_all

    path = tmp_path / "progress"
    monkeypatch.setenv(progress.VARIABLE, str(path))
    data, train = Data("iris"), Train(epochs=2)
    runs = [Run(data, Model("mlp", (4,)), train, Prune("magnitude", amount=0.5, rounds=1), seed=s) for s in range(2)]
    run_all(runs[:1], jobs=1, progress=False)
    assert look(path) == (4, 4)
    run_all(runs, jobs=1, progress=False)
    assert look(path) == (8, 8)
