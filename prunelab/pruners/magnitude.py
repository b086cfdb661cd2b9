"""Magnitude pruning: the smallest weights, or the units with the smallest weights, go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelab.masks import Masks
from prunelab.pruners import scores as score
from prunelab.pruners.select import Granularity, Scope, lowest_go, remove_lowest, scored_names, units_of
from prunelab.settings import settings


@settings
class Magnitude:
    """Weights by ``|w|``; neurons and filters by the norm of their incoming weights, the bias apart.

    Source: Han et al., NIPS 2015, section 3 (weights); Li et al., ICLR 2017, section 3.1 (L1 norm of filters, one layer
    at a time). So that units of different layers can compete, a norm is divided by the mean over the units that its
    layer still has, as Torch-Pruning does; bare norms would empty the layers with few inputs first.

    Attributes:
        norm: 1 or 2; means nothing to single weights, whose norms are equal.
        granularity: What goes.
        scope: Whether all compete, or those of each layer.
        allow_empty: Whether a layer may lose all.
    """

    norm: Literal[1, 2] = 1
    granularity: Granularity = "weight"
    scope: Scope = "global"
    allow_empty: bool = False

    def scores(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Per parameter, or per layer one score per unit."""
        names = scored_names(model, current, self.granularity)
        if self.granularity == "weight":
            return score.magnitude(model, names)
        powers = score.reduce_to_units(model, score.magnitude(model, names, self.norm), names)
        there = units_of(model, current, names)
        norms = {layer: power.sqrt() if self.norm == 2 else power for layer, power in powers.items()}
        means = {layer: norm[there[layer]].mean() for layer, norm in norms.items()}
        return {layer: norm / means[layer].clamp(min=torch.finfo(norm.dtype).tiny) for layer, norm in norms.items()}

    def select(
        self, model: nn.Module, scores: Mapping[str, Tensor], current: Masks, amount: float, generator: torch.Generator
    ) -> Masks:
        """What is left when the lowest scores are gone."""
        options = {"granularity": self.granularity, "scope": self.scope, "allow_empty": self.allow_empty}
        return remove_lowest(model, scores, current, amount, generator, **options)

    masks = lowest_go  # reads no data
