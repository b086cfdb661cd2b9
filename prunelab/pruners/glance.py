"""Pruning at a Glance: one threshold for all filters and neurons, on the mean size of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from prunelab.masks import Masks, layer_of
from prunelab.pruners.select import Granularity, keep_highest_units, scored_names, unit_masks, units_of
from prunelab.settings import settings
from prunelab.shrink import joined_layers


@settings
class Glance:
    """Filters and neurons with the smallest mean |w| go, all layers together, without any normalisation.

    Source: Salama et al., "Pruning at a Glance: Global Neural Pruning for Model Compression", 2019, and its code: the
    score of a unit is the L1 norm of its weights divided by their number; the bias does not count, and goes with its
    unit, as does the scale of a BatchNorm. Where a skip adds channels, the layers that end in it share one set: the
    first of them decides (their ``flag=1``); to find skips it needs ``batches``. Of every layer one unit stays (our own
    rule; the code has none). The code's percentage is one of the original units and grows by 5 points in a round; here
    the amount is a fraction of those that are left.
    """

    keeps_one: ClassVar[bool] = True  # of every layer, by its own rule

    allow_empty: bool = False

    @property
    def granularity(self) -> Granularity:
        """Neurons and filters alike."""
        return "unit"

    def scores(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, generator: Generator
    ) -> dict[str, Tensor]:
        """Layer -> float32 [units], mean |w|; of layers that share a skip only the first has scores."""
        names = scored_names(model, current, "unit")
        followers = {layer for group in _shared(model, batches) for layer in group[1:]}
        return {
            layer_of(name): model.get_parameter(name).detach().abs().flatten(1).mean(1)
            for name in names
            if layer_of(name) not in followers
        }

    def lowest_gone(
        self,
        model: nn.Module,
        scores: Mapping[str, Tensor],
        current: Masks,
        amount: float,
        generator: Generator,
        groups: tuple[tuple[str, ...], ...] = (),
    ) -> Masks:
        """What is left when the lowest scores are gone; ``groups`` are layers that share a skip."""
        there = units_of(current, [f"{layer}.weight" for layer in scores])
        left = {layer: int(keep.sum()) for layer, keep in there.items()}
        count = round(amount * sum(left.values()))
        best = {layer: score.masked_fill(~there[layer], -torch.inf).argmax() for layer, score in scores.items()}
        safe = {
            layer: score.clone().index_fill_(0, best[layer], torch.inf) if not self.allow_empty else score
            for layer, score in scores.items()
        }
        after = keep_highest_units(safe, there, count, generator, allow_empty=True)
        for first, *others in groups:
            after |= {other: after[first] for other in others if first in after}
        return current & unit_masks(model, after)

    def masks(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, amount: float, generator: Generator
    ) -> Masks:
        """``lowest_gone`` after ``scores``; of ``batches`` only the first inputs are read, to follow skips."""
        first = [batch for batch, _ in zip(batches or (), range(1), strict=False)]
        scores = self.scores(model, first, current, generator)
        groups = tuple(tuple(layer for layer in group) for group in _shared(model, first))
        return self.lowest_gone(model, scores, current, amount, generator, groups)


def _shared(model: nn.Module, batches: Iterable[Any] | None) -> list[list[str]]:
    """Groups of layers whose channels an addition makes one, each in forward order; none without data."""
    for batch in batches or ():
        x = batch[0] if isinstance(batch, tuple | list) else batch
        return joined_layers(model, x[:2])
    return []
