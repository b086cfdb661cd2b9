"""Random pruning: the control that every other method has to beat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.masks import Masks
from prunelab.pruners import scores as score
from prunelab.pruners.select import Granularity, Scope, lowest_go, remove_lowest, scored_names
from prunelab.settings import settings


@settings
class Random:
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

    def scores(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Per parameter, or per layer one score per unit."""
        return score.random(
            model, scored_names(model, current, self.granularity), generator, units=self.granularity != "weight"
        )

    def select(
        self, model: nn.Module, scores: Mapping[str, Tensor], current: Masks, amount: float, generator: torch.Generator
    ) -> Masks:
        """What is left when the lowest scores are gone."""
        options = {"granularity": self.granularity, "scope": self.scope, "allow_empty": self.allow_empty}
        return remove_lowest(model, scores, current, amount, generator, **options)

    masks = lowest_go  # reads no data
