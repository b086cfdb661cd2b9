"""The drawing of a network after pruning: layers as columns of neurons, a line for each connection that lives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.path import Path

from prunelab.errors import PrunelabError
from prunelab.plots.marks import series
from prunelab.plots.pictures import Picture, Shown, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from typing_extensions import Unpack

HEIGHT = 20.0  # of the tallest column, in units of the drawing; columns are 1 apart
STEP = 2.9  # between the neurons of a small layer, at most
WIDTH = 0.13  # of the bar that stands for the middle of a large layer
ENDS = 2  # neurons drawn singly at each end of a large layer
BAR = HEIGHT / 2 - (ENDS - 0.25) * HEIGHT / 19  # half the length of that bar
BINS = 40  # pieces of that bar; the connections of one piece are drawn as one line
POSITIVE, NEGATIVE, IDLE = range(3)  # kinds of connections; the first two are also their positions in the palette
DASH, DOT = (3.5, 1.3), (0.8, 2.8)
COLUMNS = (6, 2, 4, 3, 5)  # positions in the palette of the outer layers and, in turn, of the hidden ones


@dataclass(frozen=True)
class Column:
    """One layer as it is drawn.

    Attributes:
        slot: for each unit the place it is drawn at, int [units].
        y: height of each place, float [places].
        single: places that are one neuron, bool [places]; the others are pieces of a bar, or the circle of all dead.
        live: for each unit, whether it has a connection on both sides (an outer layer has one), bool [units].
        dead: number of dead neurons that share one circle, the last place; 0: there is no such circle.
    """

    slot: np.ndarray
    y: np.ndarray
    single: np.ndarray
    live: np.ndarray
    dead: int = 0

    @property
    def barred(self) -> bool:
        """Whether the middle of the layer is a bar."""
        return not self.single.all() and not self.dead


def network(
    weights: Sequence[np.ndarray],
    names: Sequence[str] | None = None,
    *,
    max_nodes: int = 20,
    before: Sequence[int] = (),
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    **shown: Unpack[Shown],
) -> Picture:
    """Draw a network of fully connected layers, its zero weights left out.

    A layer of at most ``max_nodes`` neurons is drawn whole. In a larger one, where fewer than that live, these are
    drawn, and one hollow circle stands for the dead ones. Otherwise the first and last neurons are drawn, and between
    them a bar with a tick for each living neuron; connections that end in the same piece of a bar are one line, as wide
    as their sum. A neuron is dead, and hollow, when all its inputs or all its outputs are pruned; what still leads to
    or from it is dotted.

    Args:
        weights: one float array [out, in] per layer, from input to output; zero: pruned.
        names: of the columns, one more than ``weights``; None: ``In``, ``HL 1``, ..., ``Out``.
        max_nodes: neurons that a column shows singly, at least 6.
        before: neurons of each column before pruning, where some were removed since; (): as many as in ``weights``.
        inputs: names of the inputs, shown where the first column is drawn whole.
        outputs: names of the classes, likewise.
        shown: title, provenance, look, size.

    Raises:
        PrunelabError: arrays that do not chain, hold no finite numbers, or are no matrices; too few or many names.

    Source: after the picture in the README of DyPrune's repository, which draws all edges; our own is which live.
    """
    matrices = _checked(weights)
    names = list(names) if names is not None else ["In", *(f"HL {i}" for i in range(1, len(matrices))), "Out"]
    sizes = before or [matrices[0].shape[1], *map(len, matrices)]
    for what, given, units in (
        ("columns", names, len(matrices) + 1),
        ("columns before pruning", sizes, len(matrices) + 1),
        ("inputs", inputs, matrices[0].shape[1]),
        ("outputs", outputs, matrices[-1].shape[0]),
    ):
        if len(given) != units and (given or "columns" in what):
            raise PrunelabError(f"drawing.network: {len(given)} entries for {units} {what}: give one each")
    columns = [_column(live, max(max_nodes, 2 * ENDS + 2)) for live in _live(matrices)]
    size = (2.2 + 1.75 * len(columns), 5.6)
    one = {"n": "1 network", "interval": ""} if shown.get("provenance") else {}
    with canvas(**{"size": size, **shown}, counted=one) as (picture, axes):
        ax = axes[0, 0]
        ax.set_axis_off()
        below = {"y": -HEIGHT / 2 - 2.1, "ha": "center", "va": "top", "fontsize": 7.5, "color": _grey("labelcolor")}
        ax.text(-0.5, s="weights\nleft", **below)
        for x, matrix in enumerate(matrices):
            _connections(ax, x, matrix, columns[x], columns[x + 1])
            ax.text(x + 0.5, s=f"{np.count_nonzero(matrix):,} of\n{sizes[x] * sizes[x + 1]:,}", **below)
        for x, (column, name) in enumerate(zip(columns, names, strict=True)):
            outer = x in (0, len(columns) - 1)
            colour = series(COLUMNS[0] if outer else COLUMNS[1 + (x - 1) % (len(COLUMNS) - 1)])["color"]
            _neurons(ax, x, column, colour)
            ax.text(x, HEIGHT / 2 + 2.15, name, va="bottom", fontsize=10, fontweight="bold", color=colour, ha="center")
            ax.text(x, HEIGHT / 2 + 2.0, _share(column, sizes[x]), va="top", fontsize=8.5, ha="center")
        _label(ax, -0.12, columns[0], inputs, "right")
        _label(ax, len(columns) - 0.88, columns[-1], outputs, "left")
        left, right = (0.05 * max([0, *map(len, words)]) for words in (inputs, outputs))
        ax.set_xlim(-0.62 - max(left - 0.4, 0), len(columns) - 0.75 + right)
        ax.set_ylim(-HEIGHT / 2 - 3.6, HEIGHT / 2 + 3.3)
        ax.legend(handles=_key(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=6, columnspacing=1.5)
        picture.alt = _words(names, columns, matrices, sizes)
    return picture


def _checked(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    matrices = [np.asarray(w, dtype=np.float64) for w in weights]
    if not matrices:
        raise PrunelabError("drawing.network: no layers; give one array [out, in] per fully connected layer")
    for i, matrix in enumerate(matrices):
        where = f"drawing.network: layer {i}"
        if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
            raise PrunelabError(f"{where} should be a matrix [out, in] of finite numbers, got shape {matrix.shape}")
        if i and matrix.shape[1] != len(matrices[i - 1]):
            raise PrunelabError(
                f"{where} takes {matrix.shape[1]} inputs, the one before has {len(matrices[i - 1])} outputs"
            )
    return matrices


def _live(matrices: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each column which units have an incoming and an outgoing connection; the outermost need only one side."""
    into = [np.ones(matrices[0].shape[1], bool), *((w != 0).any(1) for w in matrices)]
    out = [*((w != 0).any(0) for w in matrices), np.ones(len(matrices[-1]), bool)]
    return [a & b for a, b in zip(into, out, strict=True)]


