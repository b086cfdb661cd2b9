"""What a method answers that prunes while the network trains: when it acts, and what the network is afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor, nn

from prunelab.masks import Masks


@dataclass(frozen=True)
class Progress:
    """A training so far, as a method may see it; no test data are in it.

    Attributes:
        losses: validation loss of every epoch so far, mean over samples.
        losses_of_batches: likewise, as the mean over batches of their means.
        epochs: the whole budget.
        last: index of the epoch after which the method acted last; None before the first time.
    """

    losses: Sequence[float]
    losses_of_batches: Sequence[float]
    epochs: int
    last: int | None


@dataclass(frozen=True)
class Change:
    """A network after a method acted on it.

    Attributes:
        model: the module to train on; a new one where units were removed physically.
        masks: its masks.
        moments: optimiser state, kind -> parameter -> tensor in the new shapes; None: a fresh optimiser.
        masks_before_removal: masks in the shapes of the old model, that is, which weights the selection took.
        index: parameter -> for each axis the positions of the old model that are left.
        rate: fraction of the remaining weights that was asked for.
        scores: parameter -> score of each weight, in the shapes of the old model.
        state: tensors the method wants back the next time it acts.
        note: one line for the record; empty when there is nothing to say.
        failure: why the run cannot go on; None while it can.
    """

    model: nn.Module
    masks: Masks
    moments: Mapping[str, Mapping[str, Tensor]] | None
    masks_before_removal: Masks
    index: Mapping[str, tuple[Tensor, ...]]
    rate: float
    scores: Mapping[str, Tensor] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""
    failure: str | None = None


@runtime_checkable
class DuringTraining(Protocol):
    """A pruner that acts at the end of epochs, within one training."""

    def due(self, progress: Progress) -> bool:
        """Whether to act after the newest epoch."""
        ...

    def act(
        self,
        model: nn.Module,
        masks: Masks,
        moments: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Tensor],
        generator: Generator,
    ) -> Change:
        """Prune now; the arguments stay as they are."""
        ...

    def check(self, model: nn.Module) -> None:
        """Refuse, before anything trains, a model on which the method cannot act."""
        ...
