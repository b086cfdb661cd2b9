"""No pruning: the dense control, trained with the same budget and seed as what it is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prunelab.masks import Masks
from prunelab.settings import settings


@settings
class Dense:
    """Removes nothing, whatever the amount."""

    def masks(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, amount: float, generator: torch.Generator
    ) -> Masks:
        """What was there before."""
        return current
