"""Neural coresets: of a fully connected layer a few neurons are drawn, and what they give on is weighted anew.

Source: Mussay, Osadchy, Braverman, Zhou and Feldman, "Data-Independent Neural Pruning via Coresets", ICLR 2020 (first
as arXiv 1907.04018), and its published code (coreset.py).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import MaskError, Masks
from prunelab.pruners.base import Context, Pruner, Step
from prunelab.pruners.select import Granularity, amount_to_count
from prunelab.pruners.units import unit_masks
from prunelab.settings import settings
from prunelab.structure.collapse import in_order

if TYPE_CHECKING:
    import pandas as pd

MOST = 2**22  # draws, after which the neurons that were never drawn are not waited for (our own limit)
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.GELU, nn.Identity, nn.Dropout)


@settings
class Coreset(Pruner):
    """Neurons are drawn by their sensitivity, and the next layer's weights make up for those that were not drawn.

    Neuron j of a hidden layer, with the incoming weights and bias p_j = (W1[j], b1[j]), gives on W2[:, j] phi(p_j x).
    Its sensitivity is s_j = max_i |W2[i, j]| phi(radius ||p_j||), the most that it can add to any neuron of the next
    layer for inputs no longer than ``radius``. Neurons are drawn with replacement, j with probability s_j / sum(s);
    those that were drawn stay, with their weights and biases as they were, and column j of W2 is multiplied by the
    share of the draws that fell on j, divided by its probability. The biases of the next layer stay. The last hidden
    layer comes first, so that the maximum runs over those neurons of the next layer that are left.

    The published code draws until k neurons were drawn at least once (``"distinct"``): k is what ``amount`` leaves of
    each layer. The paper's analysis has a fixed number of draws (``"fixed"``: k draws, so at most k neurons); only then
    is the expected sum exactly the old one. With ``"distinct"`` it is close to it while k is far below the number of
    neurons. One thing of the code is left out: it takes a new bias from the wrong column, the second one, of p. Our
    own: where nothing has to go no weight changes; one neuron stays at least; neurons that nobody reads are never
    drawn; after 4 million draws fewer than k stay.

    It needs no data. The masks alone, as ``prunelab.prune`` gives them, are half of the method; runs and ``prune_``
    use the weights too; after ``recover="rewind"`` or ``"reinit"`` the weights are others, and are not changed.

    Attributes:
        importance: draw by sensitivity; False: every neuron is as likely.
        reweight: change the outgoing weights; False: only masks.
        draws: when to stop.
        radius: of the inputs that are thought of (beta; the code's ``upper_bound``, 1). With ReLU it changes nothing.
    """

    granularity: ClassVar[Granularity] = "neuron"  # of fully connected layers alone

    importance: bool = True
    reweight: bool = True
    draws: Literal["distinct", "fixed"] = "distinct"
    radius: Annotated[float, Field(gt=0)] = 1.0

    @torch.no_grad()
    def prune(self, now: Context, amount: float) -> Step:
        """Masks, and the outgoing weights of the layers that were thinned out."""
        model, current = now.model, now.masks
        chosen = [pair for pair in pairs(model) if f"{pair.layer}.weight" in current]
        if not chosen:
            raise MaskError(
                "coreset: no masked layer is a Linear that another one reads: leave layers empty, or add it"
            )
        masks, weights = current, {}
        for pair in reversed(chosen):
            read = _there(model, masks, f"{pair.next}.weight")
            incoming = _there(model, masks, f"{pair.layer}.weight")
            alive = masks[f"{pair.layer}.weight"].any(1)
            left = int(alive.sum())
            size = max(left - amount_to_count(amount, left), 1)
            if size >= left:
                continue
            chance = self._probability(pair, incoming, _bias(model, masks, pair.layer), read, alive)
            drawn = draw(chance.cpu(), size, now.generator, self.draws == "distinct").to(alive.device)
            masks = masks & unit_masks(model, {pair.layer: drawn > 0})
            if pair.at_zero != 0:  # a neuron whose weights are 0 would still give this on
                masks &= Masks({f"{pair.next}.weight": (drawn > 0).expand(read.shape)})
            if self.reweight:
                factor = torch.where(drawn > 0, drawn / (drawn.sum() * chance), 0.0)
                name = f"{pair.next}.weight"
                weights[name] = model.get_parameter(name).detach() * factor.to(read.dtype)
        return Step(masks, weights=weights)

    def _probability(self, pair: Pair, incoming: Tensor, bias: Tensor, read: Tensor, alive: Tensor) -> Tensor:
        """Of each neuron to be drawn, float64 [neurons]."""
        size = sensitivity(incoming, bias, read, pair.activation, self.radius) * alive
        if not bool(torch.isfinite(size).all()) or not size.any():
            what = "no neuron has a finite sensitivity above 0" if size.any() else "nothing reads any of its neurons"
            raise PrunelabError(f"coreset: layer {pair.layer!r}: {what}, so none can be drawn: leave the layer out")
        size = size if self.importance else (size > 0).to(size.dtype)
        return size / size.sum()


@dataclass(frozen=True)
class Pair:
    """A fully connected layer and the one that reads it.

    Attributes:
        layer: name of the first.
        next: name of the second.
        activation: what stands between them.
    """

    layer: str
    next: str
    activation: nn.Module

    @property
    def at_zero(self) -> float:
        """What the activation makes of 0."""
        return float(self.activation(torch.zeros(1)))


def pairs(model: nn.Module) -> list[Pair]:
    """Every Linear with the Linear that reads it, in forward order, only activations between them.

    Raises:
        PrunelabError: the model is no (nested) ``nn.Sequential``, so that the order is not known, or has no such pair.
    """
    found: list[Pair] = []
    first: str | None = None
    between: list[nn.Module] = []
    for name, module in in_order(model) or ():
        if isinstance(module, nn.Linear):
            if first is not None:
                found.append(Pair(first, name, nn.Sequential(*between)))
            first, between = name, []
        elif isinstance(module, _ACTIVATIONS):
            between += [] if isinstance(module, nn.Dropout) else [module]
        else:
            first = None
    if not found:
        what = "a Linear that another one reads, with only an activation between them, in a (nested) nn.Sequential"
        raise PrunelabError(f"coreset needs {what}: this {type(model).__name__} has none")
    return found


def sensitivity(weight: Tensor, bias: Tensor, read: Tensor, activation: nn.Module, radius: float = 1.0) -> Tensor:
    """max_i |read[i, j]| |phi(radius ||(weight[j], bias[j])||)|, float64 [n].

    Args:
        weight: incoming weights [n, d].
        bias: [n].
        read: the next layer's weights [q, n].
        activation: phi, element-wise.
        radius: of the inputs.
    """
    points = torch.cat([weight, bias[:, None]], 1).double()
    return read.double().abs().amax(0) * activation(radius * torch.linalg.vector_norm(points, dim=1)).abs()


def draw(probability: Tensor, size: int, generator: Generator, distinct: bool = True) -> Tensor:
    """How often each was drawn, with replacement; int64 [n].

    Args:
        probability: of each, [n], on the CPU; its sum is 1.
        size: distinct ones to wait for (all that can be drawn, where these are fewer); or the number of draws.
        generator: the source of randomness.
        distinct: which of the two ``size`` is.
    """
    if not distinct:
        return torch.multinomial(probability, size, True, generator=generator).bincount(minlength=len(probability))
    size = min(size, int((probability > 0).sum()))
    drawn = torch.empty(0, dtype=torch.int64)
    while True:
        more = torch.multinomial(probability, max(4 * size, len(drawn)), True, generator=generator)
        drawn = torch.cat([drawn, more])
        first = torch.full(probability.shape, len(drawn))
        first.scatter_reduce_(0, drawn, torch.arange(len(drawn)), "amin")
        last = int(first.kthvalue(size).values)  # position of the draw that brought the last one that was waited for
        if last < len(drawn) or len(drawn) >= MOST:
            return drawn[: last + 1].bincount(minlength=len(probability))


@torch.no_grad()
def measure(
    networks: Mapping[int, nn.Module],
    ways: Mapping[str, tuple[str, Mapping[str, Any]]],
    kept: Sequence[float],
    inputs: Tensor,
    labels: Tensor,
    draws: int = 5,
) -> pd.DataFrame:
    """What thinning out does to trained networks before any fine-tuning, averaged over draws.

    Args:
        networks: seed -> network; none of them is changed.
        ways: name -> method and its options.
        kept: shares of the neurons of each layer.
        inputs: as the networks take them, [N, ...].
        labels: [N].
        draws: of each network, way and share, with seeds 0, 1, ...

    Returns:
        One row per way, share and network: strategy, fraction, seed, error (when only the first layer that can be
        thinned out is: of what the next one computes before its activation, root mean square over that of the whole
        network's) and test_accuracy (when all are).
    """
    import pandas as pd

    from prunelab.pruners import prune_  # the registry, which has this file in it

    rows = []
    for seed, model in networks.items():
        first = pairs(model)[0]
        exact = _before(model, first.next, inputs)
        for (name, (method, options)), share in itertools.product(ways.items(), kept):
            errors, right = [], []
            for number in range(draws):
                one, every = copy.deepcopy(model), copy.deepcopy(model)
                prune_(one, method, 1 - share, layers=[first.layer], seed=number, **options)
                prune_(every, method, 1 - share, seed=number, **options)
                errors.append(_distance(_before(one, first.next, inputs), exact))
                right.append(float((every(inputs).argmax(1) == labels).double().mean()))
            rows.append((name, share, seed, sum(errors) / draws, sum(right) / draws))
    return pd.DataFrame(rows, columns=["strategy", "fraction", "seed", "error", "test_accuracy"])


def _distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _before(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, given, output: seen.append(output))
    try:
        model(inputs)
    finally:
        handle.remove()
    return seen[0]


def _there(model: nn.Module, masks: Masks, name: str) -> Tensor:
    """A parameter without what is pruned."""
    value = model.get_parameter(name).detach()
    return value * masks[name].to(value) if name in masks else value


def _bias(model: nn.Module, masks: Masks, layer: str) -> Tensor:
    linear = model.get_submodule(layer)
    return linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else _there(model, masks, f"{layer}.bias")
