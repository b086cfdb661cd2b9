"""When to prune and how much: pure functions of what has been seen so far, without state and without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from prunelab.errors import PrunelabError, nearest

Kind = Literal["one_cycle", "agp", "iterative", "one_shot", "linear", "cosine"]  # of schedules over a training

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
        As many float64 values: 1 at a new steepest fall, near 0 on a plateau, negative where the loss rose, NaN at the
        first epoch and as long as the loss has never fallen.
    """
    falls = np.diff(np.asarray(losses, dtype=np.float64))
    steepest = np.minimum.accumulate(falls) if len(falls) else falls
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate([[np.nan], np.where(steepest < 0, falls / steepest, np.nan)])[: len(losses)]


@dataclass(frozen=True)
class Trigger:
    """DyPrune's decision, after an epoch, whether to prune now.

    Attributes:
        kind: ``"static"``: every so many epochs; ``"dynamic"``: when the validation loss still falls, but slowly.
        every: epochs between static prunings.
        minimum: lower end of the window on the relative gradient; at 0 a rising loss never triggers.
        maximum: upper end of it.
        cooldown: epochs that a dynamic pruning must wait after the one before.

    Source: the published code of DyPrune; the defaults are those of its class.
    """

    kind: Literal["static", "dynamic"] = "dynamic"
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
        if now < 1 or now >= epochs - 1:
            return False
        ratio = relative_gradient(losses)[now]
        if math.isnan(ratio):  # the loss has never fallen: nothing has been learnt that pruning could build on
            return False
        if self.kind == "static":
            return now % self.every == 0
        rested = last is None or now - last > self.cooldown
        return rested and self.minimum <= ratio <= self.maximum


@dataclass(frozen=True)
class Ramp:
    """A sparsity that grows over a training; ``at(t)`` says how far it should be, t from 0 (begin) to 1 (end).

    ``one_cycle``: slow, fast, slow, without a beginning; ``agp``: a cubic that flattens out; ``iterative``: steps of
    one size; ``one_shot``: everything at once; ``linear``; ``cosine``.

    Attributes:
        kind: the shape.
        final: sparsity at the end.
        start: t before which nothing happens; None: 0 for one_cycle, linear and cosine, 0.2 for agp and iterative, 0.4
            for one_shot, with which the one-cycle paper compares.
        alpha: steepness of one_cycle.
        beta: of one_cycle; the middle is at ``beta / alpha``.
        steps: of iterative.

    Source: Hubens et al., "One-Cycle Pruning", ICIP 2022, and its code (one_cycle, with 14 and 5; the values of the
        others for the same budget); Zhu and Gupta, 2017, section 3 (agp).
    """

    kind: Kind = "one_cycle"
    final: float = 0.9
    start: float | None = None
    alpha: float = 14.0
    beta: float = 5.0
    steps: int = 3

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        kinds = get_args(Kind)
        if self.kind not in kinds:
            raise PrunelabError(f"schedule {self.kind!r}: {nearest(self.kind, kinds)}")
        if not 0 <= self.final < 1:
            raise PrunelabError(f"final = {self.final}: should be a sparsity, at least 0 and below 1")
        if self.start is not None and not 0 <= self.start < 1:
            raise PrunelabError(f"start = {self.start}: should be a share of the training, at least 0 and below 1")
        if self.steps < 1:
            raise PrunelabError(f"steps = {self.steps}: should be at least 1")

    @property
    def begins(self) -> float:
        """The t before which nothing happens."""
        usual = {"agp": 0.2, "iterative": 0.2, "one_shot": 0.4}
        return usual.get(self.kind, 0.0) if self.start is None else self.start

    def at(self, t: float) -> float:
        """The sparsity that should be reached at ``t``, between 0 and ``final``."""
        if t < self.begins:
            return 0.0
        place = min(max((t - self.begins) / (1 - self.begins), 0.0), 1.0)
        if self.kind == "one_cycle":
            share = (1 + math.exp(-self.alpha + self.beta)) / (1 + math.exp(-self.alpha * place + self.beta))
        elif self.kind == "agp":
            share = 1 - (1 - place) ** 3
        elif self.kind == "iterative":
            share = math.ceil(place * self.steps - 1e-9) / self.steps
        elif self.kind == "cosine":
            share = (1 - math.cos(math.pi * place)) / 2
        else:
            share = place if self.kind == "linear" else 1.0
        return self.final * share

    def curve(self, points: int = 101) -> list[tuple[float, float]]:
        """(t, sparsity) at so many equal distances."""
        return [(i / (points - 1), self.at(i / (points - 1))) for i in range(points)]
