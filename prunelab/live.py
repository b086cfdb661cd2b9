"""A slider on a model that is in memory: what pruning does to it, seen while the slider moves.

The one module above both sides: it computes with torch (``live_pruning``, ``live_training``) and shows with widgets
(``live_view``). The model itself is never changed.
"""

from __future__ import annotations

import functools
import html
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
from torch import Tensor, nn

from prunelab import live_view
from prunelab.collapse import dead_layers
from prunelab.data import Dataset
from prunelab.errors import PrunelabError, nearest
from prunelab.live_controls import BUTTONS, LAST_SEED, SCOPES, Controls, own_words, widgets
from prunelab.live_pruning import Base, Position, Subject
from prunelab.live_training import FineTuning
from prunelab.live_view import per_cent
from prunelab.masks import Masks, layer_of
from prunelab.pruners.select import check_amount
from prunelab.quantities import short
from prunelab.settings import Train

STANDARD = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # those that a sweep visits
PAUSE = 1.0  # seconds; moves of one control that follow each other faster are undone together


class PruningExplorer(widgets.VBox):
    """Controls, one sentence, a curve that fills in as rates are visited, a histogram of the weights, and the layers.

    The masks are those of ``prunelab.prune`` with the same method, granularity, scope, seed and ``allow_empty=True``,
    for the scores, which are computed once, go through the method's own selection. While the kernel is busy the browser
    holds back all positions but the latest, so nothing queues up. ``rate``, ``score``, ``granularity``, ``scope``,
    ``seed`` and ``own`` (layer -> slider) are the controls. An error is shown in red in the widget and raised;
    ``check`` raises it again, for runs that nobody watches.

    A fine-tuning trains one epoch in the background, on the training part of the data set. From then on the rate still
    counts from the whole network, but what was gone stays gone; ``undo`` brings it back.

    Args:
        model: Any module whose output are logits [N, classes]. What is explored is a copy, in evaluation mode.
        data: A data set, of whose test part a sample is drawn; or inputs, as the model takes them, and labels [N].
        method: What ranks the weights: one of those that ``explorer.score`` offers for this model.
        granularity: ``"weight"``, ``"neuron"``, ``"filter"`` or ``"unit"``, as far as the method and the model have it.
        scope: ``"global"`` or ``"layer"``.
        rate: Where the slider stands at first, in [0, 1): the fraction that goes of what may go.
        evaluate: Size of the sample; all where there are fewer. It is drawn once, by a seed of its own, and lies in
            memory as float32.
        batches: Inputs and targets, for methods that look at data; None: 1,000 of the training part, if there is one.
        seed: Of the pruning: random scores, and lots among equal ones.
        tuning: Settings of the fine-tuning, the number of epochs apart; the default is that of ``Train``.

    Attributes:
        kept: The masks that were kept last (button or ``keep``); None before.
        sample: What is measured on, such as ``"2,000 test images"``.

    Raises:
        PrunelabError: one line, before anything is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset | tuple[Tensor, Tensor],
        *,
        method: str = "magnitude",
        granularity: str | None = None,
        scope: str = "global",
        rate: float = 0.9,
        evaluate: int = 2000,
        batches: Iterable[Any] | None = None,
        seed: int = 0,
        tuning: Train | None = None,
    ) -> None:
        _refuse("scope", scope, SCOPES.values())
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LAST_SEED:
            raise PrunelabError(f"seed = {seed!r}: should be a whole number from 0 to {LAST_SEED}")
        check_amount(rate)
        self._subject = Subject(model, data, evaluate, batches)
        _refuse("method", method, self._subject.offered)
        granularity = granularity or self._subject.offered[method][0]
        _refuse("granularity", granularity, self._subject.offered[method])
        self._data, self._train = data if isinstance(data, Dataset) else None, tuning or Train()
        self.sample, self.kept = self._subject.sample, None
        self._lock, self._tuning, self._failure = threading.RLock(), None, None
        self._past: list[tuple[Position, Base]] = []  # what undo goes back to, the latest last
        self._mover, self._moved, self._tuned_nets = None, 0.0, 0
        self._visited: dict[tuple[int, Position], tuple[float, float]] = {}
        self._epochs = {0: 0}  # network -> epochs of fine-tuning
        self._masks = self._subject.dense
        self._dense_accuracy = self._subject.accuracy(self._masks)
        first = Position(method, granularity, scope, seed, (), float(rate))
        layers = [layer_of(name) for name in self._masks]
        acts = (self.sweep, self.undo, self.keep, self.fine_tune, self.stop)
        press = {name: functools.partial(self._clicked, act) for name, act in zip(BUTTONS, acts, strict=True)}
        self._controls = Controls(
            first, self._subject.offered, layers, self._data is not None, self._move, self._choose, press
        )
        for name in ("rate", "score", "granularity", "scope", "seed", "own", "layer", "buttons", "progress"):
            setattr(self, name, getattr(self._controls, name))
        parts = (widgets.HTML() for _ in range(5))
        self._sentence, self._facts, self._curve, self._bars, self._table = parts
        self._errors, self._words, self._shown = widgets.Output(), "", first
        self._table.layout = {"max_height": "30em", "overflow": "auto"}
        pictures = widgets.HBox([self._curve, widgets.VBox([self.layer, self._bars])], layout={"flex_flow": "row wrap"})
        shown = [self._sentence, self._facts, pictures, self._table, self._errors]
        super().__init__([*self._controls.rows, *shown])
        with self._errors_shown():
            self._show(first)

    @property
    def masks(self) -> Masks:
        """What is kept at the position that is shown."""
        return self._masks

    @property
    def model(self) -> nn.Module:
        """A copy of the network that is shown: as it was given or fine-tuned, its pruned weights zero."""
        return self._subject.network(self._masks)

    @property
    def visited(self) -> pd.DataFrame:
        """One row per position, in order of visit.

        Columns: network (0: as given, then each that was fine-tuned), epochs (of fine-tuning), method, granularity,
        scope, seed, own (layers with a rate of their own), rate, sparsity, accuracy (on the sample).
        """
        columns = ["network", "epochs", "method", "granularity", "scope", "seed", "own", "rate", "sparsity", "accuracy"]
        rows = [
            (network, self._epochs[network], *at.setting[:4], own_words(at), at.rate, *found)
            for (network, at), found in self._visited.items()
        ]
        return pd.DataFrame(rows, columns=columns)

    def sweep(self, rates: Iterable[float] = STANDARD) -> None:
        """Visit ``rates`` with the other controls as they are; then show the slider's own position again."""
        with self._lock, self._errors_shown():
            here = self._controls.position
            for rate in (*rates, here.rate):
                check_amount(rate)
                self._show(Position(*here.setting, float(rate)))

    def undo(self) -> None:
        """Go back to what was shown before the last change, a fine-tuning among them; nothing where there was none."""
        self._idle("undo")
        with self._lock, self._errors_shown():
            if self._past:
                position, base = self._past.pop()
                self._mover = None
                self._subject.go_on_from(base)
                self._controls.set(position)
                self._show(position)
                self._say("")

    def keep(self) -> Masks:
        """Put the masks that are shown aside, as ``kept``, and return them."""
        with self._lock:
            self.kept = self._masks
            self._say(f"Kept as explorer.kept: sparsity {self._masks.weights.sparsity:.3f}.")
            return self.kept

    def fine_tune(self, wait: bool = False) -> None:
        """Train the pruned network for one epoch in the background.

        Args:
            wait: whether to come back only when it is over; an error is raised then.

        Raises:
            PrunelabError: there is no training part, or a fine-tuning is under way.
        """
        self._idle("fine-tune")
        if self._data is None:
            raise PrunelabError("fine-tuning needs a training part: give PruningExplorer a data set, as data.load does")
        with self._lock:
            base, masks = self._subject.base, self._masks
            after = functools.partial(self._after_tuning, base, masks)
            network, order = self._subject.network(), self._shown.seed + base.epochs
            self._tuning = FineTuning(network, masks, self._data, self._train, order, self._report, after)
            self._controls.training(True, False)
        self._tuning.start()
        if wait:
            self._tuning.join()
            self.check()

    def stop(self) -> None:
        """End the fine-tuning with its next batch; the network stays as it was before. Nothing where there is none."""
        if self._tuning is not None:
            self._tuning.stop()

    def check(self) -> None:
        """Raise the first error that a callback met, if any did."""
        if self._failure is not None:
            raise self._failure

    def __repr__(self) -> str:
        return self._words

    # -- what happens -------------------------------------------------------------------------------------------------

    def _move(self, change: Mapping[str, Any]) -> None:
        """A control moved."""
        with self._lock, self._errors_shown():
            self._remember(change["owner"])
            self._say("")
            self._show(self._controls.position)

    def _choose(self, _: Any) -> None:
        """Another layer's histogram."""
        with self._lock, self._errors_shown():
            self._draw_histogram(self._shown)

    def _clicked(self, act: Any, _: widgets.Button) -> None:
        with self._errors_shown():
            act()

    def _remember(self, mover: widgets.Widget | None) -> None:
        """Before a change: what is shown now can be had back."""
        now = time.monotonic()
        if mover is None or mover is not self._mover or now - self._moved > PAUSE:
            self._past.append((self._shown, self._subject.base))
        self._mover, self._moved = mover, now
        self.buttons["undo"].disabled = False

    def _report(self, done: int, total: int) -> None:
        self._controls.progress.max, self._controls.progress.value = total, done

    def _after_tuning(
        self, base: Base, masks: Masks, weights: Mapping[str, Tensor] | None, failure: Exception | None
    ) -> None:
        """In the training's thread: show what became of it."""
        with self._lock, self._errors_shown(again=False):
            self._controls.training(False, bool(self._past))
            if failure is not None:
                raise failure
            if weights is None:
                self._say("Stopped: the network is as it was before.")
                return
            self._remember(None)
            self._tuned_nets += 1
            self._epochs[self._tuned_nets] = base.epochs + 1
            self._subject.go_on_from(Base(self._tuned_nets, base.epochs + 1, weights, masks))
            self._show(self._controls.position)
            self._say("Fine-tuned for 1 epoch.")

    def _idle(self, what: str) -> None:
        if self._tuning is not None and self._tuning.is_alive() and threading.current_thread() is not self._tuning:
            raise PrunelabError(f"{what}: a fine-tuning is under way; stop it first, or wait")

    @contextmanager
    def _errors_shown(self, again: bool = True) -> Iterator[None]:
        """An error leaves itself on the screen instead of an old picture, and is raised ``again``."""
        self._errors.outputs = ()
        try:
            yield
        except Exception as error:
            self._failure = self._failure or error
            self._words = ""
            for part in (self._sentence, self._facts, self._curve, self._bars, self._table):
                part.value = ""
            name, trace = type(error).__name__, traceback.format_exception(error)
            self._errors.outputs = ({"output_type": "error", "ename": name, "evalue": str(error), "traceback": trace},)
            if again:
                raise

    def _say(self, words: str) -> None:
        self._controls.note.value = html.escape(words)

    # -- a picture ----------------------------------------------------------------------------------------------------

    def _show(self, position: Position) -> None:
        """Prune, measure what was not yet measured, and draw."""
        subject = self._subject
        masks, here = subject.masks(position), (subject.base.number, position)
        rows = [row for row in masks.by_layer() if len(row["shape"]) > 1]
        kept, total = (sum(row[key] for row in rows) for key in ("kept", "total"))
        sparsity = 1 - kept / total
        if here not in self._visited:
            self._visited[here] = sparsity, subject.accuracy(masks)
        accuracy = self._visited[here][1]
        self._masks, self._shown = masks, position
        self._words = self._describe(position, masks, sparsity, accuracy)
        self._sentence.value = f'<p role="status" aria-live="polite" style="line-height:1.4;min-height:2.8em;margin:4px 0 0">{html.escape(self._words)}</p>'
        self._facts.value = live_view.page(self._numbers(masks, kept, total, accuracy))
        points, past = self._points(position)
        about = f"Accuracy against pruning rate, {len(points)} visited. {self._words}"
        self._curve.value = live_view.page(
            live_view.curve(points, (position.rate, accuracy), self._dense_accuracy, about, past)
        )
        self._draw_histogram(position)
        self._table.value = live_view.page(live_view.layers(rows, subject.units(masks)))
        self._controls.suit(position, subject.competing(position), bool(self._past))

    def _describe(self, position: Position, masks: Masks, sparsity: float, accuracy: float) -> str:
        own, base = own_words(position), self._subject.base
        tuned = f" after {base.epochs} epoch{'s' * (base.epochs > 1)} of fine-tuning" * bool(base.epochs)
        words = (
            f"At a pruning rate of {per_cent(position.rate)}{f', {own}' * bool(own)} (sparsity {sparsity:.3f})"
            f"{tuned} accuracy on {self.sample} is {per_cent(accuracy, 1)}, dense {per_cent(self._dense_accuracy, 1)}."
        )
        if base.epochs and masks.kept == base.masks.kept and position.rate < sparsity - 0.005:
            words += " What was gone before the fine-tuning stays gone."
        if dead := dead_layers(self._subject.module, masks):
            words += f" Layer {', '.join(dead)} is cut off: the answers no longer depend on the input."
        return words

    def _numbers(self, masks: Masks, kept: int, total: int, accuracy: float) -> str:
        work, width = self._subject.work(masks), self._subject.bytes_each
        macs = [(short(work[0]), f"effective MACs of {short(work[1])}")] if work else []
        return live_view.facts(
            [
                (per_cent(accuracy, 1), f"accuracy, dense {per_cent(self._dense_accuracy, 1)}"),
                (f"{1 - kept / total:.3f}", f"sparsity, {short(kept)} of {short(total)} left"),
                *macs,
                (live_view.size(kept * width), f"non-zero weights of {live_view.size(total * width)}"),
            ]
        )

    def _points(self, position: Position) -> tuple[list[live_view.Point], list[list[live_view.Point]]]:
        """What was visited of this curve, and of those of the networks that this one was fine-tuned from."""
        curves: dict[int, list[live_view.Point]] = {}
        for (network, other), (_, accuracy) in self._visited.items():
            if other.setting == position.setting:
                curves.setdefault(network, []).append((other.rate, accuracy))
        now = self._subject.base.number
        before = dict.fromkeys(base.number for _, base in self._past if base.number != now)
        return curves[now], [curves[network] for network in before if network in curves]

    def _draw_histogram(self, position: Position) -> None:
        found = self._subject.histogram(position, self._masks, self._controls.layer.value)
        if found.there == found.kept:
            cut = "all are kept"
        elif found.threshold is not None:
            cut = f"threshold: |w| = {found.threshold:.3g}"
        else:
            cut = "no one threshold in size"
        drawn = live_view.histogram(found.edge, found.there, found.kept, found.threshold, cut)
        self._bars.value = live_view.page(drawn)


def _refuse(what: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise PrunelabError(f"PruningExplorer: {what} = {value!r}: {nearest(value, known)}")
