"""What a network costs: parameters, non-zeros, multiply-accumulates, bytes.

Which zeros count is the same everywhere here. With masks, an entry is gone where its mask is False, and everything
without a mask stays: a bias that starts at 0.0 was not pruned. Without masks (None), it is gone where its value is 0.0.

The effective numbers are theory: they say what a machine that skips every zero could save, not what this one does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # no public name for it yet
from torch.utils._pytree import tree_leaves, tree_map_only

from prunelab.errors import PrunelabError, first_line, nearest
from prunelab.masks import maskable
from prunelab.structure.forward import call, copied, looking, rows, shapes, unwrapped


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
    example: Any,
    masks: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Cost:
    """All of the costs at once; a few milliseconds, so it can be asked for after every round.

    Args:
        model: Any network; it is not changed and need not be in memory twice.
        example: Shape of one sample; or a batch, a tuple of several inputs, or a dict of them by name.
        masks: Parameter name -> keep; None counts the zeros in the parameters.
        dtype: Of the sample, where a shape is given, as ``torch.long`` for an embedding; None: that of the parameters.

    Raises:
        PrunelabError: A mask that fits no parameter, or an input that the network cannot take.
    """
    keep, whole = _keep(model, masks), dict(model.named_parameters())
    kept = {name: int(torch.count_nonzero(keep[name])) if name in keep else whole[name].numel() for name in whole}
    spent, weights, stored = work(model, example, dtype), prunable_weights(model), packed_tensors(model)
    return Cost(
        parameters=sum(tensor.numel() for tensor in (*whole.values(), *stored)),
        nonzero=sum(kept.values()) + sum(map(nonzero, stored)),
        weights=sum(kept[name] for name in weights),
        weights_total=sum(weights.values()),
        macs=spent.macs,
        effective_macs=spent.effective(keep, kept),
        bytes=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers(), *stored)),
    )


def prunable_weights(model: nn.Module) -> dict[str, int]:
    """Parameter name -> number of entries, of every weight of a Linear or Conv2d, in module order."""
    layers = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {name: parameter.numel() for name, parameter in model.named_parameters() if id(parameter) in layers}


def macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of one dense forward pass of one sample; 1 MAC = 2 FLOPs. See ``work``."""
    return work(model, example).macs


