"""Which entries stay: exact counts, ties broken by the generator, nothing revived, no layer emptied unasked."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prunelab.errors import PrunelabError, nearest
from prunelab.masks import MaskError, Masks, layer_of, unit_axis
from prunelab.pruners.partition import kth_lowest
from prunelab.pruners.roles import outputs

Granularity = Literal["weight", "neuron", "filter", "unit", "channel", "head"]
Scope = Literal["global", "layer"]
Counts = int | Mapping[str, int]


def amount_to_count(
    amount: float, remaining: int, rounding: Literal["nearest", "floor"] = "nearest", minimum: int = 0
) -> int:
    """How many of ``remaining`` units a fraction is.

    Args:
        amount: Fraction of the remaining units, in [0, 1).
        remaining: Units that are still there.
        rounding: ``"nearest"`` rounds half to even, as ``torch.nn.utils.prune`` does (our own default); ``"floor"`` as
            DropNet's code does.
        minimum: At least so many (DropNet: 1), but never more than remain.

    Raises:
        PrunelabError: the amount is not in [0, 1).
    """
    check_amount(amount)
    exact = amount * remaining
    return min(max(round(exact) if rounding == "nearest" else math.floor(exact), minimum), remaining)


def check_amount(amount: float) -> None:
    """Refuse an amount that is no fraction of what remains."""
    if isinstance(amount, bool) or not isinstance(amount, Real) or not 0 <= amount < 1:
        what = "it is the fraction of the remaining units that goes"
        raise PrunelabError(f"amount = {amount!r}: should be at least 0 and below 1; {what}")


def keep_highest(
    scores: Mapping[str, Tensor], current: Masks, count: Counts, generator: torch.Generator, allow_empty: bool = False
) -> Masks:
    """Remove exactly ``count`` of the kept entries, those with the lowest scores; what is gone stays gone.

    Args:
        scores: Parameter name -> score of each entry (higher = keep), of the shape of its mask. Parameters without
            scores are left alone, and scores of entries that are already gone do not matter.
        current: What is still there.
        count: How many go: of all scored parameters together (global scope), or of each parameter named.
        generator: Chooses among equal scores, each subset of them as likely as any other; it is read only when equal
            scores have to be parted.
        allow_empty: Whether a parameter may lose its last entry.

    Returns:
        New masks, on the devices of ``current``.

    Raises:
        MaskError: names or shapes that do not fit, a NaN among the scores, a count that is more than what is left, or a
            parameter that would lose its last entry.
    """
    for name, score in scores.items():
        if name not in current:
            raise MaskError(f"there are scores for {name!r} but no mask: {nearest(name, current)}")
        if score.shape != current[name].shape:
            shapes = f"{tuple(score.shape)} and {tuple(current[name].shape)}"
            raise MaskError(f"{name}: scores and mask have shapes {shapes}, which should be equal")
    kept = dict(current)
    for names, number in [(list(scores), count)] if isinstance(count, int) else [([n], k) for n, k in count.items()]:
        if unknown := [name for name in names if name not in scores]:
            raise MaskError(f"there is a count for {unknown[0]!r} but no scores: {nearest(unknown[0], scores)}")
        left = sum(current.counts[name] for name in names)
        if not 0 <= number <= left:
            where = names[0] if len(names) == 1 else f"{len(names)} parameters"
            raise MaskError(f"{number} entries cannot go from {where}: choose a number from 0 to {left}, what is left")
        kept.update(_without_lowest({name: scores[name] for name in names}, current, number, generator))
    after = Masks(kept, current.unmasked)
    for name in after:
        if current.counts[name] and not after.counts[name] and not allow_empty:
            what = f"layer {name.removesuffix('.weight')!r} would lose all {current.counts[name]} that it has left"
            raise MaskError(f"{what}: remove less, use scope='layer', leave the layer out, or say allow_empty=True")
    return after


def keep_highest_units(
    scores: Mapping[str, Tensor],
    current: Mapping[str, Tensor],
    count: Counts,
    generator: torch.Generator,
    allow_empty: bool = False,
) -> dict[str, Tensor]:
    """``keep_highest`` for whole units: layer name -> 1-D, one score, and one True or False, per neuron or filter."""
    return dict(keep_highest(scores, Masks(current), count, generator, allow_empty))


def units_of(model: nn.Module, masks: Masks, names: Sequence[str]) -> dict[str, Tensor]:
    """Layer name -> which of its units, along ``unit_axis`` of the weight, still have a weight; bool, 1-D."""
    return {layer_of(name): by_unit(model, name, masks[name]).count_nonzero(1) > 0 for name in names}


def by_unit(model: nn.Module, name: str, values: Tensor) -> Tensor:
    """What belongs to the entries of a weight as [units, entries of each]."""
    return values.movedim(unit_axis(model.get_submodule(layer_of(name))) or 0, 0).flatten(1)


def scored_names(model: nn.Module, current: Masks, granularity: Granularity) -> list[str]:
    """The weights in ``current`` whose entries, or whose units, compete, in the order of the modules.

    Entries compete in every mask of two or more dimensions. Neurons are the outputs of Linear layers (and of the
    ``Conv1D`` of transformers), filters those of convolutions, units both; see ``masks.unit_axis``. Layers that give
    the answers have no units that compete (our own rule): those whose units reach what the model returns with no
    weights in between, as both heads of a network with two; where the model cannot be traced, the last layer that it
    declares.

    Raises:
        MaskError: none competes.
    """
    names: dict[int, str] = {}  # a weight that layers share competes once
    if granularity == "weight":
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in current and current[name].ndim > 1:
                names.setdefault(id(parameter), name)
    else:
        answers = {id(layer._parameters.get("weight")) for layer in outputs(model)}
        for layer, module in model.named_modules():
            name, axis = f"{layer}.weight" if layer else "weight", unit_axis(module)
            fits = axis is not None and granularity in ("unit", "filter" if isinstance(module, _ConvNd) else "neuron")
            if name in current and fits and id(module.weight) not in answers:
                names.setdefault(id(module.weight), name)
    if not names:
        what = {"weight": "layer", "neuron": "Linear", "filter": "convolution"}.get(
            granularity, "Linear or convolution"
        )
        where = f"masked {what}" + " before the last layer" * (granularity != "weight")
        raise MaskError(f"granularity {granularity!r}: the model has no {where}, so there is nothing to prune")
    return list(names.values())


def _without_lowest(
    scores: Mapping[str, Tensor], current: Masks, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The masks of the scored parameters without their ``count`` lowest entries."""
    if not scores:
        return {}
    dtype = functools.reduce(torch.promote_types, (score.dtype for score in scores.values()), torch.float32)
    device = current[next(iter(scores))].device
    values = [score.detach().to(device, dtype).flatten() for score in scores.values()]
    live = [None if current.counts[n] == s.numel() else current[n].to(device).flatten() for n, s in scores.items()]
    for name, value, alive in zip(scores, values, live, strict=True):
        # One NaN makes the sum NaN, so that the slow look at each score is taken only when there may be one.
        if torch.isnan(value.sum()) and bool(torch.isnan(value if alive is None else value[alive]).any()):
            raise MaskError(f"{name}: a score is NaN, neither high nor low: look for NaN in the weights or the data")
    kept = _highest(values, live, count, generator) if count else [current[name] for name in scores]
    return {name: mask.view(scores[name].shape) for name, mask in zip(scores, kept, strict=True)}


def _highest(
    values: Sequence[Tensor], live: Sequence[Tensor | None], count: int, generator: torch.Generator
) -> list[Tensor]:
    """Masks of the live numbers without the ``count`` lowest, at least 1; equal ones draw lots."""
    threshold, lower, equal = kth_lowest(values, live, count)
    kept = [_and(value > threshold, alive) for value, alive in zip(values, live, strict=True)]
    if lower + equal > count:
        lots = torch.rand(equal, generator=generator, device=generator.device)
        (winners,) = _highest([lots], [None], count - lower, generator)
        ties = [_and(value == threshold, alive) for value, alive in zip(values, live, strict=True)]
        shares = winners.split([int(torch.count_nonzero(tie)) for tie in ties])
        for mask, tie, share in zip(kept, ties, shares, strict=True):
            mask.masked_scatter_(tie, share.to(mask.device))
    return kept


def _and(mask: Tensor, live: Tensor | None) -> Tensor:
    return mask if live is None else mask.logical_and_(live)
