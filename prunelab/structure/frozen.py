"""The leading modules of a chain that learn no more, and what they give for every sample, kept in a file."""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.structure.cost import layer_macs

PIECE = 256  # samples that pass through the modules at once


def parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a chain in forward order, by name; a chain inside a chain is unfolded.

    Raises:
        PrunelabError: the model is no ``nn.Sequential``.
    """
    if type(model) is not nn.Sequential:
        raise PrunelabError(f"{type(model).__name__} is no nn.Sequential chain: it has no leading modules to split off")
    found = []
    for name, module in model.named_children():
        inside = parts(module) if type(module) is nn.Sequential else None
        found += [(name, module)] if inside is None else [(f"{name}.{inner}", part) for inner, part in inside]
    return found


def tail(model: nn.Module, first: int) -> nn.Sequential:
    """The chain without its first modules, as ``parts`` counts them.

    Its modules and parameters are those of the model, under the same names: what trains the one trains the other.
    """
    rest: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in model.named_children():
        size = len(parts(module)) if type(module) is nn.Sequential else 1
        if first < size:
            rest[name] = tail(module, first) if first else module
        first = max(first - size, 0)
    return nn.Sequential(rest)


@torch.no_grad()
def stored(modules: Sequence[nn.Module], batches: Iterable[Tensor], samples: int, folder: Path | None = None) -> Tensor:
    """What modules, one after the other, give for every sample, in evaluation mode, where they stay.

    Args:
        modules: they learn no more, so that BatchNorm's running statistics are settled too.
        batches: inputs on the modules' device.
        samples: how many there are in all.
        folder: where the file lies; None: that for temporary files. It has no name and goes with the tensor, or with
            the process.

    Returns:
        float16 [samples, ...] on the CPU, mapped from the file into memory: the system keeps there what there is room
        for.

    Raises:
        PrunelabError: the disk has no room, or a value is too large for float16.
    """
    network = nn.Sequential(*modules).eval()
    whole, done = torch.empty(0), 0
    for batch in batches:
        for x in batch.split(PIECE):
            given = network(x.float()).to("cpu", torch.float16)
            if not bool(given.isfinite().all()):
                raise PrunelabError("stored features: a value is too large for float16; lower the learning rate")
            if not done:
                whole = _mapped((samples, *given.shape[1:]), folder)
            whole[done : done + len(given)] = given
            done += len(given)
    return whole


def _mapped(shape: tuple[int, ...], folder: Path | None) -> Tensor:
    size = 2 * int(np.prod(shape))
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is noticed now, and not as a crash in the middle
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))
        except OSError as error:
            what = f"{size / 2**30:.1f} GiB of stored features: {error.strerror or error}"
            raise PrunelabError(f"{what}; make room there, or use fewer samples") from None


def learning_macs(model: nn.Module, input_shape: tuple[int, ...], first: int = 0) -> int:
    """Multiply-accumulates of one sample in the Linear and Conv2d layers behind the first modules of a chain."""
    gone = tuple(f"{name}." for name, _ in parts(model)[:first])
    return sum(macs for name, macs in layer_macs(model, input_shape).items() if not name.startswith(gone))
