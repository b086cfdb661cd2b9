"""NNrelief: connections go that carry little of the signal of their neuron or filter.

Source: Dekhovich, Tax, Sluiter and Bessa, "Neural network relief: a pruning algorithm based on neural activity",
Machine Learning 113 (2024), and the code of its authors. Of the paper the equations are known, of the code every rule.

No score needs a loop over samples, neurons or positions. |w x| = |w| |x|, so a fully connected layer needs the mean of
|x| alone. A kernel's response |K| * |x| has the Frobenius norm sqrt(k G k'), where k is |K| as a row and G = P' P the
Gram matrix of the patches P of one channel of one sample: one small matrix product per channel serves all kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from prunelab.chains import ShrinkError, chain
from prunelab.errors import PrunelabError
from prunelab.graph import Graph, trace
from prunelab.masks import Masks, layer_of
from prunelab.pruners.activations import evaluating, unit_sums
from prunelab.pruners.select import unit_masks
from prunelab.settings import settings
from prunelab.shrink import unread_units

Reduce = Literal["mean_of_norm", "norm_of_mean", "sum"]
_BUDGET = 1 << 24  # numbers of the largest intermediate result: 64 MB of float32
_PIECE = 256  # samples in a piece of the pruning set


@settings
class NNrelief:
    """Keep, of every neuron and filter, the fewest connections that carry the share alpha of its signal.

    The signal of connection i of unit j is mean |w_ij x_i| over the pruning set, for a filter the mean norm of
    |K_ij| * |x_i|, and |b_j| (for a filter times sqrt of the positions) for the bias. Then units without a signal go
    (their activation is 0 over the whole pruning set), and those that nobody reads. In residual blocks whose second
    convolution adds less than (1 - alpha) / alpha of what comes over the shortcut, that filter goes.

    The rule itself decides how much goes: the ``amount`` of a round is not read.

    ``corrected``: exactly the smallest set that reaches alpha stays; a filter goes with its BatchNorm; what nobody
    reads goes until nothing changes. ``faithful``: as the published code: also what equals the first that goes, and at
    least one connection of every unit; fully connected layers see the convolutions as pruned; one pass backwards (on
    chains: for residual networks the published passes know one architecture only, and ours is used).

    Attributes:
        alpha_fc: share of the signal that stays, of fully connected layers (0.95, the published default).
        alpha_conv: likewise, of convolutions (0.9, published for LeNet-5; 0.95 for the others).
        conv_reduce: the norm over positions: ``mean_of_norm`` (the paper), ``norm_of_mean`` (its code for VGG and
            ResNet), ``sum`` (its code for LeNet).
        samples: size of the pruning set (1,000, the published default); 0: the whole training part.
        set_seed: draws the pruning set, which is the same in all rounds.
        variant: the paper's text made exact, or its code.
    """

    alpha_fc: float = 0.95
    alpha_conv: float = 0.9
    conv_reduce: Reduce = "mean_of_norm"
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

    def masks(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, amount: float, generator: Generator
    ) -> Masks:
        """What carries the signal; beyond the pruning set it needs about 64 MB, however many batches there are."""
        if batches is None:
            raise PrunelabError("nnrelief looks at data: give batches of inputs, prune(..., batches=loader)")
        x = pruning_set(batches, self.samples, self.set_seed)
        graph = trace(model, x[:2])
        _understood(graph)
        faithful = self.variant == "faithful"
        convs = [name for name in current if name.endswith("weight") and current[name].dim() == 4]
        dense = [name for name in current if name.endswith("weight") and current[name].dim() == 2]
        after = current
        stages = [convs, dense] if faithful and convs else [convs + dense]
        for names in filter(None, stages):  # the published code runs the fully connected part on pruned convolutions
            with _pruned(model, after):
                scores = signals(model, [layer_of(name) for name in names], x, self.conv_reduce)
            after &= self._chosen(model, after, scores)
        if not faithful:
            after &= self._residual(model, graph, after, x)
        after &= self._silent(model, after, x)
        one_pass = _one_pass_backwards(model, after) if faithful else None
        return after & (unread_units(model, after, x[:2]) if one_pass is None else one_pass)

    def _chosen(self, model: nn.Module, current: Masks, scores: Mapping[str, tuple[Tensor, Tensor | None]]) -> Masks:
        """The alpha rule for every unit of the scored layers."""
        found = {}
        for layer, (signal, bias) in scores.items():
            weight = model.get_submodule(layer).weight
            alpha = self.alpha_conv if weight.dim() == 4 else self.alpha_fc
            together = signal if bias is None else torch.cat([signal, bias[:, None]], 1)
            keep = carries(together, alpha, self.variant == "faithful")
            kernels = keep[:, : signal.shape[1]]
            found[f"{layer}.weight"] = kernels.view(*kernels.shape, *[1] * (weight.dim() - 2)).expand(weight.shape)
            if bias is not None:
                found[f"{layer}.bias"] = keep[:, -1]
        return Masks(found)

    def _silent(self, model: nn.Module, current: Masks, x: Tensor) -> Masks:
        """Units whose activation is 0 over the whole pruning set go, with their bias (and, corrected, BatchNorm)."""
        layers = _hidden(model, current)
        if not layers:
            return Masks({})
        with _pruned(model, current):
            sums, _ = unit_sums(model, layers, _pieces(x), lambda a, positions: a.abs().sum((0, *positions)))
        return unit_masks(model, {layer: sums[layer] > 0 for layer in layers})

    def _residual(self, model: nn.Module, graph: Graph, current: Masks, x: Tensor) -> Masks:
        """In every addition the side that ends in a masked convolution against the other one, channel by channel."""
        pairs = {}
        for node in graph:
            if node.kind == "add" and len(node.inputs) == 2 and len(node.shape) == 4:
                for own, other in (node.inputs, node.inputs[::-1]):
                    source = graph[own]
                    source = graph[source.inputs[0]] if source.kind == "batchnorm" else source
                    known = source.kind == "conv" and f"{source.module_name}.weight" in current
                    if known and source.module.groups == 1:
                        pairs.setdefault(source.module_name, (own, other))
                        break
        if not pairs:
            return Masks({})
        least = (1 - self.alpha_conv) / self.alpha_conv
        with _pruned(model, current):
            levels = _norms_of_means(model, {name for pair in pairs.values() for name in pair}, x)
        keep = {layer: levels[own] >= least * levels[other] for layer, (own, other) in pairs.items()}
        return unit_masks(model, keep)


def pruning_set(batches: Iterable[Any], samples: int, seed: int) -> Tensor:
    """So many inputs, drawn evenly from all batches in one pass; 0: all of them.

    Args:
        batches: inputs, or (inputs, targets).
        samples: how many; fewer where there are not so many.
        seed: draws them.
    """
    draw = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    keys = torch.empty(0)
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        keys = torch.cat([keys, torch.rand(len(x), generator=draw)])
        kept.append(x)
        if samples and len(keys) > samples:  # the smallest keys so far: an even sample of what was seen
            keys, chosen = keys.topk(samples, largest=False)
            kept = [torch.cat(kept)[chosen.to(x.device)]]
    if not kept:
        raise PrunelabError("nnrelief got no batch: give at least one batch of inputs")
    return torch.cat(kept)


@torch.no_grad()
def signals(
    model: nn.Module, layers: list[str], x: Tensor, reduce: Reduce = "mean_of_norm"
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What every connection and bias contributes to its unit, before it is divided by the sum S_j.

    Args:
        model: any module; it is not changed.
        layers: names of Linear and Conv2d layers.
        x: the pruning set, [N, ...].
        reduce: the norm over the positions of a map.

    Returns:
        layer -> float32 [outputs, inputs of a unit], and [outputs] for the bias or None.
    """
    sums: dict[str, Tensor] = {}
    positions: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            size = inputs[0].abs()
            if isinstance(layer, nn.Linear):
                found = size.flatten(0, -2).sum(0) / (size[0].numel() / size.shape[-1])
            elif reduce == "mean_of_norm":
                found = _norms(size, layer).sum(0)
            else:
                found = size.sum(0)
            sums[name] = sums.get(name, 0) + found
            positions[name] = output[0, 0].numel() if output.dim() == 4 else 1

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    try:
        with evaluating(model):
            for piece in _pieces(x):
                model(piece)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name in layers:
        layer, mean = model.get_submodule(name), sums[name] / len(x)
        size = layer.weight.abs()
        if isinstance(layer, nn.Linear):
            signal = size * mean
        elif reduce == "mean_of_norm":
            signal = mean
        elif reduce == "norm_of_mean":
            signal = _norms(mean[None], layer)[0]
        else:
            boxes = _patches(mean[None], layer).sum(-1)[0]  # [channels, k k]: |x| summed where each weight meets it
            signal = _per_group(boxes, size, layer)
        bias = None
        if layer.bias is not None:
            bias = layer.bias.abs() * (positions[name] if reduce == "sum" else positions[name] ** 0.5)
        found[name] = (signal, bias)
    return found


