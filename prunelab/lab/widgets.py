"""Widgets on stored results: a slider over what was measured, not over what lies between; nothing trains here."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prunelab import plots
from prunelab.errors import PrunelabError, as_output
from prunelab.lab import versus
from prunelab.plots import marks, tables
from prunelab.plots.pictures import Look, Picture
from prunelab.runs.columns import need, quantity

if TYPE_CHECKING:
    import pandas as pd
    from ipywidgets import VBox

    from prunelab.stats import Interval

ALL = "all (mean)"  # also its value: a dropdown whose value is None shows nothing
DIGITS = 4  # significant ones; positions that agree in so many are one, since seeds differ a little in what they reach
DPI = 120  # of the picture in a widget
LEFT = ("density", "fraction", "weights", "parameters", "units", "filters", "neurons_share", "kib")
LEFT += ("macs", "effective_macs")
BESIDE = ("test_accuracy", "validation_accuracy", "validation_loss", "weights", "units", "seconds")


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown at one position of the slider: the same thing as a picture, a table and a sentence."""

    picture: Picture
    table: tables.Table
    sentence: str


def explore(
    rows: pd.DataFrame,
    x: str = "density",
    y: str = "test_accuracy",
    by: str | None = None,
    *,
    look: Look = "light",
) -> VBox:
    """Move through measured results: which strategy, which seed, and a slider over the values of ``x`` that exist.

    What the slider shows is there as a picture with alternative text, as a table and as a sentence. An error is shown
    in the widget, with its trace, and raised; a headless run finds it in the widget's state.

    Args:
        rows: of the store, rounds or epochs: ``x``, ``y``, ``by``, seed.
        x: column of the slider, for instance density, sparsity, round, epoch.
        y: column of the vertical axis.
        by: column of the strategies; None: ``strategy`` where there is one, otherwise ``method``.
        look: light or dark.

    Returns:
        An ``ipywidgets.VBox``: three controls, sentence, picture, table, and the place for errors. Where no kernel
        runs, on GitHub or in Markdown, it is the picture and the sentence.

    Raises:
        ImportError: ipywidgets is not installed.
        PrunelabError: a column that is missing or was never measured.
    """
    by = by or ("strategy" if "strategy" in rows else "method")
    measured = need(rows, [x, y, by, "seed"], "widgets.explore", by).dropna(subset=[x, y])
    need(measured, [], f"widgets.explore, {y} against {x}")
    measured = measured.assign(**{x: measured[x].map(lambda value: float(f"{value:.{DIGITS}g}"))})
    return _Explorer(measured, x, y, by, look).box


def compare(rows: pd.DataFrame, x: str = "compression_ratio", y: str = "test_accuracy", by: str | None = None) -> VBox:
    """Two methods among all, at one measured compression: error bars with n, and the verdict in a sentence.

    Nothing is interpolated. An error is shown in the widget, with its trace, and raised.

    Args:
        rows: runs, one row per run and round: ``x``, ``y``, ``by``, seed; or means, as in a committed CSV: ``x``,
            ``y``, ``y_half``, ``by``, n. Positions of the slider are the rounds, where there is a column round.
        x: column that says how much is compressed.
        y: column that is compared.
        by: column of the methods; None: ``strategy`` where there is one, otherwise ``method``.

    Returns:
        An ``ipywidgets.VBox``: four controls, sentence, table with pictures, and the place for errors. Where no kernel
        runs, it is a picture and the sentence.

    Raises:
        ImportError: ipywidgets is not installed.
        PrunelabError: a column that is missing or was never measured, or fewer than two methods.
    """
    return _Comparison(versus.Results.of(rows, x, y, by)).box


def positions(rows: pd.DataFrame, x: str, by: str, choice: Any, seed: int | None = None) -> list[float]:
    """The values of ``x`` that were measured for a strategy and a seed (None: any), in the order of pruning."""
    found = _chosen(rows, by, choice, seed)[x].unique().tolist()
    return sorted(found, reverse=x in LEFT)  # what is left of a network falls as it is pruned


