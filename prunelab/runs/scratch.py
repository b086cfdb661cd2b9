"""Temporary folders that a killed process leaves to the next one, and workers that end with whoever started them.

In each folder lies a file that its process holds a lock on. The system releases the lock when the process ends,
however it ends, so that a lock that can be had says: nobody is there any more.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock

PREFIX, HELD = "prunelab-", "held"
EVERY = 0.5  # seconds between two looks at whether the parent lives


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for as long as the block runs; those of processes that were killed go first."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{HELD}"):
        if _free(left):
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = filelock.FileLock(folder / HELD, thread_local=False)
    lock.acquire()
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _free(held: Path) -> bool:
    """Whether the process that held the file has ended."""
    lock = filelock.FileLock(held, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (filelock.Timeout, OSError):  # it lives, or belongs to another user
        return False
    lock.release()
    return True


@contextlib.contextmanager
def ends_with(folder: Path) -> Iterator[None]:
    """End this process as soon as the one whose ``scratch`` folder it is has ended, and at once if it has already.

    Nothing is cleaned up, as after a kill: what trains here would be wanted by nobody.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            if not over.is_set() and _gone(folder):
                os._exit(1)

    if _gone(folder):
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _gone(folder: Path) -> bool:
    return not (folder / HELD).exists() or _free(folder / HELD)
