"""A slider on a model that is in memory: what pruning does to it, seen while the slider moves.

The one module above both sides: it computes with torch (``live.pruning``, ``live.training``) and shows with widgets
(``live.screen``). The model itself is never changed.
"""

from __future__ import annotations

import asyncio
import functools
import html
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
from torch import Tensor, nn

from prunelab.data import Dataset
from prunelab.errors import PrunelabError, nearest
from prunelab.lab.live.controls import BUTTONS, LAST_SEED, SCOPES, Controls, own_words, widgets
from prunelab.lab.live.pruning import Base, Position, Subject
from prunelab.lab.live.screen import Screen
from prunelab.lab.live.training import FineTuning
from prunelab.lab.live.view import Point
from prunelab.masks import Masks, layer_of
from prunelab.pruners.select import check_amount
from prunelab.settings import Train

STANDARD = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # those that a sweep visits
HURRY, REST = 0.2, 0.02  # seconds: what a move may measure for, and how long the rest of it waits for another move
PAUSE = 1.0  # seconds; moves of one control that follow each other faster are undone together


class PruningExplorer(widgets.VBox):
    """Controls, one sentence, a curve that fills in as rates are visited, a histogram of the weights, and the layers.

    The layers are shown by their units, or (``view``) as a drawing of the network.

    The masks are those of ``prunelab.prune`` with the same method, granularity, scope, seed and ``allow_empty=True``,
    for the scores, which are computed once, go through the method's own selection. While the kernel is busy the browser
    holds back all positions but the latest, so nothing queues up; where a network is slow to measure, the accuracy on
    part of the sample is shown first, and said to be that. ``rate``, ``score``, ``granularity``, ``scope``,
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
        self._masks, self._rest = self._subject.dense, None
        first = Position(method, granularity, scope, seed, (), float(rate))
        layers = [layer_of(name) for name in self._masks]
        acts = (self.sweep, self.undo, self.keep, self.fine_tune, self.stop)
        press = {name: functools.partial(self._clicked, act) for name, act in zip(BUTTONS, acts, strict=True)}
        self._controls = Controls(
            first, self._subject.offered, layers, self._data is not None, self._move, self._choose, self._look, press
        )
        for name in ("rate", "score", "granularity", "scope", "seed", "own", "layer", "view", "buttons", "progress"):
            setattr(self, name, getattr(self._controls, name))
        self._screen, self._words, self._shown = Screen(self._subject, self.layer, self.view), "", first
        super().__init__([*self._controls.rows, *self._screen.rows])
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

    def _look(self, _: Any) -> None:
        """The other view of the layers."""
        with self._lock, self._errors_shown():
            self._screen.show_layers(self._shown, self._masks, self.view.value)

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
            right = seen = 0
            for right, seen in parts:  # noqa: B007 - the last ones are used
                if browser is not None and seen < subject.samples and time.monotonic() - begin > HURRY:
                    self._rest = browser, parts
                    browser.call_later(REST, self._go_on, parts)
                    break
            self._measured(right, seen)
        else:
            self._draw_accuracy(self._visited[here][1], subject.samples)
        self._screen.show_weights(position, self._masks, self.layer.value)
        self._screen.show_layers(position, self._masks, self.view.value)
        self._controls.suit(position, subject.competing(position), bool(self._past))

    def _go_on(self, parts: Iterator[tuple[int, int]]) -> None:
        """Measure a little more, unless there was a move meanwhile."""
        with self._lock:
            if self._rest is None or self._rest[1] is not parts:
                return
            with self._errors_shown(again=False):
                right, seen = next(parts)
                self._measured(right, seen)
                if seen < self._subject.samples:
                    self._rest[0].call_later(0, self._go_on, parts)
                else:
                    self._rest = None

    def _measured(self, right: int, seen: int) -> None:
        """Note the accuracy, once it is that of the whole sample, and show it."""
        if seen == self._subject.samples:
            here = self._subject.base.number, self._shown
            self._visited[here] = self._subject.sparsity(self._masks), right / seen
        self._draw_accuracy(right / seen, seen)

    def _draw_accuracy(self, accuracy: float, seen: int) -> None:
        points, past = self._points(self._shown)
        self._words = self._screen.show_accuracy(self._shown, self._masks, accuracy, seen, points, past)

    def _points(self, position: Position) -> tuple[list[Point], list[list[Point]]]:
        """What was visited of this curve, and of those of the networks that this one was fine-tuned from."""
        curves: dict[int, list[Point]] = {}
        for (network, other), (_, accuracy) in self._visited.items():
            if other.setting == position.setting:
                curves.setdefault(network, []).append((other.rate, accuracy))
        now = self._subject.base.number
        before = dict.fromkeys(base.number for _, base in self._past if base.number != now)
        return curves.get(now, []), [curves[network] for network in before if network in curves]


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
