"""The files of a run: how each is written, read, and what is said when that goes wrong.

Tensors are safetensors, rows are parquet, the rest is JSON; nothing is ever unpickled. What is written goes through
``write``, what is read through ``read``, so that a full disk or a damaged file is one line with its remedy everywhere.
``settings.json`` of a complete run holds its own digest and those of all other files; a checkpoint and a record of
failure hold their own. Nothing is decoded before its digest was compared.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from prunelab import digest
from prunelab.errors import PrunelabError, first_line
from prunelab.paths import replacing
from prunelab.runs import frames
from prunelab.settings import Run, SettingsError, differences

FORMAT = 2  # of what is written; format 1 is read too, it has no digests; a higher number is refused
LARGEST_TABLE = 2**30  # bytes that rows may unpack to
SETTINGS, CHECKPOINT, FAILED = "settings.json", "checkpoint.safetensors", "failed.json"
FILES = (  # of a complete run; only removals may be absent
    SETTINGS,
    "rounds.parquet",
    "epochs.parquet",
    "provenance.json",
    "weights.safetensors",
    "masks.safetensors",
    "removals.safetensors",
)

Tensors = Mapping[str, np.ndarray]
T = TypeVar("T")


class StoreError(PrunelabError):
    """A run that is not there, a damaged file, or a store that cannot be written."""


class Damaged(StoreError):  # noqa: N818 (as Busy: what is the case)
    """A file that is not what was written, or is gone; its run has to be trained again."""

    @property
    def what(self) -> str:
        """What is wrong, without the remedy."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.what}: 'prunelab runs check --repair' drops the run, and it is trained again when needed"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Everything that the next round starts from, and the rows of all rounds so far.

    Attributes:
        tensors: Weights, masks, optimiser and generator states, under names of the writer's choice.
        state: Values that JSON knows; tuples come back as lists, numpy scalars as Python's.
        rounds: One row per finished round, column -> value; ``round`` is required.
        epochs: One row per finished epoch; ``round`` and ``epoch`` are required.
    """

    tensors: Tensors
    state: Mapping[str, Any]
    rounds: list[dict[str, Any]]
    epochs: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a run says of itself: in ``settings.json``, in its checkpoint, or in the record of its failure.

    Attributes:
        run: Its settings.
        versions: Of the method, the model and the reader of the data that made it; what is left out has version 1.
        files: Of a complete run: name -> SHA-256 and bytes; None: made before there were digests.
        digests: Whether its files have digests.
        rounds: Of a run in progress: its rows so far, the rows of epochs likewise.
        reason: Why it failed.
    """

    run: Run
    versions: Mapping[str, int]
    files: Mapping[str, tuple[str, int]] | None = None
    digests: bool = False
    rounds: Sequence[dict[str, Any]] = ()
    epochs: Sequence[dict[str, Any]] = ()
    reason: str | None = None

    def check(self, run: Run) -> None:
        """Refuse settings that have the same id as these and are others: an id holds 32 bits of them.

        Raises:
            StoreError: they differ.
        """
        if self.run != run and (mine := differences(self.run)) != (theirs := differences(run)):
            other = {key: mine.get(key, "default") for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)}
            raise StoreError(f"{run.id} is stored with other settings ({other}): set PRUNELAB_RUNS to another store")

    def made_otherwise(self, versions: Mapping[str, int]) -> str:
        """In words, what was made by another version than ``versions`` say there is now; empty where nothing was."""
        before = {name: self.versions.get(name, 1) for name in versions}
        odd = [f"{name} of version {before[name]}, now {now}" for name, now in versions.items() if now != before[name]]
        return f"{self.run.id} was made by another version ({', '.join(odd)})" if odd else ""


def encode_json(value: Mapping[str, Any], seal: bool = False) -> bytes:
    """JSON that a person can read, the same bytes for equal values; with its own digest, if ``seal``."""
    value = {**value, digest.THIS: digest.BLANK} if seal else value
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    return digest.sealed(data) if seal else data


