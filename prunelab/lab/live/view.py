"""What ``live`` shows, as HTML: facts, a curve of the rates visited so far, a histogram of the weights, the layers.

Written as text, not drawn with matplotlib: a new picture then takes a fraction of a millisecond instead of fifty, stays
sharp, and takes its colours from the page, so it suits a dark theme as well as a light one.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from prunelab.runs.columns import short

Point = tuple[float, float]  # pruning rate, from 0 to 1, and what was measured there
Axis = Literal["rate", "compression"]
LARGEST = 1000  # times: the end of the axis of compression

WIDTH, HEIGHT = 440, 270  # of the curve, in pixels of the page
LOW = 236  # height of the histogram: there is a control above it
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 30, 40  # margins around the axes
UNITS = 256  # at most so many units in a row of the picture of a layer
BLUE = (46, 134, 205)  # of units: a middle one, for light and dark pages
STYLE = """<style>
.prunelab-live {line-height: 1.4; color: var(--jp-content-font-color1, inherit);
  --series: var(--jp-brand-color1, #0072b2); --here: #d55e00; --faint: var(--jp-border-color1, #8888)}
.prunelab-live svg {max-width: 100%; height: auto; font-size: 12px; display: block}
.prunelab-live text {fill: currentColor; stroke: var(--jp-layout-color0, Canvas); stroke-width: 4px;
  paint-order: stroke}
.prunelab-live .grid {stroke: var(--jp-border-color2, #8884)}
.prunelab-live .dense {stroke: currentColor; stroke-dasharray: 6 4}
.prunelab-live .curve {stroke: var(--series); stroke-width: 2; fill: none; stroke-linejoin: round}
.prunelab-live .other {stroke: currentColor; stroke-opacity: .35; stroke-width: 1.5; fill: none}
.prunelab-live .pinned {stroke: #009e73; stroke-width: 2; stroke-dasharray: 7 3; fill: none}
.prunelab-live .past {stroke: currentColor; stroke-opacity: .45; stroke-width: 1.5; stroke-dasharray: 2 3; fill: none}
.prunelab-live .visited {fill: var(--series)}
.prunelab-live .here {stroke: var(--here); fill: none; stroke-width: 2.5}
.prunelab-live .there {fill: currentColor; fill-opacity: .13; stroke: currentColor; stroke-opacity: .5}
.prunelab-live .kept {fill: var(--series)}
.prunelab-live .cut {stroke: var(--here); stroke-width: 1.5; stroke-dasharray: 5 3}
.prunelab-live .facts {contain: inline-size; display: grid;
  grid-template-columns: repeat(auto-fit, minmax(13.3em, 1fr)); gap: 6px 12px;
  padding: 2px 0 6px; font-size: 12px; max-width: 76em;
  grid-auto-rows: minmax(64px, auto)}
.prunelab-live .fact {padding: 5px 10px 7px; border-left: 3px solid var(--series);
  background: var(--jp-layout-color2, #8881); font-variant-numeric: tabular-nums}
.prunelab-live .fact b {display: block; font-size: 20px; font-weight: 600; line-height: 1.3}
.prunelab-live table {color: inherit; border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums}
.prunelab-live caption {text-align: left; padding: 5px 0 8px; caption-side: top}
.prunelab-live :is(td, th) {padding: 3px 0 3px 14px; text-align: right; font-weight: normal; white-space: nowrap}
.prunelab-live :is(td, th):first-child {padding-left: 0; text-align: left}
.prunelab-live tfoot :is(td, th) {border-top: 1px solid var(--faint)}
.prunelab-live .bar {width: 110px; height: 11px; border: 1px solid var(--faint)}
.prunelab-live .bar div {height: 100%; background: var(--series)}
.prunelab-live .changed {display: flex; flex-wrap: wrap; gap: 8px 14px; font-size: 12px}
.prunelab-live .changed figure {margin: 0; text-align: center}
.prunelab-live .changed img {width: 72px; height: 72px; object-fit: contain; image-rendering: pixelated;
  border: 1px solid var(--faint)}
.prunelab-live .units {width: 256px; border: 1px solid var(--faint); image-rendering: pixelated; display: block}
</style>"""


def page(content: str) -> str:
    """HTML with the one style of all parts."""
    return f'{STYLE}<div class="prunelab-live">{content}</div>'


def sentence(words: str) -> str:
    """Words that a screen reader says when they change; room for three lines, so that nothing below jumps."""
    room = "line-height:1.4;min-height:4.2em;margin:4px 0 0"
    return f'<p role="status" aria-live="polite" style="{room}">{html.escape(words)}</p>'


def facts(items: Iterable[tuple[str, str]]) -> str:
    """Numbers to be seen at a glance.

    Args:
        items: the number, and what it is.
    """
    cells = (f'<div class="fact"><b>{html.escape(value)}</b>{html.escape(words)}</div>' for value, words in items)
    return f'<div class="facts">{"".join(cells)}</div>'


@dataclass(frozen=True)
class Scale:
    """The vertical axis of a curve.

    Attributes:
        name: what is measured.
        low: at the lower end.
        high: at the upper end.
        share: whether it is one, to be shown in per cent.
    """

    name: str = "accuracy"
    low: float = 0.0
    high: float = 1.0
    share: bool = True

    @classmethod
    def of(cls, name: str, share: bool, values: Iterable[float]) -> Scale:
        """From 0 to 1 for a share, so that nothing jumps; else between round numbers around all values."""
        if share:
            return cls(name)
        low, high = min(values := [*values]), max(values)
        low = 0.0 if 0 <= low < high / 2 else low
        step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
        step = next(step * part for part in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * part) <= 5)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        return cls(name, low, max(high, low + step), share)

    def text(self, value: float) -> str:
        """``85.0 %`` or ``0.123``."""
        return per_cent(value, 1) if self.share else f"{value:.3g}"

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Values at even distances, and how they are written."""
        values = [self.low + part * (self.high - self.low) / 5 for part in range(6)]
        return [(value, f"{value * 100:.0f}" if self.share else f"{value:.3g}") for value in values]

    def y(self, value: float) -> float:
        """Its place, in pixels."""
        share = (value - self.low) / (self.high - self.low)
        return round(TOP + (1 - min(max(share, 0), 1)) * (HEIGHT - TOP - BOTTOM), 1)


@dataclass(frozen=True)
class Other:
    """A curve beside the one that is shown.

    Attributes:
        label: its name.
        points: what was visited of it.
        kind: ``"pinned"``; ``"other"``, of another setting; ``"past"``, before a fine-tuning.
    """

    label: str
    points: Collection[Point]
    kind: Literal["pinned", "other", "past"]


def curve(
    points: Collection[Point],
    at: Point,
    dense: float,
    words: str,
    others: Sequence[Other] = (),
    scale: Scale = Scale(),
    axis: Axis = "rate",
) -> str:
    """What was measured against pruning rate as SVG; the axes of rates and shares stay, so that nothing jumps.

    Args:
        points: What was visited, in any order.
        at: What is shown now, one of them.
        dense: The measure of the whole network.
        words: What the curve shows, for those who cannot see it.
        others: Other curves.
        scale: The vertical axis.
        axis: ``"rate"``, or ``"compression"``: 1 / (1 - rate), on a logarithmic axis.
    """
    rates = [(tick, f"{tick * 100:.0f}") for tick in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    if axis == "compression":
        rates = [(1 - 1 / times, str(times)) for times in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)]
    label = "pruning rate (%)" if axis == "rate" else "compression (times fewer weights or units that may go, log axis)"
    y, x0, x1, foot = scale.y, _x(0), _x(1), HEIGHT - BOTTOM
    grid = "".join(
        f'<line class="grid" x1="{x0}" x2="{x1}" y1="{y(value)}" y2="{y(value)}"/>'
        f'<text x="{LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{text}</text>'
        for value, text in scale.ticks
    ) + "".join(
        f'<text x="{_along(rate, axis)}" y="{foot + 17}" text-anchor="middle">{text}</text>' for rate, text in rates
    )

    def line(points: Collection[Point]) -> str:
        return " ".join(f"{_along(rate, axis)},{y(value)}" for rate, value in sorted(points))

    beside = ""
    for other in others:
        beside += f'<polyline class="{other.kind}" points="{line(other.points)}"/>'
        if other.kind != "past" and other.points:
            rate, value = min(other.points, key=lambda point: abs(y(point[1]) - (TOP + foot) / 2))  # where it falls
            x, end = _along(rate, axis), ' text-anchor="end"' * (_along(rate, axis) > (x0 + x1) / 2)
            beside += f'<text x="{x}" y="{max(y(value) - 7, TOP + 6)}"{end}>{html.escape(other.label)}</text>'
    dots = "".join(f'<circle class="visited" cx="{_along(r, axis)}" cy="{y(v)}" r="3"/>' for r, v in points)
    here = _along(at[0], axis)
    unit = " (%)" if scale.share else ""
    return (
        f'{_svg(HEIGHT, words)}{grid}<text x="0" y="14">{html.escape(scale.name)}{unit}</text>'
        f'<text x="{(x0 + x1) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{label}</text>'
        f'<line class="dense" x1="{x0}" x2="{x1}" y1="{y(dense)}" y2="{y(dense)}"/>'
        f'<text x="{x1}" y="{y(dense) - 6}" text-anchor="end">dense {scale.text(dense)}</text>'
        f'{beside}<polyline class="curve" points="{line(points)}"/>{dots}'
        f'<line class="here" x1="{here}" x2="{here}" y1="{foot}" y2="{foot - 7}"/>'
        f'<circle class="here" cx="{here}" cy="{y(at[1])}" r="6"/></svg>'
    )


def _along(rate: float, axis: Axis) -> float:
    if axis == "rate":
        return _x(rate)
    times = 1 / (1 - rate) if rate < 1 - 1 / LARGEST else LARGEST
    return _x(math.log(times) / math.log(LARGEST))


def histogram(edge: float, there: Sequence[int], kept: Sequence[int], threshold: float | None, cut: str) -> str:
    """Weights by size as SVG: those that were there in outline, those that are kept filled; counts on a log axis.

    Args:
        edge: the bins divide [-edge, edge].
        there: weights of each bin before the pruning.
        kept: those that are left.
        threshold: the size that parts them; None: there is none.
        cut: what is said of the threshold.
    """
    decades = max(1, math.ceil(math.log10(max(1, *there))))

    def height(count: float) -> float:
        return round(LOW - BOTTOM - (LOW - BOTTOM - TOP) * math.log10(max(count, 0.5) * 2) / (decades + 0.301), 1)

    def outline(counts: Sequence[int]) -> str:
        steps = (f"V{height(count)}H{_x((i + 1) / len(counts))}" for i, count in enumerate(counts))
        return f"M{_x(0)},{height(0)}{''.join(steps)}V{height(0)}Z"

    grid = "".join(
        f'<line class="grid" x1="{_x(0)}" x2="{_x(1)}" y1="{height(10**n)}" y2="{height(10**n)}"/>'
        f'<text x="{LEFT - 8}" y="{height(10**n) + 4}" text-anchor="end">{short(10**n)}</text>'
        for n in range(decades + 1)
    )
    ticks = "".join(
        f'<text x="{_x((share + 1) / 2)}" y="{LOW - BOTTOM + 17}" text-anchor="middle">{share * edge:.2g}</text>'
        for share in (-1, -0.5, 0, 0.5, 1)
    )
    places = [] if threshold is None else [_x((1 + side * threshold / edge) / 2) for side in (-1, 1)]
    lines = "".join(
        f'<line class="cut" x1="{x}" x2="{x}" y1="{TOP - 6}" y2="{height(0)}"/>' for x in dict.fromkeys(places)
    )
    words = f"Histogram of the weights: {sum(kept):,} of {sum(there):,} are kept. {cut}"
    return (
        f'{_svg(LOW, words)}{grid}<text x="0" y="14">weights</text>'
        f'<text x="{_x(1)}" y="14" text-anchor="end">{html.escape(cut)}</text>'
        f'<path class="there" d="{outline(there)}"/><path class="kept" d="{outline(kept)}"/>{lines}{ticks}'
        f'<text x="{_x(0.5)}" y="{LOW - 4}" text-anchor="middle">value (outline: before, filled: kept)</text></svg>'
    )


def layers(rows: Sequence[Mapping[str, Any]], units: Mapping[str, np.ndarray] | None = None) -> str:
    """Kept weights per layer as a table with bars; the last row has their sum.

    Args:
        rows: ``Masks.by_layer()``.
        units: parameter -> for each neuron or filter the share of its weights that is kept; a picture of them.
    """
    kept, total = (sum(row[key] for row in rows) for key in ("kept", "total"))
    body = "".join(
        _row(row["parameter"].removesuffix(".weight"), row["kept"], row["total"], (units or {}).get(row["parameter"]))
        for row in rows
    )
    heads = "<th>units left</th><th>each unit: its share of weights kept</th>" if units else ""
    return (
        "<table><caption>kept weights per layer</caption><thead><tr><th>layer</th><th></th>"
        f"<th>kept</th><th>of</th><th>density</th>{heads}</tr></thead><tbody>{body}</tbody>"
        f"<tfoot>{_row('all', kept, total)}</tfoot></table>"
    )


def classes(rows: Sequence[tuple[str, int, float, float]]) -> str:
    """Accuracy of each class before and after, the class that loses most first.

    Args:
        rows: name of a class, its samples, dense accuracy, accuracy now.
    """
    body = ""
    for name, count, dense, now in sorted(rows, key=lambda row: row[3] - row[2]):
        bar = f'<div class="bar"><div style="width:{now:.2%}"></div></div>'
        cells = (f"{count:,}", per_cent(dense, 1), per_cent(now, 1), f"{100 * (now - dense):+.1f} points")
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f'<tr><th>{html.escape(name)}</th><td aria-hidden="true">{bar}</td>{numbers}</tr>'
    heads = "<th>class</th><th></th><th>samples</th><th>dense</th><th>now</th><th>change</th>"
    return (
        "<table><caption>accuracy by class, the one that loses most first</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    )


def confusion(counts: np.ndarray, names: Sequence[str]) -> str:
    """Right classes against answers as a table, the darker the larger the share of the class.

    Args:
        counts: samples, int [classes, classes], one row for each right class.
        names: of the classes.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(
            f'<td style="background:rgb({BLUE[0]} {BLUE[1]} {BLUE[2]} / {share:.2f})">{count or ""}</td>'
            for count, share in zip(row, own, strict=True)
        )
        + "</tr>"
        for name, row, own in zip(names, counts.tolist(), shares.tolist(), strict=True)
    )
    return (
        "<table><caption>confusion: the right class (rows) and the answer (columns), in samples</caption>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def changed(samples: Sequence[tuple[np.ndarray | None, str]], total: int, seen: int) -> str:
    """Samples whose answer changed, as images where they are.

    Args:
        samples: an image, float [H, W] or [H, W, 3] from 0 to 1, or None; and what is said of it.
        total: how many answers changed.
        seen: of so many.
    """
    figures = ""
    for picture, words in samples:
        drawn = "" if picture is None else _image(picture, html.escape(words))
        figures += f"<figure>{drawn}<figcaption>{html.escape(words)}</figcaption></figure>"
    told = f"{total:,} of {seen:,} answers differ from those of the dense network."
    return f'<p>{told}</p><div class="changed">{figures}</div>'


def _image(picture: np.ndarray, words: str) -> str:
    colours = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
    pixels = np.full((*colours.shape[:2], 4), 255, np.uint8)
    pixels[..., :3] = (colours.clip(0, 1) * 255).round()
    return f'<img alt="{words}" src="data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}">'


def strip(shares: np.ndarray) -> str:
    """A picture with a cell for each unit, the paler the fewer weights it keeps, empty where it has none.

    Args:
        shares: float [units], from 0 to 1.
    """
    lines = max(1, math.ceil(len(shares) / UNITS))
    across = math.ceil(len(shares) / lines)
    opacity = np.zeros(lines * across, np.uint8)
    opacity[: len(shares)] = np.where(shares > 0, 100 + 155 * np.sqrt(shares), 0)
    pixels = np.empty((lines, across, 4), np.uint8)
    pixels[..., :3] = BLUE
    pixels[..., 3] = opacity.reshape(lines, across)
    words = f"{np.count_nonzero(shares):,} of {len(shares):,} units keep a weight"
    source = base64.b64encode(_png(pixels)).decode()
    return (
        f'<img class="units" style="height:{max(12, 6 * lines)}px" alt="{words}" src="data:image/png;base64,{source}">'
    )


def per_cent(share: float, decimals: int | None = None) -> str:
    """``99.5 %``; with as many decimals as there are, or as asked for."""
    number = f"{share * 100:g}" if decimals is None else f"{share * 100:.{decimals}f}"
    return f"{number} %"


def size(count: float) -> str:
    """Bytes in words: ``1.06 MB``."""
    for limit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.3g} {name}"
    return f"{count:.0f} bytes"


def _row(name: str, kept: int, total: int, units: np.ndarray | None = None) -> str:
    density = kept / total if total else 1.0
    bar = f'<div class="bar"><div style="width:{density:.2%};min-width:{int(kept > 0)}px"></div></div>'
    numbers = "".join(f"<td>{value}</td>" for value in (f"{kept:,}", f"{total:,}", f"{density:.4f}"))
    if units is not None:
        numbers += f"<td>{np.count_nonzero(units):,} of {len(units):,}</td><td>{strip(units)}</td>"
    return f'<tr><th>{html.escape(name)}</th><td aria-hidden="true">{bar}</td>{numbers}</tr>'


def _png(pixels: np.ndarray) -> bytes:
    """RGBA pixels, uint8 [rows, columns, 4], as a PNG."""
    rows, columns, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw, 1)),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _svg(height: int, words: str) -> str:
    return f'<svg role="img" aria-label="{html.escape(words)}" width="{WIDTH}" viewBox="0 0 {WIDTH} {height}">'


def _x(rate: float) -> float:
    return round(LEFT + rate * (WIDTH - LEFT - RIGHT), 1)
