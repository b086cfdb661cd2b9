"""What the units of a layer give on, summed over data in one streamed pass; any model, any size of batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from prunelab.errors import PrunelabError
from prunelab.pruners.scores import wide
from prunelab.structure.forward import call, looking

# What may stand between a layer and the place where its units are looked at; each treats every unit by itself.
_POINTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Identity)
_FOLLOWERS = (*_POINTWISE, _BatchNorm)
_CACHED, _FREE = 1 << 21, 1 << 26  # numbers of the largest activation at a time: 8 MB on a CPU, else 256 MB
_MOST = 8192  # samples in one piece

Reduce = Callable[[Tensor, Sequence[int]], Tensor]


@torch.no_grad()
def unit_sums(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Any] | None, reduce: Reduce
) -> tuple[dict[str, Tensor], int]:
    """Sum a number of each unit over the samples, in one pass in evaluation mode; the model is left as it was.

    A unit is looked at behind the activations and BatchNorm that directly follow its layer, which are found by
    following the tensors of the first batch. Where a function such as ``F.relu`` follows instead of a module, the unit
    is looked at before it: its pre-activation.

    Args:
        model: Any module.
        layers: Names of Linear layers and convolutions.
        batches: ``(x, y)`` or ``x``, scaled, on the model's device, in pieces of any size: they are cut and joined to
            pieces that use the machine well.
        reduce: Takes an activation ``[N, ...]`` and the axes of its positions (those that are neither samples nor
            units; none for ``[N, units]``); gives float ``[units]``, summed over samples.

    Returns:
        Layer -> float64 ``[units]``, and the number of samples.

    Raises:
        PrunelabError: there are no data.
    """
    inputs = (batch[0] if isinstance(batch, list | tuple) else batch for batch in batches or ())
    first = next(inputs, None)
    if first is None or not len(first):
        raise PrunelabError("this method looks at activations: give batches=, pairs of inputs and targets")
    totals: dict[str, Tensor] = {}
    samples = 0
    with looking(model):
        places, numbers = _places(model, layers, first[:2])
        budget = _CACHED if first.device.type == "cpu" else _FREE
        for x in pieces(chain([first], inputs), max(min(budget // numbers, _MOST), 1)):
            samples += len(x)
            for layer, value in _pass(model, places, x, reduce):
                totals[layer] = totals[layer] + value if layer in totals else value
    return totals, samples


def pieces(tensors: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in pieces of ``size``; the last one as small as it comes."""
    held: list[Tensor] = []
    count = 0
    for tensor in tensors:
        held.append(tensor)
        count += len(tensor)
        if count >= size:
            whole = torch.cat(held) if len(held) > 1 else tensor
            *full, rest = whole.split(size)
            yield from full
            held, count = [rest], len(rest)
            if count == size:
                yield rest
                held, count = [], 0
    if count:
        yield torch.cat(held)


Place = tuple[str, int]  # a module, and which of its calls in one forward pass


def _places(model: nn.Module, layers: Sequence[str], x: Tensor) -> tuple[dict[Place, str], int]:
    """Where to look, found by following tensors from module to module, and the numbers per sample of the largest."""
    owner: dict[int, str] = {}  # id of a tensor -> the layer whose units it holds
    latest: dict[str, tuple[Place, Tensor]] = {}
    kept: list[Tensor] = []  # alive, so that no id comes twice
    calls: dict[str, int] = {}

    def follow(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            place = name, calls.get(name, 0)
            calls[name] = place[1] + 1
            layer = name if name in layers else owner.get(id(inputs[0]))
            if layer is not None and (layer == name or latest[layer][1] is inputs[0]):
                kept.append(output)
                owner[id(output)], latest[layer] = layer, (place, output)

        return hook

    known = dict(model.named_modules())
    hooked = {n: m for n, m in known.items() if n in layers or isinstance(m, _FOLLOWERS)}
    handles = [module.register_forward_hook(follow(name)) for name, module in hooked.items()]
    try:
        call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    if lost := [layer for layer in layers if layer not in latest]:
        raise PrunelabError(f"layer {lost[0]!r} takes no part in the forward pass: leave it out of layers")
    largest = max(output[0].numel() for _, output in latest.values())
    return {place: layer for layer, (place, _) in latest.items()}, largest


def _pass(model: nn.Module, places: Mapping[Place, str], x: Tensor, reduce: Reduce) -> Iterator[tuple[str, Tensor]]:
    found: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    axis = {layer: 1 if isinstance(model.get_submodule(layer), _ConvNd) else -1 for layer in places.values()}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            place = name, calls.get(name, 0)
            calls[name] = place[1] + 1
            if place in places:
                layer = places[place]
                units = axis[layer] % output.dim()
                positions = [i for i in range(1, output.dim()) if i != units]
                found[layer] = reduce(wide(output), positions).double()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in {name for name, _ in places}]
    try:
        call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    yield from found.items()
