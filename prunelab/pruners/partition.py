"""The k-th lowest of many numbers, exactly, without sorting them.

The order statistics of a small sample bracket the wanted number; one pass over the data counts what lies below the
bracket and collects the one or two per cent inside it; only those are partitioned (the idea of Floyd and Rivest,
"Expected time bounds for selection", CACM 1975). A bracket that missed, as contrived data can make it, costs time and
not exactness: then everything is partitioned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_SAMPLE = 1 << 16  # numbers looked at to place the bracket; fewer make it wider, more take longer to fetch
_WIDTH = 4.5  # half of the bracket, in standard deviations of the rank in the sample: one miss in about 100,000 times
_PIECE = 1 << 18  # numbers per piece of the pass: 1 MB of float32, which stays in a core's cache
_MANY = 1 << 20  # from here on the sample pays

Live = Tensor | None


def kth_lowest(values: Sequence[Tensor], live: Sequence[Live], k: int) -> tuple[float, int, int]:
    """The k-th lowest (k >= 1) of the live numbers.

    Args:
        values: 1-D float tensors of one dtype on one device; no live number is NaN.
        live: For each of them which numbers take part (bool, same length), or None for all.
        k: At most the number of live ones.

    Returns:
        The number, how many live ones are lower, how many are equal to it (itself included).
    """
    if values[0].device.type != "cpu":
        pool = _live_only(values, live)
        found = torch.topk(pool, k, largest=False, sorted=False).values.max()
        return found.item(), int((pool < found).sum()), int((pool == found).sum())
    pool, below = _bracketed(values, live, k) if sum(map(len, values)) >= _MANY else (None, 0)
    if pool is None:
        pool, below = _live_only(values, live).numpy(), 0
    found = np.partition(pool, k - below - 1)[k - below - 1]
    return found.item(), below + int(np.count_nonzero(pool < found)), int(np.count_nonzero(pool == found))


def _live_only(values: Sequence[Tensor], live: Sequence[Live]) -> Tensor:
    return torch.cat([value if alive is None else value[alive] for value, alive in zip(values, live, strict=True)])


def _bracketed(values: Sequence[Tensor], live: Sequence[Live], k: int) -> tuple[np.ndarray | None, int]:
    """The live numbers among which the k-th lowest is, and how many are below those; None when the bracket missed."""
    arrays = [
        (value.numpy(), None if alive is None else alive.numpy()) for value, alive in zip(values, live, strict=True)
    ]
    low, high = _bracket(arrays, k)

    def look(piece: tuple[np.ndarray, np.ndarray | None]) -> tuple[int, np.ndarray]:
        value, alive = piece
        lower, higher = value < low, value > high
        np.logical_or(lower, higher, out=higher)
        inside = np.logical_not(higher, out=higher)
        if alive is not None:
            lower &= alive
            inside &= alive
        return int(np.count_nonzero(lower)), value[inside]

    pieces = [
        (value[start : start + _PIECE], None if alive is None else alive[start : start + _PIECE])
        for value, alive in arrays
        for start in range(0, len(value), _PIECE)
    ]
    with ThreadPoolExecutor(
        torch.get_num_threads()
    ) as threads:  # NumPy lets go of the interpreter's lock in each of these calls
        looked = list(threads.map(look, pieces))
    below = sum(count for count, _ in looked)
    pool = np.concatenate([inside for _, inside in looked])
    return (pool, below) if below < k <= below + len(pool) else (None, 0)


def _bracket(arrays: Sequence[tuple[np.ndarray, np.ndarray | None]], k: int) -> tuple[float, float]:
    """Two numbers between which the k-th lowest of the live ones almost surely lies."""
    ends = np.cumsum([len(value) for value, _ in arrays])
    total = sum(len(value) if alive is None else int(np.count_nonzero(alive)) for value, alive in arrays)
    drawn = np.sort(np.random.default_rng(0).integers(ends[-1], size=_SAMPLE))
    sample = []
    for (value, alive), at, end in zip(arrays, np.split(drawn, np.searchsorted(drawn, ends[:-1])), ends, strict=True):
        at = at - (end - len(value))
        sample.append(value[at] if alive is None else value[at[alive[at]]])
    ordered = np.sort(np.concatenate(sample))
    size, share = len(ordered), k / total
    spread = _WIDTH * math.sqrt(size * share * (1 - share)) + 1
    first, last = math.floor(size * share - spread), math.ceil(size * share + spread)
    return float(ordered[first]) if first >= 0 else -math.inf, float(ordered[last]) if last < size else math.inf
