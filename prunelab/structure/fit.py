"""After shrinking: statistics of BatchNorm measured again, and a fresh model given the sizes of a smaller one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import first_line
from prunelab.structure.groups import Granularity, analysis, channel_groups
from prunelab.structure.shrink import GUESSES, TOLERANCE, ShrinkError, difference, filled, follow, made_with
from prunelab.structure.watch import StructureError, arguments, duplicate, named_tensors, run, unwrapped


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
            args, kwargs = arguments(batch)
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
def fit(
    model: nn.Module, state_dict: Mapping[str, Tensor], example: Any = None, granularity: Granularity | None = None
) -> nn.Module:
    """A copy of a dense model that has the sizes, and the values, of a smaller one's ``state_dict``.

    Args:
        model: of the class, and with the arguments, that the smaller one came from; it is not changed.
        state_dict: of the smaller model.
        example: a batch of inputs; needed only where sizes are kept in the user's own modules (``num_heads``).
        granularity: whether there are fewer attention heads (``"head"``) or smaller ones (``"channel"``), which shapes
            do not always tell.

    Raises:
        ShrinkError: the state_dict is not one of a smaller model of this kind, or might be one of two.
    """
    inner, prefix = unwrapped(model)
    state = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    own = named_tensors(inner)
    for name, tensor in state.items():
        old = own[name].shape if name in own else tensor.shape
        if len(old) != tensor.dim() or any(a < b for a, b in zip(old, tensor.shape, strict=True)):
            raise ShrinkError(f"{name}: shape {tuple(tensor.shape)} is no part of {tuple(own[name].shape)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    instead: dict[int, Any] = {}
    for name, tensor in own.items():
        if name in state and tuple(state[name].shape) != shapes[name]:
            part = tensor.detach()[tuple(slice(n) for n in state[name].shape)].clone()
            instead[id(tensor)] = nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
    if example is None or not instead:
        small = duplicate(inner, instead)
        follow(small, shapes, None, None, None)
        return _loaded(small, state)
    fitting: list[tuple[nn.Module, list[Tensor]]] = []
    for small in _by_groups(inner, state, example, (granularity,) if granularity else ("channel", "head")):
        with contextlib.suppress(StructureError):
            fitting.append((_loaded(small, state), run(small, example)))
    if not fitting:
        raise ShrinkError(f"no sizes of {type(inner).__name__} were found with which this state_dict runs")
    if any(difference(fitting[0][1], outputs) > TOLERANCE for _, outputs in fitting[1:]):
        raise ShrinkError(
            "these shapes could be those of fewer heads, or of smaller heads: say which, "
            "granularity='head' or granularity='channel'"
        )
    return fitting[0][0]


def _loaded(small: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    try:
        small.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ShrinkError(f"not the state_dict of a smaller {type(small).__name__}: {first_line(error)}") from None
    return small


def _by_groups(
    model: nn.Module, state: Mapping[str, Tensor], example: Any, granularities: Iterable[Granularity]
) -> Iterator[nn.Module]:
    """The model cut to the right sizes in every way, by groups of channels, so that whole numbers follow."""
    found = analysis(model, example)
    seen = found.seen
    for granularity in granularities:
        stays = found.fixed(False) | (found.space < 0)
        for space in channel_groups(model, example, granularity, exact=False).values():
            part = next(part for part in space.slices if part.role == "out")
            groups, there = seen.root[seen.slots[part.name][part.dim]], part.group >= 0
            gone = len(part.group) - state[part.name].shape[part.dim] if part.name in state else 0
            order = torch.argsort(space.fixed.long(), descending=True, stable=True)
            keep = torch.zeros(space.size, dtype=torch.bool)
            keep[order[: max(1, space.size - gone * space.size // max(1, int(there.sum())))]] = True
            stays[groups[there][keep[part.group[there]]]] = True
        for rows, cells, _ in seen.blocks:
            if rows is not None:
                stays[rows] = stays[cells].any(1)
        stays = filled(seen, stays)
        for guess in GUESSES:
            small = made_with(model, seen, stays, guess)
            own = named_tensors(small)
            if all(own[name].shape == tensor.shape for name, tensor in state.items() if name in own):
                yield small
