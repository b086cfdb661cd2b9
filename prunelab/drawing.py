"""The drawing of a network after pruning: layers as coloured columns of neurons, and a line for every connection that lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from prunelab.marks import series
from prunelab.pictures import Picture, Shown, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 20.0  # of the tallest column, in units of the drawing
WIDTH = 0.13  # of the bar that stands for the middle of a large layer; columns are 1 apart
ENDS = 2  # neurons drawn singly at each end of a large layer
BINS = 40  # pieces of that bar; the connections of one piece are drawn as one line
POSITIVE, NEGATIVE = 0, 1  # positions in the palette of the two signs
COLUMNS = (6, 2, 4, 3, 5)  # positions in the palette of input, hidden layers in turn; the signs' colours are left out


@dataclass(frozen=True)
class Column:
    """One layer as it is drawn.

    Attributes:
        slot: for each unit the place it is drawn at, int [units].
        y: height of each place, float [places].
        single: places that are one neuron, bool [places]; the others are pieces of a bar, or the one circle for all dead neurons.
        live: for each unit, whether it has a connection on each side that exists, bool [units].
        dead: number of dead neurons that share one circle, the last place; 0: no such circle.
    """

    slot: np.ndarray
    y: np.ndarray
    single: np.ndarray
    live: np.ndarray
    dead: int = 0


def network(
    weights: Sequence[np.ndarray],
    names: Sequence[str] | None = None,
    *,
    max_nodes: int = 20,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    title: str = "",
    provenance: Mapping[str, Any] | None = None,
    look: Look = "light",
) -> Picture:
    """Draw a network of fully connected layers, its zero weights left out.

    A layer of at most ``max_nodes`` neurons is drawn whole; dead neurons are hollow. In a larger one, where at most ``max_nodes`` live,
    these are drawn and one hollow circle stands for the dead ones. Otherwise the first and last neurons are drawn, and between them a
    bar with a tick for each living neuron; connections that end in the same piece of a bar are drawn as one line, as wide as their sum.
    A neuron is dead when all its inputs or all its outputs are pruned; what still leads to or from it is dotted.

    Args:
        weights: one float array [out, in] per layer, from input to output; zero: pruned.
        names: of the columns, one more than ``weights``; None: ``In``, ``HL 1``, ..., ``Out``.
        max_nodes: neurons that a column shows singly, at least 6.
        inputs: names of the inputs, where the first column is drawn whole.
        outputs: names of the classes, likewise.
        title: above the drawing.
        provenance: for the caption.
        look: light or dark.

    Raises:
        PrunelabError: arrays that do not chain, hold no finite numbers, or are no matrices.

    Source: after the picture in the README of DyPrune's repository, which draws all edges; which of them live is our own addition.
    """
    matrices = _checked(weights)
    names = list(names) if names is not None else ["In", *(f"HL {i}" for i in range(1, len(matrices))), "Out"]
    if len(names) != len(matrices) + 1:
        raise PrunelabError(
            f"drawing.network: {len(names)} names for {len(matrices) + 1} columns (inputs, hidden layers, outputs)"
        )
    columns = [_column(live, max(max_nodes, 2 * ENDS + 2)) for live in _live(matrices)]
    kept, total = sum(np.count_nonzero(w) for w in matrices), sum(w.size for w in matrices)
    size = (2.2 + 1.75 * len(columns), 5.6)
    with canvas(size=size, title=title, caption=caption(provenance), look=look) as (picture, axes):
        ax = axes[0, 0]
        ax.set_axis_off()
        for x, (matrix, left, right) in enumerate(zip(matrices, columns, columns[1:], strict=False)):
            _connections(ax, x, matrix, left, right)
            ax.text(x + 0.5, -HEIGHT / 2 - 2.1, f"{np.count_nonzero(matrix):,} of\n{matrix.size:,}", **_small())
        for x, (column, name) in enumerate(zip(columns, names, strict=True)):
            _neurons(ax, x, column, _colour(x, len(columns)))
            _heading(ax, x, column, name, _colour(x, len(columns)))
        _names(ax, 0, columns[0], inputs, "right")
        _names(ax, len(columns) - 1, columns[-1], outputs, "left")
        ax.text(-0.5, -HEIGHT / 2 - 2.1, "weights\nleft", **{**_small(), "ha": "center"})
        before, after = (0.05 * max([0, *map(len, words)]) for words in (inputs, outputs))
        ax.set_xlim(-0.62 - max(before - 0.4, 0), len(columns) - 0.75 + after)
        ax.set_ylim(-HEIGHT / 2 - 3.6, HEIGHT / 2 + 3.3)
        ax.legend(
            handles=_key(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=6, columnspacing=1.5, handletextpad=0.6
        )
        picture.alt = _words(names, columns, kept, total)
    return picture


def _checked(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    matrices = [np.asarray(w, dtype=np.float64) for w in weights]
    if not matrices:
        raise PrunelabError("drawing.network: no layers; give one array [out, in] per fully connected layer")
    for i, matrix in enumerate(matrices):
        if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
            raise PrunelabError(
                f"drawing.network: layer {i} should be a matrix [out, in] of finite numbers, got shape {matrix.shape}"
            )
        if i and matrix.shape[1] != matrices[i - 1].shape[0]:
            raise PrunelabError(
                f"drawing.network: layer {i} takes {matrix.shape[1]} inputs, layer {i - 1} has {matrices[i - 1].shape[0]} outputs"
            )
    return matrices


def _live(matrices: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each column which units have an incoming and an outgoing connection; the outermost need only one side."""
    into = [np.ones(matrices[0].shape[1], bool), *((w != 0).any(1) for w in matrices)]
    out = [*((w != 0).any(0) for w in matrices), np.ones(matrices[-1].shape[0], bool)]
    return [a & b for a, b in zip(into, out, strict=True)]


