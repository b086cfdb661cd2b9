"""Which units compete: rows of single layers, or channels that have to go together; their scores and their masks.

A unit is a number of slices: rows of the weight that makes it, entries of biases and of normalisations, and, where
channels are coupled, rows and columns of all layers that make or read it. So one rule scores everything: a number for
every weight is summed over each slice of a unit, and what the slices give is combined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from prunelab.masks import MaskError, Masks, layer_of, prunable, unit_axis
from prunelab.pruners.roles import norms_behind
from prunelab.pruners.select import Granularity, Scope, amount_to_count, keep_highest, scored_names
from prunelab.structure.groups import Groups, Role, Slice, Space, channel_groups

if TYPE_CHECKING:
    from prunelab.pruners.base import Context

_ROLES: Mapping[str, Role] = {"weight": "out", "bias": "bias"}
COUPLED = ("channel", "head")
Combine = Literal["sum", "mean", "max"]
# [entries of a slice, the rest], and which of them are left, bool [entries] -> one number for each entry
Fold = Callable[[Tensor, Tensor], Tensor]


def competing(now: Context, granularity: Granularity) -> Groups:
    """The units that compete, layer by layer or space by space.

    Args:
        now: the network; what has no mask does not compete.
        granularity: ``"neuron"``, ``"filter"`` or ``"unit"``: rows of single layers. ``"channel"`` or ``"head"``: all
            that has to go together, seen by running the model once; of channels that several layers make, all of these
            have to be among those that may be pruned.

    Raises:
        MaskError: there is none.
    """
    if granularity in COUPLED:
        return _coupled(now, granularity)
    return rows(now.model, [layer_of(name) for name in scored_names(now.model, now.masks, granularity)])


def _coupled(now: Context, granularity: Literal["channel", "head"]) -> Groups:
    found = channel_groups(now.model, now.sample(), granularity, exact=now.exact)
    makers = {name: {found.names[layer] for layer in space.layers} for name, space in found.items()}
    asked = set(now.masks)
    try:
        left_out = set(prunable(now.model)) - asked
    except MaskError:  # all its channels are those of layers of its own kinds
        left_out = set()
    names = [name for name in found if makers[name] <= asked] if left_out else list(found)
    free = {name: found[name] for name in names if not bool(found[name].fixed.all())}
    if not free:
        apart = sorted(layer_of(other) for own in makers.values() if own & asked for other in own - asked)
        why = next((found[name].pinned for name in names if found[name].pinned), "no layer makes any")
        why = f"layer {apart[0]!r} makes the same ones, so name it as well" if apart and left_out else why
        raise MaskError(f"granularity {granularity!r}: no channel of these layers may go: {why}")
    return Groups(free, found.names, found.shapes)


def rows(model: nn.Module, layers: Iterable[str]) -> Groups:
    """The units of single layers: a row of the weight, with its bias, and scale and shift of a BatchNorm behind it.

    Without the latter a masked unit would give the constant that BatchNorm makes of 0.

    Raises:
        MaskError: a layer, or a BatchNorm behind it, has more parameters than weight and bias.
    """
    layers = list(layers)
    behind, spaces, shapes = norms_behind(model, layers), {}, {}
    for layer in layers:
        module = model.get_submodule(layer)
        axis = unit_axis(module) or 0
        size = module.weight.shape[axis]
        slices = []
        for where in (layer, behind[layer]) if layer in behind else (layer,):
            for own, parameter in model.get_submodule(where).named_parameters(recurse=False):
                name, role = f"{where}.{own}" if where else own, _ROLES.get(own)
                if role is None:
                    kind = type(model.get_submodule(where)).__name__
                    what = f"layer {where!r} ({kind}) has the parameter {own!r} beside weight and bias"
                    raise MaskError(f"{what}, and which part of it is a unit's is not known: leave it out with layers=")
                along = axis if where == layer and own == "weight" else 0
                slices.append(Slice(name, along, torch.arange(size), role if where == layer else "affine"))
                shapes[name] = tuple(parameter.shape)
        spaces[layer] = Space(layer, size, tuple(slices), None, torch.zeros(size, dtype=torch.bool))
    return Groups(spaces, {name: name for name in shapes}, shapes)


def unit_masks(model: nn.Module, units: Mapping[str, Tensor]) -> Masks:
    """Masks in which the rows of absent units are gone: layer name -> bool, 1-D, True = keep."""
    return _masks(model, rows(model, units), units)


def _masks(model: nn.Module, groups: Groups, kept: Mapping[str, Tensor]) -> Masks:
    """The masks of the units that are kept, each on the device of its parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = groups.masks({name: keep.cpu() | groups[name].fixed for name, keep in kept.items()})
    return Masks({name: mask.to(parameters[name].device) for name, mask in found.items()})


