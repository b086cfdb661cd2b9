"""A widget in which a schedule is designed: curves that follow sliders, copied out as settings."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from prunelab.errors import PrunelabError, as_output
from prunelab.lab.page import Page, widgets
from prunelab.plots.layers import schedule_curves
from prunelab.plots.pictures import Look, Picture
from prunelab.pruners.schedules import Ramp
from prunelab.settings import Prune

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS = {
    "one-cycle: slow, fast, slow": "one_cycle",
    "gradual (AGP): a cubic that flattens out": "agp",
    "iterative: equal steps": "iterative",
    "one-shot: everything at once": "one_shot",
    "linear": "linear",
    "cosine": "cosine",
}
ROOM = "line-height:1.4;min-height:2.8em"  # two lines, so that the picture below them does not move


class ScheduleDesigner(Page):
    """Choose a schedule, move its parameters, and take it away as ``designer.settings``.

    The sliders that a schedule does not have are off. The others' curves stay in the picture, pale, for comparison. An
    error is shown in the widget and raised; ``check`` raises it again.

    Args:
        kind: a schedule of ``schedules.Ramp``.
        final: sparsity at the end.
        epochs: of the training, for the words.
        look: light or dark.
    """

    def __init__(self, kind: str = "one_cycle", final: float = 0.9, epochs: int = 25, look: Look = "light") -> None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise PrunelabError(f"ScheduleDesigner: epochs = {epochs!r}: should be a whole number, at least 1")
        first = Ramp(kind, final)  # type: ignore[arg-type]  # refuses what is none
        wide = {"style": {"description_width": "11em"}, "layout": {"width": "38em", "max_width": "100%"}}
        slider = {"continuous_update": False, **wide}
        self.kind = widgets.Dropdown(options=KINDS.items(), value=first.kind, description="schedule", **wide)
        self.final = widgets.FloatSlider(
            value=100 * final, min=0, max=max(99.9, 100 * final), step=0.1, description="final sparsity (%)", **slider
        )
        self.begin = widgets.FloatSlider(
            value=100 * first.begins, max=95, step=5, description="begins after (%)", **slider
        )
        self.alpha = widgets.FloatSlider(value=14, min=1, max=30, step=0.5, description="alpha: steepness", **slider)
        self.beta = widgets.FloatSlider(value=5, min=0, max=15, step=0.5, description="beta: middle", **slider)
        self.steps = widgets.IntSlider(value=3, min=1, max=12, description="steps", **slider)
        self.sentence, self.picture, self.code, self.errors = (
            *(widgets.HTML() for _ in range(3)),
            widgets.Output(),
        )
        self._epochs, self._look, self._failure = epochs, look, None
        controls = [self.kind, self.final, self.begin, self.alpha, self.beta, self.steps]
        super().__init__([*controls, self.sentence, self.picture, self.code, self.errors], self._still)
        self.kind.observe(self._other, "value")
        for control in controls[1:]:
            control.observe(self._draw, "value")
        self._draw(None)

    @property
    def ramp(self) -> Ramp:
        """The schedule that is shown."""
        return Ramp(
            self.kind.value,
            round(self.final.value / 100, 6),
            round(self.begin.value / 100, 4),
            self.alpha.value,
            self.beta.value,
            self.steps.value,
        )

    @property
    def settings(self) -> Prune:
        """The schedule as settings of a run: ``Run(data, model, train, designer.settings)``."""
        return Prune("scheduled", options=self._options())

    def check(self) -> None:
        """Raise the first error that a callback met, if any did."""
        if self._failure is not None:
            raise self._failure

    def _options(self) -> dict[str, Any]:
        ramp = self.ramp
        options: dict[str, Any] = {"schedule": ramp.kind, "sparsity": ramp.final, "start": ramp.begins}
        if ramp.kind == "one_cycle":
            options |= {"alpha": ramp.alpha, "beta": ramp.beta}
        return options | ({"steps": ramp.steps} if ramp.kind == "iterative" else {})

    def _other(self, change: Mapping[str, Any]) -> None:
        """Another schedule begins where it usually does."""
        begins = 100 * Ramp(change["new"], 0.5).begins
        if self.begin.value == begins:
            self._draw(change)
        self.begin.value = begins

    def _draw(self, _: Any) -> None:
        self.errors.outputs = ()
        for control, kinds in ((self.alpha, ["one_cycle"]), (self.beta, ["one_cycle"]), (self.steps, ["iterative"])):
            control.disabled = self.kind.value not in kinds
        try:
            ramp = self.ramp
            picture = self._drawn(ramp)
            code = f"Prune({self.settings.method!r}, options={self._options()!r})"
            parts = (
                f'<p role="status" aria-live="polite" style="{ROOM}">{html.escape(self._words(ramp))}</p>',
                picture.html(110),
                f'<pre style="white-space:pre-wrap;word-break:normal">{html.escape(code)}</pre>',
            )
        except Exception as error:
            parts, self._failure = ("", "", ""), self._failure or error
            self.errors.outputs = (as_output(error),)
            raise
        finally:
            self.sentence.value, self.picture.value, self.code.value = parts

    def _still(self) -> tuple[bytes, str]:
        return self._drawn(self.ramp).png(110), self._words(self.ramp)

    def _drawn(self, ramp: Ramp) -> Picture:
        return schedule_curves({self.kind.label: ramp}, epochs=self._epochs, look=self._look)

    def _words(self, ramp: Ramp) -> str:
        half = next(t for t, value in ramp.curve(1001) if value >= ramp.final / 2)
        return (
            f"{self.kind.label}. Half of the final sparsity of {100 * ramp.final:g} % is reached after "
            f"{100 * half:.0f} % of the training, epoch {half * self._epochs:.1f} of {self._epochs}. "
            "Pale: the other schedules."
        )
