"""Smaller models of the same function, of any model that runs: dead channels go, the user's own classes stay.

A channel can go when nobody that matters reads it, or when all that is read of it is constant and can be folded into
the biases behind, or into the means of the BatchNorm behind. Parameters and buffers are cut in a copy; whole numbers in
modules (``num_heads``, ``groups``, ...) follow. Then both networks are run, and what does not hold is put back.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunelab.errors import PrunelabWarning, first_line
from prunelab.masks import Masks
from prunelab.structure.fold import Constants, Read, anything, fold, live
from prunelab.structure.groups import Analysis, analysis
from prunelab.structure.watch import (
    OUTPUT,
    Op,
    Ref,
    Seen,
    StructureError,
    bound,
    duplicate,
    follow_calls,
    named_tensors,
    refuse,
    run,
    unwrapped,
)

GUESSES = ("all", "sure", "first", "last")
TOLERANCE = 1e-5  # of the outputs before and after, relative to their largest; our own default
# The sizes that modules of torch, and their subclasses, keep: attribute -> (parameter or buffer, axis) that it counts.
_COUNTS = {
    "out_features": (("weight", 0),), "in_features": (("weight", 1),), "embedding_dim": (("weight", 1),),
    "num_features": (("weight", 0), ("running_mean", 0)), "num_channels": (("weight", 0),),
    "num_parameters": (("weight", 0),), "hidden_size": (("weight_hh_l0", 1),), "input_size": (("weight_ih_l0", 1),),
    "embed_dim": (("out_proj.weight", 0),), "kdim": (("k_proj_weight", 1), ("in_proj_weight", 1)),
    "vdim": (("v_proj_weight", 1), ("in_proj_weight", 1)), "in1_features": (("weight", 1),),
    "in2_features": (("weight", 2),),
    "proj_size": (("weight_hr_l0", 0),),
}  # fmt: skip
# Widths while training are multiples of this: on several threads BatchNorm of 13 channels takes up to three times as
# long as of 16, on one thread it makes no difference (our own measurement).
TRAINED_WIDTH = 4
_NEVER = {
    "kernel_size",
    "stride",
    "dilation",
    "output_padding",
    "num_layers",
    "padding_idx",
    "num_embeddings",
    "upscale_factor",
}


class NotRemoved(PrunelabWarning):
    """Some of what masks prune is still there after shrinking."""


class ShrinkError(StructureError):
    """The model cannot be made smaller: nothing would be left, or what is asked for makes no sense."""


@dataclass(frozen=True)
class Shrunk:
    """A smaller model and how it lies inside the one it came from.

    Attributes:
        model: the new module, of the same classes and with the same names; the old one is untouched.
        index: parameter or buffer -> for each axis the positions kept, int64; only those that were cut. Columns of a
            grouped convolution may be 2-D: for each row its own.
        units: layer -> positions of the channels that it makes which are left, int64.
        stayed: layer -> how many of its channels are dead and are still there, and why.
        folded: BatchNorm -> the layer into which it was folded; empty where that was not asked for.
        unfolded: BatchNorm -> why it is still there though folding was asked for.
        note: one line on what was pruned and could not be removed; None: all of it was.
    """

    model: nn.Module
    index: dict[str, tuple[Tensor, ...]]
    units: dict[str, Tensor]
    stayed: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    unfolded: dict[str, str] = field(default_factory=dict)
    note: str | None = None

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Bring a mask, a moment or anything else of the old shape of a parameter to its new shape."""
        return cut(tensor, self.index[name]) if name in self.index else tensor


