"""What layers are to a model: whose units are its outputs, and which BatchNorm scales the units of which layer.

Plain chains are read in their order, other models are traced. Where tracing fails, or a layer takes no part in what was
traced, the order in which modules were declared stands in for that in which they are called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from prunelab.masks import unit_axis
from prunelab.structure.collapse import in_order
from prunelab.structure.graph import FUNCTIONS, METHODS, GraphError, traced

_MIX = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "linear", "scaled_dot_product_attention"}
_MIX |= {f"conv{how}{axes}d" for how in ("", "_transpose") for axes in (1, 2, 3)}
_MOVE = ("slice", "permute", "pad")  # channels are others behind these, or elsewhere


@dataclass(frozen=True)
class _Roles:
    """What a trace tells, by name, so that it keeps no model alive."""

    outputs: tuple[str, ...]
    norms: tuple[tuple[str, str], ...]  # layer, and the BatchNorm that alone reads it


_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, _Roles]] = WeakKeyDictionary()


def outputs(model: nn.Module) -> set[nn.Module]:
    """The Linear layers and convolutions whose units reach what the model returns, with no weights in between.

    Of a model that cannot be traced, and of a plain chain, the last one by the order of its modules.
    """
    return {model.get_submodule(name) for name in _roles(model).outputs}


def norms_behind(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """Layer -> the BatchNorm that alone reads its units, perhaps behind activations or pooling, and reads nothing else.

    It scales them, so its scale says what they are worth, and with its shift it has to go when they go.
    """
    return {layer: norm for layer, norm in _roles(model).norms if layer in layers}


def _roles(model: nn.Module) -> _Roles:
    """Read once for as long as the model has the modules that it has: a trace takes longer than a choice of units."""
    modules = list(model.named_modules(remove_duplicate=False))
    structure = [(name, id(module), type(module), _shape(module)) for name, module in modules]
    if model not in _KNOWN or _KNOWN[model][0] != structure:
        nodes = _nodes(model)
        _KNOWN[model] = structure, _Roles(_outputs(model, nodes), _norms(model, nodes or []))
    return _KNOWN[model][1]


def _shape(module: nn.Module) -> torch.Size | None:
    weight = module._parameters.get("weight")
    return None if weight is None or is_lazy(weight) else weight.shape


def _outputs(model: nn.Module, nodes: list[torch.fx.Node] | None) -> tuple[str, ...]:
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in reversed(modules.items())}
    if nodes is None:
        return tuple(names[layer] for layer in _weighted(model)[-1:])
    found: list[str] = []
    seen, ahead = set(), [node for node in nodes if node.op == "output"]
    while ahead:
        node = ahead.pop()
        seen.add(node)
        module = modules[_owner(node)] if node.op != "output" else None
        called = (
            _weighted(module)
            if node.op == "call_module"
            else [module] * (module is not None and unit_axis(module) is not None)
        )
        found += [names[layer] for layer in called[-1:]]
        if not called and not _mixes(node, module):
            ahead += [source for source in node.all_input_nodes if source not in seen]
    return tuple(dict.fromkeys(found))


def _norms(model: nn.Module, nodes: list[torch.fx.Node]) -> tuple[tuple[str, str], ...]:
    modules = dict(model.named_modules())
    if not any(isinstance(module, _BatchNorm) for module in modules.values()):
        return ()
    layers = {name for name, module in modules.items() if unit_axis(module) is not None}
    read: dict[str, list[str]] = {}  # BatchNorm -> the layer in front of it, for every call
    for node in nodes:
        layer = _owner(node)
        leaves = layer in layers and any(_owner(reader) != layer for reader in node.users)
        if leaves and (norm := _norm(node, modules)):
            read.setdefault(norm, []).append(layer)
    calls = Counter(_owner(node) for node in nodes if node.op == "call_module")
    pairs = [(own[0], norm) for norm, own in read.items() if len(own) >= calls[norm] and len(set(own)) == 1]
    pairs += _declared(model, layers - {_owner(node) for node in nodes})
    found: dict[str, str] = {}
    for layer, norm in pairs:
        weight = modules[layer].weight
        if not is_lazy(weight) and modules[norm].num_features == weight.shape[unit_axis(modules[layer])]:
            found.setdefault(layer, norm)
    return tuple(found.items())


def _nodes(model: nn.Module) -> list[torch.fx.Node] | None:
    """What the model does; None where nobody knows, and of a plain chain, whose modules tell the same."""
    links = in_order(model)
    if links is not None and not any(list(module.children()) for _, module in links):
        return None
    try:
        return list(traced(model).graph.nodes)
    except GraphError:
        return None


def _owner(node: torch.fx.Node) -> str:
    """The innermost module that a node belongs to; torch's own are one node each."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def _weighted(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if unit_axis(inner) is not None]


def _has_weights(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of them is more than one number for each unit; of a lazy one nobody knows."""
    return any(is_lazy(parameter) or parameter.dim() > 1 for parameter in parameters)


def _mixes(node: torch.fx.Node, module: nn.Module | None) -> bool:
    """Whether weights make other units of those that go in."""
    if node.op == "call_module":
        return _has_weights(module.parameters())
    return getattr(node.target, "__name__", node.target) in _MIX


def _norm(node: torch.fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The BatchNorm that a value goes to, and nothing else does."""
    while node.users:
        reader, owners = next(iter(node.users)), {_owner(reader) for reader in node.users}
        if len(owners) == 1 and isinstance(modules[_owner(reader)], _BatchNorm):
            return _owner(reader)
        if len(node.users) > 1 or len(reader.all_input_nodes) > 1 or not _keeps(reader, modules):
            return None
        node = reader
    return None


def _keeps(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether every unit is still by itself behind a node that reads nothing else."""
    if node.op == "call_module":
        return not _has_weights(modules[_owner(node)].parameters())
    return (METHODS if node.op == "call_method" else FUNCTIONS).get(node.target, "slice") not in _MOVE


def _declared(model: nn.Module, layers: Set[str]) -> list[tuple[str, str]]:
    """Layer and BatchNorm, as modules were declared, with nothing in between that makes other units."""
    pairs: list[tuple[str, str]] = []
    layer: str | None = None
    for name, module in model.named_modules() if layers else ():
        if unit_axis(module) is not None:
            layer = name
        elif isinstance(module, _BatchNorm):
            pairs += [(layer, name)] if layer in layers else []
        elif _has_weights(module.parameters(recurse=False)):
            layer = None
    return pairs
