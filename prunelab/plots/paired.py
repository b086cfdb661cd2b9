"""Single numbers beside those that a paper reports: one row for each result, one panel for each quantity."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from prunelab.plots import marks
from prunelab.plots.pictures import Picture, Shown, canvas
from prunelab.runs.columns import need, quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from typing_extensions import Unpack


def ours_and_reported(
    points: pd.DataFrame, quantities: Sequence[str], by: Sequence[str], **shown: Unpack[Shown]
) -> Picture:
    """Ours as filled circles with their 95 % t intervals if they have any, what was reported as open squares.

    Args:
        points: one row per result and quantity: ``by``, quantity, reported (NaN: nothing was), ours, ours_half (NaN: no
            interval; that of two runs is not drawn), n.
        quantities: the panels.
        by: columns that name a result; the first one heads a group of rows.
        shown: title, provenance, look, size.
    """
    need(points, [*by, "quantity", "reported", "ours", "ours_half", "n"], "plots.ours_and_reported")
    names = [": ".join(map(str, keys)) for keys in points[list(by)].drop_duplicates().itertuples(index=False)]
    size = (2.4 + 2.9 * len(quantities), 1.4 + 0.3 * len(names))
    counted = marks.counted(points) | ({} if points["ours_half"].notna().any() else {"interval": ""})
    sheet = canvas(1, len(quantities), **{"size": size, **shown}, counted=counted, sharey=True)
    words = []
    with sheet as (picture, axes):
        own, theirs = marks.series(0), marks.series(1)
        hollow = {**theirs, "linestyle": "", "marker": "s", "markerfacecolor": "none", "markersize": 9}
        for ax, column in zip(axes[0], quantities, strict=True):
            up = quantity(column)
            rows = points[points["quantity"] == column]
            for place, row in enumerate(rows.itertuples()):
                firm = math.isfinite(row.ours_half) and row.n >= marks.FEW
                half = row.ours_half * up.scale if firm else None
                ours = ax.errorbar(row.ours * up.scale, place, xerr=half, elinewidth=1, **{**own, "linestyle": ""})
                known = (
                    [f"ours {up.text(row.ours, row.ours_half if firm else math.nan)}"]
                    if math.isfinite(row.ours)
                    else []
                )
                if math.isfinite(row.reported):
                    (ring,) = ax.plot([row.reported * up.scale], [place], **hollow)
                    known.append(f"reported {up.text(row.reported)}")
                words.append(f"{names[place]}, {up.label}: {', '.join(known) or 'not known'}.")
            marks.scale(ax, "x", column, rows[["ours", "reported"]].stack())
            ax.set_title(up.axis)
            ax.grid(axis="y", visible=False)
            if ax.get_xscale() == "linear":
                ax.xaxis.set_major_locator(MaxNLocator(4))
        heads = [i for i, (a, b) in enumerate(itertools.pairwise(names)) if a.split(":")[0] != b.split(":")[0]]
        for ax in axes[0]:
            for place in heads:
                ax.axhline(place + 0.5, color=mpl.rcParams["grid.color"], linewidth=0.8, zorder=0)
        axes[0, 0].set_yticks(range(len(names)), names)
        axes[0, 0].invert_yaxis()
        both = {"ours": ours} | ({"reported": ring} if points["reported"].notna().any() else {})
        picture.key(both.values(), both, columns=2)
        picture.alt = " ".join(words)
    return picture
