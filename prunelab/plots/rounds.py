"""Pictures of rounds: accuracy against how much is left, any column over any other, strategies beside each other."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator

from prunelab.errors import PrunelabError
from prunelab.plots import marks
from prunelab.plots.pictures import Picture, Shown, canvas
from prunelab.runs.columns import need, quantity

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from typing_extensions import Unpack


def accuracy_against_compression(
    rounds: pd.DataFrame,
    hue: str = "strategy",
    *,
    x: str = "compression_ratio",
    y: str = "test_accuracy",
    **shown: Unpack[Shown],
) -> Picture:
    """Accuracy against compression on a log axis, intervals both ways, every run as a small dot.

    The dense baseline is a dashed line in a band of its 95 % t interval: of the runs that were never pruned, or, where
    there are none, of the networks before their first pruning; where these differ between the series, each series
    begins at its own. All rounds that are given are drawn; with a method that prunes while training, those before the
    last are networks in the midst of it.

    Args:
        rounds: one row per run and round: id, round, compression_ratio, ``hue``, ``x``, ``y``.
        hue: column of the series.
        x: column of the horizontal axis.
        y: column of the vertical axis.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: a column that is missing, or no row with a pruned network.
    """
    need(rounds, ["id", "round", "compression_ratio", hue, x, y], "plots.accuracy_against_compression", hue)
    whole = rounds["compression_ratio"] <= 1 + 1e-9
    dense, pruned = rounds[whole], rounds[~whole].dropna(subset=[x, y])
    never = dense[~dense["id"].isin(pruned["id"])]
    several = never.empty and "seed" in dense and bool((dense.groupby("seed")[y].nunique() > 1).any())
    if several:  # trained in other ways, as by Adam and by SGD: each curve begins at its own dense network
        pruned = rounds.dropna(subset=[x, y])
    if pruned.empty:
        raise PrunelabError("plots.accuracy_against_compression: every row is dense; select pruned runs as well")
    means = marks.means(pruned, by=[hue, "round"], columns=[x, y])
    across, up = quantity(x), quantity(y)
    words = [f"{up.label.capitalize()} against {across.label}."]
    with canvas(**{"size": (8.2, 4.8), **shown}, counted=marks.counted(means, y)) as (picture, axes):
        ax = axes[0, 0]
        if not dense.empty and not several:
            words.append(_baseline(ax, dense if never.empty else never, y))
        for position, (name, rows) in enumerate(marks.groups(means, hue, pruned)):
            rows = rows.sort_values(x)
            look = {**marks.series(position), **({} if len(rows) > 1 else {"linestyle": ""})}
            own = pruned[pruned[hue] == name]
            marks.dots(ax, own[x] * across.scale, own[y] * up.scale, look)
            marks.bars(ax, rows, x, y, spread=True, label=f"{name} (n = {marks.spell(rows['n'])})", **look)
            best = rows.loc[rows[y].idxmax()]
            firm = best.get(f"{y}_half", math.nan) if best["n"] >= marks.FEW else math.nan
            words.append(f"{name}: best mean {up.text(best[y], firm)} at {across.text(best[x])}.")
        marks.scale(ax, "x", x, pruned[x])
        ax.set_ylim(*_level(rounds[y], means, y))
        ax.set_xlabel(across.axis)
        marks.bound(ax, "x", x, pruned[x])
        marks.bound(ax, "y", y, rounds[y])
        ax.set_title(up.axis)
        marks.legend(ax, hue, labelspacing=0.7)
        picture.alt = " ".join(words)
    return picture


def requested_against_achieved(rounds: pd.DataFrame, hue: str = "strategy", **shown: Unpack[Shown]) -> Picture:
    """The sparsity that a run was asked for and the one that it has, one mark per run and round; equal on the diagonal.

    A method that removes whole units, or layers with a rate of their own, need not meet what was asked.

    Args:
        rounds: one row per run and round: requested_sparsity, sparsity, ``hue``.
        hue: column of the series.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: a column that is missing, or no row.
    """
    columns = ["requested_sparsity", "sparsity"]
    need(rounds, [*columns, hue], "plots.requested_against_achieved", hue)
    rows = rounds.dropna(subset=columns)
    if rows.empty:
        raise PrunelabError("plots.requested_against_achieved: no row says what was requested")
    across, up = map(quantity, columns)
    off = (rows["sparsity"] - rows["requested_sparsity"]).abs().groupby(rows[hue], sort=False).max()
    with canvas(**{"size": (6.4, 4.8), **shown}) as (picture, axes):
        ax = axes[0, 0]
        ax.plot([0, 1], [0, 1], **marks.reference())
        for position, (name, own) in enumerate(rows.groupby(hue, sort=False)):
            look = {**marks.series(position), "linestyle": "", "markersize": 5, "alpha": 0.8}
            ax.plot(own["requested_sparsity"], own["sparsity"], label=str(name), **look)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        ax.set_xlabel(across.axis)
        ax.set_title(up.axis)
        marks.legend(ax, hue)
        largest = "; ".join(f"{name} {value:.4f}" for name, value in off.items())
        picture.alt = f"Achieved against requested sparsity, equal on the diagonal. Largest difference: {largest}."
    return picture


def curve(
    rows: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None = None,
    *,
    mark: float | None = None,
    chosen: str | None = None,
    **shown: Unpack[Shown],
) -> Picture:
    """Mean of ``y`` at every measured ``x``, with 95 % t intervals; one series per value of ``hue``.

    Args:
        rows: of the store, rounds or epochs.
        x: column of the horizontal axis; values are compared as they are, so round them where seeds differ a little.
        y: column of the vertical axis.
        hue: column of the series; None: one series.
        mark: a measured value of ``x`` to draw a ring around.
        chosen: the value of ``hue`` that stands out; None: all alike.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: a column that is missing or was never measured.
    """
    keys = [hue, x] if hue else [x]
    measured = need(rows, [*keys, y], "plots.curve", hue).dropna(subset=[x, y])
    need(measured, [], f"plots.curve, {y} against {x}")
    means = marks.means(measured, by=keys, columns=[y])
    across, up = quantity(x), quantity(y)
    words = [f"{up.label.capitalize()} against {across.label}."]
    with canvas(**{"size": (7.6, 4.2), **shown}, counted=marks.counted(means, y)) as (picture, axes):
        ax = axes[0, 0]
        for position, (name, group) in enumerate(marks.groups(means, hue, measured)):
            ahead, group = chosen is None or name == chosen, group.sort_values(x)
            weight = {"alpha": 1 if ahead else 0.3, "zorder": 3 if ahead else 2}
            own = measured[measured[hue] == name] if hue else measured
            marks.bars(ax, group, x, y, rows=own, key=x, label=str(name), **weight, **marks.series(position))
            if ahead and mark is not None:
                _ring(ax, group[group[x] == mark], x, y)
            ends = [f"{up.text(row[y])} at {across.text(row[x])}" for _, row in group.iloc[[0, -1]].iterrows()]
            words.append(f"{name or up.label}: {', '.join(ends)}.")
        marks.scale(ax, "x", x, means[x])
        if x == "density":  # from the dense network on the left to the sparse one, as pruning goes
            ax.invert_xaxis()
        if x in ("epoch", "round"):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel(across.axis)
        marks.bound(ax, "y", y, measured[y])
        ax.set_title(up.axis)
        marks.legend(ax, hue)
        picture.alt = " ".join(words)
    return picture


def strategies(
    rounds: pd.DataFrame,
    by: str = "strategy",
    metrics: Sequence[str] = ("test_accuracy", "weights", "units", "seconds"),
    *,
    baseline: str | None = None,
    guides: Mapping[str, float] = MappingProxyType({}),
    windows: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    **shown: Unpack[Shown],
) -> Picture:
    """A comparison table as a picture: a row per strategy, a column per quantity, means with intervals, runs as dots.

    Args:
        rounds: one row per run: ``by`` and ``metrics``; or a table of means as ``tables.comparison`` has them: no dots.
        by: column that names the rows; they stand in the order of their first appearance.
        metrics: columns to compare.
        baseline: a value of ``by`` whose means are drawn through as dashed lines.
        guides: quantity -> a value, in the unit shown, at which a dashed line stands.
        windows: quantity -> the ends of its axis, in the unit shown; a mean beyond them is written at the edge.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: a column that is missing.
    """
    need(rounds, [by, *metrics], "plots.strategies", by)
    names = list(rounds[by].unique())
    known = f"{metrics[0]}_half" in rounds
    means = (rounds if known else marks.means(rounds, by=[by], columns=list(metrics))).set_index(by).loc[names]
    size = (2.0 + 2.1 * len(metrics), 1.3 + 0.34 * len(names))
    counted = marks.counted(means, *metrics, runs=not known)
    sheet = canvas(1, len(metrics), **{"size": size, **shown}, counted=counted, sharey=True)
    with sheet as (picture, axes):
        for ax, metric in zip(axes[0], metrics, strict=True):
            quant = quantity(metric)
            middle, reach = means[metric] * quant.scale, marks.reach(means, metric)
            low, high = windows.get(metric, (-math.inf, math.inf))
            for row, name in enumerate(names):
                look = {**marks.series(row), "linestyle": ""}
                if not low <= middle[name] <= high:
                    edge, to = (low, "left") if middle[name] < low else (high, "right")
                    arrow = f"← {middle[name]:.0f}" if to == "left" else f"{middle[name]:.0f} →"
                    ax.text(edge, row, arrow, ha=to, va="center", fontsize=8, color=look["color"])
                    continue
                if not known:
                    own = rounds.loc[rounds[by] == name, metric] * quant.scale
                    marks.dots(ax, own, [row] * len(own), look)
                ends = reach.loc[name].to_numpy()
                ax.errorbar(
                    middle[name], row, xerr=None if np.isnan(ends).any() else ends[:, None], elinewidth=1, **look
                )
            lines = [middle[baseline]] if baseline in means.index else []
            for line in [*lines, *([guides[metric]] if metric in guides else [])]:
                ax.axvline(line, **marks.reference())
            marks.scale(ax, "x", metric, rounds[metric])
            marks.bound(ax, "x", metric, rounds[metric])
            if metric in windows:
                ax.set_xlim(low, high)
            ax.set_title("\n".join(textwrap.wrap(quant.axis, 19)))
            ax.grid(axis="y", visible=False)
            if ax.get_xscale() == "linear":
                ax.xaxis.set_major_locator(MaxNLocator(4))
        axes[0, 0].set_yticks(range(len(names)), [str(name) for name in names])
        axes[0, 0].invert_yaxis()
        first = metrics[0]
        each = [
            f"{n}: {quantity(first).text(row[first], row.get(f'{first}_half', math.nan))}"
            for n, row in means.iterrows()
        ]
        labels = ", ".join(quantity(metric).label for metric in metrics)
        picture.alt = f"{labels.capitalize()} of {len(names)} strategies. {'; '.join(each)}."
    return picture


def _level(values: pd.Series, means: pd.DataFrame, y: str) -> tuple[float, float]:
    """Room for every run and every interval that is drawn."""
    reach = marks.reach(means, y) / quantity(y).scale
    lows, highs = [values.min(), (means[y] - reach["down"]).min()], [values.max(), (means[y] + reach["up"]).max()]
    low, high = (pick(v for v in ends if math.isfinite(v)) for pick, ends in ((min, lows), (max, highs)))
    room = 0.05 * (high - low) or 0.01
    return (low - room) * quantity(y).scale, (high + room) * quantity(y).scale


def _baseline(ax: Axes, dense: pd.DataFrame, y: str) -> str:
    """The dense networks, those of one seed counted once, whatever method they were the start of."""
    quant = quantity(y)
    level = marks.level(dense.groupby("seed")[y].mean() if "seed" in dense else dense[y])
    ax.axhline(level.mean * quant.scale, label=f"dense (n = {level.n})", **marks.reference())
    if math.isfinite(level.half):
        grey = mpl.rcParams["xtick.color"]
        ax.axhspan(level.low * quant.scale, level.high * quant.scale, color=grey, alpha=0.15, linewidth=0, zorder=0)
    return f"Dense baseline: {quant.text(level.mean, level.half)}."


def _ring(ax: Axes, here: pd.DataFrame, x: str, y: str) -> None:
    ink = mpl.rcParams["text.color"]
    at, level = here[x] * quantity(x).scale, here[y] * quantity(y).scale
    hollow = {"markerfacecolor": "none", "markeredgecolor": ink, "markeredgewidth": 1.4}
    ax.plot(at, level, "o", markersize=13, zorder=5, **hollow)
