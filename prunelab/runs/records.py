"""The files of a run: how each is written, read, and what is said when that goes wrong.

Tensors are safetensors, rows are parquet, the rest is JSON; nothing is ever unpickled. What is written goes through
``write`` or ``replace``, what is read through ``read``, so that a full disk or a damaged file is one line with its
remedy everywhere.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors

from prunelab.errors import PrunelabError, first_line
from prunelab.settings import Run, SettingsError

FORMAT = 1  # of the folders; a higher number is refused
CHECKPOINT = "checkpoint.safetensors"
FAILED = "failed.json"
FILES = (  # of a complete run; only removals may be absent
    "settings.json",
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


def plain(value: Any, where: str) -> Any:
    """``value`` as it will be read back from JSON: numpy scalars as Python's, tuples as lists.

    Raises:
        PrunelabError: a key that is not text, or a value that JSON does not know; ``where`` names the place.
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(entry, where) for entry in value]
    if isinstance(value, Mapping):
        # JSON would turn the key 3 into "3" without a word, and a resumed run would not find it.
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise PrunelabError(
                f"{where}: the key {wrong[0]!r} is not text and would change in JSON: use {str(wrong[0])!r}"
            )
        return {key: plain(entry, f"{where}.{key}") for key, entry in value.items()}
    raise PrunelabError(
        f"{where}: JSON cannot keep {type(value).__name__}: give numbers, text, lists or mappings of these"
    )


def encode_json(value: Any) -> bytes:
    """JSON that a person can read, the same bytes for equal values."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def encode_rows(table: pa.Table) -> bytes:
    """Parquet for tens of rows, where statistics and dictionaries would be most of the file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return sink.getvalue()


def encode_tensors(tensors: Tensors, record: Mapping[str, Any] | None = None) -> bytes:
    """Safetensors, with ``record`` as JSON in the metadata.

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
    return safetensors.save(arrays, metadata=None if record is None else {"prunelab": json.dumps(record)})


def decode_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping."""
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def decode_rows(path: Path) -> pa.Table:
    """A parquet file; many are read at once in threads, so each takes only one."""
    with pq.ParquetFile(path, memory_map=True) as file:
        return file.read(use_threads=False)


def decode_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file."""
    return safetensors.load_file(path)


def decode_record(path: Path) -> dict[str, Any]:
    """The record in the metadata of a safetensors file; reads no tensors."""
    with safe_open(path, framework="np") as file:
        return json.loads((file.metadata() or {})["prunelab"])


def read(path: Path, decode: Callable[[Path], T]) -> T:
    """``decode(path)``, where everything that can be wrong with the file is one line with the remedy.

    Raises:
        FileNotFoundError: only this one is left to the caller, who may know why.
        StoreError: the file is damaged or may not be read.
    """
    try:
        return decode(path)
    except FileNotFoundError:
        raise
    except PermissionError:
        raise StoreError(f"{path} may not be read: change its permissions, or PRUNELAB_RUNS to another store") from None
    except (OSError, ValueError, KeyError, pa.ArrowException, SafetensorError) as error:
        raise StoreError(f"{path} is damaged ({first_line(error)}): {remedy(path)}") from None


def remedy(path: Path) -> str:
    """What to do about a damaged file."""
    return f"delete the folder {path.parent} and the run is trained again when it is next asked for"


def settings_record(run: Run) -> dict[str, Any]:
    """The settings as they are stored."""
    return {"format": FORMAT, "id": run.id, "run": run.asdict()}


def settings_from(record: Mapping[str, Any], run_id: str, path: Path) -> Run:
    """The settings in a record, checked against the id that its folder has.

    Raises:
        StoreError: a newer format, settings that no run can have, or those of another run.
    """
    if record.get("format") != FORMAT:
        raise StoreError(
            f"{path} has format {record.get('format')}, not {FORMAT}: it needs another version of prunelab"
        )
    try:
        run = Run.fromdict(record["run"])
    except (SettingsError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: {error}: update prunelab, or {remedy(path)}") from None
    if run.id != run_id:
        raise StoreError(
            f"{path} holds the settings of {run.id}, not of {run_id}: rename the folder back, or {remedy(path)}"
        )
    return run


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
    """Write a file and see it on the disk: a rename that follows must not get there before the bytes do."""
    with writing(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Write a file in one step: at any moment, and after any failure, there is the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    try:
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        write(part, data)
        with writing(path):
            part.replace(path)
    except StoreError:
        with suppress(OSError):
            part.unlink()
        raise


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
