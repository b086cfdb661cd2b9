"""From the name of an artefact to its figure: which notebooks, which parameters, and whether they have to run."""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunelab import papers, paths
from prunelab.errors import PrunelabError, nearest
from prunelab.headless.form import check_parameters, declared_parameters, parse_assignment
from prunelab.papers import Artefact
from prunelab.plots import gallery

MACHINE = ("jobs", "device", "engine")  # parameters that decide where and how fast, not what comes out


@dataclass(frozen=True)
class Job:
    """One notebook that was asked for.

    Attributes:
        artefact: what it makes.
        parameters: all values that differ from the notebook's own defaults.
        reason: why it need not or cannot run: ``"up to date"``, or a sentence with the remedy; empty when it will run.
    """

    artefact: Artefact
    parameters: dict[str, Any]
    reason: str = ""

    @property
    def notebook(self) -> Path:
        """The committed notebook."""
        return paths.notebooks() / self.artefact.notebook

    @property
    def executed(self) -> Path:
        """Where the executed copy goes."""
        return paths.runs() / "notebooks" / f"{self.artefact.id}.ipynb"

    @property
    def overridden(self) -> dict[str, Any]:
        """The parameters that decide numbers and are not the preset's."""
        usual = self.artefact.parameters(self.preset)
        return {name: value for name, value in self.parameters.items() if name in usual and value != usual[name]}

    @property
    def preset(self) -> str:
        """The preset that was asked for."""
        return str(self.parameters.get("preset", "quick"))

    @property
    def place(self) -> str:
        """Where its figure goes, relative to the folder of results."""
        return gallery.place(self.artefact.figure, self.preset, self.overridden)

    @property
    def record(self) -> Path:
        """What was run, so that a second call does nothing; it lies with the runs, which a fresh clone has none of."""
        return self.executed.with_suffix(f".{'custom' if self.place.startswith('custom/') else self.preset}.json")

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the result, apart from the package's own code, whose versions stand in the figure.

        Of code it is what it does that counts: comments, docstrings and the words of a notebook change nothing.
        """
        cells = json.loads(self.notebook.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        study = sorted((paths.PACKAGE / "papers" / self.artefact.paper).rglob("*.py"))
        return {
            "notebook": _digest("\n".join(map(_meaning, code)).encode()),
            "study": _digest("\n".join(_meaning(file.read_text(encoding="utf-8")) for file in study).encode()),
            "claims": _digest(repr(self.artefact.claims).encode()),
            "parameters": {name: value for name, value in self.parameters.items() if name not in MACHINE},
        }

    def figures(self) -> dict[str, str]:
        """Digests of the files that the notebook left, relative to the folder of results."""
        facts = gallery.saved(self.place, paths.out())
        if facts is None or facts["preset"] != self.preset:
            return {}
        base = paths.out() / self.place
        files = [base.with_name(base.name + ending) for ending in (".png", ".csv", ".json")]
        return {f"{self.place}{file.suffix}": _digest(file.read_bytes()) for file in files if file.exists()}

    def up_to_date(self) -> bool:
        """Whether the same thing was run before and what it left is still there, unchanged."""
        try:
            before = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        same = before == {**self.fingerprint(), "figures": self.figures()} and bool(before["figures"])
        return same and not made_otherwise(self.place, paths.out())

    def remember(self) -> None:
        """Note that it was run."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        record = {**self.fingerprint(), "figures": self.figures()}
        self.record.write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")


def made_otherwise(figure: str, folder: Path | None = None) -> str:
    """What of a figure was made by another version of a method, model or reader of data, in words.

    Args:
        figure: as ``gallery.saved`` takes it.
        folder: likewise.
    """
    from prunelab.training.versions import made_otherwise  # here, because it loads torch

    facts = gallery.saved(figure, folder) or {}
    return made_otherwise(facts.get("versions", ()))


