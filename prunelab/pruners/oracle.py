"""The greedy oracle of DropNet: of all units the one goes without which the training loss is lowest.

Source: Tan and Motani, ICML 2020, section 4.3, and the code of its authors: after each training every remaining unit is
left out in turn, the loss over the training set is measured with the trained weights, and the best mask is kept.

The losses of all candidates come out of one computation. Leaving a unit out takes its share off the next layer's sums,
so per layer one forward pass gives the activations, products of its size give the shares of all units, and what follows
runs for many candidates at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks, unit_axis
from prunelab.pruners.base import Context, Ranking, Reads
from prunelab.pruners.dropnet import Variant, drop_units, without_units
from prunelab.pruners.roles import norms_behind
from prunelab.pruners.select import Granularity, scored_names, units_of
from prunelab.pruners.units import remaining
from prunelab.settings import settings
from prunelab.structure.chains import ShrinkError, chain, remove_units
from prunelab.structure.forward import logits, looking

_ZERO_STAYS_ZERO = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.Identity, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d)
_BUDGET = 1 << 20  # numbers of the largest intermediate result: 4 MB of float32, which stay near the core
_MOST, _MOST_IMAGES = 2048, 128  # samples in one piece, and where there are convolutions
_LAST = torch.channels_last  # pooling is seven times faster in this order (measured on a CPU)


@settings
class Oracle(Ranking):
    """Drop the unit whose absence raises the training loss least.

    Attributes:
        scope: ``global``: one unit of all; ``layer``: the best one of each layer, each judged by itself (our own).
        variant: ``faithful``: of equal losses the first of the first layer; ``corrected``: one of them at random.
        one: One unit per round, as in the paper; False: the fraction ``amount``, by the losses of leaving out one.
        allow_empty: Whether a layer may lose all.
    """

    granularity: ClassVar[Granularity] = "unit"
    reads: ClassVar[Reads] = "labels"
    classes_only: ClassVar[bool] = True

    scope: Literal["global", "layer"] = "global"
    variant: Variant = "corrected"
    one: bool = True
    allow_empty: bool = False

    @property
    def reads_amount(self) -> bool:
        """Unless one goes whatever the amount."""
        return not self.one

    def scores(self, now: Context) -> dict[str, Tensor]:
        """Layer -> float32 [units]: the mean cross entropy over the batches without the unit; what is gone has inf."""
        units = units_of(now.model, now.masks, scored_names(now.model, now.masks, "unit"))
        losses = losses_without(now.model, units, now.pairs())
        return {layer: loss.float() for layer, loss in losses.items()}

    def select(self, now: Context, scores: Mapping[str, Tensor], amount: float) -> Masks:
        """What is left without the unit of the lowest loss; its bias, and BatchNorm behind it, go with it."""
        left = remaining(now, scores, "unit")
        how = {"scope": self.scope, "faithful": self.variant == "faithful", "one": self.one}
        after = drop_units(scores, left, 0.0 if self.one else amount, now.generator, **how)
        return without_units(now, left, after, "unit", self.allow_empty)


@torch.no_grad()
def losses_without(
    model: nn.Module, units: Mapping[str, Tensor], batches: Iterable[Any] | None, *, batched: bool = True
) -> dict[str, Tensor]:
    """The mean cross entropy without each of the units, one at a time, in evaluation mode.

    Args:
        model: A classifier; the weights of units that are gone already are zero. It is left as it was.
        units: Layer -> bool [units], which of them are there.
        batches: ``(x, y)``, scaled, on the model's device, in pieces of any size.
        batched: All candidates in one computation, for plain chains of layers that this file knows; other models, and
            False, evaluate one candidate after the other.

    Returns:
        Layer -> float64 [units]; inf where a unit is not there.

    Raises:
        PrunelabError: there are no data.
    """
    small = _without_the_gone(model, units) if batched else None
    totals = {layer: torch.full((len(keep),), torch.inf, dtype=torch.float64) for layer, keep in units.items()}
    sums = {layer: torch.zeros(int(keep.sum()), dtype=torch.float64) for layer, keep in units.items()}
    samples = 0
    with looking(model):
        look = _All(small, list(units)) if small is not None else _EachByItself(model, units)
        for x, y in _pieces(batches, look.samples):
            if not samples:
                logits(model, x[:2])  # refused in one line where it does not fit
            samples += len(y)
            for layer, loss in look.losses(x.clone(), y):  # the first layer may work in place
                sums[layer] += loss.cpu()
    if not samples:
        raise PrunelabError("the oracle measures losses: give batches=, pairs of inputs and targets")
    for layer, keep in units.items():
        totals[layer][keep.cpu()] = sums[layer] / samples
    return totals


class _EachByItself:
    """One candidate after the other, in a copy of the model."""

    def __init__(self, model: nn.Module, units: Mapping[str, Tensor]) -> None:
        self.model, self.units, self.samples = copy.deepcopy(model), units, _samples(model)
        norms = norms_behind(model, list(units))
        places = {layer: [layer, *([norms[layer]] if layer in norms else [])] for layer in units}
        self.rows = {
            layer: [row for name in names for row in _by_unit(self.model.get_submodule(name))]
            for layer, names in places.items()
        }

    def losses(self, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Layer by layer the summed losses of its units."""
        for layer, keep in self.units.items():
            found = []
            for unit in keep.nonzero().flatten().tolist():
                before = [parameter[unit].clone() for parameter in self.rows[layer]]
                for parameter in self.rows[layer]:
                    parameter[unit] = 0
                found.append(_cross_entropy(logits(self.model, x), y).double().sum())
                for parameter, row in zip(self.rows[layer], before, strict=True):
                    parameter[unit] = row
            yield layer, torch.stack(found) if found else torch.zeros(0)


