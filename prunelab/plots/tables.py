"""Tables that people read, as text, Markdown or HTML, with their numbers: means, verdicts, the index of artefacts."""

from __future__ import annotations

import html
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunelab import papers, paths
from prunelab.papers import CONFIRMED, CONTRADICTED, NOT_MEASURED, UNDECIDED, Artefact
from prunelab.plots.gallery import saved
from prunelab.runs.columns import MISSING, need, quantity

if TYPE_CHECKING:
    import pandas as pd

SIGNS = {CONFIRMED: "✓", CONTRADICTED: "✗", UNDECIDED: "?", NOT_MEASURED: MISSING}  # colour never alone
COLOURS = {CONFIRMED: "#00805c", CONTRADICTED: "#c2410c", UNDECIDED: "#9a6700", NOT_MEASURED: "#6b7280"}
_NARROWEST = 16  # characters of a column of words, in a terminal that is too narrow


@dataclass(frozen=True)
class Table:
    """Text to read and the numbers behind it.

    Attributes:
        frame: as it is shown, every cell a string.
        numbers: tidy numeric columns, for the CSV.
        caption: one line below it; may be empty.
        chosen: position of the row that stands out; None: no row does.
    """

    frame: pd.DataFrame
    numbers: pd.DataFrame
    caption: str = ""
    chosen: int | None = None

    def __str__(self) -> str:
        """Plain text in columns; text to the left, numbers to the right."""
        return self.text()

    def text(self, width: int | None = None) -> str:
        """The same, no wider than a terminal: the words of the widest columns go on in the lines below.

        Args:
            width: in characters; None: as wide as it gets.
        """
        cells, right = [list(self.frame.columns), *self._rows()], self._numeric()
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        caption = self.caption
        if width is not None:
            widths, caption = _narrowed(widths, right, width), textwrap.fill(caption, width)

        def line(words: Sequence[str]) -> str:
            aligned = zip(words, widths, right, strict=True)
            return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in aligned).rstrip()

        head, *body = (
            [line(words) for words in itertools.zip_longest(*map(_wrapped, row, widths), fillvalue="")] for row in cells
        )
        rule = "  ".join("─" * own for own in widths)
        return "\n".join([*head, rule, *itertools.chain(*body), *([caption] if caption else [])])

    def markdown(self) -> str:
        """For a README; a vertical bar in a cell is escaped."""
        rule = ["---:" if right else "---" for right in self._numeric()]
        cells = [[c.replace("|", "\\|") for c in row] for row in [list(self.frame.columns), *self._rows()]]
        return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], rule, *cells[1:]]) + "\n"

    def _repr_html_(self) -> str:
        right = self._numeric()
        head = "".join(
            f'<th style="text-align:{"right" if r else "left"}">{html.escape(c)}</th>'
            for c, r in zip(self.frame, right, strict=True)
        )
        body = []
        for position, row in enumerate(self._rows()):
            cells = "".join(f"<td{_cell_style(c, r)}>{html.escape(c)}</td>" for c, r in zip(row, right, strict=True))
            here = ' aria-current="true" style="font-weight:bold"' if position == self.chosen else ""
            body.append(f"<tr{here}>{cells}</tr>")
        note = f'<p style="font-size:smaller;margin:.3em 0">{html.escape(self.caption)}</p>' if self.caption else ""
        return f'<table class="dataframe"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>{note}'

    def _rows(self) -> list[list[str]]:
        return [[str(cell) for cell in row] for row in self.frame.itertuples(index=False)]

    def _numeric(self) -> list[bool]:
        """For each column whether all its cells begin like a number (or are missing)."""
        columns = list(zip(*self._rows(), strict=True)) or [()] * self.frame.shape[1]
        return [bool(cells) and all(cell[:1] in f"+-.0123456789{MISSING}" for cell in cells) for cells in columns]


def _wrapped(cell: str, width: int) -> list[str]:
    """The lines of a cell; one that fits is left as it is."""
    return [cell] if len(cell) <= width else textwrap.wrap(cell, width)


def _narrowed(widths: Sequence[int], right: Sequence[bool], most: int) -> list[int]:
    """Widths of columns that fit a line: whichever column of words is the widest gives way."""
    found = list(widths)
    while sum(found) + 2 * (len(found) - 1) > most:
        words = [i for i in range(len(found)) if not right[i] and found[i] > _NARROWEST]
        if not words:
            break
        found[max(words, key=lambda i: found[i])] -= 1
    return found


