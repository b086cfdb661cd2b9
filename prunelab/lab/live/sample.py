"""The samples on which ``live`` measures: drawn once, from whatever holds them, measured part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, default_collate

from prunelab.data import Dataset
from prunelab.errors import PrunelabError, first_line
from prunelab.pruners.measures import Measure, check_labels, joined, usual
from prunelab.structure.forward import arguments, looking, rows, samples

BATCH = 500  # samples at a time; more fall out of the processor's cache
WORK = 10**10  # multiply-accumulates at a time and thread: about a fifth of a second
WHOLE = 25 * 10**9  # a sample of no more than these, likewise, is measured in one go, which is faster than in parts
PARTS = ("validation", "test")

Part = Literal["validation", "test"]
Evaluate = Callable[[nn.Module], Mapping[str, Any]]


class Sample:
    """Some of what was given, chosen at random, since classes may lie in blocks; of a loader, what it gives first.

    Args:
        data: A data set; inputs and targets; batches of them; a ``DataLoader`` or a ``torch.utils.data.Dataset``.
        count: How many; all where there are fewer.
        device: Where they are put.
        part: Of a data set.

    Attributes:
        x: Inputs as the model takes them: a tensor, or a tuple or dict of several.
        y: Targets.
        what: What they are called, such as ``"2,000 validation images"``.
        classes: Names of the classes; None where nobody named them.
        measure: How good the answers are; see ``suit``.
        labelled: Whether the targets are one label for each sample.
    """

    def __init__(self, data: Any, count: int, device: torch.device, part: Part = "validation") -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise PrunelabError(f"evaluate = {count!r}: should be a number of samples, at least 1, or a function")
        x, y, kind, self.classes = _drawn(data, count, part)
        if samples(x) != samples(y) or not samples(y):
            raise PrunelabError(f"data has {samples(x)} inputs and {samples(y)} labels: give as many, and at least one")
        # Convolutions are twice as fast with images in this order of memory.
        self.x, self.y = (tree_map_only(Tensor, lambda tensor: _put(tensor, device), both) for both in (x, y))
        kind, first = kind.removeprefix("first "), "the first " * (kind == "first ")
        self.kind = f"{kind}{'images' if isinstance(x, Tensor) and x.ndim == 4 else 'samples'}"
        self.what = f"{first}{len(self):,} {self.kind}"
        self.measure: Measure | None = None
        self.labelled = False
        self.given: list[Tensor] = []  # answers of the last measurement, where the targets are labels
        self._batch, self._masked, self._copy = BATCH, dict[str, Tensor](), True

    def __len__(self) -> int:
        return samples(self.y)

    def suit(self, model: nn.Module, measure: Measure | None) -> None:
        """See what the model gives, and choose how to measure it: as asked for, or as is usual for such outputs.

        Raises:
            PrunelabError: the model does not take the inputs, or there is no usual measure.
        """
        two = slice(0, 2)
        args, kwargs = arguments(rows(self.x, two))
        before = [tensor.clone() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        try:
            with looking(model), torch.no_grad():
                outputs = model(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise PrunelabError(f"{type(model).__name__} does not take the inputs: {first_line(error)}") from None
        after = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        self._copy = not all(map(torch.equal, before, after))  # a model that works in place gets copies
        self.measure = measure or usual(outputs, rows(self.y, two))
        self.labelled = (
            isinstance(outputs, Tensor)
            and isinstance(self.y, Tensor)
            and outputs.dim() == 2
            and self.y.dim() == 1
            and not self.y.is_floating_point()
        )
        if self.measure.name == "accuracy" and self.labelled:
            check_labels(self.y, outputs.shape[1])

    def take_fewer(self, macs: int) -> None:
        """Take fewer at a time where all together cost so many multiply-accumulates that one would have to wait."""
        threads = torch.get_num_threads()
        if macs * len(self) > WHOLE * threads:
            self._batch = max(16, min(BATCH, WORK * threads // macs))

    def answers(self, model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[tuple[float, int]]:
        """The measure and the samples seen so far, after each part; the first part alone is a random choice too.

        Args:
            model: In evaluation mode; it is not changed.
            masks: What is left of its weights.
        """
        assert self.measure is not None
        with torch.inference_mode():
            # Into the same memory again and again: that of a large network is not had for nothing.
            weights = {
                name: torch.mul(model.get_parameter(name), mask, out=self._masked.get(name))
                for name, mask in masks.items()
            }
        self._masked |= weights
        self.given = given = []

        def parts() -> Iterator[tuple[Any, Any]]:
            for start in range(0, len(self), self._batch):
                piece = slice(start, start + self._batch)
                x = rows(self.x, piece)
                args, kwargs = arguments(x) if self._copy or not isinstance(x, Tensor) else ((x,), {})
                with torch.inference_mode():
                    outputs = functional_call(model, weights, args, kwargs)
                if self.labelled:
                    given.append(outputs.argmax(-1))
                yield outputs, rows(self.y, piece)

        return self.measure.running(parts())


def function_values(evaluate: Evaluate, model: nn.Module) -> dict[str, float]:
    """What a function of one's own says of a model: name -> number.

    Raises:
        PrunelabError: it raises, gives no names, or something else than numbers.
    """
    name = getattr(evaluate, "__name__", type(evaluate).__name__)
    try:
        found = evaluate(model)
        values = {str(key): float(value) for key, value in found.items()}
    except Exception as error:  # noqa: BLE001 - whatever the user's own function raises is said in one line
        raise PrunelabError(f"evaluate: {name} failed: {type(error).__name__}: {first_line(error)}") from None
    if not values or (wrong := [key for key, value in values.items() if not math.isfinite(value)]):
        what = f"gave {wrong[0]} = {values[wrong[0]]}" if values else "gave nothing"
        raise PrunelabError(f"evaluate: {name} {what}: should give name -> number")
    return values


def training_batches(data: Any, device: torch.device, count: int) -> list[tuple[Tensor, Tensor]] | None:
    """Some of the training part, for scores that look at data; None where there is none."""
    if not isinstance(data, Dataset):
        return None
    x, y = data.train.x[:count], data.train.y[:count]
    return [(data.scale(x).to(device), data.target(y).to(device))]


def _drawn(data: Any, count: int, part: Part) -> tuple[Any, Any, str, tuple[str, ...] | None]:
    """Inputs, targets, what they are, and names of classes."""
    if isinstance(data, Dataset):
        if part not in PARTS:
            raise PrunelabError(f"part = {part!r}: should be 'validation' or 'test'")
        split = getattr(data, part)
        if not len(split):
            raise PrunelabError(f"{data.name} has no {part} sample: load it with one held out, or say part='test'")
        which = _some(len(split), count).to(split.y.device)
        classes = data.classes if data.labelled else None
        return data.scale(split.x[which]), data.target(split.y[which]), f"{part} ", classes
    if _pair(data) and not isinstance(data[1], tuple | list):
        x, y = data
        return *(rows(both, _some(samples(both), count)) for both in (x, y)), "", None
    if isinstance(data, DataLoader | tuple | list | Tensor | Mapping | str) or not hasattr(data, "__len__"):
        source = data if isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | str) else ()
        held: list[tuple[Any, Any]] = []
        for batch in islice(source, count):
            if not _pair(batch):
                raise PrunelabError(f"data gives a {type(batch).__name__}: give batches of (inputs, targets)")
            held.append((batch[0], batch[1]))
            if not isinstance(data, list | tuple) and sum(samples(y) for _, y in held) >= count:
                break
        if not held:
            kind = type(data).__name__
            raise PrunelabError(
                f"data is a {kind}: give a data set, (inputs, targets), batches of them or a DataLoader"
            )
        x, y = joined(held)
        kind = "" if isinstance(data, list | tuple) else "first "
        which = _some(samples(y), count) if not kind else slice(0, count)
        return rows(x, which), rows(y, which), kind, None
    which = _some(len(data), count).tolist()
    pairs = [data[at] for at in which]
    if not all(map(_pair, pairs)):
        raise PrunelabError(f"data gives a {type(pairs[0]).__name__}: should give (input, target)")
    x, y = default_collate(pairs)
    names = getattr(data, "classes", None)
    return x, y, "", tuple(map(str, names)) if isinstance(names, Sequence) else None


def _pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2


def _some(n: int, count: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]


def _put(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.to(device)