def encode_rows(table: pa.Table) -> bytes:
    """Parquet for tens of rows, where statistics and dictionaries would be most of the file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return sink.getvalue()


def encode_tensors(tensors: Tensors, record: Mapping[str, Any] | None = None) -> bytes:
    """Safetensors; with ``record`` as JSON in the metadata, and digests of it and of the tensors.

    Raises:
        PrunelabError: an array of a type that safetensors does not keep.
    """
    # safetensors writes memory as it lies, so a transposed view would come back scrambled.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise PrunelabError(
                f"tensor {name!r} is {array.dtype}: only bool, integers and floats to 64 bits can be stored"
            )
    if record is None:
        return safetensors.save(arrays)
    return digest.sealed(safetensors.save(arrays, {"prunelab": json.dumps(record), **digest.IN_TENSORS}))


def decode_json(data: bytes) -> dict[str, Any]:
    """A JSON file that holds a mapping, in which its own digest is compared."""
    found = digest.check(data)
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    if value.get("format") == FORMAT and not found:
        raise ValueError("its digest is gone")
    return value


def decode_record(start: bytes) -> dict[str, Any]:
    """The record in the header of a safetensors file; the header is enough."""
    found = digest.check(start, whole=False)
    record = json.loads(digest.metadata(start)["prunelab"])
    if record["format"] == FORMAT and not found:
        raise ValueError("its digest is gone")
    return record


def decode_checkpoint(data: bytes) -> Checkpoint:
    """A whole checkpoint."""
    digest.check(data)
    record = decode_record(data)
    return Checkpoint(decode_tensors(data), record["state"], record["rounds"], record["epochs"])


def decode_rows(columns: Mapping[str, frames.Kind]) -> Callable[[bytes], pa.Table]:
    """A reader of parquet with these columns; many files are read at once in threads, so each takes only one."""

    def decode(data: bytes) -> pa.Table:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            parts = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            if max(sum(parts), file.metadata.num_rows) > LARGEST_TABLE:
                raise ValueError(f"unpacks to {sum(parts):,} bytes")
            return frames.checked(file.read(use_threads=False), columns)

    return decode


def decode_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by name."""
    return dict(sorted(safetensors.load(data).items()))


def read(path: Path, decode: Callable[[bytes], T], sha256: str | None = None, start: bool = False) -> T:
    """``decode`` of the bytes of a file, where everything that can be wrong with it is one line with the remedy.

    Args:
        path: Of the file.
        decode: Takes its bytes.
        sha256: That they should have; None: unknown.
        start: Read only the header of a safetensors file.

    Raises:
        FileNotFoundError: only this one is left to the caller, who may know why.
        Damaged: the bytes are not those that were written, or mean nothing.
        StoreError: the file cannot be read now.
    """
    try:
        with path.open("rb") as file:
            data = digest.head(file) if start else file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, MemoryError) as error:
        what = getattr(error, "strerror", "") or "no memory"
        hint = "change its permissions, or PRUNELAB_RUNS to another store"
        raise StoreError(f"{path} cannot be read now ({what}): {hint}") from None
    try:
        if sha256 is not None and digest.of(data) != sha256:
            raise ValueError("its bytes are not those that were written")
        return decode(data)
    except _UNREADABLE as error:
        raise Damaged(f"{path} is damaged ({first_line(error)})") from None


_UNREADABLE = (  # what decoders say of bytes that mean nothing
    ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, MemoryError, OSError,
    pa.ArrowException, SafetensorError,
)  # fmt: skip


def settings_record(run: Run, versions: Mapping[str, int] | None) -> dict[str, Any]:
    """The settings as they are stored."""
    return {"format": FORMAT, "id": run.id, "run": run.asdict(), "versions": dict(versions or {})}