def _by_unit(layer: nn.Module) -> list[Tensor]:
    """Its parameters, their units along the first axis; views."""
    return [p.movedim(unit_axis(layer) or 0, 0) if p.dim() > 1 else p for p in layer.parameters(recurse=False)]


class _All:
    """All candidates of a layer as one batch."""

    def __init__(self, model: nn.Sequential, layers: Sequence[str]) -> None:
        self.links = chain(model)
        self.first = list(model)[: [id(m) for m in model].index(id(self.links[0].layer))]
        self.layers = set(layers)
        self.samples = _samples(model)

    def losses(self, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Layer by layer the summed losses of its units."""
        x = x.contiguous(memory_format=_LAST) if x.dim() == 4 else x
        for module in self.first:
            x = module(x)
        for position, link in enumerate(self.links[:-1]):
            x = link.layer(x)
            for module in link.between:
                x = module(x)
            if link.name in self.layers:
                yield link.name, self._layer(position, x, y)

    def _layer(self, position: int, x: Tensor, y: Tensor) -> Tensor:
        """The losses [units] of leaving out each unit of one layer; ``x`` is what the next layer reads."""
        units, following = self.links[position].layer.weight.shape[0], self.links[position + 1].layer
        sums = following(x)
        size = max(_BUDGET // (sums.numel() or 1), 1)
        found = []
        for some in torch.arange(units, device=x.device).split(size):
            changed = _less(following, x, sums, units, some)
            for link, after in zip(self.links[position + 1 :], [*self.links[position + 2 :], None], strict=True):
                if after is not None:
                    for module in link.between:
                        changed = module(changed)
                    changed = after.layer(changed)
            found.append(_cross_entropy(changed, y.repeat(len(some))).view(len(some), -1).double().sum(1))
        return torch.cat(found)


def _less(layer: nn.Linear | nn.Conv2d, x: Tensor, sums: Tensor, units: int, some: Tensor) -> Tensor:
    """The layer's sums ``[K * N, ...]`` without each of K of the units that it reads."""
    if isinstance(layer, nn.Linear):
        inputs = x.view(len(x), units, -1)[:, some].transpose(0, 1)
        weight = layer.weight.view(len(layer.weight), units, -1)[:, some].permute(1, 2, 0)
        return torch.baddbmm(sums.expand(len(some), *sums.shape), inputs, weight, alpha=-1).flatten(0, 1)
    result = sums.new_empty(len(some) * len(sums), *sums.shape[1:]).contiguous(memory_format=_LAST)
    for unit, part in zip(some.tolist(), result.split(len(sums)), strict=True):
        only, kernel = (t[:, unit : unit + 1].contiguous(memory_format=_LAST) for t in (x, layer.weight))
        share = F.conv2d(only, kernel, None, layer.stride, layer.padding, layer.dilation)
        torch.sub(sums, share, out=part)
    return result


def _without_the_gone(model: nn.Module, units: Mapping[str, Tensor]) -> nn.Sequential | None:
    """The chain cut to the units that are there; None where it is no chain, or no weights do not mean 0."""
    try:
        links = chain(model)
        between = [module for link in links[:-1] for module in link.between]
        if links[-1].between or not all(isinstance(m, (*_ZERO_STAYS_ZERO, nn.Flatten)) for m in between):
            return None
        return remove_units(model, {layer: keep.nonzero().flatten().cpu() for layer, keep in units.items()}).model
    except ShrinkError:  # not a chain, or a layer without units, behind which every loss is the same
        return None


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of each sample; without the softmax of ``F.cross_entropy``, which takes five times as long for few classes."""
    return logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]


def _samples(model: nn.Module) -> int:
    return _MOST_IMAGES if any(isinstance(module, nn.Conv2d) for module in model.modules()) else _MOST


def _pieces(batches: Iterable[Any] | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same samples in pieces of at most ``size``, most of them of that size."""
    held: list[tuple[Tensor, Tensor]] = []
    for x, y in batches or ():
        held.append((x, y))
        if sum(len(y) for _, y in held) >= size:
            x, y = held[0] if len(held) == 1 else (torch.cat(parts) for parts in zip(*held, strict=True))
            yield from zip(x.split(size), y.split(size), strict=True)
            held = []
    if held:
        yield tuple(torch.cat(parts) for parts in zip(*held, strict=True))
