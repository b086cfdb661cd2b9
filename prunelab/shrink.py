"""Removing dead units from any traced model: through normalisation, skips, concatenation and depthwise convolutions.

Every channel of every value has a number; an addition, or a depthwise convolution, makes two channels one. So a number
stands for a set of channels that stay or go together: a unit. A unit can go when nobody that matters reads it, or when
all that is read of it is constant and can be folded into the next biases. What is read follows from the weights alone,
from the output backwards, until nothing changes.

Where a constant cannot be folded exactly (zeros come in at the border of a padded convolution, or the reader has no
bias), and where an operation mixes channels in a way that is not understood, the unit stays, and the result says why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.chains import ShrinkError, chain, compact, cut
from prunelab.graph import Graph, Node, trace
from prunelab.masks import Masks

TOLERANCE = 1e-5  # of the outputs before and after, relative to their largest


@dataclass(frozen=True)
class Cut:
    """A smaller model and how it lies inside the one it came from.

    Attributes:
        model: the new module, of the same structure and with the same parameter names; the old one is untouched.
        index: parameter or buffer -> for each axis the positions kept, int64; only those that were cut.
        units: weighted layer -> positions of its units that are left, int64.
        stayed: weighted layer -> why units of it that are dead could not go.
    """

    model: nn.Module
    index: dict[str, tuple[Tensor, ...]]
    units: dict[str, Tensor]
    stayed: dict[str, str] = field(default_factory=dict)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Bring a mask, a moment or anything else of the old shape of a parameter to its new shape."""
        return cut(tensor, self.index[name]) if name in self.index else tensor


@dataclass
class _Value:
    """What is known of one value: the number of each channel, and its constant (NaN where it varies)."""

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

    def roots(self, ids: Tensor) -> Tensor:
        return torch.tensor([self.find(i) for i in ids.tolist()], dtype=torch.long)


