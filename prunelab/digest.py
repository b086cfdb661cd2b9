"""Files that hold the digest of their own bytes, so that a damaged one is known before a number of it is used.

In a JSON file, and in the header of a safetensors file, stands ``"sha256_of_this": "<64 hex digits>"``: the SHA-256 of
the file (of a safetensors file: of its header) in which these digits are zeros. A safetensors header holds the SHA-256
of the tensors behind it too, so that it can be trusted before they are read. It tells damage, not who wrote the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from prunelab.paths import replacing

THIS, REST = "sha256_of_this", "sha256_of_tensors"
BLANK = "0" * 64
IN_TENSORS = {THIS: BLANK, REST: BLANK}  # metadata of a safetensors file that will be sealed
_STANDS = {key: re.compile(rf'"{key}": ?"([0-9a-f]{{64}})"'.encode()) for key in (THIS, REST)}
_PIECE = 1 << 20


def of(file: BinaryIO | Path | bytes) -> str:
    """The SHA-256 of bytes, of a file, or of what is left of an open file, as 64 hex digits."""
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return of(opened)
    found = hashlib.sha256()
    while piece := file.read(_PIECE):
        found.update(piece)
    return found.hexdigest()


def head(file: BinaryIO) -> bytes:
    """The header of a safetensors file with the 8 bytes before it; any other file whole."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    return start + file.read(length if len(start) == 8 and 8 + length <= size else size)


def seal(file: BinaryIO) -> None:
    """Write the digests of a file into it, where ``BLANK`` stands for them."""
    start = head(file)
    start = _with(start, REST, of(file))
    file.seek(0)
    file.write(_with(start, THIS, of(start)))


def sealed(data: bytes) -> bytes:
    """The content of a file with its digests where ``BLANK`` stood for them."""
    file = io.BytesIO(data)
    seal(file)
    return file.getvalue()


@contextlib.contextmanager
def sealing(path: Path) -> Iterator[Path]:
    """``paths.replacing``, of a file that is sealed when the block ends."""
    with replacing(path) as part:
        yield part
        with part.open("r+b") as file:
            seal(file)


def metadata(start: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file.

    Args:
        start: The bytes of the file, or of its ``head``.

    Raises:
        ValueError: it has no header.
    """
    length = int.from_bytes(start[:8], "little")
    found = json.loads(start[8 : 8 + length] if len(start) >= 8 + length else b"")
    if not isinstance(found, dict) or not isinstance(found.get("__metadata__", {}), dict):
        raise ValueError("its header is none of a safetensors file")
    return found.get("__metadata__", {})


def check(file: BinaryIO | Path | bytes, whole: bool = True) -> bool:
    """Compare the digests that a file holds with its bytes.

    Args:
        file: What to check.
        whole: False: of a safetensors file only the header.

    Returns:
        Whether it holds any; nothing is known of a file without.

    Raises:
        ValueError: the bytes are not those that were written.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return check(opened, whole)
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    start = head(file)
    stands = _STANDS[THIS].search(start)
    if stands is None:
        return False
    rest = _STANDS[REST].search(start)
    if of(_with(start, THIS, BLANK)).encode() != stands[1] or (whole and rest and of(file).encode() != rest[1]):
        raise ValueError("its bytes are not those that were written")
    return True


def _with(start: bytes, key: str, digits: str) -> bytes:
    found = _STANDS[key].search(start)
    return start[: found.start(1)] + digits.encode() + start[found.end(1) :] if found else start
