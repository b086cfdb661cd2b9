"""From the files of a data set to bytes and pixels: digests, folders and archives, image decoding.

Archives are read in memory and never unpacked, so no member can land outside a folder. What cannot be read ends in one
``DataError`` that names the file.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prunelab.errors import PrunelabError, first_line

IMAGES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
BROKEN = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)

Named = tuple[str, bytes]  # the name of a file and its content


class DataError(PrunelabError):
    """Data that cannot be had, read or divided as asked."""


def file_digest(file: Path) -> str:
    """The sha256 of a file, compared with the ``SHA256SUMS`` of a folder above it where there is one.

    Raises:
        DataError: the file cannot be read, or is not the one that SHA256SUMS lists.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}: give the path of a file that can be read") from None
    found = digest.hexdigest()
    for folder in file.absolute().parents[:4]:
        if not (folder / "SHA256SUMS").is_file():
            continue
        lines = [line.split(maxsplit=1) for line in (folder / "SHA256SUMS").read_text().splitlines()]
        sums = {line[1].strip().lstrip("*"): line[0] for line in lines if len(line) == 2}
        expected = sums.get(file.absolute().relative_to(folder).as_posix(), found)
        if expected != found:
            what = f"wrong digest: sha256 {found[:12]}..., SHA256SUMS says {expected[:12]}..."
            raise DataError(f"{file}: {what}: fetch the file again")
    return found


def members(place: Path, wanted: Callable[[PurePosixPath], object]) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Every visible folder (None) and wanted regular file (its bytes) of a folder, zip or tar, by its name in there.

    Raises:
        DataError: it is missing, truncated, corrupt or of another kind, or a member points outside it.
    """
    if not place.exists():
        raise DataError(f"{place}: no such file or folder: give the path of a folder, zip or tar")
    walk = _walk_folder if place.is_dir() else _walk_zip if place.suffix.lower() == ".zip" else _walk_tar
    try:
        for name, read in walk(place):
            path = PurePosixPath(name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise DataError(
                    f"{place}: member {name!r} points outside the archive: make the archive again without it"
                )
            if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
                continue
            if read is None:
                yield path, None
            elif wanted(path):
                yield path, read()
    except BROKEN as error:
        raise DataError(f"{place}: not a readable folder, zip or tar ({first_line(error)}): fetch it again") from None


def _walk_folder(place: Path) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    for path in sorted(place.rglob("*")):
        yield path.relative_to(place).as_posix(), None if path.is_dir() else path.read_bytes


def _walk_zip(place: Path) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    with zipfile.ZipFile(place) as archive:
        for entry in archive.infolist():
            yield entry.filename, None if entry.is_dir() else lambda entry=entry: archive.read(entry)


def _walk_tar(place: Path) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    with tarfile.open(place) as archive:
        for entry in archive:
            if entry.isdir():
                yield entry.name, None
            elif entry.isfile() and (stream := archive.extractfile(entry)):
                yield entry.name, stream.read
        # tarfile takes a cut or a damaged header for the end; the true end is a block of zeros. Reading on to the last
        # byte makes a compressed file check its checksum.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("it is damaged or its end is missing")
        while archive.fileobj.read(1 << 20):
            pass


def decode(images: Sequence[Named], where: Path) -> Tensor:
    """Decode image files of one size.

    Args:
        images: Name and content of each file.
        where: The folder or archive they are from, for the error message.

    Returns:
        uint8 [N, C, H, W]; C is 1 where every image is grey, else 3 (an alpha channel is dropped).

    Raises:
        DataError: a file is truncated, corrupt, not 8 bits deep, or of another size than the first; nothing is resized.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise DataError("Pillow is not installed: pip install 'prunelab[lab]'") from None
    pixels = np.empty((0, 3, 0, 0), np.uint8)
    grey = True
    for at, (name, content) in enumerate(tqdm(images, f"decoding {where.name}", leave=False, disable=None)):
        try:
            with Image.open(io.BytesIO(content)) as image:
                mode = image.mode
                decoded = np.asarray(image if mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "not an image" if "cannot identify" in str(error) else first_line(error)
            raise DataError(f"{where}: {name} cannot be decoded ({reason}): fetch the file again") from None
        if mode.startswith(("I", "F")):
            raise DataError(f"{where}: {name} is not 8 bits deep (mode {mode}): convert it to 8 bits per channel")
        if at == 0:
            pixels = np.empty((len(images), *decoded.shape), np.uint8)
        if decoded.shape != pixels.shape[1:]:
            (height, width), (first_height, first_width) = decoded.shape[1:], pixels.shape[2:]
            raise DataError(
                f"{where}: {name} is {width} x {height} pixels, but {images[0][0]} is {first_width} x {first_height}: "
                "bring all images to one size first"
            )
        pixels[at] = decoded
        grey = grey and mode in ("1", "L", "LA")
    tensor = torch.from_numpy(pixels)
    return tensor[:, :1].contiguous() if grey else tensor
