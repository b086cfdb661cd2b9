"""What ``live`` shows of a position: its sentence, numbers, curve, histogram and layers, who pays, and errors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from prunelab.errors import as_output
from prunelab.lab.live import view as live_view
from prunelab.lab.live.controls import KINDS, Controls, own_words, widgets
from prunelab.lab.live.pruning import TIMED, Position, Subject
from prunelab.lab.live.view import Other, Point, Scale, per_cent
from prunelab.masks import Masks, layer_of
from prunelab.plots import network_svg
from prunelab.plots.pictures import canvas
from prunelab.runs.columns import short
from prunelab.structure.collapse import dead_layers

CHANGED = 10  # samples that are shown
MOST = 30  # classes of a table of confusion
NO_CLASSES = "This task has no classes: each sample should have one label, and the model one output for each class."


class Screen:
    """The widgets below the controls.

    Args:
        subject: What is shown.
        controls: The controls above.
    """

    def __init__(self, subject: Subject, controls: Controls) -> None:
        self._subject, self._controls = subject, controls
        self._dense, self._dead = subject.value(subject.dense), None
        self._small: tuple[Masks, list[tuple[str, str]]] | None = None
        self._last: tuple[Masks, float] = subject.dense, self._dense
        self._right = subject.answered()  # by the dense network
        self._ends = self._dense, self._dense  # the least and the most that was measured
        self.sentence, self.facts, self.curve, self.bars, self.table = (widgets.HTML() for _ in range(5))
        self.errors = widgets.Output()
        self.table.layout = {"max_height": "44em", "overflow": "auto"}
        layers = widgets.VBox([controls.layer, self.bars])
        pictures = widgets.HBox([self.curve, layers], layout={"flex_flow": "row wrap"})
        self.rows = [self.sentence, self.facts, pictures, controls.view, self.table, self.errors]

    def show_error(self, error: Exception) -> None:
        """An error instead of an old picture."""
        for part in (self.sentence, self.facts, self.curve, self.bars, self.table):
            part.value = ""
        self.errors.outputs = (as_output(error),)

    def scale(self) -> Scale:
        """The vertical axis: wide enough for all that was measured."""
        return Scale.of(self._subject.measure.name, self._subject.measure.share, self._ends)

    def show_value(
        self,
        at: Position,
        masks: Masks,
        value: float,
        seen: int,
        points: Collection[Point],
        others: Sequence[Other],
        answers: np.ndarray | None,
        pinned: tuple[Position, float] | None,
    ) -> str:
        """Sentence, numbers and curve; returns the sentence.

        Args:
            at: Where the controls stand.
            masks: What is left.
            value: The measure, on those that were seen.
            seen: How many of the sample.
            points: What was visited of this curve.
            others: Other curves.
            answers: The label that each sample was given, once all of it is measured.
            pinned: A position that is held beside this one, and its value.
        """
        if math.isfinite(value):
            self._ends = min(self._ends[0], value), max(self._ends[1], value)
        words = self._describe(at, masks, value, seen)
        if answers is not None:
            words += self._who_pays(answers)
        if pinned is not None:
            words += self._beside(value, *pinned)
        self.sentence.value = live_view.sentence(words)
        self._last = masks, value
        self.facts.value = live_view.page(live_view.facts(self._numbers(masks, value)))
        about = f"{self._name} against pruning rate, {len(points)} visited. {words}"
        drawn = live_view.curve(
            points, (at.rate, value), self._dense, about, others, self.scale(), self._controls.axis.value
        )
        self.curve.value = live_view.page(drawn)
        return words

    def show_shrunk(self, masks: Masks, found: Mapping[str, tuple[float, float]]) -> None:
        """What shrinking gives, beside the other numbers, as long as these masks are shown."""
        text = {"parameters": short, "macs": short, "bytes": live_view.size, "latency": _milliseconds}
        names = {"macs": "MACs", "latency": f"latency of {TIMED} samples"}
        cards = [
            (text[what](small), f"shrunk: {names.get(what, what)} of {text[what](dense)}")
            for what, (small, dense) in found.items()
        ]
        self._small = masks, cards
        self.facts.value = live_view.page(live_view.facts(self._numbers(*self._last)))

    def show_weights(self, at: Position, masks: Masks, layer: str) -> None:
        """The histogram of a layer, or of all."""
        found = self._subject.histogram(at, masks, layer)
        if found.there == found.kept:
            cut = "all are kept"
        elif found.threshold is not None:
            cut = f"threshold: |w| = {found.threshold:.3g}"
        else:
            cut = "no one threshold in size"
        drawn = live_view.histogram(found.edge, found.there, found.kept, found.threshold, cut)
        self.bars.value = live_view.page(drawn)

    def show_below(self, at: Position, masks: Masks, view: str, answers: np.ndarray | None) -> None:
        """The layers, as a table with a picture of the units of each or as a drawing of the network; or who pays."""
        drawn = self._layers(at, masks, view) if view in ("units", "network") else self._classes(view, answers)
        self.table.value = live_view.page(drawn)

    def still(self, at: Position, points: Collection[Point], others: Sequence[Other]) -> bytes:
        """The curve as a PNG, for where nothing runs."""
        scale = self.scale()
        factor = 100 if scale.share else 1
        with canvas(size=(6.4, 3.4)) as (picture, axes):
            ax = axes[0, 0]
            for label, curve, style in (
                *((other.label, other.points, "--") for other in others if other.kind != "past"),
                (label_of(at), points, "o-"),
            ):
                ordered = sorted(curve)
                ax.plot([100 * r for r, _ in ordered], [factor * v for _, v in ordered], style, label=label)
            ax.axhline(factor * self._dense, linestyle=":", color="grey", label="dense")
            ax.set_xlabel("pruning rate (%)")
            ax.set_title(f"{scale.name}{' (%)' if scale.share else ''}")
            ax.set_ylim(factor * scale.low, factor * (scale.high + 0.02 * (scale.high - scale.low)))
            ax.legend()
            return picture.png(120)

    # -- who pays -----------------------------------------------------------------------------------------------------

    def _by_class(self, answers: np.ndarray) -> list[tuple[str, int, float, float]]:
        """For each class that occurs: its name, its samples, dense accuracy, and accuracy now."""
        labels = self._subject.labels.cpu().numpy()
        total = np.bincount(labels)
        dense, now = (np.bincount(labels[own == labels], minlength=len(total)) for own in (self._right, answers))
        return [
            (self._subject.class_name(label), n, dense[label] / n, now[label] / n)
            for label, n in enumerate(total.tolist())
            if n
        ]

    def _who_pays(self, answers: np.ndarray) -> str:
        rows = sorted(self._by_class(answers), key=lambda row: row[3] - row[2])
        losers = [row for row in rows if row[3] < row[2]][:3]
        if not losers or len(rows) < 2:
            return ""
        (name, _, dense, now), *rest = losers
        more = (
            f", then {' and '.join(f'{other} ({100 * (b - a):+.1f} points)' for other, _, a, b in rest)}"
            if rest
            else ""
        )
        return f" Class {name} loses most, from {per_cent(dense, 1)} to {per_cent(now, 1)}{more}."

    def _classes(self, view: str, answers: np.ndarray | None) -> str:
        if self._subject.labels is None:
            return f"<p>{NO_CLASSES}</p>"
        if answers is None:
            return "<p>Not all of the sample is measured yet.</p>"
        labels = self._subject.labels.cpu().numpy()
        if view == "classes":
            return live_view.classes(self._by_class(answers))
        if view == "confusion":
            count = int(max(labels.max(), answers.max())) + 1
            if count > MOST:
                return f"<p>{count} classes are too many for a table: <i>classes</i> lists them.</p>"
            pairs = np.bincount(labels * count + answers, minlength=count**2).reshape(count, count)
            return live_view.confusion(pairs, [self._subject.class_name(label) for label in range(count)])
        different = np.flatnonzero(answers != self._right)
        names = self._subject.class_name
        shown = [
            (
                _picture(self._subject.inputs, at),
                f"{names(self._right[at])} → {names(answers[at])} ({names(labels[at])})",
            )
            for at in different[:CHANGED].tolist()
        ]
        legend = "<p>answer of the dense network → answer now (right class)</p>" if shown else ""
        return live_view.changed(shown, len(different), len(labels)) + legend

    # -- words --------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        name = self._subject.measure.name
        return name[:1].upper() + name[1:]

    def _layers(self, at: Position, masks: Masks, view: str) -> str:
        rows = [row for row in masks.by_layer() if len(row["shape"]) > 1]
        if view == "units":
            return live_view.layers(rows, self._subject.units(masks))
        words = f"at a pruning rate of {per_cent(at.rate)}{f', {own_words(at)}' * bool(own_words(at))}"
        if weights := self._subject.chain(masks):
            names, matrices = [layer_of(name) for name in weights], list(weights.values())
            widths, size = list(map(len, matrices)), (min(880, 170 * len(matrices)), 330)
            return network_svg.network(matrices, widths, words, names, size)
        # its layers do not follow each other one by one
        return network_svg.layers([(row["parameter"], row["kept"], row["total"]) for row in rows], words)

    def _describe(self, at: Position, masks: Masks, value: float, seen: int) -> str:
        subject, text = self._subject, self.scale().text
        own, base, sparsity = own_words(at), subject.base, subject.sparsity(masks)
        sample = subject.sample if seen == subject.samples else f"{seen:,} of {subject.sample}, so far,"
        tuned = f" after {base.epochs} epoch{'s' * (base.epochs > 1)} of fine-tuning" * bool(base.epochs)
        measured = f"{subject.measure.name}{f' on {sample}' * bool(subject.sample)}"
        words = (
            f"By {label_of(at)}, at a pruning rate of {per_cent(at.rate)}{f', {own}' * bool(own)} "
            f"(sparsity {sparsity:.3f}){tuned} {measured} is {text(value)}, dense {text(self._dense)}."
        )
        if base.epochs and masks.kept == base.masks.kept and at.rate < sparsity - 0.005:
            words += " What was gone before the fine-tuning stays gone."
        if self._dead is None or self._dead[0] is not masks:  # once, not for every part of the sample
            self._dead = masks, dead_layers(subject.module, masks)
        if self._dead[1]:
            words += f" Layer {', '.join(self._dead[1])} is cut off: the answers no longer depend on the input."
        return words

    def _beside(self, value: float, position: Position, other: float) -> str:
        scale = self.scale()
        gap = value - other
        size = f"{abs(100 * gap):.1f} points" if scale.share else f"{abs(gap):.3g}"
        better = (gap > 0) == self._subject.measure.higher
        verdict = f"{size} {'worse' if better else 'better'}" if gap else "the same"
        return f" Pinned, {label_of(position)}, is at {scale.text(other)} there: {verdict}."

    def _numbers(self, masks: Masks, value: float) -> list[tuple[str, str]]:
        subject, width, text = self._subject, self._subject.bytes_each, self.scale().text
        total, work = subject.dense.total, subject.work(masks)
        kept = subject.weights(masks)
        macs = [(short(work[0]), f"effective MACs of {short(work[1])}")] if work else []
        shrunk = self._small[1] if self._small is not None and self._small[0] is masks else []
        return [
            (text(value), f"{subject.measure.name}, dense {text(self._dense)}"),
            *((f"{number:.4g}", name) for name, number in subject.beside.items()),
            (f"{subject.sparsity(masks):.3f}", f"sparsity, {short(kept)} of {short(total)} left"),
            *macs,
            (live_view.size(kept * width), f"non-zero weights of {live_view.size(total * width)}"),
            *shrunk,
        ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def label_of(position: Position) -> str:
    """``magnitude (weights)``, and in words whatever else sets its curve apart."""
    scope = ", each layer by itself" if position.scope == "layer" else ""
    return f"{position.method} ({KINDS[position.granularity]}{scope})"


def _picture(inputs: Any, at: int) -> np.ndarray | None:
    """A sample as an image, its values stretched to 0..1; None where it is no image."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        return None
    image = inputs[at].float().cpu()
    low, high = image.min(), image.max()
    image = (image - low) / (high - low).clamp(min=1e-12)
    return (image.movedim(0, -1) if len(image) == 3 else image.mean(0)).numpy()
