"""How much each layer can lose alone: accuracy with one layer pruned, and amounts by layer that follow from it.

>>> scan = sensitivity(model, (x, y), "magnitude")
>>> masks = prune(model, "magnitude", scan.amounts(tolerance=0.01))
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks, layer_of
from prunelab.pruners import Context, Pruner, Ranking, build, first_masks
from prunelab.pruners.forward import logits, looking
from prunelab.pruners.select import amount_to_count, check_amount, scored_names
from prunelab.settings import Prune

AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_BATCH = 500


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        frame: one row per layer and amount, amount 0 being the dense network: layer, amount, sparsity (of that layer),
            accuracy, samples.
    """

    frame: pd.DataFrame

    def amounts(self, tolerance: float = 0.01) -> dict[str, float]:
        """Layer -> the largest amount up to which the accuracy stays within ``tolerance`` of the dense network's.

        It goes up from 0 and ends before the first amount that loses more. All of them together lose more than each
        alone does: a scan knows nothing of what layers do to each other.

        Args:
            tolerance: share of the samples, as 0.01 for a point.
        """
        if not 0 <= tolerance <= 1:
            raise PrunelabError(f"tolerance = {tolerance}: should be a share between 0 and 1, as 0.01 for one point")
        found = {}
        for layer, rows in self.frame.groupby("layer", sort=False):
            rows = rows.sort_values("amount")
            enough = rows["accuracy"] >= rows["accuracy"].iloc[0] - tolerance
            found[str(layer)] = float(rows["amount"][enough.cummin()].iloc[-1])
        return found


def sensitivity(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    method: str | Pruner = "magnitude",
    *,
    amounts: Sequence[float] = AMOUNTS,
    layers: Iterable[str] | None = (),
    batches: Iterable[Any] | None = None,
    seed: int = 0,
    jobs: int | None = None,
    **options: Any,
) -> Scan:
    """Prune each layer alone, by every amount, without training, and measure.

    Source: Han et al., NIPS 2015, figure 6; Li et al., ICLR 2017, figure 2b.

    Args:
        model: any module whose outputs are logits [N, classes]; it is not changed.
        data: inputs as the model takes them, and labels [N]: samples that were not trained on, and not the test part
            where the result chooses anything.
        method: as for ``prune``.
        amounts: fractions of each layer, in [0, 1); where one rounds to all that a small layer has, one less goes, as
            the column ``sparsity`` tells.
        layers: names; () or None: all that the method may prune.
        batches: inputs and targets, for methods that look at data.
        seed: of every random choice.
        jobs: threads that measure side by side, each with a copy of the model; None: one per core.
        options: of the method.

    Raises:
        PrunelabError: one line, before anything is measured.
    """
    x, y = data
    if len(x) != len(y) or not len(y):
        raise PrunelabError(f"data has {len(x)} inputs and {len(y)} labels: should be as many, and at least one")
    for amount in amounts:
        check_amount(amount)
    pruner = build(Prune(method=method, options=options)) if isinstance(method, str) else method
    if not isinstance(pruner, Ranking):
        raise PrunelabError(f"{method!r} has no scores to rank: a scan needs a method that removes an amount")
    whole = {layer: first_masks(model, pruner, [layer]) for layer in _layers(model, pruner, layers)}
    given = None if batches is None else list(batches)
    now = Context(model, first_masks(model, pruner, list(whole)), draw(seed), lambda: given or ())
    scores = pruner.scores(now)

    tasks = [(layer, amount) for layer in whole for amount in sorted({0.0, *amounts})]
    chosen = []
    for layer, amount in tasks:
        alone = {name: score for name, score in scores.items() if name in (layer, *whole[layer])}
        fewer = amount if pruner.allow_empty else _leaving_one(amount, sum(score.numel() for score in alone.values()))
        own = dataclasses.replace(now, masks=whole[layer], generator=draw(seed))
        chosen.append(pruner.select(own, alone, fewer) if fewer else whole[layer])

    def accuracy(masks: Masks) -> float:
        own = copy.deepcopy(model).eval()
        masks.apply_(own)
        return _right(own, x, y) / len(y)

    with looking(model), _workers(x, jobs) as pool:
        measured = list(pool.map(accuracy, chosen))
    frame = pd.DataFrame(tasks, columns=["layer", "amount"])
    sparsity = [masks.weights.sparsity for masks in chosen]
    return Scan(frame.assign(sparsity=sparsity, accuracy=measured, samples=len(y)))


def draw(seed: int) -> torch.Generator:
    """A generator of its own for every selection, so that no order of work changes a result."""
    return torch.Generator().manual_seed(seed)


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
def _workers(x: Tensor, jobs: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads side by side, which share the cores: each takes its part of torch's threads."""
    if jobs is not None and jobs < 1:
        raise PrunelabError(f"jobs = {jobs}: should be 1 or more; None: one for each core")
    threads = torch.get_num_threads()
    workers = 1 if x.is_cuda else jobs or threads
    try:
        each = max(1, threads // workers)
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    pairs = zip(x.split(_BATCH), y.split(_BATCH), strict=True)
    return sum(int((logits(model, inputs).argmax(1) == labels).sum()) for inputs, labels in pairs)
