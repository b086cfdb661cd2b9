"""The papers, their tables and figures, and what each claims: ``papers.toml``, read and judged."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from prunelab import paths
from prunelab.errors import PrunelabError, nearest
from prunelab.papers.curves import Curves

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import pandas as pd

PRESETS = ("smoke", "quick", "paper")
Rule = Literal["at_least", "at_most", "within", "order", "shown"]
Literals = str | bool | int | float | list[str | bool | int | float]
FILE = paths.PACKAGE / "papers" / "papers.toml"
CONFIRMED, CONTRADICTED, NOT_HERE = "confirmed", "contradicted", "not at this budget"
AS_PUBLISHED, NOT_AS_PUBLISHED, YES, NO = "as published", "not as published", "yes", "no"
UNDECIDED, ONE_RUN, NOT_MEASURED = "undecided (interval spans)", "undecided (one run)", "not measured"
KINDS = {  # of rows, each counted by itself: what it is called when it holds, and when it does not
    "claim": (CONFIRMED, CONTRADICTED),
    "check": (AS_PUBLISHED, NOT_AS_PUBLISHED),
    "question": (YES, NO),
}
AT_LEVEL = 0.015  # a dense network so near to the reported one is as good; our own default
_STRICT = ConfigDict(extra="forbid")
_ID = re.compile(r"[a-z0-9_]+/[a-z0-9_]+")


class PapersError(PrunelabError):
    """An artefact or claim that ``papers.toml`` does not know, or an entry of it that means nothing."""


@dataclass(frozen=True, config=_STRICT)
class Paper:
    """Where a paper is to be found."""

    key: str
    title: str
    authors: str
    venue: str
    year: int
    doi: str


@dataclass(frozen=True, config=_STRICT)
class Claim:
    """One row that a number of ours decides.

    Attributes:
        id: unique within its artefact.
        kind: ``claim``: a sentence of a paper or abstract; ``check``: arithmetic, a formula, what follows from the
            rule, so that it could come out otherwise only if it were implemented otherwise; ``question``: our own.
        text: the paper's sentence, or what its code does, in words.
        source: where it stands.
        rule: how ours is compared, see ``judge``.
        quantity: the name under which the notebook supplies our number.
        reported: the paper's number, in the unit of the quantity; None where the rule needs none.
        tolerance: allowed distance in the unit of the quantity, not below 0.
        published: as that of its artefact, where it differs.
    """

    id: str
    text: str
    source: str
    rule: Rule
    quantity: str
    reported: float | None = None
    tolerance: float = 0.0
    kind: Literal["claim", "check", "question"] = "claim"
    published: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse a claim that no number can decide."""
        if (self.rule in ("at_least", "at_most", "within")) != (self.reported is not None):
            needs = "needs a reported number" if self.reported is None else "takes no reported number"
            raise ValueError(f"claim {self.id!r}: rule {self.rule!r} {needs}")
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"claim {self.id!r}: tolerance = {self.tolerance}: should be 0 or more")


