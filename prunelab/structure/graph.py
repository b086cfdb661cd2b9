"""What a model computes, as a graph of operations on channels; found by tracing, not by the names of classes.

Every value of the graph has channels along one axis. An operation either makes new channels (a weighted layer), passes
them on (activation, normalisation, pooling, flattening), or joins those of several values (addition, concatenation).
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.gates import Gate
from prunelab.structure.watch import StructureError as GraphError
from prunelab.structure.watch import evaluating

Kind = Literal[
    "input", "linear", "conv", "batchnorm", "elementwise", "pool", "mean", "flatten", "permute", "add", "mul", "cat",
    "slice", "pad", "gate", "constant", "output", "opaque",
]  # fmt: skip
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_POOLS = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
_PADS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ConstantPad3d)
FUNCTIONS: Mapping[Any, Kind] = {
    **dict.fromkeys((F.relu, torch.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.elu, F.selu, F.mish), "elementwise"),
    **dict.fromkeys((F.hardswish, F.hardsigmoid, F.hardtanh, torch.sigmoid, F.sigmoid, F.softplus), "elementwise"),
    **dict.fromkeys((torch.tanh, F.tanh, F.dropout, torch.clamp, operator.neg, torch.abs), "elementwise"),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), "pool"),
    **dict.fromkeys((torch.max_pool2d, torch._C._nn.avg_pool2d, F.interpolate), "pool"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, operator.sub, operator.isub, torch.sub), "add"),
    **dict.fromkeys((torch.maximum, torch.minimum), "add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, operator.truediv, torch.div), "mul"),
    **dict.fromkeys((torch.flatten, torch.reshape), "flatten"), **dict.fromkeys((torch.cat, torch.concat), "cat"),
    **dict.fromkeys((torch.permute, torch.transpose), "permute"), torch.mean: "mean",
    operator.getitem: "slice", F.pad: "pad",
}  # fmt: skip
METHODS: Mapping[str, Kind] = {
    **dict.fromkeys(("relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone", "abs", "neg"), "elementwise"),
    **dict.fromkeys(("flatten", "view", "reshape"), "flatten"), **dict.fromkeys(("permute", "transpose"), "permute"),
    **dict.fromkeys(("add", "add_", "sub", "sub_"), "add"), **dict.fromkeys(("mul", "mul_", "div"), "mul"),
    "mean": "mean",
}  # fmt: skip
IN_EVAL_NOTHING = ("stochastic_depth",)


class Name(str):
    """The name of a node among the arguments of a call, where any other string is itself."""


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
        args: of the call, with nodes as their ``Name``.
        kwargs: likewise.
        call: the function, where it is one.
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


class _Tracer(torch.fx.Tracer):
    """Goes into every module but torch's own, and gates."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Gate) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(torch.fx.Interpreter):
    """Runs a graph once and notes the shape of every value; what has none, or several, gets none."""

    def run_node(self, n: torch.fx.Node) -> Any:
        made = super().run_node(n)
        n.meta["shape"] = tuple(made.shape) if isinstance(made, Tensor) else None
        n.meta["numbers"] = isinstance(made, int | float | bool | torch.Size | torch.dtype | torch.device | None)
        return made


def traced(model: nn.Module) -> torch.fx.GraphModule:
    """The model in evaluation mode as a ``torch.fx.GraphModule`` that shares its layers; the model is not changed.

    It takes the first argument of the model's forward; any other has its default.

    Raises:
        GraphError: it cannot be traced.
    """
    try:
        options = list(inspect.signature(model.forward).parameters.items())[1:]
        plain = bool | int | float | str | None
        defaults = {name: option.default for name, option in options if isinstance(option.default, plain)}
        with evaluating(model):
            graph = _Tracer().trace(model, defaults or None)
        _drop_options(graph, {f"{name}_1" for name in defaults})
        return torch.fx.GraphModule(model, graph, type(model).__name__)
    except Exception as error:  # noqa: BLE001 - whatever the model's own code raises when it meets a proxy
        raise GraphError(
            f"{type(model).__name__} cannot be traced ({_line(error)}): its forward should not branch on values; "
            "wrap the part that does in a module of its own and leave it out"
        ) from None


