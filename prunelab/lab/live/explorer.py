"""A slider on a model that is in memory: what pruning does to it, seen while the slider moves.

The one module above both sides: it computes with torch (``live.pruning``, ``live.training``) and shows with widgets
(``live.screen``). The model itself is never changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import html
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor, nn

from prunelab import pruners
from prunelab.data import Dataset
from prunelab.errors import PrunelabError, nearest
from prunelab.lab.live.controls import BUTTONS, LAST_SEED, SCOPES, Controls, own_words, widgets
from prunelab.lab.live.pruning import TRAINING, Base, Position, Subject
from prunelab.lab.live.sample import Evaluate, Part
from prunelab.lab.live.screen import Screen, label_of
from prunelab.lab.live.training import FineTuning
from prunelab.lab.live.view import Other, Point
from prunelab.lab.page import Page
from prunelab.masks import Masks, layer_of
from prunelab.pruners.measures import chosen
from prunelab.pruners.select import check_amount
from prunelab.settings import Train
from prunelab.structure import export

STANDARD = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # those that a sweep visits
HURRY, REST = 0.2, 0.02  # seconds: what a move may measure for, and how long the rest of it waits for another move
SETTLED = 0.5  # seconds without a move, after which the network is shrunk and timed
PAUSE = 1.0  # seconds; moves of one control that follow each other faster are undone together


class PruningExplorer(Page):
    """Controls, one sentence, a curve that fills in as rates are visited, a histogram of the weights, and the layers.

    The layers are shown by their units, or (``view``) as a drawing of the network; of a classifier there are accuracy
    by class, the confusion of classes and samples whose answer changed, too.

    The masks are those of ``prunelab.prune`` with the same method, granularity, scope, seed and ``allow_empty=True``,
    for the scores, which are computed once, go through the method's own selection. While the kernel is busy the browser
    holds back all positions but the latest, so nothing queues up; where a network is slow to measure, the accuracy on
    part of the sample is shown first, and said to be that. ``rate``, ``percent``, ``compression``, ``score``,
    ``granularity``, ``scope``, ``seed`` and ``own`` (layer -> slider) are the controls. An error is shown in red in the
    widget and raised; ``check`` raises it again, for runs that nobody watches.

    A fine-tuning trains one epoch in the background, on the training part of the data set. From then on the rate still
    counts from the whole network, but what was gone stays gone; ``undo`` brings it back.

    Where no kernel runs, on GitHub or in Markdown, it is a picture of the curve and the sentence.

    Args:
        model: Any module. What is explored is a copy, in evaluation mode.
        data: A data set, of whose validation part a sample is drawn; inputs, as the model takes them, and targets;
            batches of them; a ``DataLoader`` or a ``torch.utils.data.Dataset``. None where ``evaluate`` is a function.
        method: What ranks the weights: one of those that ``explorer.score`` offers for this model.
        granularity: ``"weight"``, ``"neuron"``, ``"filter"`` or ``"unit"``, as far as the method and the model have it.
        scope: ``"global"`` or ``"layer"``.
        rate: Where the slider stands at first, in [0, 1): the fraction that goes of what may go.
        evaluate: Size of the sample; all where there are fewer. It is drawn once, by a seed of its own, and lies in
            memory as float32. Or a function that takes a model and gives name -> number, the first of which is drawn.
        batches: Inputs and targets, for methods that look at data; None: 1,000 of the training part, if there is one.
        seed: Of the pruning: random scores, and lots among equal ones.
        tuning: Settings of the fine-tuning, the number of epochs apart; the default is that of ``Train``.
        part: Of a data set: ``"validation"``, or ``"test"``, whose numbers nothing should be chosen by.
        metric: Function of all outputs and targets -> a number, more is better, in place of the usual measure: accuracy
            for labels, mean IoU for maps of labels, RMSE for floats.
        loss: Likewise, less is better; scores that follow a gradient follow its.
        better: Of what an ``evaluate`` function gives, ``"higher"`` or ``"lower"`` is better.
        state: ``explorer.state`` of another explorer, from which all controls are set.

    Attributes:
        kept: The masks that were kept last (button or ``keep``); None before.
        sample: What is measured on, such as ``"2,000 validation images"``.

    Raises:
        PrunelabError: one line, before anything is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        method: str = "magnitude",
        granularity: str | None = None,
        scope: str = "global",
        rate: float = 0.9,
        evaluate: int | Evaluate = 2000,
        batches: Iterable[Any] | None = None,
        seed: int = 0,
        tuning: Train | None = None,
        part: Part = "validation",
        metric: Callable[[Any, Any], Any] | None = None,
        loss: Callable[[Any, Any], Any] | None = None,
        better: Literal["higher", "lower"] = "higher",
        state: Mapping[str, Any] | None = None,
    ) -> None:
        own: tuple[tuple[str, float], ...] = ()
        if state is not None:
            method, granularity, scope, seed, own, rate = _position(state)
        _refuse("scope", scope, SCOPES.values())
        _refuse("better", better, ("higher", "lower"))
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LAST_SEED:
            raise PrunelabError(f"seed = {seed!r}: should be a whole number from 0 to {LAST_SEED}")
        for each in (rate, *(amount for _, amount in own)):
            check_amount(each)
        measure = chosen(metric, loss)
        if callable(evaluate) and measure is not None:
            raise PrunelabError("evaluate= is a function, and metric= or loss= is given too: give one of them")
        self._subject = Subject(model, data, evaluate, batches, part, measure, better == "higher", loss)
        _refuse("method", method, self._subject.offered)
        granularity = granularity or self._subject.offered[method][0]
        _refuse("granularity", granularity, self._subject.offered[method])
        self._data, self._train = data if isinstance(data, Dataset) else None, tuning or Train()
        self._drawn = batches is None  # those that scores look at
        self.sample, self.kept = self._subject.sample, None
        self._lock, self._tuning, self._failure = threading.RLock(), None, None
        self._past: list[tuple[Position, Base]] = []  # what undo goes back to, the latest last
        self._mover, self._moved, self._tuned_nets = None, 0.0, 0
        self._visited: dict[tuple[int, Position], tuple[float, float]] = {}
        self._answers: dict[tuple[int, Position], np.ndarray | None] = {}  # of those positions, where there are labels
        self._pinned: tuple[int, Position] | None = None
        self._epochs = {0: 0}  # network -> epochs of fine-tuning
        self._masks, self._rest = self._subject.dense, None
        first = Position(method, granularity, scope, seed, own, float(rate))
        layers = [layer_of(name) for name in self._masks]
        for layer, _ in own:
            _refuse("own", layer, layers)
        acts = (self.sweep, self.undo, self.pin, self.keep, self.fine_tune, self.stop, self._show_code)
        acts += (self.save_masks, self.save_model)
        press = {name: functools.partial(self._clicked, act) for name, act in zip(BUTTONS, acts, strict=True)}
        self._controls = Controls(
            first, self._subject.offered, layers, self._data is not None, self._move, self._choose, self._look, press
        )
        shown = "rate", "percent", "compression", "axis", "score", "granularity", "scope", "seed", "own", "layer"
        for name in (*shown, "view", "buttons", "progress"):
            setattr(self, name, getattr(self._controls, name))
        self._screen, self._words, self._shown = Screen(self._subject, self._controls), "", first
        super().__init__([*self._controls.rows, *self._screen.rows], self._still)
        self._controls.set(first)
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
        scope, seed, own (layers with a rate of their own), rate, sparsity, accuracy (on the sample; by its own name
        where something else is measured).
        """
        columns = ["network", "epochs", "method", "granularity", "scope", "seed", "own", "rate", "sparsity"]
        columns.append(self._subject.measure.name)
        rows = [
            (network, self._epochs[network], *at.setting[:4], own_words(at), at.rate, *found)
            for (network, at), found in self._visited.items()
        ]
        return pd.DataFrame(rows, columns=columns)

    @property
    def state(self) -> dict[str, Any]:
        """Where the controls stand, as plain values; ``PruningExplorer(model, data, state=...)`` begins there."""
        at = self._shown
        setting = {"method": at.method, "granularity": at.granularity, "scope": at.scope, "seed": at.seed}
        return {**setting, "own": dict(at.own), "rate": at.rate}

    @property
    def code(self) -> str:
        """The lines that make the masks that are shown, without the widget.

        Where no such lines give the same masks (after a fine-tuning; of random scores, or equal ones, with layers of
        their own rates), they read the file that ``save_masks`` writes.
        """
        at, subject = self._shown, self._subject
        options = {"seed": at.seed, "allow_empty": True, **_options(at)}
        competing, own = subject.competing(at), dict(at.own)
        rest = [layer for layer in self.own if layer in competing and layer not in own]
        calls = [(at.rate, {"layers": rest, **options} if own else options)] * bool(rest)
        calls += [(rate, {"layers": [layer], **options}) for layer, rate in own.items() if layer in competing]
        same = not subject.base.epochs
        if same and own:
            made = Masks({})
            for rate, how in calls:
                made &= pruners.prune(
                    subject.module, at.method, rate, batches=subject.batches, loss=subject.loss, **how
                )
            same = made == self._masks
        if not same:
            file = self._file("masks").name
            return f"from prunelab import Masks\n\nmasks = Masks.load({file!r})  # after explorer.save_masks()"
        lines, reads = ["from prunelab import prune", ""], subject.reads_data(at)
        lines = ["import torch", *lines] if reads and subject.loss is nn.functional.mse_loss else lines
        if reads and self._drawn:
            part = f"images.train.x[:{TRAINING}], images.train.y[:{TRAINING}]  # images: the data set"
            lines += [f"x, y = {part}", "batches = [(images.scale(x), images.target(y))]"]
        elif reads:
            lines.append("batches = ...  # those that the explorer was given")
        for number, (rate, how) in enumerate(calls):
            own_loss = "torch.nn.functional.mse_loss" if subject.loss is nn.functional.mse_loss else "loss"
            reading = ["batches=batches", *[f"loss={own_loss}"] * (subject.loss is not None)] * reads
            words = ", ".join([*(f"{key}={value!r}" for key, value in how.items()), *reading])
            lines.append(f"masks {'&' * bool(number)}= prune(model, {at.method!r}, {rate!r}, {words})")
        return "\n".join([*lines, "masks.apply_(model)"])

    def save_masks(self, path: str | Path | None = None) -> Path:
        """Write the masks that are shown to a safetensors file, which ``Masks.load`` reads; returns its path.

        Args:
            path: Of the file; None: a name that says the score and the rate, in the current folder.
        """
        with self._lock:
            path = Path(path) if path is not None else self._file("masks")
            self._masks.save(path)
            self._say(f"Saved: {path.resolve()}")
            return path

    def save_model(self, path: str | Path | None = None) -> Path:
        """Write the network that is shown, without what is gone, to a file for ``export.load``; returns its path.

        Args:
            path: Of the file; None: a name that says the score and the rate, in the current folder.

        Raises:
            PrunelabError: the network cannot be made smaller, or the file not be written.
        """
        with self._lock:
            path = export.save(path or self._file("model"), self._subject.small(self._masks))
            self._say(f"Saved: {path.resolve()}")
            return path

    def shrunk(self) -> dict[str, tuple[float, float]]:
        """What the network that is shown costs without what is gone, and the whole one, measured now, and shown.

        Returns:
            parameters, macs (of a sample), bytes and latency (seconds, of 32 samples, the median of seven turns), each
            with that of the whole network. When whole neurons or filters go and the hand rests, it is shown by itself.

        Raises:
            PrunelabError: the network cannot be made smaller.
        """
        with self._lock:
            found = self._subject.shrunk(self._masks)
            self._screen.show_shrunk(self._masks, found)
            return found

    def pin(self) -> None:
        """Hold the curve that is shown beside the next ones, or let go of the one that is held.

        While it is held, what it gives at the same rate is measured with every move, and the sentence compares them.
        """
        with self._lock, self._errors_shown():
            here = self._subject.base.number, self._shown
            held = self._pinned is not None and self._pinned[1].setting == self._shown.setting
            self._pinned = None if held else here
            self._show(self._shown)
            self._say(f"{'Let go of' if held else 'Pinned'}: {label_of(self._shown)}.")

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
            self._say(f"Kept as explorer.kept: sparsity {self._subject.sparsity(self._masks):.3f}.")
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
            self._say("")
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

    def close(self) -> None:
        """Take everything off the screen and end the fine-tuning, if there is one; nothing holds the network then."""
        tuning, self._rest = getattr(self, "_tuning", None), None
        if tuning is not None:
            tuning.stop()
        left: list[Any] = list(self.children)
        while left:  # ipywidgets keeps each of them, and what it calls, until it is closed itself
            left += getattr(part := left.pop(), "children", ())
            part.close()
        super().close()

    def __repr__(self) -> str:
        return self._words

    # -- what happens -------------------------------------------------------------------------------------------------

    def _move(self, change: Mapping[str, Any]) -> None:
        """A control moved."""
        with self._lock, self._errors_shown():
            self._remember(change["owner"])
            self._say("")
            self._show(self._controls.position, _from_browser(change["owner"]))

    def _choose(self, _: Any) -> None:
        """Another layer's histogram."""
        with self._lock, self._errors_shown():
            self._screen.show_weights(self._shown, self._masks, self.layer.value)

    def _look(self, change: Mapping[str, Any]) -> None:
        """Another view below, or another axis of the curve."""
        with self._lock, self._errors_shown():
            if change["owner"] is self.view:
                self._show_below()
            elif (here := (self._subject.base.number, self._shown)) in self._visited:
                self._draw_value(self._visited[here][1], self._subject.samples)

    def _show_code(self) -> None:
        """The lines, or no longer; a fold would need a place of its own."""
        part = self._controls.code
        part.layout.display = "" if part.layout.display == "none" else "none"
        self._refresh_code()

    def _refresh_code(self) -> None:
        if self._controls.code.layout.display != "none":
            style = "white-space:pre-wrap;user-select:all;margin:4px 0;padding:6px 10px;border-left:3px solid #888"
            self._controls.code.value = f'<pre style="{style}">{html.escape(self.code)}</pre>'

    def _file(self, what: str) -> Path:
        at = self._shown
        return Path(f"{what}_{at.method}_{at.granularity}_{100 * at.rate:g}.safetensors")

    def _still(self) -> tuple[bytes, str]:
        points, others = self._points(self._shown)
        return self._screen.still(self._shown, points, others), self._words

    def _clicked(self, act: Any, button: widgets.Button) -> None:
        if button.disabled:  # the second press of a double click, which the browser sent before it heard of the first
            return
        with self._errors_shown():
            act()

    def _remember(self, mover: widgets.Widget | None) -> None:
        """Before a change: what is shown now can be had back."""
        now = time.monotonic()
        fast = mover is not None and mover is self._mover and now - self._moved <= PAUSE
        if self._words and not fast:  # an error is nothing to go back to
            self._past.append((self._shown, self._subject.base))
        self._mover, self._moved = mover, now
        self.buttons["undo"].disabled = not self._past

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
        self._screen.errors.outputs = ()
        try:
            yield
        except Exception as error:
            self._failure, self._words = self._failure or error, ""
            self._screen.show_error(error)
            if again:
                raise

    def _say(self, words: str) -> None:
        self._controls.note.value = html.escape(words)

    # -- a picture ----------------------------------------------------------------------------------------------------

    def _show(self, position: Position, browser: asyncio.AbstractEventLoop | None = None) -> None:
        """Prune, measure what was not yet measured, and draw.

        For the ``browser`` only as much is measured as there is time for; the rest follows when no move waits.
        """
        begin, self._rest = time.monotonic(), None
        subject, self._shown = self._subject, position
        self._masks = subject.masks(position)
        here = subject.base.number, position
        if here not in self._visited:
            parts = subject.answers(self._masks)
            value, seen = 0.0, 0
            for value, seen in parts:  # noqa: B007 - the last ones are used
                if browser is not None and seen < subject.samples and time.monotonic() - begin > HURRY:
                    self._rest = browser, parts
                    browser.call_later(REST, self._go_on, parts)
                    break
            self._measured(value, seen)
        else:
            self._draw_value(self._visited[here][1], subject.samples)
        self._screen.show_weights(position, self._masks, self.layer.value)
        self._show_below()
        self._controls.suit(position, subject.competing(position), bool(self._past))
        self._refresh_code()
        if browser is not None and position.granularity != "weight":
            browser.call_later(SETTLED, self._show_shrunk, position)

    def _show_shrunk(self, position: Position) -> None:
        """What shrinking gives, once the hand rests; nothing where the network cannot be made smaller."""
        with self._lock, self._errors_shown(again=False):
            if self._shown is position and self._rest is None and self._masks.weights.sparsity > 0:
                with contextlib.suppress(PrunelabError):  # the button "save small model" says why
                    self.shrunk()

    def _show_below(self) -> None:
        answers = self._answers.get((self._subject.base.number, self._shown))
        self._screen.show_below(self._shown, self._masks, self.view.value, answers)

    def _go_on(self, parts: Iterator[tuple[float, int]]) -> None:
        """Measure a little more, unless there was a move meanwhile."""
        with self._lock:
            if self._rest is None or self._rest[1] is not parts:
                return
            with self._errors_shown(again=False):
                value, seen = next(parts)
                self._measured(value, seen)
                if seen < self._subject.samples:
                    self._rest[0].call_later(0, self._go_on, parts)
                else:
                    self._rest = None
                    self._show_below()

    def _measured(self, value: float, seen: int) -> None:
        """Note the value, once it is that of the whole sample, and show it."""
        if seen == self._subject.samples:
            here = self._subject.base.number, self._shown
            self._visited[here] = self._subject.sparsity(self._masks), value
            self._answers[here] = self._subject.answered()
            self._measure_pinned()
        self._draw_value(value, seen)

    def _measure_pinned(self) -> None:
        """What the pinned setting gives at the rate that is shown."""
        if self._pinned is None or self._pinned[0] != self._subject.base.number:
            return
        other = Position(*self._pinned[1].setting, self._shown.rate)
        if (here := (self._pinned[0], other)) not in self._visited:
            masks = self._subject.masks(other)
            self._visited[here] = self._subject.sparsity(masks), self._subject.value(masks)
            self._answers[here] = self._subject.answered()

    def _draw_value(self, value: float, seen: int) -> None:
        points, others = self._points(self._shown)
        number, at = self._subject.base.number, self._shown
        pinned = None
        if self._pinned is not None and self._pinned[1].setting != at.setting and seen == self._subject.samples:
            self._measure_pinned()
            other = Position(*self._pinned[1].setting, at.rate)
            if (self._pinned[0], other) in self._visited:
                pinned = other, self._visited[self._pinned[0], other][1]
                points, others = self._points(at)
        answers = self._answers.get((number, at)) if seen == self._subject.samples else None
        self._words = self._screen.show_value(at, self._masks, value, seen, points, others, answers, pinned)

    def _points(self, position: Position) -> tuple[list[Point], list[Other]]:
        """What was visited of this curve, and of others: pinned, of other settings, of networks before fine-tuning."""
        curves: dict[tuple[int, tuple[Any, ...]], list[Point]] = {}
        places: dict[tuple[int, tuple[Any, ...]], Position] = {}
        for (network, other), (_, value) in self._visited.items():
            curves.setdefault((network, other.setting), []).append((other.rate, value))
            places[network, other.setting] = other
        now, setting = self._subject.base.number, position.setting
        before = {base.number for _, base in self._past if base.number != now}
        pinned = None if self._pinned is None else (self._pinned[0], self._pinned[1].setting)
        others = []
        for key, points in curves.items():
            if key == (now, setting):
                continue
            if key == pinned or key[0] == now or (key[0] in before and key[1] == setting):
                label = f"{label_of(places[key])}{f', {own_words(places[key])}' * bool(places[key].own)}"
                kind = "pinned" if key == pinned else "other" if key[0] == now else "past"
                others.append(Other(label, points, kind))
        return curves.get((now, setting), []), others


