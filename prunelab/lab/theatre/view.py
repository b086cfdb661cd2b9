"""What ``theatre`` shows, as HTML: four small charts over the epochs, the network, and what the method decides.

Written as text, as in ``live.view``: a picture takes a few milliseconds, needs no global state, so that a thread may
draw it, and takes its colours from the page, light or dark. All axes are as long as the training from the beginning
on, and every part keeps its size, so nothing jumps.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prunelab.runs.columns import short

Row = Mapping[str, Any]
Marks = Sequence[tuple[int, float]]  # epochs after which it was pruned, and the share of the weights that went

WIDTH, HEIGHT = 300, 186  # of a chart, in pixels of the page
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 28, 24  # margins around its axes
SERIES = {"validation": "validation", "train": "training", "test": "test"}
STYLE = """<style>
.prunelab-theatre {contain: inline-size; line-height: 1.4; color: var(--jp-content-font-color1, inherit);
  --paper: var(--jp-layout-color0, Canvas); --grid: var(--jp-border-color2, #8884);
  --one: #0072b2; --two: #c75300; --three: #00795a; --grey: #6b7280}
:is([data-jp-theme-light="false"], .vscode-dark) .prunelab-theatre {
  --one: #56b4e9; --two: #f2894f; --three: #2fc99a; --grey: #a3aab5}
.prunelab-theatre .parts {display: flex; flex-wrap: wrap; gap: 6px 22px; align-items: flex-start}
.prunelab-theatre .charts {display: grid; grid-template-columns: repeat(2, max-content); gap: 6px 16px}
.prunelab-theatre svg {max-width: 100%; height: auto; font-size: 12px; display: block; overflow: visible}
.prunelab-theatre text {fill: currentColor; stroke: var(--paper); stroke-width: 3px; paint-order: stroke}
.prunelab-theatre .small {font-size: 10.5px}
.prunelab-theatre .grid {stroke: var(--grid)}
.prunelab-theatre .band {fill: var(--three); opacity: .22}
.prunelab-theatre .mark {stroke: var(--two); stroke-width: 1.2; opacity: .45}
.prunelab-theatre :is(.validation, .train, .test, .steps) {fill: none; stroke-width: 1.9; stroke-linejoin: round}
.prunelab-theatre :is(.validation, .steps) {stroke: var(--one)}
.prunelab-theatre .test {stroke: var(--two); stroke-dasharray: 6 3}
.prunelab-theatre .train {stroke: var(--grey); stroke-dasharray: 1.5 3; stroke-linecap: round}
.prunelab-theatre .dot {fill: var(--one)}
.prunelab-theatre .beyond {fill: var(--paper); stroke: var(--one); stroke-width: 1.3}
.prunelab-theatre .fired {fill: var(--two); stroke: var(--paper)}
.prunelab-theatre .legend {display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 12px; padding: 0 0 6px}
.prunelab-theatre .legend span {display: inline-flex; align-items: center; gap: 6px}
.prunelab-theatre .numbers {display: flex; flex-wrap: wrap; gap: 2px 30px; padding: 4px 0 8px; margin: 0}
.prunelab-theatre .numbers div {min-width: 118px}
.prunelab-theatre .numbers :is(span, b) {display: block; font-size: 12px; font-weight: normal; white-space: nowrap}
.prunelab-theatre .numbers b {font-size: 17px; font-variant-numeric: tabular-nums}
.prunelab-theatre .numbers small {font-size: 12px}
</style>"""


def panel(
    rows: Sequence[Row],
    budget: int,
    weights: tuple[int, int],
    drawing: str,
    window: tuple[float, float] | None = None,
) -> str:
    """Everything below the sentence: numbers, charts and drawing.

    Args:
        rows: of the run, one per epoch (``frames.EPOCHS``).
        budget: epochs that it takes at most; the length of all axes.
        weights: those that are left now, and those of the dense network.
        drawing: from ``network_svg``.
        window: relative gradients at which DyPrune prunes, shaded; None: the method has no trigger.
    """
    marks = prunings(rows, weights[0])
    parts = [part for part in SERIES if any(_known(row.get(f"{part}_loss")) for row in rows) or part != "test"]
    third = trigger(rows, budget, marks, window) if window is not None else seconds(rows, budget, marks)
    charts = (
        f"{curves(rows, 'loss', budget, marks, parts)}{curves(rows, 'accuracy', budget, marks, parts)}"
        f"{third}{left(rows, budget, marks, weights)}"
    )
    return (
        f'{STYLE}<div class="prunelab-theatre">{numbers(rows, budget, weights)}{_legend(parts, window)}'
        f'<div class="parts"><div class="charts">{charts}</div>{drawing}</div></div>'
    )


def prunings(rows: Sequence[Row], now: int) -> list[tuple[int, float]]:
    """Epochs after which the run was pruned, and the share of the weights that went.

    Args:
        rows: of the run.
        now: weights that are left, with which the next epoch begins.
    """
    after = [*(row["weights"] for row in rows[1:]), now]
    return [
        (int(row["epoch"]), 1 - left / row["weights"])
        for row, left in zip(rows, after, strict=False)  # no rows: nothing happened yet
        if row["pruned"] or left < row["weights"]
    ]


def numbers(rows: Sequence[Row], budget: int, weights: tuple[int, int]) -> str:
    """The newest row in large digits; the accuracy is the last that was measured."""
    row = rows[-1] if rows else {}
    kept, total = weights
    share = f"{100 * kept / total:.1f} %" if total else ""
    accuracy = next((value for _, value in reversed(_points(rows, "validation_accuracy"))), None)
    shown = {
        "epoch": f"{row.get('epoch', 0)} <small>of {budget}</small>",
        "prunings": f"{len(prunings(rows, kept))}",
        "validation accuracy": f"{100 * accuracy:.1f} %" if accuracy is not None else "none yet",
        "weights left": f"{kept:,} <small>of {total:,}, {share}</small>",
    }
    parts = "".join(f"<div><span>{name}</span><b>{value}</b></div>" for name, value in shown.items())
    return f'<div class="numbers">{parts}</div>'


def curves(rows: Sequence[Row], what: str, budget: int, marks: Marks, parts: Sequence[str]) -> str:
    """Loss or accuracy of the parts of the data."""
    factor = 100 if what == "accuracy" else 1
    found = {part: _points(rows, f"{part}_{what}", factor) for part in parts}
    top = 100.0 if what == "accuracy" else _ceiling(value for points in found.values() for _, value in points)
    ticks = [(top * i / 4, f"{top * i / 4:g}") for i in range(5)]
    lines = "".join(_line(points, budget, lambda v: v / top, part) for part, points in reversed(found.items()))
    ends = [f"{SERIES[part]} {points[-1][1]:.3g}" for part, points in found.items() if points]
    title = "accuracy (%)" if what == "accuracy" else "loss"
    return _chart(title, budget, marks, [(tick / top, word) for tick, word in ticks], lines, ends)


def trigger(rows: Sequence[Row], budget: int, marks: Marks, window: tuple[float, float]) -> str:
    """DyPrune's relative gradient per epoch, the window in which it prunes, and the epochs at which it did.

    Linear up to the window's upper edge and logarithmic beyond; what lies beyond -1 or 1 is a ring on the edge.
    """
    edge = window[1] if 0 < window[1] < 1 else 0.05
    fired = {epoch for epoch, _ in marks}

    def height(value: float) -> float:
        size = abs(value)
        half = 0.5 * size / edge if size <= edge else 0.5 + 0.5 * math.log(size / edge) / math.log(1 / edge)
        return 0.5 + 0.5 * math.copysign(min(half, 1), value)

    low, high = _y(height(max(window[0], -1))), _y(height(min(window[1], 1)))
    band = f'<rect class="band" x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" y="{high}" height="{round(low - high, 1)}"/>'
    dots = []
    points = _points(rows, "trigger")
    for epoch, value in points:
        x, y = _x(epoch, budget), _y(height(value))
        if epoch in fired:
            dots.append(f'<path class="fired" d="M{x} {y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>')
        else:
            dots.append(f'<circle class="{"dot" if abs(value) <= 1 else "beyond"}" cx="{x}" cy="{y}" r="2.6"/>')
    ticks = [(height(value), f"{value:g}") for value in (-1, 0, edge, 1)]
    ends = [f"now {points[-1][1]:.3g}"] if points else []
    return _chart("trigger: loss gradient / steepest fall", budget, marks, ticks, band + "".join(dots), ends)


def seconds(rows: Sequence[Row], budget: int, marks: Marks) -> str:
    """Training time of each epoch: does it get faster as the network shrinks?"""
    points = _points(rows, "seconds")
    top = _ceiling(value for _, value in points)
    ticks = [(i / 4, f"{top * i / 4:.3g}") for i in range(5)]
    line = _line(points, budget, lambda value: value / top, "steps")
    return _chart(
        "training time of an epoch (s)", budget, marks, ticks, line, [f"last {v:.3g}" for _, v in points[-1:]]
    )


def left(rows: Sequence[Row], budget: int, marks: Marks, weights: tuple[int, int]) -> str:
    """Weights that each epoch trained, in steps, on a log axis; at the prunings the share that went."""
    points = _points(rows, "weights")
    least = min([weights[0] or 1, *(value for _, value in points)])
    top = math.log10(max(weights[1], 10))
    bottom = min(math.floor(math.log10(max(least, 1))), max(math.floor(top) - 1, 0))  # a decade and more, always

    def height(value: float) -> float:
        return (math.log10(max(value, 1)) - bottom) / (top - bottom)

    corners = []
    for (epoch, value), following in itertools.zip_longest(points, points[1:]):
        y, end = _y(height(value)), _x(epoch + 0.5, budget)
        corners += [f"{_x(epoch - 0.5, budget)},{y}", f"{end},{y}"]
        if following is None and weights[0] != value:  # pruned just now: what the next epoch begins with
            corners.append(f"{end},{_y(height(weights[0]))}")
    line = f'<polyline class="steps" points="{" ".join(corners)}"/>'
    words, room, middle = [], 0.0, (TOP + HEIGHT - BOTTOM) / 2
    falls = {epoch: height(value) for epoch, value in points}
    for epoch, share in marks:
        x = _x(epoch + 0.5, budget)
        if x >= room and x < WIDTH - 34:
            y = TOP + 9 if _y(falls[epoch]) > middle else HEIGHT - BOTTOM - 5
            words.append(f'<text class="small" x="{x + 3}" y="{y}">&minus;{100 * share:.0f} %</text>')
            room = x + 44
    decades = [10**power for power in range(bottom, math.floor(top + 1e-9) + 1)]
    ticks = [(height(value), short(value)) for value in decades[:: max(1, len(decades) // 4)]]
    return _chart("weights left", budget, marks, ticks, line + "".join(words), [f"now {weights[0]:,}"])


def _chart(
    title: str, budget: int, marks: Marks, ticks: Iterable[tuple[float, str]], inside: str, ends: Sequence[str]
) -> str:
    """Axes with their grid, the prunings as lines, and what is drawn in them."""
    bottom, edge = HEIGHT - BOTTOM, WIDTH - RIGHT
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{edge}" y1="{_y(at)}" y2="{_y(at)}"/>'
        f'<text class="small" x="{LEFT - 6}" y="{round(_y(at) + 4, 1)}" text-anchor="end">{word}</text>'
        for at, word in ticks
    )
    step = _step(budget)
    below = "".join(
        f'<text class="small" x="{_x(epoch, budget)}" y="{bottom + 16}" text-anchor="middle">{epoch}</text>'
        for epoch in range(0, budget + 1, step)
    )
    lines = "".join(
        f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>'
        for x in (_x(epoch + 0.5, budget) for epoch, _ in marks)
    )
    where = f" Pruned after epoch {', '.join(str(epoch) for epoch, _ in marks)}." if marks else ""
    label = html.escape(f"{title} over {budget} epochs. {', '.join(ends)}.{where}")
    return (
        f'<svg role="img" aria-label="{label}" width="{WIDTH}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<text x="0" y="13">{title}</text>{grid}{below}{lines}{inside}</svg>'
    )


def _legend(parts: Sequence[str], window: tuple[float, float] | None) -> str:
    def entry(mark: str, words: str) -> str:
        return f'<span><svg width="26" height="12" viewBox="0 0 26 12">{mark}</svg>{words}</span>'

    shown = [entry(f'<path class="{part}" d="M1 6H25"/>', SERIES[part]) for part in parts]
    shown.append(entry('<path class="mark" d="M13 0V12"/>', "pruned after this epoch"))
    if window is not None:
        shown.append(entry('<path class="fired" d="M13 .5l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>', "trigger of that epoch"))
        low, high = window
        words = f"prunes from {low:g} to {high:g}" if low >= -1 else f"prunes up to {high:g}"
        shown.append(entry('<rect class="band" x="1" y="1" width="24" height="10"/>', words))
    return f'<div class="legend" aria-hidden="true">{"".join(shown)}</div>'


def _points(rows: Sequence[Row], column: str, factor: float = 1) -> list[tuple[int, float]]:
    return [(int(row["epoch"]), factor * row[column]) for row in rows if _known(row.get(column))]


def _line(points: Sequence[tuple[int, float]], budget: int, height: Callable[[float], float], look: str) -> str:
    if len(points) == 1:  # a line of one point would not be seen
        epoch, value = points[0]
        return f'<path class="{look}" d="M{_x(epoch - 0.3, budget)} {_y(height(value))}H{_x(epoch + 0.3, budget)}"/>'
    places = " ".join(f"{_x(epoch, budget)},{_y(height(value))}" for epoch, value in points)
    return f'<polyline class="{look}" points="{places}"/>'


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _x(epoch: float, budget: int) -> float:
    return round(LEFT + epoch / (budget + 0.5) * (WIDTH - LEFT - RIGHT), 1)


def _y(share: float) -> float:
    """The height of a share of the axis; what lies beyond it is drawn on its edge."""
    return round(TOP + (1 - min(max(share, 0), 1)) * (HEIGHT - TOP - BOTTOM), 1)


def _ceiling(values: Iterable[float]) -> float:
    """The next round number, of which quarters are round enough: it changes seldom while a maximum grows."""
    most = max(values, default=0.0)
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(
        power * factor for factor in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if most <= power * factor * (1 + 1e-9)
    )


def _step(budget: int) -> int:
    """Epochs between two numbers on the axis: at most seven of them."""
    return next(step * 10**power for power in range(9) for step in (1, 2, 5) if budget / (step * 10**power) <= 6)
