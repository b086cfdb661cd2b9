"""The cache of prepared data sets: each decoded once into ``PRUNELAB_CACHE/data/NAME.safetensors``, memory-mapped then.

A prepared file holds the tensors and, as metadata, the source, the classes, the digests of the source files and its own
(``prunelab.digest``), which are compared once in every process that reads it. It wins over the data root, even where
that has changed since; ``prepare`` overwrites it on purpose. What another version of the reader made is prepared again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prunelab import digest, paths
from prunelab.data.files import DataError
from prunelab.data.readers import Raw
from prunelab.data.sources import SOURCES, Source, folder_source
from prunelab.errors import first_line, nearest

log = logging.getLogger(__name__)

FORMAT = "2"  # of the prepared files; one of another format is prepared again


def prepare(name: str, from_: str | Path | None = None) -> Path:
    """Decode a data set into the cache, in place of what is there.

    Args:
        name: A known data set; or with ``from_`` any new name for a ``{train,test}/<class>/image`` folder, zip or tar.
        from_: The folder or archive; None: the data root, else a download.

    Returns:
        The prepared file. It is moved into place when it is complete: on any error the cache stays as it was.

    Raises:
        DataError: one line that names the file and the remedy.
    """
    return fill(name, None if from_ is None else Path(from_).expanduser(), overwrite=True)


def available() -> list[dict[str, Any]]:
    """One row per known or prepared data set.

    Returns:
        Rows of ``name``, ``prepared``, ``source`` (what to write beside numbers, or what is wrong with the prepared
        file), ``images`` (of all parts; None where unknown), ``origin`` (where ``prepare`` would get it now) and
        ``bytes`` (of the prepared file, else 0).
    """
    rows = []
    for name in sorted({*SOURCES, *_prepared_names()}):
        path = cached(name)
        source, images, size = SOURCES[name].title if name in SOURCES else name, None, 0
        if path.exists():
            size = path.stat().st_size
            try:
                raw, _ = read(path, whole=False)
                source, images = raw.source, sum(len(y) for key, y in raw.tensors.items() if key.endswith("_y"))
            except DataError as error:
                source = str(error)
        row = {"name": name, "prepared": size > 0, "source": source, "images": images}
        rows.append({**row, "origin": _origin(name), "bytes": size})
    return rows


def verify(name: str | None = None) -> list[dict[str, Any]]:
    """Read prepared data sets whole and compare their digests.

    Args:
        name: One data set; None: all that are prepared.

    Returns:
        Rows of ``name``, ``ok`` and ``problem`` ("" or one line).

    Raises:
        DataError: the name is not known.
    """
    rows = []
    for each in _prepared_names() if name is None else [name]:
        path, problem = cached(each), ""
        _source(each)
        try:
            if not path.exists():
                raise DataError(f"{each} is not prepared: run `prunelab data prepare {each}`")
            _sound(path)
            read(path, whole=False)
        except DataError as error:
            problem = str(error)
        rows.append({"name": each, "ok": not problem, "problem": problem})
    return rows


def fill(name: str, place: Path | None = None, *, overwrite: bool = False) -> Path:
    """Prepare a data set unless it is; of two processes that ask at once, one works and the other waits.

    Raises:
        DataError: as for ``prepare``.
    """
    path = cached(name)
    if not overwrite and os.path.exists(path) and not _outdated(path):  # noqa: PTH110 - Path's raises without permission
        return path
    source = _source(name, new=place is not None)
    if place is not None and not source.layout:
        raise DataError(f"{name} {source.origin}: leave --from out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if overwrite or not path.exists() or _outdated(path):  # another process may have prepared it meanwhile
                with _work_folder(path.parent / f".{name}.part") as work:
                    place = _place(name, source, place, work)
                    raw = source.read(place)
                    source.check(raw, str(place))
                    _write(raw, name, source.version, path)
    except OSError as error:
        what = error.strerror or first_line(error)
        raise DataError(f"{path}: cannot be written ({what}): set PRUNELAB_CACHE to a folder that can") from None
    return path


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards; the name is fixed, so that what a killed process left goes too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(name: str, source: Source, given: Path | None, work: Path) -> Path:
    """Where to read from: the given place, the data root, or a fresh download."""
    if not source.layout:
        return Path(source.title)
    if given is not None:
        return (source.find(given) if given.is_dir() else None) or given
    root = paths.data_root()
    if root is not None and not root.is_dir():
        raise DataError(f"PRUNELAB_DATA = {root}: no such folder: set it to the folder that holds {source.layout[0]}")
    if root is not None and (found := source.find(root)):
        return found
    reason = "it cannot be downloaded"
    if source.fetch is not None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints each mirror that it tries
                return source.fetch(work)
        except (OSError, RuntimeError, HTTPException) as error:
            reason = f"the download failed ({first_line(error)})"
    lack = "no data root was given" if root is None else f"{root} has no {' or '.join(source.layout)}"
    remedy = f"set PRUNELAB_DATA=FOLDER, a folder that holds {source.layout[0]}, or run"
    raise DataError(f"{name}: {lack}, and {reason}: {remedy} `prunelab data prepare {name} --from PATH`")


def _write(raw: Raw, name: str, version: int, path: Path) -> None:
    metadata = {
        "format": FORMAT,
        "name": name,
        "source": raw.source,
        "classes": json.dumps(raw.classes),
        "peak": str(raw.peak),
        "files": json.dumps(raw.files),
        "reader": str(version),
        **digest.IN_TENSORS,
    }
    try:
        with digest.sealing(path) as part:
            save_file(raw.tensors, part, metadata=metadata)
    except SafetensorError as error:
        raise OSError(first_line(error)) from None


def _outdated(path: Path) -> bool:
    """Whether a prepared file is of another format, or was made by another version of the reader."""
    try:
        with path.open("rb") as file:
            start = digest.head(file)
        digest.check(start, whole=False)
        metadata = digest.metadata(start)
    except (OSError, ValueError):
        return False  # damaged, which is said when it is read
    made = metadata.get("format"), metadata.get("reader", "1")
    now = FORMAT, str(_source(path.stem).version)
    if made != now:
        log.warning("%s was prepared by another version of its reader: it is prepared again", path)
    return made != now


def _sound(path: Path) -> None:
    """Read every byte of a prepared file and compare its digests."""
    try:
        if not digest.check(path):
            raise ValueError("its digest is gone")
    except (ValueError, OSError) as error:
        raise _damaged(path, first_line(error)) from None


@functools.lru_cache(maxsize=64)
def _sound_once(path: Path, stamp: tuple[int, int, int]) -> None:
    """``_sound``, as long as the file has the same times and size."""
    _sound(path)


def read(path: Path, whole: bool = True) -> tuple[Raw, str]:
    """A prepared file: its tensors, memory-mapped, and the SHA-256 of their bytes.

    Args:
        path: Of the file.
        whole: Compare the digests of all its bytes, if this process has not; False: of the header.

    Raises:
        DataError: truncated, of another format, or with tensors that are no images and labels.
    """
    try:
        found = path.stat()
        sealed = digest.check(path, whole=False)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, first_line(error)) from None
    if metadata.get("format") != FORMAT:
        raise _damaged(path, f"format {metadata.get('format')}, this version reads {FORMAT}")
    if not sealed:
        raise _damaged(path, "its digest is gone")
    if whole:
        _sound_once(path, (found.st_mtime_ns, found.st_ino, found.st_size))
    parts = ("train", "test") if "test_x" in tensors else ("train",)
    try:
        classes, files, peak = (json.loads(metadata[key]) for key in ("classes", "files", "peak"))
        pairs = [(tensors[f"{part}_x"], tensors[f"{part}_y"]) for part in parts]
        raw = Raw(metadata["source"], tuple(classes), tensors, files, peak)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise _damaged(path, f"incomplete: {error}") from None
    for x, y in pairs:
        numbers = y.dtype == torch.float32 and y.ndim == 2  # to be met as they are, not classes
        types = (torch.uint8 if x.ndim == 4 else torch.float32, torch.float32 if numbers else torch.int64)
        if len(x) != len(y) or len(y) == 0 or (x.dtype, y.dtype) != types:
            raise _damaged(path, "its tensors are no images and labels")
        if numbers:
            continue
        if y.min() < 0 or y.max() >= len(classes):
            raise _damaged(path, f"a label is out of range 0..{len(classes) - 1}")
    return raw, metadata[digest.REST]


def made(name: str) -> tuple[Raw, str]:
    """A data set that a function of the user's own gives, and the SHA-256 of its tensors; nothing of it is stored.

    Raises:
        DataError: it gives no data set.
    """
    source = SOURCES.find(name)
    raw = source.read(Path(name))
    source.check(raw, name)
    found = hashlib.sha256()
    for key, tensor in sorted(raw.tensors.items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().numpy())
    return raw, found.hexdigest()


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: damaged or outdated ({why}): write it again, `prunelab data prepare {path.stem}`")


def cached(name: str) -> Path:
    """Where a data set is, or would be, prepared.

    Raises:
        DataError: no data set can have that name.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise DataError(f"data set name {name!r}: use lower-case letters, digits, _ and - only")
    return paths.cache() / "data" / f"{name}.safetensors"


def _prepared_names() -> list[str]:
    return sorted(path.stem for path in (paths.cache() / "data").glob("*.safetensors"))


def _source(name: str, *, new: bool = False) -> Source:
    """How to get a data set; a new name only where it comes from a folder that is given or lies in the data root."""
    if name in SOURCES:
        return SOURCES[name]
    source, root = folder_source(name), paths.data_root()
    if not new and not cached(name).exists() and not (root and source.find(root)):
        known = nearest(name, {*SOURCES, *_prepared_names()})
        own = f"`prunelab data prepare {name} --from PATH` makes one of a folder"
        raise DataError(f"unknown data set {name!r}: {known} ({own})")
    return source


def _origin(name: str) -> str:
    """Where ``prepare`` would get a data set now, in words."""
    source, root = _source(name), paths.data_root()
    if not source.layout:
        return source.origin.removeprefix("ships in ")
    found = source.find(root) if root is not None else None
    return str(found) if found else "download" if source.fetch else "nowhere: prepare it with --from PATH"
