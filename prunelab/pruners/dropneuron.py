"""DropNeuron: penalties on the lengths of incoming and outgoing weights, small weights to zero, dead neurons counted.

Source: Pan, Dong and Guo, "DropNeuron: Simplifying the Structure of Deep Neural Networks", arXiv 1606.07326, 2016; the
rules and constants are those of the published code (regularizers.py and its scripts), the paper's tables were not seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError, nearest
from prunelab.masks import Masks, layer_of
from prunelab.pruners.base import Context, Penalty, Pruner, Step
from prunelab.settings import settings

SCALE = 0.1  # of every term, hard-coded in the published code
EPS = 1e-12  # under the root: an all-zero group has the gradient 0, not NaN

CountingRule = Literal["min", "max", "connected"]


@settings
class DropNeuron(Pruner):
    """Trains with group penalties, then sets every weight below a threshold to zero, once, without retraining.

    For W of shape [out, in] of each fully connected layer, with bias b:

    - li(W) = 0.1 sum_j ||W[j, :]||_2: the incoming weights of neuron j;
    - lo(W) = 0.1 sum_i ||W[:, i]||_2: the outgoing weights of neuron i of the layer before;
    - L1 = 0.1 (|W|_1 + |b|_1), L2 = 0.05 (|W|^2 + |b|^2);
    - loss = cross entropy (mean squared error where the targets are numbers) + l1 L1 + l2 L2 + dropneuron (li + lo),
      summed over the layers.

    Neither weights nor biases of convolutions are penalised or dropped, biases never dropped. The gradient of a root at
    0 is that of sqrt(x + 1e-12). Use it with ``rounds=1, recover="none"``: round 0 is before the threshold, round 1
    behind it; ``amount`` means nothing here. ``layers`` has to be left empty, since the penalty holds for every
    fully connected layer.

    Attributes:
        l1: lambda_l1 of the scripts.
        l2: lambda_l2.
        dropneuron: lambda_dropneuron; 0 leaves plain L1 and L2 penalties.
        threshold: weights smaller than this become zero.
        ungrouped: name of a layer without li and lo, which has L1 and L2 alone: the output of the sparse regression.
        convolutions: penalise and drop in convolutions too, li by filter, lo by input channel (our own default for
            what the paper leaves open).
        allow_empty: whether a layer may lose all.
    """

    penalises: ClassVar[bool] = True
    reads_amount: ClassVar[bool] = False

    l1: float = 1e-4
    l2: float = 0.0
    dropneuron: float = 5e-4
    threshold: float = 0.01
    ungrouped: str = ""
    convolutions: bool = False
    allow_empty: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no strength."""
        for name in ("l1", "l2", "dropneuron", "threshold"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} = {value}: should be 0 or more, and finite")

    def penalty(self, model: nn.Module, state: Mapping[str, Tensor]) -> Penalty | None:
        """Gradients of the four terms, in closed form."""
        known = [name for name, _ in self._layers(model)]
        if self.ungrouped and self.ungrouped not in known:
            raise PrunelabError(f"dropneuron: ungrouped = {self.ungrouped!r}: {nearest(self.ungrouped, known)}")
        return None if not (self.l1 or self.l2 or self.dropneuron) else self._gradients

    @torch.no_grad()
    def _gradients(self, model: nn.Module) -> dict[str, Tensor]:
        found = {}
        for name, layer in self._layers(model):
            lengths = 0.0 if name == self.ungrouped else self.dropneuron
            found[f"{name}.weight"] = weight_gradient(layer.weight, self.l1, self.l2, lengths)
            if layer.bias is not None and (self.l1 or self.l2):
                found[f"{name}.bias"] = weight_gradient(layer.bias, self.l1, self.l2, 0.0)
        return found

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
        kinds = (nn.Linear, nn.Conv2d) if self.convolutions else nn.Linear
        return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))

    @torch.no_grad()
    def prune(self, now: Context, amount: float) -> Step:
        """What is left when every weight below the threshold is gone; the amount means nothing."""
        current = now.masks
        names = [f"{name}.weight" if name else "weight" for name, _ in self._layers(now.model)]
        if not any(name in current for name in names):
            raise PrunelabError("dropneuron: the model has no fully connected layer; say convolutions=True, or another")
        big = {name: now.model.get_parameter(name).abs() >= self.threshold for name in names if name in current}
        after = current & Masks(big)
        for name in big:
            if current.counts[name] and not after.counts[name] and not self.allow_empty:
                what = f"layer {layer_of(name)!r} would lose every weight at threshold = {self.threshold:g}"
                raise PrunelabError(f"{what}: lower it, penalise less, or say allow_empty=True")
        return Step(after)


