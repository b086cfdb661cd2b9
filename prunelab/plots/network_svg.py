"""A network in ``theatre`` and ``live``, as SVG: columns of units and the connections that live, or bars of its layers.

Lighter than ``drawing.network``: a few milliseconds, no global state, and colours that follow the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import numpy as np

WIDTH, HEIGHT = 380, 378  # in pixels of the page: as high as two charts of the theatre
SINGLE, PIECES, FEW = 16, 32, 16  # neurons that a column shows one by one; pieces of a bar that stands for more
MANY = 6  # columns; with more of them, bars have few pieces
LEVELS = (0.12, 0.35, 0.65)  # shares of the strongest connection at which lines get wider
STYLE = """<style>
.prunelab-drawing {font-size: 12px; overflow: visible; display: block; max-width: 100%; height: auto;
  --paper: var(--jp-layout-color0, Canvas);
  --one: #0072b2; --two: #c75300; --three: #00795a; --grey: #6b7280}
:is([data-jp-theme-light="false"], .vscode-dark) .prunelab-drawing {
  --one: #56b4e9; --two: #f2894f; --three: #2fc99a; --grey: #a3aab5}
.prunelab-drawing text {fill: currentColor; stroke: var(--paper); stroke-width: 3px; paint-order: stroke}
.prunelab-drawing .small {font-size: 10.5px}
.prunelab-drawing .tiny {font-size: 9px}
.prunelab-drawing .plus {stroke: var(--one)} .prunelab-drawing .minus {stroke: var(--two); stroke-dasharray: 4 2}
.prunelab-drawing .bundle {stroke: var(--one)} .prunelab-drawing .idle {stroke: var(--grey); stroke-dasharray: 1 3}
.prunelab-drawing .lines path {fill: none}
.prunelab-drawing .live {fill: var(--three); stroke: var(--three)}
.prunelab-drawing .dead {fill: var(--paper); stroke: var(--grey)}
.prunelab-drawing .box {fill: var(--paper); stroke: var(--three)}
.prunelab-drawing .gone {fill: var(--grey); fill-opacity: .3}
</style>"""


def network(
    weights: Sequence[np.ndarray],
    widths: Sequence[int],
    words: str,
    names: Sequence[str] = (),
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> str:
    """The network as columns of units, a line for each connection that lives; lines that share both ends are one.

    A unit is dead where no input or no output is left.

    Args:
        weights: float [out, in] or [out, in, h, w] for each layer of a chain, from input to output; zero: pruned. Of
            a network with kernels, a line is the sum of the magnitudes between two units.
        widths: units of each hidden layer of the dense network.
        words: when this is.
        names: of the layers; (): ``layer 1``, ..., ``out``.
        size: width and height, in pixels of the page.
    """
    signed = all(weight.ndim == 2 for weight in weights)
    flat = [np.asarray(weight, np.float32).reshape(len(weight), -1) for weight in weights]
    units = [weights[0].shape[1], *map(len, weights)]  # a flattened map gives several columns to one unit
    reach = [matrix.shape[1] // units[i] for i, matrix in enumerate(flat)]
    before = [units[0], *widths[: len(weights) - 1], units[-1]]
    labels = ["in", *(names or [*(f"layer {i}" for i in range(1, len(weights))), "out"])]
    wide, high = size
    live = _live(flat, units)
    many = len(live) > MANY  # columns, for whose words there is little room
    places = [_places(len(alive), FEW if many else PIECES) for alive in live]
    across = np.linspace(34, wide - 34, len(live))
    top, bottom = 62.0, high - 26.0
    lines, columns = [], []
    for i, matrix in enumerate(flat):
        found = _bundles(matrix, reach[i], (places[i][0], places[i + 1][0]), (live[i], live[i + 1]), signed)
        heights = tuple(top + (bottom - top) * places[j][1] for j in (i, i + 1))
        lines.append(_paths(found, (across[i], across[i + 1]), heights, signed))
    room = int((across[1] - across[0]) / 6.6)  # letters between two columns
    for x, alive, (slot, y), name, dense in zip(across, live, places, labels, before, strict=True):
        columns.append(_column(round(float(x), 1), alive, slot, top + (bottom - top) * y))
        kept = f"{alive.sum():,}" if alive.sum() == dense else f"{alive.sum():,} of {dense:,}"
        if len(kept) > room:
            kept = f"{alive.sum()}"
        short = name if len(name) <= room else name.removeprefix("layer ")
        short = short if len(short) <= room else short.replace("conv_", "c").replace("dense_", "d")
        short = short if len(short) <= room else f"{short[: max(room - 1, 2)]}…"
        at = f'x="{x:.1f}" text-anchor="middle"'
        columns.append(f'<text class="{"small" if many else ""}" y="34" {at}>{html.escape(short)}</text>')
        columns.append(f'<text class="{"tiny" if many else "small"}" y="50" {at}>{kept}</text>')
    share = ", ".join(f"{name} {alive.sum():,} of {n:,}" for name, alive, n in zip(labels, live, before, strict=True))
    note = "blue: positive, orange, dashed: negative" if signed else "wider: larger sum of |w|"
    return (
        f'{STYLE}<svg class="prunelab-drawing" role="img" width="{wide}" viewBox="0 0 {wide} {high}" '
        f'aria-label="Network {html.escape(words)}. Live units: {html.escape(share)}.">'
        f'<text x="0" y="13">network {html.escape(words)}</text>'
        f'<g class="lines">{"".join(lines)}</g>{"".join(columns)}'
        f'<text class="small" x="{wide / 2}" y="{high - 4}" text-anchor="middle">'
        f"{note}; grey: dead</text></svg>"
    )


def layers(rows: Iterable[tuple[str, int, int]], words: str) -> str:
    """Weights left per layer, as bars, where a network is no plain chain that could be drawn.

    Args:
        rows: name of the parameter, weights left and weights of the dense layer.
        words: when this is.
    """
    rows = list(rows)
    high, step = HEIGHT, min(26.0, (HEIGHT - 36) / max(1, len(rows)))
    bars = []
    for i, (name, kept, total) in enumerate(rows):
        y, share = round(34 + i * step, 1), kept / total if total else 1.0
        bars.append(
            f'<rect class="box" x="150" y="{y}" width="220" height="{round(0.6 * step, 1)}"/>'
            f'<rect class="live" x="150" y="{y}" width="{round(220 * share, 1)}" height="{round(0.6 * step, 1)}"/>'
        )
        if step >= 13 or i % math.ceil(13 / step) == 0:
            bars.append(
                f'<text class="small" x="144" y="{round(y + 0.3 * step + 4, 1)}" text-anchor="end">'
                f"{html.escape(_brief(name))} {100 * share:.1f} %</text>"
            )
    return (
        f'{STYLE}<svg class="prunelab-drawing" role="img" aria-label="Weights left per layer {html.escape(words)}" '
        f'width="{WIDTH}" viewBox="0 0 {WIDTH} {high}">'
        f'<text x="0" y="13">weights left per layer {html.escape(words)}</text>'
        f"{''.join(bars)}</svg>"
    )


def _brief(name: str) -> str:
    """The last parts of a parameter's name, as many as there is room for."""
    name = name.removesuffix(".weight")
    while len(name) > 16 and "." in name:
        name = name.partition(".")[2]
    return name[-16:]


def _live(flat: Sequence[np.ndarray], units: Sequence[int]) -> list[np.ndarray]:
    """For each column which units have connections on both sides; the outermost columns need them on one."""
    there = [matrix != 0 for matrix in flat]
    into = [np.ones(units[0], bool), *(kept.any(1) for kept in there)]
    out = [kept.any(0).reshape(n, -1).any(1) for kept, n in zip(there, units, strict=False)]
    return [a & b for a, b in zip(into, [*out, np.ones(units[-1], bool)], strict=True)]


def _places(units: int, pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """For each unit its place, and the height of each place from 0 (top) to 1: single units, or pieces of a bar."""
    count = units if units <= SINGLE else min(pieces, units)
    slot = np.arange(units) * count // units
    spread = min(1.0, (count - 1) / 8) / 2  # few units stand close to each other
    heights = np.linspace(0.5 - spread, 0.5 + spread, count) if units <= SINGLE else (np.arange(count) + 0.5) / count
    return slot, heights


def _bundles(
    matrix: np.ndarray,
    reach: int,
    slots: tuple[np.ndarray, np.ndarray],
    live: tuple[np.ndarray, np.ndarray],
    signed: bool,
) -> list[np.ndarray]:
    """Sums of |w| between the places of two columns, float [places, places before].

    Args:
        matrix: float [out, in x reach].
        reach: columns of the matrix for each unit of the column before.
        slots: place of each unit of the column before, and of this one, ascending.
        live: likewise, which units live.
        signed: whether signs are told apart.

    Returns:
        Those of the positive weights, or of all; those of the negative ones; those that lead from or to a dead unit.
    """
    before, here = (np.searchsorted(slot, np.arange(slot[-1] + 1)) for slot in slots)  # where each place begins

    def summed(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(values, here, 0), before * reach, 1)

    passed = matrix
    if not (live[0].all() and live[1].all()):
        passed = matrix * live[1][:, None] * np.repeat(live[0], reach)
    plus = summed(np.maximum(passed, 0) if signed else np.abs(passed))
    minus = summed(np.maximum(-passed, 0)) if signed else np.zeros_like(plus)
    return [plus, minus, np.zeros_like(plus) if passed is matrix else summed(np.abs(matrix - passed))]


def _paths(
    found: Sequence[np.ndarray],
    ends: tuple[float, float],
    heights: tuple[np.ndarray, np.ndarray],
    signed: bool,
) -> str:
    """The connections of one layer as a few paths, one for each width and kind."""
    strongest = max(float(sums.max()) for sums in found)
    room = min(1.0, (ends[1] - ends[0]) / 80) ** 2  # the more lines there are, and the shorter, the paler is each
    crowd = min(1.0, room * (140 / max(1, sum(map(np.count_nonzero, found)))) ** 0.5)
    left, right = (f"{end:.0f}" for end in ends)
    starts, stops = ([f"{y:.0f}" for y in side] for side in heights)
    paths = []
    for look in (2, 0, 1):
        b, a = np.nonzero(found[look])
        levels = np.searchsorted(LEVELS, found[look][b, a] / strongest) if len(a) else np.zeros(0, int)
        for width in range(len(LEVELS) + 1):
            chosen = np.flatnonzero(levels == width)
            if not len(chosen):
                continue
            pairs = zip(a[chosen].tolist(), b[chosen].tolist(), strict=True)
            steps = "".join([f"M{left} {starts[i]}L{right} {stops[j]}" for i, j in pairs])
            name = "idle" if look == 2 else "bundle" if not signed else ("plus", "minus")[look]
            thick = 0.7 if look == 2 else (0.6 + 0.6 * width) * (0.6 + 0.4 * crowd)
            pale = 0.5 if look == 2 else (0.3 + 0.22 * width) * (0.12 + 0.88 * crowd)
            paths.append(f'<path class="{name}" stroke-width="{thick:.1f}" opacity="{pale:.2f}" d="{steps}"/>')
    return "".join(paths)


def _column(x: float, live: np.ndarray, slot: np.ndarray, heights: np.ndarray) -> str:
    if len(live) <= SINGLE:
        radius = 6.5 if len(live) <= 10 else 5
        return "".join(
            f'<circle class="{"live" if alive else "dead"}" cx="{x}" cy="{y:.1f}" r="{radius}"/>'
            for alive, y in zip(live, heights, strict=True)
        )
    share = np.bincount(slot, weights=live, minlength=len(heights)) / np.bincount(slot, minlength=len(heights))
    step = heights[1] - heights[0]
    top = heights[0] - step / 2
    ticks = "".join(
        f'<rect class="live" stroke="none" x="{x - 6}" y="{y - step / 2 + 0.5:.1f}" width="12" '
        f'height="{step - 1:.1f}" opacity="{0.4 + 0.6 * part:.2f}"/>'
        for y, part in zip(heights, share, strict=True)
        if part > 0
    )
    frame = f'x="{x - 7:.1f}" y="{top:.1f}" width="14" height="{step * len(heights):.1f}" rx="4"'
    return f'<rect class="box" {frame}/><rect class="gone" {frame}/>{ticks}'
