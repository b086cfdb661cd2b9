"""When units fire: the share of the samples of each class for which a unit's activation is above 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks, layer_of
from prunelab.pruners.activations import unit_sums
from prunelab.pruners.select import scored_names


def firing(model: nn.Module, x: Tensor, y: Tensor, classes: Sequence[str], layers: Iterable[str] = ()) -> pd.DataFrame:
    """Firing patterns of hidden units, by class.

    Args:
        model: any module; measured in evaluation mode, and not changed.
        x: inputs as the model takes them, [N, ...].
        y: labels, int64 [N].
        classes: names of the classes.
        layers: names of Linear and Conv2d layers; (): all but the last.

    Returns:
        One row per layer, unit and class: ``layer``, ``unit`` (its number), ``class``, ``firing`` (share of the class's
        samples, of a filter also of the positions, at which the activation is above 0), ``strength`` (mean activation),
        ``samples`` (of the class). NaN where a class has no sample.

    Raises:
        PrunelabError: inputs and labels that do not fit, or a label beyond the classes.
    """
    if len(x) != len(y) or not len(y) or int(y.max()) >= len(classes):
        raise PrunelabError(f"{len(x)} inputs, {len(y)} labels, {len(classes)} classes: these do not fit")
    names = list(layers) or [layer_of(name) for name in scored_names(model, Masks.ones(model), "unit")]
    parts = []
    for number, name in enumerate(classes):
        own = x[y == number]
        for layer, (rate, strength) in _measured(model, names, own).items():
            units = {"layer": layer, "unit": range(len(rate)), "class": name, "samples": len(own)}
            parts.append(pd.DataFrame({**units, "firing": rate, "strength": strength}))
    return pd.concat(parts, ignore_index=True)


def _measured(model: nn.Module, layers: Sequence[str], x: Tensor) -> dict[str, tuple[list[float], list[float]]]:
    """Layer -> firing and strength of its units, mean over the samples."""

    def both(output: Tensor, positions: Sequence[int]) -> Tensor:
        pair = torch.stack([(output > 0).to(output.dtype), output])
        return (pair.mean([axis + 1 for axis in positions]) if positions else pair).sum(1).T  # [units, 2]

    if not len(x):
        widths = {layer: len(model.get_submodule(layer).weight) for layer in layers}
        return {layer: ([float("nan")] * units,) * 2 for layer, units in widths.items()}
    sums, samples = unit_sums(model, layers, [x], both)
    return {layer: tuple((total / samples).T.tolist()) for layer, total in sums.items()}


def summary(patterns: pd.DataFrame, by: Sequence[str] = ("network", "layer")) -> pd.DataFrame:
    """How many units still fire, how often, and for how many classes.

    Args:
        patterns: rows of ``firing``, with the columns ``by``.
        by: columns that name a layer of a network.

    Returns:
        One row per group: ``units``; ``firing_units``: those that fire for any sample; ``firing``: mean over them and
        the classes; ``selected_classes``: mean number of classes for which such a unit fires at half of the rate of
        its favourite or more (our own measure of how selective units are).
    """
    rows = []
    for keys, own in patterns.groupby(list(by), sort=False):
        table = own.pivot_table(index="unit", columns="class", values="firing", sort=False)
        best = table.max(axis=1)
        live = table[best > 0]
        wide = live.ge(0.5 * best[best > 0], axis=0).sum(axis=1)
        means = {
            "firing": live.to_numpy().mean() if len(live) else 0.0,
            "selected_classes": wide.mean() if len(live) else 0.0,
        }
        rows.append({**dict(zip(by, keys, strict=True)), "units": len(table), "firing_units": len(live), **means})
    return pd.DataFrame(rows)
