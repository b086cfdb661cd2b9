"""What ``live`` shows, as HTML: a curve of the rates visited so far and the kept weights of each layer.

Written as text, not drawn with matplotlib: a new picture then takes a fraction of a millisecond instead of fifty, stays
sharp, and takes its colours from the page, so it suits a dark theme as well as a light one.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Point = tuple[float, float]  # pruning rate and accuracy, both from 0 to 1

WIDTH, HEIGHT = 440, 270  # of the curve, in pixels of the page
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 30, 40  # margins around its axes
STYLE = """<style>
.prunelab-live {contain: inline-size; display: flex; flex-wrap: wrap; gap: 4px 36px; align-items: flex-start;
  line-height: 1.4; color: var(--jp-content-font-color1, inherit);
  --series: var(--jp-brand-color1, #0072b2); --here: #d55e00; --faint: var(--jp-border-color1, #8888)}
.prunelab-live svg {max-width: 100%; height: auto; font-size: 12px; flex: none}
.prunelab-live text {fill: currentColor; stroke: var(--jp-layout-color0, Canvas); stroke-width: 4px;
  paint-order: stroke}
.prunelab-live .grid {stroke: var(--jp-border-color2, #8884)}
.prunelab-live .dense {stroke: currentColor; stroke-dasharray: 6 4}
.prunelab-live .curve {stroke: var(--series); stroke-width: 2; fill: none; stroke-linejoin: round}
.prunelab-live .visited {fill: var(--series)}
.prunelab-live .here {stroke: var(--here); fill: none; stroke-width: 2.5}
.prunelab-live .layers {max-height: 270px; overflow: auto; flex: none; max-width: 100%}
.prunelab-live table {border-collapse: collapse; font-size: 12px; font-variant-numeric: tabular-nums}
.prunelab-live caption {text-align: left; padding: 5px 0 10px; caption-side: top}
.prunelab-live :is(td, th) {padding: 3px 0 3px 14px; text-align: right; font-weight: normal; white-space: nowrap}
.prunelab-live :is(td, th):first-child {padding-left: 0; text-align: left}
.prunelab-live tfoot :is(td, th) {border-top: 1px solid var(--faint)}
.prunelab-live .bar {width: 130px; height: 11px; border: 1px solid var(--faint)}
.prunelab-live .bar div {height: 100%; background: var(--series)}
</style>"""


def panel(points: Collection[Point], at: Point, dense: float, rows: Sequence[Mapping[str, Any]], words: str) -> str:
    """The curve, and beside it the layers; below it where there is little room.

    Args:
        points: What was visited, in any order.
        at: What is shown now, one of them.
        dense: Accuracy of the whole network.
        rows: ``Masks.by_layer()``.
        words: What the curve shows, for those who cannot see it.
    """
    return f'{STYLE}<div class="prunelab-live">{curve(points, at, dense, words)}{layers(rows)}</div>'


def curve(points: Collection[Point], at: Point, dense: float, words: str) -> str:
    """Accuracy against pruning rate as SVG; the axes go from 0 to 100 % always, so that nothing jumps."""
    grid = "".join(
        f'<line class="grid" x1="{_x(0)}" x2="{_x(1)}" y1="{_y(tick)}" y2="{_y(tick)}"/>'
        f'<text x="{LEFT - 8}" y="{_y(tick) + 4}" text-anchor="end">{tick * 100:.0f}</text>'
        f'<text x="{_x(tick)}" y="{_y(0) + 17}" text-anchor="middle">{tick * 100:.0f}</text>'
        for tick in (0, 0.2, 0.4, 0.6, 0.8, 1)
    )
    line = " ".join(f"{_x(rate)},{_y(accuracy)}" for rate, accuracy in sorted(points))
    dots = "".join(f'<circle class="visited" cx="{_x(r)}" cy="{_y(a)}" r="3"/>' for r, a in points)
    x, y = _x(at[0]), _y(at[1])
    return (
        f'<svg role="img" aria-label="{html.escape(words)}" width="{WIDTH}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'{grid}<text x="0" y="14">accuracy (%)</text>'
        f'<text x="{(_x(0) + _x(1)) / 2}" y="{HEIGHT - 4}" text-anchor="middle">pruning rate (%)</text>'
        f'<line class="dense" x1="{_x(0)}" x2="{_x(1)}" y1="{_y(dense)}" y2="{_y(dense)}"/>'
        f'<text x="{_x(1)}" y="{_y(dense) - 6}" text-anchor="end">dense {per_cent(dense, 1)}</text>'
        f'<polyline class="curve" points="{line}"/>{dots}'
        f'<line class="here" x1="{x}" x2="{x}" y1="{_y(0)}" y2="{_y(0) - 7}"/>'
        f'<circle class="here" cx="{x}" cy="{y}" r="6"/></svg>'
    )


def layers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Kept weights per layer as a table with bars; the last row has their sum."""
    kept, total = (sum(row[key] for row in rows) for key in ("kept", "total"))
    body = "".join(_row(row["parameter"].removesuffix(".weight"), row["kept"], row["total"]) for row in rows)
    return (
        '<div class="layers"><table><caption>kept weights per layer</caption><thead><tr><th>layer</th><th></th>'
        f"<th>kept</th><th>of</th><th>density</th></tr></thead><tbody>{body}</tbody>"
        f"<tfoot>{_row('all', kept, total)}</tfoot></table></div>"
    )


def per_cent(share: float, decimals: int | None = None) -> str:
    """``99.5 %``; with as many decimals as there are, or as asked for."""
    number = f"{share * 100:g}" if decimals is None else f"{share * 100:.{decimals}f}"
    return f"{number} %"


def _row(name: str, kept: int, total: int) -> str:
    density = kept / total if total else 1.0
    bar = f'<div class="bar"><div style="width:{density:.2%};min-width:{int(kept > 0)}px"></div></div>'
    numbers = "".join(f"<td>{value}</td>" for value in (f"{kept:,}", f"{total:,}", f"{density:.4f}"))
    return f'<tr><th>{html.escape(name)}</th><td aria-hidden="true">{bar}</td>{numbers}</tr>'


def _x(rate: float) -> float:
    return round(LEFT + rate * (WIDTH - LEFT - RIGHT), 1)


def _y(accuracy: float) -> float:
    return round(TOP + (1 - accuracy) * (HEIGHT - TOP - BOTTOM), 1)