def _options(position: Position) -> dict[str, Any]:
    """What ``prune`` has to be told beside method, rate and seed."""
    free = "granularity" not in pruners.METHODS[position.method].preset
    return {"scope": position.scope, **({"granularity": position.granularity} if free else {})}


def _position(state: Mapping[str, Any]) -> tuple[str, str | None, str, int, tuple[tuple[str, float], ...], float]:
    """Where the controls stood, from ``PruningExplorer.state``."""
    known = ("method", "granularity", "scope", "seed", "own", "rate")
    if not isinstance(state, Mapping) or {*state} != {*known}:
        given = ", ".join(map(str, state)) if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise PrunelabError(f"state has {given or 'nothing'}: should be explorer.state, with {', '.join(known)}")
    return *(state[key] for key in known[:4]), tuple(dict(state["own"]).items()), state["rate"]


def _from_browser(control: widgets.Widget) -> asyncio.AbstractEventLoop | None:
    """The kernel's loop, where a person moved the control; None where a program did, which wants the whole answer."""
    if not getattr(control, "_property_lock", None):  # what ipywidgets is taking over from the browser right now
        return None
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _refuse(what: str, value: Any, known: Iterable[str]) -> None:
    if value not in known:
        raise PrunelabError(f"PruningExplorer: {what} = {value!r}: {nearest(value, known)}")
