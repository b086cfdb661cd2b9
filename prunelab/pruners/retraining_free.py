"""Retraining-free pruning: thresholds on |w| of a trained network, as high as a tolerated loss of accuracy allows.

Source: Ashouri, Abdelrahman and Dos Remedios, "Retraining-free methods for fast on-the-fly pruning of convolutional
neural networks", Neurocomputing 2019 (arXiv 1811.04199). Only the abstract could be read: three methods that do not
depend on the model, no retraining. The formulas of the three rules are second-hand, the rest is our own default.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.pruners.base import Context, Pruner, Reads, Step
from prunelab.runs.columns import need
from prunelab.settings import Fraction, settings
from prunelab.structure.forward import logits

if TYPE_CHECKING:
    import pandas as pd

Rule = Literal["flat", "triangular", "relative"]
RULES: tuple[Rule, ...] = ("flat", "triangular", "relative")


@settings
class RetrainingFree(Pruner):
    """Weights below a threshold go, once; of many thresholds those that remove most and lose no more than tolerated.

    With span = max(W) - min(W) of a layer, and ``limit`` a tenth of it:

    - ``flat``: one threshold for all layers, up to a tenth of the smallest span;
    - ``triangular``: from up to a tenth of the first layer's span to up to a tenth of the last one's, linearly between;
    - ``relative``: in each layer the threshold that removes a given share of its weights; the same share in all.

    The thresholds that are tried: ``steps`` equal steps from 0 to the limit (flat), half as many for each end
    (triangular), ``steps`` shares from 0 to just below 1 (relative). Those that would empty a layer are left out.
    Biases and BatchNorms stay. Our own: which spans count, the linear growth, the equal shares, and what is tried. The
    paper tolerates 5 points of top-5 accuracy on ImageNet.

    ``batches`` should be data that were neither learnt nor are reported on; in runs it is the validation part. Use it
    with ``rounds=1, recover="none"``; ``amount`` means nothing here.

    Attributes:
        rule: which thresholds.
        tolerance: what accuracy may be lost, as a share of 1.
        steps: how finely thresholds are tried.
        limit: of the thresholds of flat and triangular, as a share of a span.
        top: an answer counts as right when the class is among so many.
    """

    reads: ClassVar[Reads] = "held_out"  # it is to choose by data that the model has not learnt
    classes_only: ClassVar[bool] = True
    reads_amount: ClassVar[bool] = False

    rule: Rule = "relative"
    tolerance: Fraction = 0.01
    steps: Annotated[int, Field(ge=2)] = 20
    limit: Annotated[float, Field(gt=0)] = 0.1
    top: Annotated[int, Field(ge=1)] = 1

    @torch.no_grad()
    def prune(self, now: Context, amount: float) -> Step:
        """Search from the sparsest network down; the first that loses no more than tolerated is the answer."""
        judge = _Judge(now.model, now.pairs(), self.top)
        whole = judge.accuracy(now.masks)
        for candidate in candidates(now.model, now.masks, self.rule, self.steps, self.limit):
            masks = above(now.model, now.masks, candidate.thresholds)
            if whole - judge.accuracy(masks) <= self.tolerance + 1e-9:
                return Step(masks)
        return Step(now.masks)


class Candidate(NamedTuple):
    """One setting of a rule.

    Attributes:
        level: what was set, 0 to 1: of flat and relative one number, of triangular first and last.
        thresholds: parameter -> weights below it go.
        kept: weights that stay.
    """

    level: tuple[float, ...]
    thresholds: dict[str, float]
    kept: int


def thresholds(rule: Rule, weights: Sequence[Tensor], level: Sequence[float], limit: float = 0.1) -> list[float]:
    """The threshold of each layer.

    Args:
        rule: which.
        weights: of the layers, in forward order.
        level: of flat: share of the limit; of triangular: that of the first and that of the last layer; of relative:
            share of the weights that lie below, rounded to a whole number of them.
        limit: share of a span.
    """
    if rule == "relative":
        return [_quantile(weight, level[0]) for weight in weights]
    span = [float(weight.max() - weight.min()) for weight in weights]
    if rule == "flat":
        return [level[0] * limit * min(span)] * len(weights)
    first, last = level[0] * limit * span[0], level[1] * limit * span[-1]
    return [first + (last - first) * i / max(len(span) - 1, 1) for i in range(len(span))]


def levels(rule: Rule, steps: int) -> list[tuple[float, ...]]:
    """All settings of a rule that are tried."""
    if rule == "relative":
        return [(i / steps,) for i in range(steps)]
    if rule == "flat":
        return [(i / steps,) for i in range(steps + 1)]
    ends = [i / (steps // 2) for i in range(steps // 2 + 1)]
    return list(itertools.product(ends, ends))


@torch.no_grad()
def candidates(model: nn.Module, current: Masks, rule: Rule, steps: int = 20, limit: float = 0.1) -> list[Candidate]:
    """The settings of a rule, the sparsest first; without those that would empty a layer."""
    names = list(current.weights)
    weights = [(model.get_parameter(name) * current[name]).detach() for name in names]
    ordered = [weight[current[name]].abs().sort().values for name, weight in zip(names, weights, strict=True)]
    found = []
    for level in levels(rule, steps):
        each = thresholds(rule, weights, level, limit)
        left = [
            len(w) - int(torch.searchsorted(w, torch.tensor(t, dtype=w.dtype, device=w.device)))
            for w, t in zip(ordered, each, strict=True)
        ]
        if all(count or not len(weight) for count, weight in zip(left, ordered, strict=True)):
            found.append(Candidate(level, dict(zip(names, each, strict=True)), sum(left)))
    return sorted(found, key=lambda candidate: candidate.kept)


@torch.no_grad()
def above(model: nn.Module, current: Masks, thresholds: Mapping[str, float]) -> Masks:
    """What is left when weights below their threshold are gone."""
    return current & Masks({name: model.get_parameter(name).abs() >= at for name, at in thresholds.items()})


@torch.no_grad()
def sweep(
    model: nn.Module,
    batches: Iterable[Any],
    rules: Sequence[Rule] = RULES,
    *,
    layers: Sequence[str] = (),
    steps: int = 20,
    limit: float = 0.1,
    top: int = 1,
) -> pd.DataFrame:
    """The accuracy of a network at all settings of the rules; the network itself is not changed.

    Args:
        model: as it was trained.
        batches: inputs and targets, held out.
        rules: which.
        layers: that may be pruned; (): all.
        steps: as in ``RetrainingFree``.
        limit: as in ``RetrainingFree``.
        top: as in ``RetrainingFree``.

    Returns:
        One row per setting: rule, sparsity, accuracy, loss (of accuracy, against the unpruned network), thresholds (a
        dict, parameter -> threshold).
    """
    import pandas as pd

    current, judge = Masks.ones(model, layers), _Judge(model, batches, top)
    whole, rows = judge.accuracy(current), []
    for rule in rules:
        for candidate in candidates(model, current, rule, steps, limit):
            accuracy = judge.accuracy(above(model, current, candidate.thresholds))
            sparsity = 1 - candidate.kept / current.total
            rows.append((rule, sparsity, accuracy, whole - accuracy, candidate.thresholds))
    return pd.DataFrame(rows, columns=["rule", "sparsity", "accuracy", "loss", "thresholds"])


def chosen(settings: pd.DataFrame, tolerances: Sequence[float]) -> pd.DataFrame:
    """Of each rule the sparsest setting that loses no more than tolerated; rows of ``sweep`` with ``tolerance``."""
    import pandas as pd

    need(settings, ["rule", "sparsity", "loss"], "retraining_free.chosen", "rule")
    parts = [
        settings[settings["loss"] <= tolerance + 1e-9]
        .sort_values("sparsity", kind="stable")
        .groupby("rule", sort=False)
        .tail(1)
        .sort_index()
        .assign(tolerance=tolerance)
        for tolerance in tolerances
    ]
    return pd.concat(parts, ignore_index=True)


def frontier(settings: pd.DataFrame, sparsities: Sequence[float]) -> pd.DataFrame:
    """The least loss at which each rule gives a sparsity or more: one row per rule and sparsity that it can reach."""
    import pandas as pd

    need(settings, ["rule", "sparsity", "loss"], "retraining_free.frontier", "rule")
    rows = [
        (rule, at, reach.min())
        for rule, own in settings.groupby("rule", sort=False)
        for at in sparsities
        if len(reach := own.loc[own["sparsity"] >= at - 1e-9, "loss"])
    ]
    return pd.DataFrame(rows, columns=["rule", "sparsity", "loss"])


def report(model: nn.Module, batches: Iterable[Any], best: pd.DataFrame, top: int = 1) -> pd.DataFrame:
    """What was chosen, on data that nothing was chosen by: rows of ``chosen`` with their accuracy there.

    Args:
        model: as for ``sweep``.
        batches: inputs and targets of the test part.
        best: rows with ``thresholds``.
        top: as in ``RetrainingFree``.

    Returns:
        ``best`` with test_accuracy and test_difference (to the unpruned network).
    """
    current, judge = Masks.ones(model), _Judge(model, batches, top)
    known: dict[tuple[tuple[str, float], ...], float] = {}
    for each in ({}, *best["thresholds"]):
        if (key := tuple(each.items())) not in known:
            known[key] = judge.accuracy(above(model, current, each))
    found = [known[tuple(each.items())] for each in best["thresholds"]]
    return best.assign(test_accuracy=found, test_difference=[accuracy - known[()] for accuracy in found])


def search(
    networks: Mapping[int, nn.Module],
    held_out: Iterable[Any],
    test: Iterable[Any],
    tolerances: Sequence[float],
    *,
    rules: Sequence[Rule] = RULES,
    steps: int = 20,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``frontier`` and ``chosen`` of several networks, chosen by held-out data and measured on the test part.

    Args:
        networks: seed -> network.
        held_out: batches of inputs and targets, to choose by.
        test: likewise, to report.
        tolerances: shares of 1.
        rules: which.
        steps: as in ``RetrainingFree``.

    Returns:
        Both with a column ``seed``; the frontier at sparsities of 0, 0.05, 0.1, ... that all networks reach, or else a
        mean would be that of the easiest of them.
    """
    import pandas as pd

    held_out, test = list(held_out), list(test)
    curves, best = [], []
    for seed, network in networks.items():
        tried = sweep(network, held_out, rules, steps=steps)
        curves.append(frontier(tried, [round(i / 20, 2) for i in range(20)]).assign(seed=seed))
        best.append(report(network, test, chosen(tried, tolerances)).assign(seed=seed))
    curve = pd.concat(curves, ignore_index=True)
    reached = curve.groupby(["rule", "sparsity"])["seed"].transform("size") == len(networks)
    return curve[reached].reset_index(drop=True), pd.concat(best, ignore_index=True)


