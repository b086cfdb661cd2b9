"""Runs that travel between machines as one plain tar, and the clearing of what a store needs no more.

An archive starts with ``manifest.json``, which names every file with its SHA-256; equal runs give equal bytes. At
import everything is checked in a folder beside the runs before the first one is moved into place, so that a damaged
archive leaves the store as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from prunelab.errors import first_line
from prunelab.runs import records
from prunelab.runs.locks import Busy
from prunelab.runs.records import CHECKPOINT, FAILED, FILES, StoreError
from prunelab.runs.store import ID, Store
from prunelab.settings import Run

FORMAT = "prunelab runs 1"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Imported:
    """The ids that an import brought, found there already, or left because a process trains them."""

    new: list[str]
    existing: list[str]
    busy: list[str]


@dataclasses.dataclass(frozen=True)
class Garbage:
    """Something that the store needs no more: what it is, where it lies, and its bytes."""

    what: str
    path: Path
    bytes: int


def export(store: Store, path: Path | str, runs: Iterable[Run | str] | None = None) -> list[str]:
    """Write complete runs into one tar file, in one step; a file that is there is replaced.

    Args:
        store: Where the runs are.
        path: The tar file.
        runs: Which runs; None: every complete one.

    Returns:
        The ids that are in the archive.

    Raises:
        StoreError: a run that is not complete or is damaged, nothing to export, or a file that cannot be written.
    """
    path = Path(path)
    if not path.name:
        raise StoreError(f"{str(path)!r} is no name of a file: give the path of a tar file")
    wanted = store.ids() if runs is None else [store.id(run) for run in runs]
    states = {run_id: store.status(run_id) for run_id in dict.fromkeys(wanted)}
    ids = sorted(run_id for run_id, status in states.items() if status == "complete")
    if runs is not None and (others := [run_id for run_id in states if run_id not in ids]):
        raise StoreError(f"{others[0]} is {states[others[0]]}: only complete runs can be exported")
    if not ids:
        raise StoreError(f"{store.root} has no complete run to export")
    _read(store, ids)  # damage is met here, where the run can be trained again, not on the other machine
    files = {run_id: [name for name in sorted(FILES) if (store.root / run_id / name).exists()] for run_id in ids}
    manifest = {run_id: {name: _digest(store.root / run_id / name) for name in files[run_id]} for run_id in ids}
    part = path.with_name(f"{path.name}.part")
    try:
        with records.writing(path, "give a path in a folder that can"):
            with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
                data = records.encode_json({"format": FORMAT, "runs": manifest})
                tar.addfile(_member(MANIFEST, len(data)), io.BytesIO(data))
                for run_id in ids:
                    for name in files[run_id]:
                        source = store.root / run_id / name
                        with source.open("rb") as file:
                            tar.addfile(_member(f"{run_id}/{name}", source.stat().st_size), file)
            part.replace(path)
    except StoreError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return ids


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)  # its defaults: nobody's file, from 1970
    member.size = size
    return member


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def import_(store: Store, path: Path | str) -> Imported:
    """Bring the runs of an archive into the store; a run that is there already stays as it is.

    Raises:
        StoreError: not an archive of runs, a wrong digest, a truncated or foreign file; the store is untouched then.
    """
    path = Path(path)
    with records.writing(store.root):
        store.root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".import-", dir=store.root))
    try:
        ids = _unpack(path, staging)
        _check(path, Store(staging), ids)
        return _move(staging, store, ids)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unpack(path: Path, staging: Path) -> list[str]:
    """Write the files of the archive below ``staging``, where each is the one that the manifest names; the ids."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = iter(tar)
            manifest = _manifest(path, tar, next(members, None))
            expected = {
                f"{run_id}/{name}": digest for run_id, files in manifest.items() for name, digest in files.items()
            }
            for member in members:
                digest = expected.pop(member.name, None)
                file = tar.extractfile(member) if member.isreg() else None
                if digest is None or file is None:
                    raise StoreError(f"{path} is no archive of runs: {member.name!r} does not belong in one")
                data = file.read()
                if hashlib.sha256(data).hexdigest() != digest:
                    raise StoreError(f"{path} is damaged: {member.name} has another digest than when it was exported")
                target = staging / PurePosixPath(member.name)
                with records.writing(target):
                    target.parent.mkdir(exist_ok=True)
                records.write(target, data)
    except FileNotFoundError:
        raise StoreError(f"there is no archive {path}") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise StoreError(f"{path} is damaged or no plain tar ({first_line(error)}): export it again") from None
    if expected:
        raise StoreError(
            f"{path} is truncated: {min(expected)} and {len(expected) - 1} more are missing; export it again"
        )
    return list(manifest)


