"""Scores of the field: a number for every weight, higher = keep, and how units get theirs from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from prunelab.errors import PrunelabError
from prunelab.masks import MaskError, layer_of, unit_axis
from prunelab.pruners.select import Granularity, by_unit, scored_names
from prunelab.pruners.signals import signals
from prunelab.pruners.units import COUPLED, Combine, Fold, competing, fold, there
from prunelab.structure.forward import call, copied, logits, looking, rows
from prunelab.structure.groups import Role

if TYPE_CHECKING:
    from prunelab.pruners.base import Context, Reads

PROBES = 8  # vectors by which the diagonal of a Hessian is estimated; our own default

Values = Callable[["Context", Sequence[str]], dict[str, Tensor]]


class Score(NamedTuple):
    """How weights are scored, and from them units.

    Attributes:
        values: of a network and names of parameters: parameter name -> a number for each weight; with its sign, where
            units need it.
        reads: the data that it looks at.
        since_start: whether it compares with the weights before the training.
        only: what it is defined for: single weights, whole units, units with all that reads them; ``""``: everything.
        along: of a slice of a weight and which of its entries are left, a number for each entry.
        finish: what becomes of that sum, or of a single weight.
        relative: by what the scores of a layer, or of units that are coupled, are divided so that several of them can
            compete: ``"mean"``, of units, over those that are left (the convention of Torch-Pruning); ``"larger"``: the
            sum over all that are at least as large, of weights too; ``"nothing"``.
        scales: whether it is one of the scales of BatchNorm, not of weights.
        roles: which slices of a unit count, as those that make it (``"out"``) or read it (``"in"``).
        measured: how many times it is measured on the way to an amount.
    """

    values: Values
    reads: Reads = "nothing"
    since_start: bool = False
    only: Literal["", "weight", "unit", "channel"] = ""
    along: Fold = lambda entries, live: entries.sum(1)
    finish: Callable[[Tensor], Tensor] = lambda total: total
    relative: Literal["mean", "larger", "nothing"] = "mean"
    scales: bool = False
    roles: Sequence[Role] = ("out", "in", "bias", "affine")
    measured: int = 1


def scored(now: Context, score: Score, granularity: Granularity, combine: Combine = "mean") -> dict[str, Tensor]:
    """The scores of what competes: per parameter, or per layer (or space) one per unit.

    Args:
        now: the network.
        score: which.
        granularity: what goes.
        combine: how the slices of coupled units are combined.

    Raises:
        MaskError: nothing competes.
    """
    if granularity == "weight":
        names = scored_names(now.model, now.masks, "weight")
        singles = {name: score.finish(value) for name, value in score.values(now, names).items()}
        live = {name: now.masks[name].to(singles[name].device) for name in names}
        return {n: share_of_larger(s, live[n]) for n, s in singles.items()} if score.relative == "larger" else singles
    groups, parameters = competing(now, granularity), dict(now.model.named_parameters(remove_duplicate=False))
    members = dict.fromkeys(groups.names.get(part.name, "") for space in groups.values() for part in space.slices)
    member = _is_scale if score.scales else _has_weights
    names = [name for name in members if name in parameters and member(now.model, name, parameters[name])]
    if not names:
        what = "a BatchNorm with a scale behind it" if score.scales else "weights"
        raise MaskError(f"no layer that may be pruned has {what}, of which this score is one")
    live = there(groups, now.masks)
    how = {"along": score.along, "finish": score.finish, "combine": combine, "roles": score.roles}
    totals = fold(groups, score.values(now, names), live, **how)
    if not totals:
        if granularity in COUPLED:
            raise MaskError("no channel that may go is read by a layer that this score knows, a Linear or Conv2d")
        raise MaskError("this score is defined for none of the layers that may be pruned: choose another method")
    return {name: _relative(total, live[name].to(total.device), score.relative) for name, total in totals.items()}


def _has_weights(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1


def _is_scale(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    return name.endswith("weight") and isinstance(model.get_submodule(layer_of(name)), _BatchNorm)


def _relative(total: Tensor, live: Tensor, to: str) -> Tensor:
    if to == "mean":
        return total / total[live].abs().mean().clamp(min=torch.finfo(total.dtype).tiny)
    return share_of_larger(total, live) if to == "larger" else total


def share_of_larger(score: Tensor, live: Tensor) -> Tensor:
    """Each number over the sum of itself and all live ones after it in ascending order; float64, 0 if not live.

    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021, section 2,
    the definition of the LAMP score.

    Args:
        score: none below 0.
        live: bool, of the same shape.
    """
    ordered, place = score.double().masked_fill(~live, 0).flatten().sort()
    larger = ordered.flip(0).cumsum(0).flip(0)
    share = ordered / larger.clamp(min=torch.finfo(ordered.dtype).tiny)
    return torch.empty_like(share).scatter_(0, place, share).view(score.shape)


# -- of the weights alone ----------------------------------------------------------------------------------------------


def wide(values: Tensor) -> Tensor:
    """The same numbers as float32 where they have fewer bits: sums of these would round, and end at 65,504."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def weights(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Parameter name -> its values, at least float32, without a gradient."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: wide(parameters[name].detach()) for name in names}


