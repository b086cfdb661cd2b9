"""How far a study is, across processes: a file that grows by one byte for every epoch of every run.

Workers append, whoever watches looks at the size; nothing has to be locked, and a worker that is killed breaks
nothing. The command line names the file in ``PRUNELAB_PROGRESS``, so that it can show what happens inside a notebook.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from prunelab.runs.scratch import scratch

VARIABLE = "PRUNELAB_PROGRESS"
EVERY = 0.4  # seconds between two looks


def tick(path: Path | str | None, count: int = 1) -> None:
    """Add so many epochs to the file; None: nobody watches."""
    if path is not None and count > 0:
        with Path(path).open("ab") as file:
            file.write(b"." * count)


def look(path: Path) -> tuple[int, int]:
    """Epochs done and epochs in all; (0, 0) before the study has begun."""
    try:
        return path.stat().st_size, int(_total(path).read_text())
    except (OSError, ValueError):
        return 0, 0


def _total(path: Path) -> Path:
    return path.with_name(f"{path.name}.total")


@contextlib.contextmanager
def shown(total: int, visible: bool = True) -> Iterator[Path]:
    """A bar over ``total`` epochs, fed by ``tick``; where a file is named for the purpose, it goes on in that.

    Args:
        total: epochs of all runs, at most.
        visible: whether a bar is drawn.

    Yields:
        The file for ``tick``.
    """
    given = os.environ.get(VARIABLE)
    with scratch() as folder:
        path = Path(given) if given else folder / "progress"
        path.touch()
        before, expected = look(path)  # of the studies before this one in the same notebook
        tick(path, expected - before)
        end = expected + total
        _total(path).write_text(str(end))
        bar = tqdm(total=total, desc="training", unit="epoch", disable=not visible)
        with bar, _watched(path, bar, expected):
            yield path
        tick(path, end - look(path)[0])  # of runs that ended early


@contextlib.contextmanager
def _watched(path: Path, bar: tqdm, start: int) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            bar.update(look(path)[0] - start - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.update(look(path)[0] - start - bar.n)
