"""The controls of ``live``: sliders, choices and buttons, and the position that they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prunelab.lab.live.pruning import EVERYTHING, Position
from prunelab.lab.live.view import LARGEST, per_cent
from prunelab.lab.page import widgets
from prunelab.runs.columns import TIMES

STEPS = (*(per_cent / 100 for per_cent in range(100)), 0.995, 0.999)  # positions of the slider
SCOPES = {"all layers compete": "global", "each layer by itself": "layer"}
AXES = {"pruning rate": "rate", "compression": "compression"}
VIEWS = {
    "units": "each unit of each layer",
    "network": "the units that live, and the connections between them",
    "classes": "who pays: accuracy by class",
    "confusion": "right classes and answers",
    "changed": "ten samples whose answer changed",
}
KINDS = {"weight": "weights", "neuron": "neurons", "filter": "filters", "unit": "neurons and filters"}
ABOVE = -1.0  # what a layer's own slider says while the layer has no rate of its own
STEP = 0.01  # of the slider of compression, in powers of 10
LAST_SEED = 2**31 - 1
BUTTONS = {
    "sweep": "visit the standard pruning rates",
    "undo": "back to what was shown before the last change",
    "pin": "hold this score, scope and granularity beside the next ones; once more: let go of it",
    "keep these masks": "put them aside as explorer.kept",
    "fine-tune 1 epoch": "train the pruned network on the training part of the data",
    "stop": "end the fine-tuning; the network stays as it was before",
    "copy as code": "the lines that make this without the widget",
    "save masks": "write them to a file",
    "save small model": "write the network without what is gone to a file",
}
UNTRAINABLE = "there is no training part: give the explorer a data set, as prunelab.data.load does"


class Controls:
    """Widgets, and nothing of what they set off.

    Args:
        first: what they say at first.
        offered: score -> granularities.
        layers: that can have a rate of their own.
        trainable: whether there is something to fine-tune with.
        move: called with the change when one of them moves.
        choose: called when another layer's histogram is asked for.
        look: called when another view or another axis is asked for.
        press: name of a button -> what it does.
    """

    def __init__(
        self,
        first: Position,
        offered: Mapping[str, Sequence[str]],
        layers: Sequence[str],
        trainable: bool,
        move: Callable[[Mapping[str, Any]], None],
        choose: Callable[[Any], None],
        look: Callable[[Any], None],
        press: Mapping[str, Callable[[Any], None]],
    ) -> None:
        self._offered, self._trainable, self._quiet, self._move = offered, trainable, False, move
        rates, beside = _rates(first.rate), {"description_width": "9em"}
        room = widgets.Layout(width="44em", max_width="100%")
        self.rate = widgets.SelectionSlider(
            options=rates,
            value=first.rate,
            description="pruning rate",
            tooltip="the share that goes",
            readout=False,
            style=beside,
            layout=room,
        )
        self.percent = widgets.BoundedFloatText(
            value=100 * first.rate, max=99.99, step=0.1, description="%", tooltip="type the rate", **_width("8em")
        )
        self.compression = widgets.FloatLogSlider(
            value=_times(first.rate),
            max=3,
            step=STEP,
            readout_format=".3g",
            description=f"compression ({TIMES.strip()})",
            tooltip="times fewer: 1 / (1 - rate)",
            style=beside,
            layout=room,
        )
        self.axis = widgets.Dropdown(options=AXES.items(), description="axis", **_width("15em"))
        self.score = widgets.Dropdown(options=list(offered), value=first.method, description="score", **_width("13em"))
        self.granularity = widgets.Dropdown(description="what goes", **_width("15em"))
        self._offer(first.granularity)
        self.scope = widgets.Dropdown(options=SCOPES.items(), value=first.scope, description="scope", **_width("17em"))
        self.seed = widgets.BoundedIntText(value=first.seed, max=LAST_SEED, description="seed", **_width("8em"))
        wide, aside = widgets.Layout(width="44em", max_width="100%"), {"description_width": "9em"}
        choices = [("as above", ABOVE), *rates]
        self.own = {
            layer: widgets.SelectionSlider(options=choices, description=layer or "layer", style=aside, layout=wide)
            for layer in layers
        }
        for slider in self.own.values():
            slider.add_class("prunelab-picked")
        self.fold = widgets.Accordion([widgets.VBox(list(self.own.values()))], selected_index=None, titles=("",))
        self.buttons = {
            name: widgets.Button(description=name, tooltip=what, layout={"width": "auto"})
            for name, what in BUTTONS.items()
        }
        if not trainable:
            self.buttons["fine-tune 1 epoch"].tooltip = UNTRAINABLE
        self.progress = widgets.IntProgress(bar_style="info", layout={"width": "10em", "display": "none"})
        self.note = widgets.HTML()
        self.code = widgets.HTML(layout={"display": "none"})
        every = [("all layers", EVERYTHING), *((name or "layer", name) for name in layers if name)]
        self.layer = widgets.Dropdown(options=every, description="weights of", **_width("20em"))
        self.view = widgets.ToggleButtons(
            options=list(VIEWS), tooltips=list(VIEWS.values()), style={"button_width": "auto"}
        )
        self.view.observe(look, "value")
        for control in self._moving:
            control.observe(self._moved, "value")
        self.axis.observe(look, "value")
        self.layer.observe(choose, "value")
        for name, button in self.buttons.items():
            button.on_click(press[name])
        self.training(False, undoable=False)

    @property
    def rows(self) -> list[widgets.Widget]:
        """From top to bottom, which is also the order of the keyboard."""
        wrap = {"flex_flow": "row wrap", "align_items": "center"}
        return [
            widgets.HBox([self.rate, self.percent], layout=wrap),
            widgets.HBox([self.compression, self.axis], layout=wrap),
            widgets.HBox([self.score, self.granularity, self.scope, self.seed], layout=wrap),
            widgets.HBox([*self.buttons.values()], layout=wrap),
            widgets.HBox([self.progress, self.note], layout={"min_height": "32px"}),  # always, so that nothing jumps
            self.code,
            self.fold,
        ]

    @property
    def position(self) -> Position:
        """What they say."""
        own = tuple((layer, slider.value) for layer, slider in self.own.items() if slider.value != ABOVE)
        setting = self.score.value, self.granularity.value, self.scope.value, self.seed.value
        return Position(*setting, own, self.rate.value)

    def set(self, position: Position) -> None:
        """Let them say it, as if nobody had moved them."""
        with self._unheard():
            self.score.value = position.method
            self._offer(position.granularity)
            self.scope.value, self.seed.value = position.scope, position.seed
            self._rate(position.rate)
            for layer, slider in self.own.items():
                slider.value = dict(position.own).get(layer, ABOVE)

    def suit(self, position: Position, competing: set[str], undoable: bool) -> None:
        """Name and offer what the position has."""
        title = f"Layer by layer: {own_words(position) or 'no layer has a rate of its own'}"
        if self.fold.titles != (title,):
            self.fold.titles = (title,)
        for layer, slider in self.own.items():
            slider.disabled = self.rate.disabled or layer not in competing
        self.buttons["undo"].disabled = self.rate.disabled or not undoable

    def training(self, begun: bool, undoable: bool) -> None:
        """While it trains only one button can be pressed."""
        for control in (*self._moving, *self.buttons.values()):
            control.disabled = begun
        self.buttons["stop"].disabled = not begun
        self.buttons["undo"].disabled = begun or not undoable
        self.buttons["fine-tune 1 epoch"].disabled = begun or not self._trainable
        self.progress.value, self.progress.layout.display = 0, "" if begun else "none"

    @property
    def _moving(self) -> tuple[widgets.Widget, ...]:
        choices = self.score, self.granularity, self.scope, self.seed
        return self.rate, self.percent, self.compression, *choices, *self.own.values()

    def _moved(self, change: Mapping[str, Any]) -> None:
        # The browser rounds a compression to its own steps and says so: that is nobody's move.
        rounded = change["owner"] is self.compression and _steps_apart(self.compression.value, self.rate.value) < 0.6
        if self._quiet or rounded:
            return
        with self._unheard():
            if change["owner"] is self.score:
                self._offer(self.granularity.value)
            elif change["owner"] is self.percent:
                self._rate(round(self.percent.value / 100, 6))
            elif change["owner"] is self.compression:
                self._rate(round(1 - 1 / self.compression.value, 4))
            elif change["owner"] is self.rate:
                self._rate(self.rate.value)
        self._move(change)

    def _rate(self, rate: float) -> None:
        """The three controls of the rate say the same; one between the steps gets a step."""
        if rate not in [value for _, value in self.rate.options]:
            self.rate.options = _rates(rate)
        self.rate.value = rate
        if round(self.percent.value / 100, 6) != rate:
            self.percent.value = round(100 * rate, 4)
        if _steps_apart(self.compression.value, rate) >= 0.6:
            self.compression.value = _times(rate)

    def _offer(self, granularity: str) -> None:
        """Only the granularities that the score has."""
        kinds = self._offered[self.score.value]
        if (options := [(KINDS[kind], kind) for kind in kinds]) != list(self.granularity.options):
            self.granularity.options = options
        self.granularity.value = granularity if granularity in kinds else kinds[0]

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False


def _rates(rate: float) -> list[tuple[str, float]]:
    return [(per_cent(value), value) for value in sorted({*STEPS, rate})]


def _times(rate: float) -> float:
    return min(1 / (1 - rate), LARGEST)


def _steps_apart(times: float, rate: float) -> float:
    """How many steps of its slider a compression lies from a rate's."""
    return abs(math.log10(times / _times(rate))) / STEP


def own_words(position: Position) -> str:
    """``hidden_1 50 %, hidden_2 0 %``."""
    return ", ".join(f"{layer or 'the layer'} {per_cent(rate)}" for layer, rate in position.own)


def _width(width: str) -> dict[str, Any]:
    return {"style": {"description_width": "initial"}, "layout": {"width": width, "max_width": "100%"}}
