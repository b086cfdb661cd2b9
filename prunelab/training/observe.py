"""Looking on while a run trains: what is there to be seen after an epoch, and what may be wished for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from prunelab import pruners
from prunelab.masks import Masks
from prunelab.settings import Run


@dataclass(frozen=True)
class Seen:
    """A run after an epoch, for whoever watches it train; nothing of it may be changed.

    Attributes:
        run: its settings.
        epochs: its rows so far; the last one changes when the network is pruned on request.
        rounds: likewise, of the rounds that have ended.
        budget: epochs that it takes at most.
        model: the network with which the next epoch begins.
        masks: what of it stays zero.
        widths: layer -> units or filters of the dense network.
        weights: prunable weights that are left.
        weights_total: those of the dense network.
        may_prune: whether a pruning can be asked for now.
        over: whether it trains no more.
    """

    run: Run
    epochs: Sequence[Mapping[str, Any]]
    rounds: Sequence[Mapping[str, Any]]
    budget: int
    model: nn.Module
    masks: Masks
    widths: Mapping[str, int]
    weights: int
    weights_total: int
    may_prune: bool
    over: bool


# What is to happen next, asked after every epoch; it may take its time. "prune": at once, which makes the run another
# one, ``pruned_after``; "save": so that a killed run goes on from here; "stop": save, and train no more.
Watch = Callable[[Seen], Literal["go on", "prune", "save", "stop"]]


def most_epochs(run: Run) -> int:
    """Epochs that a run can take at most."""
    during = pruners.build(run.prune).while_training
    return run.train.epochs + (0 if during else run.prune.rounds * (run.retrain or run.train).epochs)


def pruned_after(run: Run, epoch: int) -> Run:
    """The run that is pruned after ``epoch`` as well, whatever its method says: other settings, another id."""
    also = (*run.prune.also_after, epoch)
    return dataclasses.replace(run, prune=dataclasses.replace(run.prune, also_after=also))
