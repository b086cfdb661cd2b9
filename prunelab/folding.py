"""BatchNorm folded into the layer before it: a form of a network for inference, with fewer passes over its maps.

In evaluation mode BatchNorm is y = (x - mean) * scale + beta with scale = gamma / sqrt(var + eps), a factor and a
summand for each channel. Both go into the convolution, or Linear, that makes x: weight * scale and
(bias - mean) * scale + beta (Jacob et al., 2018, section 3.2). The outputs are the same up to rounding. The activation
right behind, if nobody else reads what the layer gives, then works in place: one pass is left of three.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunelab.graph import Graph, Node, trace

_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in evaluation mode


@dataclass(frozen=True)
class Folded:
    """A network without the BatchNorms that could be folded.

    Attributes:
        model: a copy in evaluation mode, with an ``nn.Identity`` where a BatchNorm was and activations behind them in
            place; the model itself where none could be folded.
        into: BatchNorm -> the layer that took it.
        left: BatchNorm -> why it is still there.
    """

    model: nn.Module
    into: dict[str, str]
    left: dict[str, str]


@torch.no_grad()
def fold(model: nn.Module, example: Tensor) -> Folded:
    """Fold every BatchNorm into the convolution or Linear right before it, where that layer is read by it alone.

    Args:
        model: any module that can be traced; untouched.
        example: a batch of inputs, on the model's device.

    Raises:
        GraphError: the model cannot be traced.
    """
    graph = trace(model, example)
    into, left = _plan(model, graph)
    if not into:
        return Folded(model, into, left)
    made = copy.deepcopy(model).eval()
    for name, layer in into.items():  # in forward order, so that of two in a row the first goes first
        _take(made.get_submodule(layer), made.get_submodule(name))
        made.set_submodule(name, nn.Identity())
    for name in _behind(graph, into):
        made.get_submodule(name).inplace = True
    return Folded(made, into, left)


@torch.no_grad()
def left(model: nn.Module, example: Tensor) -> dict[str, str]:
    """BatchNorm -> why it cannot be folded; those that can are not named.

    Args:
        model: any module that can be traced.
        example: a batch of inputs, on the model's device.
    """
    return _plan(model, trace(model, example))[1]


def batchnorms(model: nn.Module) -> set[str]:
    """The names of all BatchNorms of a model."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)}


def _plan(model: nn.Module, graph: Graph) -> tuple[dict[str, str], dict[str, str]]:
    """BatchNorm -> the layer that can take it; and BatchNorm -> why none can."""
    uses = Counter(id(node.module) for node in graph if node.module is not None)
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(id(module))

    def alone(module: nn.Module) -> bool:
        """Whether it is used once, and nobody else uses its parameters."""
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        return uses[id(module)] == 1 and all(len(owners[id(parameter)]) == 1 for parameter in own)

    into: dict[str, str] = {}
    why: dict[str, str] = {}
    for node in graph:
        if node.kind != "batchnorm":
            continue
        source, reader = graph[node.inputs[0]], node
        while not _others(graph, source, reader) and (
            isinstance(source.module, _NOTHING) or source.module_name in into
        ):
            source, reader = graph[source.inputs[0]], source
        others, norm, layer = _others(graph, source, reader), node.module, source.module
        if norm.running_mean is None:
            why[node.module_name] = "it has no running statistics"
        elif not alone(norm):
            why[node.module_name] = "it is used more than once, or its parameters are"
        elif others:
            why[node.module_name] = f"what {source.where} gives is also read by {others[0].where}"
        elif source.kind not in ("linear", "conv"):
            why[node.module_name] = f"it reads what {source.where} gives, which is no convolution and no Linear"
        elif not alone(layer):
            why[node.module_name] = f"{source.where} is used more than once, or its weight is"
        elif "weight" not in layer._parameters:
            why[node.module_name] = f"the weight of {source.where} is computed, not stored"
        elif source.kind == "linear" and len(source.shape) != 2:
            why[node.module_name] = f"it normalises another axis than that of the outputs of {source.where}"
        else:
            into[node.module_name] = source.module_name
    return into, why


def _behind(graph: Graph, into: dict[str, str]) -> set[str]:
    """The activations that read a folded BatchNorm, each time that they are used, and do so alone."""
    found: set[str] = set()
    unfit: set[str] = set()
    for node in graph:
        if node.kind == "elementwise" and hasattr(node.module, "inplace") and not isinstance(node.module, _NOTHING):
            source = graph[node.inputs[0]]
            fits = source.module_name in into and not _others(graph, source, node)
            (found if fits else unfit).add(node.module_name)
    return found - unfit


def _others(graph: Graph, source: Node, reader: Node) -> list[Node]:
    """Who reads a value beside this reader."""
    return [node for node in graph.consumers(source.name) if node is not reader]


def _take(layer: nn.Linear | nn.Conv2d, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Give a layer the factor and the summand of a BatchNorm; reckoned in float64."""
    mean, var = (t.detach().cpu().double() for t in (norm.running_mean, norm.running_var))
    scale, shift = (var + norm.eps).rsqrt(), torch.zeros_like(mean)
    if norm.affine:
        scale, shift = scale * norm.weight.cpu().double(), norm.bias.cpu().double()
    weight = layer.weight.detach()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().cpu().double()
    by_row = scale.view(-1, *[1] * (weight.dim() - 1))
    learns = layer.weight.requires_grad
    layer.weight = nn.Parameter(_like(weight.cpu().double() * by_row, weight), requires_grad=learns)
    layer.bias = nn.Parameter(((bias - mean) * scale + shift).to(weight), requires_grad=learns)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """The values with dtype, device and memory format of a tensor."""
    return torch.empty_like(tensor).copy_(values)