def weight_gradient(weight: Tensor, l1: float, l2: float, dropneuron: float) -> Tensor:
    """Gradient of l1 L1 + l2 L2 + dropneuron (li + lo) with respect to one weight [out, in, ...], or bias [out].

    Args:
        weight: float tensor; of leading axes several matrices may be piled by ``torch.vmap``.
        l1: coefficient before the factor 0.1.
        l2: likewise.
        dropneuron: likewise; has to be 0 for a bias.
    """
    total = weight.sign() * (SCALE * l1) if l1 else torch.zeros_like(weight)
    if l2:
        total = total + SCALE * l2 * weight
    if dropneuron:
        square = weight.square()
        rows = tuple(range(1, weight.dim()))
        columns = (0, *range(2, weight.dim()))
        lengths = (square.sum(rows, keepdim=True) + EPS).rsqrt() + (square.sum(columns, keepdim=True) + EPS).rsqrt()
        total = torch.addcmul(total, weight, lengths, value=SCALE * dropneuron)
    return total


def neurons_left(weights: Sequence[Tensor], rule: CountingRule = "min") -> list[int]:
    """Neurons left of the inputs, each hidden layer and the outputs, by which weights are not zero.

    Args:
        weights: matrices [out, in] of consecutive layers, in forward order; masks will do.
        rule: ``"min"``, as the scripts report: of a hidden layer the smaller of the neurons with an incoming and those
            with an outgoing weight; ``"max"``, as convnet.py does; ``"connected"``: neurons with both, on a path from
            the inputs to the outputs (our own; the others count a neuron that leads nowhere).
    """
    kept = [weight != 0 for weight in weights]
    if rule == "connected":
        kept = connected(weights)
    choose = max if rule == "max" else min
    hidden = [choose(int(a.any(1).sum()), int(b.any(0).sum())) for a, b in itertools.pairwise(kept)]
    return [int(kept[0].any(0).sum()), *hidden, int(kept[-1].any(1).sum())]


def connected(weights: Sequence[Tensor]) -> list[Tensor]:
    """Which weights lie on a path from an input to an output: bool, in the shapes of ``weights``.

    A neuron without incoming weights is constant and can be folded into the next biases; one without outgoing ones is
    not read. One pass forward and one backward find all that die with them.
    """
    kept = [weight != 0 for weight in weights]
    for i in range(1, len(kept)):
        kept[i] = kept[i] & kept[i - 1].any(1)
    for i in range(len(kept) - 2, -1, -1):
        kept[i] = kept[i] & kept[i + 1].any(0)[:, None]
    return kept


def report(weights: Sequence[Tensor], rule: CountingRule = "min") -> dict[str, float]:
    """The numbers that the published scripts print, and the honest count beside them, of thresholded matrices.

    Args:
        weights: as for ``neurons_left``.
        rule: by which neurons count.

    Returns:
        ``weights``, ``weights_total``, ``density``, ``compression_ratio`` (of these matrices alone), ``neurons`` and
        ``neurons_share`` by the rule, ``connected_weights``, ``connected_neurons`` and ``neurons_total``.
    """
    total, left = sum(w.numel() for w in weights), sum(int(torch.count_nonzero(w)) for w in weights)
    everything = weights[0].shape[1] + sum(len(w) for w in weights)
    found = {"weights": left, "weights_total": total, "density": left / total}
    found["compression_ratio"] = total / left if left else float("inf")
    found |= {"neurons": sum(neurons_left(weights, rule)), "neurons_total": everything}
    found["neurons_share"] = found["neurons"] / everything
    found["connected_weights"] = sum(int(k.sum()) for k in connected(weights))
    return found | {"connected_neurons": sum(neurons_left(weights, "connected"))}
