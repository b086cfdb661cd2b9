"""Removing dead units from any traced model: through normalisation, skips, concatenation and grouped convolutions.

A unit (``channels``) can go when nobody that matters reads it, or when all that is read of it is constant and can be
folded into the next biases, or into the means of the next BatchNorm.

Where a constant cannot be folded exactly (zeros come in at the border of a padded convolution, or there is no place for
it), and where an operation mixes channels in a way that is not understood, the unit stays, and the result says why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelab import folding
from prunelab.chains import ShrinkError, Shrunk, chain, compact, cut
from prunelab.channels import Survey, numbers, passes_on
from prunelab.graph import Graph, Node, evaluating, trace, traced
from prunelab.masks import Masks, maskable

TOLERANCE = 1e-5  # of the outputs before and after, relative to their largest; our own default
# Widths while training are multiples of this: on several threads BatchNorm of 13 channels takes up to three times as
# long as of 16, on one thread it makes no difference (our own measurement).
TRAINED_WIDTH = 4
_ENDS = ("it is an output of the model", "it is an input of the model")


@dataclass(frozen=True)
class Cut:
    """A smaller model and how it lies inside the one it came from.

    Attributes:
        model: the new module, of the same structure and with the same parameter names; the old one is untouched.
        index: parameter or buffer -> for each axis the positions kept, int64; only those that were cut. Columns of a
            grouped convolution are 2-D: for each row its own.
        units: weighted layer -> positions of its units that are left, int64.
        stayed: weighted layer -> how many of its units are constant and are still there, and why.
        folded: BatchNorm -> the layer into which it was folded; empty where that was not asked for.
        unfolded: BatchNorm -> why it is still there though folding was asked for.
    """

    model: nn.Module
    index: dict[str, tuple[Tensor, ...]]
    units: dict[str, Tensor]
    stayed: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    unfolded: dict[str, str] = field(default_factory=dict)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Bring a mask, a moment or anything else of the old shape of a parameter to its new shape."""
        return cut(tensor, self.index[name]) if name in self.index else tensor


