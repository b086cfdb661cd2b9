"""Pruning along a schedule within one training: one-cycle, gradual, iterative, one-shot."""

from __future__ import annotations

from typing import ClassVar

from prunelab.errors import PrunelabError
from prunelab.pruners.base import Context, Progress, Pruner, Step
from prunelab.pruners.schedules import Kind, Ramp
from prunelab.pruners.scores import magnitude
from prunelab.pruners.select import Scope, keep_highest
from prunelab.settings import settings


@settings
class Scheduled(Pruner):
    """The smallest weights go as the training goes on, so many that the schedule's sparsity is reached.

    Source: Hubens et al., "One-Cycle Pruning", ICIP 2022: a network is trained once, from scratch, and pruned meanwhile
    by |w| within each layer. The published code prunes before every batch; here it happens between epochs (our own
    default), each time to the value that the schedule has at the end of the epoch that comes. What is gone stays gone;
    in the code a weight that momentum moved may come back for one batch.

    Attributes:
        schedule: the shape; see ``schedules.Ramp``.
        sparsity: at the end.
        start: share of the training before which nothing happens; None: the schedule's own.
        alpha: steepness of one_cycle.
        beta: of one_cycle.
        steps: of iterative.
        scope: ``layer``, as published: every layer reaches the sparsity; ``global``: all weights compete.
    """

    while_training: ClassVar[bool] = True
    reads_amount: ClassVar[bool] = False

    schedule: Kind = "one_cycle"
    sparsity: float = 0.9
    start: float | None = None
    alpha: float = 14.0
    beta: float = 5.0
    steps: int = 3
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        try:
            _ = self.ramp
        except PrunelabError as error:
            raise ValueError(str(error)) from None

    @property
    def ramp(self) -> Ramp:
        """The schedule."""
        return Ramp(self.schedule, self.sparsity, self.start, self.alpha, self.beta, self.steps)

    def due(self, progress: Progress) -> bool:
        """Whether the sparsity should be higher at the end of the next epoch than it was made before."""
        before = 0.0 if progress.last is None else self.ramp.at((progress.last + 2) / progress.epochs)
        return self._target(progress) > before

    def prune(self, now: Context, amount: float) -> Step:
        """Remove down to the schedule's sparsity."""
        target = self._target(now.progress)
        names = [name for name in now.masks if now.masks[name].dim() > 1]
        scores = magnitude(now.model, names)
        missing = {
            name: max(0, round(target * now.masks[name].numel()) - (now.masks[name].numel() - now.masks.counts[name]))
            for name in names
        }
        count = missing if self.scope == "layer" else self._together(now, names, target)
        kept = keep_highest(scores, now.masks, count, now.generator, allow_empty=False)
        before = sum(now.masks.counts[name] for name in names)
        rate = 1 - sum(kept.counts[name] for name in names) / before if before else 0.0
        return Step(kept, scores, rate=rate)

    def _target(self, progress: Progress) -> float:
        """The sparsity at the end of the next epoch."""
        return self.ramp.at((len(progress.losses) + 1) / progress.epochs)

    @staticmethod
    def _together(now: Context, names: list[str], target: float) -> int:
        total = sum(now.masks[name].numel() for name in names)
        return max(0, round(target * total) - (total - sum(now.masks.counts[name] for name in names)))
