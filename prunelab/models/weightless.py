"""Weightless networks: a vote of Bloom filters, filled in one pass over the data; nothing is multiplied, no gradient.

BTHOWeN (Susskind et al., "Weightless Neural Networks for Efficient Edge Inference", PACT 2022). A sample becomes bits
(thermometer code), the bits are shuffled once and dealt into groups, and every group is hashed (H3) into addresses.
Each class has a discriminator: one filter (look-up table) per group, which says whether it has seen the addresses
before. The class with most filters that say yes wins, of several the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from types import MappingProxyType
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field

from prunelab.errors import PrunelabError, nearest
from prunelab.settings import Model, settings

BITS_PER_KIB = 8192
HOLD_OUT_ABOVE = 10_000  # training samples from which on the bleach is chosen on the last tenth; below it, on all
CHUNK = 2_000  # samples that are encoded at once; our own choice

Positive = Annotated[int, Field(ge=1)]


@settings
class Sizes:
    """The four sizes of a BTHOWeN network.

    Attributes:
        bits: of the thermometer code of each feature.
        inputs: bits that each filter reads.
        entries: of each filter, a power of two.
        hashes: addresses that each filter looks at.
    """

    bits: Positive
    inputs: Positive
    entries: Positive
    hashes: Positive

    def __post_init__(self) -> None:
        """Refuse a number of entries that XORs of addresses would leave."""
        if self.entries & (self.entries - 1):
            raise ValueError(f"entries = {self.entries}: should be a power of two")

    def filters(self, features: int) -> int:
        """Filters of each discriminator: the bits of all features, dealt out, the last filter filled up with zeros."""
        return -(-features * self.bits // self.inputs)

    def kib(self, luts: int) -> float:
        """Size of so many filters with one bit for each entry; the hash constants are not counted, as in the paper."""
        return luts * self.entries / BITS_PER_KIB


class Entry(NamedTuple):
    """A network by name, with the data that it is for."""

    sizes: Sizes
    features: int
    classes: int
    version: int = 1  # as of ``Architecture``

    @property
    def kib(self) -> float:
        """Size of the whole network."""
        return self.sizes.kib(self.classes * self.sizes.filters(self.features))


# Table 3 of the paper, which is also in the README of its code; the last one is our own choice.
MODELS: Mapping[str, Entry] = MappingProxyType(
    {
        "bthowen_mnist_small": Entry(Sizes(2, 28, 1024, 2), 784, 10),
        "bthowen_mnist_medium": Entry(Sizes(3, 28, 2048, 2), 784, 10),
        "bthowen_mnist_large": Entry(Sizes(6, 49, 8192, 4), 784, 10),
        "bthowen_ecoli": Entry(Sizes(10, 10, 128, 2), 7, 8),
        "bthowen_iris": Entry(Sizes(3, 2, 128, 1), 4, 3),
        "bthowen_letter": Entry(Sizes(15, 20, 2048, 4), 16, 26),
        "bthowen_satimage": Entry(Sizes(8, 12, 512, 4), 36, 6),
        "bthowen_shuttle": Entry(Sizes(9, 27, 1024, 2), 9, 7),
        "bthowen_vehicle": Entry(Sizes(16, 16, 256, 3), 18, 4),
        "bthowen_vowel": Entry(Sizes(15, 15, 256, 4), 10, 11),
        "bthowen_wine": Entry(Sizes(9, 13, 128, 3), 13, 3),
        "bthowen_digits": Entry(Sizes(4, 8, 256, 2), 64, 10),
    }
)


def sizes(model: Model) -> Sizes:
    """The sizes that settings mean: those of the name, or ``hidden`` = (bits, inputs, entries, hashes).

    Raises:
        PrunelabError: no such weightless model, or other than four sizes.
    """
    if model.name not in MODELS:
        raise PrunelabError(f"no weightless model is called {model.name!r}: {nearest(model.name, MODELS)}")
    if model.hidden and len(model.hidden) != 4:
        raise PrunelabError(f"model {model.name!r}: hidden = {model.hidden}: should be (bits, inputs, entries, hashes)")
    return Sizes(*model.hidden) if model.hidden else MODELS[model.name].sizes


@dataclass(frozen=True, eq=False)
class Code:
    """From samples to addresses; the same for all classes.

    Attributes:
        thresholds: float64 [bits, features].
        order: int64 [filters * inputs], the shuffle of all bits.
        constants: int64 [hashes, inputs], of the H3 hash; all filters share them.
        entries: that can be addressed.
    """

    thresholds: np.ndarray
    order: np.ndarray
    constants: np.ndarray
    entries: int

    @classmethod
    def draw(cls, x: np.ndarray, sizes: Sizes, generator: torch.Generator) -> Code:
        """Thresholds from the samples, shuffle and constants from the generator."""
        total = sizes.filters(x.shape[1]) * sizes.inputs
        order = torch.randperm(total, generator=generator).numpy()
        constants = torch.randint(sizes.entries, (sizes.hashes, sizes.inputs), generator=generator).numpy()
        return cls(thermometer_thresholds(x, sizes.bits), order, constants, sizes.entries)

    @property
    def filters(self) -> int:
        """Filters of each discriminator."""
        return len(self.order) // self.constants.shape[1]

    def addresses(self, x: np.ndarray) -> np.ndarray:
        """Where each filter looks.

        Args:
            x: numbers [N, features].

        Returns:
            int32 [hashes, N, filters], below ``entries``.
        """
        if x.ndim != 2 or x.shape[1] != self.thresholds.shape[1]:
            wanted = f"[N, {self.thresholds.shape[1]}]"
            raise PrunelabError(f"samples of shape {list(x.shape)} do not fit the network: should be {wanted}")
        lookup = _xor_table(self.constants)
        found = np.empty((len(self.constants), len(x), self.filters), np.int32)
        for rows in _chunks(len(x)):
            bits = thermometer(x[rows], self.thresholds)
            padded = np.zeros((len(bits), len(self.order)), bool)
            padded[:, : bits.shape[1]] = bits
            groups = np.take(padded, self.order, axis=1).reshape(len(bits), self.filters, -1)
            found[:, rows] = _hash(groups, lookup)
        return found


def thermometer_thresholds(x: np.ndarray, bits: int) -> np.ndarray:
    """Thresholds of the Gaussian thermometer code: mean + quantile(i / (bits + 1)) * deviation, i = 1..bits.

    The deviation is that of the population. A feature that never changes gets its own value, and so always ones.

    Args:
        x: numbers [N, features].
        bits: of each feature.

    Returns:
        float64 [bits, features].
    """
    mean = x.mean(0, dtype=np.float64)
    squares = sum(np.square(x[rows] - mean).sum(0) for rows in _chunks(len(x)))
    deviation = np.sqrt(squares / len(x))
    quantiles = np.array([NormalDist().inv_cdf(i / (bits + 1)) for i in range(1, bits + 1)])
    lowest = x.min(0)
    return np.where(lowest == x.max(0), lowest, mean + quantiles[:, None] * deviation)


def thermometer(x: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Bit i of a feature is one where it is at least threshold i: bool [N, bits * features], bit 1 of all first."""
    return (x[:, None, :] >= thresholds).reshape(len(x), -1)


