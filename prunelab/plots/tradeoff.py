"""Several trade-offs on one sheet: accuracy against compression, operations, time or bytes, a panel for each kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from prunelab.plots import marks
from prunelab.plots.pictures import Picture, Shown, canvas
from prunelab.runs.columns import need, quantity, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from typing_extensions import Unpack

_ROW, _LEGEND = 3.5, 0.19  # inches: height of a panel, and of each line of the legend below it


def tradeoffs(
    panels: Mapping[str, tuple[pd.DataFrame, str]],
    y: str = "test_accuracy",
    literature: pd.DataFrame | None = None,
    **shown: Unpack[Shown],
) -> Picture:
    """Panels of ``y`` against costs; means with 95 % t intervals both ways, and results of other papers as grey rings.

    Args:
        panels: title -> (rows, column of the horizontal axis). Rows have strategy, round, ``y`` and that column; of a
            strategy one point per round.
        y: the vertical axis of all.
        literature: of ``reported_curves.literature``: paper, accuracy, and the columns of the axes they are drawn
            against; None: nothing.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: a column that is missing, or a panel without a row.
    """
    import pandas as pd

    up = quantity(y)
    columns = 2 if len(panels) > 1 else 1
    lines = math.ceil(len(panels) / columns)
    # One place for each method of the sheet: two of them never look the same, and one looks the same in all panels.
    names = list(dict.fromkeys(name for rows, _ in panels.values() for name in rows["strategy"]))
    deepest = max(rows["strategy"].nunique() for rows, _ in panels.values())
    size = (6.2 * columns, lines * (_ROW + _LEGEND * math.ceil(deepest / 2)) + 0.6)
    words = []
    parts = {
        title: marks.means(need(rows, ["strategy", "round", x, y], "tradeoffs", "strategy").dropna(subset=[x, y]),
                           by=["strategy", "round"], columns=[x, y])
        for title, (rows, x) in panels.items()
    }  # fmt: skip
    counted = marks.counted(next(iter(parts.values())), y)
    with canvas(lines, columns, **{"size": size, **shown}, counted=counted) as (picture, axes):
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_visible(False)
        for ax, (title, (rows, x)) in zip(axes.flat, panels.items(), strict=False):
            across, means = quantity(x), parts[title]
            for name, own in marks.groups(means, "strategy", rows):
                own = own.sort_values("round")
                look = {**marks.series(names.index(name)), **({} if len(own) > 1 else {"linestyle": ""})}
                mine = rows[rows["strategy"] == name]
                marks.bars(ax, own, x, y, spread=True, rows=mine, label=str(name), **look)
            levels = rows[y].dropna()
            if literature is not None and len(known := literature.dropna(subset=[x]) if x in literature else ()):
                papers = known["paper"].nunique()
                grey = {"color": mpl.rcParams["xtick.color"], "markerfacecolor": "none", "linestyle": "", "marker": "o"}
                label = f"literature: {len(known)} results of {papers} papers"
                ax.plot(known[x], known["accuracy"] * up.scale, label=label, **grey)
                levels = pd.concat([levels, known["accuracy"]])
            marks.scale(ax, "x", x, rows[x].dropna())
            if across.log and ax.get_xscale() == "linear" and rows[x].max() >= 1000:
                ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            marks.bound(ax, "y", y, levels)
            ax.set_title(f"{title}: {up.axis}", fontsize=10)
            ax.set_xlabel(across.axis)
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 2, "fontsize": 8}
            ax.legend(**place)
            best = means.loc[means[y].idxmax()]
            words.append(f"{title}: {means['strategy'].nunique()} methods, the best mean {up.text(best[y])}"
                         f" ({best['strategy']}, {across.text(best[x])}).")  # fmt: skip
        picture.alt = f"{up.label.capitalize()} against cost. " + " ".join(words)
    return picture


COSTS = {"parameters": "parameters", "macs": "multiply-accumulates", "latency": "seconds of a batch", "bytes": "bytes"}


def forms(rows: pd.DataFrame, **shown: Unpack[Shown]) -> Picture:
    """What the forms of networks answer and cost: a row of panels for each network, a mark for each form.

    Bars are Wilson's 95 % intervals over the test samples: each form is one network.

    Args:
        rows: of ``savings.table`` with a column network: network, form, test_accuracy, correct, samples, parameters,
            macs, latency, bytes.
        shown: title, provenance, look, size.
    """
    from scipy.stats import binomtest

    need(rows, ["network", "form", "test_accuracy", "correct", "samples", *COSTS], "plots.forms", "form")
    networks = list(rows["network"].unique())
    most = max((list(own["form"]) for _, own in rows.groupby("network")), key=len)  # not every network has every form
    names = list(dict.fromkeys([*most, *rows["form"]]))
    words, handles = [], {}
    counted = {"n": "1 seed", "interval": "Wilson's 95 % interval over the test samples"}
    size = {"size": (13.0, 2.7 * len(networks) + 0.9), **shown}
    with canvas(len(networks), len(COSTS), **size, counted=counted, sharey="row") as (picture, axes):
        for line, network in zip(axes, networks, strict=True):
            own = rows[rows["network"] == network]
            for ax, (column, label) in zip(line, COSTS.items(), strict=True):
                for point in own.itertuples():
                    around = binomtest(int(point.correct), int(point.samples)).proportion_ci(method="wilson")
                    level = 100 * point.test_accuracy
                    reach = [[level - 100 * around.low], [100 * around.high - level]]
                    look = {**marks.series(names.index(point.form)), "linestyle": ""}
                    handles[point.form] = ax.errorbar(getattr(point, column), level, reach, elinewidth=1, **look)
                marks.counts(ax, "x")
                _few_ticks(ax)
                ax.set_xlabel(label)
            line[0].set_title(f"{network}: test accuracy (%)")
            words.append(
                f"{network}: " + ", ".join(f"{r.form} {100 * r.test_accuracy:.1f} %" for r in own.itertuples())
            )
        picture.key([handles[name] for name in names], names, columns=4)
        picture.alt = "Accuracy against cost for each form of each network. " + "; ".join(words) + "."
    return picture


def _few_ticks(ax: Axes) -> None:
    """At most four round numbers on a log axis that spans less than two decades, where they would overlap."""
    low, high = ax.get_xlim()
    if high / low >= 100:
        return
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_numbers = [m * 10.0**k for k in powers for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10.0**k <= high]
    every = max(1, math.ceil(len(round_numbers) / 4))
    ax.xaxis.set_major_locator(FixedLocator(round_numbers[::every]))
    ax.xaxis.set_minor_locator(NullLocator())
