"""DropNet's networks in one table: units, parameters, operations, and how much of each could go, reported and ours."""

from __future__ import annotations

from collections.abc import Iterable
from math import nan
from typing import TYPE_CHECKING, Any

from prunelab import data, models, papers, paths, settings
from prunelab.errors import PrunelabError, nearest
from prunelab.papers.curves import METRICS
from prunelab.papers.dropnet.study import FIGURES
from prunelab.papers.reported import reported
from prunelab.plots import gallery
from prunelab.runs.columns import MISSING, short
from prunelab.structure import cost

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.plots.tables import Table

_CLASSES = {"tiny_imagenet": 200}  # of the whole; a part of it says so only when it is read
WITHIN = 0.01  # accuracy that may be lost where nothing significant is; our own reading of the text
LEARNT = 0.5  # of the reported accuracy: a dense network of ours that knows less has nothing to lose; our own default


def spared(points: pd.DataFrame, within: float = WITHIN) -> pd.DataFrame:
    """The largest share of units that went before a curve fell: down to there no mean lies ``within`` below the dense.

    Args:
        points: of ``reported_curves.beside``: strategy, fraction, reported, ours, n.
        within: accuracy that may be lost.

    Returns:
        strategy, quantity (``spared``), reported, ours, ours_half (NaN: one number per curve), n; NaN where a curve is
        not known, and ours where its dense network has not learnt half of what the reported one has.
    """
    import pandas as pd

    rows = []
    for name in sorted(points["strategy"].unique(), key=METRICS.index):
        own = points[points["strategy"] == name]
        dense = own.loc[own["fraction"].idxmax()]
        if dense["ours"] < LEARNT * dense["reported"]:
            own = own.assign(ours=nan)
        ends = {column: _end(own.set_index("fraction")[column].dropna(), within) for column in ("reported", "ours")}
        rows.append({"strategy": name, "quantity": "spared", **ends, "ours_half": nan, "n": own["n"].max()})
    return pd.DataFrame(rows)


def _end(curve: pd.Series, within: float) -> float:
    if curve.empty:
        return nan
    curve = curve.sort_index(ascending=False)
    fallen = curve[curve < curve.iloc[0] - within]
    kept = curve.index if fallen.empty else curve.index[curve.index > fallen.index[0]]
    return 1 - float(kept[-1])


def networks(figures: Iterable[str] = (), within: float = WITHIN) -> pd.DataFrame:
    """The networks that the paper's figures of metrics prune, and how much of each could go by each metric.

    Ours are the committed numbers of ``figures/dropnet``; those of a figure that was never made are NaN.

    Args:
        figures: names in ``study.FIGURES``; (): all that show test accuracy by metric.
        within: accuracy that may be lost.

    Returns:
        artefact, figure, network, data, units (masked), parameters, macs (of the dense network as in the paper), preset
        of ours, and the columns of ``spared``.

    Raises:
        PrunelabError: a figure of another kind, or of none.
    """
    import pandas as pd

    parts = []
    known = [name for name, shown in FIGURES.items() if shown.kind == "metrics" and shown.measure == "test_accuracy"]
    for name in list(figures) or known:
        if name not in known:
            raise PrunelabError(f"no figure {name!r} shows test accuracy by metric: {nearest(name, known)}")
        shown, title = FIGURES[name], papers.artefact(f"dropnet/{name}").title
        source = data.SOURCES[shown.data]
        net = models.build(
            settings.Model(shown.model, shown.hidden), source.shape, source.classes or _CLASSES[shown.data], seed=0
        )
        spent = cost.summarise(net, source.shape)
        facts = {
            "artefact": f"dropnet/{name}",
            "figure": title.partition(":")[0],
            "network": title.split(": ")[1].partition(", ")[2],
            "data": source.title,
            "units": sum(shown.units),
            "parameters": spent.nonzero,
            "macs": spent.macs,
            "preset": (gallery.saved(f"dropnet/{name}") or {}).get("preset", ""),
        }
        parts.append(spared(_points(name), within).assign(**facts))
    table = pd.concat(parts, ignore_index=True)
    first = ["artefact", "figure", "network", "data", "units", "parameters", "macs", "preset"]
    return table[[*first, *(c for c in table if c not in first)]]


def table(rows: pd.DataFrame) -> Table:
    """The table to read, a row for each network; ``numbers`` are the rows of ``networks``."""
    import pandas as pd

    from prunelab.plots.tables import Table

    shown = []
    for figure, own in rows.groupby("figure", sort=False):
        first = own.iloc[0]
        line = {"figure": figure, "network": f"{first['network']}, {first['data']}", "units": f"{first['units']:,}"}
        line |= {name: short(first[name]) for name in ("parameters", "macs")}
        for row in own.itertuples():
            line[row.strategy] = f"{_percent(row.ours)} ({_percent(row.reported)})"
        shown.append(line)
    caption = (
        f"share of the units that went, in %, before the mean test accuracy lay more than {100 * WITHIN:g} point below "
        "that of the dense network: ours (reported); parameters and multiply-accumulates of the dense network"
    )
    return Table(pd.DataFrame(shown), rows, caption)


def sources(rows: pd.DataFrame) -> dict[str, Any]:
    """What the numbers of ours were made with, for the caption: n, data and hardware of the figures they come from."""
    known = [gallery.saved(name) or {} for name in rows.loc[rows["ours"].notna(), "artefact"].unique()]
    seeds = sorted({facts["n"] for facts in known if "n" in facts}, key=lambda n: (len(n), n))
    return {
        "n": " to ".join(dict.fromkeys([*seeds[:1], *seeds[-1:]])),
        "interval": "",
        "data": sorted({name for facts in known for name in facts.get("data", ())}),
        "hardware": "; ".join(sorted({facts["hardware"] for facts in known if "hardware" in facts})),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share == share else MISSING


def _points(name: str) -> pd.DataFrame:
    """Every point of a figure, ours where they are committed."""
    import pandas as pd

    committed = paths.figures() / "dropnet" / f"{name}.csv"
    if committed.is_file():
        return pd.read_csv(committed)
    if not FIGURES[name].reported:
        return pd.DataFrame({"strategy": METRICS, "fraction": 1.0, "reported": nan, "ours": nan, "n": 0})
    theirs = reported("dropnet", FIGURES[name].reported)
    columns = {"value": "reported", "half": "reported_half"}
    return theirs.rename(columns=columns).assign(ours=nan, n=0)
