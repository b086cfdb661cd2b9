"""What a method answers that prunes while the network trains: when it acts, and what the network is afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        accuracies: validation accuracy of every epoch so far.
        lr: learning rate of the newest epoch.
    """

    losses: Sequence[float]
    losses_of_batches: Sequence[float]
    epochs: int
    last: int | None
    accuracies: Sequence[float] = ()
    lr: float = 1.0


@dataclass(frozen=True)
class Moment:
    """A network at the end of an epoch, as a method finds it when it acts; nothing of it may be changed.

    Attributes:
        model: as it was trained.
        masks: its masks.
        moments: optimiser state, kind -> parameter name -> tensor of the parameter's shape.
        state: what the method's last ``Change`` left for it; empty at first.
        generator: the only source of randomness.
        progress: the training so far.
        batches: called, gives the training part as (inputs, targets) in large batches, scaled, in the data's order.
    """

    model: nn.Module
    masks: Masks
    moments: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Tensor]
    generator: Generator
    progress: Progress = Progress((), (), 0, None)
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]] = tuple


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
        returns: whether what ``masks`` keeps and the masks before did not comes back, as in a roll-back; the record
            then has it as never gone.
        frozen: so many leading modules of the model, a chain (``prefix.parts``), learn no more: the trainer stores what
            they give for every training sample and trains the rest on that. Never fewer than before.
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
    returns: bool = False
    frozen: int = 0


@runtime_checkable
class DuringTraining(Protocol):
    """A pruner that acts at the end of epochs, within one training; ``pruners/dyprune.py`` is the example."""

    def due(self, progress: Progress) -> bool:
        """Whether to act after the newest epoch."""
        ...

    def act(self, now: Moment) -> Change:
        """Prune now."""
        ...

    def check(self, model: nn.Module) -> None:
        """Refuse, before anything trains, a model on which the method cannot act."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """A pruner that wants to know how the network began."""

    def first_state(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What ``state`` is before the method acts for the first time; called before the first epoch."""
        ...


@runtime_checkable
class Penalising(Protocol):
    """A pruner that adds a penalty to the loss while the network trains, whenever it prunes."""

    def penalty(self, model: nn.Module, state: Mapping[str, Tensor]) -> Penalty | None:
        """The gradient of the penalty from now on, until the network or the state changes; None: no penalty.

        Args:
            model: the network that trains from now on.
            state: what the method's last ``Change`` left for it; empty at first.
        """
        ...


# From a network (that one, or what unit masks leave of it) to parameter name -> gradient, of the parameter's shape.
Penalty = Callable[[nn.Module], Mapping[str, Tensor]]
