"""How data are drawn on axes: series that differ in more than colour, means with intervals, axes of counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from prunelab.runs.columns import quantity, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from prunelab.stats import Interval

INTERVAL = "mean ± 95 % t interval"
FEW, WIDE = 3, 10.0  # an interval of fewer runs, or of more points each way, says nothing: there the runs are drawn
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


def groups(table: pd.DataFrame, hue: str | None, rows: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    """The series of a table of means, in the order of their first appearance in ``rows``; without hue all are one."""
    return [(name, table[table[hue] == name]) for name in rows[hue].unique()] if hue else [("", table)]


def means(rows: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """``stats.summarise``; of a ratio, which is drawn on a log axis, the mean and the interval are those of its log.

    Such a column has ``<column>_times`` in place of ``<column>_half``: the interval goes from the mean divided by it to
    the mean times it.
    """
    import numpy as np  # here and not above: with stats comes pandas, which doubles the time of an import

    from prunelab import stats

    logs = [name for name in columns if quantity(name).log and (rows[name].dropna() > 0).all()]
    found = stats.summarise(rows.assign(**{name: np.log(rows[name].astype(float)) for name in logs}), by, columns)
    for name in logs:
        found[name] = np.exp(found[name])
        found[f"{name}_times"] = np.exp(found.pop(f"{name}_half"))
    return found


def reach(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """How far the interval of each mean reaches, in the unit that is shown: down and up; NaN where none is drawn."""
    import pandas as pd

    shown = quantity(column)
    level = table[column] * shown.scale
    if f"{column}_times" in table:
        times = table[f"{column}_times"]
        ends, wide = (level - level / times, level * times - level), times > WIDE
    else:
        half = table[f"{column}_half"] * shown.scale
        most = WIDE if shown.unit in ("%", "points") else level.abs() / (2 if shown.log else 1)
        ends, wide = (half, half), half > most
    return pd.DataFrame({"down": ends[0], "up": ends[1]}).where(~wide & (table["n"] >= FEW))


def level(values: Iterable[float]) -> Interval:
    """``stats.mean_interval``, likewise."""
    from prunelab import stats

    return stats.mean_interval(values)


def bars(
    ax: Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    spread: bool = False,
    rows: pd.DataFrame | None = None,
    key: str = "round",
    alpha: float = 1,
    zorder: float = 3,
    **look: Any,
) -> None:
    """Means with their intervals, of x too where ``spread``; where an interval says nothing, the runs as small dots.

    A line joins means of as many runs as the series has at most; those of fewer are hollow, and stand alone.

    Args:
        ax: where.
        table: of ``means``, one series.
        x: column of the horizontal axis.
        y: column of the vertical axis.
        spread: whether x has an interval, too.
        rows: the runs; None: they are not drawn.
        key: the column by which runs belong to a mean.
        alpha: of everything.
        zorder: of everything.
        look: of ``series``, and a label.
    """
    across, up = quantity(x), quantity(y)
    at, level, tall = table[x] * across.scale, table[y] * up.scale, reach(table, y)
    wide = reach(table, x).T.to_numpy() if spread else None
    bar = {"ecolor": look["color"], "elinewidth": 1, "alpha": alpha, "zorder": zorder}
    ax.errorbar(at, level, tall.T.to_numpy(), wide, "none", **bar)
    edge = {"markersize": 6.5, "markeredgecolor": mpl.rcParams["axes.facecolor"], "markeredgewidth": 0.7}
    whole = table["n"] == table["n"].max()
    ax.plot(at[whole], level[whole], alpha=alpha, zorder=zorder, **edge, **look)
    hollow = {**look, "linestyle": "", "label": None, "markerfacecolor": "none", "markersize": 6.5}
    ax.plot(at[~whole], level[~whole], alpha=alpha, zorder=zorder, **hollow)
    if rows is not None:
        alone = rows[rows[key].isin(table.loc[tall["up"].isna() & (table["n"] > 1), key])]
        dots(ax, alone[x] * across.scale, alone[y] * up.scale, look)


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


def bound(ax: Axes, axis: str, column: str, values: pd.Series) -> None:
    """End the axis near the single runs (``values``), shares at 0 and 100 %, times at 0: intervals of few reach far."""
    if axis == "x" and ax.get_xscale() == "log":
        return
    shown = quantity(column)
    low, high = values.min() * shown.scale, values.max() * shown.scale
    room = (high - low) or math.inf  # as much again on each side; no limit where all runs agree
    first, last = (low - room, high + room) if shown.unit != "%" else (max(low - room, -3), min(high + room, 103))
    first = max(first, 0) if shown.unit == "s" else first
    edges = ax.get_xlim() if axis == "x" else ax.get_ylim()
    (ax.set_xlim if axis == "x" else ax.set_ylim)(max(edges[0], first), min(edges[1], last))


def counts(ax: Axes, axis: str) -> None:
    """Log axis whose ticks read 1k, 10k, 100k; with 2 and 5 between them where the range is short."""
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    own = ax.xaxis if axis == "x" else ax.yaxis
    low, high = own.get_view_interval()
    own.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(high / low) < 2.2 else (1,)))
    own.set_minor_locator(LogLocator(subs=tuple(range(2, 10))))
    own.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    own.set_minor_formatter(NullFormatter())


def legend(ax: Axes, hue: str | None, **look: Any) -> None:
    """To the right of the axes, below the title of the picture, headed by the column's name; none for one series."""
    if hue:
        heading = hue.rpartition(".")[2].replace("_", " ")
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "borderaxespad": 0.0, "alignment": "left"}
        ax.legend(title=heading, **place, **look)


def spell(counts: pd.Series) -> str:
    """``3``, or ``2 to 5`` where the groups differ."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"


def counted(table: pd.DataFrame, *columns: str, runs: bool = True) -> dict[str, str]:
    """The n and the interval of a table of means, for the caption.

    Args:
        table: of ``means``.
        columns: that are drawn with intervals; where one of these is left out, the caption says so.
        runs: whether the runs are drawn there.
    """
    known = table["n"][table["n"] > 0]  # 0: reported, and not run here
    if known.empty:
        return {}
    several, drawn = known.max() > 1, known.max() >= FEW
    left_out = any((reach(table, column)["up"].isna() & (table["n"] > 1)).any() for column in columns)
    rule = f", none of fewer than {FEW} runs or beyond ± {WIDE:g} points{' (there the runs)' if runs else ''}"
    interval = f"{INTERVAL}{rule if left_out else ''}" if drawn else "mean" if several else ""
    return {"n": f"{spell(known)} seed{'s' if several else ''}", "interval": interval}