def layer_macs(model: nn.Module, example: Any) -> dict[str, int]:
    """Parameter name -> dense MACs of one sample in the products that use all of it, in forward order."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {name: times * sizes[name] for name, times in work(model, example).weights.items()}


def _keep(model: nn.Module, masks: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """Parameter -> which of its entries are there; parameters that are not named are whole."""
    known = dict(model.named_parameters())
    if masks is None:
        return {name: parameter.detach() != 0 for name, parameter in known.items()}
    fit = maskable(model)  # gates too, which are no parameters and are not counted
    for name, mask in masks.items():
        if name not in fit:
            raise PrunelabError(f"mask {name!r} fits no parameter of the model: {nearest(name, known)}")
        if mask.shape != fit[name].shape:
            shapes = f"{tuple(mask.shape)}, its parameter {tuple(fit[name].shape)}"
            raise PrunelabError(f"mask {name!r} has shape {shapes}: make it for this model")
    return {name: mask for name, mask in masks.items() if name in known}


@dataclass(frozen=True, eq=False)
class Work:
    """Multiply-accumulates of one sample, and whose entries do them.

    Attributes:
        macs: All, dense.
        weights: Parameter -> how often each of its entries works; of those whose entries work equally often.
        slices: MACs of products with a part of a parameter, or with something made of several, and that part.
    """

    macs: int
    weights: Mapping[str, int]
    slices: Sequence[tuple[int, _Part]] = ()

    def effective(self, keep: Mapping[str, Tensor], kept: Mapping[str, int]) -> int:
        """MACs whose weight is kept.

        Args:
            keep: Parameter -> bool, True = keep; parameters that are not named are whole.
            kept: Parameter -> how many of its entries are kept.
        """
        gone = sum(n * (keep[name].numel() - kept[name]) for name, n in self.weights.items() if name in keep)
        for macs, part in self.slices:
            if (mask := part.of(keep)) is not None:
                gone += macs - macs * int(torch.count_nonzero(mask)) // mask.numel()
        return self.macs - gone


@dataclass(frozen=True, eq=False)
class _Part:
    """A tensor that is made of parameters alone: as a rule, one of them turned or cut.

    Attributes:
        whole: The parameter of which it has every entry once; None where it has a part.
        of: Masks of parameters -> the mask of this tensor; None where it has none.
    """

    whole: str | None
    of: Callable[[Mapping[str, Tensor]], Tensor | None]


def work(model: nn.Module, example: Any, dtype: torch.dtype | None = None) -> Work:
    """What one sample costs, seen in a run of the model: every product of matrices and every convolution.

    A plain chain is reckoned from its shapes, in microseconds, because a run asks for it after every pruning. Any other
    model runs once without data (device meta), which costs no arithmetic; one whose way depends on the values of its
    input runs for real. Counted are ``mm``, ``bmm`` and their kin, convolutions (padding included), ``Bilinear``,
    attention and torch's quantised layers; biases, activations, pooling and normalisation cost nothing.

    Args:
        model: Any module; it is left as it was.
        example: Shape of one sample; or a batch, a tuple of several inputs, or a dict of them by name.
        dtype: Of the sample, where a shape is given; None: that of the parameters.

    Raises:
        PrunelabError: an input that the network cannot take.
    """
    shape = example if isinstance(example, tuple) and all(isinstance(size, int) for size in example) else None
    if shape is not None and (reckoned := _chain_work(model, shape)) is not None:
        return reckoned
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    model = unwrapped(model)
    if shape is not None:
        dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        where = next((p.device for p in model.parameters()), None)
        example = torch.zeros(1, *shape, dtype=dtype, device=where)
    one = rows(example, slice(0, 1))
    try:
        ghost, twins = _without_data(model)
        found = _watched(ghost, tree_map_only(Tensor, lambda t: t.to("meta"), one), {t: names.get(i) for i, t in twins})
    except (RuntimeError, ValueError, TypeError, PrunelabError):  # it looks at values, or cannot be copied
        try:
            known = {tensor: names.get(id(tensor)) for tensor in (*model.parameters(), *model.buffers())}
            found = _watched(model, one, known)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            words = f"shape {shape}" if shape is not None else shapes(example)
            raise PrunelabError(f"the model takes no input of {words}: {first_line(error)}") from None
    return found


def _watched(model: nn.Module, example: Any, known: Mapping[Tensor, str | None]) -> Work:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that hides all products of an attention
    try:
        with looking(model), torch.no_grad(), _Products(known) as seen:
            call(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return seen.work()


class _Products(TorchDispatchMode):
    """Counts products, and follows the parameters to them through what only turns, cuts, joins or scales.

    Args:
        known: Parameters, each with its name, and buffers.
    """

    def __init__(self, known: Mapping[Tensor, str | None]) -> None:
        super().__init__()
        self._sizes = {name: tensor.numel() for tensor, name in known.items() if name}
        # What does not depend on the input, alive so that no id comes twice; a part, where it is made of parameters.
        self._fixed: dict[int, tuple[Tensor, _Part | None]] = {
            id(tensor): (tensor, None if name is None else _Part(name, partial(_named, name)))
            for tensor, name in known.items()
        }
        self._found: list[tuple[int, _Part | None]] = []

    def work(self) -> Work:
        """What was seen."""
        whole: Counter[str] = Counter()
        for macs, part in self._found:
            if part is not None and part.whole is not None:
                whole[part.whole] += macs // max(self._sizes[part.whole], 1)
        slices = tuple((macs, part) for macs, part in self._found if part is not None and part.whole is None)
        return Work(sum(macs for macs, _ in self._found), dict(whole), slices)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:  # inside an inference mode
                return parts
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if {tensor.is_meta for tensor in tensors} == {True, False}:  # a constant that forward makes
            self._fixed |= {id(t): (t, None) for t in tensors if not t.is_meta}
            args, kwargs = tree_map_only(Tensor, self._moved, (args, kwargs))
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        out = func(*args, **kwargs)
        base = func.name().partition("::")[2].partition(".")[0]
        for macs, operands in _products(func.namespace, base, args, out):
            made = (self._fixed.get(id(value), (None, None))[1] for value in operands)
            self._found.append((macs, next((part for part in made if part is not None), None)))
        if all(id(tensor) in self._fixed for tensor in tensors):
            for place, value in enumerate(out if isinstance(out, tuple | list) else (out,)):
                if isinstance(value, Tensor) and id(value) not in self._fixed:
                    at = place if isinstance(out, tuple | list) else None
                    self._fixed[id(value)] = value, self._made(func, base, args, kwargs, tensors, value, at)
        return out

    def _moved(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        there = torch.empty_like(tensor, device="meta")
        self._fixed[id(there)] = there, None
        return there

    def _made(
        self, func: Any, base: str, args: Any, kwargs: Any, tensors: list[Tensor], out: Tensor, place: int | None
    ) -> _Part | None:
        """What a result is made of, whose operands do not depend on the input."""
        parts = {id(t): part for t in tensors if (part := self._fixed[id(t)][1]) is not None}
        if not parts:
            return None
        first = next(iter(parts.values()))
        same = [parts[id(t)] for t in tensors if id(t) in parts and t.shape == out.shape]
        if base in _MOVES or func.is_view:
            whole = first.whole if len(parts) == 1 and out.numel() == self._sizes.get(first.whole or "") else None
            shapes_of = {id(t): t.shape for t in tensors if id(t) in parts}
            return _Part(whole, partial(_replayed, func, args, kwargs, parts, shapes_of, place))
        if same and (base in _SCALES or torch.Tag.pointwise in func.tags):
            return same[0] if len(same) == 1 else _Part(None, partial(_joined, same, base.startswith("mul")))
        return None


# Beside views: what gives the elements of its operands in another order.
_MOVES = frozenset(
    ("clone", "contiguous", "_unsafe_view", "cat", "stack", "index", "index_select", "gather", "repeat", "roll", "flip",
     "lift_fresh", "constant_pad_nd", "repeat_interleave")
)  # fmt: skip
_SCALES = frozenset(("_to_copy", "_weight_norm_interface"))  # beside what is pointwise: a zero stays a zero


def _named(name: str, masks: Mapping[str, Tensor]) -> Tensor | None:
    return masks.get(name)


def _replayed(
    func: Any, args: Any, kwargs: Any, parts: Mapping[int, _Part], shapes_of: Mapping[int, Any], place: int | None,
    masks: Mapping[str, Tensor],
) -> Tensor | None:  # fmt: skip
    """The same turn or cut, of masks."""
    own = {key: part.of(masks) for key, part in parts.items()}
    if all(mask is None for mask in own.values()):
        return None
    kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
    device = next(mask.device for mask in own.values() if mask is not None)

    def mask_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            return tensor.to(device) if not tensor.is_floating_point() else torch.ones_like(tensor, dtype=torch.bool)
        found = own[id(tensor)]
        return torch.ones(shapes_of[id(tensor)], dtype=torch.bool, device=device) if found is None else found.bool()

    args, kwargs = tree_map_only(Tensor, mask_of, (args, kwargs))
    out = func(*args, **kwargs)
    return out if place is None else out[place]


def _joined(parts: Sequence[_Part], product: bool, masks: Mapping[str, Tensor]) -> Tensor | None:
    """What is left of a product of weights, which needs all of them, or of a sum, which needs one."""
    found = [part.of(masks) for part in parts]
    own = [mask.bool() for mask in found if mask is not None]
    if not own or (not product and len(own) < len(found)):
        return None
    return reduce(torch.logical_and if product else torch.logical_or, own)


def _products(namespace: str, name: str, args: Any, out: Any) -> Sequence[tuple[int, Sequence[Any]]]:
    """Multiply-accumulates of the products in an operation, and the operands of each; () where there are none."""
    if namespace == "quantized":
        weight = next((tensors[0] for value in args if (tensors := packed(value))), None)
        return () if weight is None else [(out.numel() * weight[0].numel(), ())]
    if name in ("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "linear"):
        a, b = args[:2]
    elif name in ("addmm", "baddbmm", "addbmm", "addmv"):
        a, b = args[1:3]
    elif "convolution" in name and "backward" not in name:
        x, weight = args[:2]
        transposed = len(args) > 6 and args[6] is True
        return [((x if transposed else out).numel() * weight[0].numel(), (weight, x))]
    elif name == "_trilinear":
        spread = [_unsqueezed(tensor, axes) for tensor, axes in zip(args[:3], args[3:6], strict=True)]
        return [(math.prod(torch.broadcast_shapes(*spread)), args[:3])]
    elif name == "mkldnn_rnn_layer":
        return [(math.prod(args[0].shape[:2]) * weight.numel(), (weight,)) for weight in args[1:3]]
    elif name.startswith("_scaled_dot_product") and "backward" not in name:
        q, k, v = args[:3]
        return [(q.numel() * k.shape[-2] + q.numel() // q.shape[-1] * k.shape[-2] * v.shape[-1], ())]
    else:
        return ()
    columns = b.shape[0] if name == "linear" else b.shape[-1] if b.dim() > 1 else 1
    return [(a.numel() * columns, (b, a))]


def _unsqueezed(tensor: Tensor, axes: Sequence[int]) -> torch.Size:
    for axis in sorted(axes):
        tensor = tensor.unsqueeze(axis)
    return tensor.shape


def packed(value: Any) -> list[Tensor]:
    """Weight and bias in one of torch's packed objects, which quantised layers have in place of parameters."""
    unpack = getattr(value, "unpack", None) if isinstance(value, torch.ScriptObject) else None
    return [tensor for tensor in unpack() if isinstance(tensor, Tensor)] if unpack is not None else []


