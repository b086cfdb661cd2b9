"""Which channels of a traced model go together, which are constant, and which of them anything that matters reads.

Every channel of every value has a number; an addition, or a depthwise convolution, makes two channels one. So a set of
numbers stands for channels that stay or go together: a unit. What is read follows from the weights alone, from the
output backwards, until nothing changes. ``shrink`` removes the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.masks import maskable
from prunelab.structure.graph import Graph, Name, Node


@dataclass
class Value:
    """What is known of one value.

    Attributes:
        ids: number of each channel, int64.
        axis: of the channels.
        constant: of each channel, the same at every place and for every sample, float64; NaN where it varies.
    """

    ids: Tensor
    axis: int
    constant: Tensor


class _Sets:
    """Numbers that are made equal one by one (union-find)."""

    def __init__(self) -> None:
        self.parent: list[int] = []

    def fresh(self, count: int) -> Tensor:
        first = len(self.parent)
        self.parent += range(first, first + count)
        return torch.arange(first, first + count)

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, a: Tensor, b: Tensor) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            self.parent[self.find(i)] = self.find(j)


class Survey:
    """One pass forward over the graph: numbers and constants. Then, from the end backwards, what is needed.

    Args:
        model: any module; it is not changed.
        masks: parameter name -> 0/1 tensor; a parameter without one counts as it is.
        graph: of the model.

    Attributes:
        values: node name -> what is known of its value.
        root: number -> the number that stands for its unit.
        shared: modules that are used, or whose parameters are used, more than once; they are left as they are.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], graph: Graph) -> None:
        self.graph, self._sets = graph, _Sets()
        self.values: dict[str, Value] = {}
        self._fixed: dict[int, str] = {}  # number -> why its unit stays whatever the weights are
        self._unknown: set[str] = set()
        self._read: dict[str, Tensor] = {}  # weighted layer -> which rows read which columns, bool
        self.pads: dict[str, tuple[Tensor, Tensor]] = {}  # node that adds channels of zeros -> those before and behind
        self._known, masked, owners = {}, {}, {}
        names = maskable(model)
        for name, parameter in names.items():
            self._known[name] = parameter.detach()
            owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
            if name in masks:
                masked[id(parameter)] = masks[name]
        self._masks = {name: masked[id(p)] for name, p in names.items() if id(p) in masked}
        uses = [node.module_name for node in graph if node.module_name]
        self.shared = {name for name in uses if uses.count(name) > 1}
        self.shared |= {module for modules in owners.values() if len(modules) > 1 for module in modules}
        self.shared |= {n.module_name for n in graph.weighted() if "weight" not in n.module._parameters}
        for node in graph:
            self._visit(node)
        self._keep_what_leads_nowhere()
        self.root = torch.tensor([self._sets.find(i) for i in range(len(self._sets.parent))], dtype=torch.long)

    def parameter(self, module: str, name: str) -> Tensor | None:
        """A parameter, or what a gate lets through, with its pruned entries at 0, on the CPU; None: there is none."""
        full = f"{module}.{name}" if module else name
        if full not in self._known:
            return None
        value = self._known[full]
        return (value * self._masks[full].to(value) if full in self._masks else value).cpu()

    # -- forward ------------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        inputs = [self.values[name] for name in node.inputs if name in self.values]
        if node.kind == "output":
            for value in inputs:
                self._fix(value, "it is an output of the model")
        elif node.kind == "input" and len(node.shape) > 1:
            self.values[node.name] = self._new(node, 1)
            self._fix(self.values[node.name], "it is an input of the model")
        elif node.kind not in ("constant", "input"):
            make = None if node.kind == "opaque" else getattr(self, f"_{node.kind}")
            known = inputs and len(inputs) == len(node.inputs) - sum(
                self.graph[name].kind == "constant" and not self.graph[name].shape for name in node.inputs
            )
            value = make(node, inputs) if make and known else None
            if value is None:
                self._mixed(node, inputs)
            else:
                self.values[node.name] = value

    def _new(self, node: Node, axis: int) -> Value:
        count = node.shape[axis]
        return Value(self._sets.fresh(count), axis, torch.full((count,), math.nan, dtype=torch.float64))

    def _fix(self, value: Value, why: str) -> None:
        for number in value.ids.tolist():
            self._fixed.setdefault(number, why)

    def _keep_what_leads_nowhere(self) -> None:
        """A last layer whose outputs are thrown away, as those of an auxiliary head in evaluation mode, stays whole."""
        leads: set[str] = set()
        for node in reversed(list(self.graph)):
            if node.kind in ("linear", "conv") and node.name not in leads:
                self._fix(self.values[node.name], "no output of the model depends on it")
            elif node.kind != "output" and node.name not in leads:
                continue
            leads.update(node.inputs)

    def _mixed(self, node: Node, inputs: list[Value]) -> None:
        """What is not understood: all that it reads, and all that it makes, stays."""
        self._unknown.add(node.name)
        for value in inputs:
            self._fix(value, f"{node.where} mixes channels in a way that is not understood")
        if len(node.shape) > 1:
            same = bool(inputs) and self.graph[node.inputs[0]].shape == node.shape
            made = self._new(node, inputs[0].axis if same else 1)  # LayerNorm leaves every axis where it is
            why = f"{node.where} made it"
            if node.kind in ("linear", "conv"):
                made = self._rows(node)
            if node.module_name in self.shared:
                why = f"{node.where} is used more than once, or its weight is, or that is computed"
            self._fix(made, why)
            self.values[node.name] = made

    def _linear(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,) = inputs
        if node.module_name in self.shared:
            return None
        if value.axis == len(node.shape) - 1:
            return self._rows(node, value.constant)
        self._fix(value, f"{node.where} works on another axis")  # of tokens, say: [N, tokens, features]
        return self._rows(node)

    def _conv(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,), layer = inputs, node.module
        if value.axis != 1 or len(node.shape) != 4 or node.module_name in self.shared:  # 3: one sample, no batch
            return None
        exact = (value.constant == 0) | (not padded(layer))
        if passes_on(layer):
            weight = self.parameter(node.module_name, "weight")
            total, reads = weight.double().sum((1, 2, 3)), weight.flatten(1).any(1)
            level = torch.where(reads, total * value.constant, torch.zeros_like(total)) + self._bias(node)
            return Value(value.ids, 1, torch.where(~reads | exact, level, torch.full_like(level, math.nan)))
        return self._rows(node, value.constant, exact)

    def _bias(self, node: Node) -> Tensor:
        bias = self.parameter(node.module_name, "bias")
        return torch.zeros(len(node.module.weight), dtype=torch.float64) if bias is None else bias.double()

    def _rows(self, node: Node, constant: Tensor | None = None, exact: Tensor | None = None) -> Value:
        """What a layer makes: channels of its own.

        A row is constant unless it reads anything that varies, or a constant that is not exact there.

        Args:
            node: of the layer.
            constant: of each channel that it reads; None: its inputs are no channels, and all of them vary.
            exact: of each, whether it is the same at the border too; None: all are.
        """
        made = self._new(node, len(node.shape) - (3 if node.kind == "conv" else 1))
        weight = self.parameter(node.module_name, "weight")
        if weight is None:  # computed
            return made
        read = _whole((weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0, node.module)
        if constant is None:
            constant = torch.full((read.shape[1],), math.nan, dtype=torch.float64)
        else:
            self._read[node.name] = read
        varies = read & (constant.isnan() if exact is None else constant.isnan() | ~exact)
        level = self._bias(node) + self.effect(node, ~constant.isnan() & (constant != 0), constant)
        made.constant = torch.where(varies.any(1), torch.full_like(level, math.nan), level)
        return made

    def effect(self, node: Node, columns: Tensor, constant: Tensor) -> Tensor:
        """What some inputs, each constant, add to each row of a layer, float64 [rows]."""
        if not bool(columns.any()):
            return torch.zeros(len(node.module.weight), dtype=torch.float64)
        weight = self.parameter(node.module_name, "weight")
        if getattr(node.module, "groups", 1) > 1:
            weight = _whole(weight.double().flatten(2).sum(2), node.module)
        part = weight[:, columns].double()
        return (part.flatten(2).sum(2) if part.dim() > 2 else part) @ constant[columns]

    def _batchnorm(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,), norm = inputs, node.module
        if value.axis != 1 or norm.running_mean is None or node.module_name in self.shared:
            return None
        scale = (norm.running_var.cpu().double() + norm.eps).rsqrt()
        level = (value.constant - norm.running_mean.cpu().double()) * scale
        if norm.affine:
            gamma, beta = (self.parameter(node.module_name, name).double() for name in ("weight", "bias"))
            level = torch.where(gamma == 0, beta, level * gamma + beta)
        return Value(value.ids, 1, level)

    def _gate(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,) = inputs
        if value.axis != 1 or node.module_name in self.shared:
            return None
        let_through = self.parameter(node.module_name, "open").double()
        return Value(value.ids, 1, torch.where(let_through == 0, torch.zeros_like(value.constant), value.constant))

    def _elementwise(self, node: Node, inputs: list[Value]) -> Value | None:
        if len(node.inputs) > 1:
            return None
        (value,) = inputs
        return Value(value.ids, value.axis, _applied(node, {node.inputs[0]: value.constant}))

    def _pool(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,) = inputs
        if value.axis != 1 or len(node.shape) < 4:
            return None
        return Value(value.ids, 1, torch.where((value.constant == 0) | (not borders(node)), value.constant, math.nan))

    def _mean(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,), rank = inputs, len(self.graph[node.inputs[0]].shape)
        axes = [axis % rank for axis in numbers(argument(node, "dim", 1))]
        if not axes or value.axis in axes or 0 in axes:
            return None
        gone = sum(axis < value.axis for axis in axes) if len(node.shape) < rank else 0
        return Value(value.ids, value.axis - gone, value.constant)

    def _flatten(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,), before = inputs, self.graph[node.inputs[0]].shape
        if value.axis == 0 or len(node.shape) != 2 or node.shape[1] != math.prod(before[1:]):
            return None
        each, times = math.prod(before[value.axis + 1 :]), math.prod(before[1 : value.axis])
        ids, constant = (part.repeat_interleave(each).repeat(times) for part in (value.ids, value.constant))
        return Value(ids, 1, constant)

    def _permute(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,), rest = inputs, node.args[1:]
        if not rest or any(isinstance(axis, str) for axis in rest):
            return None
        order = numbers(rest[0]) if len(rest) == 1 else list(rest)
        if node.target == "transpose":
            if len(order) != 2:
                return None
            swap = {order[0] % len(node.shape): order[1], order[1] % len(node.shape): order[0]}
            order = [swap.get(axis, axis) for axis in range(len(node.shape))]
        order = [axis % len(node.shape) for axis in order]
        return Value(value.ids, order.index(value.axis), value.constant) if value.axis in order else None

    def _slice(self, node: Node, inputs: list[Value]) -> Value | None:
        (value,) = inputs
        return Value(value.ids, 1, value.constant) if value.axis == 1 else None

    def _pad(self, node: Node, inputs: list[Value]) -> Value | None:
        """Zeros as further channels (option A of ResNets); padding of maps makes a constant other than 0 vary."""
        (value,), amounts = inputs, numbers(argument(node, "padding" if node.module else "pad", 1))
        mode, fill = (
            (None, node.module.value) if node.module else (argument(node, "mode", 2), argument(node, "value", 3))
        )
        if value.axis != 1 or mode not in (None, "constant") or (fill or 0.0) != 0.0 or len(node.shape) != 4:
            return None
        if node.module_name in self.shared:
            return None
        channels = [*amounts[4:6], 0, 0][:2]
        if min([*channels, 0]) < 0 or any(amounts[6:]) or not all(isinstance(number, int) for number in amounts):
            return None
        constant = value.constant
        if any(amounts[:4]):
            constant = torch.where(constant == 0, constant, math.nan)
        before, behind = (self._sets.fresh(n) for n in channels)
        if any(channels):
            self.pads[node.name] = (before, behind)
        zeros = [torch.zeros(n, dtype=torch.float64) for n in channels]
        return Value(torch.cat([before, value.ids, behind]), 1, torch.cat([zeros[0], constant, zeros[1]]))

    def _cat(self, node: Node, inputs: list[Value]) -> Value | None:
        axis = argument(node, "dim", 1)
        axis = (0 if axis is None else axis) % len(node.shape)
        names = argument(node, "tensors", 0)
        parts = [self.values[name] for name in names if name in self.values]
        if any(part.axis != axis for part in parts) or len(parts) != len(names):
            return None
        return Value(torch.cat([p.ids for p in parts]), axis, torch.cat([p.constant for p in parts]))

    def _add(self, node: Node, inputs: list[Value]) -> Value | None:
        if not self._join(node, inputs):
            return None
        a, b = inputs
        both = _applied(node, {name: value.constant for name, value in zip(node.inputs, inputs, strict=True)})
        return Value(b.ids, a.axis, both)

    def _mul(self, node: Node, inputs: list[Value]) -> Value | None:
        """Gates (squeeze and excitation): both sides have the same channels; a side that is 0 makes 0."""
        made = self._add(node, inputs)
        if made is not None and node.target in ("mul", "imul", "mul_"):
            nothing = (inputs[0].constant == 0) | (inputs[1].constant == 0)
            made.constant = torch.where(nothing, torch.zeros_like(made.constant), made.constant)
        return made

    def _join(self, node: Node, inputs: list[Value]) -> bool:
        if len(inputs) != 2 or len({(len(v.ids), v.axis) for v in inputs}) > 1:
            return False
        if len({len(self.graph[name].shape) for name in node.inputs}) > 1:
            return False
        self._sets.join(inputs[0].ids, inputs[1].ids)
        return True

    # -- backward -----------------------------------------------------------------------------------------------------

    def of(self, units: Tensor, value: Value) -> Tensor:
        """For the channels of a value, what is said of their units."""
        return units[self.root[value.ids]]

    def needed(self) -> tuple[Tensor, dict[int, str]]:
        """Per unit (at its ``root``) whether it has to stay, bool; and for those that stay whatever is read, why."""
        stays, why = torch.zeros(len(self.root), dtype=torch.bool), {}
        for number, reason in self._fixed.items():
            stays[self.root[number]] = True
            why.setdefault(int(self.root[number]), reason)
        readers = [node for node in self.graph.weighted() if self.makes(node)]
        before = -1
        while before != (before := int(stays.sum())):
            for node in reversed(readers):
                value = self.values[node.inputs[0]]
                wanted = self._read[node.name][self.of(stays, self.values[node.name])].any(0)
                varies, place = value.constant.isnan(), self.takes_constant(node) is not None
                folds = (value.constant == 0) | (place and not padded(node.module))
                stays[self.root[value.ids[wanted & varies]]] = True
                stuck = (
                    "pads its input with zeros" if place else "has no bias, nor BatchNorm behind it, to fold it into"
                )
                for number in self.root[value.ids[wanted & ~varies & ~folds]].tolist():
                    if not stays[number]:
                        why[number] = f"constant but not 0, and {node.where} {stuck}"
                    stays[number] = True
        return stays, why

    def vocal(self) -> Tensor:
        """Per unit (at its ``root``) whether it may ever be anything but 0, or has to stay for another reason; bool."""
        stays = torch.zeros(len(self.root), dtype=torch.bool)
        stays[self.root[list(self._fixed)]] = True
        for value in self.values.values():
            stays[self.root[value.ids[value.constant != 0]]] = True  # what varies is NaN, which is not 0
        return stays

    def filled(self, live: Tensor, multiple: int) -> Tensor:
        """The units that stay: those that live, and dead ones where a width has to be a multiple, or groups equal."""
        stays = live.clone()
        before = -1
        while before != (before := int(stays.sum())):
            for node in self.graph.weighted():
                if not self.understood(node):
                    continue
                roots = self.root[self.values[node.name].ids]
                if getattr(node.module, "groups", 1) > 1 and not passes_on(node.module):
                    sides = [self.root[self.values[node.inputs[0]].ids], roots]
                    sides = [side.view(node.module.groups, -1) for side in sides]
                    alive = torch.stack([stays[side].any(1) for side in sides]).any(0)
                    for side in sides:
                        width = int(stays[side][alive].sum(1).max()) if bool(alive.any()) else 0
                        for group in side[alive]:
                            _fill(stays, group, max(width, 1))
                elif bool((~stays[roots]).any()):
                    _fill(stays, roots, math.ceil(int(stays[roots].sum()) / multiple) * multiple)
        return stays

    def takes_constant(self, node: Node) -> list[tuple[str, int]] | None:
        """Where what a layer adds to each row can go; [] is its own bias.

        Without a bias it goes into the means of every BatchNorm that reads the rows, also through pooling and
        concatenation: (name of the BatchNorm, place of the first row in it). None: nowhere.
        """
        return [] if node.module.bias is not None else self._norms(node.name, 0)

    def _norms(self, name: str, offset: int) -> list[tuple[str, int]] | None:
        found: list[tuple[str, int]] = []
        for node in self.graph.consumers(name):
            if not self.understood(node):
                return None
            if node.kind == "batchnorm":
                found.append((node.module_name, offset))
                continue
            parts = argument(node, "tensors", 0) if node.kind == "cat" else [name]
            nothing = isinstance(node.module, nn.Identity | nn.Dropout | nn.Dropout2d) or node.kind == "slice"
            if not (node.kind == "cat" or nothing or (node.kind == "pool" and not borders(node))):
                return None
            starts = [sum(len(self.values[p].ids) for p in parts[:i]) for i, part in enumerate(parts) if part == name]
            for start in starts:
                further = self._norms(node.name, offset + start)
                if further is None:
                    return None
                found += further
        return found or None

    def understood(self, node: Node) -> bool:
        """Whether it is known what it does with its channels."""
        return node.name in self.values and node.name not in self._unknown

    def makes(self, node: Node) -> bool:
        """Whether this layer reads its input and makes channels of its own, in a way that is understood."""
        return node.name in self._read and self.understood(node)


def _fill(stays: Tensor, roots: Tensor, width: int) -> None:
    """Let dead units stay, the first ones, until so many channels do."""
    for number in roots.tolist():
        if int(stays[roots].sum()) >= width:
            return
        stays[number] = True


def _whole(part: Tensor, layer: nn.Module) -> Tensor:
    """[rows, inputs of a group] -> [rows, all inputs], zero where a row does not look."""
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return part
    rows, inputs = part.shape
    made = part.new_zeros(groups, rows // groups, groups, inputs)
    each = torch.arange(groups)
    made[each, :, each] = part.view(groups, rows // groups, inputs)
    return made.view(rows, groups * inputs)


def passes_on(layer: nn.Module) -> bool:
    """Whether a layer is a depthwise convolution: its channels are those of its input."""
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels


def padded(layer: nn.Module) -> bool:
    """Whether zeros come in at the border."""
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        return False
    return layer.padding == "same" or (layer.padding != "valid" and any(numbers(layer.padding)))


def borders(node: Node) -> bool:
    """Whether a pooling makes something else of a constant: it averages over zeros at the border, or only sums."""
    name = type(node.module).__name__ if node.module else node.target
    padding, divisor = numbers(argument(node, "padding", 3)), argument(node, "divisor_override", 6)
    return "avg" in name.lower() and (any(padding) or bool(divisor))


def numbers(value: Any) -> list[Any]:
    """One number, several, or None, as a list."""
    return [] if value is None else [value] if isinstance(value, int | float) else list(value)


def argument(node: Node, name: str, position: int) -> Any:
    """An argument of a call, or the attribute of that name of a module."""
    if node.module is not None:
        return getattr(node.module, name, None)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else None


def _applied(node: Node, constants: Mapping[str, Tensor]) -> Tensor:
    """A function of single numbers on the constants; NaN stays NaN, since what varies still varies."""
    varies = torch.stack(list(constants.values())).isnan().any(0)
    level = {name: constant.nan_to_num().view(1, -1) for name, constant in constants.items()}
    if node.module is not None:
        made = copy.deepcopy(node.module).eval().double()(*level.values())
    else:
        arguments = [level[a] if isinstance(a, Name) else a for a in node.args]
        options = {
            k: False if k == "inplace" else level[v] if isinstance(v, Name) else v for k, v in node.kwargs.items()
        }
        call = node.call if node.call is not None else getattr(torch.Tensor, node.target)
        made = call(*arguments, **options)
    return torch.where(varies, math.nan, made.flatten())