def comparison(
    rounds: pd.DataFrame,
    by: str | Sequence[str] = "strategy",
    metrics: Sequence[str] = ("test_accuracy", "test_f1_macro", "weights", "units", "seconds"),
    *,
    caption: str = "",
) -> Table:
    """Means ± half widths of 95 % t intervals over the seeds, one row per group in the order of its first appearance.

    Args:
        rounds: rows of the store, one per run that counts (the last round where runs have several).
        by: column or columns that name the groups.
        metrics: columns to compare; one that no row measured is left out.
        caption: one line below; empty: n, the interval, and what a missing ± means.

    Returns:
        A table whose ``numbers`` are ``by``, each metric with ``<metric>_half``, and ``n``, in the units of the store.
    """
    import pandas as pd

    from prunelab import stats

    keys = [by] if isinstance(by, str) else list(by)
    need(rounds, [*keys, *metrics], "tables.comparison")
    shown = [metric for metric in metrics if rounds[metric].notna().any()]
    means = stats.summarise(rounds, by=keys, columns=shown)
    numbers = rounds[keys].drop_duplicates().merge(means, on=keys)
    frame = pd.DataFrame({quantity(key).label: _values(numbers[key], key) for key in keys})
    for metric in shown:
        frame[quantity(metric).axis] = _means(numbers[metric], numbers[f"{metric}_half"], metric)
    frame["n"] = numbers["n"].astype(str)
    alone = "; no ± where n = 1" if (numbers["n"] == 1).any() else ""
    return Table(frame, numbers, caption or f"mean ± half width of the 95 % t interval over n seeds{alone}")


def stored_verdicts(claims: Iterable[Mapping[str, Any]], committed: Mapping[str, Any] | None = None) -> Table:
    """The table of claims as they are stored beside a figure, where None stands for what is not known.

    Args:
        claims: of one figure.
        committed: the provenance of the committed figure, whose numbers and verdicts then stand beside; None: none.
    """
    import pandas as pd

    known = [{key: math.nan if value is None else value for key, value in claim.items()} for claim in claims]
    table = verdicts(pd.DataFrame(known))
    if not (committed or {}).get("claims"):
        return table
    there = stored_verdicts(committed["claims"]).frame.set_index("claim")
    there = there[~there.index.duplicated()].reindex(table.frame["claim"])
    label = f"committed ({committed['preset']})"
    frame = table.frame.drop(columns="difference").rename(columns={"ours": "here"})
    frame[label], frame["its verdict"] = (there[name].fillna(MISSING).to_list() for name in ("ours", "verdict"))
    same = int((frame["verdict"] == frame["its verdict"]).sum())
    return Table(frame, table.numbers, f"{same} of {len(frame)} verdicts are those on the committed numbers")


def verdicts(judged: pd.DataFrame) -> Table:
    """The table of ``papers.verdicts`` to read: claim, reported, ours, difference, tolerance, n, verdict."""
    import pandas as pd

    need(
        judged,
        ["text", "reported", "ours", "interval", "n", "difference", "tolerance", "rule", "verdict"],
        "tables.verdicts",
    )
    rows = []
    for row in judged.itertuples():
        digits = _digits(row)
        ours = f"{row.ours:,.{digits}f}" + (f" ± {row.interval:,.{digits}f}" if row.interval > 0 else "")
        if row.rule == "shown":
            ours = "yes" if row.ours == 1 else "no"
        rows.append(
            {
                "claim": row.text,
                "reported": _wanted(row),
                "ours": ours if math.isfinite(row.ours) else MISSING,
                "difference": f"{row.difference:+,.{digits}f}" if math.isfinite(row.difference) else MISSING,
                "n": f"{row.n:.0f}" if math.isfinite(row.n) else MISSING,
                "verdict": f"{SIGNS[row.verdict]} {row.verdict}",
            }
        )
    return Table(
        pd.DataFrame(rows),
        judged,
        "the interval decides: all of it on the claim's side confirms, all of it on the other contradicts",
    )


def summary(found: Iterable[str]) -> str:
    """Verdicts of several claims in one phrase: ``✓ 3 of 4 confirmed, 1 undecided``."""
    counts: dict[str, int] = {}
    for verdict in found:
        counts[verdict] = counts.get(verdict, 0) + 1
    total = sum(counts.values())
    if not total:
        return "nothing to judge"
    worst = next(v for v in (CONTRADICTED, UNDECIDED, NOT_MEASURED, CONFIRMED) if v in counts)
    rest = [f"{counts[v]} {v.split(' (')[0]}" for v in (CONTRADICTED, UNDECIDED, NOT_MEASURED) if v in counts]
    return f"{SIGNS[worst]} " + ", ".join([f"{counts.get(CONFIRMED, 0)} of {total} confirmed", *rest])


def outcomes(facts: Mapping[str, Any] | None) -> list[str]:
    """The verdicts that were saved with an artefact, one for each claim; of one that was never made, none."""
    return [entry["verdict"] for entry in (facts or {}).get("claims") or []]


def preset(artefact: Artefact, facts: Mapping[str, Any] | None) -> str:
    """The preset of a saved artefact: ``paper``, or ``paper, 3 of 10 seeds`` where fewer were run than it has."""
    if not facts:
        return MISSING
    planned = artefact.parameters(facts["preset"]).get("seeds")
    count, _, what = str(facts.get("n") or "").partition(" ")
    fewer = what.startswith("seed") and isinstance(planned, int) and int(count) < planned
    return f"{facts['preset']}, {count} of {planned} seeds" if fewer else facts["preset"]