@dataclass(frozen=True, config=_STRICT)
class Artefact:
    """One table or figure: what it claims and how it is made again.

    Attributes:
        id: ``paper/name``; the notebook and the figure carry it too.
        paper: key of its paper.
        title: what it shows.
        claim: what the paper says of it, in one sentence.
        data: names of the data sets it needs.
        presets: parameters of the notebook, for ``smoke``, ``quick`` and ``paper``; ``all``: of the three of them.
        claims: what is judged.
        notebook: relative to ``notebooks/``.
        figure: relative to ``figures/``, without ending.
        note: what differs from the paper, or is our own.
        published: presets with the network, the data and the budget that the paper had; only there, or where the dense
            network is as good as the paper's, can a claim be contradicted.
        short: its title without the words of its kind.
        kind: figures of one kind share a notebook, ``<paper>/<kind>.ipynb``, which takes the name of the figure.
        about: what is drawn, in sentences.
        differs: what differs from the paper, and why, a line each.
        curves: what a figure of curves shows; its claims follow from it.
    """

    id: str
    paper: str
    title: str
    data: list[str]
    presets: dict[Literal["all", "smoke", "quick", "paper"], dict[str, Literals]]
    claim: str = ""
    claims: list[Claim] = field(default_factory=list)
    notebook: str = ""
    figure: str = ""
    note: str = ""
    published: list[str] = field(default_factory=list)
    short: str = ""
    kind: str = ""
    about: str = ""
    differs: list[str] = field(default_factory=list)
    curves: Curves | None = None

    def __post_init__(self) -> None:
        """Fill in the names that follow from the id; refuse an id that is none, half a preset, double claims."""
        if not _ID.fullmatch(self.id) or self.id.split("/")[0] != self.paper:
            raise ValueError(
                f"artefact {self.id!r}: should be {self.paper}/name in small letters, digits and underscores"
            )
        if set(self.presets) - {"all"} != set(PRESETS):
            raise ValueError(
                f"artefact {self.id!r}: presets should be smoke, quick, paper, got {', '.join(self.presets) or 'none'}"
            )
        named = {name: self.parameters(name).keys() for name in PRESETS}
        if taken := sorted({"artefact", "overridden", "parameters", "without"} & set().union(*named.values())):
            raise ValueError(f"artefact {self.id!r}: no parameter can be called {taken[0]!r}")
        for preset, own in named.items():
            if left := sorted(set().union(*named.values()) - own):
                raise ValueError(
                    f"artefact {self.id!r}: preset {preset} says nothing of {', '.join(left)}, which another one sets"
                )
        if self.curves:
            place = self.title.partition(":")[0]
            drawn = [TypeAdapter(Claim).validate_python(one) for one in self.curves.claims(place)]
            object.__setattr__(self, "claims", [*drawn, *self.claims])
            object.__setattr__(self, "claim", self.claim or self.curves.sentence())
        names = [claim.id for claim in self.claims]
        if len(set(names)) < len(names):
            raise ValueError(f"artefact {self.id!r}: two claims of one id among {', '.join(names)}")
        shared = f"{self.paper}/{self.kind}" if self.kind else self.id
        object.__setattr__(self, "notebook", self.notebook or f"{shared}.ipynb")
        object.__setattr__(self, "figure", self.figure or self.id)
        object.__setattr__(self, "short", self.short or self.title)

    def parameters(self, preset: str) -> dict[str, Any]:
        """The notebook's parameters at a preset, the name of the preset among them."""
        if preset not in PRESETS:
            raise PapersError(f"{self.id}: preset {preset!r}: {nearest(preset, PRESETS)}")
        which = {"figure": self.id.partition("/")[2]} if self.kind else {}
        return {"preset": preset, **which, **self.presets.get("all", {}), **self.presets[preset]}  # type: ignore[index]


@dataclass(frozen=True, config=_STRICT)
class _Library:
    paper: list[Paper]
    artefact: list[Artefact]

    def __post_init__(self) -> None:
        """Refuse a name that is given twice and an artefact of no paper."""
        for what, names in (("paper", [p.key for p in self.paper]), ("artefact", [a.id for a in self.artefact])):
            if double := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{what} {double[0]!r} stands there twice")
        keys = {paper.key for paper in self.paper}
        if lost := [a for a in self.artefact if a.paper not in keys]:
            raise ValueError(f"artefact {lost[0].id!r}: paper {lost[0].paper!r}: {nearest(lost[0].paper, keys)}")


