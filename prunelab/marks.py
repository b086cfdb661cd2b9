"""How data are drawn on axes: series that differ in more than colour, means with intervals, axes of counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prunelab.quantities import quantity, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

INTERVAL = "mean ± 95 % t interval"
MARKERS = "osD^vPX<>"  # nine markers against seven colours: 63 pairs before one comes back
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 2, 1.5, 2)))


def series(position: int) -> dict[str, Any]:
    """Colour, marker and line style of the ``position``-th series; no two of them differ in colour alone."""
    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    return {
        "color": colours[position % len(colours)],
        "marker": MARKERS[position % len(MARKERS)],
        "linestyle": DASHES[position % len(DASHES)],
    }


def reference() -> dict[str, Any]:
    """The look of a line that is no data."""
    return {"color": mpl.rcParams["xtick.color"], "linestyle": (0, (4, 2)), "linewidth": 1.1, "zorder": 1}


def groups(means: pd.DataFrame, hue: str | None, rows: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    """The series of a table of means, in the order of their first appearance in ``rows``; without hue all are one."""
    return [(name, means[means[hue] == name]) for name in rows[hue].unique()] if hue else [("", means)]


def bars(
    ax: Axes,
    means: pd.DataFrame,
    x: str,
    y: str,
    *,
    spread: bool = False,
    alpha: float = 1,
    zorder: float = 3,
    **look: Any,
) -> None:
    """Means with the half widths of their intervals, of x too where ``spread``; a single run has no interval."""
    across, up = quantity(x), quantity(y)
    at, level = means[x] * across.scale, means[y] * up.scale
    tall = means[f"{y}_half"] * up.scale
    wide = means[f"{x}_half"] * across.scale if spread else None
    ax.errorbar(at, level, tall, wide, "none", ecolor=look["color"], elinewidth=1, alpha=alpha, zorder=zorder)
    edge = {"markersize": 6.5, "markeredgecolor": mpl.rcParams["axes.facecolor"], "markeredgewidth": 0.7}
    ax.plot(at, level, alpha=alpha, zorder=zorder, **edge, **look)


def dots(ax: Axes, x: Any, y: Any, look: Mapping[str, Any]) -> None:
    """Every single run, small."""
    small = {"linestyle": "", "markersize": 3, "alpha": 0.4, "markeredgewidth": 0}
    ax.plot(x, y, marker=look["marker"], color=look["color"], **small)


def runs(ax: Axes, rows: pd.DataFrame, column: str, label: str, position: int, **more: Any) -> pd.Series:
    """Every run thin over its epochs, their mean thick; the mean, which is returned, ends where the first run ends."""
    look, count = {**series(position), **more}, rows["id"].nunique()
    if count > 1:
        thin = {**look, "marker": "", "linewidth": 0.7, "alpha": 0.45}
        for _, run in rows.groupby("id"):
            ax.plot(run["epoch"], run[column], **thin)
    grouped = rows.groupby("epoch")[column].agg(["mean", "count"])
    mean = grouped.loc[grouped["count"] == count, "mean"]
    ax.plot(mean.index, mean, label=label, markevery=max(len(mean) // 8, 1), markersize=4, **look)
    return mean


def scale(ax: Axes, axis: str, column: str, values: pd.Series) -> None:
    """A log axis for a quantity that spans sizes; else the axis stays linear."""
    if quantity(column).log and values.min() > 0 and values.max() / values.min() > 3:
        counts(ax, axis)


def counts(ax: Axes, axis: str) -> None:
    """Log axis whose ticks read 1k, 10k, 100k; with 2 and 5 between them where the range is short."""
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    own = ax.xaxis if axis == "x" else ax.yaxis
    low, high = own.get_view_interval()
    own.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(high / low) < 2.2 else (1,)))
    own.set_minor_locator(LogLocator(subs=tuple(range(2, 10))))
    own.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    own.set_minor_formatter(NullFormatter())


def legend(ax: Axes, hue: str | None, **place: Any) -> None:
    """Outside on the right, headed by the name of the column; none where there is one series."""
    if hue:
        handles, labels = ax.get_legend_handles_labels()
        heading = hue.rpartition(".")[2].replace("_", " ")
        ax.figure.legend(handles, labels, loc="outside right upper", title=heading, alignment="left", **place)


def spell(counts: pd.Series) -> str:
    """``3``, or ``2 to 5`` where the groups differ."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"


def counted(means: pd.DataFrame) -> dict[str, str]:
    """The n and the interval of a table of means, for the caption."""
    several = means["n"].max() > 1
    return {"n": f"{spell(means['n'])} seed{'s' if several else ''}", "interval": INTERVAL if several else ""}
