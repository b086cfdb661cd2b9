"""The papers, their tables and figures, and what each claims: ``papers.toml``, read and judged."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from prunelab import paths
from prunelab.errors import PrunelabError, nearest

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
CONFIRMED, CONTRADICTED, UNDECIDED, NOT_MEASURED = (
    "confirmed",
    "contradicted",
    "undecided (interval spans)",
    "not measured",
)
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
    """One statement of a paper that a number of ours can confirm or contradict.

    Attributes:
        id: unique within its artefact.
        text: the paper's sentence, or what its code does, in words.
        source: where it stands.
        rule: how ours is compared, see ``judge``.
        quantity: the name under which the notebook supplies our number.
        reported: the paper's number, in the unit of the quantity; None where the rule needs none.
        tolerance: allowed distance in the unit of the quantity, not below 0.
    """

    id: str
    text: str
    source: str
    rule: Rule
    quantity: str
    reported: float | None = None
    tolerance: float = 0.0

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
    """

    id: str
    paper: str
    title: str
    claim: str
    data: list[str]
    presets: dict[Literal["all", "smoke", "quick", "paper"], dict[str, Literals]]
    claims: list[Claim] = field(default_factory=list)
    notebook: str = ""
    figure: str = ""
    note: str = ""

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
        for preset, own in named.items():
            if left := sorted(set().union(*named.values()) - own):
                raise ValueError(
                    f"artefact {self.id!r}: preset {preset} says nothing of {', '.join(left)}, which another one sets"
                )
        names = [claim.id for claim in self.claims]
        if len(set(names)) < len(names):
            raise ValueError(f"artefact {self.id!r}: two claims of one id among {', '.join(names)}")
        object.__setattr__(self, "notebook", self.notebook or f"{self.id}.ipynb")
        object.__setattr__(self, "figure", self.figure or self.id)

    def parameters(self, preset: str) -> dict[str, Any]:
        """The notebook's parameters at a preset, the name of the preset among them."""
        if preset not in PRESETS:
            raise PapersError(f"{self.id}: preset {preset!r}: {nearest(preset, PRESETS)}")
        return {"preset": preset, **self.presets.get("all", {}), **self.presets[preset]}  # type: ignore[index]


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


def read(path: Path = FILE) -> tuple[tuple[Paper, ...], tuple[Artefact, ...]]:
    """Papers and artefacts of a file in the form of ``papers.toml``, and of ``<key>/figures.toml`` beside it.

    Raises:
        PapersError: the file is no TOML, or an entry of it is wrong; the line names the entry.
    """
    where = path
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        beside = [path.parent / str(paper.get("key")) / "figures.toml" for paper in content.get("paper", [])]
        for file in filter(Path.is_file, beside):
            where = file
            content.setdefault("artefact", []).extend(tomllib.loads(file.read_text(encoding="utf-8"))["artefact"])
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


class Chosen(SimpleNamespace):
    """The parameters that a notebook runs with, as attributes, and how they differ from those of its preset.

    Attributes:
        preset: whose values they are.
        overridden: name -> value of those that were given and are not the preset's; such numbers are labelled with
            them, and never take the place of the preset's.
    """

    preset: str
    overridden: dict[str, Any]

    def without(self, *names: str) -> dict[str, Any]:
        """The parameters but for these, as arguments of a function."""
        return {name: value for name, value in vars(self).items() if name not in ("preset", "overridden", *names)}

    @property
    def values(self) -> dict[str, Any]:
        """All of the parameters, as arguments of a function."""
        return self.without()

    def __str__(self) -> str:
        given = f"; given: {spelt(self.overridden)}" if self.overridden else ""
        return f"preset {self.preset}: {spelt(self.values) or 'no parameters'}{given}"


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
    del values["preset"]
    other = {
        name: given[name] for name, usual in values.items() if given.get(name) is not None and given[name] != usual
    }
    return Chosen(**{**values, **other}, preset=preset, overridden=other)


def judge(claim: Claim, ours: Any) -> str:
    """Whether our number confirms or contradicts a claim; the interval decides, not the mean.

    Ours is [mean - half, mean + half], r the reported number, t the tolerance:

    ========  ==============================  ==========================  =========================
    rule      the claim is                    confirmed if all of ours    contradicted if all of ours
    ========  ==============================  ==========================  =========================
    at_least  ours >= r - t                   >= r - t                    < r - t
    at_most   ours <= r + t                   <= r + t                    > r + t
    within    r - t <= ours <= r + t          in [r - t, r + t]           outside of it
    order     first > second, or not below    > -t                        <= -t
              it by t; ours: first - second
    shown     what is to be seen is seen      is True                     is False
    ========  ==============================  ==========================  =========================

    Otherwise the interval spans the threshold: undecided. A plain number is an interval of half width 0. The mean of a
    single run has no finite interval: undecided. None, NaN: not measured.

    Args:
        claim: what is judged.
        ours: None, a number, a truth value, or anything with ``mean``, ``half`` and ``n`` (``stats.Interval``), in the
            claim's unit.
    """
    if ours is None:
        return NOT_MEASURED
    if claim.rule == "shown":
        if str(ours) not in ("True", "False"):
            raise PapersError(f"claim {claim.id!r}: rule 'shown' takes True or False, got {ours!r}")
        return CONFIRMED if ours else CONTRADICTED
    mean, half, _ = _interval(claim, ours)
    if math.isnan(mean):
        return NOT_MEASURED
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
    }[claim.rule]
    return CONFIRMED if holds else CONTRADICTED if fails else UNDECIDED


def _interval(claim: Claim, ours: Any) -> tuple[float, float, float]:
    """Mean, half width (infinite where there is none) and n of an interval; a plain number has no n."""
    try:
        if hasattr(ours, "mean") and hasattr(ours, "half"):
            half = float(ours.half)
            return float(ours.mean), math.inf if math.isnan(half) else half, float(ours.n)
        return float(ours), 0.0, math.nan
    except (TypeError, ValueError):
        raise PapersError(
            f"claim {claim.id!r}: ours should be a number or an interval, got {type(ours).__name__}"
        ) from None


def verdicts(id: str, ours: Mapping[str, Any], reported: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Every claim of an artefact beside our numbers.

    Args:
        id: of the artefact.
        ours: our number for each quantity; what is left out counts as not measured.
        reported: the paper's number for quantities whose rule needs none, to stand beside ours; it decides nothing.

    Returns:
        claim (its id), text, source, rule, reported, tolerance, ours (mean; 1 or 0 for a truth value), interval (half
        width), n, difference (ours - reported), verdict. What does not exist is NaN.

    Raises:
        PapersError: a quantity that no claim of the artefact asks for, or a value that is neither number nor interval.
    """
    import pandas as pd

    claims = artefact(id).claims
    asked = {claim.quantity for claim in claims}
    for name in ours:
        if name not in asked:
            raise PapersError(f"{id}: no claim asks for {name!r}: {nearest(name, asked)}")
    rows = []
    for claim in claims:
        value = ours.get(claim.quantity)
        verdict = judge(claim, value)
        mean, half, n = (math.nan,) * 3 if value is None else _interval(claim, value)
        theirs = (reported or {}).get(claim.quantity, math.nan) if claim.reported is None else claim.reported
        rows.append({
            "claim": claim.id, "text": claim.text, "source": claim.source, "rule": claim.rule, "reported": theirs,
            "tolerance": claim.tolerance, "ours": mean, "interval": math.nan if math.isinf(half) else half, "n": n,
            "difference": mean - theirs, "verdict": verdict,
        })  # fmt: skip
    return pd.DataFrame(rows)
