"""What is constant whatever the input is, who reads it, and how it is folded into the biases behind.

The operations that were seen are gone through once more, now with the values of parameters: beside every tensor walks
what is known of it, NaN where that depends on the input. Axes along which a value is the same have stride 0, so this
costs as much as the channels are, and the weights, not as much as a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prunelab.structure.watch import Op, Ref, Seen, along, bound, compact, moves, settled, varying

Value = Tensor | None  # expanded to the tensor's shape; NaN: depends on the input; None: all of it does
_KEEPS = ("max_pool", "adaptive_", "_adaptive", "upsample", "_upsample", "reflection", "replication", "fractional")
_RANDOM = {
    "bernoulli",
    "uniform",
    "normal",
    "rand_like",
    "randn_like",
    "native_dropout",
    "empty_like",
    "rrelu_with_noise",
}


@dataclass
class Read:
    """Channels that an operation sums over.

    Attributes:
        columns: numbers of the channels.
        rows: numbers of the channels that it makes of them; None: something that stays.
        pattern: bool [rows, columns], which are read by which; or [columns], each by the row at its own place.
        level: of each channel its constant, float64; NaN where it varies.
        exact: of each, whether what it adds is the same everywhere.
        weight: [rows, columns], what a constant is multiplied by; None: unknown.
        places: where what constants add can go: (sign, for each row the slot number, -1: none); None: nowhere.
        module: that does it.
    """

    columns: Tensor
    rows: Tensor | None
    pattern: Tensor
    level: Tensor
    exact: Tensor
    weight: Callable[[Tensor], Tensor] | None
    places: list[tuple[int, Tensor]] | None
    module: str


class Constants:
    """One pass over what was seen of a model, with the values of its parameters.

    Args:
        seen: of the model.
        values: parameter or buffer -> its value, NaN where it may be anything.

    Attributes:
        values: tensor number -> what is known of it.
        reads: every sum over channels, in forward order.
    """

    def __init__(self, seen: Seen, values: Mapping[str, Tensor]) -> None:
        self.seen, self.values, self.reads = seen, {}, []
        for number, name in seen.names.items():
            self.values[number] = values[name].detach().cpu() if name in values else None
        for number, tensor in seen.constants.items():
            self.values[number] = tensor.detach().cpu() if tensor.is_floating_point() and not tensor.is_meta else None
        self.computed: dict[int, bool] = {}  # tensors made of parameters alone, all of whose values are known
        self.readers: dict[int, list[Op]] = {}
        for op in seen.tape:
            for ref in set(op.refs):
                self.readers.setdefault(int(ref), []).append(op)
        for op in seen.tape:
            rule = getattr(self, f"_{op.kind}", None)
            found = self._computed(op)
            if found is None and rule is not None:
                found = rule(op)
            for place, number in enumerate(op.outs):
                value = found if place == 0 or isinstance(found, list) else None
                if isinstance(value, list):
                    value = value[place]
                shape = seen.shapes[number]
                nothing = value is None or not value.is_floating_point()
                nothing = nothing or (op.kind != "move" and bool(compact(value).isnan().all()))
                self.values[number] = None if nothing else value.expand(shape)
            for number in op.stale:
                self.values[number] = None

    def _computed(self, op: Op) -> Any:
        """What an operation makes of parameters alone, as that of a weight that is standardised."""
        refs = op.refs
        if op.kind == "move" or not refs or op.name in _RANDOM or op.func._schema.is_mutable:
            return None
        if not all(ref in self.seen.weights and self._known(ref) for ref in refs):
            return None
        args, kwargs = tree_map_only(Ref, self.values.__getitem__, (op.args, op.kwargs))
        try:
            made = op.func(*args, **kwargs)
        except RuntimeError:
            return None
        return list(made) if isinstance(made, tuple | list) else [made]

    def _known(self, ref: int) -> bool:
        if ref not in self.computed:
            value = self.values.get(ref)
            self.computed[ref] = value is not None and not bool(compact(value).isnan().any())
        return self.computed[ref]

    def of(self, ref: Any) -> Value:
        """What is known of a tensor; None: nothing, or it is none."""
        return self.values.get(ref) if isinstance(ref, Ref) else None

    # rules: each gives what is known of the results ------------------------------------------------------------------

    def _pointwise(self, op: Op) -> Value:
        refs = op.refs
        known = [self.of(ref) for ref in refs]
        if all(value is None for value in known) or op.name in _RANDOM:
            return None
        if op.name in ("zeros_like", "zero", "fill") and not any(isinstance(a, Ref) for a in op.args[1:]):
            return torch.full((), float(op.args[1]) if op.name == "fill" else 0.0, dtype=torch.float64)
        if op.name in ("clone", "_to_copy", "contiguous", "lift_fresh_copy", "copy"):
            return known[-1]
        rank = max(len(self.seen.shapes[ref]) for ref in refs)
        never = torch.full((), math.nan, dtype=torch.float64)
        small = {}
        for ref, value in zip(refs, known, strict=True):
            part = never if value is None else compact(value).double()
            small[ref] = part[(None,) * (rank - part.dim())] if part.dim() else part
        if op.name in ("tril", "triu"):
            return torch.where(small[refs[0]] == 0, 0.0, math.nan)
        if op.name in ("where", "masked_fill"):
            sides = op.args[1:3] if op.name == "where" else (op.args[0], op.args[2])
            one, two = (small[a] if isinstance(a, Ref) else torch.tensor(float(a)).double() for a in sides)
            return torch.where(one == two, one, math.nan)
        whole = dict(zip(small, torch.broadcast_tensors(*small.values()), strict=True))
        nothing = torch.stack([part.isnan() for part in whole.values()]).any(0)
        args, kwargs = tree_map_only(Ref, lambda ref: whole[ref].nan_to_num().clone(), (op.args, op.kwargs))
        kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "device", "layout")}
        try:
            made = op.func(*args, **kwargs)
        except RuntimeError:  # it wants the whole tensor, not one number for each channel
            return None
        made = made[0] if isinstance(made, tuple | list) else made
        if not made.is_floating_point():
            return None
        made = torch.where(nothing, math.nan, made)
        if op.name == "mul" and len(whole) == 2:
            one, two = whole.values()
            made = torch.where((one == 0) | (two == 0), 0.0, made)
        return made

    def _factory(self, op: Op) -> Value:
        if op.name in ("zeros", "new_zeros"):
            return torch.zeros((), dtype=torch.float64)
        return torch.ones((), dtype=torch.float64) if op.name in ("ones", "new_ones") else None

    def _move(self, op: Op) -> Any:
        value = self.of(op.args[0])
        if value is None:
            return None
        bits = value.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[value.element_size()])  # NaN equals NaN
        moved = moves(op.func, op.name, op.args, op.kwargs, bits, self.seen.shapes[op.outs[0]])
        return [settled(part, bits).view(value.dtype) for part in moved]

    def _cat(self, op: Op) -> Value:
        shape = self.seen.shapes[op.outs[0]]
        refs = [ref for ref in op.args[0] if self.seen.shapes[ref].numel() or len(self.seen.shapes[ref]) > 1]
        if all(self.of(ref) is None for ref in refs):
            return None
        dim = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else 0) % len(shape)
        extent, parts = [1] * len(shape), []
        for ref in refs:
            value = self.of(ref)
            value = (
                torch.full((1,) * len(self.seen.shapes[ref]), math.nan, dtype=torch.float64)
                if value is None
                else compact(value).double()
            )
            value = value.unsqueeze(dim) if op.name == "stack" else value
            extent = [max(pair) for pair in zip(extent, value.shape, strict=True)]
            parts.append((1 if op.name == "stack" else self.seen.shapes[ref][dim], value))
        return torch.cat([v.expand([n if d == dim else extent[d] for d in range(len(shape))]) for n, v in parts], dim)

    def _pad(self, op: Op) -> Value:
        value, fill = self.of(op.args[0]), float(op.args[2] if len(op.args) > 2 else op.kwargs.get("value", 0))
        if value is None:
            value = torch.full((), math.nan, dtype=torch.float64).expand(self.seen.shapes[op.args[0]])
        small, amounts = compact(value).double(), list(op.args[1])
        for i in range(0, len(amounts), 2):
            d = small.dim() - 1 - i // 2
            if not any(amounts[i : i + 2]):
                continue
            if d == 1 or small.shape[d] > 1:  # further channels
                small = small.expand(
                    [self.seen.shapes[op.args[0]][at] if at == d else n for at, n in enumerate(small.shape)]
                )
                small = torch.nn.functional.pad(small, [0] * i + amounts[i : i + 2], value=fill)
            else:
                small = torch.where(small == fill, small, math.nan)
        return small

    def _spatial(self, op: Op) -> Value:
        value, shape = self.of(op.args[0]), self.seen.shapes[op.outs[0]]
        if value is None or varying(value) & set(range(2, len(shape))):
            return None
        small = compact(value)
        return small if _borderless(op) else torch.where(small == 0, small, math.nan)

    def _index_put(self, op: Op) -> Value:
        """Rows of another tensor in the place of some: what is the same constant in both is one."""
        own, other = (self.of(ref) for ref in (op.args[0], op.args[2]))
        if own is None or other is None:
            return None
        one, two = (
            along(value, 1).double() if value.dim() > 1 else value.double().view(1, -1) for value in (own, other)
        )
        one, two = (torch.where((part == part[:, :1]).all(1), part[:, 0], math.nan) for part in (one, two))
        shape = self.seen.shapes[op.outs[0]]
        same = torch.where(one == two, one, math.nan)
        return same.view(1, -1, *[1] * (len(shape) - 2)) if len(shape) > 1 else None

    def _reduce(self, op: Op) -> Value:
        value = self.of(op.args[0])
        if isinstance(op.extra, tuple) and op.name in ("sum", "linalg_vector_norm", "norm", "mean"):
            for layer in op.extra[0]:
                self._summed(op, layer, value)
        if value is None or not isinstance(op.extra, tuple):
            return None
        given, rank = bound(op.func, op.args, op.kwargs), value.dim()
        dims = given.get("dim")
        dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        dims = [d % rank for d in dims] if rank else []
        small = compact(value).double()
        times = math.prod(value.shape[d] for d in dims if small.shape[d] == 1)
        if op.name == "sum":
            small = small.sum(dims, keepdim=True) * times
        elif op.name == "mean":
            small = small.mean(dims, keepdim=True)
        elif not all(small.shape[d] == 1 for d in dims) or op.name not in ("amax", "amin", "max", "min"):
            return None
        return small if given.get("keepdim") else small.squeeze(tuple(dims)) if dims else small

    def _summed(self, op: Op, layer: Tensor, value: Value) -> None:
        """A plain sum over channels: whatever is not 0 is read."""
        numbers = compact(layer)
        level = torch.full(numbers.shape, math.nan, dtype=torch.float64)
        if value is not None and not varying(value) - varying(layer):
            level = compact(value).double().expand(numbers.shape).clone()
        level, numbers = level.flatten(), numbers.flatten()
        self.reads.append(
            Read(numbers, None, torch.ones(1, len(numbers), dtype=torch.bool), level, level == 0, None, None, op.module)
        )

    def _batch_norm(self, op: Op) -> Value:
        given = list(op.args[:5])
        x, scale, shift, mean, var = (self.of(ref) for ref in given)
        rank = len(self.seen.shapes[op.outs[0]])

        def shaped(value: Value, default: float) -> Tensor:
            value = torch.full((1,), default, dtype=torch.float64) if value is None else value.double()
            return value.view(1, -1, *[1] * (rank - 2))

        x = torch.full((), math.nan, dtype=torch.float64) if x is None else compact(x).double()
        unknown = [
            math.nan if isinstance(ref, Ref) else default for ref, default in zip(given[1:], (1, 0, 0, 1), strict=True)
        ]
        gamma, beta = shaped(scale, unknown[0]), shaped(shift, unknown[1])
        if given[3] is None:  # of the sample itself: of a constant nothing is left
            normal = torch.where(x.isnan(), math.nan, 0.0)
        else:
            eps = bound(op.func, op.args, op.kwargs)["eps"]
            normal = (x - shaped(mean, unknown[2])) * (shaped(var, unknown[3]) + eps).rsqrt()
        return torch.where(gamma == 0, 0.0, normal * gamma) + beta

    def _layer_norm(self, op: Op) -> Value:
        weight, bias = (
            self.of(ref) for ref in (*[a for a in op.args if a is None or isinstance(a, Ref)], None, None)[1:3]
        )
        return None if weight is None or bias is None else torch.where(weight == 0, bias.double(), math.nan)

    def _group_norm(self, op: Op) -> Value:
        weight, bias = (self.of(ref) for ref in op.args[1:3])
        if weight is None or bias is None:
            return None
        return torch.where(weight == 0, bias.double(), math.nan).view(
            1, -1, *[1] * (len(self.seen.shapes[op.outs[0]]) - 2)
        )

    def _glu(self, op: Op) -> Value:
        value = self.of(op.args[0])
        if value is None:
            return None
        dim = op.args[1] if len(op.args) > 1 else -1
        a, b = value.double().chunk(2, dim)
        return torch.where(a == 0, 0.0, a * b.sigmoid())

    def _embedding(self, op: Op) -> Value:
        weight = self.of(op.args[0])
        return None if weight is None else torch.where((weight == weight[:1]).all(0), weight[0].double(), math.nan)

    def _convolution(self, op: Op) -> Value:
        given = bound(op.func, op.args, op.kwargs)
        _, w, bias, over, made = op.extra
        value, groups, turned = self.of(w), given["groups"], given["transposed"]
        if value is None:
            return None
        level = self._level(given["input"], 1)
        nonzero = _nonzero(value)
        nonzero = nonzero[(..., *[0] * (value.dim() - 2))] if not varying(nonzero) else nonzero.flatten(2).any(2)
        if turned:  # [inputs, outputs of a group] -> [outputs, inputs of a group]
            nonzero = nonzero.view(groups, -1, nonzero.shape[1]).transpose(1, 2).flatten(0, 1)
        sizes = value.shape[2:]
        bordered = any(given["padding"]) or (turned and list(sizes) != list(given["stride"]))
        exact = (level == 0) | (~level.isnan() & (not bordered))

        def weight(columns: Tensor) -> Tensor:
            """[outputs, so many columns], float64; groups are written out."""
            total = value.double().flatten(2).sum(2)
            if turned:
                total = total.view(groups, -1, total.shape[1]).transpose(1, 2).flatten(0, 1) / math.prod(sizes)
            return _spread(total, groups)[:, columns]

        pattern = _spread(nonzero, groups)
        if over or not made:
            columns = over[0] if over else torch.zeros(0, dtype=torch.long)
            if over:
                places = self._places(op, made[0] if made else None, bias)
                self.reads.append(
                    Read(columns, made[0] if made else None, pattern, level, exact, weight, places, op.module)
                )
        return self._given(pattern, level, exact, weight, self.of(bias), bias is not None).view(
            1, -1, *[1] * len(sizes)
        )

    def _given(self, pattern: Tensor, level: Tensor, exact: Tensor, weight: Any, bias: Value, biased: bool) -> Tensor:
        """What rows give: NaN where they read anything that varies."""
        base = torch.zeros(len(pattern), dtype=torch.float64)
        if biased:
            base = torch.full_like(base, math.nan) if bias is None else bias.double().expand(len(pattern)).clone()
        loose = (~exact).nonzero().flatten()
        if len(loose) == len(level):
            varies = compact(pattern).any(1).expand(len(pattern))
        else:
            varies = pattern[:, loose].any(1)
            adds = (exact & (level != 0)).nonzero().flatten()
            if len(adds):
                part = weight(adds)
                base += torch.where(part == 0, 0.0, part * level[adds]).sum(1)
        return torch.where(varies, math.nan, base)

    def _level(self, ref: Ref, dim: int) -> Tensor:
        """The constant of each index of an axis, NaN where it is none, or not the same everywhere; float64."""
        value, size = self.of(ref), self.seen.shapes[ref][dim]
        if value is None:
            return torch.full((size,), math.nan, dtype=torch.float64)
        rows = along(value, dim).double()
        rows = torch.where((rows == rows[:, :1]).all(1), rows[:, 0], math.nan)
        return rows.expand(size).clone() if len(rows) == 1 else rows

    def _contract(self, op: Op) -> Value:
        a, b, over, left = op.extra
        one, two = self.of(a), self.of(b)
        added = op.args[0] if op.name.startswith(("add", "badd")) else None
        if one is None and two is None:
            self._activations(op, over, left, None, None)
            return None
        x_first = two is not None and self._is_weight(two)
        if not x_first and not (one is not None and self._is_weight(one)):
            return self._activations(op, over, left, one, two)
        x, value = (a, two.t()) if x_first else (b, one)  # value: [rows, columns]
        level = self._level(x, len(self.seen.shapes[x]) - 1 if x_first else 0)
        pattern, exact = _nonzero(value), ~level.isnan()
        side = 3 if x_first else 1

        def weight(columns: Tensor) -> Tensor:
            return value[:, columns].double()

        rows = [along(layer, side)[:, 0] for layer in left if varying(layer) == {side}]
        for layer in over:
            if varying(layer) == {2}:
                places = self._places(op, rows[0] if rows else None, added)
                self.reads.append(
                    Read(
                        along(layer, 2)[:, 0],
                        rows[0] if rows else None,
                        pattern,
                        level,
                        exact,
                        weight,
                        places,
                        op.module,
                    )
                )
            else:
                self._unread(op, layer)
        bias = self.of(added)
        if added is not None and (bias is None or (bias.dim() > 1 and varying(bias) - {bias.dim() - 1})):
            return None
        if bias is not None and bias.dim() > 1:
            bias = bias.reshape(-1, bias.shape[-1])[0]
        out = self._given(pattern, level, exact, weight, bias if side == 3 else None, added is not None)
        rank = len(self.seen.shapes[op.outs[0]])
        return out if rank == 1 or side == 3 else out.unsqueeze(1)

    def _is_weight(self, value: Tensor) -> bool:
        axes = varying(value)
        return value.dim() == 2 and (not axes or axes == {d for d in (0, 1) if value.shape[d] > 1})

    def _unread(self, op: Op, layer: Tensor) -> None:
        numbers = compact(layer).flatten()
        level = torch.full((len(numbers),), math.nan, dtype=torch.float64)
        self.reads.append(
            Read(numbers, None, torch.ones(1, len(numbers), dtype=torch.bool), level, level == 0, None, None, op.module)
        )

    def _activations(self, op: Op, over: list[Tensor], left: list[Tensor], one: Value, two: Value) -> Value:
        """A product of two activations: what is 0 adds nothing, all else is read."""

        def factor(value: Value, at: int) -> Tensor:
            if value is None:
                return torch.full((1,) * 4, math.nan, dtype=torch.float64)
            small = compact(value).double()
            return small[(None,) * (3 - small.dim())].unsqueeze(at)

        a, b = factor(one, 3), factor(two, 1)
        adds = (a != 0) & (b != 0)  # NaN is not 0
        for layer in over:
            numbers = compact(layer)
            own = (
                adds.amax([d for d in range(4) if numbers.shape[d] == 1], keepdim=True).expand(numbers.shape).flatten()
            )
            level = torch.where(own, math.nan, 0.0).double()
            rows = next((row for row in left if varying(row) and varying(row) < varying(layer)), None)
            wide = compact(rows).expand(numbers.shape).flatten() if rows is not None else None
            pattern = (
                torch.ones(len(level), dtype=torch.bool)
                if wide is not None
                else torch.ones(1, len(level), dtype=torch.bool)
            )
            self.reads.append(Read(numbers.flatten(), wide, pattern, level, level == 0, None, None, op.module))
        if bool(adds.all()) or op.name.startswith(("add", "badd")):
            return None
        out = torch.where(adds.any(2), math.nan, 0.0)
        rank = len(self.seen.shapes[op.outs[0]])
        return out if rank == 3 else out.reshape(out.shape[3 - rank :]) if rank == 2 else None

    def _trilinear(self, op: Op) -> Value:
        """A product of three: what is 0 adds nothing, all else is read."""
        dims, rank = sorted(op.args[6]), len(self.seen.shapes[op.outs[0]]) + len(op.args[6])
        adds = torch.ones((1,) * rank, dtype=torch.bool)
        for ref, places in zip(op.args[:3], op.args[3:6], strict=True):
            value = self.of(ref)
            part = torch.full((), math.nan) if value is None else compact(value)
            for d in places if value is not None else ():
                part = part.unsqueeze(d)
            adds = adds & (part != 0)  # NaN is not 0
        row = next((layer for layer in op.extra[0] if not varying(layer) & set(dims)), None)
        for layer in op.extra[0]:
            if not varying(layer) & set(dims):
                continue
            (d,), at = varying(layer), None if row is None else min(varying(row))
            sums = [e for e in range(rank) if e not in (d, at)]
            pattern = adds.amax(sums, keepdim=True).expand(
                [n if e in (d, at) else 1 for e, n in enumerate(layer.shape)]
            )
            pattern = pattern.movedim(d, -1).reshape(-1, layer.shape[d])
            level = torch.where(pattern.any(0), math.nan, 0.0).double()
            rows = None if row is None else along(row, at)[:, 0]
            self.reads.append(Read(along(layer, d)[:, 0], rows, pattern, level, level == 0, None, None, op.module))
        return torch.where(adds.amax(dims), math.nan, 0.0).double()

    # where constants can go ------------------------------------------------------------------------------------------

    def _places(self, op: Op, rows: Tensor | None, bias: Any) -> list[tuple[int, Tensor]] | None:
        """Its own bias, or the means of every BatchNorm that reads it, also through pooling and concatenation."""
        if rows is None:
            return None
        if isinstance(bias, Ref):
            layers = [layer for layer in self.seen.layers[bias] if varying(layer) == {layer.dim() - 1}]
            numbers = [along(layer, layer.dim() - 1)[:, 0] for layer in layers]
            return [(1, numbers[0])] if numbers and len(numbers[0]) == len(rows) else None
        return self._norms(op.outs[0], rows)

    def _norms(self, number: int, rows: Tensor) -> list[tuple[int, Tensor]] | None:
        found: list[tuple[int, Tensor]] = []
        for op in self.readers.get(number, ()):
            if op.kind == "batch_norm" and op.args[0] == number and isinstance(op.args[3], Ref):
                own, mean = self.seen.layers[number], self.seen.layers[op.args[3]]
                if len(own) != 1 or len(mean) != 1 or varying(own[0]) != {1}:
                    return None
                channels, slots = along(own[0], 1)[:, 0], along(mean[0], 0)[:, 0]
                order = channels.argsort(stable=True)
                at = torch.searchsorted(channels[order], rows).clamp(max=len(channels) - 1)
                hit = channels[order][at] == rows
                found.append((-1, torch.where(hit, slots[order][at], -1)))
                continue
            border = op.kind == "spatial" and not _borderless(op)
            nothing = op.kind == "pointwise" and op.name in ("clone", "_to_copy", "contiguous", "dropout")
            if op.kind not in ("move", "cat") and not nothing and (op.kind != "spatial" or border):
                return None
            for out in op.outs[:1] if op.kind == "spatial" else op.outs:
                further = self._norms(out, rows)
                if further is None:
                    return None
                found += further
        return found or None


def _borderless(op: Op) -> bool:
    """Whether a pooling, or the like, gives a constant on as it is, at the border, too."""
    if not op.name.startswith("avg_pool"):
        return op.name.startswith(_KEEPS)
    given = bound(op.func, op.args, op.kwargs)
    padded = any(given.get("padding") or ()) and given.get("count_include_pad", True)
    return not padded and not given.get("divisor_override")


def _nonzero(value: Tensor) -> Tensor:
    """Where a value is, or may be, anything but 0."""
    return (compact(value) != 0).expand(value.shape)


def anything(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Values of parameters that may be anything."""
    return {name: torch.full((), math.nan).expand(tuple(shape)) for name, shape in shapes.items()}


