"""The scores that pruning libraries offer beside magnitude: one class, one name for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.structure.watch import evaluating
from prunelab.masks import MaskError, Masks, layer_of
from prunelab.pruners.activations import logits
from prunelab.pruners.scores import reduce_to_units, wide
from prunelab.pruners.select import Granularity, Scope, lowest_go, norms_behind, remove_lowest, scored_names
from prunelab.settings import settings

Score = Literal["movement", "magnitude_increase", "moved_magnitude", "snip", "taylor", "wanda", "batchnorm"]
_SINCE = ("movement", "magnitude_increase", "moved_magnitude")
_GRADIENT = ("snip", "taylor")


@settings
class Criterion:
    """Weights, neurons or filters by one of the scores of the field; higher = keep.

    ``movement``: |w - w0|; ``magnitude_increase``: |w| - |w0|; ``moved_magnitude``: |w (w - w0)|, with w0 the weights
    at the start (fasterai's criteria of these names; Zhou et al., "Deconstructing Lottery Tickets", NeurIPS 2019,
    section 3). ``snip``: |w dL/dw| (Lee et al., ICLR 2019, eq. 5), of a network before training as published.
    ``taylor``: (w dL/dw) squared; for units the square of the sum over the unit (Molchanov et al., CVPR 2019, eq. 8).
    ``wanda``: |w| times the norm of its input over the data, compared within each output unit (Sun et al., ICLR 2024,
    eq. 1). ``batchnorm``: |scale| of the BatchNorm behind a filter (Liu et al., "Network Slimming", ICCV 2017).

    A unit's score is the sum over its incoming weights, divided by the mean over the units that its layer still has, as
    for ``Magnitude``; that of ``batchnorm`` is taken as it is, since the scales compete in the paper.

    Attributes:
        score: which.
        granularity: what goes.
        scope: whether all compete, or those of each layer; ``wanda`` compares within each unit whatever is said here.
        allow_empty: whether a layer may lose all.
    """

    score: Score = "taylor"
    granularity: Granularity = "weight"
    scope: Scope = "global"
    allow_empty: bool = False

    def __post_init__(self) -> None:
        """Refuse scores of things that have none."""
        if self.score == "batchnorm" and self.granularity == "weight":
            raise ValueError("score 'batchnorm' is one of whole units: choose granularity 'filter', 'neuron' or 'unit'")
        if self.score == "wanda" and self.granularity != "weight":
            raise ValueError("score 'wanda' compares the weights of one unit: choose granularity 'weight'")

    @property
    def needs_start(self) -> bool:
        """Whether it compares with the weights at the start, so that ``since`` has to be told them."""
        return self.score in _SINCE

    @property
    def needs_data(self) -> bool:
        """Whether it looks at inputs and targets."""
        return self.score in (*_GRADIENT, "wanda")

    def since(self, start: Mapping[str, Tensor]) -> Since:
        """The same criterion, with the weights at the start: parameter name -> tensor."""
        return Since(self, start)

    def scores(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None,
        current: Masks,
        generator: Generator,
        start: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Per parameter, or per layer one score per unit."""
        names = scored_names(model, current, self.granularity)
        if self.score == "batchnorm":
            return _scales(model, names)
        single = self._weights(model, names, batches, start)
        if self.score == "wanda":
            return {name: _ranks(score, current[name]) for name, score in single.items()}
        if self.granularity == "weight":
            return {name: score.square() if self.score == "taylor" else score for name, score in single.items()}
        units = reduce_to_units(model, single, names)
        if self.score == "taylor":
            units = {layer: total.square() for layer, total in units.items()}
        live = {layer_of(name): current[name].flatten(1).any(1) for name in names}
        means = {layer: score[live[layer]].abs().mean() for layer, score in units.items()}
        return {n: s / means[n].clamp(min=torch.finfo(s.dtype).tiny) for n, s in units.items()}

    def _weights(
        self, model: nn.Module, names: Sequence[str], batches: Iterable[Any] | None, start: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """A score for every single weight; that of ``taylor`` still has its sign, so that it can be summed."""
        now = {name: wide(model.get_parameter(name).detach()) for name in names}
        if self.score in _SINCE:
            if lacking := [name for name in names if name not in (start or {})]:
                what = "give start=, their state_dict" + f", which has no {lacking[0]!r}" * (start is not None)
                raise PrunelabError(f"score {self.score!r} compares with the weights before training: {what}")
            if odd := [name for name in names if start[name].shape != now[name].shape]:
                shapes = f"{tuple(start[odd[0]].shape)} in start= and {tuple(now[odd[0]].shape)} in the model"
                raise PrunelabError(f"{odd[0]} has shapes {shapes}: give the state_dict of this very model")
            first = {name: start[name].detach().to(now[name]) for name in names}
            if self.score == "movement":
                return {name: (now[name] - first[name]).abs() for name in names}
            if self.score == "magnitude_increase":
                return {name: now[name].abs() - first[name].abs() for name in names}
            return {name: (now[name] * (now[name] - first[name])).abs() for name in names}
        if self.score in _GRADIENT:
            slopes = loss_gradients(model, names, batches)
            found = {name: now[name] * slopes[name] for name in names}
            return {name: value.abs() for name, value in found.items()} if self.score == "snip" else found
        sizes = input_norms(model, [layer_of(name) for name in names], batches)
        if idle := [name for name in names if layer_of(name) not in sizes]:
            why = "is not called as a module (it is unused, or part of an attention), so its inputs are not seen"
            raise PrunelabError(f"layer {layer_of(idle[0])!r} {why}: name the others in layers=")
        return {name: now[name].abs() * _along_inputs(model, name, sizes[layer_of(name)]) for name in names}

    def select(
        self, model: nn.Module, scores: Mapping[str, Tensor], current: Masks, amount: float, generator: Generator
    ) -> Masks:
        """What is left when the lowest scores are gone."""
        options = {"granularity": self.granularity, "scope": self.scope, "allow_empty": self.allow_empty}
        if self.score == "wanda":
            options["scope"] = "layer"
        return remove_lowest(model, scores, current, amount, generator, **options)

    masks = lowest_go  # reads batches for snip, taylor and wanda


class Since:
    """A criterion that knows the weights at the start."""

    def __init__(self, criterion: Criterion, start: Mapping[str, Tensor]) -> None:
        self.criterion, self.start = criterion, start
        self.granularity, self.allow_empty = criterion.granularity, criterion.allow_empty

    def scores(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, generator: Generator
    ) -> dict[str, Tensor]:
        """Those of the criterion."""
        return self.criterion.scores(model, batches, current, generator, self.start)

    def select(
        self, model: nn.Module, scores: Mapping[str, Tensor], current: Masks, amount: float, generator: Generator
    ) -> Masks:
        """That of the criterion."""
        return self.criterion.select(model, scores, current, amount, generator)

    masks = lowest_go


@settings
class NofM:
    """Of every M weights along the inputs of a unit the N largest stay: 2:4, as GPUs multiply it fast.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3. Layers whose inputs are no
    multiple of M stay whole (our own rule); the ``amount`` of a round is not read, since N and M decide.

    Attributes:
        n: weights that stay,
        m: of so many.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Refuse patterns that mean nothing."""
        if not 1 <= self.n < self.m:
            raise ValueError(f"n = {self.n}, m = {self.m}: should be 1 or more, and fewer than m")

    def masks(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, amount: float, generator: Generator
    ) -> Masks:
        """Needs no data; weights that are gone already count as the smallest."""
        found = {}
        for name, mask in current.items():
            weight = model.get_parameter(name).detach().abs() * mask
            if weight.dim() < 2 or weight.shape[1] % self.m:
                continue
            groups = weight.movedim(1, -1).reshape(-1, self.m)  # neighbours along the inputs
            best = groups.topk(self.n, dim=1).indices
            keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
            found[name] = keep.view(weight.movedim(1, -1).shape).movedim(-1, 1)
        if not found:
            raise MaskError(f"no layer has inputs in multiples of {self.m}, so {self.n}:{self.m} fits none of them")
        return current & Masks(found)


def loss_gradients(model: nn.Module, names: Sequence[str], batches: Iterable[Any] | None) -> dict[str, Tensor]:
    """Gradient of the mean cross entropy over all batches, in evaluation mode; ``.grad`` stays as it was.

    Args:
        model: any classifier.
        names: parameters.
        batches: (inputs, targets).
    """
    parameters = [model.get_parameter(name) for name in names]
    frozen = [parameter.requires_grad for parameter in parameters]
    total, samples = [torch.zeros_like(wide(parameter)) for parameter in parameters], 0
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for x, y in _pairs(batches):
                loss = F.cross_entropy(wide(logits(model, x)), y, reduction="sum")
                slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
                for own, slope in zip(total, slopes, strict=True):
                    own += 0 if slope is None else slope  # None: an unused layer
                samples += len(y)
    finally:
        for parameter, required in zip(parameters, frozen, strict=True):
            parameter.requires_grad_(required)
    return {name: own / samples for name, own in zip(names, total, strict=True)}


@torch.no_grad()
def input_norms(model: nn.Module, layers: Sequence[str], batches: Iterable[Any] | None) -> dict[str, Tensor]:
    """L2 norm of every input feature, or input channel, over samples and positions: layer -> float32, 1-D."""
    squares: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = wide(inputs[0]).square()
            found = x.flatten(0, -2).sum(0) if isinstance(layer, nn.Linear) else x.sum((0, 2, 3))
            squares[name] = squares.get(name, 0) + found

        return hook

    hooks = [model.get_submodule(layer).register_forward_pre_hook(note(layer)) for layer in layers]
    try:
        with evaluating(model):
            for x, _ in _pairs(batches):
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: total.sqrt() for layer, total in squares.items()}