def magnitude(model: nn.Module, names: Sequence[str], norm: int = 1) -> dict[str, Tensor]:
    """``|w| ** norm``; its sum over a unit is the unit's L1 norm, or the square of its L2 norm.

    Source: Han et al., "Learning both weights and connections for efficient neural networks", NIPS 2015, section 3
    (weights); Li et al., "Pruning filters for efficient ConvNets", ICLR 2017, section 3.1 (sums over filters).

    Args:
        model: The model.
        names: Parameters to score.
        norm: 1 or 2.

    Returns:
        Parameter name -> score, of the parameter's shape; at least float32.
    """
    return {n: value.abs() if norm == 1 else value.square() for n, value in weights(model, names).items()}


def random(model: nn.Module, names: Sequence[str], generator: Generator, *, units: bool = False) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1), float32: the control that every score has to beat.

    Args:
        model: The model.
        names: Parameters to score.
        generator: The source of the numbers.
        units: One number per unit, by layer name, instead of one per weight, by parameter name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: parameters[name].shape for name in names}
    if units:
        axes = {name: unit_axis(model.get_submodule(layer_of(name))) or 0 for name in names}
        shapes = {layer_of(name): shapes[name][axis : axis + 1] for name, axis in axes.items()}
    return {name: torch.rand(shape, generator=generator, device=generator.device) for name, shape in shapes.items()}


