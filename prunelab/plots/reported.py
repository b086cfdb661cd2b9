"""Our curves beside those of a paper: all of ours in one panel, and each by itself over what was reported."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from prunelab.papers.curves import spoken
from prunelab.papers.reported import CLOSE
from prunelab.plots import marks
from prunelab.plots.pictures import Picture, Shown, canvas
from prunelab.runs.columns import need, quantity

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from typing_extensions import Unpack

_TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


def beside_reported(
    points: pd.DataFrame,
    measure: str,
    *,
    judged: bool = True,
    runs: pd.DataFrame | None = None,
    **shown: Unpack[Shown],
) -> Picture:
    """Accuracy against the fraction of units left, on a log axis that runs from the whole network to nothing.

    The first panel has all of our curves, as a figure of the paper has them, the second all that were reported; then
    each of ours by itself, with its 95 % t interval, over the reported one (open rings on a dashed line, a grey band
    for its interval).

    Args:
        points: of ``reported_curves.beside``: strategy, fraction, ours, ours_half, n, reported, reported_half, agrees.
            A strategy that is a number is the fraction p that goes in each round.
        measure: the column that was compared, for the words.
        judged: whether to count the points that agree; runs below the paper's level have other levels.
        runs: one row per run and round: strategy, fraction, ``measure``; drawn where an interval says nothing.
        shown: title, provenance, look, size.
    """
    need(points, ["strategy", "fraction", "ours", "ours_half", "n", "reported"], "plots.beside_reported", "strategy")
    names, up = list(dict.fromkeys(points["strategy"])), quantity(measure)
    known = points.dropna(subset=["reported"])
    together = 2 if len(known) else 1  # panels that have all curves
    panels = len(names) + together
    columns = 4 if panels in (4, 7, 8) else 3
    rows = math.ceil(panels / columns)
    size = (2.7 * columns + 1.0, 2.4 * rows + 0.9)
    means = points.rename(columns={"ours": measure, "ours_half": f"{measure}_half"})
    counted = marks.counted(means, measure, runs=runs is not None)
    if judged and len(known):
        counted = {**counted, "interval": "; ".join(filter(None, [counted.get("interval"), _rule(known, up.scale)]))}
    sheet = canvas(rows, columns, **{"size": size, **shown}, counted=counted, sharex=True, sharey=True)
    words = [f"{up.label.capitalize()} against the fraction of units left."]
    with sheet as (picture, axes):
        flat = list(axes.flat)
        for ax in flat[panels:]:
            ax.set_visible(False)
        everything, own = flat[0], flat[together:]
        everything.set_title(f"ours: {up.axis}")
        if len(known):
            flat[1].set_title(f"reported: {up.axis}")
        for position, (name, ax) in enumerate(zip(names, own, strict=False)):
            rows_ = points[points["strategy"] == name].sort_values("fraction")
            ends = marks.reach(means.loc[rows_.index], measure)
            look, alone = marks.series(position), None
            if runs is not None:
                mine = runs[(runs["strategy"] == name) & runs["fraction"].isin(rows_["fraction"][ends["up"].isna()])]
                alone = mine[["fraction"]].assign(level=mine[measure] * up.scale)
            label = spoken(name)
            everything.plot(rows_["fraction"], rows_["ours"] * up.scale, label=label, markersize=4, **look)
            bar = {"ecolor": look["color"], "elinewidth": 0.8, "alpha": 0.6, "zorder": 1}
            everything.errorbar(rows_["fraction"], rows_["ours"] * up.scale, ends.T.to_numpy(), None, "none", **bar)
            if len(known):
                theirs = rows_.dropna(subset=["reported"])
                flat[1].plot(theirs["fraction"], theirs["reported"] * up.scale, markersize=4, **look)
            words.append(_over(ax, rows_, ends, up.scale, look, label, judged, alone))
        for ax in flat[:panels]:
            _fractions(ax, points["fraction"])
        marks.bound(everything, "y", measure, points[["ours", "reported"]].stack())
        for ax in flat[:panels]:
            below = flat.index(ax) + columns
            if below >= len(flat) or not flat[below].get_visible():
                ax.set_xlabel("fraction of units left")
                ax.tick_params(labelbottom=True)
        handles, labels = everything.get_legend_handles_labels()
        theirs = {"reported, with its interval": (Patch(**_band()), Line2D([], [], **_ring()))} if len(known) else {}
        key = dict(zip(labels, handles, strict=True)) | theirs
        picture.key(key.values(), key, columns=6)
        picture.alt = " ".join(words)
    return picture


def beside_methods(rounds: pd.DataFrame, others: pd.DataFrame, **shown: Unpack[Shown]) -> Picture:
    """Test error against compression, one panel per network: our rounds, and one point for each method as reported.

    Args:
        rounds: ours, one row per run and round: strategy (the network), id, round, compression_ratio, test_error (a
            share).
        others: of ``reported_curves.mnist_comparison``: network, method, test_error (in per cent), compression, source.
        shown: title, provenance, look, size.
    """
    need(rounds, ["strategy", "round", "compression_ratio", "test_error"], "plots.beside_methods", "strategy")
    need(others, ["network", "method", "test_error", "compression", "source"], "plots.beside_methods", "network")
    names = list(dict.fromkeys(rounds["strategy"]))
    means = marks.means(rounds, by=["strategy", "round"], columns=["compression_ratio", "test_error"])
    words = ["Test error against compression."]
    size = {"size": (4.6 * len(names) + 1.8, 4.2), **shown}
    with canvas(1, len(names), **size, counted=marks.counted(means)) as (picture, axes):
        for ax, name in zip(axes.flat, names, strict=True):
            own = means[means["strategy"] == name].sort_values("round")
            marks.dots(
                ax,
                rounds.loc[rounds["strategy"] == name, "compression_ratio"],
                rounds.loc[rounds["strategy"] == name, "test_error"] * 100,
                marks.series(0),
            )
            look = {**marks.series(0), "label": "NNrelief, ours"}
            marks.bars(ax, own, "compression_ratio", "test_error", spread=True, **look)
            theirs = others[others["network"] == name]
            for position, row in enumerate(theirs.itertuples(), start=1):
                look = {**marks.series(position), "linestyle": "", "markerfacecolor": "none", "markersize": 8}
                ax.plot([row.compression], [row.test_error], label=f"{row.method}, reported", **look)
                words.append(f"{name}, {row.method}, reported: {row.test_error} % at {row.compression:g}.")
            ends = [f"{100 * r.test_error:.2f} % at {r.compression_ratio:.3g}" for r in own.iloc[[0, -1]].itertuples()]
            words.append(f"{name}, ours: {' and '.join(ends)}.")
            marks.scale(ax, "x", "compression_ratio", rounds["compression_ratio"])
            ax.set_xlabel(quantity("compression_ratio").axis)
            ax.set_title(f"{name}: {quantity('test_error').axis}")
        marks.legend(axes.flat[-1], "method")
        picture.alt = " ".join(words)
    return picture


def _rule(known: pd.DataFrame, scale: float) -> str:
    """When a point agrees, as ``reported_curves.beside`` decides it."""
    open_ones = "; undecided: only by the width of our interval" if known["agrees"].isna().any() else ""
    near = f"agree: no further from the reported interval than {CLOSE * scale:g} points, or than our own interval"
    return f"{near}, where it is narrow{open_ones}"


def _ring() -> dict[str, Any]:
    """The look of what was reported."""
    ring = {"marker": "o", "markerfacecolor": "none", "markersize": 6, "linestyle": (0, (4, 2)), "linewidth": 1.1}
    return {"color": mpl.rcParams["xtick.color"], **ring}


def _band() -> dict[str, Any]:
    """The look of its interval."""
    return {"color": mpl.rcParams["xtick.color"], "alpha": 0.25, "linewidth": 0}


def _over(
    ax: Axes,
    rows: pd.DataFrame,
    ends: pd.DataFrame,
    scale: float,
    look: dict[str, Any],
    name: str,
    judged: bool,
    alone: pd.DataFrame | None,
) -> str:
    """One of our curves over the reported one; says in words how many points agree, where that is judged."""
    theirs = rows.dropna(subset=["reported"])
    if len(theirs):
        at, level = theirs["fraction"], theirs["reported"] * scale
        half = theirs["reported_half"].fillna(0) * scale
        ax.fill_between(at, level - half, level + half, zorder=1, **_band())
        ax.plot(at, level, zorder=2, **_ring())
    bar = {"elinewidth": 1, "ecolor": look["color"], "zorder": 3}
    ax.errorbar(rows["fraction"], rows["ours"] * scale, ends.T.to_numpy(), None, "none", **bar)
    if alone is not None:
        marks.dots(ax, alone["fraction"], alone["level"], look)
    ax.plot(rows["fraction"], rows["ours"] * scale, markersize=4, zorder=3, **look)
    ax.set_title(name)
    if not len(theirs):
        return f"{name}: no reported values."
    if not judged:
        return f"{name}: {len(theirs)} reported points, their levels not judged."
    agree, open_ones = int(theirs["agrees"].eq(True).sum()), int(theirs["agrees"].isna().sum())
    rest = f", {open_ones} undecided" if open_ones else ""
    ax.set_title(f"{name}: {agree} of {len(theirs)} agree{rest}")
    return f"{name}: {agree} of {len(theirs)} points agree with the reported ones{rest}."


def _fractions(ax: Axes, fractions: pd.Series) -> None:
    """A log axis from 1 down, with round numbers."""
    ax.set_xscale("log")
    least = fractions[fractions > 0].min()
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick >= 0.8 * least]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(1.12, 0.88 * least)
