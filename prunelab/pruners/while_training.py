"""Pruning filters while training: a few filters of every convolution go after each epoch, without any retraining.

Source: Roy, Panda, Srinivasan and Raghunathan, "Pruning Filters while Training for Efficiently Optimizing Deep Learning
Networks", IJCNN 2020 (arXiv 2003.02800). Only the abstract could be read: filters go during the training itself; L1,
mean activation and random are compared. The schedule is our own default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.masks import Masks, layer_of
from prunelab.pruners.activations import unit_sums
from prunelab.pruners.base import Context, Progress, Pruner, Step
from prunelab.pruners.scores import magnitude, random, reduce_to_units
from prunelab.pruners.select import keep_highest_units, scored_names, units_of
from prunelab.pruners.units import unit_masks
from prunelab.runs.columns import need
from prunelab.settings import Fraction, settings
from prunelab.structure.chains import ShrinkError, chain, remove_units
from prunelab.structure.cost import layer_macs
from prunelab.structure.shrink import remove_dead
from prunelab.structure.watch import StructureError

if TYPE_CHECKING:
    import pandas as pd

PASSES = 3  # forward, gradient of the inputs, gradient of the weights: each as many multiply-accumulates (own model)


@settings
class WhileTraining(Pruner):
    """After each epoch the lowest filters of every layer go, so many that the schedule's number is reached.

    Of a layer that began with C filters, ``target_pruned`` are gone after epoch e: none before ``start``, the
    ``fraction`` from ``stop`` on, linearly between, rounded down cumulatively; never all. Scores, per layer, over the
    filters that are left: ``"l1"``: sum of |w| over the inputs that are left; ``"activation"``: the mean behind the
    ReLU over the training part, with the weights at the end of the epoch; ``"random"``. A filter that went never comes
    back. In a plain chain it is removed physically, with its bias and the inputs of the next layer, and the optimiser's
    moments of the others stay; in any other model its weights, its bias and its BatchNorm's are masked.

    The criteria and that pruning happens while training are the paper's. Our own defaults: linear between a fifth and
    four fifths of the training, the same fraction in every layer, the first included.

    Attributes:
        score: what decides.
        fraction: of the filters of each layer, at the end; the abstract names 50 % and 80 %.
        start: share of the training before which nothing goes.
        stop: share of the training after which nothing goes.
        granularity: ``"filter"``, as published; ``"neuron"`` or ``"unit"`` (both) prune hidden Linear layers as well.
    """

    while_training: ClassVar[bool] = True
    reads_amount: ClassVar[bool] = False

    score: Literal["l1", "activation", "random"] = "l1"
    fraction: Fraction = 0.5
    start: float = 0.2
    stop: float = 0.8
    granularity: Literal["filter", "neuron", "unit"] = "filter"

    def __post_init__(self) -> None:
        """Refuse a schedule that does not fit into the training."""
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"start = {self.start}, stop = {self.stop}: should be shares of the training, start first")

    def due(self, progress: Progress) -> bool:
        """Whether the schedule has risen since the last time."""
        before = 0.0 if progress.last is None else self._share(progress.last, progress.epochs)
        return self._share(len(progress.losses) - 1, progress.epochs) > before

    def prune(self, now: Context, amount: float) -> Step:
        """Remove what is due."""
        names = scored_names(now.model, now.masks, self.granularity)
        there = units_of(now.model, now.masks, names)
        began = {layer: int(now.state.get(layer, torch.tensor(len(keep)))) for layer, keep in there.items()}
        epochs = now.progress.epochs
        when = len(now.progress.losses) - 1, self.start * epochs, self.stop * epochs
        count = {
            layer: target_pruned(began[layer], self.fraction, *when) - (began[layer] - int(keep.sum()))
            for layer, keep in there.items()
        }
        state = {layer: torch.tensor(units) for layer, units in began.items()}
        if not any(count.values()):
            return Step(now.masks, rate=0.0, state=state, note="not yet a whole filter")
        scores = self._scores(now, names)
        kept = keep_highest_units(scores, there, count, now.generator)
        return without(now, kept, scores, state)

    def _share(self, epoch: int, epochs: int) -> float:
        return progress_of(epoch, self.start * epochs, self.stop * epochs)

    def _scores(self, now: Context, names: Sequence[str]) -> dict[str, Tensor]:
        """Layer -> float [units], higher = keep."""
        if self.score == "random":
            return random(now.model, names, now.generator, units=True)
        if self.score == "l1":
            sizes = magnitude(now.model, names)
            for name, columns in _inputs_left(now).items():
                if name in sizes:
                    sizes[name] = torch.zeros_like(sizes[name]).index_copy_(1, columns, sizes[name][:, columns])
            return reduce_to_units(now.model, sizes, names)
        sums, samples = unit_sums(now.model, [layer_of(name) for name in names], now.inputs(), _mean_over_positions)
        return {layer: (total / samples).float() for layer, total in sums.items()}


def _inputs_left(now: Context) -> dict[str, Tensor]:
    """Weight -> the inputs of its layer that are still there, where a model that is only masked has lost some.

    A model whose way cannot be followed counts them all, and so do grouped convolutions.
    """
    if now.masks.kept == now.masks.total or (now.example is None and not any(True for _ in now.batches())):
        return {}
    try:
        chain(now.model)  # what went from a chain went physically
    except ShrinkError:
        with contextlib.suppress(StructureError):
            index = remove_dead(now.model, now.masks, now.sample()).index
            return {name: axes[1] for name, axes in index.items() if len(axes) > 1 and axes[1].dim() == 1}
    return {}


def _mean_over_positions(output: Tensor, positions: Sequence[int]) -> Tensor:
    return (output.mean(list(positions)) if positions else output).sum(0)


def progress_of(epoch: int, start: float, stop: float) -> float:
    """Which share of the pruning is done after an epoch (0-based) that begins at ``start`` and ends at ``stop``."""
    return min(max((epoch + 1 - start) / (stop - start), 0.0), 1.0)


def target_pruned(filters: int, fraction: float, epoch: int, start: float, stop: float) -> int:
    """Filters of a layer that are to be gone after an epoch; at least one stays.

    Args:
        filters: that the layer began with.
        fraction: to be gone at the end.
        epoch: 0-based.
        start: epoch at which the pruning begins; need not be whole.
        stop: epoch at which it is over.
    """
    return min(int(filters * fraction * progress_of(epoch, start, stop) + 1e-9), filters - 1)


def planned_saving(
    model: nn.Module,
    input_shape: tuple[int, ...],
    fraction: float,
    epochs: int,
    start: float = 0.2,
    stop: float = 0.8,
    retrain: int = 10,
) -> float:
    """Share of the multiply-accumulates of the convolutions that pruning while training saves, without any training.

    The reference trains the whole network for as many epochs, then retrains the pruned one.

    Args:
        model: whose convolutions read one another in the order of its modules, as those of a VGG do.
        input_shape: of one sample.
        fraction: of the filters of every convolution.
        epochs: of the training.
        start: share of the training before which nothing goes.
        stop: share after which nothing goes.
        retrain: epochs of the reference's retraining.
    """
    macs_of = layer_macs(model, input_shape)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    spent = [(layer.weight.shape[0], macs_of[f"{name}.weight"]) for name, layer in layers]

    def work(after: int) -> float:
        """Of the network that is left after that many epochs."""
        total, before = 0.0, 1.0
        for filters, macs in spent:
            left = 1 - target_pruned(filters, fraction, after - 1, start * epochs, stop * epochs) / filters
            total, before = total + macs * before * left, left
        return total

    reference = epochs * work(0) + retrain * work(epochs)
    return 1 - sum(work(epoch) for epoch in range(epochs)) / reference


def without(
    now: Context,
    kept: Mapping[str, Tensor],
    scores: Mapping[str, Tensor] | None,
    state: Mapping[str, Tensor],
    **more: Any,
) -> Step:
    """The network without some units: cut to size where it is a plain chain, masked elsewhere.

    Args:
        now: the network as it was trained.
        kept: layer -> bool [units], what is left.
        scores: for the record.
        state: what the method wants back.
        more: further fields of the ``Step``.
    """
    fewer = now.masks & unit_masks(now.model, kept)
    try:
        smaller = remove_units(now.model, {layer: keep.nonzero().flatten() for layer, keep in kept.items()})
    except ShrinkError:  # no plain chain
        smaller, left = None, fewer
    else:
        left = Masks({name: smaller.cut(name, mask) for name, mask in fewer.items()})
    rate = 1 - left.weights.kept / max(now.masks.weights.kept, 1)
    return Step(fewer, scores, cut=smaller, rate=rate, state=state, **more)


def training_cost(rounds: pd.DataFrame, samples: int, by: Sequence[str] = ("strategy", "seed", "id")) -> pd.DataFrame:
    """What whole trainings cost, counted and measured.

    Args:
        rounds: one row per run and round: macs (of the network that was trained in it), epochs, seconds, prune_seconds;
            ``by``; where layers may drop out of the training, ``learning_macs`` and round.
        samples: of the training part.
        by: columns that name a run.

    Returns:
        One row per run: ``forward_macs``: of all forward passes, those that store features of layers that dropped out
        among them; ``forward_share``: as a share of those of the whole network; ``training_macs``: forward and twice
        as much backward through what learns (our own cost model); ``training_seconds``: measured, with the time of
        pruning and storing.
    """
    keys = [name for name in by if name in rounds]
    need(rounds, [*keys, "macs", "epochs", "seconds", "prune_seconds"], "training_cost")
    rows = rounds.reset_index(drop=True)
    learning, storing = rows["macs"], 0
    if "learning_macs" in rows:  # NaN in the rows of methods that store nothing
        learning = rows["learning_macs"].fillna(rows["macs"])
        fewer = rows.sort_values("round").groupby(keys, sort=False)["learning_macs"].shift(-1)
        storing = (rows["learning_macs"] - fewer).fillna(0)
    passes = learning * rows["epochs"]
    spent = rows.assign(
        forward_macs=(passes + storing) * samples,
        training_macs=(PASSES * passes + storing) * samples,
        training_seconds=rows["seconds"] + rows["prune_seconds"],
        whole=rows["macs"] * rows["epochs"] * samples,
    )
    columns = ["forward_macs", "training_macs", "training_seconds", "whole"]
    summed = spent.groupby(keys, sort=False)[columns].sum().reset_index()
    return summed.assign(forward_share=summed["forward_macs"] / summed.pop("whole"))
