"""After shrinking: statistics of BatchNorm measured again, and a fresh model given the sizes of a smaller one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import first_line
from prunelab.structure.groups import analysis, channel_groups
from prunelab.structure.shrink import ShrinkError, filled, follow, made_with
from prunelab.structure.watch import StructureError, duplicate, named_tensors, run, unwrapped


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """How many batches the running statistics of every BatchNorm were measured on, anew and in place.

    They become the plain mean over the batches (``momentum=None``), as after pruning the old ones belong to another
    network. Everything else stays in evaluation mode and as it is.

    Args:
        model: any module.
        batches: inputs, each a tensor, a tuple of positional arguments or a dict of named ones.

    Raises:
        StructureError: there is no batch, or the model does not take one.
    """
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None and hasattr(m, "momentum")]
    before = [(module, module.training) for module in model.modules()]
    moments = [module.momentum for module in norms]
    count = 0
    try:
        model.eval()
        for batch in batches:
            if not count:
                for module in norms:
                    module.reset_running_stats()
            for module in norms:
                module.momentum = None
                module.training = True
            args, kwargs = (
                ((), dict(batch))
                if isinstance(batch, Mapping)
                else (tuple(batch), {})
                if isinstance(batch, tuple | list)
                else ((batch,), {})
            )
            model(*args, **kwargs)
            count += 1
    except (RuntimeError, ValueError, TypeError) as error:
        raise StructureError(f"batch {count + 1}: {first_line(error)}") from error
    finally:
        for module, momentum in zip(norms, moments, strict=True):
            module.momentum = momentum
        for module, training in before:
            module.training = training
    if not count:
        raise StructureError("there is no batch to measure the statistics of BatchNorm on")
    return count


@torch.no_grad()
def fit(model: nn.Module, state_dict: Mapping[str, Tensor], example: Any = None) -> nn.Module:
    """A copy of a dense model that has the sizes, and the values, of a smaller one's ``state_dict``.

    Args:
        model: of the class, and with the arguments, that the smaller one came from; it is not changed.
        state_dict: of the smaller model.
        example: a batch of inputs; needed only where sizes are kept in the user's own modules (``num_heads``).

    Raises:
        ShrinkError: the state_dict is not one of a smaller model of this kind, or the result does not run.
    """
    inner, prefix = unwrapped(model)
    state = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    own = named_tensors(inner)
    for name, tensor in state.items():
        if name in own and (
            own[name].dim() != tensor.dim() or any(a < b for a, b in zip(own[name].shape, tensor.shape, strict=True))
        ):
            raise ShrinkError(f"{name}: shape {tuple(tensor.shape)} is no part of {tuple(own[name].shape)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    instead: dict[int, Any] = {}
    for name, tensor in own.items():
        if name in state and tuple(state[name].shape) != shapes[name]:
            part = tensor.detach()[tuple(slice(n) for n in state[name].shape)].clone()
            instead[id(tensor)] = nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
    small = None
    if example is not None and instead:
        small = _by_groups(inner, state, example)
    if small is None:
        small = duplicate(inner, instead)
        follow(small, shapes, None, None, False)
    try:
        small.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ShrinkError(f"not the state_dict of a smaller {type(inner).__name__}: {first_line(error)}") from None
    if example is not None:
        run(small, example)
    return small


def _by_groups(model: nn.Module, state: Mapping[str, Tensor], example: Any) -> nn.Module | None:
    """The model cut to the right sizes, by whole groups of channels, so that whole numbers follow; None: it does not."""
    found = analysis(model, example)
    seen = found.seen
    for granularity in ("channel", "head"):
        stays = torch.zeros(len(found.space), dtype=torch.bool)
        for space in channel_groups(model, example, granularity, exact=False).values():
            part = next(part for part in space.slices if part.role == "out")
            groups = seen.root[seen.slots[part.name][part.dim]]
            there = part.group >= 0
            each = max(1, int(there.sum()) // space.size)
            gone = (len(part.group) - state[part.name].shape[part.dim]) // each if part.name in state else 0
            order = torch.argsort(space.fixed.long(), descending=True, stable=True)
            keep = torch.zeros(space.size, dtype=torch.bool)
            keep[order[: max(1, space.size - gone)]] = True
            stays[groups[there][keep[part.group[there]]]] = True
        stays |= found.fixed(False)
        stays |= found.space < 0
        for read in seen.blocks:
            if read.rows is not None:
                stays[read.rows] = stays[read.cells].any(1)
        stays = filled(seen, stays)
        small = made_with(model, seen, stays)
        own = named_tensors(small)
        if all(own[name].shape == tensor.shape for name, tensor in state.items() if name in own):
            return small
    return None
