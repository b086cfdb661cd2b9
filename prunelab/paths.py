"""Where files lie; no other module builds these paths.

Each place can be moved with an environment variable, so that tests, clusters and read-only checkouts need no other
switch.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The repository, when prunelab runs from a checkout; otherwise the current directory."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "notebooks").is_dir() and (checkout / "pyproject.toml").is_file() else Path.cwd()


def _place(variable: str, default: Path) -> Path:
    value = os.environ.get(variable)
    return Path(value).expanduser().resolve() if value else default


def runs() -> Path:
    """The run store: ``PRUNELAB_RUNS``, or ``runs/`` in the repository."""
    return _place("PRUNELAB_RUNS", root() / "runs")


def figures() -> Path:
    """The committed pictures and their numbers, which are read: ``PRUNELAB_FIGURES``, or ``figures/`` here."""
    return _place("PRUNELAB_FIGURES", root() / "figures")


def out() -> Path:
    """Where notebooks leave pictures and numbers: ``PRUNELAB_OUT``, else ``PRUNELAB_FIGURES``, else ``out/`` here."""
    return _place("PRUNELAB_OUT", _place("PRUNELAB_FIGURES", root() / "out"))


def notebooks() -> Path:
    """The notebooks of the repository."""
    return root() / "notebooks"


def data_root() -> Path | None:
    """A folder in torchvision's layout with data sets that are already there: ``PRUNELAB_DATA``; None where unset."""
    value = os.environ.get("PRUNELAB_DATA")
    return Path(value).expanduser().resolve() if value else None


def cache() -> Path:
    """Prepared data sets: ``PRUNELAB_CACHE``, or ``prunelab`` in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return _place("PRUNELAB_CACHE", base / "prunelab")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which is moved over ``path`` in one step when the block ends without an error.

    At any moment, and after any failure, there is the old file or the new one. Of several in one ``ExitStack`` all are
    written before the first is moved. What the system says of a failure is left to the caller.

    Args:
        path: of the file; its folder exists.

    Yields:
        A path in the same folder, with the same ending.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.part{path.suffix}")
    try:
        yield part
        with part.open("r+b") as file:  # a rename must not get to the disk before the bytes do
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
