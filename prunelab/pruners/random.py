"""Random pruning: the control that every other method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from prunelab.pruners import scores as score
from prunelab.pruners.base import Context, Ranking
from prunelab.pruners.select import Granularity, Scope, scored_names
from prunelab.pruners.units import competing
from prunelab.settings import settings


@settings
class Random(Ranking):
    """Each remaining weight or unit is as likely to go as any other.

    Source: the random baselines of Blalock et al., "What is the state of neural network pruning?", MLSys 2020,
    appendix B.

    Attributes:
        granularity: What goes.
        scope: Whether all compete, or those of each layer (the same fraction in each).
        allow_empty: Whether a layer may lose all.
    """

    granularity: Granularity = "weight"
    scope: Scope = "global"
    allow_empty: bool = False

    def scores(self, now: Context) -> dict[str, Tensor]:
        """Per parameter, or per layer (or space) one score per unit."""
        draw = now.generator
        if self.granularity == "weight":
            return score.random(now.model, scored_names(now.model, now.masks, "weight"), draw)
        units = competing(now, self.granularity)
        return {name: torch.rand(space.size, generator=draw, device=draw.device) for name, space in units.items()}
