"""The registry of the data sets known by name: where each lies in a data root, what reads it, how it is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelab.data.files import DataError
from prunelab.data.readers import (
    Raw,
    check_labels,
    read_cifar,
    read_idx,
    read_sklearn,
    read_sparse_regression,
    read_tiny_imagenet,
    read_tree,
    torchvision,
)
from prunelab.registry import Registry

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
TINY_URL, TINY_MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass(frozen=True)
class Source:
    """How to get one data set.

    Attributes:
        title: Its name for people.
        layout: Paths in a data root that hold it (glob patterns), the preferred first; (): it ships with a library.
        read: From a place (a folder or archive) to tensors.
        fetch: Download into an empty folder and return the place to read; None: it cannot be downloaded.
        shape: Shape of one sample, where it is fixed.
        classes: Number of classes, where it is fixed.
        test: Samples that make the test part by default, where the source has none.
        origin: In words, where ``layout`` is ().
        version: Counted up when the reader gives other tensors, so that the data set is prepared again, and stored runs
            on it are made again.
    """

    title: str
    layout: tuple[str, ...]
    read: Callable[[Path], Raw]
    fetch: Callable[[Path], Path] | None = None
    shape: tuple[int, ...] | None = None
    classes: int | None = None
    test: int | None = None
    origin: str = "ships in scikit-learn"
    version: int = 1

    def find(self, root: Path) -> Path | None:
        """Its place in a data root; of several matches the shortest name, so that a whole set beats a subset."""
        for pattern in self.layout:
            if hits := sorted(root.glob(pattern), key=lambda path: (len(path.name), path.name)):
                return hits[0]
        return None

    def check(self, raw: Raw, where: str) -> None:
        """Refuse a data set that is not what its name says, or that no network could learn from.

        Raises:
            DataError: shapes or counts differ, a label is out of range, or a class has no sample.
        """
        if self.classes not in (None, len(raw.classes)):
            raise DataError(
                f"{where}: {len(raw.classes)} classes, {self.title} has {self.classes}: is it the right data set?"
            )
        for part in ("train", "test") if "test_x" in raw.tensors else ("train",):
            x, y = raw.tensors[f"{part}_x"], raw.tensors[f"{part}_y"]
            if len(x) != len(y):
                raise DataError(f"{where}: {len(x)} {part} images but {len(y)} labels: fetch the files again")
            if self.shape not in (None, tuple(x.shape[1:])):
                shapes = f"samples of shape {tuple(x.shape[1:])}, {self.title} has {self.shape}"
                raise DataError(f"{where}: {shapes}: is it the right data set?")
            if y.is_floating_point():
                continue
            check_labels(y, len(raw.classes), where)
            empty = torch.bincount(y, minlength=len(raw.classes)).eq(0).nonzero().flatten().tolist()
            if empty:
                raise DataError(f"{where}: class {raw.classes[empty[0]]!r} has no {part} sample: is the file complete?")


def folder_source(name: str) -> Source:
    """A data set of the reader's own: a ``{train,test}/<class>/image`` tree called NAME, NAME.zip or NAME.tar."""
    return Source(name, (name, f"{name}.zip", f"{name}.tar"), partial(read_tree, title=name))


def _fetch_torchvision(folder: Path, kind: str, below: str = "") -> Path:
    getattr(torchvision().datasets, kind)(folder, download=True)
    return folder / below


def _fetch_tiny_imagenet(folder: Path) -> Path:
    torchvision().datasets.utils.download_url(TINY_URL, folder, md5=TINY_MD5)
    return folder / "tiny-imagenet-200.zip"


def _idx_source(title: str, kind: str, classes: tuple[str, ...]) -> Source:
    read = partial(read_idx, title=title, classes=classes)
    return Source(
        title, (f"{kind}/raw",), read, partial(_fetch_torchvision, kind=kind, below=f"{kind}/raw"), (1, 28, 28), 10
    )


def _cifar_source(title: str, kind: str, folder: str, archive: str, classes: int) -> Source:
    read = partial(read_cifar, title=title, kind=kind, folder=folder, archive=archive)
    layout = (folder, archive, f"{kind.lower()}-jpeg.tar")
    return Source(title, layout, read, partial(_fetch_torchvision, kind=kind), (3, 32, 32), classes)


def _adopted(thing: Any) -> Source:
    """A function of the user's own that gives a data set, as an entry."""
    if isinstance(thing, Source):
        return thing
    if not callable(thing):
        raise DataError(f"{thing!r:.60} should be a function that gives the tensors x, y, or these and test_x, test_y")
    title = getattr(thing, "__name__", type(thing).__name__)
    return Source(title, (), lambda place: _raw(thing(), title), origin="made by a function")


def _raw(made: Any, title: str) -> Raw:
    if isinstance(made, Raw):
        return made
    parts = tuple(made) if isinstance(made, tuple | list) else ()
    if len(parts) not in (2, 4) or not all(isinstance(part, Tensor) for part in parts):
        raise DataError(f"{title} should give x, y, or x, y, test_x, test_y, tensors, not {type(made).__name__}")
    tensors = dict(zip(("train_x", "train_y", "test_x", "test_y"), parts, strict=False))
    for x, y in (parts[:2], parts[2:])[: len(parts) // 2]:
        if not len(x):
            raise DataError(f"{title} gives no samples: should be at least one of every class")
        images = x.dtype == torch.uint8 and x.ndim == 4
        if not (images or (x.dtype == torch.float32 and x.ndim == 2)):
            what = f"{title} gives inputs {x.dtype} {tuple(x.shape)}"
            raise DataError(f"{what}: should be images, uint8 [N, C, H, W], or features, float32 [N, F]")
        if not (y.dtype == torch.int64 and y.ndim == 1) and not (y.dtype == torch.float32 and y.ndim == 2):
            what = f"{title} gives targets {y.dtype} {tuple(y.shape)}"
            raise DataError(f"{what}: should be classes, int64 [N], or numbers, float32 [N, outputs]")
    y = tensors["train_y"]
    classes = y.shape[1] if y.is_floating_point() else int(y.max()) + 1
    return Raw(title, tuple(map(str, range(classes))), tensors)


SOURCES: Registry[Source] = Registry(
    "data set",
    {
        # Test parts of the two that have none: DyPrune's 25 of 150; 297 of 1,797 is our own default and leaves 1,500.
        "iris": Source("Iris", (), partial(read_sklearn, name="iris"), shape=(4,), classes=3, test=25),
        "digits": Source("Digits", (), partial(read_sklearn, name="digits"), shape=(1, 8, 8), classes=10, test=297),
        "sparse_regression": Source(
            "Sparse regression", (), read_sparse_regression, shape=(20,), classes=1, origin="generated"
        ),
        "mnist": _idx_source("MNIST", "MNIST", DIGITS),
        "fashion_mnist": _idx_source("Fashion-MNIST", "FashionMNIST", FASHION),
        "cifar10": _cifar_source("CIFAR-10", "CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz", 10),
        "cifar100": _cifar_source("CIFAR-100", "CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz", 100),
        "tiny_imagenet": Source(
            "Tiny ImageNet",
            ("tiny-imagenet-200", "tiny-imagenet-200*.zip", "tiny-imagenet-200*.tar"),
            read_tiny_imagenet,
            _fetch_tiny_imagenet,
            (3, 64, 64),
        ),
    },
    _adopted,
)
