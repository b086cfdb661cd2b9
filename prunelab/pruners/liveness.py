"""Units without a signal and units that nobody reads, in any traced model.

Units are followed through the graph: behind a layer its BatchNorm and activation, module or function, and the addition
that they lead to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from prunelab.masks import Masks, maskable
from prunelab.pruners.scores import wide
from prunelab.pruners.signals import inputs
from prunelab.structure.channels import Survey
from prunelab.structure.forward import looking
from prunelab.structure.graph import Graph, Node, traced


@torch.no_grad()
def mean_sizes(model: nn.Module, graph: Graph, names: Iterable[str], x: Tensor | Iterable[Any]) -> dict[str, Tensor]:
    """Node -> mean over samples of |value|, with the channels in front: [channels, ...].

    Args:
        model: as it is run.
        graph: of the model; it says where the channels are.
        names: of nodes whose values are tensors.
        x: the inputs, gone through once.
    """
    whole, wanted = traced(model), set(names)
    sums: dict[str, Tensor] = {}
    samples = 0

    class Run(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in wanted:  # at once, before an activation works in place
                sums[n.name] = sums.get(n.name, 0) + wide(value).abs().sum(0)
            return value

    with looking(model):
        for piece in inputs(x):
            Run(whole).run(piece.clone())
            samples += len(piece)
    return {name: total.movedim(_axis(graph, name) - 1, 0) / samples for name, total in sums.items()}


def silent_units(model: nn.Module, graph: Graph, layers: Iterable[str], x: Tensor | Iterable[Any]) -> dict[str, Tensor]:
    """Layer -> which units have a signal: False where the activation is 0 for every sample at every place; bool.

    Where the units are added to others, the sum has to be 0, and the others too: else they would come through when the
    units are gone. What comes through a gate need not be 0, since it can be closed.
    """
    looked: dict[str, list[str]] = {}
    for node in graph.weighted():
        if node.module_name in layers:
            looked.setdefault(node.module_name, []).extend(_ends(graph, node))
    sizes = mean_sizes(model, graph, {name for names in looked.values() for name in names}, x)
    return {
        layer: torch.stack([sizes[name].reshape(len(sizes[name]), -1).any(1) for name in names]).any(0)
        for layer, names in looked.items()
    }


def _ends(graph: Graph, node: Node) -> list[str]:
    """The value in which a layer's units are activations, and what was added to them on the way."""
    others: list[str] = []
    while len(readers := graph.consumers(node.name)) == 1:
        (reader,) = readers
        if reader.kind == "add" and len(reader.inputs) == 2 and not others:
            others = [name for name in reader.inputs if name != node.name and graph[name].kind != "gate"]
        elif reader.kind not in ("batchnorm", "elementwise"):
            break
        node = reader
    return [node.name, *others]


def _axis(graph: Graph, name: str) -> int:
    """The axis of the channels: behind a Linear the last one, else the second."""
    node = graph[name]
    while node.kind in ("batchnorm", "elementwise", "gate", "add") and node.inputs:
        node = graph[node.inputs[0]]
    return len(node.shape) - 1 if node.kind == "linear" else 1


def unread_units(model: nn.Module, graph: Graph, masks: Masks, forward: bool = True) -> dict[str, Tensor]:
    """Weighted layer or gate -> which of its units are read by anything on the way to the output; bool.

    The two sides of an addition are looked at one by one: a filter that is added to a shortcut may be read by nobody
    although the shortcut is read further on.

    Args:
        model: any module that can be traced.
        graph: of the model.
        masks: what is pruned so far.
        forward: whether units that always give 0 count as unread, and read nothing; False: backwards only.
    """
    survey = Survey(model, masks, graph)
    zero = {name: (value.constant == 0) & forward for name, value in survey.values.items()}
    read = {name: torch.zeros(len(value.ids), dtype=torch.bool) for name, value in survey.values.items()}
    found: dict[str, Tensor] = {}
    for node in reversed(list(graph)):
        wanted = read.get(node.name, torch.zeros(0, dtype=torch.bool))
        own = wanted & ~zero[node.name] if node.name in zero else wanted
        if node.kind in ("linear", "conv") and node.name in read:
            norm = _norm_behind(graph, node)  # what it makes of 0 may be a constant that is read
            keep = own if norm is None else wanted & ~zero[norm.name]
            found[node.module_name] = found.get(node.module_name, torch.zeros_like(keep)) | keep
        if node.kind == "gate" and node.name in read:
            found[node.module_name] = found.get(node.module_name, torch.zeros_like(own)) | own
        for name, part in _reads(survey, node, own).items():
            read[name] |= part
    return found


def _norm_behind(graph: Graph, node: Node) -> Node | None:
    """The BatchNorm that alone reads a layer."""
    readers = graph.consumers(node.name)
    return readers[0] if len(readers) == 1 and readers[0].kind == "batchnorm" else None


def _reads(survey: Survey, node: Node, own: Tensor) -> dict[str, Tensor]:
    """Which channels of each input a node reads, given which of its own are read."""
    known = [name for name in node.inputs if name in survey.values]
    everything = {name: torch.ones(len(survey.values[name].ids), dtype=torch.bool) for name in known}
    if node.kind == "output" or not survey.understood(node):
        return everything
    if node.kind in ("linear", "conv"):
        kept = survey.parameter(node.module_name, "weight") != 0
        groups = getattr(node.module, "groups", 1)
        rows = (kept.flatten(2).any(2) if kept.dim() > 2 else kept) & own[:, None]
        return {known[0]: rows.unflatten(0, (groups, -1)).any(1).flatten()}
    if node.kind == "gate":
        return {known[0]: own & (survey.parameter(node.module_name, "open") != 0)}
    if node.kind == "flatten":
        return {known[0]: own.view(len(survey.values[known[0]].ids), -1).any(1)}
    if node.kind == "cat":
        names = list(node.args[0])
        parts = own.split([len(survey.values[name].ids) for name in names])
        return {name: torch.stack([p for n, p in zip(names, parts, strict=True) if n == name]).any(0) for name in known}
    if node.kind == "pad" and node.name in survey.pads:
        before, behind = (len(ids) for ids in survey.pads[node.name])
        return {known[0]: own[before : len(own) - behind]}
    return {name: own for name in known if len(own) == len(everything[name])} or everything


def unit_rows(model: nn.Module, graph: Graph, units: Mapping[str, Tensor], norms: bool = True) -> Masks:
    """Masks of weight and bias of each layer, and of a BatchNorm that alone reads it, and of gates, without some units.

    Args:
        model: the model.
        graph: of the model.
        units: layer or gate -> bool [units], True = keep.
        norms: whether BatchNorm goes too, so that the unit gives 0 and not the constant that is made of 0.
    """
    named = dict(units)
    for node in graph.weighted():
        norm = _norm_behind(graph, node) if norms and node.module_name in units else None
        if norm is not None:
            named[norm.module_name] = units[node.module_name]
    masks = {}
    for module, keep in named.items():
        for name, tensor in maskable(model.get_submodule(module)).items():
            rows = keep.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape)
            masks[f"{module}.{name}" if module else name] = rows
    return Masks(masks)