def _described(entries: list[dict[str, Any]], kinds: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with what they take over: from the artefact that they are ``like``, and from their kind.

    ``like`` gives presets (value by value), data, note and the network of ``curves``; the kind the end of the title,
    ``about``, and the first lines of ``differs``, those of ``[kind.all]`` before them.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        own = dict(entry)
        if (name := own.pop("like", None)) is not None:
            if name not in found:
                raise PapersError(f"figures.toml: {own.get('id')!r} is like {name!r}: {nearest(name, found)}")
            base = found[name]
            presets = base["presets"].keys() | own.get("presets", {}).keys()
            own["presets"] = {p: {**base["presets"].get(p, {}), **own.get("presets", {}).get(p, {})} for p in presets}
            network = {k: v for k, v in base.get("curves", {}).items() if k in _NETWORK}
            if "curves" in own:
                sizes = {"hidden", "masked"} & own["curves"].keys()
                own["curves"] = {k: v for k, v in network.items() if not sizes or k not in ("hidden", "masked")} | own[
                    "curves"
                ]
            own |= {key: base[key] for key in ("data", "note") if key in base and key not in own}
        found[str(own.get("id"))] = own
    return [_of_kind(own, kinds) for own in found.values()] if len(found) == len(entries) else entries


_NETWORK = ("kind", "data", "model", "hidden", "masked")


def _of_kind(own: dict[str, Any], kinds: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    kind = own.get("kind") or own.get("curves", {}).get("kind", "")
    if not kind:
        return own
    shared, training = kinds.get(kind, {}), own.get("curves", {}).get("measure") == "train_accuracy"
    ends = [end for end in (shared.get("title"), "training accuracy" if training else None) if end]
    lines = [*kinds.get("all", {}).get("differs", []), *shared.get("differs", []), *own.get("differs", [])]
    title = f"{own['title']}: {', '.join(ends)}" if ends else own["title"]
    return {
        "about": shared.get("about", ""),
        "short": own["title"],
        **own,
        "kind": kind,
        "title": title,
        "differs": lines,
    }


def read(path: Path = FILE) -> tuple[tuple[Paper, ...], tuple[Artefact, ...]]:
    """Papers and artefacts of a file in the form of ``papers.toml``, and of ``<key>/figures.toml`` beside it.

    Raises:
        PapersError: the file is no TOML, or an entry of it is wrong; the line names the entry.
    """
    where = path
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        content["artefact"] = _described(content.pop("artefact", []), {})
        beside = [path.parent / str(paper.get("key")) / "figures.toml" for paper in content.get("paper", [])]
        for file in filter(Path.is_file, beside):
            where = file
            own = tomllib.loads(file.read_text(encoding="utf-8"))
            content["artefact"] += _described(own["artefact"], own.get("kind", {}))
        library = TypeAdapter(_Library).validate_python(content)
    except OSError as error:
        raise PapersError(
            f"{path.name}: {error.strerror or error}; give the path of a file like the package's papers.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise PapersError(f"{where.name}: no valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        raise PapersError(f"{path.name}: {entry}: {first['msg'].removeprefix('Value error, ')}") from None
    return tuple(library.paper), tuple(library.artefact)


@functools.cache
def _own() -> tuple[tuple[Paper, ...], tuple[Artefact, ...]]:
    return read()


def papers() -> tuple[Paper, ...]:
    """The papers, in the order of the file."""
    return _own()[0]


def artefacts(paper: str | None = None) -> tuple[Artefact, ...]:
    """The artefacts of one paper (its key), or all of them, in the order of the file."""
    keys = [known.key for known in papers()]
    if paper is not None and paper not in keys:
        raise PapersError(f"no paper {paper!r}: {nearest(paper, keys)}")
    return tuple(artefact for artefact in _own()[1] if paper in (None, artefact.paper))


def artefact(id: str) -> Artefact:
    """The artefact of that id; a wrong one gets the nearest."""
    for known in _own()[1]:
        if known.id == id:
            return known
    raise PapersError(f"no artefact {id!r}: {nearest(id, (known.id for known in _own()[1]))}")


class Text(str):
    """Markdown, which Jupyter shows as such."""

    def _repr_markdown_(self) -> str:
        return str(self)


def about(id: str) -> Text:
    """What an artefact shows and claims, and where its numbers come from, for the head of its notebook."""
    own = artefact(id)
    parts = [f"**{own.title}.** {own.about}", f"**Claim**: {own.claim}", _origin(own), own.note]
    return Text("\n\n".join(part.strip() for part in parts if part.strip()))


def differs(id: str) -> Text:
    """What differs from the paper in an artefact, and why, for the end of its notebook."""
    lines = "\n".join(f"- {line}" for line in artefact(id).differs)
    return Text(f"**What differs from the paper, and why**\n\n{lines}")


def _origin(own: Artefact) -> str:
    """Where the reported curves of a figure are from."""
    if own.curves is None:
        return ""
    if not own.curves.reported:
        return "The paper's values could not be read, so ours stand alone."
    from prunelab.papers.reported import reported

    (source,) = set(reported(own.paper, own.curves.reported)["source"])
    error = " (mean error about 0.001, at most 0.015)" if source.startswith("read") else ""
    return f"Source of the reported values: {source}{error}."


class Chosen(SimpleNamespace):
    """The parameters that a notebook runs with, as attributes, and how they differ from those of its preset.

    Attributes:
        artefact: the id of whose notebook it is.
        preset: whose values they are.
        overridden: name -> value of those that were given and are not the preset's; such numbers are labelled with
            them, and never take the place of the preset's.
    """

    artefact: str
    preset: str
    overridden: dict[str, Any]

    def without(self, *names: str) -> dict[str, Any]:
        """The parameters but for these, as arguments of a function."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("artefact", "preset", "overridden", *names)
        }

    @property
    def parameters(self) -> dict[str, Any]:
        """All of the parameters, as arguments of a function."""
        return self.without()

    def __str__(self) -> str:
        given = f"; given: {spelt(self.overridden)}" if self.overridden else ""
        return f"preset {self.preset}: {spelt(self.parameters) or 'no parameters'}{given}"


def spelt(values: Mapping[str, Any]) -> str:
    """``seeds = 3, data = 'iris'``."""
    return ", ".join(f"{name} = {value!r}" for name, value in values.items())


def chosen(id: str, given: Mapping[str, Any]) -> Chosen:
    """The parameters of an artefact's notebook: those of the preset, and in place of some what was given.

    Args:
        id: of the artefact.
        given: ``preset`` and parameters by name, as the ``globals()`` of a notebook have them; a parameter that is None
            or left out is the preset's, and any other name means nothing here.

    Raises:
        PapersError: an artefact or a preset that does not exist.
    """
    preset = given["preset"]
    values = artefact(id).parameters(preset)
    for name in ("preset", "figure"):
        values.pop(name, None)
    other = {
        name: given[name] for name, usual in values.items() if given.get(name) is not None and given[name] != usual
    }
    return Chosen(**{**values, **other}, artefact=id, preset=preset, overridden=other)


def judge(claim: Claim, ours: Any, level: bool = True) -> str:
    """What our number says to a claim; the interval decides, not the mean.

    Ours is [mean - half, mean + half], r the reported number, t the tolerance:

    ========  ==============================  ==========================  =========================
    rule      the claim is                    holds if all of ours        fails if all of ours
    ========  ==============================  ==========================  =========================
    at_least  ours >= r - t                   >= r - t                    < r - t
    at_most   ours <= r + t                   <= r + t                    > r + t
    within    r - t <= ours <= r + t          in [r - t, r + t]           outside of it
    order     first > second, or not below    > -t                        <= -t
              it by t; ours: first - second
    shown     what is to be seen is seen      is 1                        is 0
    ========  ==============================  ==========================  =========================

    Otherwise the interval spans the threshold: undecided. A single run (n = 1) has no interval, and decides nothing,
    whatever the rule. A number without n (a count, a formula) is an interval of half width 0. None, NaN: not measured.
    What holds and what fails is called by the kind of the claim (``KINDS``); a sentence of a paper that fails on less
    than the paper had is no contradiction: "not at this budget".

    Args:
        claim: what is judged.
        ours: None, a number, a truth value, or anything with ``mean``, ``half`` and ``n`` (``stats.Interval``), in the
            claim's unit.
        level: whether ours has the paper's network, data and budget, or a dense network as good as the paper's.
    """
    if ours is None:
        return NOT_MEASURED
    mean, half, n = _interval(claim, ours)
    if math.isnan(mean):
        return NOT_MEASURED
    if n == 1:
        return ONE_RUN
    low, high = mean - half, mean + half
    reported, slack = claim.reported or 0.0, claim.tolerance
    holds, fails = {
        "at_least": (low >= reported - slack, high < reported - slack),
        "at_most": (high <= reported + slack, low > reported + slack),
        "within": (
            low >= reported - slack and high <= reported + slack,
            high < reported - slack or low > reported + slack,
        ),
        "order": (low > -slack, high <= -slack),
        "shown": (low >= 1, high <= 0),
    }[claim.rule]
    yes, no = KINDS[claim.kind]
    if fails and no == CONTRADICTED and not level:
        return NOT_HERE
    return yes if holds else no if fails else UNDECIDED


def _interval(claim: Claim, ours: Any) -> tuple[float, float, float]:
    """Mean, half width (infinite where there is none) and n of an interval; a plain number has no n."""
    seen = getattr(ours, "mean", ours)
    if claim.rule == "shown" and not (
        isinstance(seen, bool) or (isinstance(seen, float) and not abs(seen - 0.5) > 0.5)
    ):
        raise PapersError(f"claim {claim.id!r}: rule 'shown' takes True or False, got {ours!r}")
    try:
        if hasattr(ours, "mean") and hasattr(ours, "half"):
            half = float(ours.half)
            return float(ours.mean), math.inf if math.isnan(half) else half, float(ours.n)
        return float(ours), 0.0, math.nan
    except (TypeError, ValueError):
        raise PapersError(
            f"claim {claim.id!r}: ours should be a number or an interval, got {type(ours).__name__}"
        ) from None


def verdicts(
    use: str | Chosen,
    ours: Mapping[str, Any],
    reported: Mapping[str, float] | None = None,
    *,
    level: bool | None = None,
    seen: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Every claim of an artefact beside our numbers.

    Args:
        use: what ``chosen`` gave, or the id of an artefact.
        ours: our number for each quantity; what is left out counts as not measured.
        reported: the paper's number for quantities whose rule needs none, to stand beside ours; it decides nothing.
        level: whether ours is at the paper's level, see ``judge``; None: where nothing of a published preset was
            overridden.
        seen: what was seen, in words, for quantities whose number does not say it.

    Returns:
        claim (its id), kind, text, source, rule, reported, tolerance, ours (mean; 1 or 0 for a truth value), interval
        (half width), n, difference (ours - reported), level, seen, verdict. What does not exist is NaN.

    Raises:
        PapersError: a quantity that no claim of the artefact asks for, or a value that is neither number nor interval.
    """
    import pandas as pd

    own = artefact(use if isinstance(use, str) else use.artefact)
    asked = {claim.quantity for claim in own.claims}
    for name in ours:
        if name not in asked:
            raise PapersError(f"{own.id}: no claim asks for {name!r}: {nearest(name, asked)}")
    rows = []
    for claim in own.claims:
        value = ours.get(claim.quantity)
        there = at_level(own, claim, use) if level is None else level
        mean, half, n = (math.nan,) * 3 if value is None else _interval(claim, value)
        theirs = (reported or {}).get(claim.quantity, math.nan) if claim.reported is None else claim.reported
        rows.append({
            "claim": claim.id, "kind": claim.kind, "text": claim.text, "source": claim.source, "rule": claim.rule,
            "reported": theirs, "tolerance": claim.tolerance, "ours": mean,
            "interval": math.nan if math.isinf(half) else half, "n": n, "difference": mean - theirs, "level": there,
            "seen": (seen or {}).get(claim.quantity, ""), "verdict": judge(claim, value, there),
        })  # fmt: skip
    return pd.DataFrame(rows)


def at_level(own: Artefact, claim: Claim, use: str | Chosen) -> bool:
    """Whether numbers have the network, the data and the budget of the paper, by the description of the artefact."""
    published = own.published if claim.published is None else claim.published
    return isinstance(use, Chosen) and use.preset in published and not use.overridden.keys() - {"seeds"}


def rejudged(own: Artefact, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``verdicts`` as today's claims and rules give them from stored numbers; what has none: not measured.

    Args:
        own: the artefact.
        rows: as they are stored, None for what is not known.
    """
    stored, found = {row["claim"]: row for row in rows}, []
    for claim in own.claims:
        row = stored.get(claim.id, {})
        value = _stored(row)
        theirs = row.get("reported") if claim.reported is None else claim.reported
        mean = row.get("ours")
        there = bool(row.get("level", False))
        found.append({
            "claim": claim.id, "kind": claim.kind, "text": claim.text, "source": claim.source, "rule": claim.rule,
            "reported": theirs, "tolerance": claim.tolerance, "ours": mean, "interval": row.get("interval"),
            "n": row.get("n"), "difference": None if mean is None or theirs is None else mean - theirs, "level": there,
            "seen": row.get("seen", ""), "verdict": judge(claim, value, there),
        })  # fmt: skip
    return found


def _stored(row: Mapping[str, Any]) -> Any:
    """Our number of a stored row: None, a plain number, or something with mean, half and n."""
    ours = row.get("ours")
    if ours is None or row.get("n") is None:
        return ours
    half = row.get("interval")
    return SimpleNamespace(mean=ours, half=math.nan if half is None else half, n=int(row["n"]))