class _Survey:
    """One pass forward over the graph: numbers and constants; then what is needed, from the end backwards."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], graph: Graph) -> None:
        self.graph, self.sets = graph, _Sets()
        self.values: dict[str, _Value] = {}
        self.fixed: dict[int, str] = {}  # number -> why its unit stays whatever the weights are
        known = dict(model.named_parameters())
        self.weight = {
            name: (p.detach() * masks[name].to(p) if name in masks else p.detach()).cpu() for name, p in known.items()
        }
        self.read: dict[str, Tensor] = {}  # weighted layer -> which rows read which columns, bool
        self.sum: dict[str, Tensor] = {}  # likewise, weights summed over the kernel, float64
        uses: dict[str, int] = {}
        for node in graph:
            if node.module_name:
                uses[node.module_name] = uses.get(node.module_name, 0) + 1
        self.shared = {name for name, count in uses.items() if count > 1}
        for node in graph:
            self._visit(node)

    # -- forward ------------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        inputs = [self.values[name] for name in node.inputs if name in self.values]
        if node.kind == "output":
            for value in inputs:
                self._fix(value, "it is an output of the model")
            return
        if node.kind == "constant" or len(node.shape) < 2:
            return
        if node.kind == "input":
            self.values[node.name] = self._new(node, 1)
            self._fix(self.values[node.name], "it is an input of the model")
            return
        make = getattr(self, f"_{node.kind}", None)
        value = make(node, inputs) if make and inputs else None
        self.values[node.name] = value if value is not None else self._opaque(node, inputs)

    def _new(self, node: Node, axis: int) -> _Value:
        count = node.shape[axis]
        return _Value(self.sets.fresh(count), axis, torch.full((count,), math.nan, dtype=torch.float64))

    def _fix(self, value: _Value, why: str) -> None:
        self.fixed |= {int(i): self.fixed.get(int(i), why) for i in value.ids}

    def _opaque(self, node: Node, inputs: list[_Value]) -> _Value:
        for value in inputs:
            self._fix(value, f"{node.where} mixes channels in a way that is not understood")
        same = bool(inputs) and self.graph[node.inputs[0]].shape == node.shape
        made = self._new(node, inputs[0].axis if same else 1)  # LayerNorm leaves every axis where it is
        self._fix(made, f"{node.where} made it")
        return made

    def _linear(self, node: Node, inputs: list[_Value]) -> _Value | None:
        (value,) = inputs
        if value.axis != len(node.shape) - 1 or node.module_name in self.shared:
            return None
        made = self._new(node, len(node.shape) - 1)
        made.constant = self._rows_constant(node, value.constant, torch.ones(len(value.ids), dtype=torch.bool))
        return made

    def _conv(self, node: Node, inputs: list[_Value]) -> _Value | None:
        (value,), layer = inputs, node.module
        if value.axis != 1 or node.module_name in self.shared:
            return None
        exact = (value.constant == 0) | (not _padded(layer))
        if layer.groups == 1:
            made = self._new(node, 1)
            made.constant = self._rows_constant(node, value.constant, exact)
            return made
        if layer.groups == layer.in_channels == layer.out_channels:  # depthwise: its channels are those of its input
            weight = self.weight[f"{node.module_name}.weight"]
            total, reads = weight.double().sum((1, 2, 3)), weight.flatten(1).any(1)
            level = torch.where(reads, total * value.constant, torch.zeros_like(total)) + self._bias(node)
            return _Value(value.ids, 1, torch.where(~reads | exact, level, torch.full_like(level, math.nan)))
        return None

    def _bias(self, node: Node) -> Tensor:
        bias = self.weight.get(f"{node.module_name}.bias")
        return torch.zeros(node.module.weight.shape[0], dtype=torch.float64) if bias is None else bias.double()

    def _rows_constant(self, node: Node, constant: Tensor, exact: Tensor) -> Tensor:
        """The constant of each row; NaN where it reads anything that varies, or a constant that is not exact there."""
        weight = self.weight[f"{node.module_name}.weight"]
        self.read[node.name] = read = weight.flatten(2).any(2) if weight.dim() > 2 else weight != 0
        varies = (read & (constant.isnan() | ~exact)).any(1)
        level = self._bias(node)
        if bool((known := constant.nan_to_num()).any()):
            self.sum[node.name] = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
            level = level + self.sum[node.name] @ known
        return torch.where(varies, torch.full_like(level, math.nan), level)

    def _batchnorm(self, node: Node, inputs: list[_Value]) -> _Value | None:
        (value,), norm = inputs, node.module
        if value.axis != 1 or norm.running_mean is None or node.module_name in self.shared:
            return None
        scale = (norm.running_var.cpu().double() + norm.eps).rsqrt()
        shift = -norm.running_mean.cpu().double() * scale
        if norm.affine:
            gamma, beta = (self.weight[f"{node.module_name}.{name}"].double() for name in ("weight", "bias"))
            dead = gamma == 0
            level = torch.where(dead, beta, (value.constant * scale + shift) * gamma + beta)
            return _Value(value.ids, 1, level)
        return _Value(value.ids, 1, value.constant * scale + shift)

    def _elementwise(self, node: Node, inputs: list[_Value]) -> _Value:
        (value,) = inputs
        return _Value(value.ids, value.axis, _apply(node, value.constant))

    def _pool(self, node: Node, inputs: list[_Value]) -> _Value | None:
        (value,) = inputs
        if value.axis != 1:
            return None
        padding = _argument(node, "padding", 3)
        averages = "avg" in (type(node.module).__name__ if node.module else node.target).lower()
        if averages and any(_numbers(padding)):
            return _Value(value.ids, 1, torch.where(value.constant == 0, value.constant, math.nan))
        return _Value(value.ids, 1, value.constant)

    def _mean(self, node: Node, inputs: list[_Value]) -> _Value | None:
        axes = _argument(node, "dim", 1)
        axes = tuple(a % len(self.graph[node.inputs[0]].shape) for a in _numbers(axes))
        (value,) = inputs
        return _Value(value.ids, value.axis, value.constant) if axes and all(a > value.axis for a in axes) else None

    def _flatten(self, node: Node, inputs: list[_Value]) -> _Value | None:
        (value,), before = inputs, self.graph[node.inputs[0]].shape
        if value.axis != 1 or len(node.shape) != 2 or node.shape[1] != math.prod(before[1:]):
            return None
        times = math.prod(before[2:])
        return _Value(value.ids.repeat_interleave(times), 1, value.constant.repeat_interleave(times))

    def _permute(self, node: Node, inputs: list[_Value]) -> _Value | None:
        order = node.args[1:] if node.call is None else node.args[1]
        order = _numbers(order[0] if len(order) == 1 and not isinstance(order[0], int) else order)
        (value,) = inputs
        return _Value(value.ids, order.index(value.axis), value.constant) if value.axis in order else None

    def _slice(self, node: Node, inputs: list[_Value]) -> _Value | None:
        (value,) = inputs
        return _Value(value.ids, 1, value.constant) if value.axis == 1 else None

    def _pad(self, node: Node, inputs: list[_Value]) -> _Value | None:
        """Zeros as further channels (option A of ResNets); padding of maps makes a constant other than 0 vary."""
        (value,), amounts = inputs, _numbers(_argument(node, "pad", 1))
        fill = _argument(node, "value", 3) or 0.0
        if value.axis != 1 or _argument(node, "mode", 2) not in (None, "constant") or fill != 0.0:
            return None
        spatial, channels = amounts[:4], amounts[4:6] or [0, 0]
        constant = value.constant
        if any(spatial):
            constant = torch.where(constant == 0, constant, math.nan)
        before, after = (self.sets.fresh(n) for n in channels)
        self.fixed |= {int(i): f"{node.where} adds it whatever is pruned" for i in [*before, *after]}
        zeros = [torch.zeros(n, dtype=torch.float64) for n in channels]
        made = torch.cat([before, value.ids, after])
        return _Value(made, 1, torch.cat([zeros[0], constant, zeros[1]]))

    def _cat(self, node: Node, inputs: list[_Value]) -> _Value | None:
        axis = _argument(node, "dim", 1)
        axis = (0 if axis is None else axis) % len(node.shape)
        names = node.args[0]
        if any(value.axis != axis for value in inputs) or len(names) != len(node.args[0]):
            return None
        parts = [self.values[name] for name in names]
        return _Value(torch.cat([p.ids for p in parts]), axis, torch.cat([p.constant for p in parts]))

    def _add(self, node: Node, inputs: list[_Value]) -> _Value | None:
        if len(node.inputs) == 1 and len(inputs) == 1:  # x + 1, or x + x
            twice = sum(arg == node.inputs[0] for arg in node.args) > 1
            (value,) = inputs
            if twice:
                return _Value(value.ids, value.axis, 2 * value.constant)
            return None
        if len(inputs) != 2 or len(inputs[0].ids) != len(inputs[1].ids) or inputs[0].axis != inputs[1].axis:
            return None
        if self.graph[node.inputs[0]].shape != self.graph[node.inputs[1]].shape:
            return None
        self.sets.join(inputs[0].ids, inputs[1].ids)
        return _Value(inputs[1].ids, inputs[0].axis, inputs[0].constant + inputs[1].constant)

    def _mul(self, node: Node, inputs: list[_Value]) -> _Value | None:
        """Gates (squeeze and excitation): both sides have the same channels; a side that is 0 makes 0."""
        if len(inputs) != 2 or len(inputs[0].ids) != len(inputs[1].ids) or inputs[0].axis != inputs[1].axis:
            return None
        self.sets.join(inputs[0].ids, inputs[1].ids)
        a, b = inputs[0].constant, inputs[1].constant
        nothing = (a == 0) | (b == 0)
        return _Value(inputs[1].ids, inputs[0].axis, torch.where(nothing, torch.zeros_like(a), a * b))

    # -- backward -----------------------------------------------------------------------------------------------------

    def needed(self, fold: bool = True) -> tuple[Tensor, dict[int, str]]:
        """Per number whether its unit stays (bool), and for units that are dead and stay, why.

        Args:
            fold: whether a constant that is read can be folded; False: only what gives 0, or is not read, can go.
        """
        root = self.sets.roots(torch.arange(len(self.sets.parent)))
        stays = torch.zeros(len(root), dtype=torch.bool)
        for number in self.fixed:
            stays[root[number]] = True
        kept: dict[int, str] = {}
        readers = [node for node in self.graph.weighted() if self._reads(node)]
        while True:
            before = int(stays.sum())
            for node in reversed(readers):
                value = self.values[node.inputs[0]]
                rows = stays[root[self.values[node.name].ids]]
                wanted, varies = self.read[node.name][rows].any(0), value.constant.isnan()
                has_bias = self.takes_constant(node) is not None
                folds = (value.constant == 0) | (
                    fold & has_bias & ~torch.tensor(node.kind == "conv" and _padded(node.module))
                )
                stays[root[value.ids[wanted & varies]]] = True
                for number in value.ids[wanted & ~varies & ~folds].tolist():
                    if not stays[root[number]]:
                        why = (
                            "has no bias, nor BatchNorm behind it, to fold it into"
                            if not has_bias
                            else "pads its input with zeros"
                        )
                        kept[int(root[number])] = f"a unit is constant but not 0, and {node.where} {why}"
                    stays[root[number]] = True
            if int(stays.sum()) == before:
                return stays[root], kept

    def takes_constant(self, node: Node) -> str | None:
        """Where the constants that a layer reads can go: its bias, or the name of a BatchNorm that alone reads it."""
        if node.module.bias is not None:
            return "bias"
        behind = self.graph.consumers(node.name)
        if len(behind) == 1 and behind[0].kind == "batchnorm" and behind[0].module_name not in self.shared:
            return behind[0].module_name if behind[0].module.running_mean is not None else None
        return None

    def _reads(self, node: Node) -> bool:
        """Whether this layer reads its input and makes channels of its own; a depthwise one passes on."""
        own = self.values.get(node.name)
        return (
            own is not None
            and node.inputs[0] in self.values
            and not (node.kind == "conv" and node.module.groups > 1)
            and node.module_name not in self.shared
            and not self._is_opaque(node)
        )

    def _is_opaque(self, node: Node) -> bool:
        return any(self.fixed.get(int(i), "").startswith(node.where) for i in self.values[node.name].ids[:1])


def shrink(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None, example: Tensor | None = None, *, round_to: int = 1
) -> nn.Module:
    """A smaller model of the same function, in evaluation mode; the model itself where nothing can go.

    >>> small = shrink(model, masks, example)

    Args:
        model: any module that ``torch.fx`` can trace: convolutions (depthwise too), BatchNorm, pooling, flattening,
            skips (identity, projection, zeros as further channels), concatenation, gates; torchvision's ResNet, VGG,
            MobileNet, DenseNet, EfficientNet and ConvNeXt among them. It is not changed.
        masks: parameter name -> 0/1 tensor; None: zeros of the weights count.
        example: a batch of inputs on the model's device; a plain chain of layers needs none.
        round_to: make widths multiples of this, as far as dead units are there to fill them up; 8 runs fast on many
            machines.

    Raises:
        GraphError: the model cannot be traced; the line says where.
        ShrinkError: a layer would be empty, or no example was given where one is needed.
    """
    if example is None and round_to == 1:
        try:
            chain(model)
        except ShrinkError as error:
            raise ShrinkError(f"{error}; give an example, shrink(model, masks, example), for any other model") from None
        result = compact(model, masks)
        whole = sum(p.numel() for p in result.model.parameters()) == sum(p.numel() for p in model.parameters())
        return _masked(model, masks or {}) if whole else result.model
    if example is None:
        raise ShrinkError("round_to needs an example: shrink(model, masks, example, round_to=8)")
    return remove_dead(model, masks, example, round_to=round_to).model


@torch.no_grad()
def remove_dead(model: nn.Module, masks: Mapping[str, Tensor] | None, example: Tensor, *, round_to: int = 1) -> Cut:
    """A smaller model with the outputs of the masked one, in evaluation mode.

    Args:
        model: any module that can be traced; untouched.
        masks: parameter name -> 0/1 tensor; None: zeros of the weights count.
        example: a batch of inputs, on the model's device.
        round_to: widths of layers become multiples of this where dead units are there to fill them up; what fills up
            stays zero.

    Returns:
        The smaller model; ``model`` itself, as it is, where nothing can go.

    Raises:
        GraphError: the model cannot be traced.
        ShrinkError: a layer would be empty, or the outputs of the two differ.
    """
    masks = dict(masks or {})
    Masks(masks).check(model)
    graph = trace(model, example)
    survey = _Survey(model, masks, graph)
    stays, why = survey.needed()
    root = survey.sets.roots(torch.arange(len(stays)))
    layers = {node.module_name: survey.values[node.name] for node in graph.weighted() if node.name in survey.values}
    for name, value in layers.items():
        if not stays[value.ids].any():
            raise ShrinkError(f"layer {name!r} has no live unit left, so the output does not depend on it; prune less")
    if round_to > 1:
        stays = _rounded(survey, graph, stays, root, round_to)
    stayed = {
        name: next(why[int(r)] for r in root[value.ids].tolist() if int(r) in why)
        for name, value in layers.items()
        if any(int(r) in why for r in root[value.ids].tolist())
    }
    if bool(stays.all()) or all(bool(stays[value.ids].all()) for value in survey.values.values()):
        units = {name: torch.arange(len(value.ids)) for name, value in layers.items()}
        return Cut(_masked(model, masks), {}, units, stayed)
    small, index = _rebuilt(model, masks, graph, survey, stays)
    units = {name: stays[value.ids].nonzero().flatten() for name, value in layers.items()}
    result = Cut(small, index, units, stayed)
    _check(model, masks, small, example)
    return result


def joined_layers(model: nn.Module, example: Tensor) -> list[list[str]]:
    """Layers whose channels an addition (or a gate) makes one, in forward order: groups of two and more."""
    survey = _Survey(model, {}, trace(model, example))
    groups: dict[tuple[int, ...], list[str]] = {}
    for node in survey.graph.weighted():
        if node.name in survey.values:
            groups.setdefault(tuple(survey.sets.roots(survey.values[node.name].ids).tolist()), []).append(
                node.module_name
            )
    return [group for group in groups.values() if len(group) > 1]


@torch.no_grad()
def unread_units(model: nn.Module, masks: Mapping[str, Tensor], example: Tensor) -> Masks:
    """Masks without the units that nothing on the way to the output reads, or that always give 0.

    Args:
        model: any module that can be traced.
        masks: what is pruned so far.
        example: a batch of inputs.

    Returns:
        Masks of weight and bias of every weighted layer with such units, of a BatchNorm behind it too.
    """
    graph = trace(model, example)
    survey = _Survey(model, masks, graph)
    stays, _ = survey.needed(fold=False)
    found = {}
    for node in graph:
        if node.kind not in ("linear", "conv", "batchnorm") or node.name not in survey.values:
            continue
        keep = stays[survey.values[node.name].ids]
        if not bool(keep.all()):
            for name, parameter in node.module.named_parameters(recurse=False):
                rows = keep.to(parameter.device).view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)
                found[f"{node.module_name}.{name}"] = rows
    return Masks(found)


def carry(optimizer: torch.optim.Optimizer, before: nn.Module, result: Cut) -> torch.optim.Optimizer:
    """The optimiser of a model, for the smaller one: every parameter in its group, with its moments cut to shape.

    Args:
        optimizer: of ``before``; it is not changed.
        before: the model that was made smaller.
        result: what ``remove_dead`` gave for it.

    Raises:
        ShrinkError: the optimiser holds a parameter that is not the model's.
    """
    names = {id(parameter): name for name, parameter in before.named_parameters()}
    after = dict(result.model.named_parameters())
    groups, state = [], {}
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise ShrinkError(
                "the optimiser holds a parameter that is not the model's: build it from model.parameters()"
            )
        own = [names[id(parameter)] for parameter in group["params"]]
        groups.append({**group, "params": [after[name] for name in own]})
        for name, parameter in zip(own, group["params"], strict=True):
            state[after[name]] = {
                kind: result.cut(name, value).clone() if isinstance(value, Tensor) and value.shape == parameter.shape
                else copy.deepcopy(value)
                for kind, value in optimizer.state.get(parameter, {}).items()
            }  # fmt: skip
    made = type(optimizer)(groups)
    made.state.update({parameter: own for parameter, own in state.items() if own})
    return made


def _rounded(survey: _Survey, graph: Graph, stays: Tensor, root: Tensor, multiple: int) -> Tensor:
    """Keep so many dead units that widths are multiples; the first ones, layer by layer."""
    stays = stays.clone()
    for node in graph.weighted():
        if node.name not in survey.values:
            continue
        ids = survey.values[node.name].ids
        missing = -int(stays[ids].sum()) % multiple
        spare = ids[~stays[ids]][:missing]
        for number in spare.tolist():
            stays[root == root[number]] = True
    return stays


def _rebuilt(
    model: nn.Module, masks: Mapping[str, Tensor], graph: Graph, survey: _Survey, stays: Tensor
) -> tuple[nn.Module, dict[str, tuple[Tensor, ...]]]:
    """A copy with smaller layers, constants folded into the biases of those that read them."""
    small = _masked(model, masks)
    small = copy.deepcopy(model) if small is model else small
    index: dict[str, tuple[Tensor, ...]] = {}
    done = set()
    for node in graph:
        if not node.module_name or node.module_name in done or node.name not in survey.values:
            continue
        done.add(node.module_name)
        layer, own = small.get_submodule(node.module_name), survey.values[node.name]
        rows = stays[own.ids].nonzero().flatten()
        if node.kind == "batchnorm":
            for name in ("weight", "bias", "running_mean", "running_var"):
                _shorten(layer, node.module_name, name, (rows,), index)
            layer.num_features = len(rows)
        elif node.kind in ("linear", "conv"):
            before = survey.values[node.inputs[0]]
            read = stays[before.ids]
            depthwise = node.kind == "conv" and layer.groups > 1
            if not depthwise and survey._reads(node):
                gone = ~read & (before.constant.nan_to_num() != 0)
                if bool(gone.any()) and (place := survey.takes_constant(node)) is not None:
                    change = survey.sum[node.name][:, gone] @ before.constant[gone]
                    if place == "bias":
                        layer.bias += change.to(layer.bias)
                    else:  # what is added before BatchNorm and taken off its mean cancels out; rows are cut there later
                        mean = small.get_submodule(place).running_mean
                        mean -= change.to(mean)
            columns = torch.arange(layer.weight.shape[1]) if depthwise else read.nonzero().flatten()
            axes = (rows, columns, *(torch.arange(size) for size in layer.weight.shape[2:]))
            _shorten(layer, node.module_name, "weight", axes, index)
            _shorten(layer, node.module_name, "bias", (rows,), index)
            _rename(layer, len(rows), len(columns), depthwise)
    return small, index


def _shorten(
    layer: nn.Module, module: str, name: str, axes: tuple[Tensor, ...], index: dict[str, tuple[Tensor, ...]]
) -> None:
    tensor = getattr(layer, name, None)
    if tensor is None or all(len(axis) == size for axis, size in zip(axes, tensor.shape, strict=True)):
        return
    index[f"{module}.{name}"] = axes
    part = cut(tensor.detach(), axes)
    setattr(layer, name, nn.Parameter(part, requires_grad=tensor.requires_grad) if name in ("weight", "bias") else part)


def _rename(layer: nn.Module, outputs: int, inputs: int, depthwise: bool) -> None:
    """The sizes that a layer says it has."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = outputs, inputs
    elif depthwise and layer.groups == layer.in_channels == layer.out_channels:
        layer.groups = layer.in_channels = layer.out_channels = outputs
    elif not depthwise:
        layer.out_channels, layer.in_channels = outputs, inputs


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """The model with its pruned weights at 0: itself where they are, else a copy."""
    parameters = dict(model.named_parameters())
    if not any(bool(parameters[name][~mask.to(parameters[name].device).bool()].any()) for name, mask in masks.items()):
        return model
    made = copy.deepcopy(model)
    for name, parameter in made.named_parameters():
        if name in masks:
            parameter.mul_(masks[name].to(parameter))
    return made