def reduce_to_units(model: nn.Module, scores: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Sum the scores of each neuron's or filter's incoming weights: layer name -> score per unit, 1-D."""
    return {layer_of(name): wide(by_unit(model, name, scores[name])).sum(1) for name in names}


def _since(what: Callable[[Tensor, Tensor], Tensor]) -> Values:
    """A score of the weights now and at the start."""

    def values(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
        start, own = now.start(), weights(now.model, names)
        if lacking := [name for name in names if name not in (start or {})]:
            have = "give start=, their state_dict" + f", which has no {lacking[0]!r}" * (start is not None)
            raise PrunelabError(f"this score compares with the weights before training: {have}")
        if odd := [name for name in names if start[name].shape != own[name].shape]:
            shapes = f"{tuple(start[odd[0]].shape)} in start= and {tuple(own[odd[0]].shape)} in the model"
            raise PrunelabError(f"{odd[0]} has shapes {shapes}: give the state_dict of this very model")
        return {name: what(value, start[name].detach().to(value)) for name, value in own.items()}

    return values


def distances(rows: Tensor, live: Tensor) -> Tensor:
    """Sum of the Euclidean distances from each row to all others that are left.

    It is least at the geometric median of the rows. Source: He et al., "Filter pruning via geometric median for deep
    convolutional neural networks acceleration", CVPR 2019, eq. 4 to 8.

    Args:
        rows: [n, d].
        live: which of them are left, bool [n].
    """
    far = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return (far * live).sum(1)


def synflow(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
    """|w dR/dw|, R the sum of the outputs of the network with all weights |w|, no biases, and ones as inputs; float64.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS
    2020, section 5, eq. of R_SF and algorithm 1. Our own: BatchNorm does not shift either; masks are applied first.
    """
    network = copied(now.model).double()
    now.masks.apply_(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.zero_() if name.endswith("bias") and parameter.dim() == 1 else parameter.abs_()
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
    ones = tree_map_only(
        Tensor, lambda x: torch.ones_like(x, dtype=torch.double) if x.is_floating_point() else x, now.sample()
    )
    with looking(network), _slopes(network, names) as parameters:
        given = [out for out in tree_leaves(call(network, ones)) if isinstance(out, Tensor) and out.requires_grad]
        if not given:
            raise PrunelabError("synflow: no output of the model depends on its weights, so no weight has a score")
        found = torch.autograd.grad(sum(out.sum() for out in given), parameters, allow_unused=True)
    scores = {
        name: parameter.detach() * (0 if slope is None else slope)
        for name, parameter, slope in zip(names, parameters, found, strict=True)
    }
    if not all(bool(score.isfinite().all()) for score in scores.values()):
        raise PrunelabError("synflow: the flow through this network is more than float64 holds: scale its weights down")
    return scores


# -- of the loss -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _slopes(model: nn.Module, names: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    """The parameters of these names, of which gradients can be taken as long as the ``with`` lasts."""
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = [named[name] for name in names]
    frozen = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield parameters
    finally:
        for parameter, required in zip(parameters, frozen, strict=True):
            parameter.requires_grad_(required)


def summed_loss(now: Context, x: Any, y: Any) -> Tensor:
    """The loss of a batch, summed over its samples: the user's own, or the cross entropy where targets are classes.

    Raises:
        PrunelabError: a loss has to be given, or it does not depend on the weights.
    """
    if now.loss is not None:
        found = now.loss(call(now.model, x), y)
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise PrunelabError(f"loss= gave {what}: should be one number, the mean over the samples of the batch")
        found = found.reshape(()) * len(y)
    else:
        if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
            kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise PrunelabError(f"the targets are {kind}, no classes: give loss=, such as torch.nn.functional.mse_loss")
        out = wide(logits(now.model, x))
        if out.dim() < 2 or out.shape[1] < 2:
            what = (
                f"the model gives outputs of shape {tuple(out.shape)}, for which cross entropy is 0 whatever they are"
            )
            raise PrunelabError(f"{what}: give loss=, such as torch.nn.functional.binary_cross_entropy_with_logits")
        if y.shape != (len(out), *out.shape[2:]):
            wanted = (len(out), *out.shape[2:])
            raise PrunelabError(f"targets of shape {tuple(y.shape)} for outputs {tuple(out.shape)}: should be {wanted}")
        if not -1 < int(y.clamp(min=0).max()) < out.shape[1]:
            raise PrunelabError(f"a target is class {int(y.max())}, and the model gives {out.shape[1]}: from 0 on")
        found = F.cross_entropy(out, y.long(), reduction="sum")
    if not found.requires_grad:
        raise PrunelabError("the loss does not depend on the weights: is the forward of the model under no_grad?")
    return found


def loss_gradients(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
    """Gradient of the mean loss over all the data, in evaluation mode; ``.grad`` of parameters stays as it was.

    Args:
        now: the network and its data.
        names: parameters.

    Raises:
        PrunelabError: all of it is 0.
    """
    with looking(now.model), _slopes(now.model, names) as parameters:
        total, samples = [torch.zeros_like(wide(parameter.detach())) for parameter in parameters], 0
        for x, y in now.pairs():
            slopes = torch.autograd.grad(summed_loss(now, x, y), parameters, allow_unused=True)
            for own, slope in zip(total, slopes, strict=True):
                own += 0 if slope is None else slope  # None: an unused layer
            samples += len(y)
    return _told({name: own / samples for name, own in zip(names, total, strict=True)})


def fisher_diagonal(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
    """Mean over the samples of the squared gradient of each one's loss: a backward pass for every sample.

    It is the diagonal of the empirical Fisher information, which stands for that of the Hessian; see Theis et al.,
    "Faster gaze prediction with dense networks and Fisher pruning", 2018, eq. 8.
    """
    with looking(now.model), _slopes(now.model, names) as parameters:
        total, samples = [torch.zeros_like(wide(parameter.detach())) for parameter in parameters], 0
        for x, y in now.pairs():
            for i in range(len(y)):
                one = rows(x, slice(i, i + 1))
                slopes = torch.autograd.grad(summed_loss(now, one, y[i : i + 1]), parameters, allow_unused=True)
                for own, slope in zip(total, slopes, strict=True):
                    own += 0 if slope is None else wide(slope).square()
            samples += len(y)
    return _told({name: own / samples for name, own in zip(names, total, strict=True)})


def hessian_products(
    now: Context, names: Sequence[str], vectors: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """H v for each of the vectors, H the Hessian of the mean loss over all the data; two backward passes each."""
    with looking(now.model), _slopes(now.model, names) as parameters, sdpa_kernel(SDPBackend.MATH):
        total = [{name: torch.zeros_like(vector[name]) for name in names} for vector in vectors]
        samples = 0
        for x, y in now.pairs():
            slopes = torch.autograd.grad(summed_loss(now, x, y), parameters, create_graph=True, allow_unused=True)
            for found, vector in zip(total, vectors, strict=True):
                along = sum((s * vector[n].to(s)).sum() for n, s in zip(names, slopes, strict=True) if s is not None)
                if not isinstance(along, Tensor) or not along.requires_grad:  # a loss without curvature
                    continue
                curved = torch.autograd.grad(along, parameters, retain_graph=True, allow_unused=True)
                for name, product in zip(names, curved, strict=True):
                    found[name] += 0 if product is None else product.detach()
            samples += len(y)
    return [{name: product / samples for name, product in found.items()} for found in total]


def hessian_diagonal(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
    """Diagonal of the Hessian of the mean loss, estimated: the mean of v * H v over vectors of random signs.

    Source: Bekas et al., "An estimator for the diagonal of a matrix", Applied Numerical Mathematics 2007, section 2.
    One vector is exact for a Hessian that is diagonal; there are ``PROBES``.
    """
    own, draw = weights(now.model, names), now.generator
    signs = [
        {
            name: (torch.randint(0, 2, value.shape, generator=draw, device=draw.device) * 2 - 1).to(value)
            for name, value in own.items()
        }
        for _ in range(PROBES)
    ]
    products = hessian_products(now, names, signs)
    return _told({n: sum(p[n] * s[n] for p, s in zip(products, signs, strict=True)) / PROBES for n in names})


def _told(found: dict[str, Tensor]) -> dict[str, Tensor]:
    if not any(bool(value.any()) for value in found.values()):
        raise PrunelabError("the slope of the loss is 0 for every weight, so scores say nothing: see loss= and data")
    return found


def _taylor(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
    slopes, own = loss_gradients(now, names), weights(now.model, names)
    return {name: own[name] * slopes[name] for name in names}


def _saliency(diagonal: Values) -> Values:
    def values(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
        own, curvature = weights(now.model, names), diagonal(now, names)
        return {name: curvature[name] * own[name].square() / 2 for name in names}

    return values


def _grasp(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
    slopes, own = loss_gradients(now, names), weights(now.model, names)
    (product,) = hessian_products(now, names, [slopes])
    return {name: value * product[name] for name, value in own.items()}


# -- of the inputs -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def input_norms(now: Context, layers: Sequence[str]) -> dict[str, Tensor]:
    """L2 norm of every input feature, or input channel, over samples and positions: layer -> float32, 1-D."""
    squares: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = wide(inputs[0]).square()
            found = x.flatten(0, -2).sum(0) if isinstance(layer, nn.Linear) else x.transpose(0, 1).flatten(1).sum(1)
            squares[name] = squares.get(name, 0) + found

        return hook

    hooks = [now.model.get_submodule(layer).register_forward_pre_hook(note(layer)) for layer in layers]
    try:
        with looking(now.model):
            for x in now.inputs():
                call(now.model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: total.sqrt() for layer, total in squares.items()}


def _wanda(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
    layers = {layer_of(name): now.model.get_submodule(layer_of(name)) for name in names}
    if other := [n for n, m in layers.items() if not isinstance(m, nn.Linear | _ConvNd) or unit_axis(m) != 0]:
        kind = type(layers[other[0]]).__name__
        raise PrunelabError(f"layer {other[0]!r} is a {kind}, and wanda knows Linear and Conv: name those in layers=")
    sizes, own = input_norms(now, list(layers)), magnitude(now.model, names)
    if idle := [name for name in names if layer_of(name) not in sizes]:
        why = "is not called as a module (it is unused, or part of an attention), so its inputs are not seen"
        raise PrunelabError(f"layer {layer_of(idle[0])!r} {why}: name the others in layers=")
    found = {name: own[name] * _along_inputs(now.model, name, sizes[layer_of(name)]) for name in names}
    if bad := [name for name, score in found.items() if bool(score.isnan().any())]:
        raise MaskError(f"{bad[0]}: a score is NaN, neither high nor low: look for NaN in the weights or the data")
    return {name: _ranks(score, now.masks[name]) for name, score in found.items()}


def _along_inputs(model: nn.Module, name: str, size: Tensor) -> Tensor:
    """Numbers of input channels in the shape of a weight, groups of a convolution minded."""
    layer, weight = model.get_submodule(layer_of(name)), model.get_parameter(name)
    if isinstance(layer, nn.Linear):
        return size.expand_as(weight)
    per_group = size.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1).flatten(0, 1)
    return per_group.view(*weight.shape[:2], *[1] * (weight.dim() - 2)).expand_as(weight)


def _ranks(score: Tensor, mask: Tensor) -> Tensor:
    """Place of every weight among the live ones of its unit, as a share: so that each unit loses the same share."""
    flat, live = score.flatten(1).masked_fill(~mask.flatten(1), -torch.inf), mask.flatten(1).sum(1, keepdim=True)
    rank = flat.argsort(1).argsort(1).float() - (flat.shape[1] - live)
    return (rank / live.clamp(min=1)).view(score.shape)


def _shares(now: Context, names: Sequence[str]) -> dict[str, Tensor]:
    """The share of its unit's signal that each weight carries: of Linear and Conv2d layers, those of a kernel equal."""
    layers = [layer_of(n) for n in names if isinstance(now.model.get_submodule(layer_of(n)), nn.Linear | nn.Conv2d)]
    found = {}
    for layer, (signal, bias) in signals(now.model, layers, now.inputs()).items():
        weight, total = now.model.get_submodule(layer).weight, signal.sum(1) + (0 if bias is None else bias)
        share = signal / total.clamp(min=torch.finfo(signal.dtype).tiny)[:, None]
        share = share.view(*share.shape, *[1] * (weight.dim() - 2)) / weight[0, 0].numel()
        found[f"{layer}.weight" if layer else "weight"] = share.expand(weight.shape)
    return found


# -- by name -----------------------------------------------------------------------------------------------------------

MAGNITUDE = Score(lambda now, names: magnitude(now.model, names))
SQUARE = Score(lambda now, names: magnitude(now.model, names, 2), finish=torch.sqrt)
SCORES: Mapping[str, Score] = {
    "movement": Score(_since(lambda w, w0: (w - w0).abs()), since_start=True),
    "magnitude_increase": Score(_since(lambda w, w0: w.abs() - w0.abs()), since_start=True),
    "moved_magnitude": Score(_since(lambda w, w0: (w * (w - w0)).abs()), since_start=True),
    "snip": Score(lambda now, names: {n: v.abs() for n, v in _taylor(now, names).items()}, "labels"),
    "taylor": Score(_taylor, "labels", finish=torch.square),
    "wanda": Score(_wanda, "inputs", only="weight", relative="nothing"),
    "batchnorm": Score(lambda now, names: magnitude(now.model, names), only="unit", relative="nothing", scales=True),
    "lamp": Score(lambda now, names: magnitude(now.model, names, 2), relative="larger"),
    "fpgm": Score(lambda now, names: weights(now.model, names), only="unit", along=distances),
    "signal": Score(_shares, "inputs", only="channel", roles=("in",)),
    "obd": Score(_saliency(hessian_diagonal), "labels"),
    "fisher": Score(_saliency(fisher_diagonal), "labels"),
    "grasp": Score(_grasp, "labels"),
    "synflow": Score(synflow, relative="nothing", measured=100),
}
