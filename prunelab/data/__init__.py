"""A named data set as tensors in memory, divided into training, validation and test part, and cut into batches.

``load`` looks in three places: the cache of prepared data sets, the data root (``PRUNELAB_DATA``, in torchvision's
layout), a torchvision download. See ``prunelab.data.cache`` for what is kept, ``prunelab.data.sources`` for the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunelab.data.cache import available, fill, made, prepare, read, verify
from prunelab.data.files import DataError
from prunelab.data.readers import Raw
from prunelab.data.sources import SOURCES
from prunelab.errors import first_line
from prunelab.settings import Data

__all__ = ["DataError", "Dataset", "Split", "available", "batches", "load", "order", "prepare", "register", "verify"]


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Attributes:
        x: uint8 images [N, C, H, W], or float32 features [N, F].
        y: Labels, int64 [N]; or what a network has to give as numbers: float32 [N, outputs], or the images themselves.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Split({len(self):,} x {tuple(self.x.shape[1:])}, {self.x.dtype})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set on one device, divided as its settings ask.

    Attributes:
        name: The name it was loaded by.
        source: What to write beside every number, such as ``"CIFAR-10 (JPEG)"``.
        classes: Names of the classes, label k is ``classes[k]``; of the outputs, where these are numbers.
        train: What is learnt from.
        validation: Held out of the training part; no sample where ``Data.validation`` is 0.
        test: For the reported numbers only.
        peak: The largest value a pixel can have: 255, for digits 16.
        shift: Subtracted from images, in pixel values, [C, 1, 1]; None where nothing is.
        spread: What images are then divided by, in pixel values, [C, 1, 1]; None for ``peak``.
        digest: sha256 of the tensors of the prepared data set.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    peak: int = 255
    shift: Tensor | None = None
    spread: Tensor | None = None
    digest: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) or (F,)."""
        return tuple(self.train.x.shape[1:])

    @property
    def labelled(self) -> bool:
        """Whether the targets are classes; numbers are learnt with the mean squared error."""
        return self.train.y.dtype == torch.int64

    def target(self, y: Tensor) -> Tensor:
        """Targets as the loss takes them: labels as they are, images scaled like inputs and flattened, [..., C*H*W]."""
        return self.scale(y).flatten(-3) if y.dtype == torch.uint8 else y

    def scale(self, x: Tensor) -> Tensor:
        """A batch as a network takes it.

        Args:
            x: uint8 images [..., C, H, W]; or floats, which ``load`` has scaled already.

        Returns:
            float32 of the same shape on the same device: x / peak for ``unit``, (x - shift) / spread for the other
            scalings. Floats are returned as they are.
        """
        if x.is_floating_point():
            return x
        x = x.to(torch.float32)
        if self.shift is None or self.spread is None:
            return x.div_(self.peak)
        return x.sub_(self.shift.to(x.device)).div_(self.spread.to(x.device))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in ("train", "validation", "test"))
        return f"Dataset({self.name}: {self.source}; {sizes}; {len(self.classes)} classes; shape {self.shape})"


def load(data: str | Data, device: str | torch.device = "cpu") -> Dataset:
    """A data set in memory; prepared first where it was not.

    Which samples are held out depends on ``split_seed`` alone. One permutation of all rows, the first draw of a
    ``torch.Generator`` with that seed, is cut into training, validation and (for data without a test part) test: the
    split of ``torch.utils.data.random_split``, so of DyPrune. With ``stratify`` it is that of scikit-learn's
    ``train_test_split``, so of DropNet. Both leave a training part in random but fixed order. Where nothing is held
    out, the rows stay as they are stored: memory-mapped, not copied.

    ``unit`` and ``minmax`` map the training part to 0..1, ``minmax_all`` all parts together (a leak, as in DyPrune);
    ``standard`` gives the training part mean 0 and (population) standard deviation 1. Features are scaled here, each
    by itself. Images are scaled batch by batch in ``Dataset.scale``: ``unit`` divides by the largest possible pixel
    value, ``centred`` then subtracts 0.5, the others go channel by channel. ``raw`` leaves every number as it is.

    Args:
        data: The settings, or a name, which takes the default ones: a name in ``prunelab.data.sources.SOURCES``, the
            import path of a function as for ``register``, one
            that was prepared from a folder, or that of a ``{train,test}/<class>/image`` tree in the data root.
        device: Where the tensors are put.

    Returns:
        The data set. ``Data.test_size`` limits the validation part too.

    Raises:
        DataError: unknown name, no source, a damaged file, more samples asked for than there are, or no such device.
    """
    settings = Data(name=data) if isinstance(data, str) else data
    where = _device(device)
    own = settings.name in SOURCES.registered or ":" in settings.name  # it may change from one call to the next
    raw, digest = made(settings.name) if own else read(fill(settings.name))
    parts = _divide(raw, settings)
    shift, spread = _fit(settings, parts, raw.peak)
    if shift is not None and parts["train"].x.is_floating_point():
        parts = {name: Split((part.x - shift) / spread, part.y) for name, part in parts.items()}
        shift = spread = None
    moved = {name: Split(part.x.to(where), part.y.to(where)) for name, part in parts.items()}
    classes = raw.classes
    if settings.target == "input":
        moved = {name: Split(part.x, part.x) for name, part in moved.items()}
        classes = tuple(map(str, range(moved["train"].x[0].numel())))
    scaling = {
        "shift": shift if shift is None else shift.to(where),
        "spread": spread if spread is None else spread.to(where),
    }
    return Dataset(settings.name, raw.source, classes, **moved, peak=raw.peak, **scaling, digest=digest)