def _column(live: np.ndarray, most: int) -> Column:
    units, alive = len(live), int(live.sum())
    if units <= most:
        return Column(np.arange(units), _spread(units), np.ones(units, bool), live)
    if alive < most:
        slot = np.where(live, np.cumsum(live) - 1, alive)
        return Column(slot, _spread(alive + 1), np.arange(alive + 1) < alive, live, units - alive)
    bins = min(BINS, units - 2 * ENDS)
    middle = ENDS + np.arange(units - 2 * ENDS) * bins // (units - 2 * ENDS)
    slot = np.concatenate([np.arange(ENDS), middle, ENDS + bins + np.arange(ENDS)])
    outer = HEIGHT / 2 - np.arange(ENDS) * HEIGHT / 19
    low, high = _bar()
    y = np.concatenate([outer, high - (np.arange(bins) + 0.5) * (high - low) / bins, -outer[::-1]])
    single = np.concatenate([np.ones(ENDS, bool), np.zeros(bins, bool), np.ones(ENDS, bool)])
    return Column(slot, y, single, live)


def _spread(places: int) -> np.ndarray:
    step = min(2.9, HEIGHT / max(places - 1, 1))
    return (np.arange(places)[::-1] - (places - 1) / 2) * step


def _bar() -> tuple[float, float]:
    """Lower and upper end of the bar of a large layer."""
    end = HEIGHT / 2 - (ENDS - 0.25) * HEIGHT / 19
    return -end, end


