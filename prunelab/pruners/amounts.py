"""Amounts of single layers, to be given to ``prune`` in place of one number.

>>> masks = prune(model, "magnitude", erk(model, 0.9))
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from prunelab.masks import Masks, layer_of
from prunelab.pruners.select import check_amount


def erk(model: nn.Module, amount: float, layers: Iterable[str] = ()) -> dict[str, float]:
    """Layer -> the fraction of its weights that goes, so that ``amount`` of all goes: Erdos-Renyi-Kernel densities.

    A layer's density is proportional to the sum of the sizes of its weight (inputs, outputs, height and width of a
    kernel) over their product, so that large layers lose more. Layers that would be more than dense stay dense, and the
    others lose more instead. Source: Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, section
    3, part 1; after Mocanu et al., 2018.

    Args:
        model: any module.
        amount: fraction of the weights of all these layers, in [0, 1).
        layers: names; (): all that can be pruned.
    """
    check_amount(amount)
    shapes = {name: mask.shape for name, mask in Masks.ones(model, layers).items()}
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    left = (1 - amount) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        scale = (left - sum(sizes[name] for name in dense)) / max(
            sum(sum(s) for n, s in shapes.items() if n not in dense), 1
        )
        more = {name for name, shape in shapes.items() if name not in dense and scale * sum(shape) > sizes[name]}
        if not more:
            break
        dense |= more
    return {layer_of(n): 0.0 if n in dense else 1 - scale * sum(shape) / sizes[n] for n, shape in shapes.items()}