def cut(tensor: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """The entries of ``tensor`` at the given positions of each axis, contiguous.

    An axis with positions [rows, n] has n for each row of what the axis before left (grouped convolutions).
    """
    for axis, kept in enumerate(index):
        kept = kept.to(tensor.device)
        if kept.dim() > 1:
            tensor = tensor.take_along_dim(kept.view(*kept.shape, *[1] * (tensor.dim() - 2)), axis)
        elif len(kept) != tensor.shape[axis]:
            tensor = tensor.index_select(axis, kept)
    return tensor.contiguous()


# -- what stays --------------------------------------------------------------------------------------------------------


def filled(seen: Seen, stays: Tensor, multiple: int = 1) -> Tensor:
    """The groups that stay: those that live, and dead ones where what is left has to be a box, or one at least."""
    stays = stays.clone()
    count = -1
    while count != (count := int(stays.sum())):
        for rows, cells, fixed in seen.blocks:
            _fill(stays, rows, cells, fixed)
        for cells in seen.products:
            own = stays[cells]
            stays[cells[own.any(1)[:, None] & own.any(0)]] = True
        for axes in seen.slots.values():
            for numbers in axes.values():
                groups = seen.root[numbers]
                own = stays[groups]
                wanted = math.ceil(max(int(own.sum()), 1) / multiple) * multiple
                if not bool(own.all()) and int(own.sum()) < wanted:
                    missing = groups[~own]
                    stays[missing[: min(wanted, len(groups)) - int(own.sum())]] = True
    return stays


def _fill(stays: Tensor, rows: Tensor | None, cells: Tensor, fixed: bool) -> None:
    own = stays[cells]
    alive = own.any(1)
    if fixed:
        alive = torch.ones_like(alive)
    elif rows is not None:
        alive |= stays[rows]
    counts = own.sum(1)
    width = max(int(counts.max()), 1)
    short = alive & (counts < width)
    if bool(short.any()):
        dead = ~own[short]
        more = dead & (dead.cumsum(1) <= (width - counts[short])[:, None])
        stays[cells[short][more]] = True
    if rows is not None and bool(alive.any()):
        stays[rows[alive]] = True


# -- cutting -----------------------------------------------------------------------------------------------------------


def positions(seen: Seen, stays: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[Tensor, ...]]:
    """Parameter or buffer -> for each axis the positions that stay; only those of which something goes."""
    index: dict[str, tuple[Tensor, ...]] = {}
    for name, axes in seen.slots.items():
        kept = {dim: stays[seen.root[numbers]] for dim, numbers in axes.items()}
        if name in seen.columns:
            dim, numbers = seen.columns[name]
            kept[dim] = stays[seen.root[numbers]]
        if all(bool(own.all()) for own in kept.values()):
            continue
        shape = shapes[name]
        found = [
            kept[d].nonzero().flatten() if d in kept and kept[d].dim() == 1 else torch.arange(n)
            for d, n in enumerate(shape)
        ]
        if name in seen.columns:
            own = kept[dim]  # [groups, indices]
            alive = own.any(1)
            if bool((own[alive] == own[alive][:1]).all()):
                found[dim] = own[alive][0].nonzero().flatten()
            else:
                places = torch.stack([row.nonzero().flatten() for row in own[alive]])
                group = (alive.cumsum(0) - 1)[found[0] // (shape[0] // len(own))]
                found[dim] = places[group]
        index[name] = tuple(found)
    return index


def follow(
    small: nn.Module, before: Mapping[str, Sequence[int]], seen: Seen | None, stays: Tensor | None, guess: str | None,
    but: Collection[str] = (),
) -> set[str]:  # fmt: skip
    """Give whole numbers in modules the sizes that they have now.

    Args:
        small: the copy.
        before: parameter or buffer -> its shape before.
        seen: what the run showed; None: only attributes of torch's own modules follow.
        stays: bool [groups].
        guess: of attributes that may count either of two axes that had one size and do not any more, ``"all"`` follow,
            none (``"sure"``), or the ``"first"`` or ``"last"`` one; None: only attributes of torch's own modules do.
        but: modules of which no attribute follows by its size.

    Returns:
        The modules of which some did.
    """
    after, guessed = named_tensors(small), set()
    for prefix, module in small.named_modules():
        known = _counted(module, prefix, before, after)
        if guess is not None and prefix not in but:
            sizes = _sizes(seen, stays, prefix)
            new = {name: size for name, size in _guessed(module, sizes).items() if name not in known}
            unsure = _unsure(module, new, sizes)
            stay = {"all": [], "sure": unsure, "first": unsure[1:], "last": unsure[:-1]}[guess]
            new = {name: size for name, size in new.items() if name not in stay}
            guessed |= {prefix} if any(getattr(module, name) != size for name, size in new.items()) else set()
            known |= new
        if seen is not None:
            for _, attribute, place, numbers in (pad for pad in seen.pads if pad[0] == prefix):
                amounts = list(known.get(attribute, getattr(module, attribute)))
                amounts[place] = int(stays[seen.root[numbers]].sum())
                known[attribute] = type(getattr(module, attribute))(amounts)
        for attribute, value in known.items():
            if getattr(module, attribute) != value:
                setattr(module, attribute, value)
    return guessed


def _counted(
    module: nn.Module, prefix: str, before: Mapping[str, Sequence[int]], after: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The attributes of torch's modules that count an axis of a parameter, with their new values."""
    known: dict[str, Any] = {}

    def axis(name: str, dim: int) -> tuple[int, int] | None:
        full = f"{prefix}.{name}" if prefix else name
        if full not in before or dim >= len(before[full]):
            return None
        return before[full][dim], after[full].shape[dim]

    for attribute, places in _COUNTS.items():
        value = vars(module).get(attribute)
        for name, dim in places:
            sizes = axis(name, dim)
            if sizes is not None and value == sizes[0]:
                known[attribute] = sizes[1]
                break
    weight = axis("weight", 0), axis("weight", 1)
    if {"groups", "in_channels", "out_channels"} <= vars(module).keys() and None not in weight:
        (rows, rows_now), (columns, columns_now) = weight
        turned, groups = bool(getattr(module, "transposed", False)), module.groups
        groups_now = groups
        if groups > 1 and (rows_now, columns_now) != (rows, columns):
            groups_now = (
                rows_now
                if columns == 1 and rows == groups
                else vars(after[_full(prefix, "weight")]).get("_groups", groups)
            )
        inputs, outputs = (rows_now, columns_now * groups_now) if turned else (columns_now * groups_now, rows_now)
        known |= {"groups": groups_now, "in_channels": inputs, "out_channels": outputs}
    if "num_channels" in known and vars(module).get("num_groups") == module.num_channels:
        known["num_groups"] = known["num_channels"]
    shape = vars(module).get("normalized_shape")
    full = _full(prefix, "weight")
    if shape is not None and full in before and tuple(shape) == tuple(before[full]):
        known["normalized_shape"] = tuple(after[full].shape)
    return known


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _sizes(seen: Seen, stays: Tensor, module: str) -> dict[int, set[int]]:
    """Sizes that axes had in a module, or in what it calls -> the sizes that they have now."""
    found: dict[int, set[int]] = {}
    inside = f"{module}." if module else ""
    for name, own in seen.sizes.items():
        if name == module or (name.startswith(inside) and not any(size in found for size in own)):
            for size, numbers in own.items():
                found.setdefault(size, set()).update(int(stays[seen.root[n]].any(1).sum()) for n in numbers)
    return found


def _guessed(module: nn.Module, sizes: Mapping[int, set[int]]) -> dict[str, Any]:
    """Attributes that equal a size which is another now, with that."""
    found = {}
    for attribute, value in vars(module).items():
        if attribute not in _NEVER and not attribute.startswith("_"):
            new = _renumbered(module, attribute, value, sizes)
            if new is not None:
                found[attribute] = new
    return found


def _doubts(model: nn.Module, seen: Seen, stays: Tensor) -> int:
    """How many whole numbers of a module, at most, equal a size that is another now on some axes and not on others."""
    most = 0
    for prefix, module in model.named_modules():
        sizes = _sizes(seen, stays, prefix)
        most = max(most, len(_unsure(module, _guessed(module, sizes), sizes)))
    return most


def _unsure(module: nn.Module, new: Mapping[str, Any], sizes: Mapping[int, set[int]]) -> list[str]:
    return [
        name
        for name, size in new.items()
        if type(size) is int and getattr(module, name) in sizes[getattr(module, name)]
    ]


def _renumbered(module: nn.Module, attribute: str, value: Any, sizes: Mapping[int, set[int]]) -> Any:
    """The new value of an attribute that equals a size which is another now; None: it stays."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        others = sizes.get(value, set()) - {value}
        return min(others) if len(others) == 1 and value > 1 else None
    if isinstance(value, tuple | list | torch.Size) and value and all(type(n) is int for n in value):
        of_torch = type(module).__module__.startswith("torch.nn.modules.conv")
        new = [_renumbered(module, attribute, n, sizes) or n for n in value]
        if new != list(value) and not of_torch:
            return tuple(new) if not isinstance(value, list) else new
    return None


def _made(
    model: nn.Module, seen: Seen, values: Mapping[str, Tensor], changed: set[str], stays: Tensor, guess: str | None,
    but: Collection[str] = (),
) -> tuple[nn.Module, dict[str, tuple[Tensor, ...]], set[str]]:  # fmt: skip
    """A copy of a model with smaller parameters and buffers, and the modules in which sizes were guessed."""
    own = named_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    index = positions(seen, stays, shapes)
    instead: dict[int, Any] = {}
    for name, tensor in own.items():
        if name not in index and (name not in changed or id(tensor) in instead):  # or it has several names
            continue
        part = values[name].detach()
        part = cut(part, index[name]) if name in index else part.clone()
        if isinstance(tensor, nn.Parameter):
            part = nn.Parameter(part, requires_grad=tensor.requires_grad)
        instead[id(tensor)] = part
        if name in seen.columns:
            part._groups = int(stays[seen.root[seen.columns[name][1]]].any(1).sum())
    small = duplicate(model, instead)
    guessed = follow(small, shapes, seen, stays, guess, but)
    for part in instead.values():
        vars(part).pop("_groups", None)
    return small, index, guessed


def made_with(model: nn.Module, seen: Seen, stays: Tensor, guess: str) -> nn.Module:
    """A copy of a model with the groups that stay, whatever it then gives; ``guess``: see ``follow``."""
    return _made(model, seen, named_tensors(model), set(), stays, guess)[0]


# -- public ------------------------------------------------------------------------------------------------------------


def shrink(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example: Any = None,
    *,
    exact: bool = True,
    round_to: int = 1,
    memory_format: torch.memory_format | None = None,
    fold_batchnorm: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """A smaller model of the same function; the model itself where nothing can go.

    >>> small = shrink(model, masks, example)

    The function is that of evaluation mode, in which BatchNorm and dropout do not depend on the batch. ``remove_dead``
    does the same and also tells what is left of each layer, and what stayed and why.

    Args:
        model: any module that runs on the example; wrappers (``torch.compile``, ``DataParallel``) are looked through.
            It is not changed.
        masks: parameter name -> 0/1 tensor; None: zeros of the weights count.
        example: a batch of inputs on the model's device: a tensor, a tuple of positional arguments or a dict of named
            ones.
        exact: whether outputs have to be those of the masked model. If False, channels over which statistics are taken
            (LayerNorm, GroupNorm, RMSNorm) go as well, and outputs are others.
        round_to: make widths multiples of this, as far as dead channels are there to fill them up.
        memory_format: of the result, ``torch.channels_last`` for example; None: as it is.
        fold_batchnorm: for inference: each BatchNorm goes into the convolution or Linear right before it.
        optimizer: of ``model``; see ``carry``.

    Returns:
        The smaller model, in the mode of ``model``, or in evaluation mode where a BatchNorm was folded; with
        ``optimizer``, the pair of it and its own optimiser.

    Raises:
        StructureError: the model does not run on the example.
        MaskError: the masks do not fit the model.
        ShrinkError: nothing would be left, or ``optimizer`` cannot be carried over.

    Warns:
        NotRemoved: something that the masks prune is still there; one line says how much, and the main reason.
    """
    if not isinstance(memory_format, torch.memory_format | None):
        raise ShrinkError(f"memory_format = {memory_format!r}: should be None, or torch.channels_last, say")
    result = remove_dead(model, masks, example, exact=exact, round_to=round_to, fold_batchnorm=fold_batchnorm)
    if result.note is not None:
        warnings.warn(result.note, NotRemoved, stacklevel=2)
    rule = None if optimizer is None else carry(optimizer, model, result)
    small = result.model
    if memory_format is not None:
        small = (copy.deepcopy(small) if small is model else small).to(memory_format=memory_format)
    return small if rule is None else (small, rule)


@torch.no_grad()
def remove_dead(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example: Any = None,
    *,
    exact: bool = True,
    round_to: int = 1,
    fold_batchnorm: bool = False,
) -> Shrunk:
    """A smaller model with the outputs, in evaluation mode, of the masked one, and what is left of each layer.

    Arguments and errors are those of ``shrink``; what it warns of is in ``note``.
    """
    if not isinstance(round_to, int) or round_to < 1:
        raise ShrinkError(f"round_to = {round_to!r}: should be a whole number, 1 or more")
    masks = fitting(masks, model)
    if example is None:
        raise ShrinkError("shrink has to run the model once: give a batch of inputs, shrink(model, masks, example)")
    inner, prefix = unwrapped(model)
    values = masked_values(inner, Masks({name.removeprefix(prefix): mask for name, mask in masks.items()}))
    found = analysis(inner, example)
    seen, fixed = found.seen, found.fixed(exact)
    constants = Constants(seen, values)
    reads = constants.reads
    alive = live(seen, reads, fixed)
    if not exact:
        alive &= ~_unmade(seen, values) | fixed
    _refuse_empty(seen, constants, alive)
    job = _Job(inner, found, values, reads, alive, fixed, round_to, exact, example)
    small, index, stays = job.best()
    result = Shrunk(small, index, _units(seen, stays), job.reasons(stays), note=job.note(stays, masks, prefix))
    if fold_batchnorm:
        result = fold_norms(result, example)
    return result


@torch.no_grad()
def dead_units(model: nn.Module, example: Any) -> dict[str, str]:
    """Layer -> how many of its channels are constant or unread and are there all the same, and why.

    Args:
        model: any module that runs; zeros of its weights count.
        example: a batch of inputs, on the model's device.
    """
    inner, _ = unwrapped(model)
    found = analysis(inner, example)
    values, fixed = named_tensors(inner), found.fixed(True)
    reads = Constants(found.seen, values).reads
    job = _Job(inner, found, values, reads, live(found.seen, reads, fixed), fixed, 1, True, example)
    return job.reasons(torch.ones(len(found.space), dtype=torch.bool), ends=False)


@torch.no_grad()
def remove_silent(model: nn.Module, masks: Mapping[str, Tensor], example: Any) -> Shrunk:
    """The model without the channels that its masks keep at 0, whatever the other weights become: to train on.

    Unlike what ``remove_dead`` leaves it is the same network in training, too: nothing is folded, and a channel that is
    silent by its values alone stays. Of a layer that masks empty one stays, and some fill up ``TRAINED_WIDTH``.

    Args:
        model: any module that runs, its pruned weights at 0; untouched.
        masks: parameter name -> 0/1 tensor.
        example: a batch of inputs, on the model's device.

    Returns:
        The smaller model; ``model`` itself where nothing can go.

    Raises:
        StructureError: the model does not run on the example.
    """
    found = analysis(model, example)
    seen, own = found.seen, named_tensors(model)
    values = anything({name: tensor.shape for name, tensor in own.items()})
    for name, mask in masks.items():
        kept = math.nan if isinstance(own[name], nn.Parameter) else 1.0
        values[name] = torch.where(mask.cpu().bool(), kept, 0.0)
    stays = found.fixed(True)
    for read in Constants(seen, values).reads:
        stays[seen.root[read.columns[read.level != 0]]] = True  # NaN, which may be anything, is not 0
    stays = filled(seen, stays, TRAINED_WIDTH)
    units = _units(seen, stays)
    small, index = (model, {}) if bool(stays.all()) else _made(model, seen, own, set(), stays, "all")[:2]
    if not index or difference(run(model, example), run(small, example)) > TOLERANCE:
        return Shrunk(model, {}, units)
    return Shrunk(small, index, units)


def joined_layers(model: nn.Module, example: Any) -> list[list[str]]:
    """Layers that make the very same channels, as an addition makes them, in forward order: groups of two and more."""
    seen = analysis(model, example).seen
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, axes in seen.slots.items():
        for numbers in axes.values():
            if bool((seen.roles[numbers] == 2).any()):
                groups.setdefault(tuple(seen.root[numbers].tolist()), []).append(name.rpartition(".")[0] or name)
    return [group for group in groups.values() if len(group) > 1]


def batchnorms(model: nn.Module) -> set[str]:
    """The names of all BatchNorms of a model."""
    return {name for name, module in model.named_modules() if hasattr(module, "num_batches_tracked")}


def fitting(masks: Mapping[str, Tensor] | None, model: nn.Module) -> Masks:
    """The masks, if they are masks of the model and nothing else prunes it."""
    refuse(model)
    if not isinstance(masks, Mapping | None):
        what = type(masks).__name__
        raise ShrinkError(f"masks should map names to tensors, not be a {what}: shrink(model, masks, example)")
    masks = masks if isinstance(masks, Masks) else Masks(masks or {})
    masks.check(model)
    for name, module in model.named_modules():
        names = {hook.__class__.__module__ for hook in module._forward_pre_hooks.values()}
        if "torch.nn.utils.prune" in names:
            raise ShrinkError(
                f"torch.nn.utils.prune is at work on {name!r}: take its masks, export.from_torch_prune(model), first"
            )
    for name, parameter in model.named_parameters():
        if (
            parameter.is_floating_point()
            and not bool(parameter.detach().sum().isfinite())
            and bool(parameter.isnan().any())
        ):
            raise ShrinkError(f"{name} holds NaN: nothing can be compared with what such a model gives")
    return masks


def masked_values(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter and buffer of a model, those that masks prune at 0 there."""
    own = named_tensors(model)
    made: dict[int, Tensor] = {}
    for name, mask in masks.items():
        tensor = own[name]
        keep = mask.to(tensor.device).bool()
        if not bool(keep.all()):
            made[id(tensor)] = made.get(id(tensor), tensor.detach()).masked_fill(~keep, 0)
    return {name: made.get(id(tensor), tensor) for name, tensor in own.items()}


def _unmade(seen: Seen, values: Mapping[str, Tensor]) -> Tensor:
    """Bool [groups], those that no weight makes any more; what biases give may then still be read."""
    made, gone = torch.zeros(2, int(seen.root.max()) + 1, dtype=torch.bool)
    for name, axes in seen.slots.items():
        for dim, numbers in axes.items():
            own = seen.roles[numbers] == 2
            groups = seen.root[numbers]
            rows = (values[name] != 0).movedim(dim, 0).reshape(len(groups), -1).any(1).cpu()
            made[groups[own & rows]] = True
            gone[groups[own & ~rows]] = True
    return gone & ~made


def _refuse_empty(seen: Seen, constants: Constants, alive: Tensor) -> None:
    """Refuse to make a network whose output no longer depends on its input."""
    values = [constants.values.get(number) for number in seen.outputs]
    if not values or any(value is None or bool(value.isnan().any()) for value in values):
        return
    for name, axes in seen.slots.items():
        for numbers in axes.values():
            if bool((seen.roles[numbers] == 2).any()) and not bool(alive[seen.root[numbers]].any()):
                layer = name.rpartition(".")[0] or name
                raise ShrinkError(
                    f"layer {layer!r} has no live unit left, so the output does not depend on it; prune less"
                )


def _units(seen: Seen, stays: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, axes in seen.slots.items():
        for numbers in axes.values():
            if bool((seen.roles[numbers] == 2).any()):
                found.setdefault(name.rpartition(".")[0] or name, stays[seen.root[numbers]].nonzero().flatten())
    return found


@dataclass
class _Job:
    """One model that is made smaller: tries, compares, and puts back what does not hold."""

    model: nn.Module
    found: Analysis
    values: dict[str, Tensor]
    reads: Sequence[Read]
    alive: Tensor
    fixed: Tensor
    round_to: int
    exact: bool
    example: Any
    back: dict[int, str] = field(default_factory=dict)  # space -> why its channels are put back

    def stays(self, spaces: Iterable[int] = ()) -> Tensor:
        kept = self.alive.clone()
        for space in (*self.back, *spaces):
            kept |= self.found.space == space
        return filled(self.found.seen, kept, self.round_to)

    def best(self) -> tuple[nn.Module, dict[str, tuple[Tensor, ...]], Tensor]:
        own, seen = named_tensors(self.model), self.found.seen
        changed = {name for name, value in self.values.items() if value is not own[name]}
        whole = self.model
        if changed:
            whole = duplicate(
                self.model, {id(own[n]): _like(self.values[n], own[n]) for n in changed} | _rest(own, changed)
            )
        stays = self.stays()
        slots = [seen.root[numbers] for axes in seen.slots.values() for numbers in axes.values()]
        if all(bool(stays[groups].all()) for groups in slots):
            return (duplicate(whole, {}) if changed else whole), {}, stays
        self.examples = [self.example, _other(self.example)]
        self.expected = [run(whole, self.examples[0])]
        if any(bool(t.isnan().any()) for t in self.expected[0] if t.is_floating_point()):
            raise ShrinkError(
                "the model gives nan for the example, so nothing can be compared with it: give another one"
            )
        again = run(whole, self.examples[0], seed=1)
        if difference(self.expected[0], again) > TOLERANCE:
            raise ShrinkError("the model gives random outputs in evaluation mode, so nothing can be compared with it")
        try:
            self.expected.append(run(whole, self.examples[1]))
        except StructureError:
            self.examples.pop()
        self.whole, self.changed = whole, changed
        while True:
            stays = self.stays()
            small, index, problem, where = self.attempt(stays)
            if problem is None:
                return small, index, stays
            self.put_back(stays, problem, where)

    def attempt(
        self, stays: Tensor, tries: int | None = None
    ) -> tuple[nn.Module | None, dict[str, tuple[Tensor, ...]], str | None, str | None]:
        """A smaller model, its index; or what is wrong with it, and the module that raised it, after so many tries."""
        values = dict(self.values)
        changed = self.changed | fold(self.found.seen, self.reads, ~stays, values)
        first: tuple[str, str | None] | None = None
        scaled = self.rescaled(values, changed, stays)
        doubts = _doubts(self.model, self.found.seen, stays)
        guesses = GUESSES[: 1 + (doubts > 0) + 2 * (doubts > 1)]
        for guess, tried in [*itertools.product((*guesses, None), (values, scaled))][:tries]:
            if tried is None:
                continue
            names = changed | {name for name, value in tried.items() if value is not values[name]}
            but: set[str] = set()
            while True:
                small, index, guessed = _made(self.model, self.found.seen, tried, names, stays, guess, but)
                problem = self.compare(small)
                if problem is None:
                    return small, index, None, None
                first = first or problem
                wrong = _around(problem[1]) & guessed  # a number that only looked like a size, perhaps
                if not wrong:
                    break
                but.add(max(wrong, key=len))
        return None, {}, *first

    def rescaled(self, values: dict[str, Tensor], changed: set[str], stays: Tensor) -> dict[str, Tensor] | None:
        """Queries and keys for an attention that divides by the root of what is left of each head; None: all is left.

        With n' of n channels left that root is smaller by sqrt(n' / n), so each of the two takes a root of that factor.
        """
        seen = self.found.seen
        factor = torch.ones(len(stays), dtype=torch.float64)
        for cells in seen.scaled:
            left = stays[cells].sum(1)
            factor[cells] = ((left / cells.shape[1]) ** 0.25)[:, None].double()
        if bool((factor[stays] == 1).all()):
            return None
        made = dict(values)
        for name, axes in seen.slots.items():
            for dim, numbers in axes.items():
                own = factor[seen.root[numbers]]
                if bool((seen.roles[numbers] > 1).any()) and bool((own != 1).any()):
                    shape = [-1 if d == dim else 1 for d in range(values[name].dim())]
                    made[name] = made[name].detach() * own.view(shape).to(values[name])
        return made

    def compare(self, small: nn.Module) -> tuple[str, str | None] | None:
        """What is wrong with a smaller model, and the module that raised it; None: nothing."""
        stack: list[str] = []
        handles = follow_calls(small, stack)
        try:
            given = [run(small, example) for example in self.examples]
        except StructureError as error:
            return (
                f"a size is written in the forward of {_named(stack)}: {first_line(error.__cause__ or error)[:100]}",
                (stack or [""])[-1],
            )
        finally:
            for handle in handles:
                handle.remove()
        if not self.exact:
            return None
        rounding = max((torch.finfo(t.dtype).eps for t in self.values.values() if t.is_floating_point()), default=0.0)
        tolerance = max(TOLERANCE, 4 * rounding)
        for expected, found, example in zip(self.expected, given, self.examples, strict=True):
            error = difference(expected, found)
            if not error <= tolerance:  # by rounding alone? Then not in float64
                double = tree_map_only(
                    Tensor, lambda t: t.cpu().double() if t.is_floating_point() else t.cpu(), example
                )
                with contextlib.suppress(StructureError):
                    both = [run(duplicate(net, {}).cpu().double(), double) for net in (self.whole, small)]
                    error = difference(*both)
            if not error <= tolerance:
                return f"without them the outputs differ by {error:.0e} of the largest", None
        return None

    def put_back(self, stays: Tensor, problem: str, where: str | None) -> None:
        """Keep whole spaces of channels that stand in the way: those of the module that raised, or by halves."""
        space = self.found.space
        removed = sorted(set(space[~stays & (space >= 0)].tolist()) - set(self.back))
        if not removed:
            raise ShrinkError(f"the copy of the model does not do what the model does: {problem}")
        if where is not None:
            near = self.near(where) & set(removed)
            while not near and where:
                where = where.rpartition(".")[0]
                near = self.near(where) & set(removed)
            self.back |= dict.fromkeys(self.culprit(where, removed) or near or removed, problem)
            return
        good = self.halved(removed, [])
        self.back |= dict.fromkeys(set(removed) - set(good), problem)

    def culprit(self, module: str, removed: Sequence[int]) -> set[int]:
        """The one space, of few, without which a model gets further than this module; none: it takes more than one."""
        order = {op.module: place for place, op in enumerate(self.found.seen.tape)}
        touched = sorted(self.touched(module)[0] & set(removed))
        for space in touched if 1 < len(touched) <= 4 else ():
            _, _, problem, where = self.attempt(self.stays([space]), tries=1)
            if problem is None or (where is not None and order.get(where, 0) > order.get(module, 0)):
                return {space}
        return set()

    def near(self, module: str) -> set[int]:
        """The spaces whose channels are made, read or counted in a module; those only it makes, if any."""
        touched, outside = self.touched(module)
        alone = touched - outside - set(self.back)
        pruned = ~self.stays()[torch.isin(self.found.space, torch.tensor(sorted(alone)))]
        return alone if alone and bool(pruned.any()) else touched

    def touched(self, module: str) -> tuple[set[int], set[int]]:
        """The spaces whose channels are made, read or counted in a module; those that are made outside of it."""
        seen, space = self.found.seen, self.found.space
        inside = f"{module}." if module else ""
        touched: set[int] = set()
        outside: set[int] = set()
        for name, axes in seen.slots.items():
            own = name.startswith(inside)
            for numbers in axes.values():
                if own:
                    touched |= set(space[seen.root[numbers]].tolist())
                elif bool((seen.roles[numbers] == 2).any()):
                    outside |= set(space[seen.root[numbers]].tolist())
        for numbers in (n for size in seen.sizes.get(module, {}).values() for n in size):
            touched |= set(space[seen.root[numbers]].flatten().tolist())
        return touched - {-1}, outside

    def halved(self, spaces: list[int], kept: list[int]) -> list[int]:
        """As many of some spaces as can be made smaller together with those that can already."""
        everything = set(self.found.space.tolist()) - {-1}
        if self.attempt(self.stays(everything - set(spaces) - set(kept)))[2] is None:
            return spaces
        if len(spaces) == 1:
            return []
        half = len(spaces) // 2
        first = self.halved(spaces[:half], kept)
        return first + self.halved(spaces[half:], kept + first)

    def reasons(self, stays: Tensor, ends: bool = True) -> dict[str, str]:
        """For each layer the channels that are dead, or pruned whole, and stay: how many, and why most of them do."""
        found: dict[str, str] = {}
        for layer, groups, rows in self.dead():
            count: dict[str, int] = {}
            for group in groups[rows & stays[groups]].tolist():
                reason = self.why(group)
                count[reason] = count.get(reason, 0) + 1
            lines = [f"{n} of {len(groups)} units: {why}" for why, n in count.items() if ends or why != OUTPUT]
            if lines:
                found[layer] = "; ".join(lines)
        return found

    def dead(self) -> list[tuple[str, Tensor, Tensor]]:
        """Layer, the groups that it makes, and which of them it makes constant, or nobody reads."""
        seen, found = self.found.seen, []
        for name, axes in seen.slots.items():
            for dim, numbers in axes.items():
                if bool((seen.roles[numbers] == 2).any()):
                    rows = ~(self.values[name].detach() != 0).movedim(dim, 0).flatten(1).any(1).cpu()
                    groups = seen.root[numbers]
                    found.append((name.rpartition(".")[0] or name, groups, rows | ~self.alive[groups]))
        return found

    def why(self, group: int) -> str:
        space = int(self.found.space[group])
        if group in self.found.why:
            return self.found.why[group]
        if self.exact and group in self.found.seen.soft:
            return self.found.seen.soft[group]
        if space in self.back and not bool(self.alive[group]):
            return self.back[space]
        if not bool(self.alive[group]):
            return "kept to fill up"
        for read in self.reads:
            own = self.found.seen.root[read.columns] == group
            level = read.level[own]
            if len(level) and bool((~level.isnan() & (level != 0)).any()) and not bool(level.isnan().any()):
                stuck = "has no place to fold it into" if read.places is None else "pads its input with zeros"
                return f"constant but not 0, and module {read.module!r} {stuck}"
        return "what they are joined with is alive"

    def note(self, stays: Tensor, masks: Masks, prefix: str) -> str | None:
        """One line on what the masks prune whole and what is there all the same."""
        asked, left, count = 0, 0, dict[str, int]()
        for layer, groups, rows in self.dead():
            rows = rows & torch.tensor(any(f"{prefix}{layer}.{part}".lstrip(".") in masks for part in ("weight", "")))
            asked += int(rows.sum())
            for group in groups[rows & stays[groups]].tolist():
                left += 1
                count[self.why(group)] = count.get(self.why(group), 0) + 1
        if not left:
            return None
        most = max(count, key=count.__getitem__)
        return f"{left} of {asked} channels that are pruned could not be removed; {count[most]} of them: {most}"


def _around(module: str | None) -> set[str]:
    """A module and those that it is in."""
    parts = [] if module is None else module.split(".")
    return {".".join(parts[:n]) for n in range(len(parts) + 1)} if module is not None else set()


def _like(value: Tensor, old: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def _rest(own: Mapping[str, Tensor], changed: set[str]) -> dict[int, Tensor]:
    """Parameters that a copy shares."""
    gone = {id(own[name]) for name in changed}
    return {id(t): t for t in own.values() if isinstance(t, nn.Parameter) and id(t) not in gone}


def _named(stack: Sequence[str]) -> str:
    return repr(stack[-1]) if stack and stack[-1] else "the model"


def _other(example: Any) -> Any:
    """An example of the same shapes and ranges with other values."""
    draw = torch.Generator().manual_seed(0)

    def other(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.numel() > 1:
            values = torch.randn(t.shape, generator=draw, dtype=torch.float64)
            wide = t.detach().cpu().double()
            return (values * (wide.std() + 1e-3) + wide.mean()).to(t)
        return t.flatten()[torch.randperm(t.numel(), generator=draw).to(t.device)].view(t.shape)

    return tree_map_only(Tensor, other, example)


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest of all outputs, relative to the largest value of that output; infinities exactly."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return math.inf
    largest = 0.0
    for pair in zip(expected, found, strict=True):
        if not pair[0].is_floating_point():
            continue
        a, b = (tensor.detach().cpu().double().flatten() for tensor in pair)
        error = (a - b).abs().masked_fill(a == b, 0).nan_to_num(math.inf, math.inf)
        if len(a):
            largest = max(largest, float(error.max()) / (float(a.abs().nan_to_num(0, 0).max()) or 1.0))
    return largest


def carry(optimizer: torch.optim.Optimizer, before: nn.Module, result: Shrunk) -> torch.optim.Optimizer:
    """The optimiser of a model, for the smaller one: every parameter in its group, with its moments cut to shape.

    Args:
        optimizer: of ``before``; it is not changed.
        before: the model that was made smaller.
        result: what ``remove_dead`` gave for it.

    Raises:
        ShrinkError: the optimiser holds a parameter that is not the model's, or moments of another shape than their
            parameters, or BatchNorms of the smaller model are folded.
    """
    if result.folded:
        raise ShrinkError(
            "a model whose BatchNorms are folded is for inference: leave out optimizer, or fold_batchnorm"
        )
    names = {id(parameter): name for name, parameter in unwrapped(before)[0].named_parameters()}
    after = dict(result.model.named_parameters())
    groups, state = [], {}
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise ShrinkError(
                "the optimiser holds a parameter that is not the model's: build it from model.parameters()"
            )
        own = [names[id(parameter)] for parameter in group["params"]]
        groups.append({**group, "params": [after[name] for name in own]})
        for name, parameter in zip(own, group["params"], strict=True):
            moments = state[after[name]] = {}
            for kind, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[kind] = result.cut(name, value).clone()
                elif isinstance(value, Tensor) and value.numel() > 1 and after[name].shape != parameter.shape:
                    raise ShrinkError(
                        f"{type(optimizer).__name__} holds {kind!r}, which has another shape than its parameter {name} "
                        "and cannot be cut to size: leave out optimizer, and build a new one for the smaller model"
                    )
                else:
                    moments[kind] = copy.deepcopy(value)
    made = object.__new__(type(optimizer))  # its constructor may want anything
    hooks = {name: type(value)() for name, value in vars(optimizer).items() if "_hooks" in name}
    vars(made).update({**vars(optimizer), **hooks, "param_groups": groups, "state": defaultdict(dict)})
    made.state.update({parameter: moments for parameter, moments in state.items() if moments})
    return made


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_norms(result: Shrunk, example: Any) -> Shrunk:
    """The same without the BatchNorms that can be folded into the layer right before them, in evaluation mode.

    BatchNorm is then y = (x - mean) * scale + beta with scale = gamma / sqrt(var + eps); both go into the weight and
    the bias of what makes x (Jacob et al., 2018, section 3.2). Where it was stands an ``nn.Identity``, or what else its
    class does (an activation), and activations right behind work in place.
    """
    plan, left, behind = norms(result.model, example)
    expected = [run(result.model, example)]

    def tried(own: Mapping[str, _Norm]) -> nn.Module | None:
        made = _without(result.model, own, behind)
        try:
            return made if difference(expected[0], run(made, example)) <= TOLERANCE else None
        except StructureError:
            return None

    made = tried(plan) if plan else None
    if plan and made is None:  # one by one
        good: dict[str, _Norm] = {}
        for name, norm in plan.items():
            if (more := tried({**good, name: norm})) is not None:
                good[name], made = norm, more
            else:
                left[name] = "its class does something else, too"
        plan = good
    if made is None:
        return replace(result, unfolded=left)
    return replace(result, model=made, folded={name: norm.layer for name, norm in plan.items()}, unfolded=left)


class _Norm(NamedTuple):
    layer: str
    turned: bool
    tensors: tuple[str | None, ...]  # gamma, beta, mean, var
    eps: float


def norms(model: nn.Module, example: Any) -> tuple[dict[str, _Norm], dict[str, str], set[str]]:
    """BatchNorm -> the layer that can take it; BatchNorm -> why none can; activations that alone read the former."""
    seen = analysis(model, example).seen
    made_by = {number: op for op in seen.tape for number in op.outs}
    readers: dict[int, list[Op]] = {}
    uses: dict[str, int] = {}
    for op in seen.tape:
        for ref in op.refs:
            readers.setdefault(int(ref), []).append(op)
            if ref in seen.names:
                uses[seen.names[ref]] = uses.get(seen.names[ref], 0) + 1
    own, plan, left, behind = named_tensors(model), dict[str, _Norm](), dict[str, str](), set[str]()
    shared = {name for name, t in own.items() if sum(other is t for other in own.values()) > 1}
    for op in seen.tape:
        if op.kind != "batch_norm":
            continue
        names = tuple(seen.names.get(ref) if isinstance(ref, Ref) else None for ref in op.args[1:5])
        name = _owner(seen, op)
        before, weight = made_by.get(op.args[0]), None
        while before is not None and len(readers[before.outs[0]]) == 1:
            taken = before.kind == "batch_norm" and _owner(seen, before) in plan
            if not taken and not (before.kind == "pointwise" and before.name in ("clone", "dropout")):
                break
            before = made_by.get(before.args[0])
        if before is not None and before.kind == "convolution":
            weight = seen.names.get(before.extra[1])
        elif before is not None and before.kind == "contract" and len(seen.shapes[op.args[0]]) == 2:
            moved = made_by.get(before.extra[1])
            weight = seen.names.get(moved.args[0]) if moved is not None and moved.name in ("t", "transpose") else None
        if names[2] is None or names[3] is None:
            left.setdefault(name, "it has no running statistics")
        elif weight is None:
            left.setdefault(name, "what it reads is not given by a convolution or a Linear")
        elif len(readers[op.args[0]]) > 1 or op.args[0] in seen.outputs:
            left.setdefault(name, f"what {weight.rpartition('.')[0]!r} gives is also read elsewhere")
        elif uses[weight] > 1 or weight in shared or any(uses.get(n or "", 1) > 1 for n in names):
            left.setdefault(name, f"{weight.rpartition('.')[0]!r} is used more than once, or it is itself")
        elif not weight.endswith("weight"):
            left.setdefault(name, f"{weight!r} is not the weight of a layer")
        else:
            eps = bound(op.func, op.args, op.kwargs)["eps"]
            turned = before.kind == "convolution" and bool(bound(before.func, before.args, before.kwargs)["transposed"])
            plan[name] = _Norm(weight.rpartition(".")[0], turned, names, eps)
            after = readers.get(op.outs[0], [])
            if len(after) == 1 and hasattr(model.get_submodule(after[0].module), "inplace"):
                behind.add(after[0].module)
    return plan, left, behind


def _owner(seen: Seen, op: Op) -> str:
    """The module whose parameters or statistics a normalisation has."""
    names = (seen.names.get(ref) for ref in op.args[1:5] if isinstance(ref, Ref))
    return next((name.rpartition(".")[0] for name in names if name), op.module)


def _without(model: nn.Module, plan: Mapping[str, _Norm], behind: set[str]) -> nn.Module:
    made = duplicate(model, {}).eval()
    for name, norm in plan.items():
        own = named_tensors(made)
        layer = made.get_submodule(norm.layer)
        gamma, beta, mean, var = (own[n].detach().double() if n else None for n in norm.tensors)
        scale = (var + norm.eps).rsqrt() * (1 if gamma is None else gamma)
        weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
        if norm.turned:  # [inputs, outputs of a group, ...]
            factor = scale.view(groups, 1, -1).expand(groups, len(weight) // groups, -1).flatten(0, 1)
        else:
            factor = scale.view(-1, 1)
        factor = factor.view(*factor.shape, *[1] * (weight.dim() - 2))
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().double()
        bias = (bias - mean) * scale + (0 if beta is None else beta)
        learns = layer.weight.requires_grad
        wide = torch.empty_like(weight).copy_(weight.double() * factor)  # keeps the memory format
        layer.weight = nn.Parameter(wide, requires_grad=learns)
        layer.bias = nn.Parameter(bias.to(weight), requires_grad=learns)
        rest = list(made.get_submodule(name).children())
        made.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())
    for name in behind:
        made.get_submodule(name).inplace = True
    return made
