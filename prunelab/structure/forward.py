"""Running a user's model to look at it: afterwards neither model, nor data, nor random numbers are changed."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from prunelab.errors import PrunelabError, first_line
from prunelab.masks import Masks, maskable


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Evaluation mode as long as the ``with`` lasts; whatever calls of the model changed in it is put back afterwards.

    That is: modes, parameters, buffers, attributes of its modules with the lists and dicts in them, and the random
    states of Python, NumPy and torch. Random numbers that the model draws itself begin at the same seed each time.
    """
    boxes, tensors = _contents(model)
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed a CUDA that is not yet in use
            if devices:
                torch.cuda.manual_seed_all(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for box, inside in boxes:
            box.clear()
            box.extend(inside) if isinstance(box, list) else box.update(inside)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _contents(model: nn.Module) -> tuple[list[tuple[Any, Any]], list[Tensor]]:
    """The dicts, lists and sets that hold a model's state, each with a copy of what is in it; and all tensors there."""
    boxes: dict[int, tuple[Any, Any]] = {}
    tensors: dict[int, Tensor] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            if not is_lazy(value) and not value.is_meta and value.layout == torch.strided:  # no calls write into others
                tensors[id(value)] = value
        elif isinstance(value, dict | list | set) and id(value) not in boxes:
            boxes[id(value)] = value, value.copy()
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)
        elif isinstance(value, tuple):
            for part in value:
                walk(part)

    for module in model.modules():
        walk(vars(module))
    return list(boxes.values()), list(tensors.values())


@contextlib.contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[None]:
    """The model with masks applied as long as the ``with`` lasts; its weights are put back bit by bit."""
    parameters = maskable(model)
    kept = {name: parameters[name].detach().clone() for name in masks}
    masks.apply_(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def call(model: nn.Module, inputs: Any) -> Any:
    """What the model gives for a tensor, a tuple or list of arguments, or a dict by name, of which it gets copies.

    A model that works in place changes the copies only.

    Raises:
        PrunelabError: the model raised something for them.
    """
    args, kwargs = arguments(inputs)
    try:
        return model(*args, **kwargs)
    except PrunelabError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        what = f"{type(model).__name__} does not take inputs of {shapes(inputs)}"
        raise PrunelabError(f"{what}: {first_line(error)}") from error


def arguments(inputs: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """A tensor, a tuple or list of them, or a dict by name, copied, as positional and named arguments of a call."""
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple | list) else (inputs,)), {}


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """What a model of one output gives; refuses one that gives something else, as a dict, in one line."""
    found = call(model, inputs)
    if not isinstance(found, Tensor):
        what = f"{type(model).__name__} gives a {type(found).__name__}"
        raise PrunelabError(f"{what}: should be logits [N, classes]; wrap it in a module that returns those alone")
    return found


def copies(batches: Iterable[Any] | None) -> list[Any] | None:
    """Batches, as copies that a method may hand to a model that works in place."""
    return None if batches is None else [tree_map_only(Tensor, torch.clone, batch) for batch in batches]


def copied(model: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of a model that keeps results of an earlier call.

    Args:
        model: Any module.
        instead: ``id`` of a tensor in it -> what the copy gets in its place.

    Raises:
        PrunelabError: it holds something that cannot be copied.
    """
    memo = dict(instead or {})
    for tensor in _contents(model)[1]:
        if not tensor.is_leaf:
            memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # noqa: BLE001 - whatever an attribute raises that cannot be copied
        raise PrunelabError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` and averaging wrappers."""
    kinds = nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel
    while "_orig_mod" in model._modules or isinstance(model, kinds):
        model = model._modules.get("_orig_mod") or model._modules["module"]
    return model


def samples(example: Any) -> int:
    """How many samples an example holds: the length of its first tensor."""
    return next((len(tensor) for tensor in tree_leaves(example) if isinstance(tensor, Tensor) and tensor.dim()), 1)


def rows(example: Any, which: slice | Tensor) -> Any:
    """Some samples of an example; a tensor without that many rows, such as a mask of positions, stays whole."""
    count = samples(example)
    return tree_map_only(
        Tensor, lambda tensor: tensor[which] if tensor.dim() and len(tensor) == count else tensor, example
    )


def shapes(example: Any) -> str:
    """Shapes of the tensors of an example, in words."""
    found = [str(tuple(tensor.shape)) for tensor in tree_leaves(example) if isinstance(tensor, Tensor)]
    return f"shape{'s' * (len(found) > 1)} {', '.join(found)}"
