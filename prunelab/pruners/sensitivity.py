"""How much each layer can lose alone: accuracy, or any other measure, with one layer pruned, and amounts by layer.

>>> scan = sensitivity(model, (x, y), "magnitude")
>>> masks = prune(model, "magnitude", scan.amounts(tolerance=0.01))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunelab.errors import PrunelabError, checked_seed
from prunelab.masks import Masks, layer_of
from prunelab.pruners import Context, Pruner, Ranking, build, first_masks
from prunelab.pruners.measures import Measure, check_labels, chosen, usual
from prunelab.pruners.select import amount_to_count, check_amount, scored_names
from prunelab.settings import Prune
from prunelab.structure.forward import call, copied, copies, looking, rows, samples

AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_BATCH = 500


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        frame: one row per layer and amount, amount 0 being the dense network: layer, amount, sparsity (of that layer),
            samples, and the measure: accuracy, metric or loss.
    """

    frame: pd.DataFrame

    @property
    def measure(self) -> str:
        """``"accuracy"``, ``"metric"`` or ``"loss"``; of a loss less is better."""
        return next(name for name in ("metric", "loss", "accuracy") if name in self.frame)

    def amounts(self, tolerance: float = 0.01) -> dict[str, float]:
        """Layer -> the largest amount up to which it is worse than the dense network by ``tolerance`` at most.

        It goes up from 0 and ends before the first amount that loses more. All of them together lose more than each
        alone does: a scan knows nothing of what layers do to each other.

        Args:
            tolerance: share of the samples, as 0.01 for a point; of a metric or a loss, in its own unit.
        """
        if not tolerance >= 0:
            raise PrunelabError(f"tolerance = {tolerance}: should be 0 or more")
        if self.measure == "accuracy" and tolerance > 1:
            raise PrunelabError(f"tolerance = {tolerance}: should be a share between 0 and 1, as 0.01 for one point")
        found = {}
        for layer, own in self.frame.groupby("layer", sort=False):
            own = own.sort_values("amount")
            better = -own["loss"] if self.measure == "loss" else own[self.measure]
            enough = better >= better.iloc[0] - tolerance
            found[str(layer)] = float(own["amount"][enough.cummin()].iloc[-1])
        return found


