"""Write ``README.md`` beside this file from ``results/*.json``, so that no number in it is typed.

usage: python benchmarks/summary.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = """\
# Benchmarks

How fast, against what. This file is written by `python benchmarks/summary.py` from `results/`; a test compares the two.

Rivals take turns in one process, so that a machine that is busy with something else slows them all. Times are medians
over the turns; a ratio is the median of the ratios within each turn, above 1 is faster. A goal that was missed is
marked ✗ and stays in the table; ? where it lies between the quartiles of the turns, which stand in brackets. "Quickest"
is the same number from the quickest turn of each rival: others on the machine only add time. Load is that of the
machine when the benchmark ended; near the number of its cores it costs most whoever uses several threads.

```
PRUNELAB_DATA=/path/to/datasets python benchmarks/epoch.py --threads 2      # each has --repeats and says what it does
python benchmarks/summary.py
```

"""


def results() -> dict[str, dict[str, Any]]:
    """What each benchmark wrote last, by its name."""
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((HERE / "results").glob("*.json"))
    }


def text() -> str:
    """The whole README.

    Returns:
        The claims in one table, then the times of every rival of every benchmark.
    """
    found = results()
    rows = [_claim(name, claim, values) for name, values in found.items() for claim in values.get("claims", [])]
    claims = _table(("benchmark", "claim", "measured", "quickest", "goal", "", "machine", "date"), "llllllll", rows)
    return HEAD + claims + "".join(_section(name, values) for name, values in found.items())


def _claim(name: str, claim: dict[str, Any], values: dict[str, Any]) -> tuple[str, ...]:
    unit = {"x": "x", "%": " %", "ms": " ms"}[claim["unit"]]
    spread = " ({:g} to {:g})".format(*claim["spread"]) if "spread" in claim else ""
    machine = values["machine"]
    place = f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} of {machine['cores']} threads"
    return (
        f"[{name}]({name}.py)",
        claim["text"],
        f"{claim['value']:.3g}{unit}{spread}",
        f"{claim['quickest']:.3g}{unit}" if "quickest" in claim else "",
        f"{claim['goal']}{unit}",
        {True: "✓", False: "✗", None: "?"}[claim["met"]],
        f"{place}, load {machine['load']:g}, torch {machine['torch']}",
        values["date"],
    )


def _section(name: str, values: dict[str, Any]) -> str:
    """The times of the rivals of one benchmark; nothing where it timed none against each other."""
    groups = [group for group in values.values() if isinstance(group, dict)]
    cases = {case: part["results"] for group in groups for case, part in group.items() if _timed(part)}
    tables = []
    for case, rivals in (cases or {name: values.get("results", {})}).items():
        rows = [
            (rival, *(f"{1e3 * row[key]:,.1f}" for key in ("median", "lowest", "highest")), f"{row['ratio']:.2f}")
            for rival, row in rivals.items()
            if "ratio" in row
        ]
        repeats = max((row["repeats"] for row in rivals.values() if "repeats" in row), default=0)
        head = (f"{case}, {repeats} turns", "median, ms", "lowest", "highest", "ratio")
        tables += [f"\n{_table(head, 'lrrrr', rows)}"] if rows else []
    return f"\n## {name}\n{''.join(tables)}" if tables else ""


def _timed(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("results"), dict)


def _table(head: tuple[str, ...], sides: str, rows: list[tuple[str, ...]]) -> str:
    rule = tuple({"l": "---", "r": "---:"}[side] for side in sides)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true", help="only say whether it is up to date")
    readme, new = HERE / "README.md", text()
    same = readme.is_file() and readme.read_text(encoding="utf-8") == new
    if not options.parse_args().check:
        readme.write_text(new, encoding="utf-8")
        return 0
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