def _check(model: nn.Module, masks: Mapping[str, Tensor], small: nn.Module, example: Tensor) -> None:
    """The two give the same on the example, or there is an error and no smaller model."""
    whole = _masked(model, masks)
    was = {module: module.training for module in whole.modules()}
    training = {module: module.training for module in small.modules()}
    expected = whole.eval()(example)
    for module, mode in was.items():
        module.training = mode
    try:
        found = small.eval()(example)
    except RuntimeError as error:
        raise ShrinkError(
            f"the smaller model does not run ({' '.join(str(error).split())[:120]}); its forward has sizes written "
            "into it: leave those layers out of the pruning"
        ) from None
    finally:
        for module, mode in training.items():
            module.training = mode
    scale = float(expected.abs().max()) or 1.0
    error = float((found - expected).abs().max()) / scale
    if not error <= 10 * TOLERANCE:
        raise ShrinkError(
            f"the smaller model gives other outputs (by {error:.1e} of the largest); please report the model"
        )


def _padded(layer: nn.Conv2d) -> bool:
    return layer.padding == "same" or (layer.padding != "valid" and any(_numbers(layer.padding)))


def _numbers(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int | float) else list(value)


def _argument(node: Node, name: str, position: int) -> Any:
    """An argument of a call, or the attribute of that name of a module."""
    if node.module is not None:
        return getattr(node.module, name, None)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else None


def _apply(node: Node, constant: Tensor) -> Tensor:
    """An activation on the constants; NaN stays NaN, since what varies still varies."""
    if isinstance(node.module, nn.Dropout | nn.Dropout2d) or node.target in (
        "dropout",
        "contiguous",
        "clone",
        "stochastic_depth",
    ):
        return constant
    varies = constant.isnan()
    level = constant.nan_to_num().view(1, -1)
    if node.module is not None:
        made = copy.deepcopy(node.module)(level)
    elif node.call is not None:
        made = node.call(
            level, *node.args[1:], **{**node.kwargs, **({"inplace": False} if "inplace" in node.kwargs else {})}
        )
    else:
        made = getattr(level, node.target.rstrip("_"))(*node.args[1:], **node.kwargs)
    return torch.where(varies, constant, made.flatten())
