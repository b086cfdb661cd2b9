"""Methods side by side at one compression, from stored results: what ``widgets.compare`` shows, and its words.

Numbers are runs (one row per run and round, with a seed) or, as in the committed CSV files, means with the half width
of their interval and n. Written as HTML, not drawn with matplotlib, so it follows the slider and the page's theme.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunelab.errors import PrunelabError
from prunelab.plots.pictures import Picture, canvas
from prunelab.runs.columns import MISSING, need, quantity
from prunelab.stats import Interval, paired_difference, summarise

if TYPE_CHECKING:
    import pandas as pd

WIDTH, ROW = 260, 24  # of the picture in a row, in pixels of the page
EDGE = 10  # left and right of its axis
FEW = 2  # runs, whose t interval is six times as wide as that of three
ALIKE = 1.1  # compressions that differ by a larger factor are not compared (our own default)
STYLE = """<style>
.prunelab-versus {container-type: inline-size; line-height: 1.4; color: var(--jp-content-font-color1, inherit);
  --one: var(--jp-brand-color1, #0072b2); --two: #d55e00; --faint: var(--jp-border-color1, #8888)}
.prunelab-versus table {color: inherit; border-collapse: collapse; font-size: 13px;
  font-variant-numeric: tabular-nums}
.prunelab-versus :is(td, th) {padding: 0 0 0 12px; text-align: right; font-weight: normal; white-space: nowrap}
.prunelab-versus :is(td, th):first-child {padding-left: 6px; text-align: left}
.prunelab-versus thead th {border-bottom: 1px solid var(--faint); padding-bottom: 4px}
.prunelab-versus tr.one {background: color-mix(in srgb, var(--one) 14%, transparent); font-weight: 600}
.prunelab-versus tr.two {background: color-mix(in srgb, var(--two) 14%, transparent); font-weight: 600}
.prunelab-versus tr:is(.one, .two) :is(td, th) {font-weight: inherit}
.prunelab-versus p {font-size: 12px; margin: 8px 6px 4px}
.prunelab-versus svg {display: block; font-size: 11px; overflow: visible}
.prunelab-versus text {fill: currentColor}
.prunelab-versus .grid {stroke: var(--jp-border-color2, #8884)}
.prunelab-versus .bar {stroke: currentColor; stroke-width: 1.5}
.prunelab-versus .dot {fill: currentColor}
.prunelab-versus .one .bar {stroke: var(--one)} .prunelab-versus .one .dot {fill: var(--one)}
.prunelab-versus .two .bar {stroke: var(--two)}
.prunelab-versus .two .dot {fill: var(--jp-layout-color0, Canvas); stroke: var(--two); stroke-width: 2}
@container (max-width: 46em) {  /* the picture below its name and numbers, not outside the frame */
  .prunelab-versus :is(table, thead, tbody) {display: block}
  .prunelab-versus tr {display: grid; grid-template-columns: minmax(0, 1fr) repeat(3, minmax(3em, auto))}
  .prunelab-versus tr > :nth-child(2) {grid-row: 2; grid-column: 1 / -1}
  .prunelab-versus tr > :first-child {white-space: normal}
}
</style>"""


@dataclass(frozen=True)
class Results:
    """Stored results, ready to be asked for positions.

    Attributes:
        rows: as they were given, those with a value.
        x: column of the position's size, such as ``compression_ratio``.
        y: column that is compared.
        by: column of the methods.
        at: column of the positions.
    """

    rows: pd.DataFrame
    x: str
    y: str
    by: str
    at: str

    @classmethod
    def of(cls, rows: pd.DataFrame, x: str, y: str, by: str | None = None) -> Results:
        """Look at a table; positions are its rounds where it has any, otherwise the values of ``x``.

        Raises:
            PrunelabError: a column that is missing or was never measured, or only one method.
        """
        by = by or ("strategy" if "strategy" in rows else "method")
        at = "round" if "round" in rows else x
        beside = ["n"] if f"{y}_half" in rows else ["seed"]
        measured = need(rows, [x, y, by, at, *beside], "widgets.compare", by).dropna(subset=[x, y])
        need(measured, [], f"widgets.compare, {y} against {x}")
        if measured[by].nunique() < 2:
            raise PrunelabError(f"widgets.compare: {by} has only {measured[by].iloc[0]!r}: two are needed")
        if not cls(measured, x, y, by, at).summarised and measured.duplicated([by, at, "seed"]).any():
            raise PrunelabError(f"widgets.compare: a seed occurs twice at one {at} of one {by}; select one of the runs")
        return cls(measured, x, y, by, at)

    @property
    def summarised(self) -> bool:
        """Whether the rows are means already."""
        return f"{self.y}_half" in self.rows

    @property
    def methods(self) -> list[Any]:
        """In the order of their first appearance."""
        return self.rows[self.by].unique().tolist()

    @property
    def seeds(self) -> list[Any]:
        """Of the single runs; none where the rows are means."""
        return [] if self.summarised else sorted(self.rows["seed"].unique().tolist())

    @property
    def positions(self) -> list[tuple[str, Any]]:
        """What each position is called, and its value: as many times as all methods are compressed there."""
        found = []
        for value, here in self.rows.groupby("round" if self.at == "round" else self.x)[self.x]:
            low, high = f"{here.min():.3g}", f"{here.max():.3g}"
            unit = quantity(self.x).unit
            found.append((f"{low if low == high else f'{low} to {high}'} {unit}".rstrip(), value))
        names = [name for name, _ in found]
        return [(f"{n} (round {v})" if names.count(n) > 1 else n, v) for n, v in found]

    def levels(self, at: Any, seed: Any = None) -> pd.DataFrame:
        """One row per method, in their order: by, x, y, the half width of y's interval, n; NaN where not measured."""
        here = self.rows[self.rows[self.at] == at]
        if self.summarised:
            found = here.set_index(self.by)[[*dict.fromkeys([self.x, self.y]), f"{self.y}_half", "n"]]
        else:
            here = here if seed is None else here[here["seed"] == seed]
            found = summarise(here, by=self.by, columns=list(dict.fromkeys([self.x, self.y]))).set_index(self.by)
        return found.reindex(self.methods)

    def difference(self, one: Any, two: Any, at: Any, seed: Any = None) -> Interval:
        """``one`` minus ``two``, with its interval.

        Runs that share a seed are compared with each other. Of two means alone the half widths are added in squares,
        which with as many runs on both sides is never narrower than Welch's interval.
        """
        levels = self.levels(at, seed)
        if self.summarised:
            (a, b), (p, q) = (levels.loc[[one, two], name] for name in (self.y, f"{self.y}_half"))
            return Interval(float(a - b), math.hypot(p, q), int(levels.loc[[one, two], "n"].fillna(0).min()), math.nan)
        here = self.rows[(self.rows[self.at] == at) & ((self.rows["seed"] == seed) | (seed is None))]
        a, b = (here[here[self.by] == name].set_index("seed")[self.y] for name in (one, two))
        shared = a.index.intersection(b.index)
        return paired_difference(a[shared], b[shared])

    def words(self, one: Any, two: Any, at: Any, seed: Any = None) -> str:
        """The verdict in one sentence, as the slider shows it."""
        levels, up = self.levels(at, seed), quantity(self.y)
        sides = []
        for name in dict.fromkeys((one, two)):
            row = levels.loc[name]
            if math.isnan(row[self.y]):
                return f"{name} was not measured here; nothing is interpolated."
            count = f"n = {row['n']:.0f}" if seed is None else f"seed {seed}"
            size = quantity(self.x).text(row[self.x])
            sides.append(f"{name} {up.text(row[self.y], row[f'{self.y}_half'])} ({count}) at {size}")
        head = f"{up.label.capitalize()}: {', '.join(sides)}."
        if one == two:
            return f"{head} Choose two to compare."
        sizes = [abs(levels.loc[name, self.x]) for name in (one, two)]
        if max(sizes) > ALIKE * min(sizes):
            return f"{head} They are compressed differently, so this decides nothing."
        found = self.difference(one, two, at, seed)
        unit = "points" if up.unit == "%" else up.unit
        size = f"{up.number(abs(found.mean))} {unit}".rstrip()
        side = "above" if found.mean > 0 else "below"
        if not math.isfinite(found.half):
            return f"{head} {one} is {size} {side} {two} in one run, which decides nothing."
        size = f"{up.number(abs(found.mean))} ± {up.number(found.half)} {unit}".rstrip()
        pairs = "" if self.summarised else f" over {found.n} seeds"
        pairs += " (too few for an interval to say much)" * (bool(pairs) and found.n == FEW)
        if found.low > 0 or found.high < 0:
            return f"{head} {one} is {size} {side} {two}{pairs}: the 95 % interval is clear of zero."
        return f"{head} Undecided: the difference of {size}{pairs} can have either sign."

    def picture(self, one: Any, two: Any, at: Any, seed: Any = None) -> Picture:
        """What ``html`` shows as a picture, for where nothing runs."""
        levels, up = self.levels(at, seed), quantity(self.y)
        with canvas(size=(6.4, 0.8 + 0.26 * len(levels))) as (picture, axes):
            ax = axes[0, 0]
            for place, (name, row) in enumerate(levels.iterrows()):
                half = 0.0 if math.isnan(row[f"{self.y}_half"]) else row[f"{self.y}_half"] * up.scale
                chosen = {"fmt": "o" if name == one else "s", "color": "C0" if name == one else "C1"}
                style = chosen if name in (one, two) else {"fmt": ".", "color": "grey"}
                ax.errorbar(row[self.y] * up.scale, -place, xerr=half, **style)
            ax.set_yticks([-place for place in range(len(levels))], [str(name) for name in levels.index])
            ax.set_xlabel(up.axis)
            picture.alt = self.words(one, two, at, seed)
        return picture

    def html(self, one: Any, two: Any, at: Any, seed: Any = None) -> str:
        """All methods as a table with their intervals drawn; rows stay where they are, whatever the position."""
        levels, up = self.levels(at, seed), quantity(self.y)
        low, high = _range(levels[self.y], levels[f"{self.y}_half"])

        def place(value: float) -> float:
            return round(EDGE + (min(max(value, low), high) - low) / (high - low) * (WIDTH - 2 * EDGE), 1)

        places = [(place(tick / up.scale), f"{tick:g}") for tick in _ticks(low * up.scale, high * up.scale)]
        grid = "".join(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{ROW}"/>' for x, _ in places)
        body = []
        for name, row in levels.iterrows():
            kind = {one: "one", two: "two"}.get(name, "") if one != two else ""
            value, half = row[self.y], row[f"{self.y}_half"]
            drawn = "" if math.isnan(value) else _drawn(place, value, half, kind)
            cells = [
                up.text(value, half) if math.isfinite(value) else MISSING,
                f"{row['n']:.0f}" if math.isfinite(row["n"]) else MISSING,
                quantity(self.x).text(row[self.x]) if math.isfinite(row[self.x]) else MISSING,
            ]
            numbers = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            picture = f'<td aria-hidden="true"><svg width="{WIDTH}" height="{ROW}">{grid}{drawn}</svg></td>'
            body.append(f'<tr class="{kind}"><th scope="row">{html.escape(str(name))}</th>{picture}{numbers}</tr>')
        axis = "".join(f'<text x="{x}" y="12" text-anchor="middle">{text}</text>' for x, text in places)
        heads = [up.axis, "n", quantity(self.x).label.partition(" (")[0]]
        head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
        return (
            f'{STYLE}<div class="prunelab-versus"><table><thead><tr><th>{html.escape(self.by)}</th>'
            f'<th aria-hidden="true"><svg width="{WIDTH}" height="16">{axis}</svg></th>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table>{self._highest(levels)}</div>"
        )

    def _highest(self, levels: pd.DataFrame) -> str:
        """What leads, which with many methods is partly luck."""
        up = quantity(self.y)
        known = levels[self.y].dropna()
        first = [str(name) for name, shown in known.map(up.number).items() if shown == up.number(known.max())]
        alike = f", and {len(first) - 1} more with the same number" if len(first) > 1 else ""
        words = f"Highest mean of {len(known)}: {first[0]}{alike}." if first else ""
        return f"<p>{html.escape(words)}</p>"


def _drawn(place: Any, value: float, half: float, kind: str) -> str:
    """A mean and its interval; round for one method, square for the other, small for all else."""
    x, y = place(value), ROW / 2
    bar = ""
    if math.isfinite(half):
        bar = f'<line class="bar" x1="{place(value - half)}" x2="{place(value + half)}" y1="{y}" y2="{y}"/>'
    if kind == "two":
        return f'{bar}<rect class="dot" x="{x - 5}" y="{y - 5}" width="10" height="10"/>'
    return f'{bar}<circle class="dot" cx="{x}" cy="{y}" r="{6 if kind else 3.5}"/>'


def _range(values: pd.Series, halves: pd.Series) -> tuple[float, float]:
    """Room for the means and their intervals; an interval of few runs that reaches far is cut, a usual one is not."""
    low, high = values.min(), values.max()
    reach = halves.fillna(0)
    span = max(high - low, reach.median()) or abs(high) or 1.0
    low, high = max((values - reach).min(), low - span), min((values + reach).max(), high + span)
    return low - 0.05 * span, high + 0.05 * span


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers."""
    step = 10 ** math.floor(math.log10(high - low))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if (high - low) / (step * part) <= 6)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
