"""Runs that travel between machines as one plain tar, and the clearing of what a store needs no more.

An archive starts with ``manifest.json``, which names every file with its SHA-256; equal runs give equal bytes. Nobody
has to trust one: at import its members are checked before any is written, then their content in a folder beside the
runs, before the first run is moved into place. So a damaged or hostile archive leaves the store as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

import filelock

from prunelab import digest
from prunelab.errors import first_line
from prunelab.paths import replacing
from prunelab.runs import records
from prunelab.runs.locks import Busy
from prunelab.runs.records import CHECKPOINT, FAILED, FILES, Damaged, StoreError
from prunelab.runs.store import ID, Store
from prunelab.settings import Run

FORMAT = "prunelab runs 1"
MANIFEST, LARGEST_MANIFEST = "manifest.json", 2**26  # bytes: about 60,000 runs


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
    for run_id in ids:
        store.check(run_id)  # damage is met here, where the run can be trained again, not on the other machine
    files = {run_id: [name for name in sorted(FILES) if (store.root / run_id / name).exists()] for run_id in ids}
    manifest = {run_id: {name: digest.of(store.root / run_id / name) for name in files[run_id]} for run_id in ids}
    with (
        records.writing(path, "give a path in a folder that can"),
        replacing(path) as part,
        tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar,
    ):
        data = records.encode_json({"format": FORMAT, "runs": manifest})
        tar.addfile(_member(MANIFEST, len(data)), io.BytesIO(data))
        for run_id in ids:
            for name in files[run_id]:
                source = store.root / run_id / name
                with source.open("rb") as file:
                    tar.addfile(_member(f"{run_id}/{name}", source.stat().st_size), file)
    return ids


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)  # its defaults: nobody's file, from 1970
    member.size = size
    return member


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
        with filelock.FileLock(staging / _LOCK):  # whoever clears the store meanwhile sees that it is in use
            ids = _unpack(path, staging)
            for run_id in ids:
                try:
                    Store(staging).check(run_id)
                except StoreError as error:
                    reason = getattr(error, "what", str(error)).replace(f"{staging}/", "")
                    raise StoreError(f"{path} cannot be imported: {reason}") from None
            return _move(staging, store, ids)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


_LOCK = "in-use.lock"


def _unpack(path: Path, staging: Path) -> list[str]:
    """Write the files of the archive below ``staging``, where each is the one that the manifest names; the ids."""
    try:
        with tarfile.open(path, "r:") as tar:
            manifest = _manifest(path, tar, tar.next())
            digests = {f"{run_id}/{name}": own for run_id, files in manifest.items() for name, own in files.items()}
            members = _members(path, tar, set(digests))
            for member in members:
                target = staging / PurePosixPath(member.name)
                with records.writing(target):
                    target.parent.mkdir(exist_ok=True)
                    with target.open("wb") as copy:
                        shutil.copyfileobj(tar.extractfile(member), copy)  # type: ignore[arg-type]
                if digest.of(target) != digests[member.name]:
                    raise StoreError(f"{path} is damaged: {member.name} has another digest than when it was exported")
    except FileNotFoundError:
        raise StoreError(f"there is no archive {path}") from None
    except StoreError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise StoreError(f"{path} is damaged or no plain tar ({first_line(error)}): export it again") from None
    return list(manifest)


def _members(path: Path, tar: tarfile.TarFile, expected: set[str]) -> list[tarfile.TarInfo]:
    """The members behind the manifest: plain files that it names, each once, whose bytes are in the archive."""
    size, found = path.stat().st_size, []
    while (member := tar.next()) is not None:
        if member.name not in expected or not _plain(member):
            raise StoreError(f"{path} is no archive of runs: {member.name[:200]!r} does not belong in one")
        if member.offset_data + member.size > size:
            break
        expected.remove(member.name)
        found.append(member)
    if expected:
        raise StoreError(
            f"{path} is truncated: {min(expected)} and {len(expected) - 1} more are missing; export it again"
        )
    return found


def _plain(member: tarfile.TarInfo) -> bool:
    """Whether it is a file whose bytes lie in the archive as they are; a sparse one may claim any size."""
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse() and member.size >= 0


def _manifest(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> Mapping[str, Mapping[str, str]]:
    """The manifest, of which no name leads out of the store."""
    wrong = StoreError(f"{path} is no archive of runs that this prunelab reads: it does not start with its manifest")
    if member is None or member.name != MANIFEST or not _plain(member) or member.size > LARGEST_MANIFEST:
        raise wrong
    try:
        manifest: Any = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
        if manifest["format"] != FORMAT:
            raise StoreError(f"{path} has format {manifest['format']!r}, not {FORMAT!r}: it needs another prunelab")
        runs = {run_id: dict(files) for run_id, files in manifest["runs"].items()}
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise wrong from None
    for run_id, files in runs.items():
        if not ID.fullmatch(run_id) or not set(files) <= set(FILES) or not set(files) >= set(FILES[:-1]):
            raise StoreError(f"{path} is no archive of runs: {run_id!r} is no run, or lacks a file")
    return runs


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


@dataclasses.dataclass(frozen=True)
class Checked:
    """What ``check`` found of one run: how it stands, ``problem`` ("" or one line), and whether it was dropped."""

    id: str
    state: str
    problem: str = ""
    dropped: bool = False


def check(store: Store, runs: Iterable[Run | str] | None = None, repair: bool = False) -> Iterator[Checked]:
    """Read every file of runs, and compare it with its digest.

    Args:
        store: Where they are.
        runs: Which; None: all, in whatever state.
        repair: Delete those that are damaged, so that they are trained again when they are next asked for.

    Yields:
        How each stands: ``"sound"``, ``"no digest (older)"``, ``"damaged"`` or ``"unreadable"``, as it is found out.
    """
    for run_id in store.ids(unfinished=True) if runs is None else map(store.id, runs):
        try:
            found = Checked(run_id, store.check(run_id))
        except Damaged as error:
            found = Checked(run_id, "damaged", error.what)
            if repair:
                try:
                    with store.place(run_id).hold():
                        store.place(run_id).remove()
                    found = dataclasses.replace(found, dropped=True)
                except StoreError as why:
                    found = dataclasses.replace(found, problem=f"{error.what}, and cannot be dropped: {why}")
        except StoreError as error:
            found = Checked(run_id, "unreadable", str(error))
        yield found


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
            what, wanted = "interrupted import or deletion", _written(path) < before and not _in_use(path)
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


def _in_use(folder: Path) -> bool:
    """Whether an import works in it at this moment, whatever the clock says."""
    if not (folder / _LOCK).exists():
        return False
    try:
        with filelock.FileLock(folder / _LOCK, timeout=0):
            return False
    except filelock.Timeout:
        return True


def _written(path: Path) -> float:
    """When anything in a folder was last written, in seconds since 1970; never, so infinite, where it is gone."""
    return max((found.st_mtime for found in records.tree(path)), default=math.inf)


def _delete(store: Store, garbage: Garbage) -> bool:
    """Delete, unless a process has taken hold of the run since it was found."""
    path = garbage.path
    with records.writing(path):
        if path.is_dir() and path.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):  # somebody else clears the store too
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
