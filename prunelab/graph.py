"""What a model computes, as a graph of operations on channels; found by tracing, not by the names of classes.

Every value of the graph has channels along one axis. An operation either makes new channels (a weighted layer), passes
them on (activation, normalisation, pooling, flattening), or joins those of several values (addition, concatenation).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

from prunelab.errors import PrunelabError

Kind = Literal[
    "input", "linear", "conv", "batchnorm", "elementwise", "pool", "mean", "flatten", "permute", "add", "mul", "cat",
    "slice", "pad", "constant", "output", "opaque",
]  # fmt: skip
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_FUNCTIONS: Mapping[Any, Kind] = {
    **dict.fromkeys((F.relu, torch.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.elu), "elementwise"),
    **dict.fromkeys((F.hardswish, F.hardsigmoid, torch.sigmoid, F.sigmoid), "elementwise"),
    **dict.fromkeys((torch.tanh, F.tanh, F.dropout), "elementwise"),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), "pool"),
    **dict.fromkeys((torch.max_pool2d, torch._C._nn.avg_pool2d), "pool"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), "add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), "mul"),
    torch.cat: "cat", torch.concat: "cat", torch.flatten: "flatten", torch.permute: "permute", torch.mean: "mean",
    operator.getitem: "slice", F.pad: "pad",
}  # fmt: skip
_METHODS: Mapping[str, Kind] = {
    "relu": "elementwise", "relu_": "elementwise", "sigmoid": "elementwise", "tanh": "elementwise",
    "contiguous": "elementwise", "clone": "elementwise", "flatten": "flatten", "view": "flatten", "reshape": "flatten",
    "permute": "permute", "mean": "mean", "add": "add", "add_": "add", "mul": "mul", "mul_": "mul",
}  # fmt: skip
_IN_EVAL_NOTHING = ("stochastic_depth",)


class GraphError(PrunelabError):
    """A model that cannot be traced, or an operation in it that is not understood."""


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        name: unique in the graph.
        kind: what it does with channels; ``opaque``: not understood.
        inputs: names of the nodes it reads.
        shape: of its value for the example; () where it is no tensor.
        module_name: of the module that does it, ``""`` for a function.
        module: that module.
        target: what is called, for messages.
        args: of the call, with nodes as their names.
        kwargs: likewise.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    module_name: str = ""
    module: nn.Module | None = None
    target: str = ""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    call: Any = None

    @property
    def where(self) -> str:
        """For messages: the module, or the function."""
        return f"module {self.module_name!r} ({type(self.module).__name__})" if self.module else f"{self.target!r}"


@dataclass(frozen=True)
class Graph:
    """The operations of a model in the order in which they happen."""

    nodes: Mapping[str, Node]

    def __iter__(self) -> Any:
        return iter(self.nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def weighted(self) -> list[Node]:
        """The Linear and Conv2d layers."""
        return [node for node in self if node.kind in ("linear", "conv")]

    def consumers(self, name: str) -> list[Node]:
        """The nodes that read a value."""
        return [node for node in self if name in node.inputs]


def trace(model: nn.Module, example: Tensor) -> Graph:
    """The graph of a model in evaluation mode; the model is not changed.

    Args:
        model: any module that ``torch.fx`` can trace: its forward may not branch on values.
        example: one batch of inputs, of any batch size.

    Raises:
        GraphError: the model cannot be traced, or does not take the example.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception as error:  # noqa: BLE001 - whatever the model's own code raises when it meets a proxy
        raise GraphError(
            f"{type(model).__name__} cannot be traced ({_line(error)}): its forward should not branch on values; "
            "wrap the part that does in a module of its own and leave it out"
        ) from None
    finally:
        for module, mode in training.items():
            module.training = mode
    was = {module: module.training for module in traced.modules()}
    try:
        traced.eval()
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    except Exception as error:  # noqa: BLE001 - likewise
        raise GraphError(
            f"{type(model).__name__} takes no input of shape {tuple(example.shape)}: {_line(error)}"
        ) from None
    finally:
        for module, mode in was.items():
            module.training = mode
    modules = dict(model.named_modules())
    return Graph({node.name: _node(node, modules) for node in traced.graph.nodes})


def _node(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> Node:
    meta = node.meta.get("tensor_meta")
    shape = tuple(meta.shape) if hasattr(meta, "shape") else ()
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    names = {
        "args": torch.fx.map_arg(node.args, lambda n: n.name),
        "kwargs": torch.fx.map_arg(node.kwargs, lambda n: n.name),
    }
    what = getattr(node.target, "__name__", str(node.target))
    return Node(
        node.name,
        _kind(node, module, shape),
        tuple(n.name for n in node.all_input_nodes),
        shape,
        str(node.target) if module is not None else "",
        module,
        what,
        tuple(names["args"]),
        dict(names["kwargs"]),
        node.target if node.op == "call_function" else None,
    )


def _kind(node: torch.fx.Node, module: nn.Module | None, shape: tuple[int, ...]) -> Kind:
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "get_attr" or not shape:
        return "constant"
    if module is not None:
        return _module_kind(module)
    if node.op == "call_method":
        kind = _METHODS.get(str(node.target), "opaque")
    else:
        kind = _FUNCTIONS.get(node.target, "opaque")
        if getattr(node.target, "__name__", "") in _IN_EVAL_NOTHING:
            kind = "elementwise"
    if kind == "flatten" and not _flattens(node, shape):
        return "opaque"
    if kind == "slice" and not _spatial(node):
        return "opaque"
    return kind


def _module_kind(module: nn.Module) -> Kind:
    table: list[tuple[Any, Kind]] = [
        (nn.Linear, "linear"), (nn.Conv2d, "conv"), ((nn.BatchNorm1d, nn.BatchNorm2d), "batchnorm"),
        (_ACTIVATIONS, "elementwise"), (_POOLS, "pool"), (nn.Flatten, "flatten"),
    ]  # fmt: skip
    for kinds, name in table:
        if isinstance(module, kinds):
            return name
    return "opaque"


def _flattens(node: torch.fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether it keeps the first axis and makes one of all others, whatever it is called."""
    before = node.all_input_nodes[0].meta.get("tensor_meta") if node.all_input_nodes else None
    return (
        hasattr(before, "shape")
        and len(shape) == 2
        and shape[0] == before.shape[0]
        and shape[1] == math.prod(before.shape[1:])
    )


def _spatial(node: torch.fx.Node) -> bool:
    """Whether an index leaves samples and channels alone: ``x[:, :, ::2, ::2]``."""
    index = node.args[1] if len(node.args) > 1 else None
    return isinstance(index, tuple) and all(part == slice(None) for part in index[:2])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
