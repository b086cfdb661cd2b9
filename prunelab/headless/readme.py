"""What README, gallery and index notebook list: computed from artefacts, committed figures and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunelab import papers, paths
from prunelab.errors import PrunelabError
from prunelab.plots import gallery, tables
from prunelab.plots.pictures import caption
from prunelab.runs.columns import MISSING

BEGIN, END = "<!-- artefacts: written by `prunelab readme` -->", "<!-- end of artefacts -->"
FAST, FASTER = "<!-- benchmarks: written by `prunelab readme` -->", "<!-- end of benchmarks -->"
ZOO, ZOO_END = "<!-- zoo: written by `prunelab readme` -->", "<!-- end of zoo -->"
INDEX, START = "index.ipynb", "start_here.ipynb"
FIVE = ("epoch", "global_selection", "population", "narrowed_training", "slider_latency")  # benchmarks in the README


def written(text: str) -> str:
    """The README with its tables: papers as the committed figures give them, the zoo, five benchmarks.

    Raises:
        PrunelabError: the marks between which a table stands are not there.
    """
    text = _between(_between(text, FAST, FASTER, _speed()), ZOO, ZOO_END, _zoo())
    return _between(text, BEGIN, END, tables.by_paper().markdown())


def pictures() -> str:
    """The gallery, ``figures/README.md``: of every artefact picture, caption, verdicts and command."""
    parts = [_HEAD]
    for paper in papers.papers():
        parts.append(f"## {paper.title}\n\n{paper.authors}. {paper.venue}.\n")
        own = papers.artefacts(paper.key)
        parts.append(tables.index(own, links=True).markdown())
        parts += [_shown(artefact) for artefact in own]
    return "\n".join(parts)


_HEAD = """# What was computed

Written by `prunelab readme` from the committed numbers. Of each table and figure: the picture, what it was made with,
the verdicts on it, and the command that makes it again into `out/`, beside these.

