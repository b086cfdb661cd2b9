"""From the files of a data set to bytes and pixels: digests, folders and archives, image decoding.

Archives are read in memory and never unpacked, so no member can land outside a folder. What cannot be read ends in one
``DataError`` that names the file.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prunelab.errors import PrunelabError, first_line

IMAGES = frozenset((".bmp", ".dib", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
IMAGES |= {".avif", ".j2k", ".jfif", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".tga"}
CLUTTER = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))  # what file managers leave in every folder
BROKEN = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)

Named = tuple[str, bytes]  # the name of a file and its content


class DataError(PrunelabError):
    """Data that cannot be had, read or divided as asked."""


class DataWarning(UserWarning):
    """Files that were not read, or not whole, in one line."""


def say(where: Path, what: str, names: Sequence[str]) -> None:
    """Warn of files, by the first three names and their number; nothing where there are none."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        files = f"{len(names)} file{'s' * (len(names) > 1)}"
        warnings.warn(f"{where}: {files} {what}: {', '.join(names[:3])}{more}", DataWarning, stacklevel=2)


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


def members(
    place: Path, wanted: Callable[[PurePosixPath], object], left: list[str] | None = None
) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Every visible folder (None) and wanted file (its bytes) of a folder, zip or tar, by its name in there.

    Links of a folder are followed; those of a tar as far as they point to one of its files. Names are in Unicode's
    composed form (NFC), as a Mac writes them otherwise.

    Args:
        place: The folder or archive.
        wanted: By its name, whether a file is read.
        left: Gets the names of files that are hidden, or links to nothing in the archive.

    Raises:
        DataError: it is missing, truncated, corrupt or of another kind, or a member points outside it.
    """
    if not place.exists():
        raise DataError(f"{place}: no such file or folder: give the path of a folder, zip or tar")
    walk = _walk_folder if place.is_dir() else _walk_zip if place.suffix.lower() == ".zip" else _walk_tar
    left = [] if left is None else left
    try:
        for name, read in walk(place):
            path = PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/")))
            if path.is_absolute() or ".." in path.parts:
                raise DataError(
                    f"{place}: member {name!r} points outside the archive: make the archive again without it"
                )
            if path.name in CLUTTER or path.name.startswith("._") or "__MACOSX" in path.parts:
                continue
            if any(part.startswith(".") for part in path.parts):
                left += [str(path)] * (read is not None)
            elif read is None:
                yield path, None
            elif wanted(path):
                try:
                    yield path, read()
                except KeyError:  # a link in a tar to what is not there
                    left.append(str(path))
    except BROKEN as error:
        raise DataError(f"{place}: not a readable folder, zip or tar ({first_line(error)}): fetch it again") from None


def _walk_folder(
    place: Path, name: str = "", above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    real = f"{os.path.realpath(place)}/"
    never_ends = any(folder.startswith(real) for folder in above)  # a link to a folder above
    for path in sorted(() if never_ends else place.iterdir()):
        own = f"{name}{path.name}"
        if path.is_dir():
            yield own, None
            yield from _walk_folder(path, f"{own}/", above | {real})
        else:
            yield own, path.read_bytes


def _walk_zip(place: Path) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    with zipfile.ZipFile(place) as archive:
        for entry in archive.infolist():
            yield entry.filename, None if entry.is_dir() else lambda entry=entry: archive.read(entry)


def _walk_tar(place: Path) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    with tarfile.open(place) as archive:
        for entry in archive:
            if entry.isdir():
                yield entry.name, None
            elif entry.isfile() or entry.islnk() or entry.issym():
                yield entry.name, partial(_read_member, archive, entry)
        # tarfile takes a cut or a damaged header for the end; the true end is a block of zeros. Reading on to the last
        # byte makes a compressed file check its checksum.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("it is damaged or its end is missing")
        while archive.fileobj.read(1 << 20):
            pass


def _read_member(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    """The bytes of a file in a tar, or of the file there that a link points to; KeyError where there is none."""
    if (stream := archive.extractfile(entry)) is None:
        raise KeyError(entry.name)
    return stream.read()


def decode(images: Sequence[Named], where: Path) -> Tensor:
    """Decode image files of one size.

    Args:
        images: Name and content of each file.
        where: The folder or archive they are from, for the error message.

    Returns:
        uint8 [N, C, H, W], upright as their EXIF orientation says; C is 1 where every image is grey, else 3 (an alpha
        channel is dropped).

    Raises:
        DataError: files are truncated, corrupt or more than 8 bits deep (the first is named, and how many they are), or
            one is of another size than the first; nothing is resized.

    Warns:
        DataWarning: images of several frames, of which the first is taken.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise DataError("Pillow is not installed: pip install 'prunelab[lab]'") from None
    pixels = np.empty((0, 3, 0, 0), np.uint8)
    grey, broken, deep, moving = True, list[tuple[str, str]](), list[str](), list[str]()
    for at, (name, content) in enumerate(tqdm(images, f"decoding {where.name}", leave=False, disable=None)):
        try:
            with Image.open(io.BytesIO(content)) as image:
                mode, tiles = image.mode, str(image.tile)
                moving += [name] * (getattr(image, "n_frames", 1) > 1)
                ImageOps.exif_transpose(image, in_place=True)
                decoded = np.asarray(image if mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            broken.append((name, "not an image" if "cannot identify" in str(error) else first_line(error)))
            continue
        if mode.startswith(("I", "F")) or ";16" in tiles:  # Pillow reads 16-bit colours as 8 bits and says nothing
            deep.append(name)
            continue
        if not len(pixels):
            pixels, first = np.empty((len(images), *decoded.shape), np.uint8), name
        if decoded.shape != pixels.shape[1:]:
            (height, width), (first_height, first_width) = decoded.shape[1:], pixels.shape[2:]
            raise DataError(
                f"{where}: {name} is {width} x {height} pixels, but {first} is {first_width} x {first_height}: "
                "bring all images to one size first"
            )
        pixels[at] = decoded
        grey = grey and mode in ("1", "L", "LA")
    if broken:
        name, reason = broken[0]
        more = f", nor can {len(broken) - 1} others" if len(broken) > 1 else ""
        raise DataError(f"{where}: {name} cannot be decoded ({reason}){more}: fetch the file again")
    if deep:
        more = f" and {len(deep) - 1} others are" if len(deep) > 1 else " is"
        raise DataError(f"{where}: {deep[0]}{more} more than 8 bits deep: convert them to 8 bits per channel")
    say(where, "of several frames, of which the first is read", moving)
    tensor = torch.from_numpy(pixels)
    return tensor[:, :1].contiguous() if grey else tensor
