"""Pictures of how much goes where and when: layers over the rounds, and schedules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import matplotlib as mpl
import numpy as np

from prunelab.errors import PrunelabError
from prunelab.plots import marks
from prunelab.plots.pictures import Picture, Shown, canvas
from prunelab.pruners.schedules import Kind, Ramp
from prunelab.runs.columns import need, short

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack

_MOST_NUMBERS = 180  # cells up to which each shows its number


def layers_over_rounds(rounds: pd.DataFrame, **shown: Unpack[Shown]) -> Picture:
    """A heat map: hidden layers from input to output, rounds from left to right, units left as number and shade.

    Args:
        rounds: one row per run and round: round, units_by_layer (a list, or one as JSON); means over the runs.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: a column that is missing, or no row.
    """
    need(rounds, ["round", "units_by_layer", "id"], "plots.layers_over_rounds")
    counts = {r: np.mean([_listed(v) for v in own], axis=0) for r, own in rounds.groupby("round")["units_by_layer"]}
    numbers = np.stack([counts[r] for r in sorted(counts)], axis=1)  # [layers, rounds]
    shares = numbers / numbers[:, :1].clip(min=1)
    layers, columns = shares.shape
    size = (2.2 + 0.42 * max(columns, 8), 1.6 + 0.34 * max(layers, 3))
    n = rounds.groupby("round")["id"].nunique()
    counted = {"n": f"{marks.spell(n)} seed{'s' if n.max() > 1 else ''}", "interval": ""}
    with canvas(**{"size": size, **shown}, counted=counted) as (picture, axes):
        ax = axes[0, 0]
        image = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        if shares.size <= _MOST_NUMBERS:
            for (row, column), share in np.ndenumerate(shares):
                ink = "#111827" if share > 0.55 else "#f9fafb"
                label = short(float(numbers[row, column]))
                ax.text(column, row, label, ha="center", va="center", color=ink, fontsize=7)
        ax.set_xticks(range(columns), [str(r) for r in sorted(counts)])
        ax.set_yticks(range(layers), [f"layer {i + 1} ({numbers[i, 0]:.0f})" for i in range(layers)])
        ax.set_xlabel("round")
        ax.grid(visible=False)
        bar = picture.colorbar(image, ax=ax, shrink=0.9)
        bar.set_label("share of the units left", color=mpl.rcParams["text.color"])
        ends = ", ".join(f"layer {i + 1} from {numbers[i, 0]:.0f} to {numbers[i, -1]:.4g}" for i in range(layers))
        picture.alt = f"Units left in each layer over {columns} rounds: {ends}."
    return picture


def _listed(value: Any) -> list[float]:
    return [float(v) for v in (json.loads(value) if isinstance(value, str) else value)]


def sensitivity(scan: pd.DataFrame, amounts: Mapping[str, float] | None = None, **shown: Unpack[Shown]) -> Picture:
    """Accuracy with one layer pruned and all others whole, one curve per layer; rings at the amounts that are chosen.

    Args:
        scan: ``sensitivity.Scan.frame``: layer, amount, samples, and accuracy, metric or loss.
        amounts: layer -> amount, as ``Scan.amounts`` gives them; None: no rings.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: a column that is missing, or no row.
    """
    measure = next((name for name in ("metric", "loss") if name in scan), "accuracy")
    need(scan, ["layer", "amount", measure, "samples"], "plots.sensitivity", "layer")
    factor, unit = (100, " (%)") if measure == "accuracy" else (1, "")
    words = []
    counted = {"n": f"{int(scan['samples'].iloc[0]):,} samples", "interval": ""}
    with canvas(**{"size": (7.6, 4.2), **shown}, counted=counted) as (picture, axes):
        ax = axes[0, 0]
        for position, (layer, rows) in enumerate(scan.groupby("layer", sort=False)):
            rows = rows.sort_values("amount")
            ax.plot(100 * rows["amount"], factor * rows[measure], label=str(layer), **marks.series(position))
            chosen = (amounts or {}).get(str(layer))
            here = rows[np.isclose(rows["amount"], -1.0 if chosen is None else chosen)]
            if len(here):
                at = 100 * here["amount"], factor * here[measure]
                ax.plot(*at, "o", markersize=13, markerfacecolor="none", color=mpl.rcParams["text.color"], zorder=4)
            ends = rows[["amount", measure]].iloc[[0, -1]].to_numpy()
            words.append(
                f"{layer}: " + ", ".join(f"{100 * v:.1f} % at {r:g}" if unit else f"{v:.3g} at {r:g}" for r, v in ends)
            )
        ax.set_xlabel("of one layer removed (%)")
        ax.set_title(f"{measure}{unit}")
        marks.legend(ax, "layer")
        picture.alt = f"{measure.capitalize()} with one layer pruned. " + "; ".join(words) + "."
    return picture


def firing(patterns: pd.DataFrame, **shown: Unpack[Shown]) -> Picture:
    """Heat maps of when units fire: networks from top to bottom, layers from left to right, classes x units in each.

    Units are sorted as in the first network, by the class for which each fires most, so that the same column is the
    same unit in every network.

    Args:
        patterns: rows of ``activity.firing`` with a column network: network, layer, unit, class, firing; of several
            values of ``seed``, where there is one, the mean is drawn.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: a column that is missing, or no row.
    """
    need(patterns, ["network", "layer", "unit", "class", "firing"], "plots.firing")
    networks, layers = list(patterns["network"].unique()), list(patterns["layer"].unique())
    tables = {
        key: own.pivot_table(index="class", columns="unit", values="firing", sort=False, dropna=False)
        for key, own in patterns.groupby(["network", "layer"], sort=False)
    }
    words = []
    size = (1.6 + 3.4 * len(layers), 1.2 + 2.2 * len(networks))
    grid = {"rows": len(networks), "columns": len(layers)}
    seeds = patterns["seed"].nunique() if "seed" in patterns else 0
    counted = {"n": f"{seeds} seed{'s' if seeds > 1 else ''}", "interval": ""} if seeds else {}
    with canvas(**grid, **{"size": size, **shown}, counted=counted) as (picture, axes):
        for column, layer in enumerate(layers):
            first = tables[networks[0], layer].to_numpy()
            order = np.lexsort((-np.nan_to_num(first).max(0), np.nan_to_num(first).argmax(0)))
            for row, network in enumerate(networks):
                ax, table = axes[row, column], tables[network, layer]
                values = table.to_numpy()[:, order]
                image = ax.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
                ax.grid(visible=False)
                ax.set_xticks([])
                ax.set_yticks(range(len(table)), [str(name) for name in table.index] if column == 0 else [])
                ax.set_xlabel("unit" if row == len(networks) - 1 else "")
                ax.set_ylabel("class" if column == 0 else "")
                fires = int((np.nan_to_num(values).max(0) > 0).sum())
                ax.set_title(f"{network}, {layer}: {fires} of {values.shape[1]} fire", fontsize=9)
                words.append(f"{network}, {layer}: {fires} of {values.shape[1]} units fire.")
        bar = picture.colorbar(image, ax=list(axes.flat), shrink=0.8)
        bar.set_label("share of the samples for which a unit fires", color=mpl.rcParams["text.color"])
        picture.alt = "When units fire, by class. " + " ".join(words)
    return picture


def schedule_curves(ramps: Mapping[str, Ramp], epochs: int = 1, **shown: Unpack[Shown]) -> Picture:
    """Sparsity over a training for some schedules; the others of one kind each stay in the picture, pale.

    Args:
        ramps: name -> schedule.
        epochs: length of the training; 1: the axis is the share of it.
        shown: title, provenance, look, size.
    """
    first = next(iter(ramps.values()))
    words = []
    with canvas(**{"size": (7.2, 3.8), **shown}) as (picture, axes):
        ax = axes[0, 0]
        grey = mpl.rcParams["xtick.color"]
        for kind in get_args(Kind):
            points = np.array(Ramp(kind, first.final).curve(201))
            ax.plot(points[:, 0] * epochs, 100 * points[:, 1], color=grey, alpha=0.35, linewidth=1, zorder=1)
        for position, (name, ramp) in enumerate(ramps.items()):
            points = np.array(ramp.curve(401))
            look = {**marks.series(position), "marker": ""}
            ax.plot(points[:, 0] * epochs, 100 * points[:, 1], linewidth=2.4, label=name, zorder=3, **look)
            words.append(f"{name}: " + ", ".join(f"{100 * ramp.at(t):.1f} % at {t:g}" for t in (0, 0.25, 0.5, 0.75, 1)))
        ax.set_ylim(-3, 103)
        ax.set_xlabel("epoch" if epochs > 1 else "share of the training")
        ax.set_title("sparsity (%)")
        if len(ramps) > 1:
            marks.legend(ax, "schedule")
        picture.alt = "Sparsity over the training. " + "; ".join(words) + "."
    return picture


def filters(weights: np.ndarray, *, most: int = 64, **shown: Unpack[Shown]) -> Picture:
    """Each unit as the image of its incoming weights, in the order of the layer; a dead one is an empty, crossed frame.

    Of several input channels the mean is shown. All images share one scale, whose middle is 0: what is pruned is white.

    Args:
        weights: float [units, channels, height, width], 0 where pruned: of a convolution, or of a first fully connected
            layer, whose columns are pixels: ``weight.reshape(-1, *shape)``.
        most: units that are drawn, the first ones.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: no array of four dimensions, or numbers that are not finite.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 4 or not weights.size or not np.isfinite(weights).all():
        raise PrunelabError(
            f"plots.filters: weights of shape {weights.shape} should be finite, [units, channels, height, width]"
        )
    images, dead = weights[:most].mean(1), ~weights.reshape(len(weights), -1).any(1)
    columns = min(16, len(images))
    rows = -(-len(images) // columns)
    size = (1.4 + 0.46 * columns, 0.6 + 0.46 * rows)
    edge = float(np.abs(images).max()) or 1.0
    counted = {"n": f"{len(images)} of {len(weights)} units" if len(images) < len(weights) else f"{len(weights)} units"}
    with canvas(rows, columns, **{"size": size, **shown}, counted={**counted, "interval": ""}) as (picture, axes):
        picture.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
        for ax in axes.flat[len(images) :]:
            ax.set_axis_off()
        drawn = None
        for ax, image, gone in zip(axes.flat, images, dead, strict=False):
            drawn = ax.imshow(image, cmap="PuOr", vmin=-edge, vmax=edge, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
            ax.grid(visible=False)
            if gone:
                ax.plot([0, 1], [0, 1], transform=ax.transAxes, color="#6b7280", linewidth=0.8)
                ax.plot([0, 1], [1, 0], transform=ax.transAxes, color="#6b7280", linewidth=0.8)
        bar = picture.colorbar(drawn, ax=list(axes.flat), shrink=0.9, aspect=14)
        bar.set_label("weight", color=mpl.rcParams["text.color"])
        picture.alt = (
            f"Incoming weights of {len(images)} of {len(weights)} units as images; "
            f"{int((~dead).sum())} of {len(weights)} units keep a weight."
        )
    return picture
