"""The part of a model that its unit masks leave, for as long as it trains: what is pruned then costs no time.

A unit whose weights and bias are all masked gives 0 behind a ReLU and has no gradient, so training without it changes
no number. The whole model stays what everybody sees; ``Narrow.write_back`` keeps it current. Chains, which train in
stacks, are cut layer by layer; of any other model (BatchNorm, skips) the channels go that are 0 wherever they appear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunelab.masks import Masks
from prunelab.structure.chains import ShrinkError, chain, cut, remove_units
from prunelab.structure.shrink import remove_silent
from prunelab.structure.watch import StructureError

_KEEPS_ZERO = (nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Flatten)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Narrow:
    """A smaller model inside a whole one.

    Attributes:
        model: the smaller one.
        masks: its masks, without those that keep all, or that nothing needs.
        index: parameter or buffer -> for each axis the positions in the whole model, where it is smaller; empty where
            the model is the whole one.
    """

    model: nn.Module
    masks: Masks
    index: Mapping[str, tuple[Tensor, ...]]

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What stands in the whole model under a parameter's name, in the smaller one's shape."""
        return cut(tensor, self.index[name]) if name in self.index else tensor

    @torch.no_grad()
    def write_back(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Put a parameter, a moment of it, or a buffer to its place in the whole."""
        if name not in self.index:
            whole.copy_(part)
            return
        rows, *columns = (axis.to(whole.device) for axis in self.index[name][:2])
        if columns:
            whole[rows[:, None], columns[0]] = part
        else:
            whole[rows] = part


def narrow(model: nn.Module, masks: Masks, example: Tensor) -> Narrow:
    """The model without the units that are masked whole; itself where there are none, or where nothing else is known.

    A layer of which nothing is left keeps one unit, whose weights are zero and stay so. A model with dropout stays
    whole unless it is narrowed as a chain, since dropout would draw other random numbers for fewer units.

    Args:
        model: any module, its pruned weights at 0; it is not changed.
        masks: of the model.
        example: a batch of inputs, on the model's device.
    """
    try:
        rows = _left(model, masks)
    except ShrinkError:
        return _narrow_graph(model, masks, example)
    if not rows:
        return Narrow(model, masks, {})
    small = remove_units(model, rows)
    cut_masks = {}
    for name, mask in masks.items():
        part = small.cut(name, mask)
        if not bool((part | _whole_rows_gone(name, part, masks)).all()):
            cut_masks[name] = part
    return Narrow(small.model, Masks(cut_masks), small.index)


def _narrow_graph(model: nn.Module, masks: Masks, example: Tensor) -> Narrow:
    whole = Narrow(model, masks, {})
    emptied = any(mask.dim() > 1 and not bool(mask.flatten(1).any(1).all()) for mask in masks.values())
    if not emptied or any(isinstance(module, DROPOUTS) for module in model.modules()):
        return whole
    try:
        small = remove_silent(model, masks, example)
    except StructureError:
        return whole
    if not small.index:
        return whole
    parts = {name: small.cut(name, mask) for name, mask in masks.items()}
    return Narrow(small.model, Masks({name: part for name, part in parts.items() if not bool(part.all())}), small.index)


def _whole_rows_gone(name: str, part: Tensor, masks: Masks) -> Tensor:
    """Rows of which nothing is kept, as a column: they are zero with or without a mask."""
    gone = ~part.flatten(1).any(1) if part.dim() > 1 else ~part
    unit = f"{name.rpartition('.')[0]}.bias" in masks  # only where the bias goes with the weights
    return (gone & unit).view(-1, *[1] * (part.dim() - 1))


def _left(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Hidden layer -> positions of the units that are left; only layers that lost some."""
    links = chain(model)
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
    return rows
