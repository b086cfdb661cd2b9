"""What a model computes, seen by running it once on an example: which channels are which, and what goes together.

Under a ``TorchDispatchMode`` every model, however it is written, is a short list of ATen operations on tensors. Beside
every tensor walk its *layers*: integer tensors of the same shape that hold, for each element, the number of the channel
it belongs to. A layer has stride 0 along every axis on which it does not vary, so it costs one number for each channel.
An activation has one layer as a rule; a parameter has one for each of its axes, whose numbers are its *slots*.

- What only moves elements (view, permute, split, roll, ...) is applied to the layers as it is.
- Whatever combines tensors element by element makes the numbers of aligned axes equal. An axis of full size along
  which a tensor has no layer cannot become shorter, so what meets it stays.
- A product of matrices is such a combination, summed over one axis: the channels of that axis end there, and those of
  the other axes go on. So the channels that a Linear gives are the slots of its rows.
- Sums over channels end them too; means of them, norms over them and what is not understood pin them: they stay.
- Where a layer varies along two axes of one tensor, what is left has to be rectangular (attention heads, groups).
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode  # no public name for it yet
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from prunelab.errors import PrunelabError, first_line
from prunelab.gates import Gate

FIXED = 0  # the number of everything that cannot go
OUTPUT = "it is an output of the model"
STATISTICS = "statistics over channels"
_MOVES = {
    "_unsafe_view", "as_strided", "reshape", "roll", "flip", "repeat", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle", "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "rot90", "unsafe_split",
    "unsafe_split_with_sizes", "unsafe_chunk",
}  # fmt: skip
_POINTWISE = {
    "copy", "fill", "zero", "_to_copy", "hardswish", "elu", "celu", "_prelu_kernel", "prelu", "tril", "triu", "dropout",
    "native_dropout", "bernoulli", "uniform", "normal", "lift_fresh_copy", "log_sigmoid_forward", "rrelu_with_noise",
    "_conj_physical", "nan_to_num", "contiguous", "hardtanh", "leaky_relu", "threshold", "softshrink", "hardshrink",
    "masked_fill", "rand_like", "randn_like", "zeros_like", "ones_like", "empty_like", "full_like",
    "clone", "isnan", "isinf", "isfinite",
}  # fmt: skip
_FACTORIES = {
    "zeros", "ones", "empty", "full", "rand", "randn", "arange", "linspace", "new_zeros", "new_ones", "new_empty",
    "new_full", "empty_strided", "new_empty_strided", "eye", "randint", "randperm", "scalar_tensor",
}  # fmt: skip
_SPATIAL = (
    "max_pool", "avg_pool", "adaptive_", "_adaptive", "upsample", "_upsample", "reflection_pad", "replication_pad",
    "grid_sampler", "fractional_max_pool",
)  # fmt: skip
_REGIONS = {"roi_align", "roi_pool"}  # of torchvision
_SUMS = {"sum", "linalg_vector_norm", "norm"}
_MEANS = {"mean", "var", "std", "var_mean", "std_mean"}
_REDUCTIONS = _SUMS | _MEANS | {
    "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "prod", "any", "all", "median", "aminmax",
}  # fmt: skip
_SCANS = {
    "_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "topk",
    "logcumsumexp", "cummax", "_masked_softmax",
}  # fmt: skip
_RECURRENT = ("mkldnn_rnn", "_cudnn_rnn", "miopen_rnn")


class StructureError(PrunelabError):
    """The model cannot be watched, does not take the example, or cannot be made smaller."""


class Ref(int):
    """The number of a tensor that was seen, in the place of the tensor among the arguments of an operation."""


class Block(NamedTuple):
    """What has to stay rectangular: in every row that is left equally many cells.

    Attributes:
        rows: a number for each row, which goes when its cells go and takes them with it; None: rows have no number.
        cells: numbers [rows, columns].
        fixed: whether every row has to be left.
    """

    rows: Tensor | None
    cells: Tensor
    fixed: bool


class Op(NamedTuple):
    """One operation as it was seen, its tensors replaced by their numbers."""

    name: str
    kind: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    refs: tuple[Ref, ...]  # of its arguments, in their order
    outs: tuple[int, ...]
    module: str
    stale: tuple[int, ...] = ()  # tensors whose memory it wrote into
    extra: Any = None


@dataclass
class Seen:
    """What one run of a model showed.

    Attributes:
        root: number -> the number of its group of channels, int64; groups are counted from 0, which is what is fixed.
        slots: parameter or buffer -> axis -> the numbers of its indices, int64.
        columns: parameter of a grouped convolution -> (axis, numbers [groups, indices]); it is cut group by group.
        roles: per number, 1: it is read there ("in"), 2: made ("out"), 3: added; 0: none of these.
        pinned: group -> why it stays.
        soft: group -> why it stays where outputs have to be exactly the same.
        blocks: what has to stay rectangular, in groups.
        tape: the operations.
        layers, shapes: tensor number -> its layers and its shape.
        names: tensor number -> parameter or buffer.
        constants: tensor number -> a tensor that depends on nothing.
        sizes: module -> size -> numbers [size, ...] of the axes that had it there.
        pads: (module, attribute, place, numbers) of channels that only a padding adds, as many as the attribute says.
        weights: tensor numbers of what is made of parameters and constants alone.
        outputs: tensor numbers of what the model gave.
        products: blocks [rows, columns] of which whole rows and whole columns can go, since they are turned around.
        scaled: groups [rows, columns] over which two activations are multiplied and summed: queries and keys.
    """

    root: Tensor
    slots: dict[str, dict[int, Tensor]]
    columns: dict[str, tuple[int, Tensor]]
    roles: Tensor
    pinned: dict[int, str]
    soft: dict[int, str]
    blocks: list[Block]
    products: list[Tensor]
    tape: list[Op]
    layers: dict[int, list[Tensor]]
    shapes: dict[int, torch.Size]
    names: dict[int, str]
    constants: dict[int, Tensor]
    sizes: dict[str, dict[int, list[Tensor]]]
    pads: list[tuple[str, str, int, Tensor]]
    weights: set[int]
    outputs: list[int]
    scaled: list[Tensor]


# -- layers ------------------------------------------------------------------------------------------------------------


def varying(layer: Tensor) -> set[int]:
    """The axes along which a layer varies."""
    shape = layer.shape
    return {d for d, s in enumerate(layer.stride()) if s and shape[d] > 1}


def compact(layer: Tensor) -> Tensor:
    """A layer with size 1 along every axis on which it does not vary."""
    sizes = [n if s or n < 2 else 1 for n, s in zip(layer.shape, layer.stride(), strict=True)]
    return layer.as_strided(sizes, layer.stride())


def settle(layer: Tensor) -> Tensor:
    """The same numbers, with stride 0 wherever they happen to be the same along an axis."""
    small = compact(layer)
    for d in varying(small):
        first = small.narrow(d, 0, 1)
        if torch.equal(first.expand_as(small), small):
            small = first
    return small.expand(layer.shape)


def settled(part: Tensor, whole: Tensor) -> Tensor:
    """What was moved, settled where that may have become necessary: it was copied, or an axis was split into two."""
    copied = part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
    return settle(part) if copied or len(varying(part)) > len(varying(whole)) else part


def along(layer: Tensor, dim: int) -> Tensor:
    """The numbers of a layer by the indices of one axis: [size, others]."""
    small = compact(layer)
    return small.movedim(dim, 0).reshape(small.shape[dim], -1)


class _Watch(TorchDispatchMode):
    """Sees the operations of one run."""

    def __init__(self, names: Mapping[int, str], pointers: Mapping[Any, str]) -> None:
        super().__init__()
        self.by_id, self.pointers, self.token = names, pointers, object()
        self.joins: list[tuple[Tensor, Tensor]] = []
        self.pins: list[tuple[Tensor, str, bool]] = []
        self.blocks: dict[Any, Block] = {}
        self.products: list[Tensor] = []
        self.scaled: list[Tensor] = []
        self.weights: set[int] = set()  # tensors made of parameters alone
        self.tape: list[Op] = []
        self.layers: dict[int, list[Tensor]] = {}
        self.shapes: dict[int, torch.Size] = {}
        self.expanded: dict[int, set[int]] = {}
        self.names: dict[int, str] = {}
        self.known: dict[str, int] = {}
        self.constants: dict[int, Tensor] = {}
        self.slots: dict[str, dict[int, Tensor]] = {}
        self.columns: dict[str, tuple[int, Tensor]] = {}
        self.pads: list[tuple[str, str, int, Tensor]] = []
        self.modules: dict[str, nn.Module] = {}
        self.read: list[Tensor] = []
        self.made: list[Tensor] = []
        self.added: list[Tensor] = []
        self.sizes: dict[str, dict[int, dict[Any, Tensor]]] = {}
        self.family: dict[int, int] = {}
        self.members: dict[int, list[int]] = {}
        self.stack: list[str] = [""]
        self.count, self.tensors, self.again = FIXED + 1, 0, False
        self.op, self.selected = "", {}

    # what is known of a tensor ----------------------------------------------------------------------------------------

    def fresh(self, n: int) -> Tensor:
        self.count += n
        return torch.arange(self.count - n, self.count)

    def axes(self, shape: Sequence[int]) -> dict[int, Tensor]:
        """New numbers for each axis of a tensor that is not made of others."""
        return {d: self.fresh(n) for d, n in enumerate(shape) if n > 1}

    def new(self, tensor: Tensor, layers: list[Tensor]) -> int:
        self.tensors += 1
        self.layers[self.tensors], self.shapes[self.tensors] = layers, tensor.shape
        if 0 in tensor.stride():
            uniform = {d for d, step in enumerate(tensor.stride()) if not step}
            self.expanded[self.tensors] = uniform.difference(*map(varying, layers))
        return self.tensors

    def ref(self, tensor: Tensor) -> Ref:
        token, number = getattr(tensor, "_prunelab", (None, 0))
        if token is self.token:
            return Ref(number)
        name = self.by_id.get(id(tensor)) or self.pointers.get((tensor.data_ptr(), tensor.shape, tensor.stride()))
        if name is None:
            number = self.new(tensor, [])
            self.constants[number] = tensor
            self.weights.add(number)
            tensor._prunelab = (self.token, number)
        elif name in self.known:
            number = self.known[name]
        else:
            layers = []
            if tensor.is_floating_point() and tensor.numel():
                self.slots[name] = self.axes(tensor.shape)
                layers = [_on(numbers, d, tensor.shape) for d, numbers in self.slots[name].items()]
            number = self.known[name] = self.new(tensor, layers)
            self.names[number] = name
            self.weights.add(number)
        return Ref(number)

    def put(self, tensor: Tensor, layers: list[Tensor]) -> int:
        """A result; where it is one of the arguments, written into, it keeps its number."""
        token, number = getattr(tensor, "_prunelab", (None, 0))
        name = self.by_id.get(id(tensor))
        if name is not None and isinstance(tensor, nn.Parameter):
            raise StructureError(f"the model changes its parameter {name!r} while it runs: that is not understood")
        if name is not None:  # a counter, say; the run has its own copy
            number = self.known[name]
            for layer in layers:
                self.pin(layer, f"the model changes {name!r} while it runs")
            return number
        layers = [layer.expand(tensor.shape) for layer in layers] if tensor.numel() else []
        if token is self.token:
            self.layers[number], self.shapes[number] = layers, tensor.shape
        else:
            number = self.new(tensor, layers)
            tensor._prunelab = (self.token, number)
        return number

    def join(self, a: Tensor, b: Tensor) -> None:
        if a is not b:
            self.joins.append((a.flatten(), b.flatten()))

    def pin(self, numbers: Tensor, why: str, soft: bool = False) -> None:
        self.pins.append((compact(numbers).flatten(), why, soft))

    def why(self, what: str) -> str:
        where = f"in {self.stack[-1]!r}" if self.stack[-1] else "in the forward of the model"
        return f"{self.op} {where} {what}"

    def block(self, rows: Tensor | None, cells: Tensor, fixed: bool = False) -> None:
        key = cells.numpy().tobytes(), None if rows is None else rows.numpy().tobytes(), fixed
        self.blocks.setdefault(key, Block(rows, cells, fixed))

    def rectangular(self, layer: Tensor) -> None:
        """Where it varies along several axes, what is left has to be a box."""
        if len(varying(layer)) < 2:
            return
        small = compact(layer)
        sizes = [n for n in small.shape if n > 1]
        for i in range(1, len(sizes)):
            cells = small.reshape(math.prod(sizes[:i]), -1)
            if i == 1 and len(sizes) == 2 and cells[0, 1] - cells[0, 0] > cells[1, 0] - cells[0, 0] > 0:
                self.products.append(cells.t().contiguous())  # the other way round than it was numbered
            else:
                self.block(None, cells)

    def uniform(self, layer: Tensor, dims: Iterable[int]) -> Tensor:
        """Make numbers that differ along some axes the same."""
        small = compact(layer)
        for d in dims:
            first = small.narrow(d, 0, 1)
            self.join(small, first.expand_as(small))
            small = first
        return small.expand(layer.shape)

    def ends(self, layer: Tensor, dims: set[int]) -> Tensor | None:
        """A layer after a sum over some axes: its numbers end, or rows of them go on under new numbers."""
        axes = varying(layer)
        if not axes & dims:
            return layer
        others = sorted(axes - dims)
        if not others:
            return None
        small = compact(layer)
        cells = small.permute(*others, *sorted(axes & dims), *(d for d in range(small.dim()) if d not in axes))
        sizes = [small.shape[d] for d in others]
        cells = cells.reshape(math.prod(sizes), -1)
        unique, place = cells.unique(dim=0, return_inverse=True)
        rows = self.fresh(len(unique))
        self.block(rows, unique)
        shape = [small.shape[d] if d in others else 1 for d in range(small.dim())]
        return rows[place].view(shape).expand(layer.shape)

    def meet(self, parts: Sequence[tuple[Sequence[int], list[Tensor]]], shape: Sequence[int]) -> list[Tensor]:
        """The layers of what is made of several tensors element by element; aligned axes have the same numbers."""
        rank = len(shape)
        with_layers = [layers for _, layers in parts if layers]
        if not with_layers:
            return []
        items: list[tuple[int, Tensor, set[int]]] = []
        covers: list[set[int]] = []
        labelled: list[set[int]] = []
        for i, (own, layers) in enumerate(parts):
            pad = rank - len(own)
            covers.append({d + pad for d, n in enumerate(own) if n > 1})
            labelled.append(set())
            for layer in layers:
                layer = layer[(None,) * pad] if pad else layer
                axes = varying(layer)
                if axes & labelled[i]:
                    self.pin(layer, self.why("reads a parameter whose axes are mixed"))
                    continue
                labelled[i] |= axes
                items.append((i, layer, axes))
        met: list[tuple[Tensor, set[int]]] = []
        for i, layer, axes in sorted(items, key=lambda item: (-len(item[2]), item[0])):
            bad = {d for j, own in enumerate(covers) if j != i for d in own & axes if d not in labelled[j]}
            if bad == axes:
                self.pin(layer, self.why("combines it with something whose size is fixed"))
                continue
            if bad:
                layer, axes = self.uniform(layer, bad), axes - bad
            self._merge(met, layer, axes)
        return [layer.expand(shape) for layer, _ in met]

    def _merge(self, met: list[tuple[Tensor, set[int]]], layer: Tensor, axes: set[int]) -> None:
        for place, (other, own) in enumerate(met):
            if not own & axes:
                continue
            if own == axes:
                self.join(compact(other), compact(layer))
            elif axes < own:
                self._rows(layer, axes, other, own)
            elif own < axes:
                self._rows(other, own, layer, axes)
                met[place] = (layer, axes)
            else:
                one, two = self.uniform(other, own - axes), self.uniform(layer, axes - own)
                self.join(compact(one), compact(two))
                met[place] = (one, own & axes)
            return
        met.append((layer, axes))

    def _rows(self, rows: Tensor, axes: set[int], cells: Tensor, own: set[int]) -> None:
        first, rest = sorted(axes), sorted(own - axes)
        small, head = compact(cells), compact(rows)
        order = [*first, *rest, *(d for d in range(small.dim()) if d not in own)]
        flat = small.permute(order).reshape(math.prod(small.shape[d] for d in first), -1)
        self.block(head.reshape(-1), flat)

    # the run ----------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.see(func, args, kwargs, out)
        return out

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name, kind = _kind(func)
        if name.startswith(_RECURRENT):
            self.again = True
        self.op = name
        outs = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        if not outs:
            return
        found: list[Ref] = []
        refs, options = self.referred(args, found), self.referred(kwargs, found)
        rule = getattr(self, f"_{kind}")
        extra, stale = None, ()
        if kind in ("index", "index_put"):
            masks = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor) and t.dtype == torch.bool]
            self.selected = {self.ref(t): int(t.sum()) for t in masks}
        try:
            layers, extra = rule(func, name, refs, options, outs)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            layers = self._unknown(func, name, refs, options, outs)[0]
            extra, kind = first_line(error), "unknown"
        written = func._schema.is_mutable
        if written and args and isinstance(args[0], Tensor):
            root = self.family.get(refs[0], refs[0])
            stale = tuple(i for i in (root, *self.members.get(root, ())) if i != refs[0])
        numbers = tuple(self.put(tensor, own) for tensor, own in zip(outs, layers, strict=True))
        if all(ref in self.weights for ref in found):
            self.weights.update(numbers)
        if func.is_view:
            root = self.family.get(refs[0], refs[0])
            for number in numbers:
                self.family[number] = root
            self.members.setdefault(root, []).extend(numbers)
        if kind in ("move", "factory", "pad", "cat"):
            for number in (*numbers, *(ref for ref in refs[:1] if isinstance(ref, Ref))):
                self.note(number)
        self.tape.append(Op(name, kind, func, refs, options, tuple(found), numbers, self.stack[-1], stale, extra))

    def referred(self, value: Any, found: list[Ref]) -> Any:
        """Arguments with the numbers of tensors in their places, which are also listed."""
        if isinstance(value, Tensor):
            found.append(self.ref(value))
            return found[-1]
        if isinstance(value, tuple | list):
            return type(value)([self.referred(part, found) for part in value])
        if isinstance(value, dict):
            return {key: self.referred(part, found) for key, part in value.items()}
        return value

    def note(self, number: int) -> None:
        """Remember for the module at work which channels the sizes of a tensor count."""
        own = self.sizes.setdefault(self.stack[-1], {})
        for layer in self.layers[number]:
            for d in varying(layer):
                by = own.setdefault(layer.shape[d], {})
                ends = compact(layer).movedim(d, 0).numpy()
                rest = (0,) * (ends.ndim - 1)
                key = tuple(map(int, (ends[(0, *rest)], ends[(1, *rest)], ends[(-1,) * ends.ndim])))
                if key not in by:
                    by[key] = along(layer, d)

    def operand(self, value: Any) -> tuple[Sequence[int], list[Tensor]]:
        return self.shapes[value], self.layers[value]

    def spread(self, value: Any) -> tuple[Sequence[int], list[Tensor]]:
        """An operand of something pointwise; axes that ``expand`` made of one element are of the others' size."""
        shape, layers = self.operand(value)
        return [1 if d in self.expanded.get(value, ()) else n for d, n in enumerate(shape)], layers

    # rules: each gives the layers of each result ----------------------------------------------------------------------

    def _unknown(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        for ref in tree_leaves((args, kwargs)):
            if isinstance(ref, Ref):
                for layer in self.layers[ref]:
                    self.pin(layer, self.why("mixes channels in a way that is not understood"))
        return [[] for _ in outs], None

    def _pointwise(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        parts = [self.spread(ref) for ref in tree_leaves((args, kwargs)) if isinstance(ref, Ref)]
        if name.endswith("_like"):
            parts = parts[:1]
        met = self.meet(parts, outs[0].shape)
        return [met if out.shape == outs[0].shape else [] for out in outs], None

    def _factory(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        shape = outs[0].shape
        return [[_on(numbers, d, shape) for d, numbers in self.axes(shape).items()] if outs[0].numel() else []], None

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        found: list[list[Tensor]] = [[] for _ in outs]
        shape = self.shapes[args[0]]
        for layer in self.layers[args[0]]:
            moved = moves(func, name, args, kwargs, layer, outs[0].shape)
            self._parts(name, args, kwargs, layer, shape)
            for own, part in zip(found, moved, strict=True):
                part = settled(part, layer)
                if varying(part):
                    own.append(part)
                    self.rectangular(part)
                else:  # one channel out of many, or many that were the same
                    self.pin(part, self.why("picks a single channel"))
        return found, None

    def _parts(self, name: str, args: Any, kwargs: Any, layer: Tensor, shape: Sequence[int]) -> None:
        """Cuts through channels: the parts are equally large afterwards, too, or are there, too."""
        name = name.removeprefix("unsafe_")
        dim = {"split": 2, "split_with_sizes": 2, "unbind": 1, "select": 1, "slice": 1}.get(name)
        if dim is None or not shape:
            return
        dim = kwargs.get("dim", args[dim] if len(args) > dim else 0) % len(shape)
        size, each = shape[dim], 0
        if name in ("select", "unbind"):
            each = 1
        elif name == "split":
            each = args[1] if size % args[1] == 0 else 0
        elif name == "split_with_sizes":
            each = args[1][0] if len(set(args[1])) == 1 else 0
        elif name == "slice":
            start = (args[2] if len(args) > 2 else None) or 0
            stop = args[3] if len(args) > 3 and args[3] is not None else size
            step = args[4] if len(args) > 4 else 1
            start, stop = (max(0, min(size, at + size if at < 0 else at)) for at in (start, stop))
            long = max(0, stop - start)
            if step != 1:
                if dim in varying(layer):
                    self.pin(layer, self.why("takes every second channel, or so"))
                return
            each = long if long and size % long == 0 and start % long == 0 else 0
        if dim in varying(layer) and 0 < each < size:
            self.block(None, along(layer, dim).reshape(size // each, -1), True)

    def _cat(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        shape, refs = outs[0].shape, [ref for ref in args[0] if self.shapes[ref].numel() or len(self.shapes[ref]) > 1]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % len(shape)
        parts, over = [], []
        for ref in refs:
            own, layers = self.operand(ref)
            if name == "stack":
                own, layers = (*own[:dim], 1, *own[dim:]), [layer.unsqueeze(dim) for layer in layers]
            across = [layer for layer in layers if dim in varying(layer)]
            if len(across) > 1:
                raise NotImplementedError("several layers along the axis of cat")
            flat = [layer.narrow(dim, 0, 1) for layer in layers if dim not in varying(layer)]
            parts.append(((*own[:dim], 1, *own[dim + 1 :]), flat))
            over.append((own, across[0] if across else None))
        met = [layer.expand(shape) for layer in self.meet(parts, (*shape[:dim], 1, *shape[dim + 1 :]))]
        if any(layer is not None for _, layer in over):
            extent = [1] * len(shape)
            for _, layer in over:
                for d in varying(layer) if layer is not None else ():
                    extent[d] = shape[d]
            pieces = []
            for own, layer in over:
                size = [own[d] if d == dim else extent[d] for d in range(len(shape))]
                small = torch.zeros([1] * len(shape), dtype=torch.long) if layer is None else compact(layer)
                pieces.append(small.expand(size))
            whole = settle(torch.cat(pieces, dim)).expand(shape)
            self.rectangular(whole)
            met.append(whole)
        return [met], None

    def _pad(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        """Something around; as further channels it has numbers of its own, if a module keeps the amounts in a tuple."""
        shape, found, amounts = outs[0].shape, [], list(args[1])
        attributes = vars(self.modules[self.stack[-1]]).items()
        kept = next((name for name, v in attributes if isinstance(v, tuple | list) and list(v) == amounts), None)
        for layer in self.layers[args[0]]:
            small, axes = compact(layer), varying(layer)
            for place in range(len(amounts)):
                d, n = len(shape) - 1 - place // 2, amounts[place]
                if d not in axes or not n:
                    continue
                if n < 0:
                    raise NotImplementedError("negative padding")
                zeros = torch.full((n,), FIXED) if kept is None else self.fresh(n)
                if kept is not None:
                    self.pads.append((self.stack[-1], kept, place, zeros))
                extent = [n if at == d else small.shape[at] for at in range(len(shape))]
                zeros = zeros.view([n if at == d else 1 for at in range(len(shape))]).expand(extent)
                small = torch.cat([zeros, small] if place % 2 == 0 else [small, zeros], d)
            found.append(small.expand(shape))
        return [found], None

    def _spatial(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        own, shape = self.shapes[args[0]], outs[0].shape
        space = {d for d in range(len(own)) if d >= max(2, len(own) - 3) or own[d] != shape[d]}
        if name.endswith("1d"):
            space = {len(own) - 1}
        found = []
        for layer in self.layers[args[0]]:
            axes = varying(layer)
            if axes & space:
                layer = self.uniform(layer, axes & space)
            if varying(layer):
                found.append(compact(layer).expand(shape))
            else:
                self.pin(layer, self.why("mixes channels"))
        return [found for _ in outs], None

    def _reduce(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        given = bound(func, args, kwargs)
        shape = self.shapes[args[0]]
        if isinstance(given.get("other"), Ref):  # max of two tensors
            return self._pointwise(func, name, args, kwargs, outs)
        dims = given.get("dim")
        dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        dims = {d % len(shape) for d in dims} if shape else set()
        found, ended = [], []
        for layer in self.layers[args[0]]:
            if varying(layer) & dims:
                if name in _MEANS or name in _SUMS:
                    ended.append(layer)
                    if name in _MEANS:
                        self.pin(layer, self.why(f"takes {STATISTICS}"), soft=True)
                    layer = self.ends(layer, dims)
                elif varying(layer) - dims:  # rows of channels: those that are read together go together
                    layer = self.uniform(layer, dims)
                else:
                    if args[0] not in self.weights or name not in ("all", "any"):  # a branch on what is learnt
                        self.pin(layer, self.why("reads all channels at once"))
                    layer = None
            if layer is not None:
                small = layer if name in _SCANS else _narrowed(layer, dims)
                found.append(
                    small.reshape(outs[0].shape) if small.dim() != outs[0].dim() else small.expand(outs[0].shape)
                )
        return [found if out.shape == outs[0].shape else [] for out in outs], (ended, found)

    _scan = _reduce

    def _contract(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        """[B, i, k] x [B, k, j], summed over k; and something added."""
        added, a, b = ([args[0]], *args[1:3]) if name in ("addmm", "baddbmm", "addmv", "addbmm") else ([], *args[:2])
        one, two = self.operand(a), self.operand(b)
        first = _as_batches(one, left=True)
        second = _as_batches(two, left=False)
        batch = max(first[0][0], second[0][0])
        shape = (batch, first[0][1], first[0][2], second[0][3])
        for layers in (first[1], second[1]):
            self.read += [compact(layer).flatten() for layer in layers if 2 in varying(layer)]
            self.made += [compact(layer).flatten() for layer in layers if varying(layer) & {1, 3}]
        met = self.meet([first, second], shape)
        over = [layer for layer in met if 2 in varying(layer)]
        if one[0] and a not in self.weights and b not in self.weights:
            self.scaled += [compact(layer).movedim(2, -1).reshape(-1, shape[2]) for layer in over]
        left = [layer for layer in (self.ends(layer, {2}) for layer in met) if layer is not None]
        result = [_shaped(layer.select(2, 0), outs[0].shape) for layer in left]
        if added:
            self.added += [compact(layer).flatten() for layer in self.layers[added[0]] if added[0] in self.names]
            result = self.meet([(outs[0].shape, result), self.operand(added[0])], outs[0].shape)
        return [result], (a, b, over, left)

    def _trilinear(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        tensors, wide = args[:3], args[3:6]
        dims = set(args[6])
        parts = []
        for ref, places in zip(tensors, wide, strict=True):
            own, layers = self.operand(ref)
            for d in places:
                own, layers = (*own[:d], 1, *own[d:]), [layer.unsqueeze(d) for layer in layers]
            parts.append((own, layers))
        shape = [max(sizes) for sizes in zip(*(own for own, _ in parts), strict=True)]
        for _, layers in parts:
            self.read += [compact(layer).flatten() for layer in layers if varying(layer) & dims]
            self.made += [compact(layer).flatten() for layer in layers if not varying(layer) & dims]
        met = self.meet(parts, shape)
        left = [layer for layer in (self.ends(layer, dims) for layer in met) if layer is not None]
        return [[_narrowed(layer, dims).squeeze(tuple(dims)) for layer in left]], (met, left)

    def _convolution(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        given = bound(func, args, kwargs)
        x, w, bias, turned, groups = (given[k] for k in ("input", "weight", "bias", "transposed", "groups"))
        shape, own = outs[0].shape, self.layers[w]
        channels = self.channels(x)
        by_axis: dict[int, Tensor] = {}
        for layer in own:
            axes = varying(layer)
            if axes == {0} or axes == {1}:
                by_axis[min(axes)] = along(layer, min(axes))[:, 0]
            else:
                self.pin(layer, self.why("has it as an axis of its kernel"))
        rows, columns = (by_axis.get(1), by_axis.get(0)) if turned else (by_axis.get(0), by_axis.get(1))
        inputs = self.shapes[x][1]
        if columns is not None:
            self.read.append(columns)
        if rows is not None:
            self.made.append(rows)
        if groups == 1:
            both = [((1, inputs), [] if channels is None else [channels.view(1, -1)])]
            both.append(
                (
                    (shape[1], inputs),
                    [
                        t.view(size).expand(shape[1], inputs)
                        for t, size in ((rows, (-1, 1)), (columns, (1, -1)))
                        if t is not None
                    ],
                )
            )
            met = self.meet(both, (shape[1], inputs))
            over = [layer[0] for layer in met if 1 in varying(layer)]
            made = [layer[:, 0] for layer in met if 0 in varying(layer)]
        else:
            over, made = self._by_groups(w, channels, rows, columns, groups, inputs, shape[1], turned)
        result = [_on(numbers, 1, shape) for numbers in made]
        if bias is not None:
            wide, layers = self.operand(bias)
            self.added += [compact(layer).flatten() for layer in layers]
            tail = (1,) * (len(shape) - 2)
            result = self.meet(
                [(shape, result), ((*wide, *tail), [t[(..., *(None,) * len(tail))] for t in layers])], shape
            )
        return [result], (x, w, bias, over, made)

    def _by_groups(
        self, w: Ref, channels: Tensor | None, rows: Tensor | None, columns: Tensor | None, groups: int, inputs: int,
        outputs: int, turned: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """A grouped convolution: equally many inputs and outputs in each group that is left, or whole groups."""
        own = self.owner(rows) or self.owner(columns)
        if turned:  # [inputs, outputs of a group]: rows are those of a group, columns are all inputs
            made = self.fresh(outputs) if outputs // groups > 1 else columns
            if channels is not None and columns is not None:
                self.join(channels, columns)
            elif columns is not None:
                self.pin(columns, self.why("reads an input of the model"))
            if made is not None and own is not None and not inputs == groups == outputs:
                self.columns[own] = (1, made.view(groups, -1))
            channels = columns
        else:
            made = rows
            if channels is not None and own is not None and not inputs == groups == outputs:
                self.columns[own] = (1, channels.view(groups, -1))
            elif columns is not None:
                self.pin(columns, self.why("reads what cannot go"))
        if own is None or made is None:
            for numbers in (channels, rows, columns):
                if numbers is not None:
                    self.pin(numbers, self.why("has groups and a weight that is computed"))
            return [], []
        if channels is None:
            self.pin(made, self.why("reads what cannot go, group by group"))
            return [], [made]
        if inputs == groups == outputs:
            self.join(channels, made)
        else:
            number = self.fresh(groups)
            self.block(number, channels.view(groups, -1))
            self.block(number, made.view(groups, -1))
        return [channels], [made]

    def owner(self, numbers: Tensor | None) -> str | None:
        """The parameter that has these numbers along an axis: the weight, or what it is computed from."""
        if numbers is None:
            return None
        first = int(numbers[0])
        found = ((name, own) for name, axes in self.slots.items() for own in axes.values() if int(own[0]) == first)
        return next((name for name, own in found if torch.equal(own, numbers)), None)

    def channels(self, ref: Ref, dim: int = 1) -> Tensor | None:
        """The numbers along one axis, the same everywhere else; None: there are none."""
        found = None
        for layer in self.layers[ref]:
            axes = varying(layer)
            if dim not in axes:
                self.pin(layer, self.why("mixes channels along another axis"))
                continue
            numbers = self.uniform(layer, axes - {dim})
            numbers = along(numbers, dim)[:, 0]
            if found is not None:
                self.pin(numbers, self.why("mixes channels along another axis"))
            else:
                found = numbers
        return found

    def _embedding(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        found = []
        for layer in self.layers[args[0]]:
            if varying(layer) == {1}:
                numbers = along(layer, 1)[:, 0]
                self.made.append(numbers)
                found.append(_on(numbers, outs[0].dim() - 1, outs[0].shape))
            else:
                self.pin(layer, self.why("looks its rows up by their place"))
        return [found], None

    def _index(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        shape = self.shapes[args[0]]
        if name in ("index_select", "gather", "take_along_dim"):
            dims = {args[1] % len(shape)}
        else:
            places, dims = self._places(args[1])
        found = []
        for layer in self.layers[args[0]]:
            if varying(layer) & dims:
                self.pin(layer, self.why("picks by place"))
            elif name == "index_select":
                d = min(dims)
                found.append(layer.narrow(d, 0, 1).expand(outs[0].shape))
            elif name == "index":
                found.append(settle(torch.ops.aten.index(layer, places)))
            else:
                self.pin(layer, self.why("picks by place"))
        return [found], None

    def _index_put(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        """Rows of the first axes become those of another tensor: the axes behind them are those of both."""
        (shape, layers), (size, given) = self.operand(args[0]), self.operand(args[2])
        places, dims = self._places(args[1])
        count, rows = len(dims), max((place.dim() for place in places if place is not None), default=0)
        if dims != set(range(count)) or len(size) not in (0, rows + len(shape) - count):
            return self._unknown(func, name, args, kwargs, outs)
        for layer in layers:
            if varying(layer) & dims:
                self.pin(layer, self.why("picks by place"))
        for layer in given:
            if varying(layer) & set(range(rows)):
                self.pin(layer, self.why("picks by place"))
        own = [_narrowed(layer, dims) for layer in layers if not varying(layer) & dims]
        other = [layer for layer in given if not varying(layer) & set(range(rows))]
        other = [layer[(0,) * rows][(None,) * count] if size else layer for layer in other]
        ones = (1,) * count
        return [self.meet([((*ones, *shape[count:]), own), ((*ones, *size[rows:]), other)], shape)], None

    def _places(self, indices: Sequence[Ref | None]) -> tuple[list[Tensor | None], set[int]]:
        """Indices of the same shapes that all pick the first, and the axes that they are for."""
        places: list[Tensor | None] = []
        for ref in indices:
            if ref is None:
                places.append(None)
            elif ref in self.selected:  # a mask: one index for each of its axes
                places += [torch.zeros(self.selected[ref], dtype=torch.long)] * len(self.shapes[ref])
            else:
                places.append(torch.zeros(self.shapes[ref], dtype=torch.long))
        return places, {d for d, place in enumerate(places) if place is not None}

    def _batch_norm(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        shape = outs[0].shape
        own = [ref for ref in args[1:5] if isinstance(ref, Ref)]
        tail = (None,) * (len(shape) - 2)
        parts = [((self.shapes[ref][0], *(1,) * len(tail)), [t[(..., *tail)] for t in self.layers[ref]]) for ref in own]
        if not isinstance(args[3], Ref) or bound(func, args, kwargs).get("training"):
            for layer in self.layers[args[0]]:
                if varying(layer) - {1}:
                    self.pin(layer, self.why(f"takes {STATISTICS}"), soft=True)
        met = self.meet([self.operand(args[0]), *parts], shape)
        return [met, *([] for _ in outs[1:])], None

    def _layer_norm(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        shape = outs[0].shape
        dims = set(range(len(shape) - len(args[1]), len(shape))) if name == "native_layer_norm" else {len(shape) - 1}
        for layer in self.layers[args[0]]:
            if varying(layer) & dims:
                self.pin(layer, self.why(f"takes {STATISTICS}"), soft=True)
        own = [self.operand(ref) for ref in args if isinstance(ref, Ref)]
        return [self.meet(own, shape), *([] for _ in outs[1:])], None

    def _group_norm(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        x, weight, bias, _, channels, _, groups = args[:7]
        shape = outs[0].shape
        numbers = self.channels(x)
        if numbers is not None and groups < channels:
            self.pin(numbers, self.why(f"takes {STATISTICS}"), soft=True)
            if groups > 1:
                self.block(None, numbers.view(groups, -1), True)
        tail = (None,) * (len(shape) - 2)
        parts = [
            ((channels, *(1,) * len(tail)), [t[(..., *tail)] for t in self.layers[ref]])
            for ref in (weight, bias)
            if ref is not None
        ]
        own = [] if numbers is None else [_on(numbers, 1, shape)]
        return [self.meet([(shape, own), *parts], shape), *([] for _ in outs[1:])], None

    def _glu(self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor]) -> Any:
        shape = self.shapes[args[0]]
        dim = (args[1] if len(args) > 1 else -1) % len(shape)
        halves: list[list[Tensor]] = [[], []]
        for layer in self.layers[args[0]]:
            for own, part in zip(halves, layer.chunk(2, dim), strict=True):
                own.append(part)
        size = outs[0].shape
        return [self.meet([(size, halves[0]), (size, halves[1])], size)], None


# -- operations --------------------------------------------------------------------------------------------------------


def _on(numbers: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Numbers along one axis of a shape, stride 0 elsewhere."""
    return numbers.view([len(numbers) if d == dim else 1 for d in range(len(shape))]).expand(shape)


def _narrowed(layer: Tensor, dims: Iterable[int]) -> Tensor:
    for d in dims:
        layer = layer.narrow(d, 0, 1)
    return layer


def _shaped(layer: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, i, j] with B, i or j of 1 left out where the result has no such axis."""
    small = compact(layer)
    if layer.dim() != len(shape):
        keep = {3: (0, 1, 2), 2: (1, 2), 1: (1,) if layer.shape[2] == 1 else (2,), 0: ()}[len(shape)]
        small = small.reshape([small.shape[d] for d in keep])
    return small.expand(shape)


def _as_batches(part: tuple[Sequence[int], list[Tensor]], left: bool) -> tuple[tuple[int, ...], list[Tensor]]:
    """A factor of a product as [B, i, k, 1], or [B, 1, k, j]."""
    shape, layers = tuple(part[0]), part[1]
    if len(shape) == 1:
        shape = (1, *shape) if left else (*shape, 1)
        layers = [layer.unsqueeze(0 if left else 1) for layer in layers]
    if len(shape) == 2:
        shape, layers = (1, *shape), [layer.unsqueeze(0) for layer in layers]
    at = 3 if left else 1
    return (*shape[:at], 1, *shape[at:]), [layer.unsqueeze(at) for layer in layers]


def moves(func: Any, name: str, args: Any, kwargs: Any, tensor: Tensor, shape: Sequence[int]) -> Sequence[Tensor]:
    """An operation that only moves elements, done with another tensor of the same shape."""
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return [tensor.reshape(shape)]
    if name in ("detach", "alias", "lift_fresh"):
        return [tensor]
    if name.endswith("_"):  # transpose_, say
        return [getattr(tensor, name[:-1])(*args[1:], **kwargs)]
    if name == "as_strided":  # a matter of memory alone where the shape stays
        if tuple(args[1]) != tuple(tensor.shape):
            raise NotImplementedError("as_strided to another shape")
        return [tensor]
    out = func(tensor, *args[1:], **kwargs)
    return [out] if isinstance(out, Tensor) else out


def bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by their names."""
    return {**{a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}, **kwargs}


_KINDS: dict[Any, tuple[str, str]] = {}


def _kind(func: Any) -> tuple[str, str]:
    """The name of an operation without the mark of those that work in place, and the rule for it."""
    if func in _KINDS:
        return _KINDS[func]
    space, name = func._schema.name.split("::")
    base = name[:-1] if name.endswith("_") and not name.startswith("__") and name not in _MOVES else name
    plain = getattr(torch.ops.aten, base, None)
    tags = list(func.tags)
    if plain is not None and base != name and func._overloadname in plain.overloads():
        tags += getattr(plain, func._overloadname).tags
    if space != "aten":
        kind = "spatial" if base in _REGIONS else "unknown"
    elif base in _FACTORIES:
        kind = "factory"
    elif base in _REDUCTIONS and not (base in ("max", "min") and func._overloadname == "other"):
        kind = "reduce"
    elif base in _SCANS:
        kind = "scan"
    elif (func.is_view or base in _MOVES) and func._overloadname != "dtype":
        kind = "move"
    elif base in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"):
        kind = "contract"
    elif base == "cat" or base == "stack":
        kind = "cat"
    elif base in ("native_layer_norm", "_fused_rms_norm"):
        kind = "layer_norm"
    elif "batch_norm" in base:
        kind = "batch_norm"
    elif base == "native_group_norm":
        kind = "group_norm"
    elif base in ("convolution", "convolution_overrideable"):
        kind = "convolution"
    elif base == "_trilinear":
        kind = "trilinear"
    elif base in ("embedding", "glu"):
        kind = base
    elif base in ("index", "index_select", "gather"):
        kind = "index"
    elif base == "index_put":
        kind = "index_put"
    elif base == "constant_pad_nd":
        kind = "pad"
    elif base.startswith(_SPATIAL):
        kind = "spatial"
    elif torch.Tag.pointwise in tags or base in _POINTWISE:
        kind = "pointwise"
    else:
        kind = "unknown"
    _KINDS[func] = (base, kind)
    return _KINDS[func]


# -- running -----------------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside ``torch.compile``, ``DataParallel``, DDP and averaging wrappers, and the prefix of its names."""
    prefix = ""
    while True:
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
        if inner is None or not ("_orig_mod" in model._modules or isinstance(model, kinds)):
            return model, prefix
        prefix += "_orig_mod." if "_orig_mod" in model._modules else "module."
        model = inner


def duplicate(model: nn.Module, instead: Mapping[int, Any]) -> nn.Module:
    """A copy of a model in which tensors, by their ``id``, stand for others; hooks and attributes are copied.

    Raises:
        StructureError: it holds something that cannot be copied.
    """
    memo = dict(instead)
    for module in model.modules():
        own = [v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")]
        for value in own:
            if type(value) is OrderedDict and not value:  # hooks that are not there: deepcopy is slow on each of them
                memo[id(value)] = OrderedDict()
        for value in tree_leaves(
            [v for v in own if isinstance(v, Tensor) or (isinstance(v, list | tuple | dict) and v)]
        ):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # noqa: BLE001 - whatever an attribute raises that cannot be copied
        raise StructureError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from None


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as the arguments of a call: a tensor, a tuple of positional ones, or a dict of named ones; cloned."""
    example = tree_map_only(Tensor, lambda t: t.detach().clone(), example)
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def tensors(output: Any) -> list[Tensor]:
    """All tensors of what a model gave: a tensor, or tuples, lists, dicts and dataclasses of them."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = [getattr(output, part.name) for part in fields(output)]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode as long as the ``with`` lasts; afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, and random numbers go on afterwards as if nothing had been drawn."""
    states, fast = (random.getstate(), np.random.get_state()), torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), torch.random.fork_rng():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _decomposed() -> Iterator[None]:
    """Recurrent layers as the operations that they consist of."""
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch.backends.cudnn.enabled  # mkldnn.flags() warns about TF32
    torch._C._set_mkldnn_enabled(False)
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.cudnn.enabled = cudnn


def run(model: nn.Module, example: Any, seed: int | None = None) -> list[Tensor]:
    """The tensors that a model gives in evaluation mode; nothing of it, nor of the example, is changed.

    Args:
        model: any module.
        example: a tensor, a tuple of positional arguments or a dict of named ones.
        seed: of the random numbers that the model draws; None: as they come.

    Raises:
        StructureError: the model raised something for the example.
    """
    args, kwargs = arguments(example)
    with undisturbed(), evaluating(model):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        try:
            out = model(*args, **kwargs)
        except Exception as error:
            raise StructureError(f"{_called(model, example)}: {first_line(error)}") from error
    return given(out)


def given(output: Any) -> list[Tensor]:
    """The tensors of what a model gave; there is one at least.

    Raises:
        StructureError: none is found.
    """
    if not (found := tensors(output)):
        raise StructureError(
            f"the model gives a {type(output).__name__}, in which no tensor is found that a smaller model could be "
            "compared by: let its forward give tensors, or a tuple or dict of them"
        )
    return found


def _called(model: nn.Module, example: Any) -> str:
    shapes = [str(tuple(t.shape)) for t in tree_leaves(example) if isinstance(t, Tensor)]
    what = "shape" if len(shapes) == 1 else "shapes"
    return f"{type(model).__name__} does not take the example of {what} {', '.join(shapes)}"


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a model by all its names, and tensors that are plain attributes of a module."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for where in (module._parameters, module._buffers, vars(module)):
            for name, value in where.items():
                if isinstance(value, Tensor):
                    found[f"{prefix}.{name}" if prefix else name] = value
    return found


def refuse(model: nn.Module) -> None:
    """Refuse a model that has no weights of numbers yet, or any more.

    Raises:
        StructureError: it says which parameter, and what to do.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(f"the model should be an nn.Module, not a {type(model).__name__}")
    for name, tensor in named_tensors(model).items():
        if is_lazy(tensor):
            raise StructureError(f"{name} has no shape yet: run the model on a batch first")
        if tensor.is_meta:
            raise StructureError(f"{name} is on the meta device and has no values: load the weights first")
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise StructureError(f"{name or 'the model'} is quantised: prune and shrink first, quantise afterwards")


def watch(model: nn.Module, example: Any) -> Seen:
    """What one run of a model shows; the model, its example and the random numbers are as before.

    Args:
        model: any module that runs; wrappers are looked through.
        example: a tensor, a tuple of positional arguments or a dict of named ones, of any batch size above 0.

    Raises:
        StructureError: the model does not take the example, changes its parameters, or cannot be copied.
    """
    model, _ = unwrapped(model)
    refuse(model)
    if any(t.numel() == 0 and t.dim() for t in tree_leaves(example) if isinstance(t, Tensor)):
        raise StructureError("the example has no samples: give a batch of at least one")
    if not any(isinstance(t, Tensor) for t in tree_leaves(example)):
        raise StructureError(f"the example should hold a tensor, not be a {type(example).__name__}")
    seen = _watched(model, example, mkldnn=True)
    if seen.again:
        seen = _watched(model, example, mkldnn=False)
    return _understood(seen)


def _watched(model: nn.Module, example: Any, mkldnn: bool) -> _Watch:
    double = duplicate(model, {id(p): p for p in model.parameters()}).eval()
    for module in double.modules():
        if isinstance(module, Gate):
            module.open.zero_()  # one that is open everywhere does nothing, so that nothing would be seen of it
    own = named_tensors(double)
    by_id: dict[int, str] = {}
    for name, tensor in own.items():
        by_id.setdefault(id(tensor), name)
    pointers = {(t.data_ptr(), t.shape, t.stride()): name for name, t in reversed(own.items()) if t.numel() > 1}
    seen = _Watch(by_id, pointers)
    seen.modules = dict(double.named_modules())
    follow_calls(double, seen.stack)
    args, kwargs = arguments(example)
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            tensor._prunelab = (seen.token, seen.new(tensor, []))
    with undisturbed(), contextlib.nullcontext() if mkldnn else _decomposed(), sdpa_kernel(SDPBackend.MATH), seen:
        try:
            out = double(*args, **kwargs)
        except StructureError:
            raise
        except Exception as error:
            raise StructureError(f"{_called(model, example)}: {first_line(error)}") from error
    seen.outputs = [seen.ref(t) for t in given(out)]
    for ref in seen.outputs:
        for layer in seen.layers[ref]:
            seen.pin(layer, OUTPUT)
    return seen


def follow_calls(model: nn.Module, stack: list[str]) -> list[RemovableHandle]:
    """Keep on a stack which module of a model is at work; what raises leaves it there."""

    def enters(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leaves(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enters(name), prepend=True))
        handles.append(module.register_forward_hook(leaves))
    return handles


def _understood(seen: _Watch) -> Seen:
    """Numbers that are the same get the number of their group; pins and blocks are told in groups."""
    n = seen.count
    pairs = [(a.expand_as(b), b) if a.numel() < b.numel() else (a, b.expand_as(a)) for a, b in seen.joins]
    a, b = (torch.cat([pair[i] for pair in pairs]) if pairs else torch.zeros(0, dtype=torch.long) for i in (0, 1))
    loose = (a != FIXED) & (b != FIXED)
    fixed = torch.cat([a[~loose], b[~loose]])
    graph = coo_matrix((np.ones(int(loose.sum()), dtype=np.bool_), (a[loose].numpy(), b[loose].numpy())), shape=(n, n))
    root = torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))
    pinned: dict[int, str] = {int(root[FIXED]): "it is fixed"}
    soft: dict[int, str] = {}
    pins = [*seen.pins, (fixed, "it is combined with something whose size is fixed", False)]
    for numbers, why, lightly in pins:
        for group in root[numbers].unique().tolist():
            (soft if lightly else pinned).setdefault(group, why)
    blocks = []
    for (key, _, _), block in seen.blocks.items():
        if not block.fixed and block.rows is None and (key, None, True) in seen.blocks:
            continue
        cells = root[block.cells]
        whole = bool((cells == cells[:, :1]).all())
        if block.rows is None and (cells.shape[1] == 1 or whole) and not block.fixed:
            continue
        blocks.append(Block(None if block.rows is None else root[block.rows], cells, block.fixed))
    roles = torch.zeros(n, dtype=torch.int8)
    for role, lists in ((3, seen.added), (1, seen.read), (2, seen.made)):
        if lists:
            roles[torch.cat(lists)] = role
    sizes = {module: {size: list(by.values()) for size, by in own.items()} for module, own in seen.sizes.items()}
    return Seen(
        root=root,
        slots=seen.slots,
        columns=seen.columns,
        roles=roles,
        pinned=pinned,
        soft=soft,
        blocks=blocks,
        products=[root[cells] for cells in seen.products],
        tape=seen.tape,
        layers=seen.layers,
        shapes=seen.shapes,
        names=seen.names,
        constants=seen.constants,
        sizes=sizes,
        pads=seen.pads,
        weights=seen.weights,
        outputs=seen.outputs,
        scaled=[root[cells] for cells in seen.scaled],
    )
