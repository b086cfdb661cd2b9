"""The run store: one folder per run, written under a temporary name and moved into place when the run is complete.

runs/dropnet-mlp_40_40-mnist-s3-1f9c2a7b/          settings.json rounds.parquet epochs.parquet provenance.json
                                                   weights.safetensors masks.safetensors removals.safetensors
runs/dropnet-mlp_40_40-mnist-s4-77ab01c2.partial/  checkpoint.safetensors, and failed.json where the run failed

Every file is compared with its digest when it is read (``records``), and settings with those that are asked for.
"""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from prunelab import paths
from prunelab.errors import nearest
from prunelab.runs import frames, locks, records
from prunelab.runs.locks import Busy, Place, Writer
from prunelab.runs.records import FAILED, Checkpoint, StoreError
from prunelab.settings import Run

__all__ = ["Busy", "Checkpoint", "Status", "Store", "StoreError", "Writer"]

Status = Literal["complete", "running", "partial", "failed", "missing"]
Runs = Run | str | Iterable[Run | str] | None

ID = re.compile(r"[a-z0-9_]+-[a-z0-9_]+-[a-z0-9_]+-s[0-9]+-[0-9a-f]{8}")


class Store:
    """All runs below one folder; reading needs no lock, writing goes through ``claim``.

    A run is named by its settings, its id, or any beginning of the id that only one run has.

    Args:
        root: The folder, made when the first run is claimed; None: ``PRUNELAB_RUNS``, or ``runs/`` in the repository.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        if not isinstance(root, str | Path | None):
            raise StoreError(f"store = {root!r}: should be a Store, or the path of its folder")
        self.root = Path(root) if root is not None else paths.runs()

    @classmethod
    def of(cls, store: Store | Path | str | None) -> Store:
        """A store, or the one at a path; None: the usual one."""
        return store if isinstance(store, Store) else cls(store)

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def place(self, run_id: str) -> Place:
        """Where a run lies."""
        return Place(self.root, run_id)

    # ---- who trains what ----

    def claim(
        self, run: Run, wait: bool = True, versions: Mapping[str, int] | None = None
    ) -> AbstractContextManager[Writer]:
        """Hold a run alone, to train it; many can be held at once, with an ``ExitStack``.

        A run that is complete or failed is handed out at once, without a hold. What is stored of the run and cannot be
        used (``unusable``) is deleted first, which is logged as a warning. Two processes that each hold runs and
        wait for one of the other's would wait for ever: claim several with ``wait=False``, and wait for the busy ones
        when yours are done.

        Args:
            run: The settings; they are stored with the results.
            wait: Wait while another process holds the run, to find it complete, or go on where that process stopped.
            versions: Of what trains it, as in ``unusable``; they are stored with the results.

        Raises:
            Busy: another process holds the run and ``wait`` is False, or this process holds it already.
            StoreError: the store cannot be written, or the id is that of a stored run with other settings.
        """
        return locks.claim(self.root, run, wait, versions or {})

    def unusable(self, run: Run, versions: Mapping[str, int] | None = None) -> str:
        """Why what is stored of a run cannot be used, in one line: damage, or another version; empty where it can.

        Of a complete run its tables are read and compared with their digests, of the tensors only the sizes.

        Args:
            run: The settings.
            versions: What is there now of the ``method``, the ``model`` and the reader of the ``data``; what was stored
                without has version 1. None: any will do.

        Raises:
            StoreError: other settings are stored under this id, or it cannot be read now.
        """
        return self.place(run.id).unusable(run, versions or {})

    def check(self, run: Run | str) -> str:
        """Read everything that is stored of a run, and compare it with its digests.

        Returns:
            ``"sound"``, or ``"no digest (older)"``, where only what can be read and fits together is known.

        Raises:
            Damaged: says what is wrong and what to do.
        """
        place = self.place(self.id(run))
        place.check()
        found = place.manifest()
        return "sound" if found is None or found.digests else "no digest (older)"

    def discard(self, run: Run | str) -> None:
        """Delete a run in whatever state; the next claim starts afresh.

        Raises:
            Busy: a process is training it.
            StoreError: no such run, or the store cannot be written.
        """
        place = self.place(self.id(run))
        with place.hold():
            place.remove()

    # ---- what is there ----

    def status(self, run: Run | str) -> Status:
        """Where a run stands: complete, failed, running (a process holds it), partial (it can go on) or missing.

        Raises:
            StoreError: the beginning of an id that several runs have.
        """
        run_id = self.id(run, strict=False)
        place = self.place(run_id)
        if not ID.fullmatch(run_id):
            return "missing"
        if place.folder.is_dir():
            return "complete"
        if place.held():
            return "running"
        if place.folder.is_dir():  # moved into place while we looked at the lock
            return "complete"
        if (place.partial / FAILED).exists():
            return "failed"
        return "partial" if place.partial.is_dir() else "missing"

    def ids(self, unfinished: bool = False) -> builtins.list[str]:
        """The ids of the complete and failed runs, or of all, ordered by method, model, data and seed."""
        try:
            names = {entry.name for entry in os.scandir(self.root) if entry.is_dir()}
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = {name for name in names if ID.fullmatch(name)}
        for name in names - found:
            run_id = name.removesuffix(".partial")
            if ID.fullmatch(run_id) and (unfinished or (self.root / name / FAILED).exists()):
                found.add(run_id)
        return sorted(found, key=_natural)

    def id(self, run: Run | str, strict: bool = True) -> str:
        """The id that settings, an id, or the beginning of one stand for.

        Args:
            run: What names the run.
            strict: Refuse what no run has; otherwise it is handed back as it is.

        Raises:
            StoreError: several runs begin so; or no run does, and ``strict``.
        """
        wanted = run.id if isinstance(run, Run) else str(run)
        place = self.place(wanted)
        if ID.fullmatch(wanted) and (not strict or place.folder.is_dir() or place.partial.is_dir()):
            return wanted  # a whole id begins no other
        known = self.ids(unfinished=True)
        matches = [run_id for run_id in known if wanted and run_id.startswith(wanted)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise StoreError(f"{wanted!r} begins {len(matches)} ids ({', '.join(matches[:3])}...): give more of it")
        if not strict:
            return wanted
        hint = nearest(wanted, known)
        if len(known) > 5 and hint.startswith("known:"):
            hint = f"'prunelab runs list' shows the {len(known)} runs there are"
        raise StoreError(f"no run {wanted!r} in {self.root}: {hint}")

    def settings(self, run: Run | str) -> Run:
        """The settings that a run was made with.

        Raises:
            StoreError: no such run, or its file is damaged or belongs to another run.
        """
        found = self._manifest(run)
        if found is None:
            raise StoreError(f"{self.id(run)} has no finished round yet: its settings are stored with the first")
        return found.run

    def _manifest(self, run: Run | str) -> records.Manifest | None:
        """What is known of a run, whose settings are those that are asked for."""
        found = self.place(self.id(run)).manifest()
        if found is not None and isinstance(run, Run):
            found.check(run)
        return found

    def _tables(self, ids: Iterable[str], what: str) -> builtins.list[pa.Table]:
        columns = frames.TABLES[what]

        def one(run_id: str) -> pa.Table:
            place = self.place(run_id)
            for _ in range(2):  # it may be moved into place between two looks
                if place.folder.is_dir():
                    return place.read(f"{what}.parquet", records.decode_rows(columns))
                found = place.manifest()
            return frames.table([] if found is None else getattr(found, what), columns)

        with ThreadPoolExecutor(4) as pool:  # arrow and hashlib let go of the interpreter lock while they work
            return list(pool.map(one, ids))

    def rounds(self, runs: Runs = None, unfinished: bool = False, **filters: Any) -> pd.DataFrame:
        """One row per run and round, with every setting of the run beside it.

        Args:
            runs: Which runs, in the order wanted; None: all, in the order of ``ids``.
            unfinished: Also the runs that are in progress or were interrupted, as far as they are.
            filters: Column = value; a list keeps any of its values, None keeps the missing ones. Names with a point go
                in as ``**{"prune.amount": 0.2}``.

        Returns:
            id, status, seed, data, model, method, all other settings, then the columns of a round (``frames.ROUNDS``).
            Failed runs are among them, with status "failed" and the rounds they finished. No rows, but all columns,
            where no run matches.

        Raises:
            StoreError: a run that is not there, or a damaged file.
            PrunelabError: a filter on a column that does not exist.
        """
        return self._query("rounds", runs, unfinished, filters)

    def epochs(self, runs: Runs = None, unfinished: bool = False, **filters: Any) -> pd.DataFrame:
        """One row per run, round and epoch (``frames.EPOCHS``); the rest is as in ``rounds``."""
        return self._query("epochs", runs, unfinished, filters)

    def _query(self, what: str, runs: Runs, unfinished: bool, filters: Mapping[str, Any]) -> pd.DataFrame:
        named = [runs] if isinstance(runs, Run | str) else runs
        asked = dict.fromkeys(self.ids(unfinished)) if named is None else {self.id(run): run for run in named}
        chosen, rest = frames.select(self._runs(asked, unfinished), filters)
        columns = frames.TABLES[what]
        rows, unknown = frames.select(frames.merge(chosen, self._tables(chosen["id"], what), columns), rest)
        frames.refuse_unknown(unknown, rows)
        return rows.reset_index(drop=True)

    def _runs(self, runs: Mapping[str, Run | str | None], unfinished: bool) -> pd.DataFrame:
        """One row per run: id, status and settings, which are those that are asked for."""
        found = []
        for run_id, run in runs.items():
            status = self.status(run_id)
            if (unfinished or status in ("complete", "failed")) and (known := self.place(run_id).manifest()):
                if isinstance(run, Run):
                    known.check(run)
                found.append((run_id, status, known.run, known.versions))
        return frames.settings_frame(found)

    def weights(self, run: Run | str) -> dict[str, np.ndarray]:
        """Parameters and buffers of the final network of a complete run, by name."""
        return self._tensors(run, "weights")

    def masks(self, run: Run | str) -> dict[str, np.ndarray]:
        """The final masks of a complete run: parameter name -> bool array of its shape, True = keep."""
        return self._tensors(run, "masks")

    def removals(self, run: Run | str) -> dict[str, np.ndarray]:
        """The record of every removal of a complete run; empty where none was kept."""
        return self._tensors(run, "removals")

    def _tensors(self, run: Run | str, what: str) -> dict[str, np.ndarray]:
        self._manifest(run)
        place = self.place(self.id(run))
        if not place.folder.is_dir():
            reason = place.reason()
            raise StoreError(f"{place.id} has no {what}: it {f'failed ({reason})' if reason else 'is not finished'}")
        tensors = place.tensors(what)
        if problem := records.misfit(*({what: tensors}.get(name, {}) for name in ("weights", "masks", "removals"))):
            raise records.Damaged(f"{place.folder / what}.safetensors is damaged ({problem})")
        return tensors

    def size(self, run: Run | str) -> int:
        """Bytes on disk of a run."""
        place = self.place(self.id(run))
        return sum(records.tree_size(folder) for folder in (place.folder, place.partial) if folder.is_dir())

    def list(self) -> pd.DataFrame:
        """One row per run in any state, for a person to look through.

        Returns:
            id, status, data, model, method, seed, rounds (finished ones), best_test_accuracy and last_test_accuracy
            (over its rounds), seconds (training and pruning), bytes (on disk), finished (time of the last round).
        """
        runs = self._runs(dict.fromkeys(self.ids(unfinished=True)), unfinished=True)
        rounds = frames.merge(runs[["id"]], self._tables(runs["id"], "rounds"), frames.ROUNDS)
        rounds["seconds"] = rounds["seconds"].fillna(0) + rounds["prune_seconds"].fillna(0)
        summary = rounds.groupby("id", sort=False).agg(
            rounds=("round", "size"),
            best_test_accuracy=("test_accuracy", "max"),
            last_test_accuracy=("test_accuracy", "last"),
            seconds=("seconds", "sum"),
            finished=("finished", "last"),
        )
        listing = runs[["id", "status", "data", "model", "method", "seed"]].join(summary, on="id")
        listing.insert(listing.columns.get_loc("finished"), "bytes", [self.size(run_id) for run_id in listing["id"]])
        listing["rounds"] = listing["rounds"].fillna(0)
        return listing.astype({"rounds": "int64", "bytes": "int64", "finished": frames.TEXT})

    def show(self, run: Run | str) -> dict[str, Any]:
        """Everything about one run, as plain values.

        Returns:
            id, status, folder, bytes, reason (of a failed run, else None), versions, settings (nested), rounds (list of
            rows) and provenance.
        """
        run_id = self.id(run)
        status, place = self.status(run_id), self.place(run_id)
        complete = status == "complete"
        return {
            "id": run_id,
            "status": status,
            "folder": str(place.folder if complete else place.partial),
            "bytes": self.size(run_id),
            "reason": None if complete else place.reason(),
            "settings": self.settings(run).asdict(),
            "versions": dict(getattr(self._manifest(run), "versions", {})),
            "rounds": self._tables([run_id], "rounds")[0].to_pylist(),
            "provenance": place.read("provenance.json", records.decode_json) if complete else {},
        }


def _natural(run_id: str) -> tuple[str, int, str]:
    start, seed, digest = run_id.rsplit("-", 2)
    return start, int(seed[1:]), digest