def _drop_options(graph: torch.fx.Graph, options: set[str]) -> None:
    """Leave out arguments that have their defaults, and the assertions of torch.fx that they do."""
    found: list[torch.fx.Node] = []
    for node in graph.nodes:
        if (node.op == "placeholder" and node.target in options) or set(found) & set(node.all_input_nodes):
            found.append(node)
    for node in reversed(found):
        graph.erase_node(node)


def trace(model: nn.Module, example: Tensor) -> Graph:
    """The graph of a model in evaluation mode; the model is not changed.

    Args:
        model: any module that ``torch.fx`` can trace: its forward may not branch on values.
        example: one batch of inputs, of any batch size.

    Raises:
        GraphError: the model cannot be traced, or does not take the example.
    """
    if not isinstance(example, Tensor):
        raise GraphError(f"the example should be one batch of inputs, a tensor, not a {type(example).__name__}")
    whole = traced(model)
    try:
        with torch.no_grad(), evaluating(whole):
            _Shapes(whole).run(example.clone())  # a first layer may work in place
    except Exception as error:  # noqa: BLE001 - likewise
        raise GraphError(
            f"{type(model).__name__} takes no input of shape {tuple(example.shape)}: {_line(error)}"
        ) from None
    modules = dict(model.named_modules(remove_duplicate=False))
    return Graph({node.name: _node(node, modules) for node in whole.graph.nodes})


def _node(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> Node:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return Node(
        node.name,
        _kind(node, module),
        tuple(n.name for n in node.all_input_nodes),
        node.meta["shape"] or (),
        str(node.target) if module is not None else "",
        module,
        getattr(node.target, "__name__", str(node.target)),
        tuple(torch.fx.map_arg(node.args, lambda n: Name(n.name))),
        dict(torch.fx.map_arg(node.kwargs, lambda n: Name(n.name))),
        node.target if node.op == "call_function" else None,
    )


def _kind(node: torch.fx.Node, module: nn.Module | None) -> Kind:
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "get_attr" or node.meta["numbers"]:  # a size, say, which no value of a channel can change
        return "constant" if node.target != "item" else "opaque"
    if len(node.meta["shape"] or ()) < 2:
        return "opaque"
    if module is not None:
        return _module_kind(module)
    if node.op == "call_method":
        kind = METHODS.get(str(node.target), "opaque")
    else:
        kind = FUNCTIONS.get(node.target, "opaque")
        if getattr(node.target, "__name__", "") in IN_EVAL_NOTHING:
            kind = "elementwise"
    if (kind == "flatten" and not _flattens(node)) or (kind == "slice" and not _spatial(node)):
        return "opaque"
    if kind in ("add", "mul") and len(node.all_input_nodes) == 1:  # x + 1
        return "elementwise"
    return kind


def _module_kind(module: nn.Module) -> Kind:
    table: list[tuple[Any, Kind]] = [
        (nn.Linear, "linear"), (nn.Conv2d, "conv"), ((nn.BatchNorm1d, nn.BatchNorm2d), "batchnorm"),
        (_ACTIVATIONS, "elementwise"), (_POOLS, "pool"), (_PADS, "pad"), (nn.Flatten, "flatten"), (Gate, "gate"),
    ]  # fmt: skip
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return "elementwise"
    return next((name for kinds, name in table if isinstance(module, kinds)), "opaque")


def _flattens(node: torch.fx.Node) -> bool:
    """Whether it keeps the first axis and makes one of all others, whatever it is called."""
    before = node.all_input_nodes[0].meta["shape"] if node.all_input_nodes else None
    return bool(before) and node.meta["shape"] == (before[0], math.prod(before[1:]))


def _spatial(node: torch.fx.Node) -> bool:
    """Whether an index leaves samples and channels alone: ``x[:, :, ::2, ::2]``."""
    index = node.args[1] if len(node.args) > 1 else None
    return isinstance(index, tuple) and all(part == slice(None) for part in index[:2])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
