"""What ``live`` shows of a position: its sentence, numbers, curve, histogram and layers, and errors."""

from __future__ import annotations

from collections.abc import Sequence

from prunelab.collapse import dead_layers
from prunelab.errors import as_output
from prunelab.lab.live import view as live_view
from prunelab.lab.live.controls import own_words, widgets
from prunelab.lab.live.pruning import Position, Subject
from prunelab.lab.live.view import Point, per_cent
from prunelab.masks import Masks, layer_of
from prunelab.plots import network_svg
from prunelab.runs.columns import short


class Screen:
    """The widgets below the controls.

    Args:
        subject: What is shown.
        layer: The control above the histogram.
        view: The control above the layers.
    """

    def __init__(self, subject: Subject, layer: widgets.Widget, view: widgets.Widget) -> None:
        self._subject = subject
        self._dense, self._dead = subject.accuracy(subject.dense), None
        self.sentence, self.facts, self.curve, self.bars, self.table = (widgets.HTML() for _ in range(5))
        self.errors = widgets.Output()
        self.table.layout = {"max_height": "44em", "overflow": "auto"}
        pictures = widgets.HBox([self.curve, widgets.VBox([layer, self.bars])], layout={"flex_flow": "row wrap"})
        self.rows = [self.sentence, self.facts, pictures, view, self.table, self.errors]

    def show_error(self, error: Exception) -> None:
        """An error instead of an old picture."""
        for part in (self.sentence, self.facts, self.curve, self.bars, self.table):
            part.value = ""
        self.errors.outputs = (as_output(error),)

    def show_accuracy(
        self,
        at: Position,
        masks: Masks,
        accuracy: float,
        seen: int,
        points: Sequence[Point],
        past: Sequence[Sequence[Point]],
    ) -> str:
        """Sentence, numbers and curve; returns the sentence.

        Args:
            at: Where the controls stand.
            masks: What is left.
            accuracy: On those that were seen.
            seen: How many of the sample.
            points: What was visited of this curve.
            past: Curves of the networks that this one was fine-tuned from.
        """
        words = self._describe(at, masks, accuracy, seen)
        self.sentence.value = live_view.sentence(words)
        self.facts.value = live_view.page(self._numbers(masks, accuracy))
        about = f"Accuracy against pruning rate, {len(points)} visited. {words}"
        self.curve.value = live_view.page(live_view.curve(points, (at.rate, accuracy), self._dense, about, past))
        return words

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

    def show_layers(self, at: Position, masks: Masks, view: str) -> None:
        """The table, with a picture of the units of each layer; or a drawing of the network."""
        rows = [row for row in masks.by_layer() if len(row["shape"]) > 1]
        if view == "units":
            self.table.value = live_view.page(live_view.layers(rows, self._subject.units(masks)))
            return
        words = f"at a pruning rate of {per_cent(at.rate)}{f', {own_words(at)}' * bool(own_words(at))}"
        if weights := self._subject.chain(masks):
            names, matrices = [layer_of(name) for name in weights], list(weights.values())
            widths, size = list(map(len, matrices)), (min(880, 170 * len(matrices)), 330)
            drawn = network_svg.network(matrices, widths, words, names, size)
        else:  # its layers do not follow each other one by one
            bars = [(row["parameter"], row["kept"], row["total"]) for row in rows]
            drawn = network_svg.layers(bars, words)
        self.table.value = live_view.page(drawn)

    def _describe(self, at: Position, masks: Masks, accuracy: float, seen: int) -> str:
        own, base, sparsity = own_words(at), self._subject.base, self._subject.sparsity(masks)
        whole = seen == self._subject.samples
        sample = self._subject.sample if whole else f"{seen:,} of {self._subject.sample}, so far,"
        tuned = f" after {base.epochs} epoch{'s' * (base.epochs > 1)} of fine-tuning" * bool(base.epochs)
        words = (
            f"At a pruning rate of {per_cent(at.rate)}{f', {own}' * bool(own)} (sparsity {sparsity:.3f})"
            f"{tuned} accuracy on {sample} is {per_cent(accuracy, 1)}, dense {per_cent(self._dense, 1)}."
        )
        if base.epochs and masks.kept == base.masks.kept and at.rate < sparsity - 0.005:
            words += " What was gone before the fine-tuning stays gone."
        if self._dead is None or self._dead[0] is not masks:  # once, not for every part of the sample
            self._dead = masks, dead_layers(self._subject.module, masks)
        if self._dead[1]:
            words += f" Layer {', '.join(self._dead[1])} is cut off: the answers no longer depend on the input."
        return words

    def _numbers(self, masks: Masks, accuracy: float) -> str:
        subject, width = self._subject, self._subject.bytes_each
        total, work = subject.dense.total, subject.work(masks)
        kept = subject.weights(masks)
        macs = [(short(work[0]), f"effective MACs of {short(work[1])}")] if work else []
        return live_view.facts(
            [
                (per_cent(accuracy, 1), f"accuracy, dense {per_cent(self._dense, 1)}"),
                (f"{subject.sparsity(masks):.3f}", f"sparsity, {short(kept)} of {short(total)} left"),
                *macs,
                (live_view.size(kept * width), f"non-zero weights of {live_view.size(total * width)}"),
            ]
        )
