"""Learn & drop: layers that have settled drop out of the training, of the forward pass too; the network stays whole.

Source: Cruciata, Cruciata, Lo Presti, van Gemert and La Cascia, "Learn & drop: fast learning of CNNs based on layer
dropping", Neural Computing & Applications 36:10839-10851, 2024 (arXiv 2604.23403). Only the abstract could be read: a
score says how much each layer's parameters change and whether it will go on learning; by it the network that trains
is made smaller, which saves forward operations. The score, the rule and the times below are our own default.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.pruners.base import Context, Progress, Pruner, Step
from prunelab.settings import settings
from prunelab.structure.frozen import parts


@settings
class LearnAndDrop(Pruner):
    """After each epoch the longest settled prefix stops learning; what it gives takes the place of the data.

    Units are the weighted layers of a chain with the BatchNorm, activation and pooling behind them; a residual block is
    one unit. Of unit u after epoch e, with lr the learning rate of the epoch:

    - change c = |theta(e) - theta(e - 1)|_1 / (parameters of u * lr); theta(-1) are the first weights
    - relative r = c / (largest c so far): 1 = changes as much as ever, near 0 = settled
    - trend d = (c(e - lag) - c(e)) / c(e - lag); of r it would be 0 for a layer whose changes still grow
    - settled: r < ``threshold``, or |d| < ``flat`` in each of the last ``patience`` epochs

    The modules of a settled prefix are put into evaluation mode, what they give for every training sample is stored as
    float16, and the rest of the network trains on that. Tests run the whole network, whose weights are all kept:
    nothing is pruned. Random augmentation would be frozen with the features, so it is refused; dropout in a prefix is
    off from then on. Every epoch is a round of the record.

    Attributes:
        threshold: tau.
        flat: rho.
        lag: m, in epochs.
        patience: p, in epochs.
        warmup: epochs at the end of which nothing drops.
        every: epochs between evaluations.
        keep: units at the end of the network that never drop.
    """

    while_training: ClassVar[bool] = True
    reads_amount: ClassVar[bool] = False
    stores_features: ClassVar[bool] = True

    threshold: float = 0.3
    flat: float = 0.05
    lag: int = 1
    patience: int = 3
    warmup: int = 5
    every: int = 1
    keep: int = 2

    def __post_init__(self) -> None:
        """Refuse what is no number of epochs or units."""
        for name, least in (("lag", 1), ("patience", 1), ("warmup", 0), ("every", 1), ("keep", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} = {value}: should be {least} or more")

    def check(self, model: nn.Module, masks: Masks) -> None:
        """Refuse a model of which nothing can drop out."""
        if len(found := units(model)) <= self.keep:
            raise PrunelabError(f"learn_and_drop: the model has {len(found)} layers and keep = {self.keep}: none drops")

    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights with which the training begins."""
        return {f"was/{name}": p.detach().clone() for name, p in model.named_parameters()}

    def due(self, progress: Progress) -> bool:
        """After every epoch, since the score needs the weights of each."""
        return True

    def prune(self, now: Context, amount: float) -> Step:
        """Take the changes of this epoch down, and see which units have settled."""
        found = units(now.model)
        dropped = int(now.state.get("dropped", torch.tensor(0)))
        weights = dict(now.model.named_parameters())
        learning = {name: weights[name].detach() for unit in found[dropped:] for name in unit.parameters}
        changes = torch.full((1, len(found)), torch.nan, dtype=torch.float64)
        for number, unit in enumerate(found[dropped:], start=dropped):
            moved = sum(float((learning[n] - now.state[f"was/{n}"]).abs().sum()) for n in unit.parameters)
            changes[0, number] = moved / (sum(learning[n].numel() for n in unit.parameters) * now.progress.lr)
        changes = torch.cat([now.state.get("changes", changes[:0]).cpu(), changes])
        epoch = len(now.progress.losses) - 1
        ready = dropped
        if epoch >= self.warmup and (epoch + 1) % self.every == 0:
            rest = settled(changes, self.threshold, self.flat, self.lag, self.patience)
            while ready < len(found) - self.keep and rest[ready]:
                ready += 1
        state = {
            "changes": changes,
            "dropped": torch.tensor(ready),
            **{f"was/{n}": learning[n].clone() for unit in found[ready:] for n in unit.parameters},
        }
        note = f"learns no more: {', '.join(unit.name for unit in found[dropped:ready])}"
        note = note if ready > dropped else f"{len(found) - ready} of {len(found)} layers learn"
        return Step(now.masks, rate=0.0, state=state, note=note, frozen=found[ready].first)


class Unit:
    """Modules that settle together.

    Attributes:
        name: of the weighted layer, or of the block.
        first: how many modules of the chain lie before it.
        parameters: names in the model.
    """

    def __init__(self, name: str, first: int) -> None:
        self.name, self.first = name, first
        self.parameters: list[str] = []


def units(model: nn.Module) -> list[Unit]:
    """The units of a chain in forward order; each begins with a module that holds a Linear or Conv2d.

    Raises:
        PrunelabError: the model is no chain.
    """
    found: list[Unit] = []
    for number, (name, module) in enumerate(parts(model)):
        if any(isinstance(inner, nn.Linear | nn.Conv2d) for inner in module.modules()):
            found.append(Unit(name, number if found else 0))
        if found:
            found[-1].parameters += [f"{name}.{own}" for own, _ in module.named_parameters()]
    return found


def settled(changes: Tensor, threshold: float, flat: float, lag: int = 1, patience: int = 3) -> list[bool]:
    """Which units have settled after the last epoch.

    Args:
        changes: c, float [epochs, units]; NaN for units that dropped out.
        threshold: below this relative change.
        flat: below this trend, in each of the last ``patience`` epochs.
        lag: epochs over which the trend is taken.
        patience: in epochs.
    """
    small = changes[-1] / changes.cummax(0).values[-1] < threshold
    if len(changes) < lag + patience:
        return small.tolist()
    before, after = changes[-lag - patience : -lag], changes[-patience:]
    return (small | (((before - after) / before).abs() < flat).all(0)).tolist()