def _meaning(code: str) -> str:
    """Python as the tree that its parser makes of it, without docstrings; as it is, where it is more than Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a magic of IPython
        return code
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def chosen(names: Sequence[str], paper: str | None = None) -> list[Artefact]:
    """The artefacts that names mean: an id, a paper, ``all``, or a part of one id that no other has.

    Raises:
        PrunelabError: a name that means nothing, or several things.
    """
    found: dict[str, Artefact] = {a.id: a for a in papers.artefacts(paper)} if paper else {}
    everything = papers.artefacts()
    for name in names:
        matches = [a for a in everything if name in (a.id, a.paper, "all")]
        matches = matches or [a for a in everything if a.id.split("/")[1] == name]
        matches = matches or [a for a in everything if name in a.id]
        exact = any(name in (a.id, a.paper, "all") for a in matches)
        if not matches:
            raise PrunelabError(f"no artefact {name!r}: {nearest(name, [a.id for a in everything])}")
        if len(matches) > 1 and not exact:
            raise PrunelabError(f"artefact {name!r} is not clear: {', '.join(a.id for a in matches)}")
        found |= {a.id: a for a in matches}
    if not found:
        raise PrunelabError("nothing was asked for: give artefacts, a paper or 'all'; `prunelab list` shows them")
    return list(found.values())


def plan(
    artefacts: Sequence[Artefact],
    preset: str = "quick",
    assignments: Sequence[str] = (),
    *,
    machine: Mapping[str, Any] | None = None,
    force: bool = False,
    skip_missing_data: bool = False,
) -> list[Job]:
    """Check everything that was asked for, before anything runs.

    Args:
        artefacts: what to make.
        preset: ``smoke``, ``quick`` or ``paper``.
        assignments: ``name=value``, for those notebooks that declare the name.
        machine: ``jobs`` and ``device``, likewise.
        force: run also what is up to date.
        skip_missing_data: leave out, with a reason, what needs a data set that would have to be downloaded.

    Raises:
        PrunelabError: a name that no chosen notebook declares, a value of another type, or a folder for runs or figures
            that cannot be written.
    """
    declared = {a.id: declared_parameters(paths.notebooks() / a.notebook) for a in artefacts}
    known = {name: p for parameters in declared.values() for name, p in parameters.items()}
    jobs = []
    for text in assignments:
        name, _ = parse_assignment(text, known)  # refuses a name that none of them declares
        if name == "preset":
            raise PrunelabError(f"{text!r}: the preset decides other parameters too; choose it with --preset")
    for artefact in artefacts:
        own = declared[artefact.id]
        values = artefact.parameters(preset)
        values |= dict(parse_assignment(text, own) for text in assignments if text.partition("=")[0].strip() in own)
        values |= {name: value for name, value in (machine or {}).items() if name in own and value is not None}
        job = Job(artefact, check_parameters(paths.notebooks() / artefact.notebook, values))
        reason = _lacking(artefact, job.parameters) if skip_missing_data else ""
        if not reason and not force and job.up_to_date():
            reason = "up to date"
        jobs.append(Job(artefact, job.parameters, reason))
    if not all(job.reason for job in jobs):
        _check_places()
    return jobs


def _check_places() -> None:
    """Refuse folders that take no file now, not after an hour of training."""
    for variable, folder in (("PRUNELAB_RUNS", paths.runs()), ("PRUNELAB_OUT", paths.out())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            what = f"{folder} cannot be written ({error.strerror})"
            raise PrunelabError(f"{what}: set {variable} to a folder that can") from None


def _lacking(artefact: Artefact, parameters: Mapping[str, Any]) -> str:
    """The sentence that says which data set is not at hand; empty when all are."""
    from prunelab import data  # here, because it loads torch

    asked = parameters.get("data") or artefact.data
    rows = {row["name"]: row for row in data.available()}
    for name in [asked] if isinstance(asked, str) else asked:
        row = rows.get(name)
        if row and not row["prepared"] and (row["origin"] == "download" or row["origin"].startswith("nowhere")):
            return f"skipped: {name} is not here; set PRUNELAB_DATA, or run `prunelab data prepare {name}`"
    return ""


def again(artefact: Artefact) -> str:
    """The command that computes what is to be committed."""
    return f"prunelab reproduce {artefact.id} --into figures --force"


@dataclass(frozen=True)
class Check:
    """What ``verify`` found for one artefact.

    Attributes:
        artefact: which.
        preset: that its numbers were made with; empty where there are none.
        verdict: in a phrase.
        problem: what is wrong with the files; empty when they are sound.
        claims: the table of verdicts, rows as plain values.
    """

    artefact: Artefact
    preset: str
    verdict: str
    problem: str
    claims: list[dict[str, Any]] = field(default_factory=list)


def verify(artefacts: Sequence[Artefact]) -> list[Check]:
    """Judge the committed numbers again, and compare with the verdicts that stand beside them."""
    from prunelab.plots import tables

    checks = []
    for artefact in artefacts:
        try:
            facts = gallery.saved(artefact.figure)
        except PrunelabError as error:
            checks.append(Check(artefact, "", "", str(error)))
            continue
        if facts is None:
            gone = f"there are no numbers in {paths.figures()}; run `{again(artefact)}`"
            checks.append(Check(artefact, "", "", gone))
            continue
        claims = facts.get("claims") or []
        try:
            problem = _damaged(artefact) or _misjudged(artefact, claims) or _other_points(artefact, claims)
            verdict = tables.summary(claims)
            if claims:
                tables.stored_verdicts(claims)
        except (PrunelabError, LookupError, TypeError, ValueError, AttributeError, StopIteration):
            verdict, claims = "", []
            problem = f"its claims are no table of verdicts; run `{again(artefact)}`"
        checks.append(Check(artefact, facts["preset"], verdict, problem, claims))
    return checks


def _damaged(artefact: Artefact) -> str:
    what = gallery.damage(artefact.figure)
    return f"{what}; run `{again(artefact)}`" if what else ""


def _misjudged(artefact: Artefact, rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether a stored verdict is another than its stored number gives today."""
    stored = {row["claim"]: row for row in rows if (row["ours"], row["interval"], row["n"])}
    for today in papers.rejudged(artefact, rows):
        if (row := stored.get(today["claim"])) is None:
            return f"claim {today['claim']!r} was not judged; run `{again(artefact)}`"
        if row["verdict"] != today["verdict"]:
            return f"claim {today['claim']!r} says {row['verdict']!r}, its number gives {today['verdict']!r}"
        if row["kind"] != today["kind"] or row["text"] != today["text"]:
            return f"claim {today['claim']!r} was another; run `prunelab verify {artefact.id} --write`"
    if left := [row["claim"] for row in rows if row["claim"] not in {claim.id for claim in artefact.claims}]:
        return f"claim {left[0]!r} is none of today's; run `prunelab verify {artefact.id} --write`"
    return ""


