"""DropNet: neurons and filters go by the mean size of their activations over the training set.

Source: Tan and Motani, "DropNet: Reducing Neural Network Complexity via Iterative Pruning", ICML 2020, section 3, and
the code of its authors. APoZ, with which its supplement compares: Hu et al., "Network Trimming", 2016, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from prunelab.masks import MaskError, Masks
from prunelab.pruners.activations import unit_sums
from prunelab.pruners.base import Context, Ranking, Reads
from prunelab.pruners.select import Granularity, amount_to_count, keep_highest_units
from prunelab.pruners.units import Combine, competing, fold, made_by_layers, masks_without, remaining, there
from prunelab.settings import settings

Metric = Literal["minimum", "maximum", "random", "apoz"]
Variant = Literal["faithful", "corrected"]


@settings
class DropNet(Ranking):
    """Drop the units with the lowest (or highest) mean |post-activation| E(a), or at random, or by APoZ.

    The units of all layers compete (``global``), or those of each layer (``layer``: the paper's ``minimum_layer``).
    Of n that remain ``int(amount * n)`` go, but at least one; with ``layer`` at least one of each layer, down to none.

    ``corrected`` is what the paper's text says: exactly the k lowest, ties at random, E of a filter the mean of
    |activation| over samples and positions, APoZ the share of zero positions. ``faithful`` is what the published code
    does: k of the k + 1 lowest (and all that equal them), taken at random within a layer, layer by layer from the
    input (``random``: any k); E of a filter is the mean over samples of |mean of the map|; a map counts as zero for
    APoZ only if its mean is. With ``one`` (the figures of the oracle) the code takes exactly the lowest, the first of
    several in the first layer that has one; "random" then shuffles nothing and takes the first unit that is left.

    Attributes:
        metric: What decides.
        scope: Who competes.
        variant: The paper's text, or its code.
        one: One unit goes in a round, or one of each layer, whatever the amount.
        allow_empty: Whether a layer may lose all, as it may in the paper.
        granularity: Single units, as published; ``"channel"`` or ``"head"``: all that has to go together.
        combine: Of coupled channels, how the activations of the layers that make a channel are combined.
    """

    metric: Metric = "minimum"
    scope: Literal["global", "layer"] = "global"
    variant: Variant = "corrected"
    one: bool = False
    allow_empty: bool = False
    granularity: Literal["unit", "channel", "head"] = "unit"
    combine: Combine = "mean"

    @property
    def reads(self) -> Reads:
        """Inputs, unless it is random."""
        return "nothing" if self.metric == "random" else "inputs"

    @property
    def reads_amount(self) -> bool:
        """Unless one goes whatever the amount."""
        return not self.one

    def scores(self, now: Context) -> dict[str, Tensor]:
        """Layer -> float32 [units]: E(a), -E(a), a random number, or the share of activations that are not zero."""
        groups = competing(now, self.granularity)
        if self.metric == "random":
            return {name: torch.rand(space.size, generator=now.generator) for name, space in groups.items()}
        by_map = self.variant == "faithful"
        if self.metric == "apoz":
            reduce = _maps_not_zero if by_map else _positions_not_zero
        else:
            reduce = _size_of_mean if by_map else _mean_size
        layers = made_by_layers(now.model, groups)
        sums, samples = unit_sums(now.model, list(layers.values()), now.inputs(), reduce)
        sign = -1 if self.metric == "maximum" else 1
        values = {name: (sign * sums[layer] / samples).float() for name, layer in layers.items()}
        return fold(groups, values, there(groups, now.masks), combine=self.combine)

    def select(self, now: Context, scores: Mapping[str, Tensor], amount: float) -> Masks:
        """What is left when the lowest scores are gone; the units' biases, and BatchNorm behind them, go with them."""
        left = remaining(now, scores, self.granularity)
        faithful, random = self.variant == "faithful", self.metric == "random"
        if faithful and random and self.one:  # nothing is shuffled: all are candidates alike
            scores = {layer: torch.zeros_like(score) for layer, score in scores.items()}
        elif random:  # no threshold, hence no candidates: with them the layers next to the input would lose more
            faithful = False
        how = {"scope": self.scope, "faithful": faithful, "one": self.one}
        after = drop_units(scores, left, 0.0 if self.one else amount, now.generator, **how)
        return without_units(now, left, after, self.granularity, self.allow_empty)


def drop_units(
    scores: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    amount: float,
    generator: torch.Generator,
    *,
    scope: str = "global",
    faithful: bool = False,
    one: bool = False,
) -> dict[str, Tensor]:
    """Which units are left: DropNet's counts and, with ``faithful``, its way of choosing.

    Args:
        scores: Layer -> float [units], higher = keep.
        there: Layer -> bool [units], what is left so far.
        amount: Fraction of the remaining units; 0 removes nothing, any other at least one.
        generator: Breaks ties; chooses among candidates.
        scope: ``"global"``, or ``"layer"`` for each layer by itself.
        faithful: As the published code chooses.
        one: Exactly one unit, or one of each layer.
    """
    groups = [[layer] for layer in scores] if scope == "layer" else [list(scores)]
    after = dict(there)
    for group in groups:
        live = {layer: there[layer] for layer in group}
        remaining = sum(int(keep.sum()) for keep in live.values())
        count = min(1, remaining) if one else amount_to_count(amount, remaining, "floor", minimum=int(amount > 0))
        keys = {layer: scores[layer].to(there[layer].device) for layer in group}
        if faithful and count:
            keys = _candidates_first(keys, live, count, generator, one)
        after |= keep_highest_units(keys, live, count, generator, allow_empty=True)
    return after


def _candidates_first(
    scores: Mapping[str, Tensor], live: Mapping[str, Tensor], count: int, generator: torch.Generator, one: bool
) -> dict[str, Tensor]:
    """Keys whose ``count`` lowest are what the published code takes.

    Candidates are all up to the score at position ``count`` (from 0) of the sorted ones, hence at least ``count + 1``;
    with ``one`` only the lowest. They are taken layer by layer, shuffled within a layer, or with ``one`` in order.
    """
    sizes = [len(score) for score in scores.values()]
    whole, alive = torch.cat([*scores.values()]), torch.cat([*live.values()])
    position = min(1 if one else count + 1, int(alive.sum()))
    threshold = whole[alive].kthvalue(position).values
    number = torch.arange(len(sizes), device=whole.device).repeat_interleave(torch.tensor(sizes, device=whole.device))
    if one:
        key = torch.arange(len(whole), device=whole.device, dtype=torch.float64)
    else:
        draw = torch.rand(len(whole), generator=generator, dtype=torch.float64, device=generator.device)
        key = number + draw.to(whole.device)
    key = key.masked_fill(whole > threshold, torch.inf)
    return dict(zip(scores, key.split(sizes), strict=True))


def without_units(
    now: Context,
    there: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    granularity: Granularity,
    allow_empty: bool,
) -> Masks:
    """The masks without the units that are not in ``after``: rows of weight and bias, and of a BatchNorm behind them.

    The paper multiplies a mask into the activations, behind BatchNorm where there is one. With the scale and the shift
    of BatchNorm gone as well the unit gives 0 there too, and not the constant that BatchNorm makes of 0.

    Raises:
        MaskError: a layer would lose its last unit.
    """
    for layer, keep in after.items():
        if not allow_empty and not keep.any() and there[layer].any():
            what = f"layer {layer!r} would lose all {int(there[layer].sum())} units that it has left"
            raise MaskError(f"{what}: remove less, use scope='layer', leave the layer out, or say allow_empty=True")
    return masks_without(now, after, granularity)


def _mean_size(a: Tensor, positions: Sequence[int]) -> Tensor:
    return (a.abs().mean(positions) if positions else a.abs()).sum(0)


def _size_of_mean(a: Tensor, positions: Sequence[int]) -> Tensor:
    return (a.mean(positions) if positions else a).abs().sum(0)


def _maps_not_zero(a: Tensor, positions: Sequence[int]) -> Tensor:
    return (a.mean(positions) if positions else a).count_nonzero(0)


def _positions_not_zero(a: Tensor, positions: Sequence[int]) -> Tensor:
    shares = a.ne(0).to(a.dtype)
    return (shares.mean(positions) if positions else shares).sum(0)
