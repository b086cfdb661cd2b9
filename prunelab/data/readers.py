"""Readers of each format a data set comes in: image trees, Tiny ImageNet, IDX, CIFAR, scikit-learn's own.

A reader takes one place (a folder or an archive), keeps everything in memory and leaves nothing on the disk.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import pickletools
import struct
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelab.data.files import BROKEN, IMAGES, DataError, Named, decode, file_digest, members, say
from prunelab.errors import first_line

Tree = Mapping[str, Mapping[str, list[Named]]]  # part -> class -> image files


@dataclass(frozen=True)
class Raw:
    """A data set as its source has it, before any split or scaling.

    Attributes:
        source: What to write beside every number, such as ``"CIFAR-10 (JPEG)"``.
        classes: Names of the classes; label k is ``classes[k]``.
        tensors: ``train_x``, ``train_y`` and, where the source has a test part, ``test_x``, ``test_y``; x is uint8
            [N, C, H, W] or float32 [N, F], y is int64 [N], or float32 [N, outputs] where numbers are to be met.
        files: Name of each source file -> its sha256.
        peak: The largest value that a pixel can have.
    """

    source: str
    classes: tuple[str, ...]
    tensors: dict[str, Tensor]
    files: dict[str, str] = field(default_factory=dict)
    peak: int = 255


def check_labels(y: Tensor, classes: int, where: str) -> None:
    """Refuse labels outside 0 .. classes - 1.

    Raises:
        DataError: names the first wrong label.
    """
    wrong = ((y < 0) | (y >= classes)).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{where}: label {int(y[at])} of sample {at} is out of range 0..{classes - 1}: fetch the file again"
        )


def _decode_tree(tree: Tree, classes: Sequence[str], source: str, place: Path, files: dict[str, str]) -> Raw:
    """Decode both parts. A tree comes class by class; a fixed permutation mixes it, for training without shuffling."""
    images: list[Named] = []
    labels: dict[str, Tensor] = {}
    for part in ("train", "test"):
        if not tree.get(part):
            raise DataError(
                f"{place}: no {part}/<class>/ folder in it: lay it out as train/<class>/1.png and test/<class>/1.png"
            )
        if empty := [name for name in classes if not tree[part].get(name)]:
            what = f"class {empty[0]!r} has no image in its {part} part"
            raise DataError(f"{place}: {what}: add one, or remove the class from both parts")
        entries = [(k, image) for k, name in enumerate(classes) for image in sorted(tree[part][name])]
        order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0)).tolist()
        images += [entries[i][1] for i in order]
        labels[part] = torch.tensor([entries[i][0] for i in order])
    x = decode(images, place)
    train, test = labels["train"], labels["test"]
    tensors = {"train_x": x[: len(train)], "train_y": train, "test_x": x[len(train) :], "test_y": test}
    return Raw(source, tuple(classes), tensors, files or _folder_digest(place, tree))


def _archive_digest(place: Path) -> dict[str, str]:
    return {place.name: file_digest(place)} if place.is_file() else {}


def _folder_digest(place: Path, tree: Tree) -> dict[str, str]:
    """One digest over the names and contents of all images."""
    digest = hashlib.sha256()
    for name, content in sorted(image for part in tree.values() for images in part.values() for image in images):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return {f"{place.name}/": digest.hexdigest()}


def read_tree(place: Path, title: str, jpeg_title: str | None = None) -> Raw:
    """Read ``{train,test}/<class>/image`` at the top of a folder, zip or tar, or one folder below; classes by alphabet.

    Args:
        place: The folder or archive.
        title: The source to name beside numbers.
        jpeg_title: The one to name instead where the images are JPEG files, which is lossy.

    Raises:
        DataError: see ``members`` and ``decode``; or a class has no image in one of the parts.
    """
    files = _archive_digest(place)  # before anything is decoded
    tree: dict[str, dict[str, list[Named]]] = defaultdict(lambda: defaultdict(list))
    left: list[str] = []

    def place_in(name: PurePosixPath) -> int | None:
        """Where the part stands in the name of a file or folder: at the top, or one folder below."""
        return next((i for i, part in enumerate(name.parts[:2]) if part in ("train", "test")), None)

    def wanted(name: PurePosixPath) -> bool:
        at = place_in(name)
        read = name.suffix.lower() in IMAGES and at is not None and len(name.parts) > at + 2
        if at is not None and not read and (len(name.parts) > at + 2 or name.suffix.lower() in IMAGES):
            left.append(str(name))
        return read

    for name, content in members(place, wanted, left):
        if (top := place_in(name)) is None or len(name.parts) < top + 2:
            continue
        images = tree[name.parts[top]][name.parts[top + 1]]
        if content is not None:
            images.append((str(name), content))
    say(place, "left out, hidden or not an image in a class folder", left)
    names = [name for part in tree.values() for images in part.values() for name, _ in images]
    lossy = any(name.lower().endswith((".jpg", ".jpeg")) for name in names)
    classes = sorted({name for part in tree.values() for name in part})
    return _decode_tree(tree, classes, jpeg_title if lossy and jpeg_title else title, place, files)


def read_tiny_imagenet(place: Path) -> Raw:
    """Read Tiny ImageNet in its own layout; its validation part becomes the test part, the unlabelled one is left out.

    Raises:
        DataError: see ``members`` and ``decode``; or a list is missing, or names a class or an image that is not there.
    """
    files = _archive_digest(place)
    lists: dict[str, str] = {}
    train: dict[str, list[Named]] = defaultdict(list)
    test: dict[str, list[Named]] = defaultdict(list)
    held: dict[str, Named] = {}
    for name, content in members(place, lambda name: name.suffix in (".JPEG", ".txt") and "test" not in name.parts[:2]):
        parts = name.parts[1:] if name.parts[0] == "tiny-imagenet-200" else name.parts
        match parts, content:
            case ("wnids.txt",) | ("val", "val_annotations.txt"), bytes():
                lists[name.name] = content.decode(errors="replace")
            case ("train", wnid, "images", _), bytes():
                train[wnid].append((str(name), content))
            case ("val", "images", file), bytes():
                held[file] = (str(name), content)
    for needed in ("wnids.txt", "val_annotations.txt"):
        if needed not in lists:
            raise DataError(f"{place}: no {needed} in it: give the folder, zip or tar of tiny-imagenet-200")
    classes = lists["wnids.txt"].split()
    for line in lists["val_annotations.txt"].splitlines():
        file, wnid = [*line.split("\t"), ""][:2]
        if wnid not in classes:
            raise DataError(
                f"{place}: val_annotations.txt: label {wnid!r} of {file} is not in wnids.txt: fetch it again"
            )
        if file not in held:
            raise DataError(f"{place}: val_annotations.txt: image {file} is not there: fetch it again")
        test[wnid].append(held[file])
    title = "Tiny ImageNet" if sum(map(len, train.values())) == 100_000 else "Tiny ImageNet (subset)"
    return _decode_tree({"train": train, "test": test}, classes, title, place, files)


def _read_idx_file(folder: Path, name: str, dimensions: int, files: dict[str, str]) -> Tensor:
    """One IDX file, or its ``.gz``: big-endian magic 0x0000080D for D dimensions of bytes, D sizes, then the bytes."""
    packed = folder / f"{name}.gz"
    file = packed if packed.is_file() and not (folder / name).is_file() else folder / name
    files[file.name] = file_digest(file)
    try:
        content = gzip.decompress(file.read_bytes()) if file == packed else file.read_bytes()
    except BROKEN as error:
        raise DataError(f"{file}: truncated or corrupt ({first_line(error)}): fetch the file again") from None
    header = 4 + 4 * dimensions
    if len(content) < header or struct.unpack(">I", content[:4])[0] != 0x0800 + dimensions:
        raise DataError(f"{file}: not an IDX file of bytes with {dimensions} dimensions: fetch the file again")
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) != (promised := header + math.prod(sizes)):
        raise DataError(
            f"{file}: truncated or corrupt: {len(content)} bytes, its header promises {promised}: fetch the file again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy())


def read_idx(place: Path, title: str, classes: tuple[str, ...]) -> Raw:
    """Read the four IDX files of MNIST or Fashion-MNIST, plain or gzipped, from ``place`` or ``place/raw``.

    Raises:
        DataError: a file is missing, truncated, corrupt or not what SHA256SUMS lists, or a label is out of range.
    """
    folder = place / "raw" if (place / "raw").is_dir() else place
    tensors: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        images, labels = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
        tensors[f"{part}_x"] = _read_idx_file(folder, images, 3, files).unsqueeze(1)
        tensors[f"{part}_y"] = _read_idx_file(folder, labels, 1, files).long()
        check_labels(tensors[f"{part}_y"], len(classes), str(folder / labels))
    return Raw(title, classes, tensors, files)


def read_cifar(place: Path, title: str, kind: str, folder: str, archive: str) -> Raw:
    """Read CIFAR-10 or CIFAR-100: the original (its ``folder`` or the ``archive`` it came in), or a tree of images.

    The md5 of every original file is compared before it is opened. They are pickles, and are not unpickled.

    Raises:
        DataError: a file is missing or corrupt, or torchvision is.
    """
    if place.name == archive and place.is_file():
        if not torchvision().datasets.utils.check_integrity(place, getattr(torchvision().datasets, kind).tgz_md5):
            raise DataError(f"{place}: truncated, corrupt or another file (wrong md5): fetch it again")
        with tempfile.TemporaryDirectory() as unpacked, tarfile.open(place) as packed:
            packed.extractall(unpacked, filter="data")
            return read_cifar(Path(unpacked), title, kind, folder, archive)
    place = place.parent if place.name == folder else place
    if not (place / folder).is_dir():
        return read_tree(place, title, f"{title} (JPEG)")
    files = {file.name: file_digest(file) for file in sorted((place / folder).iterdir()) if file.is_file()}
    tensors: dict[str, Tensor] = {}
    classes: tuple[str, ...] = ()
    original, intact = getattr(torchvision().datasets, kind), torchvision().datasets.utils.check_integrity

    def read(name: str, md5: str) -> dict[str, list[Any]]:
        if not intact(place / folder / name, md5):
            raise DataError(f"{place / folder}: {name} is incomplete or corrupt: fetch {archive} again")
        return _pickled(
            place / folder / name, ("data", "labels", "fine_labels", "coarse_labels", meta["key"], "filenames")
        )

    meta = original.meta
    classes = [str(name) for name in read(meta["filename"], meta["md5"])[meta["key"]]]
    tensors: dict[str, Tensor] = {}
    for part, listed in (("train", original.train_list), ("test", original.test_list)):
        batches = [read(*entry) for entry in listed]
        y = [label for batch in batches for label in batch.get("labels") or batch["fine_labels"]]
        x = b"".join(
            max((own for own in batch["data"] if isinstance(own, bytes)), key=len, default=b"") for batch in batches
        )
        if len(x) != 3072 * len(y):
            raise DataError(f"{place / folder}: {len(x)} bytes of images for {len(y)} labels: fetch {archive} again")
        pixels = np.frombuffer(x, np.uint8).reshape(-1, 3, 32, 32)
        tensors |= {f"{part}_x": torch.from_numpy(pixels.copy()), f"{part}_y": torch.tensor(y)}
    return Raw(title, tuple(classes), tensors, files)


def _pickled(file: Path, keys: Sequence[str]) -> dict[str, list[Any]]:
    """The numbers, texts and bytes behind each key of a dictionary in a pickle, read one operation after the other.

    Nothing is unpickled: operations that would build an object or call a function are passed over, so a file can give
    wrong numbers at worst. What an array holds is among the bytes behind its key.
    """
    found: dict[str, list[Any]] = {}
    own: list[Any] = []
    for operation, value, _ in pickletools.genops(file.read_bytes()):
        number = operation.name in ("BININT", "BININT1", "BININT2", "INT", "LONG1")
        content = any(kind in operation.name for kind in ("STRING", "UNICODE", "BYTE"))
        if content and value in keys and value not in found:
            own = found.setdefault(value, [])
        elif content and own is found.get("data"):  # texts too, as which some versions write bytes
            own.append(value.encode("latin-1", "replace") if isinstance(value, str) else bytes(value))
        elif content or number:
            own.append(value)
    return found


def read_sklearn(_: Path, name: str) -> Raw:
    """Iris (150 flowers, four lengths in cm) or Digits (1,797 images of 8 x 8, pixels 0..16), from scikit-learn.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise DataError(f"{name} ships in scikit-learn, which is not installed: pip install 'prunelab[lab]'") from None
    bunch = datasets.load_iris() if name == "iris" else datasets.load_digits()
    y = torch.from_numpy(bunch.target).long()
    if name == "iris":
        return Raw(
            "Iris", tuple(map(str, bunch.target_names)), {"train_x": torch.from_numpy(bunch.data).float(), "train_y": y}
        )
    x = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    return Raw("Digits", tuple(map(str, bunch.target_names)), {"train_x": x, "train_y": y}, peak=16)