def h3(bits: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """The H3 hash: the XOR of the constants of all bits that are one.

    Args:
        bits: bool [..., inputs].
        constants: int64 [hashes, inputs].

    Returns:
        int32 [hashes, ...].
    """
    return _hash(bits, _xor_table(constants))


def _xor_table(constants: np.ndarray) -> np.ndarray:
    """The hash of every byte at every place, so that eight bits take one look: int32 [hashes, bytes, 256]."""
    hashes, inputs = constants.shape
    padded = np.zeros((hashes, -(-inputs // 8) * 8), np.int32)
    padded[:, :inputs] = constants
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(bool)
    return np.bitwise_xor.reduce(np.where(bits, padded.reshape(hashes, -1, 1, 8), 0), axis=-1)


def _hash(bits: np.ndarray, lookup: np.ndarray) -> np.ndarray:
    packed = np.packbits(bits, axis=-1)
    found = lookup[:, 0][:, packed[..., 0]]
    for place in range(1, packed.shape[-1]):
        found ^= lookup[:, place][:, packed[..., place]]
    return found


def fill(addresses: np.ndarray, y: np.ndarray, classes: int, entries: int) -> np.ndarray:
    """Training, one pass: the smallest of the counters at a sample's addresses is raised by one (and what equals it).

    Only the discriminator of the sample's class learns. Samples of one class are taken in their order; since
    discriminators share nothing, the k-th samples of all classes are taken together.

    Args:
        addresses: int32 [hashes, N, filters].
        y: int64 [N], labels.
        classes: number of discriminators.
        entries: of each filter.

    Returns:
        int32 [classes, filters, entries], the counters.
    """
    filters = addresses.shape[2]
    counts = np.zeros((classes, filters, entries), np.int32)
    table = counts.reshape(-1)
    samples = np.bincount(y, minlength=classes)
    largest_first = np.argsort(-samples, kind="stable")
    by_class = np.argsort(y, kind="stable")
    first = (np.cumsum(samples) - samples)[largest_first]
    base = (largest_first[:, None] * filters + np.arange(filters)) * entries
    for step in range(int(samples.max())):
        learning = int((samples > step).sum())
        at = addresses[:, by_class[first[:learning] + step]] + base[:learning]
        seen = table[at]
        table[at] = np.maximum(seen, seen.min(0) + 1)
    return counts


def least(counts: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    """What each filter remembers of each sample: the smallest of its counters there, [N, classes, filters]."""
    classes, filters, entries = counts.shape
    flat, base = counts.reshape(classes, -1), np.arange(filters) * entries
    found = np.empty((addresses.shape[1], classes, filters), counts.dtype)
    for rows in _chunks(len(found)):
        at = addresses[:, rows] + base
        for own in range(classes):
            found[rows, own] = flat[own][at].min(0)
    return found


def best_bleach(remembered: np.ndarray, y: np.ndarray, highest: int) -> int:
    """The count from which on a filter says yes: a search by halving steps for the highest accuracy.

    It starts at half of the highest counter and looks a quarter below and above it; the first best of the three is the
    next start, with half the step, until it stays where it is with a step of one.

    Args:
        remembered: of held-out samples, from ``least``.
        y: their labels.
        highest: the highest counter of all filters.
    """
    known: dict[int, float] = {}

    def accuracy(bleach: int) -> float:
        if bleach not in known:
            known[bleach] = float((votes(remembered >= bleach).argmax(1) == y).mean()) if bleach >= 1 else -1.0
        return known[bleach]

    here, step = max(highest // 2, 1), max(highest // 4, 1)
    while True:
        best = max((here - step, here, here + step), key=accuracy)  # of equal ones the first
        if best == here and step == 1:
            return here
        here, step = best, max(step // 2, 1)


def votes(responses: np.ndarray, kept: np.ndarray | None = None, bias: np.ndarray | None = None) -> np.ndarray:
    """Filters of each class that say yes, plus its bias.

    Args:
        responses: bool [N, classes, filters].
        kept: bool [classes, filters]; None: all.
        bias: numbers [classes]; None: 0.

    Returns:
        int64 [N, classes], or floats where the bias is.
    """
    found = np.empty(responses.shape[:2], np.int64)
    for rows in _chunks(len(found)):
        heard = responses[rows] if kept is None else responses[rows] & kept
        found[rows] = np.count_nonzero(heard, axis=2)
    return found if bias is None else found + bias


def tied(votes: np.ndarray) -> float:
    """Share of the samples whose highest vote several classes have; the first of these wins."""
    return float(((votes == votes.max(1, keepdims=True)).sum(1) > 1).mean())


@dataclass(frozen=True, eq=False)
class Network:
    """A trained weightless network.

    Attributes:
        sizes: bits, inputs, entries, hashes.
        code: from samples to addresses.
        tables: bool [classes, filters, entries]: what the filters hold, after bleaching.
        bleach: the count from which on an entry was set.
        kept: bool [classes, filters]: the filters that are still there.
        bias: int64 [classes], added to the votes.
    """

    sizes: Sizes
    code: Code
    tables: np.ndarray
    bleach: int
    kept: np.ndarray
    bias: np.ndarray

    @property
    def kib(self) -> float:
        """Size of the filters that are still there, one bit per entry."""
        return self.sizes.kib(int(self.kept.sum()))

    def responses(self, x: np.ndarray) -> np.ndarray:
        """Which filters say yes, of all, whether kept or not: bool [N, classes, filters]."""
        return least(self.tables, self.code.addresses(x))

    def votes(self, x: np.ndarray) -> np.ndarray:
        """Votes of the filters that are still there, with the bias: int64 [N, classes]."""
        return votes(self.responses(x), self.kept, self.bias)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The class with most votes, the first of several: int64 [N]."""
        return self.votes(x).argmax(1)

    def pruned(self, kept: np.ndarray, bias: np.ndarray | None = None) -> Network:
        """The same network with other filters left, and another bias."""
        return replace(self, kept=kept, bias=self.bias if bias is None else bias)


def held_out(samples: int) -> int:
    """How many training samples at the end choose the bleach and are not learnt: a tenth, or none of small data."""
    return samples // 10 if samples > HOLD_OUT_ABOVE else 0


def fit(
    x: np.ndarray,
    y: np.ndarray,
    sizes: Sizes,
    classes: int,
    generator: torch.Generator,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
) -> Network:
    """Train a network in one pass, and choose its bleach.

    The thresholds are those of all of ``x``. Then, of more than 10,000 samples, the last tenth only chooses the bleach;
    of fewer, all learn and all choose.

    Args:
        x: numbers [N, features].
        y: int64 [N], labels.
        sizes: of the network.
        classes: number of classes; each needs a sample.
        generator: draws the shuffle and the hash constants.
        validation: samples and labels that choose the bleach in place of the last tenth.

    Raises:
        PrunelabError: samples and labels that do not fit together, a value that is not finite, or a class without one.
    """
    _check(x, y, classes)
    code = Code.draw(x, sizes, generator)
    out = 0 if validation is not None else held_out(len(x))
    learnt = len(x) - out
    addresses = code.addresses(x)
    if len(np.unique(y[:learnt])) < classes:
        missing = min(set(range(classes)) - set(y[:learnt].tolist()))
        raise PrunelabError(f"class {missing} has no sample to learn from: mix the samples, or leave the class out")
    counts = fill(addresses[:, :learnt], y[:learnt], classes, sizes.entries)
    chooses = code.addresses(validation[0]) if validation is not None else addresses[:, learnt if out else 0 :]
    labels = validation[1] if validation is not None else y[learnt if out else 0 :]
    bleach = best_bleach(least(counts, chooses), labels, int(counts.max()))
    whole = np.ones((classes, code.filters), bool)
    return Network(sizes, code, counts >= bleach, bleach, whole, np.zeros(classes, np.int64))


def _check(x: np.ndarray, y: np.ndarray, classes: int) -> None:
    if x.ndim != 2 or len(x) != len(y) or not len(x):
        raise PrunelabError(f"samples {list(x.shape)} and labels {list(y.shape)}: should be [N, features] and [N]")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise PrunelabError("samples with NaN or infinite values have no thermometer code: leave them out first")
    if y.min() < 0 or y.max() >= classes:
        raise PrunelabError(f"labels from {y.min()} to {y.max()} with {classes} classes: should be 0 to {classes - 1}")


def _chunks(samples: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, samples, CHUNK))