def index(artefacts: Iterable[Artefact], *, links: bool = False) -> Table:
    """What lies under ``figures/``, one row per artefact with minutes and verdict.

    Minutes and verdicts are those of the saved provenance, whose ``claims`` is the table of ``papers.verdicts``; an
    artefact that was never made has none.

    Args:
        artefacts: the rows, in their order.
        links: for the README, where title and verdict lead to notebook and picture; else for a terminal.
    """
    import pandas as pd

    rows, numbers = [], []
    for artefact in artefacts:
        facts = saved(artefact.figure) or {}
        found = outcomes(facts)
        minutes = facts.get("minutes")
        known = {
            "preset": preset(artefact, facts),
            "minutes": MISSING if minutes is None else "< 0.1" if minutes < 0.1 else f"{minutes:.1f}",
            "verdict": summary(found) if facts else "not made yet",
        }
        if links:
            title = f"[{artefact.title}](notebooks/{artefact.notebook})"
            if (paths.figures() / f"{artefact.figure}.png").exists():
                known["verdict"] = f"[{known['verdict']}](figures/{artefact.figure}.png)"
            rows.append({"artefact": f"`{artefact.id}`", "title": title, **known})
        else:
            rows.append({"artefact": artefact.id, "title": artefact.title, **known})
        numbers.append(
            {
                "artefact": artefact.id,
                "preset": facts.get("preset"),
                "minutes": minutes,
                "confirmed": found.count(CONFIRMED),
                "claims": len(found),
            }
        )
    caption = "" if links else "`prunelab reproduce ARTEFACT` makes one again; its notebook is notebooks/ARTEFACT.ipynb"
    return Table(pd.DataFrame(rows), pd.DataFrame(numbers), caption)


def by_paper() -> Table:
    """How far each paper is reproduced: artefacts that were made, and how many of their claims got which verdict."""
    import pandas as pd

    rows, numbers = [], []
    for paper in papers.papers():
        facts = [saved(artefact.figure) for artefact in papers.artefacts(paper.key)]
        found = [verdict for one in facts for verdict in outcomes(one)]
        counts = {verdict.split(" (")[0]: found.count(verdict) for verdict in SIGNS}
        made = sum(map(bool, facts))
        name = paper.title.partition(":")[0]
        signed = {f"{sign} {word}": str(n) for sign, (word, n) in zip(SIGNS.values(), counts.items(), strict=True)}
        of = f"{made} of {len(facts)}"
        rows.append({"paper": name, "tables and figures": of, "claims": str(len(found)), **signed})
        numbers.append({"paper": paper.key, "made": made, "of": len(facts), "claims": len(found), **counts})
    return Table(pd.DataFrame(rows), pd.DataFrame(numbers))


def _values(column: pd.Series, name: str) -> list[str]:
    """The keys of the rows: numbers in the way of their quantity, all else as it is."""
    shown = quantity(name)
    return [shown.text(value) if isinstance(value, float) else str(value) for value in column]


def _means(means: pd.Series, halves: pd.Series, column: str) -> list[str]:
    """``88.34 ± 0.21``, all of one column with as many decimals."""
    shown = quantity(column)
    digits = shown.decimals_for(means)
    return [
        shown.number(mean, digits) + (f" ± {shown.number(half, digits)}" if math.isfinite(half) else "")
        for mean, half in zip(means, halves, strict=True)
    ]


def _digits(row: Any) -> int:
    """Decimals of ours: two digits of its interval, or else of the tolerance, or else what the number has."""
    scale = next((size for size in (row.interval, row.tolerance) if math.isfinite(size) and size > 0), None)
    if scale is not None:
        return min(max(1 - math.floor(math.log10(scale)), 0), 6)
    return 0 if not math.isfinite(row.ours) or float(row.ours).is_integer() else 4


def _wanted(row: Any) -> str:
    """The reported number as a condition on ours; of an order the paper's own lead as well, where it is known."""
    reported, slack = f"{row.reported:,.10g}", f"{row.tolerance:g}" if row.tolerance else ""
    order = f"> {f'-{slack}' if slack else 0}"
    return {
        "at_least": f"≥ {reported}{f' - {slack}' if slack else ''}",
        "at_most": f"≤ {reported}{f' + {slack}' if slack else ''}",
        "within": f"{reported}{f' ± {slack}' if slack else ''}",
        "order": f"{row.reported:+,.{_digits(row)}f} ({order})" if math.isfinite(row.reported) else order,
        "shown": "yes",
    }[row.rule]


def _cell_style(cell: str, right: bool) -> str:
    colour = next((COLOURS[v] for v, sign in SIGNS.items() if cell.startswith(f"{sign} ")), "")
    parts = [f"text-align:{'right' if right else 'left'}", *([f"color:{colour};font-weight:bold"] if colour else [])]
    return f' style="{";".join(parts)}"'
