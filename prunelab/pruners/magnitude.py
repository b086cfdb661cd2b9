"""Magnitude pruning: the smallest weights, or the units with the smallest weights, go."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prunelab.pruners.base import Context, Ranking
from prunelab.pruners.scores import MAGNITUDE, SQUARE, scored
from prunelab.pruners.select import Granularity, Scope
from prunelab.pruners.units import Combine
from prunelab.settings import settings


@settings
class Magnitude(Ranking):
    """Weights by ``|w|``; units by the norm of their weights, the bias apart.

    Source: Han et al., NIPS 2015, section 3 (weights); Li et al., ICLR 2017, section 3.1 (L1 norm of filters, one layer
    at a time). So that units of different layers can compete, a norm is divided by the mean over the units that its
    layer still has, as Torch-Pruning does; bare norms would empty the layers with few inputs first.

    Attributes:
        norm: 1 or 2; means nothing to single weights, whose norms are equal.
        granularity: What goes.
        scope: Whether all compete, or those of each layer.
        allow_empty: Whether a layer may lose all.
        combine: Of coupled channels, how the norms in each layer that makes or reads a channel are combined.
    """

    norm: Literal[1, 2] = 1
    granularity: Granularity = "weight"
    scope: Scope = "global"
    allow_empty: bool = False
    combine: Combine = "mean"

    def scores(self, now: Context) -> dict[str, Tensor]:
        """Per parameter, or per layer (or space) one score per unit."""
        squared = self.norm == 2 and self.granularity != "weight"
        return scored(now, SQUARE if squared else MAGNITUDE, self.granularity, self.combine)