def _column(live: np.ndarray, most: int) -> Column:
    units, alive = len(live), int(live.sum())
    if units <= most:
        return Column(np.arange(units), _spread(units), np.ones(units, bool), live)
    if alive < most:
        slot = np.where(live, np.cumsum(live) - 1, alive)
        return Column(slot, _spread(alive + 1), np.arange(alive + 1) < alive, live, units - alive)
    inner = units - 2 * ENDS
    bins = min(BINS, inner)
    slot = np.concatenate([np.arange(ENDS), ENDS + np.arange(inner) * bins // inner, ENDS + bins + np.arange(ENDS)])
    outer = HEIGHT / 2 - np.arange(ENDS) * HEIGHT / 19
    y = np.concatenate([outer, BAR - (np.arange(bins) + 0.5) * 2 * BAR / bins, -outer[::-1]])
    single = np.concatenate([np.ones(ENDS, bool), np.zeros(bins, bool), np.ones(ENDS, bool)])
    return Column(slot, y, single, live)


def _spread(places: int) -> np.ndarray:
    step = min(STEP, HEIGHT / max(places - 1, 1))
    return (np.arange(places)[::-1] - (places - 1) / 2) * step


def _connections(ax: Axes, x: int, matrix: np.ndarray, left: Column, right: Column) -> None:
    """One curve per pair of places and kind, the strong ones on top; width and opacity by the sum of |w|."""
    rows, cols = np.nonzero(matrix)
    if not len(rows):
        return
    values = matrix[rows, cols]
    kinds = np.where(right.live[rows] & left.live[cols], values < 0, IDLE)
    keys, inverse = np.unique((right.slot[rows] * len(left.y) + left.slot[cols]) * 3 + kinds, return_inverse=True)
    strength = np.bincount(inverse, weights=np.abs(values))
    order = np.lexsort((strength, keys % 3 < IDLE))
    keys, strength = keys[order], strength[order]
    start, end, kind = left.y[keys // 3 % len(left.y)], right.y[keys // 3 // len(left.y)], keys % 3
    share = np.where(kind == IDLE, 0, strength / max(strength[kind < IDLE], default=1))
    crowd = min(1.0, (160 / len(keys)) ** 0.6)  # the more lines there are, the finer and paler is each
    inks = np.array(
        [to_rgba(colour) for colour in (series(POSITIVE)["color"], series(NEGATIVE)["color"], _grey("color"))]
    )
    colours = inks[kind]
    colours[:, 3] = np.clip((0.25 + 0.7 * share) * (0.25 + 0.75 * crowd), 0.05, 0.95)
    colours[kind == IDLE, 3] = 0.6
    widths = np.where(kind == IDLE, 0.6, 0.4 + 2.1 * share * (0.3 + 0.7 * crowd))
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    curves = [Path([(x, a), (x + 0.45, a), (x + 0.55, b), (x + 1, b)], codes) for a, b in zip(start, end, strict=True)]
    # Each line starts its dashes elsewhere, or a crowd of them shows stripes that mean nothing.
    dashes = ["-" if k == POSITIVE else (at * 1.7 % 4.8, DASH if k == NEGATIVE else DOT) for at, k in enumerate(kind)]
    look = {"edgecolors": colours, "linewidths": widths, "linestyles": dashes, "capstyle": "butt"}
    ax.add_collection(PathCollection(curves, facecolors="none", zorder=1, **look))


def _neurons(ax: Axes, x: int, column: Column, colour: Any) -> None:
    paper = mpl.rcParams["axes.facecolor"]
    if column.barred:
        rounded = "round,pad=0,rounding_size=0.06"
        box = FancyBboxPatch((x - WIDTH / 2, -BAR), WIDTH, 2 * BAR, boxstyle=rounded, mutation_aspect=7, zorder=3)
        box.set(facecolor=paper, edgecolor=colour, linewidth=1.2)
        ax.add_patch(box)
        step = 2 * BAR / (len(column.live) - 2 * ENDS)
        y = BAR - (np.flatnonzero(column.live[ENDS:-ENDS]) + 0.5) * step
        half, reach = max(0.35 * step, 0.025), WIDTH * 0.42
        corners = [(-reach, -half), (reach, -half), (reach, half), (-reach, half)]
        ticks = [[(x + dx, at + dy) for dx, dy in corners] for at in y]
        ax.add_collection(PolyCollection(ticks, facecolors=[colour], linewidths=0, zorder=4))
    alive = np.bincount(column.slot, weights=column.live, minlength=len(column.y)) > 0
    size = 95 if np.count_nonzero(column.single) <= 14 else 60
    ring = {"s": size, "edgecolor": colour, "linewidth": 1.2, "zorder": 5}
    for mask, face in ((column.single & alive, colour), (column.single & ~alive, paper)):
        ax.scatter(np.full(mask.sum(), x), column.y[mask], facecolor=face, **ring)
    if column.dead:
        below = {"xytext": (0, -9), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 7}
        ax.scatter([x], column.y[-1:], facecolor=paper, linestyle=(0, (2, 1.2)), **ring)
        ax.annotate(f"{column.dead:,} dead", (x, column.y[-1]), color=_grey("labelcolor"), zorder=6, **below)


def _share(column: Column, units: int) -> str:
    """``5`` where all live, else ``5 of 30``."""
    alive = int(column.live.sum())
    return f"{units:,}" if alive == units else f"{alive:,} of {units:,}"


def _label(ax: Axes, x: float, column: Column, names: Sequence[str], side: str) -> None:
    if len(names) == len(column.y) and column.single.all():
        for name, y in zip(names, column.y, strict=True):
            ax.text(x, y, name, ha=side, va="center", fontsize=8)


def _key() -> list[Line2D]:
    grey, paper = _grey("color"), mpl.rcParams["axes.facecolor"]
    blue, red = series(POSITIVE)["color"], series(NEGATIVE)["color"]
    dot = {"linestyle": "", "marker": "o", "markersize": 7, "markeredgecolor": grey}
    return [
        Line2D([], [], color=blue, label="weight > 0"),
        Line2D([], [], color=red, linestyle=(0, DASH), label="weight < 0"),
        Line2D([], [], color=blue, linewidth=2.8, label="larger |weight|"),
        Line2D([], [], markerfacecolor=grey, label="live neuron", **dot),
        Line2D([], [], markerfacecolor=paper, label="dead neuron", **dot),
        Line2D([], [], color=grey, linestyle=(0, DOT), label="its connections"),
    ]


def _grey(what: str) -> Any:
    return mpl.rcParams[f"xtick.{what}"]


def _words(
    names: Sequence[str], columns: Sequence[Column], matrices: Sequence[np.ndarray], sizes: Sequence[int]
) -> str:
    kept = sum(np.count_nonzero(matrix) for matrix in matrices)
    total = sum(a * b for a, b in itertools.pairwise(sizes))
    share = f"{kept:,} of {total:,} weights are left ({100 * kept / total:.3g} %)"
    layers = [f"{name} {c.live.sum():,} of {units:,}" for name, c, units in zip(names, columns, sizes, strict=True)]
    return f"Drawing of a network: {share}. Live neurons: {', '.join(layers)}."
