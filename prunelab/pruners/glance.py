"""Pruning at a Glance: one threshold for all filters and neurons, on the mean size of their weights."""

from __future__ import annotations

from typing import ClassVar

import torch

from prunelab.masks import layer_of
from prunelab.pruners.base import Context, Pruner, Step
from prunelab.pruners.scores import wide
from prunelab.pruners.select import Granularity, by_unit, keep_highest_units, scored_names, units_of
from prunelab.pruners.units import unit_masks
from prunelab.settings import settings
from prunelab.structure.shrink import joined_layers


@settings
class Glance(Pruner):
    """Filters and neurons with the smallest mean |w| go, all layers together, without any normalisation.

    Source: Salama et al., "Pruning at a Glance: Global Neural Pruning for Model Compression", 2019, and its code: the
    score of a unit is the L1 norm of its weights divided by their number; the bias does not count, and goes with its
    unit, as does the scale of a BatchNorm. Where a skip adds channels, the layers that end in it share one set: the
    first of them decides (their ``flag=1``); to find skips it needs ``batches``. Of every layer one unit stays (our own
    rule; the code has none). The code's percentage is one of the original units and grows by 5 points in a round; here
    the amount is a fraction of those that are left.
    """

    granularity: ClassVar[Granularity] = "unit"
    keeps_one: ClassVar[bool] = True  # of every layer, by its own rule

    allow_empty: bool = False

    def prune(self, now: Context, amount: float) -> Step:
        """Of ``batches`` only the first inputs are read, to follow skips."""
        model, current = now.model, now.masks
        groups = _shared(now)
        followers = {layer for group in groups for layer in group[1:]}
        names = [name for name in scored_names(model, current, "unit") if layer_of(name) not in followers]
        there = units_of(model, current, names)
        scores = {layer_of(n): by_unit(model, n, wide(model.get_parameter(n).detach())).abs().mean(1) for n in names}
        left = {layer: int(keep.sum()) for layer, keep in there.items()}
        count = round(amount * sum(left.values()))
        if not self.allow_empty:
            count = min(count, sum(units - 1 for units in left.values() if units))
            best = {layer: score.masked_fill(~there[layer], -torch.inf).argmax() for layer, score in scores.items()}
            scores = {layer: score.index_fill(0, best[layer], torch.inf) for layer, score in scores.items()}
        after = keep_highest_units(scores, there, count, now.generator, allow_empty=True)
        for first, *others in groups:
            after |= {other: after[first] for other in others if first in after}
        return Step(current & unit_masks(model, after))


def _shared(now: Context) -> list[list[str]]:
    """Groups of layers whose channels an addition makes one, each in forward order; none without data."""
    if now.example is None and not any(True for _ in now.batches() or ()):
        return []
    return joined_layers(now.model, now.sample())
