"""Who trains a run: its place in the store, the lock that one process at a time can hold, and the writer that it gets.

While a run is in progress, all that is known of it is in the one file ``checkpoint.safetensors``, tensors and rows
together, and that file is replaced in one step after each round. So whenever the process dies, the last finished round
is whole, and the system drops the lock with the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from prunelab.runs import frames, records
from prunelab.runs.records import CHECKPOINT, FAILED, Checkpoint, StoreError, Tensors
from prunelab.settings import Run

log = logging.getLogger(__name__)


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
        path = self.partial / FAILED
        return str(records.read(path, records.decode_json).get("reason")) if path.exists() else None

    def look(self, name: str, decode: Callable[[Path], Any]) -> tuple[Path, Any] | None:
        """Read a file of the run, or, where the run is not complete, the record of its checkpoint or of its failure.

        Returns:
            The file that was read and what is in it; None where nothing is stored yet.

        Raises:
            StoreError: the file is damaged, or a complete run lacks it.
        """
        for _ in range(2):  # it may be moved into place between two looks
            if self.folder.is_dir():
                return self.folder / name, self.read(name, decode)
            for path, decoder in (
                (self.partial / CHECKPOINT, records.decode_record),
                (self.partial / FAILED, records.decode_json),
            ):
                with contextlib.suppress(FileNotFoundError):
                    return path, records.read(path, decoder)
        return None

    def read(self, name: str, decode: Callable[[Path], Any]) -> Any:
        """Read a file of the complete run.

        Raises:
            StoreError: the file is damaged or absent.
        """
        path = self.folder / name
        try:
            return records.read(path, decode)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing: {records.remedy(path)}") from None

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
                lock.acquire(timeout=-1, poll_interval=0.2)
        if lock.lock_counter > 1:  # one more acquisition of what this process has: to wait for it would be for ever
            lock.release()
            raise Busy(f"{self.id} is claimed twice by the same process: name each run once")

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


@contextlib.contextmanager
def claim(root: Path, run: Run, wait: bool) -> Iterator[Writer]:
    """Hold a run alone; see ``Store.claim``."""
    place = Place(root, run.id)
    lock = place.lock()
    writer = Writer(place, run, lock)
    if writer.complete or writer.failed:
        yield writer
        return
    place.acquire(lock, wait)
    try:
        if writer.complete or writer.failed:  # by the process that was waited for
            place.let_go(lock)
        yield writer
    finally:
        lock.release()


class Writer:
    """One run, held by this process until it is finished or failed, or the ``with`` block of ``Store.claim`` ends."""

    def __init__(self, place: Place, run: Run, lock: filelock.BaseFileLock) -> None:
        self.run = run
        self._place = place
        self._lock = lock

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
            StoreError: the file is damaged, or belongs to another run or another version of prunelab.
        """
        path = self._place.partial / CHECKPOINT
        if not path.exists():
            return None
        record = records.read(path, records.decode_record)
        records.settings_from(record, self.run.id, path)  # of a folder that was renamed, or of another format: refused
        tensors = records.read(path, records.decode_tensors)
        return Checkpoint(tensors, record["state"], record["rounds"], record["epochs"])

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint in one step; where that fails, the one before it is still there.

        Raises:
            StoreError: the disk is full or cannot be written, or the run is not held any more.
            PrunelabError: a value, column or tensor that cannot be stored; nothing was written then.
        """
        self._need_hold()
        frames.table(checkpoint.rounds, frames.ROUNDS)  # what cannot become a column is refused now, not at the end
        frames.table(checkpoint.epochs, frames.EPOCHS)
        parts = {name: records.plain(getattr(checkpoint, name), name) for name in ("state", "rounds", "epochs")}
        data = records.encode_tensors(checkpoint.tensors, {**records.settings_record(self.run), **parts})
        records.replace(self._place.partial / CHECKPOINT, data)

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
        path = self._place.partial / CHECKPOINT
        if not path.exists():
            raise StoreError(f"{self.run.id}: no round was saved, so there is nothing to finish")
        record = records.read(path, records.decode_record)
        files = {
            "settings.json": records.encode_json(records.settings_record(self.run)),
            "rounds.parquet": records.encode_rows(frames.table(record["rounds"], frames.ROUNDS)),
            "epochs.parquet": records.encode_rows(frames.table(record["epochs"], frames.EPOCHS)),
            "provenance.json": records.encode_json(records.plain(dict(provenance or {}), "provenance")),
            "weights.safetensors": records.encode_tensors(weights),
            "masks.safetensors": records.encode_tensors(masks),
            "removals.safetensors": None if removals is None else records.encode_tensors(removals),
        }
        for name, data in files.items():
            if data is not None:
                records.write(self._place.partial / name, data)
        with records.writing(self._place.folder):
            self._place.partial.rename(self._place.folder)
            for name in (CHECKPOINT, f"{CHECKPOINT}.part"):
                (self._place.folder / name).unlink(missing_ok=True)
        self._place.let_go(self._lock)

    def fail(self, reason: str) -> None:
        """Record that the run failed, keep its rows, and let it go; it is not trained again until ``Store.discard``.

        Args:
            reason: One line, for people: "the loss was nan in epoch 7 of round 2".
        """
        self._need_hold()
        record = {**records.settings_record(self.run), "reason": " ".join(reason.split()) or "no reason given"}
        records.replace(self._place.partial / FAILED, records.encode_json(record))
        self._place.let_go(self._lock)

    def _need_hold(self) -> None:
        if not self._lock.is_locked:
            raise StoreError(f"{self.run.id} is not held any more: it is finished, failed, or its with block has ended")
