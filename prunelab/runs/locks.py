"""Who trains a run: its place in the store, the lock that one process at a time can hold, and the writer that it gets.

While a run is in progress, all that is known of it is in the one file ``checkpoint.safetensors``, tensors and rows
together, and that file is replaced in one step after each round. So whenever the process dies, the last finished round
is whole, and the system drops the lock with the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np

from prunelab import digest
from prunelab.runs import frames, records
from prunelab.runs.records import CHECKPOINT, FAILED, SETTINGS, Checkpoint, Damaged, Manifest, StoreError, Tensors
from prunelab.settings import Run

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 10.0  # seconds of waiting until it is said for whom


class Busy(StoreError):  # noqa: N818 (a state of the run, not a fault)
    """Another process holds the run at this moment."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one run lies: ``folder`` when complete, ``partial`` while in progress, interrupted or failed."""

    root: Path
    id: str

    @property
    def folder(self) -> Path:
        """The folder of the complete run."""
        return self.root / self.id

    @property
    def partial(self) -> Path:
        """The folder of the run before that."""
        return self.root / f"{self.id}.partial"

    @property
    def lock_file(self) -> Path:
        """What a process locks to hold the run; it may stay behind, unlocked."""
        return self.root / ".locks" / f"{self.id}.lock"

    def reason(self) -> str | None:
        """Why the run failed; None where it did not."""
        found = self._record(FAILED) if (self.partial / FAILED).exists() else None
        return None if found is None else str(found.reason)

    def manifest(self) -> Manifest | None:
        """What the run says of itself, complete or not; None where nothing is stored yet.

        Raises:
            Damaged: the file that says it is damaged, or a complete run lacks it.
            StoreError: it is of another version, or the folder was renamed.
        """
        for _ in range(2):  # it may be moved into place between two looks
            if self.folder.is_dir():
                return self._complete()
            if found := self._record(CHECKPOINT) or self._record(FAILED):
                return found
        return None

    def _record(self, name: str) -> Manifest | None:
        path = self.partial / name
        try:
            if name == FAILED:
                return records.manifest(records.read(path, records.decode_json), self.id, path)
            return records.manifest(records.read(path, records.decode_record, start=True), self.id, path)
        except FileNotFoundError:
            return None

    def _complete(self) -> Manifest:
        path = self.folder / SETTINGS
        try:
            found = path.stat()
            return _remembered(path, self.id, (found.st_mtime_ns, found.st_ino, found.st_size))
        except FileNotFoundError:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read now ({error.strerror}): change its permissions") from None

    def read(self, name: str, decode: Callable[[bytes], T]) -> T:
        """Read a file of the complete run.

        Raises:
            Damaged: the file is not the one that was written, or is gone.
        """
        path, files = self.folder / name, self._complete().files
        try:
            return records.read(path, decode, None if files is None else files[name][0])
        except (FileNotFoundError, KeyError):
            raise Damaged(f"{path} is missing") from None

    def tensors(self, what: str) -> dict[str, np.ndarray]:
        """``weights``, ``masks`` or ``removals`` of the complete run; no removals where none were kept."""
        name, files = f"{what}.safetensors", self._complete().files
        if what == "removals" and (name not in files if files is not None else not (self.folder / name).exists()):
            return {}
        return self.read(name, records.decode_tensors)

    def check(self, whole: bool = True) -> None:
        """Read what is stored and compare its digests.

        Args:
            whole: False: of a complete run only the tables; of all else whether it is there and how long.

        Raises:
            Damaged: says what is wrong.
        """
        if not self.folder.is_dir():
            self.manifest()
            self.reason()
            with contextlib.suppress(FileNotFoundError):
                records.read(self.partial / CHECKPOINT, records.decode_checkpoint)
            return
        files = self._complete().files
        for name in records.FILES if files is None else {**dict.fromkeys(records.FILES[1:-1]), **files}:
            path = self.folder / name
            if name not in records.FILES or (files is not None and name not in files):
                raise Damaged(f"{self.folder / SETTINGS} is damaged (it lists other files)")
            if not path.exists() and (files is not None or name != "removals.safetensors"):
                raise Damaged(f"{path} is missing")
            if files is not None and path.stat().st_size != files[name][1]:
                raise Damaged(f"{path} is damaged ({path.stat().st_size} bytes in place of {files[name][1]})")
        for what, columns in frames.TABLES.items():
            self.read(f"{what}.parquet", records.decode_rows(columns))
        if whole:
            self.read("provenance.json", records.decode_json)
            tensors = {what: self.tensors(what) for what in ("weights", "masks", "removals")}
            if problem := records.misfit(**tensors):
                raise Damaged(f"{self.folder} is damaged ({problem})")

    def unusable(self, run: Run, versions: Mapping[str, int]) -> str:
        """Why what is stored of a run cannot be used, in words; empty where it can, or nothing is stored.

        Args:
            run: The settings, which are compared with those that are stored.
            versions: What is there now of the method, the model and the reader of the data.

        Raises:
            StoreError: it belongs to other settings or to another version of prunelab, or cannot be read now.
        """
        try:
            found = self.manifest()
            if found is None:
                return ""
            found.check(run)
            self.check(whole=False)
        except Damaged as error:
            return error.what
        return found.made_otherwise(versions)

    def stored(self) -> dict[str, bytes]:
        """File name -> bytes of the results, or of the checkpoint and the failure; for ``Writer.adopt`` elsewhere."""
        folder = self.folder if self.folder.is_dir() else self.partial
        return {n: (folder / n).read_bytes() for n in (*records.FILES, CHECKPOINT, FAILED) if (folder / n).exists()}

    def remove(self) -> None:
        """Delete what is stored of the run, which this process holds."""
        for folder in (self.folder, self.partial):
            if folder.exists():
                records.remove(folder)

    def lock(self) -> filelock.BaseFileLock:
        """The lock, not yet acquired; the same object for all who ask in this process."""
        # Not thread-local: the thread that saves may be another one than the thread that claimed.
        return filelock.FileLock(self.lock_file, thread_local=False, is_singleton=True)

    def acquire(self, lock: filelock.BaseFileLock, wait: bool) -> None:
        """Acquire ``lock``; for errors see ``Store.claim``."""
        with records.writing(self.root):
            self.lock_file.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK):  # where only the locks can be written: say so now, not after a round
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            try:
                # Not 0: who only asks for the status holds the lock for some microseconds.
                lock.acquire(timeout=0.02, poll_interval=0.004)
            except filelock.Timeout:
                if not wait:
                    raise Busy(f"{self.id} is being trained already: wait for it, or leave it out") from None
                log.info("waiting for %s, which another process trains", self.id)
                self._wait(lock)
        if lock.lock_counter > 1:  # one more acquisition of what this process has: to wait for it would be for ever
            lock.release()
            raise Busy(f"{self.id} is claimed twice by the same process: name each run once")

    def _wait(self, lock: filelock.BaseFileLock) -> None:
        """Acquire ``lock``, however long it takes; after ``PATIENCE`` seconds it is said what the wait is for."""
        said = ""
        while not lock.is_locked:
            try:
                lock.acquire(timeout=PATIENCE, poll_interval=0.2)
            except filelock.Timeout:
                if (holder := _holder(self.lock_file)) != said:
                    log.warning("waiting for %s, which %s holds", self.id, said := holder)

    def held(self) -> bool:
        """Whether a process holds the run at this moment."""
        if not self.lock_file.exists():
            return False
        lock = filelock.FileLock(self.lock_file, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return True
        except OSError:  # a store that may only be read: nobody can train in it from here
            return False
        lock.release()
        return False

    def let_go(self, lock: filelock.BaseFileLock) -> None:
        """Release the lock of a run that needs none any more, and its file.

        Deleting a lock file that somebody waits for lets two processes in, one by the old file and one by a new one;
        here both find the run settled. A file that cannot be deleted does no harm.
        """
        with contextlib.suppress(OSError):
            self.lock_file.unlink()
        lock.release()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other process from the run for a moment, to delete it or put it there; leaves no lock file.

        Raises:
            Busy: a process is training it.
        """
        lock = self.lock()
        self.acquire(lock, wait=False)
        try:
            yield
        finally:
            self.let_go(lock)


@functools.lru_cache(maxsize=4096)
def _remembered(path: Path, run_id: str, stamp: tuple[int, int, int]) -> Manifest:
    """The manifest of a complete run, as long as its file has the same times and size."""
    return records.manifest(records.read(path, records.decode_json), run_id, path)


def _holder(lock_file: Path) -> str:
    """Who holds a lock, in words, as far as the system tells: Linux knows the process."""
    try:
        inode = lock_file.stat().st_ino
        lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        pid = next(int(line[4]) for line in lines if line[1] == "FLOCK" and int(line[5].split(":")[2]) == inode)
        stopped = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, ValueError, IndexError, StopIteration):
        return "another process"
    return f"process {pid}{f', which is stopped (kill -CONT {pid} lets it go on, kill -9 {pid} ends it),' * stopped}"


@contextlib.contextmanager
def claim(root: Path, run: Run, wait: bool, versions: Mapping[str, int]) -> Iterator[Writer]:
    """Hold a run alone; see ``Store.claim``."""
    place = Place(root, run.id)
    lock = place.lock()
    writer = Writer(place, run, lock, versions)

    def settled() -> bool:
        return (place.folder.is_dir() or (place.partial / FAILED).exists()) and not place.unusable(run, versions)

    if settled():
        yield writer
        return
    place.acquire(lock, wait)
    try:
        if why := place.unusable(run, versions):  # asked again, now that nobody else changes it
            log.warning("%s: it is trained again", why)
            place.remove()
        if settled():  # by the process that was waited for
            place.let_go(lock)
        yield writer
    finally:
        lock.release()


class Writer:
    """One run, held by this process until it is finished or failed, or the ``with`` block of ``Store.claim`` ends."""

    def __init__(self, place: Place, run: Run, lock: filelock.BaseFileLock, versions: Mapping[str, int]) -> None:
        self.run = run
        self._place, self._lock, self._versions = place, lock, versions

    @property
    def complete(self) -> bool:
        """Whether the run is in the store, whoever trained it: there is nothing to do."""
        return self._place.folder.is_dir()

    @property
    def failed(self) -> str | None:
        """Why the run failed, where it did; it stays so until ``Store.discard``."""
        return self._place.reason()

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The last finished round, read from the disk; None where no round was finished.

        Raises:
            Damaged: the file is not what was written.
            StoreError: it belongs to another run or another version of prunelab.
        """
        path = self._place.partial / CHECKPOINT
        if not path.exists():
            return None
        self._place.manifest()  # of a folder that was renamed, or of another format: refused
        return records.read(path, records.decode_checkpoint)

    def restart(self) -> None:
        """Delete the checkpoint, so that the run begins again."""
        self._need_hold()
        self._place.remove()

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint in one step; where that fails, the one before it is still there.

        Raises:
            StoreError: the disk is full or cannot be written, or the run is not held any more.
            PrunelabError: a value, column or tensor that cannot be stored; nothing was written then.
        """
        self._need_hold()
        frames.table(checkpoint.rounds, frames.ROUNDS)  # what cannot become a column is refused now, not at the end
        frames.table(checkpoint.epochs, frames.EPOCHS)
        parts = {name: frames.plain(getattr(checkpoint, name), name) for name in ("state", "rounds", "epochs")}
        data = records.encode_tensors(checkpoint.tensors, {**self._record(), **parts})
        records.write(self._place.partial / CHECKPOINT, data)

    def _record(self) -> dict[str, Any]:
        return records.settings_record(self.run, self._versions)

    def finish(
        self,
        weights: Tensors,
        masks: Tensors,
        removals: Tensors | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the results with the rows of the last checkpoint, move the folder into place, and let the run go.

        Args:
            weights: Parameters and buffers of the final network, by name.
            masks: The final masks, bool, True = keep.
            removals: The record of every removal, where there is one.
            provenance: Versions and hardware, from ``provenance.collect``.

        Raises:
            StoreError: no round was saved, or the disk cannot be written; the checkpoint is intact then.
        """
        self._need_hold()
        found = self._place.manifest()
        if found is None or not (self._place.partial / CHECKPOINT).exists():
            raise StoreError(f"{self.run.id}: no round was saved, so there is nothing to finish")
        files = {
            "rounds.parquet": records.encode_rows(frames.table(found.rounds, frames.ROUNDS)),
            "epochs.parquet": records.encode_rows(frames.table(found.epochs, frames.EPOCHS)),
            "provenance.json": records.encode_json(frames.plain(dict(provenance or {}), "provenance")),
            "weights.safetensors": records.encode_tensors(weights),
            "masks.safetensors": records.encode_tensors(masks),
        }
        if removals is not None:
            files["removals.safetensors"] = records.encode_tensors(removals)
        digests = {name: (digest.of(data), len(data)) for name, data in files.items()}
        files[SETTINGS] = records.encode_json({**self._record(), "files": digests}, seal=True)
        for name, data in files.items():
            records.write(self._place.partial / name, data)
        with records.writing(self._place.folder):
            self._place.partial.rename(self._place.folder)
            for left in self._place.folder.iterdir():  # the checkpoint, and what a process left that was killed
                if left.name not in files:
                    left.unlink(missing_ok=True)
        self._place.let_go(self._lock)

    def fail(self, reason: str) -> None:
        """Record that the run failed, keep its rows, and let it go; it is not trained again until ``Store.discard``.

        Args:
            reason: One line, for people: "the loss was nan in epoch 7 of round 2".
        """
        self._need_hold()
        record = {**self._record(), "reason": " ".join(reason.split()) or "no reason given"}
        records.write(self._place.partial / FAILED, records.encode_json(record, seal=True))
        self._place.let_go(self._lock)

    def adopt(self, files: Mapping[str, bytes]) -> None:
        """Take over what another machine stored of the run; with its results or its failure the run is let go.

        Args:
            files: ``Place.stored`` there; an empty one changes nothing.

        Raises:
            Damaged: the bytes are not those that were written there.
            StoreError: they are of another run, or the disk cannot be written.
        """
        self._need_hold()
        if not files:
            return
        place, complete = self._place, SETTINGS in files
        with records.writing(place.root), tempfile.TemporaryDirectory(prefix=".import-", dir=place.root) as staging:
            there = Place(Path(staging), self.run.id)
            folder = there.folder if complete else there.partial
            for name in (*records.FILES, CHECKPOINT, FAILED):
                if name in files:
                    records.write(folder / name, files[name])
            if (found := there.manifest()) is None:
                raise StoreError(f"{self.run.id}: what came from the other machine is no run")
            found.check(self.run)
            there.check()
            if complete:
                folder.rename(place.folder)
                if place.partial.exists():
                    records.remove(place.partial)
            else:
                for name in (CHECKPOINT, FAILED):
                    if name in files:
                        records.write(place.partial / name, files[name])
        if complete or FAILED in files:
            place.let_go(self._lock)

    def _need_hold(self) -> None:
        if not self._lock.is_locked:
            raise StoreError(f"{self.run.id} is not held any more: it is finished, failed, or its with block has ended")
