"""What a pruning method is: ``Pruner``, what it may look at (``Context``), and what it answers (``Step``)."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final

import torch
from torch import Generator, Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.pruners.units import by_layer, remaining, remove_lowest
from prunelab.structure.forward import masked, samples

Reads = Literal["nothing", "inputs", "labels", "held_out"]
Loss = Callable[[Any, Any], Tensor]  # outputs, targets -> one number, the mean over the samples
# From a network (that one, or what unit masks leave of it) to parameter name -> gradient, of the parameter's shape.
Penalty = Callable[[nn.Module], Mapping[str, Tensor]]


class Cut(Protocol):
    """A smaller model, and how it lies inside the one it came from; ``prunelab.structure.chains.Shrunk`` is one.

    Attributes:
        model: the smaller module; the old one is untouched.
        index: parameter name -> for each axis the positions kept, int64.
    """

    model: nn.Module
    index: Mapping[str, tuple[Tensor, ...]]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Bring a mask, a moment or anything else of the old shape of parameter ``name`` to its new shape."""
        ...


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

    losses: Sequence[float] = ()
    losses_of_batches: Sequence[float] = ()
    epochs: int = 0
    last: int | None = None
    accuracies: Sequence[float] = ()
    lr: float = 1.0


@dataclass(frozen=True)
class Context:
    """A network at the moment at which it is pruned; nothing of it may be changed.

    Attributes:
        model: as it was trained; its pruned weights are zero.
        masks: what is still there.
        generator: the only source of randomness.
        batches: called, gives the data as ``(inputs, targets)``, scaled, in the data's order, or inputs alone; methods
            read them through ``inputs`` and ``pairs``.
        start: called, gives the weights before the training, parameter name -> tensor; None: they are not known.
        loss: of outputs and targets, the mean over the samples; None: cross entropy, where the targets are classes.
        example: one batch of inputs, from which a model is understood; None: of the data.
        exact: whether channels over which statistics are taken (LayerNorm, GroupNorm) have to stay.
        progress: the training so far.
        moments: optimiser state, kind -> parameter name -> tensor of the parameter's shape.
        state: what the method's last ``Step`` left for it; before that, what its ``begin`` gave.
    """

    model: nn.Module
    masks: Masks
    generator: Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    batches: Callable[[], Iterable[Any]] = tuple
    start: Callable[[], Mapping[str, Tensor] | None] = lambda: None
    loss: Loss | None = None
    example: Any = None
    exact: bool = True
    progress: Progress = Progress()
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def having(self, masks: Masks) -> Context:
        """The same moment with other masks."""
        return dataclasses.replace(self, masks=masks)

    def inputs(self) -> Iterator[Any]:
        """The inputs of every batch, targets left out.

        Raises:
            PrunelabError: there are none, or NaN is among them.
        """
        for batch in self._batches():
            yield batch[0] if isinstance(batch, tuple | list) else batch

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Inputs and targets of every batch.

        Raises:
            PrunelabError: there are none, NaN is among them, or a batch is no pair.
        """
        for batch in self._batches():
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise PrunelabError("this method looks at inputs and targets: give batches= of pairs (x, y)")
            if samples(batch[0]) != samples(batch[1]):
                counts = f"{samples(batch[0])} inputs and {samples(batch[1])} targets"
                raise PrunelabError(f"a batch has {counts}: should be as many")
            yield batch[0], batch[1]

    def sample(self) -> Any:
        """One small batch of inputs: ``example``, or two samples of the data.

        Raises:
            PrunelabError: neither is there.
        """
        if self.example is not None:
            return self.example
        for batch in self.batches() or ():
            x = batch[0] if isinstance(batch, tuple | list) else batch
            return x[:2] if isinstance(x, Tensor) else x
        raise PrunelabError("the model has to be seen running: give example=, one batch of inputs")

    def _batches(self) -> Iterator[Any]:
        number = -1
        for number, batch in enumerate(self.batches() or ()):
            parts = batch if isinstance(batch, tuple | list) else (batch,)
            if any(map(_has_nan, parts)):
                raise PrunelabError(f"batch {number} has NaN among its numbers: leave these samples out")
            yield batch
        if number < 0:
            raise PrunelabError("this method looks at data: give batches=, pairs of inputs and targets, at least one")


def _has_nan(part: Any) -> bool:
    floats = isinstance(part, Tensor) and part.is_floating_point()
    return floats and bool(part.detach().sum().isnan()) and bool(part.isnan().any())


@dataclass(frozen=True)
class Step:
    """What a method made of a network.

    Attributes:
        masks: what is left, in the shapes of the network as it was.
        scores: parameter name -> one per weight, or layer name -> one per unit, higher = keep; None: there are none.
        weights: parameter or buffer name -> new values of the whole, where the method changes them.
        cut: the smaller network, where units were removed physically; None: it has the shapes that it had.
        chosen: what the scores alone left, where more went with it; None: ``masks``.
        rate: fraction of the remaining weights or units that was asked for; None: the amount that the method was given.
        fresh: whether the optimiser begins anew; False: its moments are kept, those of removed units left out.
        state: tensors that the method wants back the next time it acts.
        note: one line for the record; empty when there is nothing to say.
        failure: why the run cannot go on; None while it can.
        returns: whether what ``masks`` keeps and the masks before did not comes back, as in a roll-back; the record
            then has it as never gone.
        frozen: so many leading modules of the model, a chain (``frozen.parts``), learn no more: the trainer stores what
            they give for every training sample and trains the rest on that. Never fewer than before.
    """

    masks: Masks
    scores: Mapping[str, Tensor] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    cut: Cut | None = None
    chosen: Masks | None = None
    rate: float | None = None
    fresh: bool = False
    state: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""
    failure: str | None = None
    returns: bool = False
    frozen: int = 0


class Pruner(ABC):
    """A pruning method: a frozen class made with ``settings``, whose fields are its hyper-parameters.

    Its ``prune`` is all that it has to have. The attributes below say the rest; a field of the same name takes an
    attribute's place, as does a property where the answer depends on fields.

    Attributes:
        granularity: what goes.
        reads: the data that it looks at: nothing, inputs alone, inputs with targets, or those of the validation part,
            for a method that judges networks by data that they have not learnt.
        compares_with_start: whether it compares with the weights from before the training.
        classes_only: whether targets have to be classes.
        reads_amount: whether the amount of a round decides how much goes.
        allow_empty: whether a layer may lose all.
        keeps_one: whether it keeps one unit of every layer by its own rule.
        while_training: whether it acts at the end of epochs, within one training; ``due`` says after which.
        penalises: whether it ever adds a ``penalty`` to the loss.
        stores_features: whether it freezes layers, whose outputs are stored then.
        version: of a method of your own, counted up when its numbers change, so that stored runs of it are made again;
            those of the package have theirs in the registry.
    """

    granularity = "weight"
    reads: Reads = "nothing"
    compares_with_start = False
    classes_only = False
    reads_amount = True
    allow_empty = False
    keeps_one = False
    while_training = False
    penalises = False
    stores_features = False
    version = 1

    @abstractmethod
    def prune(self, now: Context, amount: float) -> Step:
        """What is left when a fraction ``amount`` of what remains is gone. Pure: it changes nothing.

        Args:
            now: the network, and all that may be looked at.
            amount: fraction of the remaining weights or units, in [0, 1).
        """

    def check(self, model: nn.Module, masks: Masks) -> None:
        """Refuse, before anything trains, a model on which the method cannot act."""
        return  # most methods act on all that has something of their granularity

    def begin(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The state with which it acts for the first time; asked for before the first epoch."""
        return {}

    def due(self, progress: Progress) -> bool:
        """Whether to act after the newest epoch."""
        return False

    def signal(self, progress: Progress) -> float:
        """The number by which ``due`` decides, for the record; NaN where there is none."""
        return float("nan")

    def penalty(self, model: nn.Module, state: Mapping[str, Tensor]) -> Penalty | None:
        """The gradient of a penalty from now on, until the network or the state changes; None: no penalty.

        Args:
            model: the network that trains from now on.
            state: what the method's last ``Step`` left for it; at first what ``begin`` gave.
        """
        return None