def sensitivity(
    model: nn.Module,
    data: tuple[Any, Any],
    method: str | Pruner = "magnitude",
    *,
    amounts: Sequence[float] = AMOUNTS,
    layers: Iterable[str] | None = (),
    batches: Iterable[Any] | None = None,
    metric: Callable[[Any, Any], Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    seed: int = 0,
    jobs: int | None = None,
    **options: Any,
) -> Scan:
    """Prune each layer alone, by every amount, without training, and measure.

    Source: Han et al., NIPS 2015, figure 6; Li et al., ICLR 2017, figure 2b.

    Args:
        model: any module; it is not changed, nor are the data.
        data: inputs as the model takes them (a tensor; a tuple or a dict where it takes several), and targets, as
            labels [N] of a classifier: samples that were not trained on, and not the test part where the result chooses
            anything.
        method: as for ``prune``.
        amounts: fractions of each layer, in [0, 1); where one rounds to all that a small layer has, one less goes, as
            the column ``sparsity`` tells.
        layers: names; () or None: all that the method may prune.
        batches: inputs and targets, for methods that look at data.
        metric: function of all outputs and targets -> a number, more is better, in place of accuracy.
        loss: likewise, less is better. One of the two is needed where the model is no classifier. Methods that follow
            a gradient follow its.
        seed: of every random choice.
        jobs: threads that measure side by side, each with a copy of the model; None: one per core.
        options: of the method.

    Raises:
        PrunelabError: one line, before anything is measured.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise PrunelabError(f"data is a {type(data).__name__}: give a pair, inputs and targets")
    x, y = data
    if samples(x) != samples(y) or not samples(y):
        raise PrunelabError(
            f"data has {samples(x)} inputs and {samples(y)} labels: should be as many, and at least one"
        )
    measure = chosen(metric, loss) or _classification(model, x, y)
    for amount in amounts:
        check_amount(amount)
    pruner = build(Prune(method=method, options=options)) if isinstance(method, str) else method
    if not isinstance(pruner, Ranking):
        raise PrunelabError(f"{method!r} has no scores to rank: a scan needs a method that removes an amount")
    whole = {layer: first_masks(model, pruner, [layer]) for layer in _layers(model, pruner, layers)}
    given = None if batches is None else list(batches)
    now = Context(model, first_masks(model, pruner, list(whole)), draw(seed), lambda: copies(given or ()), loss=loss)
    with looking(model):
        scores = pruner.scores(now)

    tasks = [(layer, amount) for layer in whole for amount in sorted({0.0, *amounts})]
    chosen_masks = []
    for layer, amount in tasks:
        alone = {name: score for name, score in scores.items() if name in (layer, *whole[layer])}
        fewer = amount if pruner.allow_empty else _leaving_one(amount, sum(score.numel() for score in alone.values()))
        own = dataclasses.replace(now, masks=whole[layer], generator=draw(seed))
        chosen_masks.append(pruner.select(own, alone, fewer) if fewer else whole[layer])

    def measured(masks: Masks) -> float:
        own = copied(model).eval()
        masks.apply_(own)
        pieces = (slice(start, start + _BATCH) for start in range(0, samples(y), _BATCH))
        with torch.no_grad():
            *_, (value, _) = measure.running((call(own, rows(x, piece)), rows(y, piece)) for piece in pieces)
        return value

    with looking(model), _workers(x, jobs) as pool:
        found = list(pool.map(measured, chosen_masks))
    frame = pd.DataFrame(tasks, columns=["layer", "amount"])
    sparsity = [masks.weights.sparsity for masks in chosen_masks]
    return Scan(frame.assign(sparsity=sparsity, **{measure.name: found}, samples=samples(y)))


def _classification(model: nn.Module, x: Any, y: Any) -> Measure:
    """Accuracy, where the model is a classifier and y are labels; refused otherwise."""
    with looking(model), torch.no_grad():
        outputs = call(model, rows(x, slice(0, 1)))
    measure = usual(outputs, rows(y, slice(0, 1)))
    if measure.name != "accuracy":
        what = f"outputs {tuple(outputs.shape[1:])} and targets {tuple(y.shape[1:])} of a sample are no classification"
        raise PrunelabError(f"{what}: give metric= (more is better) or loss= (less is better) of outputs and targets")
    check_labels(y, outputs.shape[-1])
    return measure


def draw(seed: int) -> torch.Generator:
    """A generator of its own for every selection, so that no order of work changes a result."""
    return torch.Generator().manual_seed(checked_seed(seed))


def _leaving_one(amount: float, left: int) -> float:
    """The amount, or where it rounds to all that are left, one by which all but one go, however it is rounded."""
    if left < 2:
        return 0.0
    return amount if amount_to_count(amount, left) < left else (left - 0.75) / left


def _layers(model: nn.Module, pruner: Pruner, layers: Iterable[str] | None) -> list[str]:
    """The layers that the method may prune, in forward order."""
    if chosen := [layers] if isinstance(layers, str) else list(layers or ()):
        return chosen
    masks = first_masks(model, pruner)
    return [layer_of(name) for name in scored_names(model, masks, pruner.granularity)]


@contextmanager
def _workers(x: Any, jobs: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads side by side, which share the cores: each takes its part of torch's threads."""
    if jobs is not None and jobs < 1:
        raise PrunelabError(f"jobs = {jobs}: should be 1 or more; None: one for each core")
    threads = torch.get_num_threads()
    on_cuda = any(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in tree_leaves(x))
    workers = 1 if on_cuda else jobs or threads
    try:
        each = max(1, threads // workers)
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