def _connections(ax: Axes, x: int, matrix: np.ndarray, left: Column, right: Column) -> None:
    """One curve per pair of places and kind (positive, negative, of a dead neuron), strong ones on top, as wide as the sum of |w|."""
    rows, cols = np.nonzero(matrix)
    if not len(rows):
        return
    values, idle = matrix[rows, cols], ~(right.live[rows] & left.live[cols])
    kind = np.where(idle, 2, values < 0)
    keys = (right.slot[rows] * len(left.y) + left.slot[cols]) * 3 + kind
    pairs, inverse = np.unique(keys, return_inverse=True)
    strength = np.bincount(inverse, weights=np.abs(values))
    strength /= max(strength[pairs % 3 < 2], default=1.0)
    order = np.lexsort((strength, pairs % 3 < 2))
    pairs, share = pairs[order], np.minimum(strength[order], 1)
    start, end, kind = left.y[pairs // 3 % len(left.y)], right.y[pairs // 3 // len(left.y)], pairs % 3
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    curves = [Path([(x, a), (x + 0.45, a), (x + 0.55, b), (x + 1, b)], codes) for a, b in zip(start, end, strict=True)]
    crowd = min(1.0, (160 / len(pairs)) ** 0.6)
    inks = np.array(
        [to_rgba(c) for c in (series(POSITIVE)["color"], series(NEGATIVE)["color"], mpl.rcParams["xtick.color"])]
    )
    dashes = (lambda at: "-", lambda at: (at * 1.7 % 4.8, (3.5, 1.3)), lambda at: (at * 1.1 % 3.6, (0.8, 2.8)))
    colours = inks[kind]
    colours[:, 3] = np.clip((0.25 + 0.7 * share) * (0.25 + 0.75 * crowd), 0.05, 0.95)
    colours[kind == 2, 3] = 0.6
    lines = PathCollection(
        curves,
        facecolors="none",
        edgecolors=colours,
        linewidths=np.where(kind == 2, 0.6, 0.4 + 2.1 * share * (0.3 + 0.7 * crowd)),
        linestyles=[
            dashes[k](at) for at, k in enumerate(kind)
        ],  # each its own offset, or a crowd of dashes shows stripes
        capstyle="butt",
        zorder=1,
    )
    ax.add_collection(lines)


def _neurons(ax: Axes, x: int, column: Column, colour: Any) -> None:
    paper = mpl.rcParams["axes.facecolor"]
    low, high = _bar()
    if not column.single.all() and not column.dead:
        shape = FancyBboxPatch((x - WIDTH / 2, low), WIDTH, high - low, boxstyle="round,pad=0,rounding_size=0.06", mutation_aspect=7,
                               facecolor=paper, edgecolor=colour, linewidth=1.2, zorder=3)  # fmt: skip
        ax.add_patch(shape)
        step = (high - low) / (len(column.live) - 2 * ENDS)
        y = high - (np.flatnonzero(column.live[ENDS:-ENDS]) + 0.5) * step
        half, reach = max(0.35 * step, 0.025), WIDTH * 0.42
        ticks = [
            [(x - reach, at - half), (x + reach, at - half), (x + reach, at + half), (x - reach, at + half)] for at in y
        ]
        ax.add_collection(PolyCollection(ticks, facecolors=[colour], linewidths=0, zorder=4))
    alive = np.zeros(len(column.y), bool)
    np.logical_or.at(alive, column.slot, column.live)
    many = np.count_nonzero(column.single)
    size = 95 if many <= 14 else 60
    for mask, face in ((column.single & alive, colour), (column.single & ~alive, paper)):
        ax.scatter(
            np.full(mask.sum(), x), column.y[mask], s=size, facecolor=face, edgecolor=colour, linewidth=1.2, zorder=5
        )
    if column.dead:
        ax.scatter(
            [x],
            column.y[-1:],
            s=size,
            facecolor=paper,
            edgecolor=colour,
            linewidth=1.2,
            linestyle=(0, (2, 1.2)),
            zorder=5,
        )
        ax.annotate(f"{column.dead:,} dead", (x, column.y[-1]), xytext=(0, -9), textcoords="offset points", ha="center", va="top",
                    fontsize=7, color=mpl.rcParams["xtick.labelcolor"], zorder=6)  # fmt: skip


def _heading(ax: Axes, x: int, column: Column, name: str, colour: Any) -> None:
    units, alive = len(column.live), int(column.live.sum())
    ax.text(x, HEIGHT / 2 + 2.15, name, ha="center", va="bottom", fontsize=10, fontweight="bold", color=colour)
    ax.text(
        x,
        HEIGHT / 2 + 2.0,
        f"{units:,}" if alive == units else f"{alive:,} of {units:,}",
        ha="center",
        va="top",
        fontsize=8.5,
    )


def _names(ax: Axes, x: int, column: Column, names: Sequence[str], side: str) -> None:
    if not names:
        return
    if len(names) != len(column.live):
        raise PrunelabError(f"drawing.network: {len(names)} names for a layer of {len(column.live)} neurons")
    if column.single.all() and len(column.y) == len(names):
        for name, y in zip(names, column.y, strict=True):
            ax.text(x + (0.12 if side == "left" else -0.12), y, name, ha=side, va="center", fontsize=8)


def _colour(x: int, columns: int) -> Any:
    return series(COLUMNS[0] if x in (0, columns - 1) else COLUMNS[1 + (x - 1) % (len(COLUMNS) - 1)])["color"]


def _small() -> dict[str, Any]:
    return {
        "ha": "center",
        "va": "top",
        "fontsize": 7.5,
        "color": mpl.rcParams["xtick.labelcolor"],
        "linespacing": 1.25,
    }


def _key() -> list[Line2D]:
    grey, paper = mpl.rcParams["xtick.color"], mpl.rcParams["axes.facecolor"]
    dot = {"linestyle": "", "marker": "o", "markersize": 7, "markeredgecolor": grey}
    return [
        Line2D([], [], color=series(POSITIVE)["color"], label="weight > 0"),
        Line2D([], [], color=series(NEGATIVE)["color"], linestyle=(0, (3.5, 1.3)), label="weight < 0"),
        Line2D([], [], color=series(POSITIVE)["color"], linewidth=2.8, label="larger |weight|"),
        Line2D([], [], markerfacecolor=grey, label="live neuron", **dot),
        Line2D([], [], markerfacecolor=paper, label="dead neuron", **dot),
        Line2D([], [], color=grey, linestyle=(0, (0.8, 2.8)), label="its connections"),
    ]


def _words(names: Sequence[str], columns: Sequence[Column], kept: int, total: int) -> str:
    layers = ", ".join(
        f"{name} {int(c.live.sum()):,} of {len(c.live):,}" for name, c in zip(names, columns, strict=True)
    )
    return f"Drawing of a network: {kept:,} of {total:,} weights are left ({100 * kept / total:.3g} %). Live neurons: {layers}."
