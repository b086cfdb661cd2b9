"""Running a model to look at it: afterwards neither the model, nor the data, nor any random number is another one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunelab.errors import PrunelabError
from prunelab.masks import Masks, maskable


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Evaluation mode as long as the ``with`` lasts; modes, buffers, attributes and random states come back after it.

    Random numbers that the model draws itself, as by a functional dropout, begin at the same seed each time.
    """
    saved = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    states = random.getstate(), np.random.get_state()
    devices = {buffer.device for buffer in (*model.parameters(), *model.buffers()) if buffer.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, attributes, own in saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


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
    """What the model gives for a tensor, a tuple of arguments or a dict of them, of which it gets copies.

    A layer that works in place changes the copies only.
    """
    inputs = tree_map_only(Tensor, torch.clone, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """What a classifier gives; refuses a model that gives something else, as a dict, in one line."""
    found = call(model, inputs)
    if not isinstance(found, Tensor):
        what = f"{type(model).__name__} gives a {type(found).__name__}"
        raise PrunelabError(f"{what}: should be logits [N, classes]; wrap it in a module that returns those alone")
    return found