def _manifest(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> Mapping[str, Mapping[str, str]]:
    """The manifest, of which no name leads out of the store."""
    wrong = StoreError(f"{path} is no archive of runs that this prunelab reads: it does not start with its manifest")
    file = tar.extractfile(member) if member is not None and member.name == MANIFEST and member.isreg() else None
    if file is None:
        raise wrong
    try:
        manifest: Any = json.loads(file.read())
        if manifest["format"] != FORMAT:
            raise StoreError(f"{path} has format {manifest['format']!r}, not {FORMAT!r}: it needs another prunelab")
        runs = {run_id: dict(files) for run_id, files in manifest["runs"].items()}
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise wrong from None
    for run_id, files in runs.items():
        if not ID.fullmatch(run_id) or not set(files) <= set(FILES) or not set(files) >= set(FILES[:-1]):
            raise StoreError(f"{path} is no archive of runs: {run_id!r} is no run, or lacks a file")
    return runs


def _check(path: Path, staged: Store, ids: list[str]) -> None:
    """Refuse runs whose files cannot be read or whose settings belong to another run."""
    try:
        _read(staged, ids)
    except StoreError as error:
        reason = str(error).split(": delete the folder")[0].replace(f"{staged.root}/", "")
        raise StoreError(f"{path} cannot be imported: {reason}") from None


def _read(store: Store, ids: list[str]) -> None:
    """Read every file of complete runs."""
    for run_id in ids:
        store.show(run_id)
        store.place(run_id).read("epochs.parquet", records.decode_rows)
        for read_tensors in (store.weights, store.masks, store.removals):
            read_tensors(run_id)


def _move(staging: Path, store: Store, ids: list[str]) -> Imported:
    report = Imported([], [], [])
    for run_id in ids:
        place = store.place(run_id)
        try:
            with place.hold(), records.writing(place.folder):
                if place.folder.is_dir():
                    report.existing.append(run_id)
                    continue
                (staging / run_id).rename(place.folder)
                if place.partial.is_dir():
                    records.remove(place.partial)
                report.new.append(run_id)
        except Busy:
            report.busy.append(run_id)
    return report


def gc(store: Store, days: float = 7.0, failed: bool = False, dry_run: bool = True) -> list[Garbage]:
    """Find, and delete unless ``dry_run``, what no process will use again; complete runs are never touched.

    Args:
        store: What to clear.
        days: Interrupted runs, imports and locks that are younger stay, as somebody may go on with them.
        failed: Failed runs too, of any age; they are trained again when they are next asked for.
        dry_run: Only find.

    Returns:
        What was found, or deleted: interrupted and failed runs, checkpoints that outlived their run, locks that no
        process holds, what is left of imports and deletions that were interrupted.

    Raises:
        StoreError: ``days`` is no number of days, or the store cannot be written.
    """
    if not 0 <= days < math.inf:
        raise StoreError(f"days = {days}: should be 0 or more")
    found = []
    for garbage in _garbage(store, time.time() - days * 86400, failed):
        if not dry_run and not _delete(store, garbage):
            continue
        found.append(garbage)
    return found


def _garbage(store: Store, before: float, failed: bool) -> Iterator[Garbage]:
    entries = sorted(store.root.iterdir()) if store.root.is_dir() else []
    for path in entries:
        run_id = path.name.removesuffix(".partial")
        if path.name.startswith((".import-", ".trash-")):
            what, wanted = "interrupted import or deletion", _written(path) < before
        elif not ID.fullmatch(run_id) or not path.is_dir():
            continue
        elif run_id == path.name:
            path = path / CHECKPOINT
            what, wanted = "checkpoint of a complete run", path.exists()
        elif (store.root / run_id).is_dir():
            what, wanted = "checkpoint of a complete run", path.is_dir()  # not what was moved into place just now
        elif (path / FAILED).exists():
            what, wanted = "failed run", failed
        else:
            what, wanted = "interrupted run", _written(path) < before
        if wanted and not (ID.fullmatch(run_id) and store.place(run_id).held()):
            yield Garbage(what, path, records.tree_size(path))
    for path in sorted((store.root / ".locks").glob("*.lock")):
        place = store.place(path.stem)
        if not place.partial.is_dir() and _written(path) < before and not place.held():
            yield Garbage("lock of no process", path, records.tree_size(path))


def _written(path: Path) -> float:
    """When anything in a folder was last written, in seconds since 1970; never, so infinite, where it is gone."""
    return max((found.st_mtime for found in records.tree(path)), default=math.inf)


def _delete(store: Store, garbage: Garbage) -> bool:
    """Delete, unless a process has taken hold of the run since it was found."""
    path = garbage.path
    with records.writing(path):
        if path.is_dir() and path.name.startswith("."):
            shutil.rmtree(path)
        elif path.is_dir():
            try:
                with store.place(path.name.removesuffix(".partial")).hold():
                    if path.is_dir():
                        records.remove(path)
            except Busy:
                return False
        else:
            path.unlink(missing_ok=True)
    return True
