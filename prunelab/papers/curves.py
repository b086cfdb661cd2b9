"""Figures that show curves of accuracy against the units left: what they draw, and what a text says of it. No pandas.

From one description, ``curves`` of an artefact in ``figures.toml``, follow the runs (``dropnet.study``), the sentence
that the figure claims, and each claim with its rule and threshold.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator

METRICS = ("min", "max", "random", "min_layer", "max_layer", "random_layer")
APOZ = (("min", "apoz"), ("min_layer", "apoz_layer"))  # the first does better, or no worse
HALF = 0.005  # accuracy: what "no worse" may be worse; our own reading
AGREE = 0.9  # share of the points of each curve that should agree; our own criterion


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Curves:
    """What one figure shows.

    Attributes:
        kind: metrics against each other; with the greedy oracle (one unit a round); from the original against a new
            initialisation; fractions per round; APoZ against E(a).
        data: name of the data set.
        model: name in the registry.
        hidden: its sizes; (): its default.
        masked: units of each masked layer; (): ``hidden``.
        amount: the fraction p.
        stop: the last point is the first one at or below this fraction.
        measure: what is on the vertical axis.
        reported: the figure under which ``reported.csv`` has the curves; "": none.
        metrics: the curves.
        order: the curves from best to worst, as the text has them.
        near: pairs of neighbours in that order of which the reported curves show the second ahead, and by how much the
            first may be behind: the reported lead and the error of reading, rounded up.
        poor: curves, each with the fraction from which on down the text calls it poor, and one that is not.
        spare: the fraction of units left down to which, in the text, the best curve loses no accuracy, and what may be
            lost there: a point or, where the reported curve loses more, as much, and in each case the error of reading
            and the reported interval.
        alike: pairs of curves that the text calls equal, the fraction down to which, and how far apart they may be on
            average: two points, or as far as the reported ones are, with the same additions.
    """

    kind: Literal["metrics", "oracle", "initialisation", "fractions", "apoz"]
    data: str
    model: str
    hidden: tuple[int, ...] = ()
    masked: tuple[int, ...] = ()
    amount: float = 0.2
    stop: float = 0.1
    measure: Literal["test_accuracy", "train_accuracy"] = "test_accuracy"
    reported: str = ""
    metrics: tuple[str, ...] = METRICS
    order: tuple[str, ...] = ()
    near: tuple[tuple[str, str, float], ...] = ()
    poor: tuple[tuple[str, float, str], ...] = ()
    spare: tuple[float, float] | None = None
    alike: tuple[tuple[str, str, float, float], ...] = ()

    @property
    def units(self) -> tuple[int, ...]:
        """Units of each masked layer."""
        return self.masked or self.hidden

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Curves of which the text calls the first the better one, or no worse."""
        return list(APOZ) if self.kind == "apoz" else list(itertools.pairwise(self.order))

    @property
    def best(self) -> str:
        """The curve of which ``spare`` speaks: the better one of min and min_layer in the text."""
        return next((name for name in self.order if name in ("min", "min_layer")), "min")

    def sentence(self) -> str:
        """What the text says of the figure."""
        said = []
        if self.kind == "apoz":
            said.append("min does better than apoz, and min_layer no worse than apoz_layer.")
        elif self.kind == "fractions":
            said.append("A larger fraction per round does worse, but down to 70 % dropped they are similar.")
        elif self.kind == "initialisation" and self.alike:
            said.append("A new random initialisation does as well as the original one until 70 to 80 % of the units "
                        "have gone.")  # fmt: skip
        elif self.order:
            said.append(f"From best to worst: {', '.join(self.order)}.")
        said += [f"{name} does poorly at and below a fraction of {at:g}." for name, at, _ in self.poor]
        if self.spare:
            said.append(f"{100 * (1 - self.spare[0]):.0f} % or more of the units can go without significant loss.")
        if self.kind in ("metrics", "oracle"):
            said += [f"{a} and {b} are alike at and above {at:g}." for a, b, at, _ in self.alike]
        return " ".join(said) or "Drawn in the supplement without a claim of its own."

    def claims(self, place: str) -> Iterator[dict[str, object]]:
        """The fields of each claim.

        Args:
            place: of the text, as ``"Fig. 3"``.
        """
        if self.reported:
            yield {
                "id": "agreeing", "kind": "question", "rule": "at_least", "reported": AGREE, "quantity": "agreeing",
                "text": "Of each curve at least 90 % of the points agree with the reported ones.",
                "source": "our own criterion",
            }  # fmt: skip
        said, ours = f"text, {place}", "is our own reading"
        slack = {(a, b): much for a, b, much in self.near}
        if self.kind == "apoz":
            slack[APOZ[1]] = HALF
        for first, second in self.pairs:
            name, much = f"{plain(first)}_over_{plain(second)}", slack.get((first, second), 0.0)
            text = f"{spoken(first)} does better than {spoken(second)}."
            source = said
            if much:
                text = (
                    f"{spoken(first)} does better than {spoken(second)}, or is behind by {100 * much:g} points at most."
                )
                source += f"; the slack {ours}: " + (
                    "no worse" if self.kind == "apoz" else "so far behind is the reported curve"
                )
            yield {"id": name, "quantity": name, "rule": "order", "tolerance": much, "text": text, "source": source}
        for name, at, other in self.poor:
            yield {
                "id": "poor_by_layer" if name.endswith("_layer") else "poor", "rule": "order", "source": said,
                "text": f"{name} does poorly at and below a fraction of {at:g}: worse than {other} there.",
                "quantity": f"{other}_over_{name}_when_poor",
            }  # fmt: skip
        for i, (first, second, at, much) in enumerate(self.alike):
            yield {
                "id": "alike" if not i else f"alike_{second}", "rule": "within", "reported": 0.0, "tolerance": much,
                "text": f"{spoken(first)} and {spoken(second)} are alike as long as a fraction of {at:g} or more is "
                f"left: on average within {100 * much:g} points.",
                "source": f"{said}; the threshold {ours}, with the error of the reported points",
                "quantity": f"{plain(first)}_beside_{plain(second)}",
            }  # fmt: skip
        if self.spare:
            at, much = self.spare
            yield {
                "id": "spare", "rule": "order", "tolerance": much, "quantity": "kept",
                "text": f"{100 * (1 - at):.0f} % or more of the units can go without significant loss: with "
                f"{self.best} not more than {100 * much:g} points are lost.",
                "source": f"{said}; the threshold {ours}, with the error of the reported points",
            }  # fmt: skip


def plain(name: str) -> str:
    """The name of a curve as a part of a quantity's: ``0.2`` is ``p20``."""
    return f"p{round(100 * float(name))}" if name[0].isdigit() else name


def spoken(name: str) -> str:
    """The name of a curve in a sentence."""
    return f"p = {name}" if name[0].isdigit() else name
