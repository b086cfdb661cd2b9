"""NNrelief: connections go that carry little of the signal of their neuron or filter.

Source: Dekhovich, Tax, Sluiter and Bessa, "Neural network relief: a pruning algorithm based on neural activity",
Machine Learning 113 (2024), and the code of its authors. Of the paper the equations are known, of the code every rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks, layer_of
from prunelab.pruners.base import Context, Pruner, Reads, Step
from prunelab.pruners.liveness import mean_sizes, silent_units, unit_rows, unread_units
from prunelab.pruners.roles import outputs
from prunelab.pruners.signals import Reduce, carries, inputs, pruning_set, signals
from prunelab.settings import settings
from prunelab.structure.forward import masked
from prunelab.structure.graph import Graph, trace


@settings
class NNrelief(Pruner):
    """Keep, of every neuron and filter, the fewest connections that carry the share alpha of its signal.

    The signal of connection i of unit j is mean |w_ij x_i| over the pruning set, for a filter the mean norm of
    |K_ij| * |x_i|, and |b_j| (for a filter times sqrt of the positions) for the bias. Then units without a signal go
    (their activation is 0 over the whole pruning set), and those that nobody reads. Where two values are added, as in
    residual blocks, the filter goes that adds less than (1 - alpha) / alpha of what comes over the other side, and the
    channel of a shortcut is closed that brings less than that of what the filter adds. Closing takes a ``Gate`` in the
    shortcut, as the models of this package have; one without is left open.

    The rule itself decides how much goes: the ``amount`` of a round is not read, whatever it is.

    ``corrected``: exactly the smallest set that reaches alpha stays; a filter goes with its BatchNorm; what nobody
    reads goes until nothing changes. ``faithful``: as the published code: also what equals the first that goes, and at
    least one connection of every unit; convolutions first, by the activations of this step before anything went, then
    fully connected layers on the pruned convolutions; backwards once; with additions the first convolution stays, and
    so does the BatchNorm of filters that lose to a shortcut. One thing of that code needs more than masks, and is left
    out: it sets BatchNorm of dead filters to 0 only once.

    Attributes:
        alpha_fc: share of the signal that stays, of fully connected layers (0.95, the published default).
        alpha_conv: likewise, of convolutions (0.9, published for LeNet-5; 0.95 for the others).
        conv_reduce: the norm over positions: ``mean_of_norm`` (the paper), ``norm_of_mean`` (its code for VGG and
            ResNet), ``sum`` (its code for LeNet). None: the paper's, and with ``faithful`` that of the code, which has
            BatchNorm in VGG and ResNet and none in LeNet: models are told apart by that.
        samples: size of the pruning set (1,000, the published default); 0: all that is given, batch by batch if it can
            be gone through more than once.
        set_seed: draws the pruning set, which is the same in all rounds.
        variant: the paper's text made exact, or its code.
        allow_empty: whether a layer may lose all its weights.
    """

    reads: ClassVar[Reads] = "inputs"
    reads_amount: ClassVar[bool] = False

    alpha_fc: float = 0.95
    alpha_conv: float = 0.9
    conv_reduce: Reduce | None = None
    samples: int = 1000
    set_seed: int = 0
    variant: Literal["faithful", "corrected"] = "corrected"
    allow_empty: bool = False

    def __post_init__(self) -> None:
        """Refuse shares that mean nothing."""
        for name in ("alpha_fc", "alpha_conv"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: should be above 0 and at most 1")
        if self.samples < 0:
            raise ValueError(f"samples = {self.samples}: should be a number of samples, or 0 for all")

    def prune(self, now: Context, amount: float) -> Step:
        """What carries the signal; beyond the pruning set it needs about 64 MB, however many batches there are."""
        given = now.batches()
        again = not self.samples and iter(given) is not given
        data = _Again(now) if again else pruning_set(now.inputs(), self.samples, self.set_seed)
        graph = trace(now.model, next(inputs(data))[:2])
        _understood(graph)
        once = _Once(self, now.model, graph, data)
        return Step(once.faithful(now.masks) if self.variant == "faithful" else once.corrected(now.masks))


@dataclass(frozen=True)
class _Again:
    """The inputs, batch by batch, as often as they are asked for."""

    now: Context

    def __iter__(self) -> Iterator[Any]:
        return self.now.inputs()


@dataclass(frozen=True)
class _Once:
    """One pruning of one model."""

    rule: NNrelief
    model: nn.Module
    graph: Graph
    data: Any

    def corrected(self, current: Masks) -> Masks:
        after = self._chosen(current, _layers(current))
        after &= self._weaker(after)
        after &= self._silent(after, _layers(current))
        return after & self._unread(after)

    def faithful(self, current: Masks) -> Masks:
        convs, dense = _layers(current, 4), _layers(current, 2)
        first = next((node.module_name for node in self.graph.weighted() if node.kind == "conv"), "")
        spared = {first} if any(node.kind == "add" for node in self.graph) else set()
        after = current
        for layers in filter(None, (convs, dense)):  # the second part sees the first one pruned
            before = after
            after &= self._chosen(before, [name for name in layers if name not in spared])
            if layers is convs:
                after &= self._weaker(before)
            after &= self._silent(before, layers, spared)
        return after & self._unread(after, forward=False, spared=spared)

    def _reduce(self) -> Reduce:
        """The norm over positions, of the variant where none was asked for."""
        if self.rule.conv_reduce is not None or self.rule.variant == "corrected":
            return self.rule.conv_reduce or "mean_of_norm"
        normed = any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())
        return "norm_of_mean" if normed else "sum"

    def _chosen(self, masks: Masks, layers: list[str]) -> Masks:
        """The alpha rule for every unit of some layers, by the signals of the network with these masks."""
        rule, found = self.rule, {}
        with masked(self.model, masks):
            for layer, (signal, bias) in signals(self.model, layers, self.data, self._reduce()).items():
                weight = self.model.get_submodule(layer).weight
                together = signal if bias is None else torch.cat([signal, bias[:, None]], 1)
                alpha = rule.alpha_conv if weight.dim() == 4 else rule.alpha_fc
                keep = carries(together, alpha, rule.variant == "faithful")
                kernels = keep[:, : signal.shape[1]]
                kernels = kernels.view(*kernels.shape, *[1] * (weight.dim() - 2))
                found[f"{layer}.weight"] = kernels.expand(weight.shape)
                if bias is not None:
                    found[f"{layer}.bias"] = keep[:, -1]
        return Masks(found)

    def _silent(self, masks: Masks, layers: list[str], spared: set[str] = frozenset()) -> Masks:  # type: ignore[assignment]
        """Units whose activation is 0 over the whole pruning set go, but none of those that are the outputs."""
        answers = outputs(self.model)
        layers = [name for name in layers if self.model.get_submodule(name) not in answers]
        if not layers:
            return Masks({})
        with masked(self.model, masks):
            heard = silent_units(self.model, self.graph, layers, self.data)
        gates = {gate: heard[layer] for gate, layer in _gates(self.graph, masks).items() if layer in heard}
        return self._rows(heard | gates, spared)

    def _weaker(self, masks: Masks) -> Masks:
        """In every addition the sides that end in a masked convolution against the other one, channel by channel.

        So do gates, which stay open where both bring as much.
        """
        sides = _sides(self.graph, masks)
        if not sides:
            return Masks({})
        least = (1 - self.rule.alpha_conv) / self.rule.alpha_conv
        with masked(self.model, masks):
            sizes = mean_sizes(
                self.model, self.graph, {n for own, other in sides.values() for n in (own, other)}, self.data
            )
        level = {name: size.flatten(1).norm(dim=1) for name, size in sizes.items()}
        keep = {
            layer: (level[own] >= least * level[other]) | (level[own] > level[other])
            for layer, (own, other) in sides.items()
        }
        for gate, layer in _gates(self.graph, masks).items():
            other, own = (level[name] for name in sides[layer])
            keep[gate] = (own >= least * other) | (own >= other)
        return unit_rows(self.model, self.graph, keep, norms=self.rule.variant != "faithful")

    def _unread(self, masks: Masks, forward: bool = True, spared: set[str] = frozenset()) -> Masks:  # type: ignore[assignment]
        """Units of masked layers that nothing on the way to the output reads go."""
        found = unread_units(self.model, self.graph, masks, forward)
        names = [*_layers(masks), *_gates(self.graph, masks)]
        return self._rows({name: found[name] for name in names if name in found}, spared)

    def _rows(self, units: Mapping[str, Tensor], spared: set[str]) -> Masks:
        """Rows without the absent units; of spared layers only those of their BatchNorm."""
        rows = unit_rows(self.model, self.graph, units)
        return Masks({name: mask for name, mask in rows.items() if layer_of(name) not in spared})


def _layers(masks: Masks, dim: int = 0) -> list[str]:
    """The masked Linear (dim 2) or Conv2d layers (4), or both, in forward order."""
    return [layer_of(n) for n, m in masks.items() if n.endswith("weight") and m.dim() in ((dim,) if dim else (2, 4))]


def _sides(graph: Graph, masks: Masks) -> dict[str, tuple[str, str]]:
    """Convolution that ends one side of an addition, perhaps with BatchNorm -> that side's value and the other one."""
    found: dict[str, tuple[str, str]] = {}
    for node in graph:
        if node.kind != "add" or len(node.inputs) != 2 or len(node.shape) != 4:
            continue
        for own, other in (node.inputs, node.inputs[::-1]):
            source = graph[own]
            source = graph[source.inputs[0]] if source.kind == "batchnorm" else source
            if source.kind == "conv" and f"{source.module_name}.weight" in masks and source.module.groups == 1:
                found.setdefault(source.module_name, (own, other))
    return found


def _gates(graph: Graph, masks: Masks) -> dict[str, str]:
    """Gate -> the masked convolution to whose filters it adds."""
    found: dict[str, str] = {}
    for layer, (_, other) in _sides(graph, masks).items():
        if graph[other].kind == "gate":
            found.setdefault(graph[other].module_name, layer)
    return found


def _understood(graph: Graph) -> None:
    """Refuse a model with an operation whose channels cannot be followed."""
    for node in graph:
        if node.kind == "opaque":
            raise PrunelabError(
                f"nnrelief does not understand {node.where}: it knows Linear, Conv2d, BatchNorm, activations, pooling, "
                "flattening and additive skips; choose the layers before it, or another method"
            )
