"""The parts of the README that are computed, so that no number in it is typed."""

from __future__ import annotations

from prunelab import papers, paths, tables
from prunelab.errors import PrunelabError

BEGIN, END = "<!-- artefacts: written by `prunelab readme` -->", "<!-- end of artefacts -->"


def written(text: str) -> str:
    """The README with the table of artefacts as ``papers.toml`` and the committed figures give it.

    Raises:
        PrunelabError: the marks between which the table stands are not there.
    """
    if BEGIN not in text or END not in text:
        raise PrunelabError(f"README.md: the lines {BEGIN!r} and {END!r} are missing; put them around the table")
    before, _, rest = text.partition(BEGIN)
    table = tables.index(papers.artefacts(), links=True).markdown()
    return f"{before}{BEGIN}\n{table}{END}{rest.partition(END)[2]}"


def update() -> bool:
    """Write it; whether anything changed."""
    path = paths.root() / "README.md"
    text = path.read_text(encoding="utf-8")
    new = written(text)
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text