def view(
    rows: pd.DataFrame, x: str, y: str, by: str, choice: Any, seed: int | None, at: float, look: Look = "light"
) -> View:
    """What ``explore`` shows at one position; plain values in, so it is of use and tested without any widget.

    Args:
        rows: of the store.
        x: column of the position.
        y: column that is shown.
        by: column of the strategies.
        choice: one of them.
        seed: a single seed; None: the mean over all, with its interval.
        at: a value of ``x`` that was measured.
        look: light or dark.

    Raises:
        PrunelabError: a position that was not measured; nothing is interpolated.
    """
    own = _chosen(rows, by, choice, seed)
    here = own[own[x] == at]
    known = positions(rows, x, by, choice, seed)
    if here.empty:
        near = f"; the nearest is {min(known, key=lambda value: abs(value - at)):g}" if known else ""
        raise PrunelabError(f"widgets: {x} = {at:g} was not measured for {choice!r}{near}")
    everyone = rows if seed is None else rows[rows["seed"] == seed]
    picture = plots.curve(everyone, x, y, by, mark=at, chosen=choice, look=look)
    beside = [column for column in BESIDE if column in own and column not in (x, y)][:3]
    table = tables.comparison(own.sort_values(x, ascending=x not in LEFT), by=x, metrics=[y, *beside])
    table = dataclasses.replace(table, chosen=known.index(at))
    return View(picture, table, _sentence(marks.level(here[y]), x, y, choice, seed, at))


def _chosen(rows: pd.DataFrame, by: str, choice: Any, seed: int | None) -> pd.DataFrame:
    return rows[(rows[by] == choice) & ((rows["seed"] == seed) if seed is not None else True)]


def _sentence(level: Interval, x: str, y: str, choice: Any, seed: int | None, at: float) -> str:
    """``dropnet: at sparsity 0.95 test accuracy is 97.10 % ± 0.31 (n = 3).``."""
    across, up = quantity(x), quantity(y)
    count = f"n = {level.n}" if seed is None else f"seed {seed}"
    where = f"{across.label.partition(' (')[0]} {across.text(at)}"
    if x == "density":
        where += f" (sparsity {quantity('sparsity').text(1 - at)})"
    return f"{choice}: at {where} {up.label} is {up.text(level.mean, level.half)} ({count})."


