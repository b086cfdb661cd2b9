"""When to prune and how much: pure functions of what has been seen so far, without state and without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

DYPRUNE_LARGEST_RATE = 0.9


def dyprune_rate(weights: int) -> float:
    """DyPrune's pruning rate, scaled to the size of the network: (ln n - 6) / 10, clipped to [0, 0.9].

    It is 0 at and below n = e^6 = 403.4, the fixed point at which pruning ends by itself, and 0.9 from n = e^15 =
    3,269,017 on.

    Args:
        weights: n, the number of non-zero weights of all layers, biases not counted.

    Returns:
        The fraction of those weights that goes.

    Source: the published code of DyPrune (EPIA 2023); the paper's abstract calls it scaling the rate "to the size of
        the model".
    """
    if weights <= 0:
        return 0.0
    return min(max((math.log(weights) - 6) / 10, 0.0), DYPRUNE_LARGEST_RATE)


def dyprune_path(weights: int, events: int) -> list[int]:
    """Weights left before and after each of ``events`` prunings that remove ``round(dyprune_rate(n) * n)``."""
    path = [weights]
    for _ in range(events):
        path.append(path[-1] - round(dyprune_rate(path[-1]) * path[-1]))
    return path


def relative_gradient(losses: Sequence[float]) -> np.ndarray:
    """How fast the loss falls, as a share of its steepest fall: d_t / min(d_1 .. d_t), d_t = loss_t - loss_(t-1).

    Args:
        losses: one validation loss an epoch.

    Returns:
        As many float64 values: 1 at a new steepest fall, near 0 on a plateau, negative where the loss rose, NaN at
            the first epoch and as
        long as the loss has never fallen.
    """
    falls = np.diff(np.asarray(losses, dtype=np.float64))
    steepest = np.minimum.accumulate(falls) if len(falls) else falls
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate([[np.nan], np.where(steepest < 0, falls / steepest, np.nan)])[: len(losses)]


@dataclass(frozen=True)
class Trigger:
    """DyPrune's decision, after an epoch, whether to prune now.

    Attributes:
        kind: ``"static"``: every so many epochs; ``"dynamic"``: when the validation loss still falls, but slowly;
            ``"never"``.
        every: epochs between static prunings.
        minimum: lower end of the window on the relative gradient; at 0 a rising loss never triggers.
        maximum: upper end of it.
        cooldown: epochs that a dynamic pruning must wait after the one before.

    Source: the published code of DyPrune; the defaults are those of its class.
    """

    kind: Literal["never", "static", "dynamic"] = "dynamic"
    every: int = 4
    minimum: float = 0.0
    maximum: float = 0.05
    cooldown: int = 2

    def due(self, losses: Sequence[float], epochs: int, last: int | None = None) -> bool:
        """Whether to prune after the newest epoch.

        Args:
            losses: validation losses of all epochs so far, from the start of the training.
            epochs: the whole budget; there is no pruning after the last epoch, so that some training always follows
                one.
            last: index into ``losses`` of the last pruning; None before the first.
        """
        now = len(losses) - 1
        if self.kind == "never" or now < 1 or now >= epochs - 1:
            return False
        ratio = relative_gradient(losses)[now]
        if math.isnan(ratio):  # the loss has never fallen: nothing has been learnt that pruning could build on
            return False
        if self.kind == "static":
            return now % self.every == 0
        rested = last is None or now - last > self.cooldown
        return rested and self.minimum <= ratio <= self.maximum