def _pairs(batches: Iterable[Any] | None) -> Iterable[tuple[Tensor, Tensor]]:
    seen = False
    for batch in batches or ():
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise PrunelabError("this score looks at inputs and targets: give batches= of pairs (x, y)")
        seen = True
        yield batch[0], batch[1]
    if not seen:
        raise PrunelabError("this score looks at data: give batches=, pairs of inputs and targets")


def _along_inputs(model: nn.Module, name: str, size: Tensor) -> Tensor:
    """Numbers of input channels in the shape of a weight, groups of a convolution minded."""
    layer, weight = model.get_submodule(layer_of(name)), model.get_parameter(name)
    if isinstance(layer, nn.Linear):
        return size.expand_as(weight)
    per_group = size.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1).flatten(0, 1)
    return per_group.view(*weight.shape[:2], 1, 1).expand_as(weight)


def _ranks(score: Tensor, mask: Tensor) -> Tensor:
    """Place of every weight among the live ones of its unit, as a share: so that each unit loses the same share."""
    flat, live = score.flatten(1).masked_fill(~mask.flatten(1), -torch.inf), mask.flatten(1).sum(1, keepdim=True)
    rank = flat.argsort(1).argsort(1).float() - (flat.shape[1] - live)
    return (rank / live.clamp(min=1)).view(score.shape)


def _scales(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    behind = norms_behind(model, [layer_of(name) for name in names])
    found = {layer: model.get_submodule(norm) for layer, norm in behind.items()}
    scales = {layer: norm.weight.detach().abs() for layer, norm in found.items() if norm.affine}
    if not scales:
        raise MaskError("score 'batchnorm': no layer that may be pruned has a BatchNorm with a scale behind it")
    return scales