def _spread(part: Tensor, groups: int) -> Tensor:
    """[rows, inputs of a group] -> [rows, all inputs], zero where a row does not look."""
    if groups == 1:
        return part
    rows, inputs = part.shape
    made = part.new_zeros(groups, rows // groups, groups, inputs)
    each = torch.arange(groups)
    made[each, :, each] = part.view(groups, rows // groups, inputs)
    return made.view(rows, groups * inputs)


def live(seen: Seen, reads: Sequence[Read], fixed: Tensor) -> Tensor:
    """Which groups anything that matters reads, where they are not constant, or cannot be folded; bool [groups].

    Args:
        seen: of the model.
        reads: from ``Constants``.
        fixed: bool [groups], those that stay whatever the weights are.
    """
    stays = fixed.clone()
    work = []
    for read in reads:
        folds = read.exact & ((read.level == 0) | (read.places is not None))
        rows = None if read.rows is None else seen.root[read.rows]
        work.append((seen.root[read.columns], rows, read.pattern, ~folds))
    heads = [(block.rows, block.cells) for block in seen.blocks if block.rows is not None]
    before: list[Any] = [None] * len(work)
    count = -1
    while count != (count := int(stays.sum())):
        for rows, cells in heads:
            stays[rows[stays[cells].any(1)]] = True
        for i in range(len(work) - 1, -1, -1):
            columns, rows, pattern, needs = work[i]
            wanted = None if rows is None else stays[rows]
            if before[i] is not None and (wanted is None or torch.equal(wanted, before[i])):
                continue
            before[i] = torch.ones(1) if wanted is None else wanted
            if wanted is None:
                used = pattern.any(0) if pattern.dim() == 2 else pattern
            elif pattern.dim() == 1:
                used = pattern & wanted
            elif pattern.stride(0) == 0:
                used = pattern[0] & wanted.any()
            else:
                used = (pattern if bool(wanted.all()) else pattern[wanted]).any(0)
            stays[columns[used & needs]] = True
    return stays


def fold(seen: Seen, reads: Sequence[Read], gone: Tensor, values: dict[str, Tensor]) -> set[str]:
    """Add what removed constants contribute to the biases behind, or take it off the means of BatchNorm, in place.

    Args:
        seen: of the model.
        reads: from ``Constants``.
        gone: bool [groups].
        values: parameter or buffer -> value; those that change are replaced.

    Returns:
        The names of those that changed.
    """
    starts, owners = [], []
    for name, axes in seen.slots.items():
        for dim, numbers in axes.items():
            starts.append(int(numbers[0]))
            owners.append((name, dim))
    order = sorted(range(len(starts)), key=starts.__getitem__)
    first = torch.tensor([starts[i] for i in order], dtype=torch.long)
    changed: set[str] = set()
    done: set[Any] = set()
    for read in reads:
        adds = gone[seen.root[read.columns]] & ~read.level.isnan() & (read.level != 0)
        if read.weight is None or not read.places or not bool(adds.any()):
            continue
        columns = adds.nonzero().flatten()
        part = read.weight(columns)
        effect = torch.where(part == 0, 0.0, part * read.level[columns]).sum(1)
        for sign, slots in read.places:
            key = int(slots.max())
            if key in done:  # a module that is called again, with the same constants
                continue
            done.add(key)
            there = slots >= 0
            at = torch.searchsorted(first, slots[there], right=True) - 1
            for i in at.unique().tolist():
                name, _ = owners[order[i]]
                own = there.nonzero().flatten()[at == i]
                if name not in changed:
                    values[name] = values[name].detach().clone()
                    changed.add(name)
                target = values[name]
                target[(slots[own] - first[i]).to(target.device)] += (sign * effect[own]).to(target)
    return changed
