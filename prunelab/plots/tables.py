"""Tables that people read, as text, Markdown or HTML, with their numbers: means, verdicts, the index of artefacts."""

from __future__ import annotations

import html
import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunelab import papers
from prunelab.papers import KINDS, NOT_HERE, NOT_MEASURED, ONE_RUN, UNDECIDED, Artefact
from prunelab.plots.gallery import saved
from prunelab.runs.columns import MISSING, need, quantity

if TYPE_CHECKING:
    import pandas as pd

_GREEN, _RED, _YELLOW, _GREY = "#00805c", "#c2410c", "#9a6700", "#6b7280"
_LOOKS = {  # sign and colour of each verdict: colour never alone
    **{verdict: look for yes, no in KINDS.values() for verdict, look in ((yes, ("✓", _GREEN)), (no, ("✗", _RED)))},
    NOT_HERE: ("~", _YELLOW),
    UNDECIDED: ("?", _YELLOW),
    ONE_RUN: ("?", _YELLOW),
    NOT_MEASURED: (MISSING, _GREY),
}
SIGNS = {verdict: sign for verdict, (sign, _) in _LOOKS.items()}
WORDS = ("confirmed", "contradicted", NOT_HERE, "undecided", NOT_MEASURED)  # what becomes of claims, in columns
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
    """The table of ``papers.verdicts`` to read: kind, claim, reported, ours, difference, n, verdict."""
    import pandas as pd

    need(
        judged,
        ["kind", "text", "reported", "ours", "interval", "n", "difference", "tolerance", "rule", "seen", "verdict"],
        "tables.verdicts",
    )
    rows = []
    for row in sorted(judged.itertuples(), key=lambda row: list(KINDS).index(row.kind)):
        digits = _digits(row)
        ours = f"{row.ours:,.{digits}f}" + (f" ± {row.interval:,.{digits}f}" if row.interval > 0 else "")
        if row.rule == "shown":
            ours = {1: "yes", 0: "no"}.get(row.ours, ours)
        seen = f" ({row.seen})" if isinstance(row.seen, str) and row.seen else ""
        rows.append(
            {
                "kind": row.kind,
                "claim": row.text,
                "reported": _wanted(row),
                "ours": f"{ours}{seen}" if math.isfinite(row.ours) else MISSING,
                "difference": f"{row.difference:+,.{digits}f}" if math.isfinite(row.difference) else MISSING,
                "n": f"{row.n:.0f}" if math.isfinite(row.n) else MISSING,
                "verdict": f"{SIGNS[row.verdict]} {row.verdict}",
            }
        )
    return Table(
        pd.DataFrame(rows),
        judged,
        "the interval decides: all of it on the claim's side confirms, all of it on the other contradicts; "
        "no claim is contradicted on less than the paper had",
    )


def summary(rows: Iterable[Mapping[str, Any]]) -> str:
    """Verdicts in one phrase, each kind by itself: ``✓ 3 of 4 claims confirmed, 1 undecided; 2 of 2 checks``.

    Args:
        rows: of ``papers.verdicts``, kind and verdict of each.
    """
    parts = []
    for kind, (yes, no) in KINDS.items():
        found = [row["verdict"] for row in rows if row["kind"] == kind]
        if not found:
            continue
        held = found.count(yes)
        rest = [verdict.split(" (")[0] for verdict in found if verdict != yes]
        said = [f"{rest.count(word)} {word}" for word in (no, *WORDS[2:]) if word in rest]
        sign = next((SIGNS[v] for v in (no, NOT_HERE, UNDECIDED, ONE_RUN, NOT_MEASURED) if v in found), SIGNS[yes])
        plural = f"{kind}{'s' if len(found) > 1 else ''}"
        parts.append(f"{sign} " + ", ".join([f"{held} of {len(found)} {plural} {yes}", *said]))
    return "; ".join(parts) or "nothing to judge"


def outcomes(facts: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows that were saved with an artefact, one for each claim; of one that was never made, none."""
    return (facts or {}).get("claims") or []


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
        links: for the gallery, where titles lead to pictures below; else for a terminal.
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
            rows.append({"artefact": f"`{artefact.id}`", "title": f"[{artefact.title}](#{artefact.id})", **known})
        else:
            rows.append({"artefact": artefact.id, "title": artefact.title, **known})
        numbers.append(
            {
                "artefact": artefact.id,
                "preset": facts.get("preset"),
                "minutes": minutes,
                **_counted(found),
            }
        )
    caption = "" if links else "`prunelab reproduce ARTEFACT` makes one again; `--preset paper` as the paper did it"
    return Table(pd.DataFrame(rows), pd.DataFrame(numbers), caption)


def by_paper() -> Table:
    """How far each paper is reproduced: artefacts that were made, and what became of claims, checks and questions."""
    import pandas as pd

    rows, numbers = [], []
    for paper in papers.papers():
        facts = [saved(artefact.figure) for artefact in papers.artefacts(paper.key)]
        counts = _counted([row for one in facts for row in outcomes(one)])
        made = sum(map(bool, facts))
        signed = {f"{SIGNS.get(word, '?')} {word}": str(counts[word]) for word in WORDS}
        rows.append(
            {
                "paper": paper.title.partition(":")[0],
                "tables and figures": f"{made} of {len(facts)}",
                "claims": str(counts["claims"]),
                **signed,
                "checks, ✓ as published": f"{counts['as published']} of {counts['checks']}",
                "questions of our own, ✓ yes, ✗ no": f"{counts['questions']}: {counts['yes']}, {counts['no']}",
            }
        )
        numbers.append({"paper": paper.key, "made": made, "of": len(facts), **counts})
    return Table(pd.DataFrame(rows), pd.DataFrame(numbers))


def _counted(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of claims how many got which verdict; of checks and questions, how many there are and how many hold."""
    of = {kind: [row["verdict"].split(" (")[0] for row in rows if row["kind"] == kind] for kind in KINDS}
    found = {f"{kind}s": len(verdicts) for kind, verdicts in of.items()} | {w: of["claim"].count(w) for w in WORDS}
    return found | {w: of[kind].count(w) for kind in ("check", "question") for w in KINDS[kind]}


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
    colour = next((look[1] for look in _LOOKS.values() if cell.startswith(f"{look[0]} ")), "")
    parts = [f"text-align:{'right' if right else 'left'}", *([f"color:{colour};font-weight:bold"] if colour else [])]
    return f' style="{";".join(parts)}"'