class Ranking(Pruner):
    """A method that gives scores, then removes the lowest.

    Attributes:
        scope: whether all compete, or those of each layer.
        measured: how many times the scores are measured on the way to an amount, each time of what is left then. The
            density falls exponentially with them, as in Tanaka et al., NeurIPS 2020, algorithm 1.
    """

    scope = "global"
    measured = 1

    @abstractmethod
    def scores(self, now: Context) -> dict[str, Tensor]:
        """Scores, higher = keep: parameter name -> one per weight, or layer (or space) name -> one per unit."""

    def select(self, now: Context, scores: Mapping[str, Tensor], amount: float) -> Masks:
        """What is left of ``now.masks`` when the lowest scores are gone."""
        options = {"granularity": self.granularity, "scope": self.scope, "allow_empty": self.allow_empty}
        return remove_lowest(now, scores, amount, **options)

    @final
    def prune(self, now: Context, amount: float) -> Step:
        """``select`` after ``scores``, which alone reads data."""
        scores, after = self.scores(now), now.masks
        told = scores
        for number in range(self.measured):
            if number:
                left = now.having(after)
                with masked(now.model, after):
                    again = self.scores(left)
                there = {n: keep.to(again[n].device) for n, keep in remaining(left, again, self.granularity).items()}
                told = {name: torch.where(there[name], score, told[name]) for name, score in again.items()}
                scores = {name: score.masked_fill(~there[name], -torch.inf) for name, score in again.items()}
            last = number + 1 == self.measured
            after = self.select(now, scores, amount if last else 1 - (1 - amount) ** ((number + 1) / self.measured))
        return Step(after, by_layer(now, told, self.granularity))
