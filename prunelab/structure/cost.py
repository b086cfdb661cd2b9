"""What a network costs: parameters, non-zeros, multiply-accumulates, bytes.

Which zeros count is the same everywhere here. With masks, an entry is gone where its mask is False, and everything
without a mask stays: a bias that starts at 0.0 was not pruned. Without masks (None), it is gone where its value is 0.0.

The effective numbers are theory: they say what a machine that skips every zero could save, not what this one does.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunelab.errors import PrunelabError, nearest
from prunelab.masks import maskable


@dataclass(frozen=True)
class Cost:
    """The columns that a result row gets; counts are of one network and, where samples matter, of one sample."""

    parameters: int  # all entries of all parameters
    nonzero: int  # those that are not pruned
    weights: int  # unpruned entries of the weights of Linear and Conv2d, without biases
    weights_total: int  # all entries of those weights
    macs: int  # multiply-accumulates of a dense forward pass
    effective_macs: int  # those with an unpruned weight, even where all inputs of that weight are dead
    bytes: int  # parameters and buffers as they are stored now, zeros included

    @property
    def sparsity(self) -> float:
        """Pruned fraction of the weights."""
        return 1 - self.weights / self.weights_total if self.weights_total else 0.0

    @property
    def compression_ratio(self) -> float:
        """``parameters / nonzero``; infinite where nothing is left."""
        return self.parameters / self.nonzero if self.nonzero else math.inf


def summarise(
    model: nn.Module,
    input_shape: tuple[int, ...],
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Cost:
    """All of the costs at once; a few milliseconds, so it can be asked for after every round.

    Args:
        model: Any network; it is not changed and need not be in memory twice.
        input_shape: Shape of one sample.
        masks: Parameter name -> keep; None counts the zeros in the parameters.
        dtype: Of the sample, as ``torch.long`` for an embedding; None: that of the parameters.

    Raises:
        PrunelabError: A mask that fits no parameter, or an input that the network cannot take.
    """
    kept, (total, uses) = _kept(model, masks), _work(model, input_shape, dtype)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    weights = prunable_weights(model)
    return Cost(
        parameters=sum(sizes.values()),
        nonzero=sum(kept.values()),
        weights=sum(kept[name] for name in weights),
        weights_total=sum(weights.values()),
        macs=total,
        effective_macs=total - sum(uses[name] * (sizes[name] - kept[name]) for name in uses),
        bytes=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
    )


def prunable_weights(model: nn.Module) -> dict[str, int]:
    """Parameter name -> number of entries, of every weight of a Linear or Conv2d, in module order."""
    layers = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {name: parameter.numel() for name, parameter in model.named_parameters() if id(parameter) in layers}


def macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one dense forward pass of one sample; 1 MAC = 2 FLOPs.

    Counted by ``torch.utils.flop_counter``: matrix products, convolutions (padding included) and attention. Biases,
    activations, pooling and normalisation cost nothing.
    """
    return _work(model, input_shape)[0]


def layer_macs(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Weight name -> dense MACs of one sample in the Linear and Conv2d layers that use it, in forward order."""
    uses, sizes = _work(model, input_shape)[1], prunable_weights(model)
    return {name: times * sizes[name] for name, times in uses.items()}


def _kept(model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, int]:
    """Unpruned entries of each parameter."""
    known = dict(model.named_parameters())
    if masks is None:
        return {name: int(torch.count_nonzero(parameter)) for name, parameter in known.items()}
    fit = maskable(model)  # gates too, which are no parameters and are not counted
    for name, mask in masks.items():
        if name not in fit:
            raise PrunelabError(f"mask {name!r} fits no parameter of the model: {nearest(name, known)}")
        if mask.shape != fit[name].shape:
            shapes = f"{tuple(mask.shape)}, its parameter {tuple(fit[name].shape)}"
            raise PrunelabError(f"mask {name!r} has shape {shapes}: make it for this model")
    return {n: int(torch.count_nonzero(masks[n])) if n in masks else known[n].numel() for n in known}


def _work(model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> tuple[int, Counter[str]]:
    """MACs of one sample, and how often it uses each entry of each weight (positions of the output map).

    A plain chain is reckoned from its shapes, in microseconds, because a run asks for it after every pruning. For any
    other model a forward pass runs on a copy without data, so it costs no arithmetic and leaves the model as it is.
    """
    if (reckoned := _chain_work(model, input_shape)) is not None:
        return reckoned
    ghost = _without_data(model).eval()
    names = {id(parameter): name for name, parameter in ghost.named_parameters()}
    uses: Counter[str] = Counter()

    def count(layer: nn.Linear | nn.Conv2d, _: object, output: Tensor) -> None:
        if id(layer.weight) in names:
            uses[names[id(layer.weight)]] += output.numel() // layer.weight.shape[0]

    for layer in ghost.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    dtype = dtype or next((p.dtype for p in ghost.parameters() if p.is_floating_point()), None)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ghost(torch.empty(1, *input_shape, dtype=dtype, device="meta"))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise PrunelabError(f"the model takes no input of shape {tuple(input_shape)}: {reason}") from None
    return counter.get_total_flops() // 2, uses


def _chain_work(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, Counter[str]] | None:
    """The same for an ``nn.Sequential`` of the commonest layers; None for all else, and where sizes do not fit."""
    if type(model) is not nn.Sequential:
        return None
    weights = [id(layer.weight) for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]
    if len(set(weights)) < len(weights):  # a layer, or its weight, that works twice
        return None
    total, uses = 0, Counter[str]()
    for name, layer in model._modules.items():  # pooling that comes twice, too
        if isinstance(layer, nn.Linear) and len(shape) == 1 and shape[0] == layer.in_features:
            positions, shape = 1, (layer.out_features,)
        elif isinstance(layer, nn.Conv2d) and len(shape) == 3 and shape[0] == layer.in_channels:
            if isinstance(layer.padding, str):
                return None
            shape = (layer.out_channels, *_map(shape, layer.kernel_size, layer.stride, layer.padding, layer.dilation))
            positions = shape[1] * shape[2]
        elif type(layer) is nn.MaxPool2d and len(shape) == 3 and not layer.ceil_mode:
            shape = (shape[0], *_map(shape, layer.kernel_size, layer.stride, layer.padding, layer.dilation))
            continue
        elif type(layer) is nn.Flatten and layer.start_dim == 1 and layer.end_dim == -1:
            shape = (math.prod(shape),)
            continue
        elif type(layer) in (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout):
            continue
        else:
            return None
        if min(shape) < 1:
            return None
        uses[f"{name}.weight"] += positions
        total += positions * layer.weight.numel()
    return total, uses


def _map(shape: tuple[int, ...], *geometry: int | tuple[int, ...]) -> tuple[int, int]:
    """Height and width behind a window of a kernel size, stride, padding and dilation."""
    sides = [(value, value) if isinstance(value, int) else value for value in geometry]
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(shape[1:], *sides, strict=True))
    return height, width


def _without_data(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes only (device meta), made without copying a number."""
    known: dict[int, object] = {}
    plain = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    for tensor in (*model.parameters(), *model.buffers(), *plain):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        known[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, known)
