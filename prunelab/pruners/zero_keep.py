"""Zero-keep: small weights become zero, and the filters with the fewest zeros go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from prunelab.masks import MaskError, Masks, layer_of
from prunelab.pruners.base import Context, Pruner, Step
from prunelab.pruners.scores import magnitude
from prunelab.pruners.select import Granularity, Scope, by_unit, scored_names, units_of
from prunelab.pruners.units import remove_lowest
from prunelab.settings import settings


@settings
class ZeroKeep(Pruner):
    """Replace small weights by zero, then drop the filters (and neurons) that have the fewest zeros.

    Source: Woo et al., "Zero-Keep Filter Pruning for Energy/Power Efficient Deep Neural Networks", Electronics 2021; of
    it only the abstract is known: small values become zero, the filter with the lowest number of zeros goes, the zeros
    are kept for a circuit that skips them. All numbers here are our own defaults: half of the weights become zero, by
    size over all layers; zeros are counted as a share, so that layers with few inputs do not go first.

    Attributes:
        zeros: share of the weights of the masked layers that become zero.
        scope: whether units of all layers compete, or those of each.
        allow_empty: whether a layer may lose all.
    """

    granularity: ClassVar[Granularity] = "unit"
    keeps_one: ClassVar[bool] = True  # of every layer, by its own rule

    zeros: float = 0.5
    scope: Scope = "global"
    allow_empty: bool = False

    def __post_init__(self) -> None:
        """Refuse a share that means nothing."""
        if not 0 <= self.zeros < 1:
            raise ValueError(f"zeros = {self.zeros}: should be a share of the weights, at least 0 and below 1")

    def prune(self, now: Context, amount: float) -> Step:
        """Needs no data."""
        zeroed = self.zeroed(now.model, now.masks)
        names = scored_names(now.model, zeroed, "unit")
        there = units_of(now.model, zeroed, names)
        share = {layer_of(n): 1 - by_unit(now.model, n, zeroed[n]).float().mean(1) for n in names}
        scores = {layer: value.masked_fill(~there[layer], torch.inf) for layer, value in share.items()}
        if not self.allow_empty:
            best = {layer: value.masked_fill(~there[layer], -torch.inf).argmax() for layer, value in share.items()}
            scores = {layer: score.index_fill(0, best[layer], torch.inf) for layer, score in scores.items()}
        options = {"granularity": "unit", "scope": self.scope, "allow_empty": self.allow_empty}
        return Step(remove_lowest(now.having(zeroed), scores, amount, **options))

    def zeroed(self, model: nn.Module, current: Masks) -> Masks:
        """``current`` without its smallest weights, so that the share of zeros among all is ``zeros``.

        Raises:
            MaskError: a layer has small weights alone, and may not lose all.
        """
        names = [name for name in current if current[name].dim() > 1]
        size = magnitude(model, names)
        total = sum(current[name].numel() for name in names)
        gone = total - sum(current.counts[name] for name in names)
        missing = round(self.zeros * total) - gone
        if missing <= 0:
            return current
        values = torch.cat([size[name][current[name]].flatten() for name in names])
        threshold = values.kthvalue(min(missing, len(values))).values
        after = current & Masks({name: size[name] > threshold for name in names})
        if not self.allow_empty and (lost := [n for n in names if current.counts[n] and not after.counts[n]]):
            what = f"layer {layer_of(lost[0])!r} would lose all {current.counts[lost[0]]} weights that it has left"
            raise MaskError(f"{what}, as small as they are: lower zeros, leave the layer out, or say allow_empty=True")
        return after


def zero_skipped_macs(masks: Masks, layer_macs: Mapping[str, int]) -> int:
    """Multiplications of a sample that a circuit does which skips weights that are zero.

    Args:
        masks: what is kept.
        layer_macs: weight name -> dense multiplications, of ``cost.layer_macs``.
    """
    return sum(
        round(macs * masks.counts[n] / masks[n].numel()) if n in masks else macs for n, macs in layer_macs.items()
    )
