"""The network in ``theatre``, as SVG: columns of units and the connections that live, or bars of its layers.

Lighter than ``drawing.network``: a few milliseconds, no global state, and colours that follow the page.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from prunelab.theatre_view import HEIGHT

WIDTH = 380  # in pixels of the page; it is as high as two charts
SINGLE, PIECES = 16, 32  # neurons that a column shows one by one; pieces of the bar that stands for more
LEVELS = (0.12, 0.35, 0.65)  # shares of the strongest connection at which lines get wider


def network(weights: Sequence[np.ndarray], widths: Sequence[int], words: str) -> str:
    """The network as columns of units, a line for each connection that lives; lines that share both ends are one.

    Args:
        weights: float [out, in] or [out, in, h, w] for each layer of a chain, from input to output; zero: pruned. Of
            a network with kernels, a line is the sum of the magnitudes between two units.
        widths: units of each hidden layer of the dense network.
        words: when this is.
    """
    signed = all(weight.ndim == 2 for weight in weights)
    matrices: list[np.ndarray] = []
    for weight in weights:  # a flattened map gives several columns to one unit
        units = weight.shape[1] if signed or not matrices else len(matrices[-1])
        whole = np.asarray(weight, np.float64)
        matrices.append(whole if signed else np.abs(whole).reshape(len(weight), units, -1).sum(-1))
    before = [matrices[0].shape[1], *widths[: len(weights) - 1], len(matrices[-1])]
    names = ["in", *(f"layer {i}" for i in range(1, len(weights))), "out"]
    high = 2 * HEIGHT + 6
    live = _live(matrices)
    places = [_places(alive) for alive in live]
    across = np.linspace(34, WIDTH - 34, len(live))
    many = len(live) > 6  # columns, for whose words there is no room
    top, bottom = 62.0, high - 26.0
    lines, columns = [], []
    for i, matrix in enumerate(matrices):
        slots = (places[i][0], places[i + 1][0])
        ends = (across[i], across[i + 1])
        heights = tuple(top + (bottom - top) * places[j][1] for j in (i, i + 1))
        idle = ~(live[i + 1][:, None] & live[i][None, :])
        lines.append(_bundles(matrix, slots, ends, heights, idle, signed))
    for x, alive, (slot, y), name, dense in zip(across, live, places, names, before, strict=True):
        columns.append(_column(round(float(x), 1), alive, slot, top + (bottom - top) * y))
        kept = f"{alive.sum():,}" if alive.sum() == dense else f"{alive.sum():,} of {dense:,}"
        short, label, size = (name.removeprefix("layer "), f"{alive.sum()}", "tiny") if many else (name, kept, "small")
        columns.append(
            f'<text x="{x:.1f}" y="34" text-anchor="middle">{html.escape(short)}</text>'
            f'<text class="{size}" x="{x:.1f}" y="50" text-anchor="middle">{label}</text>'
        )
    share = ", ".join(f"{name} {alive.sum():,} of {n:,}" for name, alive, n in zip(names, live, before, strict=True))
    note = "blue: positive, orange and dashed: negative" if signed else "wider: larger sum of |w|"
    return (
        f'<svg role="img" aria-label="Network {html.escape(words)}. Live units: {html.escape(share)}." width="{WIDTH}" '
        f'viewBox="0 0 {WIDTH} {high}"><text x="0" y="13">network {html.escape(words)}</text>'
        f'<g class="lines">{"".join(lines)}</g>{"".join(columns)}'
        f'<text class="small" x="{WIDTH / 2}" y="{high - 4}" text-anchor="middle">{note}</text></svg>'
    )


def layers(rows: Iterable[tuple[str, int, int]], words: str) -> str:
    """Weights left per layer, as bars, where a network is no plain chain that could be drawn.

    Args:
        rows: name of the parameter, weights left and weights of the dense layer.
        words: when this is.
    """
    rows = list(rows)
    high, step = 2 * HEIGHT + 6, min(26.0, (2 * HEIGHT - 30) / max(1, len(rows)))
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
        f'<svg role="img" aria-label="Weights left per layer {html.escape(words)}" width="{WIDTH}" '
        f'viewBox="0 0 {WIDTH} {high}"><text x="0" y="13">weights left per layer {html.escape(words)}</text>'
        f"{''.join(bars)}</svg>"
    )


def _brief(name: str) -> str:
    """The last parts of a parameter's name, as many as there is room for."""
    name = name.removesuffix(".weight")
    while len(name) > 16 and "." in name:
        name = name.partition(".")[2]
    return name[-16:]


def _live(matrices: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each column which units have connections on both sides; the outermost columns need them on one."""
    into = [np.ones(matrices[0].shape[1], bool), *((matrix != 0).any(1) for matrix in matrices)]
    out = [*((matrix != 0).any(0) for matrix in matrices), np.ones(len(matrices[-1]), bool)]
    return [a & b for a, b in zip(into, out, strict=True)]


def _places(live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each unit its place, and the height of each place from 0 (top) to 1: single units, or pieces of a bar."""
    units = len(live)
    count = units if units <= SINGLE else min(PIECES, units)
    slot = np.arange(units) * count // units
    spread = min(1.0, (count - 1) / 8) / 2  # few units stand close to each other
    heights = np.linspace(0.5 - spread, 0.5 + spread, count) if units <= SINGLE else (np.arange(count) + 0.5) / count
    return slot, heights


def _bundles(
    matrix: np.ndarray,
    slots: tuple[np.ndarray, np.ndarray],
    ends: tuple[float, float],
    heights: tuple[np.ndarray, np.ndarray],
    idle: np.ndarray,
    signed: bool,
) -> str:
    """The connections of one layer as a few paths, one for each width and kind."""
    out, into = np.nonzero(matrix)
    if not len(out):
        return ""
    values = matrix[out, into]
    kind = np.where(idle[out, into], 2, (values < 0) & signed)
    keys, inverse = np.unique((slots[0][into] * 10_000 + slots[1][out]) * 3 + kind, return_inverse=True)
    strength = np.bincount(inverse, weights=np.abs(values))
    kinds, a, b = keys % 3, keys // 3 // 10_000, keys // 3 % 10_000
    level = np.searchsorted(LEVELS, strength / strength.max())
    crowd = min(1.0, (140 / len(keys)) ** 0.5)  # the more lines there are, the paler is each
    paths = []
    for look, width in itertools.product((2, 0, 1), range(len(LEVELS) + 1)):
        chosen = np.flatnonzero((kinds == look) & (level == width))
        if len(chosen):
            left, right = (f"{end:.0f}" for end in ends)
            steps = "".join(f"M{left} {heights[0][a[i]]:.0f}L{right} {heights[1][b[i]]:.0f}" for i in chosen)
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
        f'height="{step - 1:.1f}" opacity="{0.15 + 0.85 * part:.2f}"/>'
        for y, part in zip(heights, share, strict=True)
        if part > 0
    )
    return f'<rect class="box" x="{x - 7}" y="{top:.1f}" width="14" height="{step * len(heights):.1f}" rx="4"/>{ticks}'
