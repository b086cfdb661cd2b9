"""What pruning bought: two models side by side, in parameters, work, memory, bytes, time and energy."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunelab.errors import PrunelabError, first_line
from prunelab.runs.columns import TIMES, short
from prunelab.structure import cost
from prunelab.structure.forward import arguments, call, looking, rows, samples, shapes
from prunelab.structure.shrink import batchnorms, dead_units, norms
from prunelab.structure.watch import StructureError

# Energy in picojoules, 45 nm: a float32 multiplication and addition, and 32 bits from memory. A proxy: nothing is
# measured, and caches are left out.
_MAC, _MEMORY = 3.7 + 0.9, 640.0
_FEWEST = 6  # repeats, between whose extremes the median lies with 95 % (1 - 2 / 2^6); with 5 it is 94 %
_SOURCE = "45 nm figures of Horowitz, ISSCC 2014, Fig. 1.1.9, each non-zero weight read once"


@dataclass(frozen=True)
class Side:
    """One model.

    Attributes:
        parameters: entries of all parameters.
        nonzero: those that are not 0.
        macs: multiply-accumulates of one sample, dense.
        effective_macs: those whose weight is not 0.
        activation_bytes: of one sample, all values of Linear, Conv2d and pooling layers that a forward pass makes.
        bytes_dense: of the file of its weights.
        bytes_sparse: if every weight matrix were stored as values and column numbers (CSR), where that is smaller.
        latency: median seconds of a forward pass of the example.
        latency_low: lower end of an interval that holds the median with at least 95 %, by order statistics; fewer than
            6 repeats have no such interval, and this is their least.
        latency_high: upper end.
        energy: proxy, in joules for one sample.
    """

    parameters: int
    nonzero: int
    macs: int
    effective_macs: int
    activation_bytes: int
    bytes_dense: int
    bytes_sparse: int
    latency: float
    latency_low: float
    latency_high: float
    energy: float


_ROWS = {
    "parameters": "parameters",
    "nonzero": "non-zero parameters",
    "macs": "MACs of a sample",
    "effective_macs": "MACs with a non-zero weight",
    "activation_bytes": "activations of a sample (bytes)",
    "bytes_dense": "file (bytes)",
    "bytes_sparse": "file, sparse where smaller (bytes)",
    "latency": "latency of the example (ms)",
    "energy": "energy of a sample (µJ, a proxy)",
}


@dataclass(frozen=True)
class Report:
    """Models beside the first of them.

    Attributes:
        sides: name -> model.
        batch: samples in the example.
        threads: with which the times were taken.
        repeats: times each was timed, in turns.
        requested: what the pruning asked for, as sparsity; None: not said.
        achieved: zeros / entries of the weights of the second model, against the entries of the first.
        dead: model -> layer -> how many of its units are constant or unread and are there all the same, and why.
        unfolded: model of which some BatchNorms are folded -> another BatchNorm -> why it could not be.
    """

    sides: Mapping[str, Side]
    batch: int
    threads: int
    repeats: int
    requested: float | None = None
    achieved: float | None = None
    dead: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unfolded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def frame(self) -> Any:
        """A DataFrame, one row per model, columns as in ``Side``."""
        import pandas as pd

        return pd.DataFrame({name: vars(side) for name, side in self.sides.items()}).T.rename_axis("model")

    def _cells(self) -> list[list[str]]:
        names = list(self.sides)
        rows = [["", *(cell for name in names for cell in ([name] if name == names[0] else [name, f"of {names[0]}"]))]]
        first = self.sides[names[0]]
        for quantity, label in _ROWS.items():
            row = [label]
            for name in names:
                value = getattr(self.sides[name], quantity)
                row.append(_value(quantity, self.sides[name]))
                if name != names[0]:
                    base = getattr(first, quantity)
                    row.append(f"{value / base:.3f}{TIMES}" if base else "")
            rows.append(row)
        return rows

    @property
    def caption(self) -> str:
        """How it was measured, and what was asked for."""
        words = [f"batch {self.batch}, {self.threads} threads, median of {self.repeats} interleaved repeats"]
        if self.requested is not None and self.achieved is not None:
            words.append(f"sparsity requested {self.requested:.4g}, achieved {self.achieved:.4g}")
        spread = "95 % interval of the median" if self.repeats >= _FEWEST else "range of the repeats"
        words.append(f"± half of the {spread}; energy: {_SOURCE}")
        return "; ".join(words)

    @property
    def notes(self) -> list[str]:
        """A line for what is left in models, and why: three layers, and how many more there are."""
        found: dict[str, list[str]] = {}
        for what, models in (("dead units in", self.dead), ("BatchNorm not folded in", self.unfolded)):
            for name, layers in models.items():
                lines = [f"{layer}: {why}" for layer, why in layers.items()]
                more = [f"and {len(lines) - 3} more layers"] if len(lines) > 3 else []
                if lines:
                    said = found.setdefault("; ".join([*lines[:3], *more]), [what])
                    said.append(name)
        return [f"{what} {', '.join(names)}: {words}" for words, (what, *names) in found.items()]

    def __str__(self) -> str:
        rows = self._cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pads = [str.ljust, *[str.rjust] * (len(widths) - 1)]
        lines = ["  ".join(pad(c, w) for pad, c, w in zip(pads, row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:], self.caption, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        def line(row: Sequence[str], tag: str) -> str:
            look = ["left", *["right"] * (len(row) - 1)]
            cells = (f'<{tag} style="text-align:{s}">{html.escape(c)}</{tag}>' for c, s in zip(row, look, strict=True))
            return f"<tr>{''.join(cells)}</tr>"

        head, *body = self._cells()
        rows = "".join(line(row, "td") for row in body)
        words = "".join(
            f'<p style="font-size:smaller;margin:.3em 0">{html.escape(text)}</p>'
            for text in (self.caption, *self.notes)
        )
        return f'<table class="dataframe"><thead>{line(head, "th")}</thead><tbody>{rows}</tbody></table>{words}'


def _value(field: str, side: Side) -> str:
    value = getattr(side, field)
    if field == "latency":
        half = (side.latency_high - side.latency_low) / 2
        return f"{1e3 * value:.3g} ± {1e3 * half:.2g}"
    return f"{1e6 * value:.3g}" if field == "energy" else short(value)


def report(
    model: nn.Module,
    small: nn.Module | Mapping[str, nn.Module],
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    requested: float | None = None,
    repeats: int = 21,
) -> Report:
    """Measure a model and what became of it, in turns, so that a busy machine disturbs both alike.

    Args:
        model: the first, to which the others are compared.
        small: the second, or name -> model for several.
        example: a batch of inputs, on the models' device; a tuple or a dict where the models take several.
        requested: the sparsity that was asked for.
        repeats: times each is timed; one more, the first, does not count.

    Raises:
        PrunelabError: a model that does not take the example, what is no model or no tensor, or too few repeats.
    """
    if repeats < 3:
        raise PrunelabError(f"repeats = {repeats}: a median and its spread need at least 3")
    if not any(isinstance(value, Tensor) for value in tree_leaves(example)):
        kind = type(example).__name__
        raise PrunelabError(f"report: the example is a {kind}: give a tensor, or a tuple or dict of several inputs")
    others = dict(small) if isinstance(small, Mapping) else {"small": small}
    if not others:
        raise PrunelabError("report: there is no second model: give one, or name -> model")
    if "dense" in others:
        raise PrunelabError("report: 'dense' is what the first model is called: give the others another name")
    models = {"dense": model, **others}
    if wrong := [name for name, net in models.items() if not isinstance(net, nn.Module)]:
        kind = type(models[wrong[0]]).__name__
        raise PrunelabError(f"report: {wrong[0]!r} is a {kind}, not a model: `shrink(model, masks)` makes one of masks")
    times = latencies(models, example, repeats)
    sides = {name: _side(net, example, times[name]) for name, net in models.items()}
    second = next(iter(others.values()))
    total, left = sum(cost.prunable_weights(model).values()), _left(second)
    achieved = 1 - left / total if total and left is not None else None
    dead = {name: _dead(net, example) for name, net in others.items()}
    unfolded = {name: _unfolded(model, net, example) for name, net in others.items()}
    return Report(sides, samples(example), torch.get_num_threads(), repeats, requested, achieved, dead, unfolded)


def _left(model: nn.Module) -> int | None:
    """Weights of layers that are not 0; None where they are packed, as quantised ones are, so that none is known."""
    weights = cost.prunable_weights(model)
    if not weights and cost.packed_tensors(model):
        return None
    return sum(cost.nonzero(parameter) for name, parameter in model.named_parameters() if name in weights)


def _dead(model: nn.Module, example: Any) -> dict[str, str]:
    """Dead units of each layer; none where the model cannot be traced, so that nothing is known."""
    try:
        with looking(model):
            return dead_units(model, rows(example, slice(0, 1)))
    except StructureError:
        return {}


def _unfolded(dense: nn.Module, model: nn.Module, example: Any) -> dict[str, str]:
    """The BatchNorms that could not be folded, of a model of which others were: the dense one has some more."""
    left = batchnorms(model)
    try:
        with looking(model):
            return norms(model, rows(example, slice(0, 1)))[1] if left and batchnorms(dense) - left else {}
    except StructureError:
        return {}


def latencies(models: Mapping[str, nn.Module], example: Any, repeats: int) -> dict[str, list[float]]:
    """Seconds of a forward pass in evaluation mode, every model once in each turn; copying the inputs is not timed."""
    found: dict[str, list[float]] = {name: [] for name in models}
    tensors = [value for value in tree_leaves(example) if isinstance(value, Tensor)]
    wait = torch.cuda.synchronize if any(value.is_cuda for value in tensors) else (lambda: None)
    try:
        with torch.inference_mode(), contextlib.ExitStack() as modes:
            for net in models.values():
                modes.enter_context(looking(net))
            for turn in range(repeats + 1):
                for name, net in models.items():
                    args, kwargs = arguments(example)
                    wait()
                    begin = time.perf_counter()
                    net(*args, **kwargs)
                    wait()
                    if turn:
                        found[name].append(time.perf_counter() - begin)
    except (RuntimeError, ValueError, TypeError) as error:
        raise PrunelabError(
            f"model {name!r} does not take the example of {shapes(example)}: {first_line(error)}"
        ) from None
    return found


def _side(model: nn.Module, example: Any, times: Sequence[float]) -> Side:
    low, high = _median_interval(times)
    path, source = getattr(model, "path", None), getattr(model, "source", None)
    foreign = isinstance(path, Path) and isinstance(source, nn.Module)  # export.OnnxModel: the work is its source's
    model = source if foreign else model
    price, tensors = cost.summarise(model, example), _unshared(model)
    dense = len(to_bytes({str(at): tensor.contiguous() for at, tensor in enumerate(tensors)}))
    sparse = sum(_bytes(tensor) for tensor in tensors)
    return Side(
        parameters=price.parameters,
        nonzero=price.nonzero,
        macs=price.macs,
        effective_macs=price.effective_macs,
        activation_bytes=_activations(model, example),
        bytes_dense=path.stat().st_size if foreign else dense,
        bytes_sparse=path.stat().st_size if foreign else sparse,
        latency=statistics.median(times),
        latency_low=low,
        latency_high=high,
        energy=1e-12 * (_MAC * price.effective_macs + _MEMORY * price.nonzero),
    )


def _unshared(model: nn.Module) -> list[Tensor]:
    """The tensors of a model's state, each once, as a file would hold them; what else is in it is left out."""
    seen: dict[int, Tensor] = {}
    for tensor in (*model.state_dict().values(), *cost.packed_tensors(model)):
        if isinstance(tensor, Tensor):
            plain = tensor.int_repr() if tensor.is_quantized else tensor
            plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
            seen.setdefault(plain.data_ptr() or id(plain), plain)
    return list(seen.values())


def _bytes(tensor: Tensor) -> int:
    """Of a tensor, dense or as values with 32-bit column and row numbers, whichever is less."""
    dense = tensor.numel() * tensor.element_size()
    if tensor.dim() < 2:
        return dense
    left = int(torch.count_nonzero(tensor))
    return min(dense, left * (tensor.element_size() + 4) + 4 * (len(tensor) + 1))


def _activations(model: nn.Module, example: Any) -> int:
    """Bytes of the outputs of all layers that make new values, for one sample."""
    total = 0

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output[:1].numel() * output.element_size()

    kinds = (nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.inference_mode(), looking(model):
            call(model, rows(example, slice(0, 1)))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics, as many from each end, between which the median lies with 95 % or more.

    So many values as a binomial of n tosses reaches with 2.5 % or less lie outside at either end; where that is none,
    below 6 values, it is their range.
    """
    ordered, n = sorted(values), len(values)
    tails = itertools.accumulate(math.comb(n, below) / 2**n for below in range(n))
    low = max(0, sum(tail <= 0.025 for tail in tails) - 1)
    return ordered[low], ordered[n - 1 - low]