def carries(signal: Tensor, alpha: float, faithful: bool = False) -> Tensor:
    """Which contributions to each unit are kept: the fewest, largest first, that reach the share alpha; bool.

    Args:
        signal: float [units, contributions], none below 0. What is 0 is never kept.
        alpha: in (0, 1].
        faithful: as the published code: what follows goes with all that equals it, and at least one goes.
    """
    ordered, place = signal.sort(1, descending=True)
    reached = ordered.cumsum(1)
    total = reached[:, -1:]
    before = (reached < alpha * total).sum(1, keepdim=True)  # position of the first that reaches alpha, from 0
    last = signal.shape[1] - 1
    if faithful:
        first_gone = torch.where(before < last, before + 1, torch.full_like(before, last))
        return signal > ordered.gather(1, first_gone)
    rank = torch.empty_like(place).scatter_(1, place, torch.arange(last + 1, device=place.device).expand_as(place))
    return (rank <= before) & (signal > 0)


def _norms(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Frobenius norms of |K_ij| * x_i, x not below 0: [N, channels, H, W] -> [N, outputs, inputs of a filter]."""
    kernel = layer.weight.abs()
    outputs, inputs = kernel.shape[:2]
    area = kernel[0, 0].numel()
    found = x.new_empty(len(x), outputs, inputs)
    per_sample = x.shape[1] * max(area * area, layer.kernel_size[0] * x[0, 0].numel() * layer.kernel_size[1])
    step = max(1, _BUDGET // max(1, per_sample))
    rows, columns = torch.triu_indices(area, area)
    twice = torch.where(rows == columns, 1.0, 2.0).to(x)  # the Gram matrix is symmetric: half of it is enough
    flat = kernel.flatten(2)
    pairs = (flat[..., rows] * flat[..., columns] * twice).view(layer.groups, outputs // layer.groups, inputs, -1)
    for begin in range(0, len(x), step):
        patches = _patches(x[begin : begin + step], layer)  # [n, channels, k k, positions]
        gram = patches @ patches.transpose(2, 3)
        gram = gram[..., rows, columns].view(len(patches), layer.groups, inputs, -1)
        squared = torch.einsum("ngip,goip->ngoi", gram, pairs)
        found[begin : begin + step] = squared.flatten(1, 2).clamp_(min=0).sqrt_()
    return found


def _patches(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """What each weight of a kernel meets: [N, channels, k k, positions]."""
    if isinstance(layer.padding, str):
        raise PrunelabError(f"nnrelief: a convolution with padding = {layer.padding!r}: give the padding as numbers")
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.unflatten(1, (x.shape[1], -1))


def _per_group(boxes: Tensor, kernel: Tensor, layer: nn.Conv2d) -> Tensor:
    """Sums over the kernel: [channels, k k] and [outputs, inputs, k, k] -> [outputs, inputs]."""
    grouped = boxes.view(layer.groups, kernel.shape[1], -1)
    split = kernel.flatten(2).view(layer.groups, -1, *kernel.flatten(2).shape[1:])
    return torch.einsum("gip,goip->goi", grouped, split).flatten(0, 1)


def _pieces(x: Tensor) -> Iterator[Tensor]:
    return iter(x.split(_PIECE))


class _pruned:  # noqa: N801 - read as `with _pruned(model, masks):`
    """The model with masks applied, for a while; its weights are put back bit by bit."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        parameters = dict(model.named_parameters())
        self.model, self.masks = model, masks
        self.kept = {name: parameters[name].detach().clone() for name in masks}

    def __enter__(self) -> None:
        self.masks.apply_(self.model)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, value in self.kept.items():
                self.model.get_parameter(name).copy_(value)


def _hidden(model: nn.Module, masks: Masks) -> list[str]:
    """Masked layers but the last of the model, whose units are the answers."""
    weighted = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [name for name in weighted[:-1] if f"{name}.weight" in masks]


def _understood(graph: Graph) -> None:
    """Refuse a model with an operation whose channels cannot be followed."""
    for node in graph:
        if node.kind == "opaque":
            raise PrunelabError(
                f"nnrelief does not understand {node.where}: it knows Linear, Conv2d, BatchNorm, activations, pooling, "
                "flattening and additive skips; choose the layers before it, or another method"
            )


@torch.no_grad()
def _norms_of_means(model: nn.Module, names: set[str], x: Tensor) -> dict[str, Tensor]:
    """Node -> per channel the Frobenius norm over positions of the mean of |value|, as the published code has it."""
    traced = torch.fx.symbolic_trace(model)
    sums: dict[str, Tensor] = {}

    class Run(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                sums[n.name] = sums.get(n.name, 0) + value.abs().sum(0)
            return value

    with evaluating(traced):
        for piece in _pieces(x):
            Run(traced).run(piece)
    return {name: total.flatten(1).norm(dim=1) / len(x) for name, total in sums.items()}


def _one_pass_backwards(model: nn.Module, masks: Masks) -> Masks | None:
    """From the output to the input: units that the next layer does not read lose their weights, bias and BatchNorm.

    None for a model that is no chain, whose published rules are those of one architecture.
    """
    try:
        links = chain(_without_norms(model))
    except ShrinkError:
        return None
    after = masks
    for link, following in zip(reversed(links[:-1]), reversed(links[1:]), strict=True):
        name = f"{following.name}.weight"
        if name in after and f"{link.name}.weight" in after:
            read = after[name].any(0).flatten().view(link.layer.weight.shape[0], -1).any(1)
            if after[name].dim() == 4:
                read = after[name].flatten(2).any(2).any(0)
            after &= unit_masks(model, {link.name: read})
    return after


def _without_norms(model: nn.Module) -> nn.Sequential:
    kept = [(name, m) for name, m in model.named_children() if not isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    chain_ = nn.Sequential()
    if type(model) is nn.Sequential:
        for name, module in kept:
            chain_.add_module(name, module)
    return chain_ if type(model) is nn.Sequential else model  # type: ignore[return-value]
