"""What a pruning method is: the protocols that ``prune`` and the experiments call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prunelab.masks import Masks


@runtime_checkable
class Pruner(Protocol):
    """A frozen dataclass whose fields are the method's hyper-parameters."""

    def masks(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, amount: float, generator: torch.Generator
    ) -> Masks:
        """What is left of ``current`` when a fraction ``amount`` of it is gone. Pure: it changes nothing.

        Args:
            model: The model as it was trained; its pruned weights are zero.
            batches: Inputs and targets, for methods that look at data.
            current: What is still there.
            amount: Fraction of the remaining units, in [0, 1).
            generator: The only source of randomness.
        """
        ...


@runtime_checkable
class Ranking(Pruner, Protocol):
    """A pruner that ranks, then removes, so that scores can go on record: ``masks`` is ``select`` after ``scores``."""

    def scores(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scores, higher = keep: parameter name -> one per weight, or layer name -> one per unit."""
        ...

    def select(
        self, model: nn.Module, scores: Mapping[str, Tensor], current: Masks, amount: float, generator: torch.Generator
    ) -> Masks:
        """What is left of ``current`` when the lowest scores are gone."""
        ...


@runtime_checkable
class Reweighting(Pruner, Protocol):
    """A pruner that also gives weights that are left other values: ``masks`` is the first part of ``reweighted``."""

    def reweighted(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, amount: float, generator: torch.Generator
    ) -> tuple[Masks, Mapping[str, Tensor]]:
        """What is left, and parameter name -> new values of the whole parameter, where the method changes them."""
        ...
