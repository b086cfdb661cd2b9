"""Chains of layers: which units are live, and the chain without the others. It is what training uses; see ``shrink``.

A hidden unit (a neuron of a Linear, a filter of a Conv2d) can go when nothing reads it, or when it is constant: no
live input is left, so it always emits act(bias), which is added to the biases of the next layer first. One pass
forward finds every constant unit, because constants are folded as they are found; one pass backward finds every
unread one; after both nothing more can die, so the result is the fixed point.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunelab.structure.collapse import reads_units
from prunelab.structure.shrink import ShrinkError

_ELEMENTWISE = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.GELU, nn.Identity, nn.Dropout)
_POOLING = (nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Shrunk:
    """A smaller model and how it lies inside the one it came from.

    Attributes:
        model: the new module; the old one is untouched.
        units: hidden layer -> int64 positions, in the old layer, of the units that are left.
        index: parameter name -> for each axis the positions kept, int64.
    """

    model: nn.Sequential
    units: dict[str, Tensor]
    index: dict[str, tuple[Tensor, ...]]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Bring a mask, a moment or anything else of the old shape of parameter ``name`` to its new shape."""
        return cut(tensor, self.index[name])


def cut(tensor: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """The entries of ``tensor`` at the given positions of each axis, contiguous.

    An axis with positions [rows, n] has n for each row of what the axis before left (grouped convolutions).
    """
    for axis, kept in enumerate(index):
        kept = kept.to(tensor.device)
        if kept.dim() > 1:
            tensor = tensor.take_along_dim(kept.view(*kept.shape, *[1] * (tensor.dim() - 2)), axis)
        else:
            tensor = tensor.index_select(axis, kept)
    return tensor.contiguous()


def spread(tensor: Tensor, index: tuple[Tensor, ...], shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of ``cut``: put ``tensor`` back at its positions in zeros of the old ``shape``."""
    whole = tensor.new_zeros(shape)
    whole[torch.meshgrid(*[i.to(tensor.device) for i in index], indexing="ij")] = tensor
    return whole


def whole_index(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """The index of a model from which nothing was removed: every position of every axis of every parameter."""
    return {name: tuple(torch.arange(size) for size in p.shape) for name, p in model.named_parameters()}


def then(
    first: Mapping[str, tuple[Tensor, ...]], second: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, tuple[Tensor, ...]]:
    """The index of two removals, one after the other, in the coordinates of the model before both."""
    return {name: tuple(a[b] for a, b in zip(axes, second[name], strict=True)) for name, axes in first.items()}


@dataclass(frozen=True)
class _Link:
    """A weighted layer and what stands between it and the next one."""

    name: str
    layer: nn.Linear | nn.Conv2d
    between: tuple[nn.Module, ...]


def chain(model: nn.Module) -> list[_Link]:
    """The weighted layers of a plain chain, in forward order.

    Raises:
        ShrinkError: the model is no ``nn.Sequential``, or holds a module that this file does not understand, or a layer
            whose inputs may be others than the units of the layer before; it is named.
    """
    if type(model) is not nn.Sequential:
        raise ShrinkError(
            f"{type(model).__name__} is not a plain nn.Sequential chain; only chains of layers can be shrunk"
        )
    links: list[tuple[str, nn.Linear | nn.Conv2d, list[nn.Module]]] = []
    used: set[int] = set()
    for name, module in model._modules.items():  # named_children() leaves out a module that comes twice
        where = f"module {name!r} ({type(module).__name__})"
        if module._forward_hooks or module._forward_pre_hooks:
            raise ShrinkError(f"{where} has hooks, which may change what it gives")
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1):
            own = {id(parameter) for parameter in module._parameters.values() if parameter is not None}
            if used & own:
                raise ShrinkError(f"{where} shares its weight or bias with another layer, or comes twice")
            if links and not reads_units(links[-1][1], links[-1][2], module):
                raise ShrinkError(f"{where} may read something else than the units of {links[-1][0]!r} in their order")
            used |= own
            links.append((name, module, []))
        elif type(module) not in (*_ELEMENTWISE, *_POOLING, nn.Flatten):
            raise ShrinkError(
                f"{where} is not understood; shrink knows Linear, Conv2d, element-wise activations, pooling and Flatten"
            )
        elif links:
            links[-1][2].append(module)
    return [_Link(name, layer, tuple(between)) for name, layer, between in links]


def _by_unit(weight: Tensor, units: int) -> Tensor:
    """A weight as [outputs, units of the layer before, the rest]: a flattened map gives several columns to one unit."""
    return weight.reshape(weight.shape[0], units, weight[0].numel() // units if len(weight) else 1)


def _effective(link: _Link, what: str, masks: Mapping[str, Tensor] | None) -> Tensor | None:
    parameter, name = getattr(link.layer, what), f"{link.name}.{what}"
    if parameter is None:
        return None
    value = parameter.detach()
    return value * masks[name].to(value) if masks is not None and name in masks else value.clone()


@torch.no_grad()
def _survey(model: nn.Module, masks: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which units of each hidden layer are needed (bool), and the biases after all constants were folded."""
    links = chain(model)
    weights = [_effective(link, "weight", masks) for link in links]
    biases = [_effective(link, "bias", masks) for link in links]
    varying = [torch.ones(w.shape[0], dtype=torch.bool, device=w.device) for w in weights]
    for i in range(len(links) - 1):  # forward: what is constant, and its value
        read = weights[i] != 0
        if i:
            read = _by_unit(read, len(varying[i - 1]))[:, varying[i - 1]]
        constant = ~read.flatten(1).any(1)
        emitted = weights[i].new_zeros(len(constant)) if biases[i] is None else biases[i].clone()  # some work in place
        for module in links[i].between:
            if isinstance(module, _ELEMENTWISE) and not isinstance(module, nn.Dropout):
                emitted = module(emitted)
        following = links[i + 1].layer
        columns = _by_unit(weights[i + 1], len(constant))
        effect = columns.sum(2)  # a constant map adds the sum of its kernel at every position
        padded = isinstance(following, nn.Conv2d) and any(p != 0 for p in _pairs(following.padding))
        averages = [module for module in links[i].between if isinstance(module, nn.AvgPool2d)]
        padded |= any(m.divisor_override or any(p != 0 for p in _pairs(m.padding)) for m in averages)
        if padded:  # zeros enter at the border, so a constant other than 0 does not act as a bias there
            constant &= (emitted == 0) | ~(columns != 0).any(2).any(0)
        if biases[i + 1] is None:
            constant &= (emitted == 0) | ~(columns != 0).any(2).any(0)
        else:
            biases[i + 1] += effect[:, constant] @ emitted[constant]
        varying[i] = ~constant
    needed = list(varying)
    for i in range(len(links) - 2, -1, -1):  # backward: what nobody reads
        rows = weights[i + 1][needed[i + 1]]
        needed[i] = varying[i] & (_by_unit(rows, len(varying[i])) != 0).any(2).any(0)
    hidden = {link.name: needed[i] for i, link in enumerate(links[:-1])}
    return hidden, {f"{link.name}.bias": bias for link, bias in zip(links, biases, strict=True) if bias is not None}


def _pairs(value: int | tuple[int, ...] | str) -> tuple[int | str, ...]:
    return value if isinstance(value, tuple) else (value,)


def live_units(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Hidden layer -> units that still carry information from the input to the output.

    Args:
        model: a chain of layers.
        masks: parameter name -> 0/1 tensor; None: zeros of the weights count.
    """
    return {name: int(needed.sum()) for name, needed in _survey(model, masks)[0].items()}


@torch.no_grad()
def remove_units(model: nn.Sequential, units: Mapping[str, Tensor]) -> Shrunk:
    """A copy of a chain with only the given units of its hidden layers.

    Args:
        model: a chain of layers.
        units: hidden layer -> int64 positions that stay, ascending; layers that are not named stay whole.

    Raises:
        ShrinkError: a layer would be left without a unit.
    """
    links = chain(model)
    index: dict[str, tuple[Tensor, ...]] = {}
    parts: dict[int, nn.Parameter] = {}
    before: Tensor | None = None  # kept units of the layer before; None: the input, which stays whole
    width = 0
    for link in links:
        layer, own = link.layer, link.layer.weight
        rows = units[link.name].cpu() if link.name in units else torch.arange(own.shape[0])
        if len(rows) == 0:
            raise ShrinkError(f"layer {link.name!r} would have no unit left; prune less, or stop before it is empty")
        columns = torch.arange(own.shape[1])
        if before is not None:
            columns = columns.view(width, -1)[before].flatten()
        index[f"{link.name}.weight"] = (rows, columns, *(torch.arange(size) for size in own.shape[2:]))
        if layer.bias is not None:
            index[f"{link.name}.bias"] = (rows,)
        for what, parameter in layer.named_parameters():
            part = cut(parameter.detach(), index[f"{link.name}.{what}"])
            parts[id(parameter)] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        before, width = rows, own.shape[0]
    made = copy.deepcopy(model, dict(parts))  # with these parameters for the old ones
    for link in links:
        layer = made._modules[link.name]
        outputs, inputs = layer.weight.shape[:2]
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = outputs, inputs
        else:
            layer.out_channels, layer.in_channels = outputs, inputs
    return Shrunk(made, {link.name: index[f"{link.name}.weight"][0] for link in links[:-1]}, index)


@torch.no_grad()
def compact(model: nn.Sequential, masks: Mapping[str, Tensor] | None = None) -> Shrunk:
    """Remove every unit that is constant or unread, constants folded into the next biases: same outputs, fewer units.

    Args:
        model: a chain of layers; untouched.
        masks: parameter name -> 0/1 tensor, applied to the result; None: zeros of the weights count.

    Returns:
        The smaller model, with masked weights at zero, and where its parts came from.

    Raises:
        ShrinkError: a hidden layer has no live unit left, so that the output does not depend on the input; it is named.
    """
    needed, biases = _survey(model, masks)
    for name, alive in needed.items():
        if not alive.any():
            raise ShrinkError(
                f"layer {name!r} has no live unit left, so the output no longer depends on the input; prune less"
            )
    result = remove_units(model, {name: alive.nonzero().flatten() for name, alive in needed.items()})
    for name, parameter in result.model.named_parameters():
        if name in biases:
            parameter.copy_(result.cut(name, biases[name]))
        elif masks is not None and name in masks:
            parameter.mul_(result.cut(name, masks[name]).to(parameter))
    return result