def manifest(record: Mapping[str, Any], run_id: str, path: Path) -> Manifest:
    """What a record says, checked against the id that its folder has.

    Raises:
        Damaged: it means nothing.
        StoreError: a newer format or newer settings, or a folder that was renamed.
    """
    if record.get("format") not in (1, FORMAT):
        raise StoreError(f"{path} has format {record.get('format')}, not {FORMAT}: it needs another prunelab")
    try:
        run = Run.fromdict(record["run"])
    except (SettingsError, KeyError, TypeError, AttributeError) as error:
        if record["format"] == FORMAT:  # as it was written, so by another prunelab
            raise StoreError(f"{path}: {error}: update prunelab, or delete {path.parent}") from None
        raise Damaged(f"{path} is damaged ({first_line(error)})") from None
    if run.id != run_id and run.id == record.get("id"):
        raise StoreError(f"{path} holds the settings of {run.id}, not of {run_id}: rename the folder back")
    if run.id != run_id:
        raise Damaged(f"{path} is damaged (its settings are not those of {run_id})")
    try:
        versions = {str(name): int(version) for name, version in record.get("versions", {}).items()}
        files = {str(n): (str(sha256), int(size)) for n, (sha256, size) in record.get("files", {}).items()}
        rounds, epochs = (list(map(dict, record.get(name, ()))) for name in ("rounds", "epochs"))
    except _UNREADABLE as error:
        raise Damaged(f"{path} is damaged ({first_line(error)})") from None
    new = record["format"] > 1
    return Manifest(run, versions, files if new else None, new, rounds, epochs, record.get("reason"))


def misfit(weights: Tensors, masks: Tensors, removals: Tensors) -> str:
    """What of the tensors of one run does not fit the others, in words; empty where all fit.

    Masks are bool and have the shapes of their weights; a record of removals has a round (int16) and a score (float32)
    for each entry of the dense network, and says which positions of its axes are left.
    """
    for name, mask in masks.items():
        if mask.dtype != bool:
            return f"the mask of {name} is {mask.dtype}, not bool"
        if name in weights and mask.shape != weights[name].shape:
            return f"the mask of {name} has shape {mask.shape}, the weight {weights[name].shape}"
    for name, array in removals.items():
        part, _, of = name.partition("/")
        other = removals.get(f"{'score' if part == 'round' else 'round'}/{of}")
        if part in ("round", "score"):
            if (
                other is None
                or other.shape != array.shape
                or array.dtype != (np.int16 if part == "round" else np.float32)
            ):
                return f"the removals of {of} are {array.dtype} of shape {array.shape}, without a like {part}"
        elif name.startswith("index."):
            of, _, axis = name.removeprefix("index.").rpartition(".")
            shape = weights[of].shape if of in weights else ()
            if of in weights and (not axis.isdigit() or int(axis) >= len(shape) or array.shape != (shape[int(axis)],)):
                return f"the removals leave {array.shape} positions of {of}, which has shape {shape}"
    return ""


@contextmanager
def writing(where: Path, instead: str = "set PRUNELAB_RUNS to a folder that can") -> Iterator[None]:
    """Turn what the system says about a failed write into one line with the remedy."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            line = f"{where}: {what}; the rounds before are kept: make space ('prunelab runs gc') and run again"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            line = f"{where}: {what}: each run in progress needs one: raise the limit with 'ulimit -n'"
        else:
            line = f"{where} cannot be written ({what}): {instead}"
        raise StoreError(line) from None


def write(path: Path, data: bytes) -> None:
    """Write a file in one step: at any moment, and after any failure, there is the old one or the new one."""
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)


def remove(folder: Path) -> None:
    """Delete a folder of the store, out of sight first, so that no reader sees half of it."""
    with writing(folder):
        trash = Path(tempfile.mkdtemp(prefix=".trash-", dir=folder.parent))
        folder.rename(trash / folder.name)
        shutil.rmtree(trash)


def tree(path: Path) -> Iterator[os.stat_result]:
    """What the system knows of a path and of all below it, without what goes while we look: somebody may train."""
    below = (Path(folder, name) for folder, folders, files in os.walk(path) for name in folders + files)
    for entry in (path, *below):
        try:
            found = entry.stat()
        except FileNotFoundError:
            continue
        yield found


def tree_size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(found.st_size for found in tree(path) if stat.S_ISREG(found.st_mode))