def register(name: str, data: Callable[[], Any]) -> None:
    """Make a data set of your own known by a name, as those of this package are.

    Args:
        name: the name.
        data: a function that gives the tensors x and y, or x, y, test_x and test_y: images, uint8 [N, C, H, W], or
            features, float32 [N, F]; classes, int64 [N], or numbers, float32 [N, outputs]. It is called whenever the
            data are loaded, and nothing of them is cached.

    Raises:
        PrunelabError: the name is taken, or it is no function.
    """
    SOURCES.register(name, data)


def order(n: int, generator: torch.Generator) -> Tensor:
    """One random order of ``n`` samples, int64 [n], on the generator's device."""
    return torch.randperm(n, generator=generator, device=generator.device)


def batches(
    split: Split, batch_size: int, generator: torch.Generator | None = None, device: str | torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One part in batches, the last one as small as it comes.

    Args:
        split: The part.
        batch_size: Samples per batch, at least 1.
        generator: Draws the order; None: the stored order, as views without a copy.
        device: Where each batch is put; None: where the part is.

    Yields:
        x and y of one batch, not yet scaled.

    Raises:
        DataError: the batch size is below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size = {batch_size}: should be at least 1")
    rows = None if generator is None else order(len(split), generator).to(split.y.device)
    for start in range(0, len(split), batch_size):
        piece = slice(start, start + batch_size)
        x, y = (split.x[piece], split.y[piece]) if rows is None else (split.x[rows[piece]], split.y[rows[piece]])
        yield (x, y) if device is None else (x.to(device), y.to(device))


def _divide(raw: Raw, settings: Data) -> dict[str, Split]:
    x, y = raw.tensors["train_x"], raw.tensors["train_y"]
    own_test = "test_x" in raw.tensors
    if own_test and settings.test is not None:
        raise DataError(
            f"{settings.name} has a test part: leave Data.test = {settings.test} out, or set Data.test_size"
        )
    held_test = 0 if own_test else _held_test(settings, len(y))
    held = _count(settings.validation, len(y) - held_test, "validation", settings)
    rows, test = _cut(_rows(len(y), bool(held or held_test or settings.train_size), settings), y, held_test, settings)
    train, validation = _cut(rows, y, held, settings)
    if settings.train_size is not None and settings.train_size > len(train):
        there = f"but only {len(train)} samples are there"
        raise DataError(f"{settings.name}: Data.train_size = {settings.train_size}, {there}: ask for at most that many")
    train = _limit(train, y, settings.train_size, settings)
    validation = _limit(validation, y, settings.test_size, settings)
    test_x, test_y = x, y
    if own_test:
        test_x, test_y = raw.tensors["test_x"], raw.tensors["test_y"]
        test = _rows(len(test_y), settings.test_size is not None, settings)
    test = _limit(test, test_y, settings.test_size, settings)
    return {"train": _take(x, y, train), "validation": _take(x, y, validation), "test": _take(test_x, test_y, test)}


def _held_test(settings: Data, total: int) -> int:
    default = SOURCES[settings.name].test if settings.name in SOURCES else None
    held = _count(settings.test if settings.test is not None else default or 0.2, total, "test", settings)
    if held < 1:
        raise DataError(f"{settings.name}: Data.test = {settings.test} leaves no test sample: hold out at least one")
    return held


def _count(share: float, total: int, what: str, settings: Data) -> int:
    """How many of ``total`` samples a fraction or a number means; at least one has to be left."""
    held = round(share * total) if share < 1 else int(share)
    if held >= total:
        raise DataError(
            f"{settings.name}: Data.{what} = {share} leaves none of {total} samples to train on: hold out fewer"
        )
    return held


def _rows(total: int, mixed: bool, settings: Data) -> Tensor:
    """All rows, permuted where some will be cut off; with ``stratify`` scikit-learn permutes them."""
    if not mixed or settings.stratify:
        return torch.arange(total)
    return order(total, torch.Generator().manual_seed(settings.split_seed))


def _cut(rows: Tensor, y: Tensor, held: int, settings: Data) -> tuple[Tensor, Tensor]:
    """Cut ``held`` rows off: the last ones, or with ``stratify`` rows of every class in proportion."""
    if held == 0 or not settings.stratify:
        return rows[: len(rows) - held], rows[len(rows) - held :]
    try:
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError:
        raise DataError(
            "Data.stratify needs scikit-learn, which is not installed: pip install 'prunelab[lab]'"
        ) from None
    seed = settings.split_seed
    try:
        kept, out = train_test_split(rows.numpy(), test_size=held, stratify=y[rows].numpy(), random_state=seed)
    except ValueError as error:
        what = f"{held} of {len(rows)} samples cannot be cut off with Data.stratify"
        raise DataError(f"{settings.name}: {what}: {first_line(error)}") from None
    return torch.from_numpy(kept), torch.from_numpy(out)


def _limit(rows: Tensor, y: Tensor, size: int | None, settings: Data) -> Tensor:
    """At most ``size`` of the rows."""
    return rows if size is None or size >= len(rows) else _cut(rows, y, len(rows) - size, settings)[0]


def _take(x: Tensor, y: Tensor, rows: Tensor) -> Split:
    """The rows as a copy; all rows in stored order as the memory-mapped tensors themselves."""
    if len(rows) == len(y) and bool((rows[1:] > rows[:-1]).all()):
        return Split(x, y)
    return Split(x.index_select(0, rows), y[rows])


def _fit(settings: Data, parts: dict[str, Split], peak: int) -> tuple[Tensor | None, Tensor | None]:
    """What to subtract and to divide by, float32 per feature or channel; None, None where ``Dataset.scale`` knows."""
    train, scaling = parts["train"].x, settings.scaling
    image = not train.is_floating_point()
    if scaling == ("unit" if image else "raw"):
        return None, None
    if scaling == "raw":
        return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    if scaling == "centred":
        if not image:
            raise DataError(f"{settings.name}: Data.scaling = 'centred' is for images: use 'standard' for features")
        return torch.full((1, 1, 1), peak / 2), torch.full((1, 1, 1), float(peak))
    if scaling == "standard":
        shift, spread = _moments(train)
    else:
        seen = [part.x for part in parts.values() if len(part)] if scaling == "minmax_all" else [train]
        axes = [axis for axis in range(train.ndim) if axis != 1]
        shift = torch.stack([x.amin(axes) for x in seen]).amin(0).double()
        spread = torch.stack([x.amax(axes) for x in seen]).amax(0).double() - shift
    spread = torch.where(spread == 0, 1.0, spread)  # a constant feature becomes 0, as in scikit-learn
    shape = (-1, 1, 1) if image else (-1,)
    return shift.float().reshape(shape), spread.float().reshape(shape)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation per feature or channel, float64; of pixels from their histogram."""
    if x.is_floating_point():
        return x.double().mean(0), x.double().std(0, correction=0)
    value = torch.arange(256, dtype=torch.float64)
    shares = torch.stack([torch.bincount(x[:, c].flatten(), minlength=256).double() for c in range(x.shape[1])])
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ value
    return mean, (shares * (value - mean[:, None]).square()).sum(1).sqrt()


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise DataError(f"device {device!r} is unknown ({first_line(error)}): use 'cpu' or 'cuda'") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DataError(f"device {str(device)!r} was asked for, but torch sees no CUDA here: use device 'cpu'")
    return found
