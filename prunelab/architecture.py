"""The structure of a model as JSON, and back, without pickle: layers with their arguments, and the calls between them.

A chain of known layers is written as such; any other model that can be traced as the graph of what it does in
evaluation mode. What is read is built from the lists below only, so a file cannot make anything else run.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from prunelab.errors import PrunelabError, nearest
from prunelab.gates import Gate
from prunelab.graph import FUNCTIONS, IN_EVAL_NOTHING, METHODS, GraphError, traced

_LAYERS = (
    nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Softmax,
    nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.ZeroPad2d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad2d, nn.ReplicationPad2d,
    Gate,
)  # fmt: skip
_BY_NAME = {kind.__name__: kind for kind in _LAYERS}
_MORE_METHODS = ("size", "dim", "chunk", "split", "squeeze", "unsqueeze", "softmax", "sum", "expand", "matmul")
_NO_ARGUMENT = ("device", "dtype", "inplace", "return_indices", "process_group", "init", "min_value", "max_value")
_PLAIN = (bool, int, float, str, type(None))


class ArchitectureError(PrunelabError):
    """A description of a model that this version cannot build."""


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What a model is made of, ready for JSON; None where it holds something that cannot be written down."""
    if (chain := _layer(model)) is not None:
        return chain
    try:
        graph = traced(model).graph
        nodes = [_written(node) for node in graph.nodes if node.op != "call_function" or not _is_nothing(node)]
    except (GraphError, _UnwritableError):
        return None
    layers, values = {}, {}
    for node in graph.nodes:
        if node.op == "call_module":
            layers[node.target] = _layer(model.get_submodule(node.target))
        elif node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(model)
            values[node.target] = [isinstance(tensor, nn.Parameter), list(tensor.shape), str(tensor.dtype)[6:]]
    if None in layers.values() or not all(values):
        return None
    names = {f"{place}.{name}" for place in layers for name in model.get_submodule(place).state_dict()} | set(values)
    return {"Graph": {"layers": layers, "values": values, "nodes": nodes}} if names == set(model.state_dict()) else None


def build(described: Mapping[str, Any]) -> nn.Module:
    """The model of a description; its weights are arbitrary.

    Raises:
        ArchitectureError: it names a layer, or a call, that this version does not know.
    """
    ((kind, content),) = described.items()
    if kind == "Sequential":
        made = nn.Sequential()
        for name, part in content:
            made.add_module(name, build(part))
        return made
    if kind == "Graph":
        return _graph(content)
    if kind not in _BY_NAME:
        raise ArchitectureError(
            f"the file describes a layer {kind!r} that this version does not know: {nearest(kind, _BY_NAME)}"
        )
    return _BY_NAME[kind](**{name: _tuple(value) for name, value in content.items()})


def _layer(model: nn.Module) -> dict[str, Any] | None:
    """A known layer with all that it was built from, or a chain of them."""
    if type(model) is nn.Sequential:
        parts = [(name, _layer(child)) for name, child in model._modules.items()]  # one that comes twice, too
        return None if any(part is None for _, part in parts) else {"Sequential": parts}
    if type(model) not in _LAYERS or any(value is None for value in _arguments(model).values()):
        return None
    return {type(model).__name__: {name: value for name, (value,) in _arguments(model).items()}}


def _arguments(layer: nn.Module) -> dict[str, tuple[Any] | None]:
    """Argument of its class -> its value in a tuple; None where that cannot be written."""
    found: dict[str, tuple[Any] | None] = {}
    for name, parameter in inspect.signature(type(layer)).parameters.items():
        if name == "inplace" and layer.inplace and not isinstance(layer, nn.Dropout | nn.Dropout2d):
            found[name] = (True,)
        if name in _NO_ARGUMENT or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name == "bias":
            value = layer.bias is not None
        elif name == "elementwise_affine" or (name == "affine" and not hasattr(layer, "affine")):
            value = layer.weight is not None
        else:
            value = getattr(layer, name, inspect.Parameter.empty)
        value = list(value) if isinstance(value, tuple) else value
        plain = all(isinstance(part, _PLAIN) for part in (value if isinstance(value, list) else [value]))
        found[name] = (value,) if plain else None
    return found


# -- calls ------------------------------------------------------------------------------------------------------------


class _UnwritableError(Exception):
    """A call or an argument that is not on the lists."""


@functools.cache
def _calls() -> dict[str, Any]:
    """Name in a file -> function."""
    homes = (("operator", operator), ("torch", torch), ("functional", F))
    names = {f"{prefix}.{name}": value for prefix, home in homes for name, value in vars(home).items()}
    more = (
        F.layer_norm,
        operator.floordiv,
        torch.softmax,
        F.softmax,
        torch.chunk,
        torch.split,
        torch.matmul,
        torch.sum,
    )
    known = (*FUNCTIONS, *more)
    return {name: value for name, value in names.items() if any(value is call for call in known)}


def _is_nothing(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in IN_EVAL_NOTHING


def _written(node: fx.Node) -> list[Any]:
    target = node.target
    if node.op == "call_function":
        known = {id(call): name for name, call in reversed(_calls().items())}
        shape = target is builtins.getattr and node.args[1] == "shape"
        if id(target) not in known and not shape:
            raise _UnwritableError
        target = "shape" if shape else known[id(target)]
    elif node.op == "call_method" and target not in (*METHODS, *_MORE_METHODS):
        raise _UnwritableError
    return [node.op, node.name, target, _plain(node.args), _plain(dict(node.kwargs))]


def _plain(value: Any) -> Any:
    """An argument as JSON; what JSON has no word for is an object with one key."""
    if isinstance(value, fx.Node):
        while value.op == "call_function" and _is_nothing(value):
            value = value.args[0]
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [_plain(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(part) for part in value]}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {"dict": {str(name): _plain(part) for name, part in value.items()}}
    if not isinstance(value, _PLAIN):
        raise _UnwritableError
    return value


def _graph(content: Mapping[str, Any]) -> nn.Module:
    root, graph, calls = nn.Module(), fx.Graph(), _calls()
    for place, part in content["layers"].items():
        home, name = _home(root, place)
        home.add_module(name, build(part))
    for place, (learned, shape, dtype) in content["values"].items():
        home, name = _home(root, place)
        empty = torch.zeros(shape, dtype=getattr(torch, dtype))
        if learned:
            home.register_parameter(name, nn.Parameter(empty))
        else:
            home.register_buffer(name, empty)
    made: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs in content["nodes"]:
        args, kwargs = _read(args, made), _read(kwargs, made)
        if op == "call_function" and target == "shape":
            target, args = builtins.getattr, (args[0], "shape")
        elif op == "call_function":
            if target not in calls:
                raise ArchitectureError(f"the file calls {target!r}, which this version does not know")
            target = calls[target]
        elif op == "call_method" and target not in (*METHODS, *_MORE_METHODS):
            raise ArchitectureError(f"the file calls the method {target!r}, which this version does not know")
        elif op not in ("placeholder", "call_module", "call_method", "get_attr", "output"):
            raise ArchitectureError(f"the file has an operation {op!r}, which this version does not know")
        made[name] = graph.create_node(op, target, args, kwargs, name)
    return fx.GraphModule(root, graph)


def _home(root: nn.Module, place: str) -> tuple[nn.Module, str]:
    """The module that holds what has this name, made where it is not there, and the last part of the name."""
    *path, name = place.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    return root, name


def _read(value: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(part, made) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "dict":
        return {name: _read(part, made) for name, part in content.items()}
    parts = [_read(part, made) for part in content]
    return slice(*parts) if kind == "slice" else tuple(parts)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