def rewrite(artefacts: Sequence[Artefact]) -> int:
    """Write the verdicts that today's claims and rules give from the committed numbers; how many files changed.

    No number is touched: what a claim asks for that was never measured is not measured.
    """
    changed = 0
    for artefact in artefacts:
        facts = gallery.saved(artefact.figure)
        if facts is None or not (facts.get("claims") or artefact.claims):
            continue
        new = gallery.as_json({**facts, "claims": papers.rejudged(artefact, facts.get("claims") or [])})
        path = paths.figures() / f"{artefact.figure}.json"
        if new != path.read_bytes():
            path.write_bytes(new)
            changed += 1
    return changed


def _other_points(artefact: Artefact, rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the committed points of a figure of curves give another agreement than the one that is stored."""
    import pandas as pd

    from prunelab.papers import reported

    file = paths.figures() / f"{artefact.figure}.csv"
    table = pd.read_csv(file)  # of every artefact: one that is no table raises
    stored = next((row["ours"] for row in rows if row["claim"] == "agreeing"), None)
    if artefact.curves is None or stored is None:
        return ""
    today = reported.agreeing(reported.judged(table.assign(difference=table["ours"] - table["reported"])))
    today = getattr(today, "mean", today)
    return "" if abs(today - stored) < 1e-6 else f"{file.name}: {today:.3f} of the points agree, {stored:.3f} is stored"