def there(groups: Groups, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which units are left and may go: those of which a masked row still has a weight; space name -> bool, 1-D."""
    found = {}
    for name, space in groups.items():
        alive = torch.zeros(space.size, dtype=torch.bool)
        seen = False
        for part in space.slices:
            mask = masks.get(groups.names.get(part.name, part.name))
            if part.role == "out" and mask is not None:
                left = mask.movedim(part.dim, 0).flatten(1).any(1).cpu()
                own = part.group >= 0
                alive[part.group[own & left]] = True
                seen = True
        found[name] = (alive if seen else ~alive) & ~space.fixed
    return found


def remaining(now: Context, names: Iterable[str], granularity: Granularity) -> dict[str, Tensor]:
    """What is left of what scores are for: parameter or space name -> bool of the shape of its scores."""
    whole = now.masks if granularity == "weight" else there(competing(now, granularity), now.masks)
    return {name: whole[name] for name in names}


def fold(
    groups: Groups,
    values: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    *,
    along: Fold = lambda entries, live: entries.sum(1),
    finish: Callable[[Tensor], Tensor] = lambda total: total,
    combine: Combine = "mean",
    roles: Sequence[Role] = ("out", "in", "bias", "affine"),
) -> dict[str, Tensor]:
    """Scores of units from numbers of weights: space name -> one per unit, for spaces that have a slice among them.

    Args:
        groups: the units.
        values: parameter name -> a number for every entry, or one for each unit that its rows make, [rows].
        live: which units are left; space name -> bool, 1-D.
        along: what a slice has to say of its entries, summed where a unit has several of them.
        finish: of the total of a slice.
        combine: how the slices of a unit are combined.
        roles: of the slices that count.
    """
    found = {}
    for name, space in groups.items():
        totals, members = [], []
        for part in space.slices:
            value = values.get(groups.names.get(part.name, ""))
            if value is None or (value.dim() == 1 and part.role == "in") or part.role not in roles:
                continue
            group, own = part.group.to(value.device), (part.group >= 0).to(value.device)
            left = live[name].to(value.device)[group.clamp(min=0)] & own
            entries = value if value.dim() == 1 else along(value.movedim(part.dim, 0).flatten(1), left)
            group = group[own]
            total = entries.new_zeros(space.size).index_add_(0, group, entries[own])
            totals.append(finish(total))
            members.append(torch.zeros(space.size, dtype=torch.bool, device=entries.device).index_fill_(0, group, True))
        if totals:
            found[name] = _combined(torch.stack(totals), torch.stack(members), combine)
    return found


def _combined(totals: Tensor, members: Tensor, combine: Combine) -> Tensor:
    if combine == "max":
        return totals.masked_fill(~members, -torch.inf).amax(0)
    total = totals.masked_fill(~members, 0).sum(0)
    return total if combine == "sum" else total / members.sum(0).clamp(min=1)


def remove_lowest(
    now: Context,
    scores: Mapping[str, Tensor],
    amount: float,
    *,
    granularity: Granularity = "weight",
    scope: Scope = "global",
    allow_empty: bool = False,
) -> Masks:
    """Remove a fraction of what remains, lowest scores first: weights, or whole units with all that belongs to them.

    Args:
        now: the network, and what is still there.
        scores: per parameter for ``"weight"``; per layer or space, one score per unit, for all else.
        amount: fraction of the remaining weights or units; see ``amount_to_count``.
        granularity: what goes.
        scope: ``"global"``: all compete and the fraction holds for all together; ``"layer"``: it holds in each layer,
            or space.
        allow_empty: whether a layer may lose all.
    """
    groups = None if granularity == "weight" else competing(now, granularity)
    left = now.masks if groups is None else Masks(there(groups, now.masks))
    counts = {name: left.counts[name] for name in scores if name in left}
    count = {name: amount_to_count(amount, own) for name, own in counts.items()}
    whole = amount_to_count(amount, sum(counts.values()))
    after = keep_highest(scores, left, count if scope == "layer" else whole, now.generator, allow_empty)
    return after if groups is None else now.masks & _masks(now.model, groups, after)


def masks_without(now: Context, kept: Mapping[str, Tensor], granularity: Granularity) -> Masks:
    """The masks that are left of a network of whose units only these are kept: layer or space name -> bool, 1-D."""
    return now.masks & _masks(now.model, competing(now, granularity), kept)


def made_by_layers(model: nn.Module, groups: Groups) -> dict[str, str]:
    """Weight whose rows make units -> its layer, a Linear or a convolution, whose outputs can be looked at.

    Raises:
        MaskError: none is made by such a layer.
    """
    found = {}
    for space in groups.values():
        for part in space.slices:
            layer = layer_of(groups.names.get(part.name, ""))
            if part.role == "out" and part.dim == unit_axis(model.get_submodule(layer)):
                found[groups.names[part.name]] = layer
    if not found:
        raise MaskError("no channel that may go is made by a Linear or a convolution, whose activations can be seen")
    return found


def keep_as_many(
    now: Context, scores: Mapping[str, Tensor], other: Masks, granularity: Granularity = "weight"
) -> Masks:
    """Remove the lowest scores of each layer until it keeps no more than in ``other``: with that one's proportions.

    Blalock et al., MLSys 2020, appendix B, ask for this control: random and magnitude pruning with the proportions of
    the method under test. With random scores it is a shuffled mask.

    Args:
        now: the network, and what is still there.
        scores: as for ``remove_lowest``.
        other: the masks whose counts decide; which entries they keep does not matter.
        granularity: what goes.
    """
    groups = None if granularity == "weight" else competing(now, granularity)
    left, wanted = (Masks(masks if groups is None else there(groups, masks)) for masks in (now.masks, other))
    count = {name: max(0, left.counts[name] - wanted.counts[name]) for name in scores}
    after = keep_highest(scores, left, count, now.generator, allow_empty=True)
    return after if groups is None else now.masks & _masks(now.model, groups, after)


def by_layer(now: Context, scores: Mapping[str, Tensor], granularity: Granularity) -> dict[str, Tensor]:
    """Scores for the record: those of coupled channels as scores of the rows of each layer that makes them."""
    if granularity not in COUPLED:
        return dict(scores)
    found = {}
    for name, space in competing(now, granularity).items():
        for part in space.slices if name in scores else ():
            if part.role == "out" and part.dim == 0:
                row = scores[name].to(torch.float32).cpu()[part.group.clamp(min=0)]
                found[layer_of(part.name)] = row.masked_fill(part.group < 0, torch.nan)
    return found