def packed_tensors(model: nn.Module) -> list[Tensor]:
    """All weights and biases of a model that are packed."""
    return [tensor for module in model.modules() for value in vars(module).values() for tensor in packed(value)]


def nonzero(tensor: Tensor) -> int:
    """How many entries are not 0."""
    return int(torch.count_nonzero(tensor.int_repr() if tensor.is_quantized else tensor))


def _chain_work(model: nn.Module, shape: tuple[int, ...]) -> Work | None:
    """The same for an ``nn.Sequential`` of the commonest layers; None for all else, and where sizes do not fit."""
    if type(model) is not nn.Sequential:
        return None
    weights = [id(layer.weight) for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]
    if len(set(weights)) < len(weights):  # a layer, or its weight, that works twice
        return None
    total, uses = 0, Counter[str]()
    for name, layer in model._modules.items():  # pooling that comes twice, too
        if type(layer) is nn.Linear and len(shape) == 1 and shape[0] == layer.in_features:
            positions, shape = 1, (layer.out_features,)
        elif type(layer) is nn.Conv2d and len(shape) == 3 and shape[0] == layer.in_channels:
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
    return Work(total, dict(uses))


def _map(shape: tuple[int, ...], *geometry: int | tuple[int, ...]) -> tuple[int, int]:
    """Height and width behind a window of a kernel size, stride, padding and dilation."""
    sides = [(value, value) if isinstance(value, int) else value for value in geometry]
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(shape[1:], *sides, strict=True))
    return height, width


def _without_data(model: nn.Module) -> tuple[nn.Module, list[tuple[int, Tensor]]]:
    """A copy whose tensors have shapes only (device meta), and for the id of each parameter and buffer its twin."""
    known: dict[int, Tensor] = {}
    plain = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    for tensor in (*model.parameters(), *model.buffers(), *plain):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        known[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copied(model, known), list(known.items())