@dataclass
class _Judge:
    """Measures what masks leave of a model on the same samples again and again; the model is left as it was."""

    model: nn.Module
    batches: Iterable[Any] | None
    top: int = 1

    def __post_init__(self) -> None:
        pairs = [] if self.batches is None else [batch for batch in self.batches if len(batch[0])]
        if not pairs:
            raise PrunelabError("retraining_free chooses by accuracy: give batches=, held-out inputs and labels")
        if any(y.is_floating_point() for _, y in pairs):
            raise PrunelabError("retraining_free chooses by accuracy: the targets are numbers, it needs classes")
        self.batches = pairs
        self.copy = copy.deepcopy(self.model).eval()

    def accuracy(self, masks: Masks) -> float:
        """Share of right answers."""
        own = dict(self.copy.named_parameters())
        for name, mask in masks.items():
            own[name].data = self.model.get_parameter(name).detach() * mask
        right = sum(int((self._answers(x) == y[:, None]).sum()) for x, y in self.batches)
        return right / sum(len(y) for _, y in self.batches)

    def _answers(self, x: Tensor) -> Tensor:
        found = logits(self.copy, x)
        return found.topk(min(self.top, found.shape[1]), 1).indices


def _quantile(weight: Tensor, share: float) -> float:
    """The |w| below which ``share`` of a layer's weights lie: as many as that is, rounded; ties stay."""
    below = min(round(share * weight.numel()), weight.numel() - 1)
    return float(weight.abs().flatten().kthvalue(below + 1).values)
