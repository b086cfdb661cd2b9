"""A picture and what belongs to it: the style, a title, a caption that says how it was measured, alternative text."""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import matplotlib as mpl
import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from prunelab.errors import PrunelabError, nearest
from prunelab.papers.library import spelt

if TYPE_CHECKING:
    from matplotlib.backend_bases import RendererBase

Look = Literal["light", "dark"]
STYLE = Path(__file__).with_name("style.mplstyle")
DARK = {
    **{f"{part}.facecolor": "#111827" for part in ("figure", "axes")},
    **{f"{axis}tick.labelcolor": "#d1d5db" for axis in "xy"},
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color"), "#f3f4f6"),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#9ca3af"),
    "grid.color": "#2b3647",
    "axes.prop_cycle": mpl.cycler(color=["#4FA8E8", "#F2894F", "#2FC99A", "#E6A3C8", "#F2B84B", "#9AD6F7", "#B8BCC8"]),
}
CAPTION_SIZE = 6.5  # points
# On the dark page of JupyterLab light and dark change places and hues stay, so that blue is blue and no box is white;
# the bytes of the picture are the same everywhere.
ON_DARK = """<style>[data-jp-theme-light="false"] .prunelab-picture
{filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen}</style>"""


class Shown(TypedDict, total=False):
    """What every plotting function takes by name, all of it optional.

    ``title``: above all axes. ``provenance``: what ``gallery.provenance`` collected, for the caption.
    ``look``: ``"light"`` or ``"dark"``. ``size``: width and height in inches, instead of the plot's own.
    """

    title: str
    provenance: Mapping[str, Any] | None
    look: Look
    size: tuple[float, float]


def stylesheet(look: Look = "light") -> list[Any]:
    """What ``matplotlib.style.context`` takes to draw in the style of the package."""
    if look not in ("light", "dark"):
        raise PrunelabError(f"look = {look!r}: {nearest(look, ['light', 'dark'])}")
    return [STYLE, DARK] if look == "dark" else [STYLE]


class Picture(Figure):
    """A figure that is drawn in its own style wherever it is shown, and that can be read aloud.

    It belongs to no window and to no global state, so nothing needs to be closed. Jupyter shows it with its alternative
    text, and where there is no picture the text alone.

    Attributes:
        alt: what the picture shows, in sentences with numbers.
        look: ``"light"`` or ``"dark"``.
    """

    def __init__(self, *args: Any, look: Look = "light", alt: str = "", **values: Any) -> None:
        super().__init__(*args, **values)
        self.alt, self.look = alt, look

    def draw(self, renderer: RendererBase) -> None:
        """Draw; ticks that are made only now take this picture's colours, not those of the moment."""
        with style.context(stylesheet(self.look)):
            super().draw(renderer)

    def key(self, handles: Iterable[Any], names: Iterable[str], columns: int) -> None:
        """The legend at the upper edge, beside the title: in fewer columns than asked for where both would overlap."""
        handles, names = list(handles), list(names)
        title = self._suptitle.get_window_extent().x1 if self.get_suptitle() else 0
        for rows in range(math.ceil(len(names) / columns), len(names) + 1):
            legend = self.legend(handles, names, loc="outside upper right", ncols=math.ceil(len(names) / rows))
            if title + legend.get_window_extent().width < 0.98 * self.bbox.width or rows == len(names):
                break
            legend.remove()

    def png(self, dpi: float | None = None) -> bytes:
        """The picture as a PNG without date or version in it: the same numbers give the same bytes."""
        buffer = io.BytesIO()
        with style.context(stylesheet(self.look)):
            dpi = dpi or mpl.rcParams["savefig.dpi"]
            self.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        return buffer.getvalue()

    def html(self, dpi: float | None = None) -> str:
        """An ``img`` element of fixed size with the alternative text; a light picture suits a dark JupyterLab too."""
        width, height = (round(inches * 100) for inches in self.get_size_inches())
        source = base64.b64encode(self.png(dpi)).decode()
        before, name = (ON_DARK, ' class="prunelab-picture"') if self.look == "light" else ("", "")
        return (
            f'{before}<img{name} src="data:image/png;base64,{source}" alt="{html.escape(self.alt)}" width="{width}" '
            f'style="max-width:100%;height:auto;aspect-ratio:{width}/{height}">'
        )

    def _repr_html_(self) -> str:
        return self.html()

    def __repr__(self) -> str:
        return self.alt or "a picture without alternative text"

    __str__ = __repr__


@contextmanager
def canvas(
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float],
    title: str = "",
    provenance: Mapping[str, Any] | None = None,
    counted: Mapping[str, str] | None = None,
    look: Look = "light",
    **values: Any,
) -> Iterator[tuple[Picture, np.ndarray]]:
    """A new picture and its axes, in the package's style as long as the ``with`` lasts.

    Args:
        rows: of axes.
        columns: of axes.
        size: width and height in inches.
        title: above all axes.
        provenance: for the caption.
        counted: ``n`` and ``interval`` of the picture's own numbers, which the caption prefers to those of provenance.
        look: light or dark.
        values: for ``Figure.subplots``: ``sharex``, ``width_ratios``, ...

    Yields:
        The picture and its axes, an object array [rows, columns].
    """
    with style.context(stylesheet(look)):
        picture = Picture(figsize=size, layout="constrained", look=look)
        picture.get_layout_engine().set(w_pad=0.06, h_pad=0.05, wspace=0.03, hspace=0.04)
        axes = picture.subplots(rows, columns, squeeze=False, **values)
        if title:
            picture.suptitle(title, x=0.012, ha="left", fontsize=11.5, fontweight="bold")
        if words := caption({**(provenance or {}), **(counted or {})}):
            letters = int(size[0] * 72 / (0.56 * CAPTION_SIZE))  # a letter is 0.56 of its size wide, on average
            lines = "\n".join(textwrap.wrap(words, letters))
            grey = mpl.rcParams["xtick.color"]
            picture.supxlabel(lines, x=0.012, ha="left", fontsize=CAPTION_SIZE, color=grey)
        yield picture, axes


def caption(facts: Mapping[str, Any]) -> str:
    """The small line under a picture: n, interval, protocol, preset, network, data, hardware, as far as known."""
    data = facts.get("data") or ""
    parts = [
        ("n = ", facts.get("n")),
        ("", facts.get("interval")),
        ("", facts.get("protocol")),
        ("preset ", facts.get("preset")),
        ("but ", spelt(facts.get("overridden") or {})),
        ("", facts.get("network")),
        ("data: ", data if isinstance(data, str) else ", ".join(map(str, data))),
        ("", facts.get("hardware")),
    ]
    return " · ".join(f"{name}{fact}" for name, fact in parts if fact)
