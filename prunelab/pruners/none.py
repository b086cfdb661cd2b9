"""No pruning: the dense control, trained with the same budget and seed as what it is compared with."""

from __future__ import annotations

from prunelab.pruners.base import Context, Pruner, Step
from prunelab.settings import settings


@settings
class Dense(Pruner):
    """Removes nothing, whatever the amount."""

    reads_amount = False

    def prune(self, now: Context, amount: float) -> Step:
        """What was there before."""
        return Step(now.masks)