def read_sparse_regression(_: Path) -> Raw:
    """DropNeuron's regression (regression.py): y = X w, X from 10 N(0, 1) [., 20], two of the 20 w from 10 N(0, 1).

    No noise. 500 samples to learn and 500 to test, as published; 100 more at the head of the learning part are ours, to
    hold out. The draw is our own, from a fixed seed: its two positions differ, which the published draw leaves open.
    """
    draw = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(1100, 20, generator=draw)
    w = torch.zeros(20, 1)
    w[torch.randperm(20, generator=draw)[:2]] = 10 * torch.randn(2, 1, generator=draw)
    y = x @ w
    parts = {"train_x": x[:600], "train_y": y[:600], "test_x": x[600:], "test_y": y[600:]}
    return Raw("Sparse regression (generated)", ("y",), {name: part.clone() for name, part in parts.items()})


def torchvision() -> Any:
    """The module, imported when it is first needed.

    Raises:
        DataError: it is not installed, or was built for another torch.
    """
    try:
        import torchvision
        import torchvision.datasets
    except ModuleNotFoundError:
        raise DataError("torchvision is not installed: pip install 'prunelab[lab]'") from None
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise DataError(
            f"torch and torchvision come from different indexes and do not fit together ({first_line(error)}): "
            "reinstall both at once, pip install --force-reinstall torch torchvision"
        ) from None
    return torchvision
