"""What every connection contributes to its neuron or filter, over data; NNrelief's importance before normalising.

No loop over samples, neurons or positions. |w x| = |w| |x|, so a fully connected layer needs the mean of |x| alone. A
kernel's response |K| * |x| has the Frobenius norm sqrt(k G k'), where k is |K| as a row and G = P' P the Gram matrix of
the patches P of one channel of one sample: one small matrix product per channel serves all kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.errors import PrunelabError, checked_seed
from prunelab.structure.forward import call, looking

Reduce = Literal["mean_of_norm", "norm_of_mean", "sum"]
_BUDGET = 1 << 24  # numbers of the largest intermediate result: 64 MB of float32
_PIECE, _INPUTS = 256, 1 << 22  # samples, and numbers of input, that go through the model at a time


def pruning_set(batches: Iterable[Any], samples: int, seed: int) -> Tensor:
    """So many inputs, drawn evenly from all batches in one pass; 0: all of them.

    Args:
        batches: inputs, or (inputs, targets).
        samples: how many; fewer where there are not so many.
        seed: draws them.
    """
    draw = torch.Generator().manual_seed(checked_seed(seed))
    kept: list[Tensor] = []
    keys = torch.empty(0)
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        keys = torch.cat([keys, torch.rand(len(x), generator=draw)])
        kept.append(x)
        if samples and len(keys) > samples:  # the smallest keys so far: an even sample of what was seen
            keys, chosen = keys.topk(samples, largest=False)
            kept = [torch.cat(kept)[chosen.to(x.device)]]
    if not sum(map(len, kept)):
        raise PrunelabError("nnrelief got no batch: give at least one batch of inputs")
    return torch.cat(kept)


def inputs(batches: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    """The inputs alone, in pieces that fit in memory with all that a model makes of them."""
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if len(x):
            yield from x.split(max(1, min(_PIECE, _INPUTS // max(1, x[0].numel()))))


@torch.no_grad()
def signals(
    model: nn.Module, layers: Iterable[str], x: Tensor | Iterable[Any], reduce: Reduce = "mean_of_norm"
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What every connection and bias contributes to its unit, before it is divided by the sum S_j.

    Args:
        model: any module; it is not changed.
        layers: names of Linear and Conv2d layers.
        x: the pruning set, [N, ...], or batches of it, which are gone through once.
        reduce: the norm over the positions of a map.

    Returns:
        layer -> float32 [outputs, inputs of a unit], and [outputs] for the bias or None.

    Raises:
        PrunelabError: a layer that the model does not use.
    """
    sums: dict[str, Tensor] = {}
    positions: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            size = given[0].abs()
            if isinstance(layer, nn.Linear):
                found = size.flatten(0, -2).sum(0) / (size[0].numel() / size.shape[-1])
            elif reduce == "mean_of_norm":
                found = _norms(size, layer).sum(0)
            else:
                found = size.sum(0)
            sums[name] = sums.get(name, 0) + found
            positions[name] = output[0, 0].numel() if output.dim() == 4 else 1

        return hook

    layers, samples = list(layers), 0
    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    try:
        with looking(model):
            for piece in inputs(x):
                call(model, piece)
                samples += len(piece)
    finally:
        for hook in hooks:
            hook.remove()
    if lost := [name for name in layers if name not in sums]:
        raise PrunelabError(f"layer {lost[0]!r} takes no part in the forward pass: leave it out of layers")
    return {name: _signal(model.get_submodule(name), sums[name] / samples, positions[name], reduce) for name in layers}


def _signal(layer: nn.Linear | nn.Conv2d, mean: Tensor, positions: int, reduce: Reduce) -> tuple[Tensor, Tensor | None]:
    """From the mean over samples, of |x| or of the norms, to the signal of each connection and bias."""
    if isinstance(layer, nn.Linear):
        signal = layer.weight.abs() * mean
    elif reduce == "mean_of_norm":
        signal = mean
    elif reduce == "norm_of_mean":
        signal = _norms(mean[None], layer)[0]
    else:  # |x| summed where each weight of a kernel meets it: [channels, k k]
        signal = _per_group(_patches(mean[None], layer).sum(-1)[0], layer)
    if layer.bias is None:
        return signal, None
    return signal, layer.bias.abs() * (positions if reduce == "sum" else positions**0.5)


def _norms(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Frobenius norms of |K_ij| * x_i, x not below 0: [N, channels, H, W] -> [N, outputs, inputs of a filter].

    Its largest intermediate result has at most ``_BUDGET`` numbers, or those of one sample where these are more.
    """
    kernel = layer.weight.abs()
    outputs, channels = kernel.shape[:2]
    area = kernel[0, 0].numel()
    x = _padded(x, layer)
    found = x.new_empty(len(x), outputs, channels)
    step = max(1, _BUDGET // max(x.shape[1] * area * max(area, x[0, 0].numel()), outputs * channels))
    rows, columns = torch.triu_indices(area, area, device=x.device)
    twice = torch.where(rows == columns, 1.0, 2.0).to(x)  # the Gram matrix is symmetric: half of it is enough
    flat = kernel.flatten(2)
    pairs = (flat[..., rows] * flat[..., columns] * twice).unflatten(0, (layer.groups, -1))
    for begin in range(0, len(x), step):
        patches = _unfolded(x[begin : begin + step], layer)  # [n, channels, k k, positions]
        gram = (patches @ patches.transpose(2, 3))[..., rows, columns].unflatten(1, (layer.groups, channels))
        squared = torch.einsum("ngip,goip->ngoi", gram, pairs)
        found[begin : begin + step] = squared.flatten(1, 2).clamp_(min=0).sqrt_()
    return found


def _patches(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """What each weight of a kernel meets: [N, channels, k k, positions]."""
    return _unfolded(_padded(x, layer), layer)


def _unfolded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).unflatten(1, (x.shape[1], -1))


def _padded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """The maps with the border that the layer adds."""
    amounts: list[int] = []
    for axis in (1, 0):
        if isinstance(layer.padding, str):
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1) if layer.padding == "same" else 0
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [layer.padding[axis]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, amounts, mode) if any(amounts) else x


def _per_group(boxes: Tensor, layer: nn.Conv2d) -> Tensor:
    """Sums over the kernel: boxes [channels, k k] -> [outputs, inputs of a filter]."""
    kernel = layer.weight.abs().flatten(2).unflatten(0, (layer.groups, -1))
    return torch.einsum("gip,goip->goi", boxes.unflatten(0, (layer.groups, -1)), kernel).flatten(0, 1)


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