Three kinds of rows are counted apart. A *claim* is a sentence of a paper or abstract: ✓ confirmed or ✗ contradicted
where all of our 95 % t interval lies on one side, ~ not at this budget where it fails on less than the paper had
(network, data or training, unless our dense network is as good as the paper's), ? undecided where the interval spans
or there is one run, or not measured. A *check* is arithmetic, a formula or what follows from the rule: ✓ as
published. A *question* is our own, and is answered yes or no.
"""


def _shown(artefact: papers.Artefact) -> str:
    """One entry of the gallery."""
    facts = gallery.saved(artefact.figure)
    lines = [f'### <a id="{artefact.id}"></a>{artefact.title}', artefact.claim]
    if facts is None:
        return "\n\n".join([*lines, "Not made yet."]) + "\n"
    name = artefact.figure
    if (paths.figures() / f"{name}.png").is_file():
        lines.append(f"![{facts['alt'].replace('[', '(').replace(']', ')')}]({name}.png)")
    made = caption(facts)
    minutes = "" if facts.get("minutes") is None else f" · {facts['minutes']:.1f} minutes of training and pruning"
    lines.append(f"{made}{minutes} · [numbers]({name}.csv), [provenance]({name}.json), "
                 f"[notebook](../notebooks/{artefact.notebook})")  # fmt: skip
    lines.append(f"`prunelab reproduce {artefact.id} --preset {facts['preset']}`")
    if found := tables.outcomes(facts):
        table = tables.stored_verdicts(found).markdown()
        lines.append(f"<details><summary>{tables.summary(found)}</summary>\n\n{table}\n</details>")
    return "\n\n".join(lines) + "\n"


def _between(text: str, begin: str, end: str, table: str) -> str:
    if begin not in text or end not in text:
        raise PrunelabError(f"README.md: the lines {begin!r} and {end!r} are missing; put them around the table")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}{end}{rest.partition(end)[2]}"


def _zoo() -> str:
    """What ``benchmarks/results/zoo.csv`` says of the models that were measured on both sides."""
    import pandas as pd

    path = paths.root() / "benchmarks" / "results" / "zoo.csv"
    if not path.exists():
        return ""
    rows = pd.read_csv(path)
    rows = rows[rows["ours"].notna() & rows["torch_pruning"].notna()]
    sides = []
    for works, left, seconds in (
        (rows["ours"] == "works", rows[["ours_left", "inexact_left"]].min(axis=1), rows["ours_seconds"]),
        (rows["torch_pruning"] == "works", rows["torch_pruning_left"], rows["torch_pruning_seconds"]),
    ):
        sides.append((int(works.sum()), int((works & (left < 0.75)).sum()), seconds))
    both = (rows["ours"] == "works") & (rows["torch_pruning"] == "works")
    wrong = int((rows["ours_difference"] > 1e-5).sum())
    medians = [f"{seconds[both].median():.2f} s" for *_, seconds in sides]
    return (
        f"| of {len(rows)} models | prunelab | torch-pruning |\n| --- | ---: | ---: |\n"
        f"| work | {sides[0][0]} | {sides[1][0]} |\n| lose a quarter of their parameters or more | {sides[0][1]} | "
        f"{sides[1][1]} |\n| outputs that differ after shrinking | {wrong} | not compared |\n"
        f"| median time, where both work | {medians[0]} | {medians[1]} |\n"
    )


def _speed() -> str:
    """The first claim of five benchmarks, as they were measured last."""
    rows = []
    for path in filter(Path.exists, (paths.root() / "benchmarks" / "results" / f"{name}.json" for name in FIVE)):
        for claim in json.loads(path.read_text(encoding="utf-8")).get("claims", [])[:1]:
            unit = {"x": " times", "%": " %", "ms": " ms"}[claim["unit"]]
            met = {True: "✓", False: "✗", None: "?"}[claim["met"]]
            text = f"{claim['text'][0].upper()}{claim['text'][1:]}"
            rows.append(f"| {text} | {claim['value']:.3g}{unit} | {claim['goal']}{unit} | {met} |\n")
    return "".join(["| | measured | goal | |\n| --- | ---: | ---: | --- |\n", *rows]) if rows else ""


def index() -> dict[str, Any]:
    """The notebook that lists all notebooks: what it shows, the claim, and what came out."""
    cells = [
        "# prunelab\n\nNotebooks to explore in come first; then one notebook for each table and figure of the papers, "
        "with its claim and what our numbers say to it: ✓ confirmed, ✗ contradicted, ~ not at this budget, "
        f"? undecided, {MISSING} not measured, in brackets the preset of the numbers. Figures of one kind share a "
        "notebook, whose parameter `figure` chooses."
    ]
    known = {artefact.notebook for artefact in papers.artefacts()}
    others = sorted((path for path in _notebooks() if path not in known), key=lambda path: path != START)
    cells.append("## Explore\n\n" + "\n".join(f"- [{_title(path)}]({path})" for path in others))
    for paper in papers.papers():
        rows = [_row(artefact) for artefact in papers.artefacts(paper.key)]
        heading = f"## {paper.title}\n\n{paper.authors}. {paper.venue}."
        table = "\n".join(["| notebook | claim | outcome |", "| --- | --- | --- |", *rows])
        cells.append(f"{heading}\n\n{table}")
    return {
        "cells": [
            {"cell_type": "markdown", "id": f"cell-{i:02d}", "metadata": {}, "source": text.splitlines(keepends=True)}
            for i, text in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _row(artefact: papers.Artefact) -> str:
    facts = gallery.saved(artefact.figure)
    found, made = tables.summary(tables.outcomes(facts)), tables.preset(artefact, facts)
    outcome = f"{found} ({made})" if facts else "not made yet"
    cells = [f"[{artefact.title}]({artefact.notebook})", artefact.claim, outcome]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _notebooks() -> Iterator[str]:
    for path in sorted(paths.notebooks().rglob("*.ipynb")):
        name = path.relative_to(paths.notebooks()).as_posix()
        if ".ipynb_checkpoints" not in name and name != INDEX:
            yield name


def _title(name: str) -> str:
    """The first heading of a notebook."""
    cells = json.loads((paths.notebooks() / name).read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines()]
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), name)


def update() -> bool:
    """Write all three; whether anything changed."""
    readme, notebook = paths.root() / "README.md", paths.notebooks() / INDEX
    new = {readme: written(readme.read_text(encoding="utf-8")), paths.figures() / "README.md": pictures()}
    if notebook.parent.is_dir():
        new[notebook] = text_of(index())
    changed = {path: text for path, text in new.items() if _read(path) != text}
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return bool(changed)


def text_of(notebook: dict[str, Any]) -> str:
    """As Jupyter writes it."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