def shrink(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    example: Tensor | None = None,
    *,
    round_to: int = 1,
    memory_format: torch.memory_format | None = None,
    fold_batchnorm: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """A smaller model of the same function; the model itself where nothing can go.

    >>> small = shrink(model, masks, example)

    The function is that of evaluation mode, in which BatchNorm and dropout do not depend on the batch. ``remove_dead``
    does the same and also tells what is left of each layer, and what stayed and why.

    Args:
        model: any module that ``torch.fx`` can trace: Linear on the last axis, convolutions (grouped and depthwise
            too), BatchNorm, pooling, flattening, skips (identity, projection, zeros as further channels),
            concatenation, gates; torchvision's ResNet, VGG, MobileNet, DenseNet, EfficientNet and ConvNeXt among them.
            It is not changed. Arguments behind the first have their defaults.
        masks: parameter name -> 0/1 tensor; None: zeros of the weights count.
        example: a batch of inputs on the model's device; a plain chain of layers needs none.
        round_to: make widths multiples of this, as far as dead units are there to fill them up; 8 runs fast on many
            machines. What fills up is 0.
        memory_format: of the result, ``torch.channels_last`` for example; None: as it is.
        fold_batchnorm: for inference: each BatchNorm goes into the convolution or Linear right before it, and an
            ``nn.Identity`` stands in its place; activations right behind work in place. What is trained on from there
            trains without normalisation.
        optimizer: of ``model``; see ``carry``.

    Returns:
        The smaller model, in the mode of ``model``, or in evaluation mode where a BatchNorm was folded; with
        ``optimizer``, the pair of it and its own optimiser.

    Raises:
        GraphError: the model cannot be traced; the line says where.
        MaskError: the masks do not fit the model.
        ShrinkError: a layer would be empty, no example was given where one is needed, the outputs differ, or
            ``optimizer`` cannot be carried over.
    """
    if not isinstance(round_to, int) or round_to < 1:
        raise ShrinkError(f"round_to = {round_to!r}: should be a whole number, 1 or more")
    if not isinstance(memory_format, torch.memory_format | None):
        raise ShrinkError(f"memory_format = {memory_format!r}: should be None, or torch.channels_last, say")
    masks = _fitting(masks, model)
    result = _without_example(model, masks, round_to) if example is None else None
    if result is None:
        result = remove_dead(model, masks, example, round_to=round_to, fold_batchnorm=fold_batchnorm)
    rule = None
    if optimizer is not None:
        rule = carry(optimizer, model, result)
    small = result.model
    if memory_format is not None:
        small = (copy.deepcopy(small) if small is model else small).to(memory_format=memory_format)
    return small if rule is None else (small, rule)


def _fitting(masks: Mapping[str, Tensor] | None, model: nn.Module) -> Masks:
    """The masks, if they are masks of the model and nothing else prunes it."""
    if not isinstance(model, nn.Module):
        raise ShrinkError(f"the model should be an nn.Module, not a {type(model).__name__}")
    if not isinstance(masks, Mapping | None):
        what = type(masks).__name__
        raise ShrinkError(f"masks should map names to tensors, not be a {what}: shrink(model, masks, example)")
    masks = masks if isinstance(masks, Masks) else Masks(masks or {})
    masks.check(model)
    for name, module in model.named_modules():
        if any(hasattr(module, f"{part}_orig") for part in ("weight", "bias")):
            raise ShrinkError(
                f"torch.nn.utils.prune is at work on {name!r}: take its masks, export.from_torch_prune(model), first"
            )
    return masks


def _without_example(model: nn.Module, masks: Masks, round_to: int) -> Shrunk | Cut:
    if round_to > 1:
        raise ShrinkError(f"round_to needs an example: shrink(model, masks, example, round_to={round_to})")
    try:
        chain(model)
    except ShrinkError as error:
        raise ShrinkError(f"{error}; give an example, shrink(model, masks, example), for any other model") from None
    result = compact(model, masks)
    if all(p.shape == result.model.get_parameter(name).shape for name, p in model.named_parameters()):
        return Cut(_masked(model, masks), {}, result.units)
    return result


@torch.no_grad()
def remove_dead(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    example: Tensor,
    *,
    round_to: int = 1,
    fold_batchnorm: bool = False,
) -> Cut:
    """A smaller model with the outputs, in evaluation mode, of the masked one, and what is left of each layer.

    Args:
        model: any module that can be traced; untouched.
        masks: parameter name -> 0/1 tensor; None: zeros of the weights count.
        example: a batch of inputs, on the model's device.
        round_to: widths of layers become multiples of this where dead units are there to fill them up; what fills up
            is 0.
        fold_batchnorm: see ``shrink``.

    Returns:
        The smaller model; ``model`` itself, as it is, where nothing can go. Where sizes are written into its forward (a
        ``view(-1, 512)``, or the channels that ``F.pad`` adds) it is a ``torch.fx.GraphModule`` with the same names,
        which does what ``model`` does in evaluation mode.

    Raises:
        GraphError: the model cannot be traced.
        MaskError: the masks do not fit the model.
        ShrinkError: a layer would be empty, or the outputs of the two differ.
    """
    masks = _fitting(masks, model)
    graph = trace(model, example)
    survey = Survey(model, masks, graph)
    live, why = survey.needed()
    layers = _layers(graph, survey)
    for name, node in layers.items():
        if not survey.of(live, survey.values[node.name]).any():
            raise ShrinkError(f"layer {name!r} has no live unit left, so the output does not depend on it; prune less")
    stays = survey.filled(live, round_to)
    stayed = _reasons(survey, layers, live, stays, why)
    units = {name: survey.of(stays, survey.values[node.name]).nonzero().flatten() for name, node in layers.items()}
    if all(bool(survey.of(stays, value).all()) for value in survey.values.values()):
        found = Cut(_masked(model, masks), {}, units, stayed)
    else:
        small, index = _rebuilt(model, masks, graph, survey, live, stays)
        _check(_masked(model, masks), small, example)
        found = Cut(small, index, units, stayed)
    return _folded(found, example) if fold_batchnorm else found


@torch.no_grad()
def remove_silent(model: nn.Module, masks: Mapping[str, Tensor], example: Tensor) -> Cut:
    """The model without the channels that its masks keep at 0, whatever the other weights become: to train on.

    Unlike what ``remove_dead`` leaves it is the same network in training, too: nothing is folded, and a unit that is
    silent by its values alone stays. Of a layer that masks empty one unit stays, and some fill up ``TRAINED_WIDTH``.

    Args:
        model: any module that can be traced, its pruned weights at 0; untouched.
        masks: parameter name -> 0/1 tensor.
        example: a batch of inputs, on the model's device.

    Returns:
        The smaller model; ``model`` itself where nothing can go.

    Raises:
        GraphError: the model cannot be traced.
    """
    any_values = copy.deepcopy(model)  # a parameter that is learnt may become anything; 1 stands for that
    for parameter in any_values.parameters():
        parameter.fill_(1)
    graph = trace(any_values, example)
    survey = Survey(any_values, masks, graph)
    stays = survey.vocal()
    layers = _layers(graph, survey)
    for node in layers.values():
        roots = survey.root[survey.values[node.name].ids]
        stays[roots[:1]] |= not bool(stays[roots].any())
    stays = survey.filled(stays, TRAINED_WIDTH)
    units = {name: survey.of(stays, survey.values[node.name]).nonzero().flatten() for name, node in layers.items()}
    if bool(stays.all()):
        return Cut(model, {}, units)
    return Cut(*_rebuilt(model, masks, graph, survey, stays, stays), units)


@torch.no_grad()
def dead_units(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Weighted layer -> how many of its units are constant or unread and are there all the same, and why.

    Args:
        model: any module that can be traced; zeros of its weights count.
        example: a batch of inputs, on the model's device.
    """
    graph = trace(model, example)
    survey = Survey(model, {}, graph)
    live, why = survey.needed()
    return _reasons(survey, _layers(graph, survey), live, torch.ones_like(live), why)


def joined_layers(model: nn.Module, example: Tensor) -> list[list[str]]:
    """Layers whose channels an addition (or a gate) makes one, in forward order: groups of two and more."""
    survey = Survey(model, {}, trace(model, example))
    groups: dict[tuple[int, ...], list[str]] = {}
    for node in survey.graph.weighted():
        if node.name in survey.values:
            channels = tuple(survey.root[survey.values[node.name].ids].tolist())
            groups.setdefault(channels, []).append(node.module_name)
    return [group for group in groups.values() if len(group) > 1]


def carry(optimizer: torch.optim.Optimizer, before: nn.Module, result: Cut | Shrunk) -> torch.optim.Optimizer:
    """The optimiser of a model, for the smaller one: every parameter in its group, with its moments cut to shape.

    Args:
        optimizer: of ``before``; it is not changed.
        before: the model that was made smaller.
        result: what ``remove_dead`` gave for it.

    Raises:
        ShrinkError: the optimiser holds a parameter that is not the model's, or moments of another shape than their
            parameters, or BatchNorms of the smaller model are folded.
    """
    if isinstance(result, Cut) and result.folded:
        raise ShrinkError(
            "a model whose BatchNorms are folded is for inference: leave out optimizer, or fold_batchnorm"
        )
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
            moments = state[after[name]] = {}
            for kind, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[kind] = result.cut(name, value).clone()
                elif isinstance(value, Tensor) and value.numel() > 1 and after[name].shape != parameter.shape:
                    raise ShrinkError(
                        f"{type(optimizer).__name__} holds {kind!r}, which has another shape than its parameter {name} "
                        "and cannot be cut to size: leave out optimizer, and build a new one for the smaller model"
                    )
                else:
                    moments[kind] = copy.deepcopy(value)
    made = type(optimizer)(groups)
    made.state.update({parameter: moments for parameter, moments in state.items() if moments})
    return made


def _folded(found: Cut, example: Tensor) -> Cut:
    """The same without the BatchNorms that can be folded."""
    result = folding.fold(found.model, example)
    if result.into:
        _check(found.model, result.model, example)
    return replace(found, model=result.model, folded=result.into, unfolded=result.left)


def _layers(graph: Graph, survey: Survey) -> dict[str, Node]:
    return {node.module_name: node for node in graph.weighted() if node.name in survey.values}


def _reasons(
    survey: Survey, layers: Mapping[str, Node], live: Tensor, stays: Tensor, why: Mapping[int, str]
) -> dict[str, str]:
    """For each layer the units that are constant, or dead, and stay: how many, and why the first of each kind does."""
    found = {}
    for name, node in layers.items():
        value, count = survey.values[node.name], {}
        dead = (~value.constant.isnan() | ~survey.of(live, value)) & survey.of(stays, value)
        for number in survey.root[value.ids[dead]].tolist():
            reason = why.get(number, "what they are joined with is alive") if live[number] else "kept to fill up"
            count[reason] = count.get(reason, 0) + (reason not in _ENDS)
        lines = [f"{n} of {len(value.ids)} units: {reason}" for reason, n in count.items() if n]
        if lines:
            found[name] = "; ".join(lines)
    return found


def _rebuilt(
    model: nn.Module, masks: Mapping[str, Tensor], graph: Graph, survey: Survey, live: Tensor, stays: Tensor
) -> tuple[nn.Module, dict[str, tuple[Tensor, ...]]]:
    """A copy with smaller layers, constants folded; what stays without being alive is 0."""
    small = copy.deepcopy(_masked(model, masks))
    index: dict[str, tuple[Tensor, ...]] = {}
    edits: dict[str, Any] = {}
    for node in graph:
        if not survey.understood(node):
            continue
        own = survey.values[node.name]
        rows, filler = survey.of(stays, own).nonzero().flatten(), survey.of(stays & ~live, own)
        layer = small.get_submodule(node.module_name) if node.module_name else None
        if node.name in survey.pads:
            amounts = [int(stays[survey.root[ids]].sum()) for ids in survey.pads[node.name]]
            if layer is not None:
                layer.padding = (*layer.padding[:4], *amounts)
            elif amounts != [len(ids) for ids in survey.pads[node.name]]:
                edits[node.name] = amounts
        elif node.kind == "flatten" and node.shape[1] != len(rows) and node.shape[1] in (*node.args, *_shape(node)):
            edits[node.name] = None
        elif node.kind == "batchnorm":
            for name, value in {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 1}.items():
                if getattr(layer, name) is not None:
                    getattr(layer, name)[filler.to(getattr(layer, name).device)] = value
                _shorten(layer, node.module_name, name, (rows,), index)
            layer.num_features = len(rows)
        elif node.kind == "gate":
            _shorten(layer, node.module_name, "open", (rows,), index)
        elif node.kind in ("linear", "conv"):
            _cut_layer(small, layer, node, survey, live, stays, index)
    return (_rewritten(small, edits) if edits else small), index


def _cut_layer(
    small: nn.Module,
    layer: nn.Linear | nn.Conv2d,
    node: Node,
    survey: Survey,
    live: Tensor,
    stays: Tensor,
    index: dict[str, tuple[Tensor, ...]],
) -> None:
    own, before = survey.values[node.name], survey.values[node.inputs[0]]
    rows, filler = survey.of(stays, own).nonzero().flatten(), survey.of(stays & ~live, own)
    weight, columns = layer.weight, torch.arange(layer.weight.shape[1])
    groups = getattr(layer, "groups", 1)
    if survey.makes(node):
        gone = ~survey.of(live, before)
        change = survey.effect(node, gone & (before.constant.nan_to_num() != 0), before.constant)
        if bool(change.any()):
            _fold(small, layer, survey.takes_constant(node) or [], change)
        by_group = weight.view(groups, len(weight) // groups, *weight.shape[1:]).transpose(1, 2)
        by_group[gone.view(groups, -1).to(weight.device)] = 0  # [groups, inputs of each, rows of each, kernel]
        kept = survey.of(stays, before).view(groups, -1)
        columns = kept[0].nonzero().flatten()
        if groups > 1:
            alive = kept.any(1)
            places = torch.stack([group.nonzero().flatten() for group in kept[alive]])
            number = alive.cumsum(0)[rows // (len(weight) // groups)] - 1
            columns, groups = places[number], int(alive.sum())
    elif passes_on(layer):
        groups = len(rows)
    weight[filler.to(weight.device)] = 0
    if layer.bias is not None:
        layer.bias[filler.to(weight.device)] = 0
    axes = (rows, columns, *(torch.arange(size) for size in weight.shape[2:]))
    _shorten(layer, node.module_name, "weight", axes, index)
    _shorten(layer, node.module_name, "bias", (rows,), index)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = len(rows), columns.shape[-1]
    else:
        layer.out_channels, layer.in_channels, layer.groups = len(rows), columns.shape[-1] * groups, groups


def _fold(small: nn.Module, layer: nn.Module, norms: Iterable[tuple[str, int]], change: Tensor) -> None:
    """Add to each row: to the bias; or, what was before added before BatchNorm, take it off its mean."""
    if layer.bias is not None:
        layer.bias += change.to(layer.bias)
    for name, start in norms:  # they come later, so they are whole yet
        mean = small.get_submodule(name).running_mean
        mean[start : start + len(change)] -= change.to(mean)


def _rewritten(small: nn.Module, edits: Mapping[str, Any]) -> nn.Module:
    """The model as a graph, with other sizes in it: the channels that a pad adds, or a flattening without numbers."""
    made = traced(small)
    for node in list(made.graph.nodes):
        if edits.get(node.name) is not None:
            amounts = numbers(node.kwargs["pad"] if "pad" in node.kwargs else node.args[1])
            node.args = (node.args[0], [*amounts[:4], *edits[node.name]])
            node.kwargs = {}
        elif node.name in edits:
            with made.graph.inserting_before(node):
                flat = made.graph.call_function(torch.flatten, (node.args[0], 1))
            node.replace_all_uses_with(flat)
            made.graph.erase_node(node)
    made.recompile()
    made.training = small.training
    return made


def _shape(node: Node) -> tuple[Any, ...]:
    """The sizes that a view is given, where they come as one."""
    given = node.args[1] if len(node.args) == 2 else node.kwargs.get("shape", ())
    return tuple(given) if isinstance(given, tuple | list) else (given,)


def _shorten(
    layer: nn.Module, module: str, name: str, axes: tuple[Tensor, ...], index: dict[str, tuple[Tensor, ...]]
) -> None:
    tensor = getattr(layer, name, None)
    if tensor is None or all(axis.shape[-1] == size for axis, size in zip(axes, tensor.shape, strict=True)):
        return
    index[f"{module}.{name}"] = axes
    part = cut(tensor.detach(), axes)
    setattr(layer, name, nn.Parameter(part, requires_grad=tensor.requires_grad) if name in ("weight", "bias") else part)


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """The model with its pruned weights at 0: itself where they are, else a copy."""
    parameters = maskable(model)
    if not any(bool(parameters[name][~mask.to(parameters[name].device).bool()].any()) for name, mask in masks.items()):
        return model
    made = copy.deepcopy(model)
    Masks(masks).apply_(made)
    return made


def _check(whole: nn.Module, small: nn.Module, example: Tensor) -> None:
    """The two give the same on the example, or there is an error and no smaller model."""
    rounding = max((torch.finfo(p.dtype).eps for p in whole.parameters() if p.is_floating_point()), default=0.0)
    tolerance = max(TOLERANCE, 4 * rounding)  # with 16 bits, what is folded into a weight or a bias is rounded anew
    expected = _outputs(whole, example)
    if any(bool(tensor.isnan().any()) for tensor in expected):
        raise ShrinkError("the model gives nan for the example, so nothing can be compared with it: give another one")
    try:
        error = _difference(expected, _outputs(small, example))
    except RuntimeError as caught:
        raise ShrinkError(
            f"the smaller model does not run ({' '.join(str(caught).split())[:120]}); its forward has sizes written "
            "into it: leave those layers out of the pruning"
        ) from None
    if not error <= tolerance and example.is_floating_point():  # by rounding alone? Then not in float64
        double = example.cpu().double()
        both = [_outputs(copy.deepcopy(net).cpu().double(), double) for net in (whole, small)]
        error = _difference(*both)
    if not error <= tolerance:
        raise ShrinkError(
            f"the smaller model gives other outputs (by {error:.1e} of the largest); please report the model"
        )


def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    """All tensors that a model gives in evaluation mode; its mode is put back."""
    with evaluating(model):
        output = model(example.clone())  # which a first layer that works in place changes
    if not (tensors := _tensors(output)):
        raise ShrinkError(
            f"the model gives a {type(output).__name__}, in which no tensor is found that a smaller model could be "
            "compared by: let its forward give tensors, or a tuple or dict of them"
        )
    return tensors


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output):
        output = [getattr(output, part.name) for part in fields(output)]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest of all outputs, relative to the largest value of that output; infinite places have to be the same."""
    largest = 0.0
    for pair in zip(expected, found, strict=True):
        a, b = (tensor.cpu().double().flatten() for tensor in pair)
        error = (a - b).abs().masked_fill(a == b, 0).nan_to_num(math.inf, math.inf)
        if len(a):
            largest = max(largest, float(error.max()) / (float(a.abs().nan_to_num(0, 0).max()) or 1.0))
    return largest