class _Explorer:
    """The controls of ``explore`` and what happens when one of them moves."""

    def __init__(self, rows: pd.DataFrame, x: str, y: str, by: str, look: Look) -> None:
        widgets = _ipywidgets()
        self.rows, self.x, self.y, self.by, self.look = rows, x, y, by, look
        wide = {"description_width": "initial"}
        room = widgets.Layout(width="36em", max_width="100%")
        heading = by.rpartition(".")[2].replace("_", " ")
        choices = rows[by].unique().tolist()
        self.choice = widgets.Dropdown(options=choices, description=heading, style=wide, layout=room)
        self.seed = widgets.Dropdown(options=[ALL], description="seed", style=wide, layout=room)
        self.slider = widgets.SelectionSlider(
            options=[0.0],
            description=quantity(x).axis,
            continuous_update=False,  # a picture takes a tenth of a second: one per stop, none on the way
            style=wide,
            layout=room,
            tooltip="moves over measured values only",
        )
        self.sentence, self.picture, self.table = (widgets.HTML() for _ in range(3))
        self.errors = widgets.Output()
        self.table.layout = widgets.Layout(max_height="18em", overflow="auto")
        self.slider.add_class("prunelab-picked")
        controls, self.shown = [self.choice, self.seed, self.slider], None
        self.box = _page([*controls, self.sentence, self.picture, self.table, self.errors], self._still)
        self.offering = False
        self._offer(None)
        self.choice.observe(self._offer, "value")
        self.seed.observe(self._offer, "value")
        self.slider.observe(self._draw, "value")

    def _offer(self, change: Any) -> None:
        """Offer the seeds and positions that exist for the choice, keep the nearest ones, and draw once."""
        if self.offering:
            return
        self.offering = True
        try:
            own = _chosen(self.rows, self.by, self.choice.value, None)
            seeds, seed, at = sorted(own["seed"].unique().tolist()), self.seed.value, self.slider.value
            self.seed.options = _seeds(seeds)
            self.seed.value = seed if seed in seeds else ALL
            known = positions(self.rows, self.x, self.by, self.choice.value, _seed(self.seed))
            self.slider.options = [(quantity(self.x).text(value), value) for value in known]
            middle = known[len(known) // 2]
            self.slider.value = middle if change is None else min(known, key=lambda value: abs(value - at))
        finally:
            self.offering = False
        self._draw(change)

    def _draw(self, change: Any) -> None:
        """Show what the controls say; what cannot be shown leaves its error there instead of an old picture."""
        if self.offering:
            return
        with _errors_in(self.errors, self.sentence, self.picture, self.table):
            shown = view(
                self.rows, self.x, self.y, self.by, self.choice.value, _seed(self.seed), self.slider.value, self.look
            )
            self.shown = shown
            self.sentence.value = f'<p role="status" aria-live="polite">{html.escape(shown.sentence)}</p>'
            self.picture.value = shown.picture.html(DPI)
            self.table.value = shown.table._repr_html_()

    def _still(self) -> tuple[bytes, str]:
        return self.shown.picture.png(DPI), self.shown.sentence


class _Comparison:
    """The controls of ``compare``."""

    def __init__(self, results: versus.Results) -> None:
        widgets = _ipywidgets()
        self.results = results
        wide = {"style": {"description_width": "5em"}, "layout": {"width": "24em", "max_width": "100%"}}
        names = [(str(name), name) for name in results.methods]
        self.one = widgets.Dropdown(options=names, value=results.methods[1], description="compare", **wide)
        self.two = widgets.Dropdown(options=names, value=results.methods[0], description="with", **wide)
        seeds = _seeds(results.seeds)
        self.seed = widgets.Dropdown(options=seeds, description="seed", disabled=len(seeds) == 1, **wide)
        options = results.positions
        self.slider = widgets.SelectionSlider(
            options=options,
            value=options[len(options) // 2][1],
            description=quantity(results.x).label.partition(" (")[0],
            style={"description_width": "initial"},
            layout={"width": "44em", "max_width": "100%"},
            tooltip="moves over measured values only",
        )
        self.sentence, self.table, self.errors = widgets.HTML(), widgets.HTML(), widgets.Output()
        self.table.layout = {"overflow": "auto", "max_width": "100%"}
        row = widgets.HBox([self.one, self.two, self.seed], layout={"flex_flow": "row wrap"})
        self.slider.add_class("prunelab-picked")
        self.box = _page([self.slider, row, self.sentence, self.table, self.errors], self._still)
        for control in (self.slider, self.one, self.two, self.seed):
            control.observe(self._draw, "value")
        self._draw(None)

    @property
    def _at(self) -> tuple[Any, Any, Any, Any]:
        return self.one.value, self.two.value, self.slider.value, _seed(self.seed)

    def _still(self) -> tuple[bytes, str]:
        return self.results.picture(*self._at).png(DPI), self.results.words(*self._at)

    def _draw(self, _: Any) -> None:
        at = self._at
        with _errors_in(self.errors, self.sentence, self.table):
            words, table = self.results.words(*at), self.results.html(*at)
            self.sentence.value = (
                f'<p role="status" aria-live="polite" style="line-height:1.4;min-height:2.8em">{html.escape(words)}</p>'
            )
            self.table.value = table


def _seeds(seeds: list[Any]) -> list[tuple[str, Any]]:
    """What a control of seeds offers."""
    return [(ALL, ALL), *((str(seed), seed) for seed in seeds)]


def _seed(control: Any) -> Any:
    """The seed that is chosen; None: all."""
    return None if control.value == ALL else control.value


@contextmanager
def _errors_in(output: Any, *parts: Any) -> Iterator[None]:
    """An error is shown in ``output``, with its trace, instead of old ``parts``, and raised."""
    output.outputs = ()
    try:
        yield
    except Exception as error:
        for part in parts:
            part.value = ""
        output.outputs = (as_output(error),)
        raise


def _page(children: list[Any], still: Any) -> VBox:
    from prunelab.lab.page import Page

    return Page(children, still)


def _ipywidgets() -> Any:
    """The optional dependency, or one line that says how to get it."""
    try:
        import ipywidgets
    except ImportError:
        raise ImportError("widgets need ipywidgets: install it with pip install 'prunelab[lab]'") from None
    return ipywidgets
