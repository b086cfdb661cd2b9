"""How good a model's answers are: the usual measure of a task, or a function of one's own, over samples in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from prunelab.errors import PrunelabError
from prunelab.pruners.scores import wide
from prunelab.structure.forward import samples


@dataclass(frozen=True, eq=False)
class Measure:
    """A number that says how good outputs are.

    Attributes:
        name: as it is written beside the number.
        add: outputs and targets of some samples -> what is summed over all of them, float64 or int64.
        value: the sum -> the number.
        higher: whether more is better.
        share: whether it lies between 0 and 1, to be shown in per cent.
    """

    name: str
    add: Callable[[Any, Any], Tensor]
    value: Callable[[Tensor], float]
    higher: bool = True
    share: bool = False

    def running(self, parts: Iterable[tuple[Any, Any]]) -> Iterator[tuple[float, int]]:
        """The number over all samples so far, and how many they are, after each part (outputs, targets)."""
        total, seen = 0, 0
        for outputs, targets in parts:
            total, seen = total + self.add(outputs, targets), seen + samples(targets)
            yield self.value(total), seen


class Whole(Measure):
    """A function of the outputs and targets of all samples at once, which need not be a mean over samples."""

    def __init__(self, name: str, function: Callable[[Any, Any], Any], higher: bool) -> None:
        def value(_: Tensor) -> float:
            raise NotImplementedError  # running() is its own

        super().__init__(name, function, value, higher)

    def running(self, parts: Iterable[tuple[Any, Any]]) -> Iterator[tuple[float, int]]:
        """See ``Measure``; every value is that of all samples so far."""
        held: list[tuple[Any, Any]] = []
        for part in parts:
            held = [joined([*held, part])]
            try:
                number = float(self.add(*held[0]))
            except (TypeError, ValueError, RuntimeError) as error:
                raise PrunelabError(f"{self.name} gives no number for outputs and targets: {error}") from None
            if number != number:  # NaN
                raise PrunelabError(f"{self.name} is NaN on {samples(held[0][1]):,} samples: should be a number")
            yield number, samples(held[0][1])


def chosen(metric: Callable[..., Any] | None, loss: Callable[..., Any] | None) -> Measure | None:
    """The measure that is asked for: ``metric``, of which more is better, or ``loss``; None where neither is given.

    Raises:
        PrunelabError: both are given, or what is no function.
    """
    if metric is not None and loss is not None:
        raise PrunelabError("metric= and loss= are given: give the one to go by")
    for name, function in (("metric", metric), ("loss", loss)):
        if function is not None and not callable(function):
            raise PrunelabError(f"{name} = {function!r:.60}: should be a function of outputs and targets")
        if function is not None:
            return Whole(name, function, higher=name == "metric")
    return None


def usual(outputs: Any, targets: Any) -> Measure:
    """Accuracy, mean IoU or RMSE, whichever is usual for such outputs and targets.

    Labels [N] of outputs [N, classes], and [N, ...] of [N, ..., classes]: accuracy. Labels [N, H, W] of outputs
    [N, classes, H, W]: mean IoU over the classes that occur in either; other labels, such as 255, are left out. Floats
    of the shape of the outputs: root of the mean squared error.

    Raises:
        PrunelabError: there is none; it says what was given.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        kind = type(targets if isinstance(outputs, Tensor) else outputs).__name__
        raise _none(f"{'targets' if isinstance(outputs, Tensor) else 'outputs'} are a {kind}")
    what = f"outputs have shape {tuple(outputs.shape)}, targets {tuple(targets.shape)} ({targets.dtype})"
    if targets.is_floating_point():
        if outputs.shape == targets.shape or outputs.shape == (*targets.shape, 1):
            return Measure("RMSE", _squares, lambda total: float((total[0] / total[1]).sqrt()), higher=False)
        raise _none(what)
    if targets.dim() < outputs.dim() == 2 and outputs.shape[1] > 1 and len(outputs) == len(targets):
        check_labels(targets, outputs.shape[1])
        return accuracy()
    if targets.dim() > 1 and outputs.dim() == targets.dim() + 1 and len(outputs) == len(targets):
        if outputs.shape[2:] == targets.shape[1:]:
            return Measure("mean IoU", _confusion, _mean_iou, share=True)
        if outputs.shape[:-1] == targets.shape:
            return accuracy()
    if targets.dim() == 2 and targets.shape[1] == 1 and outputs.dim() == 2:
        what += "; labels should be [N], as targets[:, 0]"
    raise _none(what)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels outside 0 .. classes - 1, with the first of them."""
    if len(wrong := ((labels < 0) | (labels >= classes)).nonzero()):
        at = tuple(wrong[0].tolist())
        what = f"label {int(labels[at])} of sample {at[0]} is out of range for {classes} outputs"
        raise PrunelabError(f"{what}: number the classes from 0, or give metric=")


def accuracy() -> Measure:
    """The share of right answers."""
    return Measure("accuracy", _right, lambda total: int(total[0]) / int(total[1]), share=True)


def _none(what: str) -> PrunelabError:
    return PrunelabError(
        f"{what}, which is no classification: give metric= (more is better) or loss= (less is better), functions of "
        "outputs and targets"
    )


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    right = outputs.argmax(-1) == targets
    return torch.tensor([int(right.sum()), right.numel()])


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    difference = wide(outputs).double().reshape(targets.shape) - targets.double()
    return torch.tensor([float(difference.square().sum()), difference.numel()], dtype=torch.float64)


def _confusion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Pixels of each label (row) that were given each answer (column), int64 [classes, classes]."""
    classes = outputs.shape[1]
    counted = (targets >= 0) & (targets < classes)
    pairs = targets[counted].long() * classes + outputs.argmax(1)[counted]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def _mean_iou(confusion: Tensor) -> float:
    both = confusion.diagonal()
    either = confusion.sum(0) + confusion.sum(1) - both
    return float((both[either > 0].double() / either[either > 0]).mean()) if either.any() else 0.0


def joined(parts: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Parts as one, tensor by tensor."""
    if len(parts) == 1:
        return parts[0]
    leaves = [tree_leaves(part) for part in parts]
    whole = [torch.cat(own) if isinstance(own[0], Tensor) else own[0] for own in zip(*leaves, strict=True)]
    return tree_unflatten(whole, tree_flatten(parts[0])[1])
