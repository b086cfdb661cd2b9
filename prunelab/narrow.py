"""The part of a chain that its unit masks leave, for as long as it trains: what is pruned then costs no time.

A unit whose weights and bias are all masked gives 0 behind a ReLU and has no gradient, so training without it changes
no number. The whole model stays what everybody sees; ``Narrow.write_back`` keeps it current.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunelab.chains import ShrinkError, chain, cut, remove_units
from prunelab.masks import Masks

_KEEPS_ZERO = (nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten)


@dataclass(frozen=True)
class Narrow:
    """A smaller model inside a whole one.

    Attributes:
        model: the smaller one.
        masks: its masks, those of whole units left out.
        index: parameter -> for each axis the positions in the whole model; empty where the model is the whole one.
    """

    model: nn.Module
    masks: Masks
    index: Mapping[str, tuple[Tensor, ...]]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What stands in the whole model under a parameter's name, in the smaller one's shape."""
        return cut(tensor, self.index[name]) if self.index else tensor

    @torch.no_grad()
    def write_back(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Put a parameter, or a moment of it, to its place in the whole."""
        rows = self.index[name][0].to(whole.device)
        if whole.dim() == 1:
            whole[rows] = part
        else:
            whole[rows[:, None], self.index[name][1].to(whole.device)] = part


def narrow(model: nn.Module, masks: Masks) -> Narrow:
    """The model without the units that are masked whole; itself where there are none, or where it is no chain.

    A layer of which nothing is left keeps one unit, whose weights are zero and stay so.
    """
    rows = _left(model, masks)
    if rows is None:
        return Narrow(model, masks, {})
    small = remove_units(model, rows)
    cut_masks = {}
    for name, mask in masks.items():
        part = small.cut(name, mask)
        if not bool((part | _whole_rows_gone(name, part, masks)).all()):
            cut_masks[name] = part
    return Narrow(small.model, Masks(cut_masks), small.index)


def _whole_rows_gone(name: str, part: Tensor, masks: Masks) -> Tensor:
    """Rows of which nothing is kept, as a column: they are zero with or without a mask."""
    gone = ~part.flatten(1).any(1) if part.dim() > 1 else ~part
    unit = f"{name.rpartition('.')[0]}.bias" in masks  # only where the bias goes with the weights
    return (gone & unit).view(-1, *[1] * (part.dim() - 1))


def _left(model: nn.Module, masks: Masks) -> dict[str, Tensor] | None:
    """Hidden layer -> positions of the units that are left; None where all are."""
    try:
        links = chain(model)
    except ShrinkError:
        return None
    rows = {}
    for link in links[:-1]:
        weight, bias = masks.get(f"{link.name}.weight"), masks.get(f"{link.name}.bias")
        if weight is None or (bias is None and link.layer.bias is not None):
            continue
        behind = [type(module) for module in link.between]
        if nn.ReLU not in behind or not all(kind in _KEEPS_ZERO for kind in behind):
            continue
        there = weight.flatten(1).any(1) if bias is None else weight.flatten(1).any(1) | bias
        if not bool(there.all()):
            left = there.nonzero().flatten()
            rows[link.name] = left if len(left) else left.new_zeros(1)
    return rows or None
