"""Scores that several methods share: one number per weight, higher = keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunelab.masks import layer_of, unit_axis
from prunelab.pruners.select import by_unit


@torch.no_grad()
def magnitude(model: nn.Module, names: Sequence[str], norm: int = 1) -> dict[str, Tensor]:
    """``|w| ** norm``; its sum over a unit is the unit's L1 norm, or the square of its L2 norm.

    Source: Han et al., "Learning both weights and connections for efficient neural networks", NIPS 2015, section 3
    (weights); Li et al., "Pruning filters for efficient ConvNets", ICLR 2017, section 3.1 (sums over filters).

    Args:
        model: The model.
        names: Parameters to score.
        norm: 1 or 2.

    Returns:
        Parameter name -> score, of the parameter's shape; at least float32.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {name: wide(parameters[name]) for name in names}
    return {name: value.abs() if norm == 1 else value.square() for name, value in values.items()}


def wide(values: Tensor) -> Tensor:
    """The same numbers as float32 where they have fewer bits: sums of these would round, and end at 65,504."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def random(
    model: nn.Module, names: Sequence[str], generator: torch.Generator, *, units: bool = False
) -> dict[str, Tensor]:
    """Uniform numbers in [0, 1), float32: the control that every score has to beat.

    Args:
        model: The model.
        names: Parameters to score.
        generator: The source of the numbers.
        units: One number per unit, by layer name, instead of one per weight, by parameter name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: parameters[name].shape for name in names}
    if units:
        axes = {name: unit_axis(model.get_submodule(layer_of(name))) or 0 for name in names}
        shapes = {layer_of(name): shapes[name][axis : axis + 1] for name, axis in axes.items()}
    return {name: torch.rand(shape, generator=generator, device=generator.device) for name, shape in shapes.items()}


def reduce_to_units(model: nn.Module, scores: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Sum the scores of each neuron's or filter's incoming weights: layer name -> score per unit, 1-D."""
    return {layer_of(name): wide(by_unit(model, name, scores[name])).sum(1) for name in names}
