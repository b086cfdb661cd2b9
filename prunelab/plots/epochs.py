"""Pictures of trainings, epoch by epoch: DyPrune's 2 x 2 view, what is left, its pruning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from prunelab.plots import marks
from prunelab.plots.pictures import Picture, Shown, canvas
from prunelab.pruners import schedules
from prunelab.runs.columns import MISSING, need, quantity, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from typing_extensions import Unpack

BAND = (0.0, 0.05)  # relative gradients at which DyPrune prunes: pruning_min and pruning_max of the published code
CLIP = -1.5  # relative gradients below this are drawn beyond the edge
PANELS = {
    "loss": "loss",
    "relative": "loss gradient / steepest fall so far",
    "accuracy": "accuracy (%)",
    "slope": "change of accuracy (points per epoch)",
}


def training(epochs: pd.DataFrame, *, band: tuple[float, float] | None = BAND, **shown: Unpack[Shown]) -> Picture:
    """DyPrune's 2 x 2 view of a training: loss, its relative gradient, accuracy, its gradient; validation and test.

    Vertical lines mark the prunings, which happen after the values of their epoch were taken, with the weights that
    the next epoch starts with.

    Args:
        epochs: one row per run and epoch: id, epoch, validation_loss, validation_accuracy, pruned, weights (those that
            the epoch trained); test_loss, test_accuracy and trigger where there are any. Several runs: thin lines, and
            their mean on top.
        band: relative gradients at which the method prunes, shaded; None: no shade.
        shown: title, provenance, look, size.

    Source: the plot of ``fit()`` in the published code of DyPrune; the symmetric-log axis is our own.
    """
    columns = ["id", "epoch", "validation_loss", "validation_accuracy", "weights", "pruned"]
    frame = _with_gradients(need(epochs, columns, "plots.training"))
    parts = [part for part in ("validation", "test") if f"{part}_relative" in frame]
    events = _events(frame)
    sheet = canvas(2, 2, **{"size": (9, 6.2), **shown}, counted=_counted(frame), sharex=True)
    with sheet as (picture, axes):
        for ax, (column, label) in zip(axes.flat, PANELS.items(), strict=True):
            for position, part in enumerate(parts):
                marks.runs(ax, frame, f"{part}_{column}", part, position)
            for row in events.itertuples():
                grey = mpl.rcParams["xtick.color"]
                ax.axvline(row.at, color=grey, linewidth=0.8, alpha=0.25 + 0.6 * row.share, zorder=0.5)
            ax.set_title(label)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _relative_axis(axes[0, 1], band)
        axes[1, 1].axhline(0, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8)
        for top, bottom in axes.T:
            _label_events(top, events)
            bottom.set_xlabel("epoch")
        picture.key(*axes[0, 1].get_legend_handles_labels(), columns=3)
        picture.alt = _words(frame, parts, events)
    return picture


def weights_left(epochs: pd.DataFrame, hue: str | None = None, **shown: Unpack[Shown]) -> Picture:
    """Weights and neurons left while the network trains, on log axes; a dotted line where every run pruned.

    Args:
        epochs: one row per run and epoch: id, epoch, weights, units, pruned; ``hue``.
        hue: column of the series; None: one series.
        shown: title, provenance, look, size.
    """
    keys = ["id", "epoch", "pruned", *([hue] if hue else [])]
    frame = need(epochs, [*keys, "weights", "units"], "plots.weights_left").sort_values(["id", "epoch"])
    words = []
    with canvas(2, 1, **{"size": (7.6, 5.4), **shown}, counted=_counted(frame, hue), sharex=True) as (picture, axes):
        for ax, column in zip(axes[:, 0], ("weights", "units"), strict=True):
            quant = quantity(column)
            for position, (name, rows) in enumerate(marks.groups(frame, hue, epochs)):
                # What is left changes between epochs.
                mean = marks.runs(ax, rows, column, str(name), position, drawstyle="steps-mid")
                ends = [quant.text(value) for value in mean.iloc[[0, -1]]] if len(mean) else [MISSING] * 2
                words.append(f"{name or 'All'}: {quant.label} {ends[0]} in the first epoch, {ends[1]} in the last.")
            together = _events(frame)
            for at in together.loc[together["share"] == 1, "at"]:
                ax.axvline(at, color=mpl.rcParams["xtick.color"], linewidth=0.8, linestyle=":", zorder=0.5)
            ax.set_title(quant.axis)
            if frame[column].min() > 0:
                marks.counts(ax, "y")
            else:
                ax.set_ylim(bottom=0)
        axes[-1, 0].set_xlabel("epoch")
        axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        marks.legend(axes[0, 0], hue)
        picture.alt = " ".join(words)
    return picture


def rate_curve(
    points: pd.DataFrame,
    events: pd.DataFrame | None = None,
    *,
    fixed_point: float | None = None,
    **shown: Unpack[Shown],
) -> Picture:
    """Pruning rate against the size of the network, and the way down that it leads to.

    Args:
        points: the rule as a curve: weights, rate.
        events: prunings that followed it: series (a name), event (0: before the first), weights (left after it); rate,
            where there is one, at which these weights are pruned next. Several rows of a series and event: their mean.
        fixed_point: size at and below which nothing is removed; None: the largest in ``points`` whose rate is 0.
        shown: title, provenance, look, size.
    """
    rule = need(points, ["weights", "rate"], "plots.rate_curve").sort_values("weights")
    still = rule.loc[rule["rate"] <= 0, "weights"]
    end = fixed_point if fixed_point is not None else (float(still.max()) if len(still) else None)
    panels = 1 if events is None else 2
    with canvas(1, panels, **{"size": (1.8 + 3.6 * panels, 3.9), **shown}) as (picture, axes):
        left = axes[0, 0]
        left.plot(rule["weights"], rule["rate"], color=mpl.rcParams["text.color"], linewidth=1.8, zorder=3)
        marks.counts(left, "x")
        left.set_xlabel("non-zero weights n")
        left.set_title("pruning rate (share of the remaining weights)")
        left.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        words = [f"The pruning rate goes from {rule['rate'].min():.3g} to {rule['rate'].max():.3g} with the weights."]
        if end is not None:
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "fontsize": 8}
            left.axvline(end, **marks.reference())
            left.annotate(f"fixed point\nn = {end:,.0f}", (end, 0.97), (6, 0), **place)
            words.append(f"It is zero up to {end:,.0f} weights.")
        if events is not None:
            need(events, ["series", "event", "weights"], "plots.rate_curve")
            words += _way_down(left, axes[0, 1], events, end)
        picture.alt = " ".join(words)
    return picture


def _with_gradients(epochs: pd.DataFrame) -> pd.DataFrame:
    """Rows by run and epoch with the relative gradients and slopes of what was measured; accuracies in per cent."""
    frame = epochs.sort_values(["id", "epoch"]).reset_index(drop=True)
    for part in ("validation", "test"):
        if f"{part}_loss" not in frame or frame[f"{part}_loss"].isna().all():
            continue
        losses = frame.groupby("id")[f"{part}_loss"]
        frame[f"{part}_relative"] = losses.transform(lambda values: schedules.relative_gradient(values.to_numpy()))
        frame[f"{part}_accuracy"] = frame[f"{part}_accuracy"] * 100
        frame[f"{part}_slope"] = frame.groupby("id")[f"{part}_accuracy"].diff()
    if "trigger" in frame:  # what the method itself decided by comes before what can be computed again
        frame["validation_relative"] = frame["trigger"].fillna(frame["validation_relative"])
    return frame


def _events(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per epoch after which some run pruned: between which epochs, share of the runs, mean weights after it."""
    frame = (
        frame.assign(left=frame.groupby("id")["weights"].shift(-1)) if "weights" in frame else frame.assign(left=np.nan)
    )
    found = frame[frame["pruned"].astype(bool)].groupby("epoch").agg(share=("id", "count"), left=("left", "mean"))
    found["share"] /= frame["id"].nunique()
    return found.reset_index().assign(at=lambda rows: rows["epoch"] + 0.5)


def _label_events(ax: Axes, events: pd.DataFrame) -> None:
    """Weights left after each pruning along the upper edge; where prunings are too near to each other, not each."""
    room = np.ptp(ax.get_xlim()) / 26
    chosen: list[Any] = []
    for row in events.dropna(subset=["left"]).itertuples():
        if not chosen or row.at - chosen[-1].at >= room:
            chosen.append(row)
    if not chosen:
        return
    top = ax.secondary_xaxis("top")
    turned = {"rotation": 60, "ha": "left", "rotation_mode": "anchor"}
    top.set_xticks([row.at for row in chosen], [short(row.left) for row in chosen], **turned)
    top.tick_params(length=0, pad=1, labelsize=7)
    top.spines["top"].set_visible(False)
    top.set_xlabel("weights left after pruning", fontsize=7, loc="right", labelpad=2)


def _relative_axis(ax: Axes, band: tuple[float, float] | None) -> None:
    """Linear up to the upper edge of the band and logarithmic beyond, so that the band can be seen."""
    edge = band[1] if band else BAND[1]
    ax.set_yscale("symlog", linthresh=edge, linscale=0.9)
    low = min(-edge, max(ax.get_ylim()[0], CLIP))
    ax.set_ylim(low * 1.05, 1.25)
    ax.yaxis.set_major_locator(FixedLocator([tick for tick in (-1.0, -0.1, 0.0, edge, 0.1, 1.0) if tick >= low]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.axhline(0, color=mpl.rcParams["axes.edgecolor"], linewidth=0.8)
    if band:
        green = marks.series(2)["color"]
        ax.axhspan(*band, color=green, alpha=0.2, linewidth=0, zorder=0, label="may prune here")


def _words(frame: pd.DataFrame, parts: Sequence[str], events: pd.DataFrame) -> str:
    last, runs = frame.groupby("id").tail(1), frame["id"].nunique()
    words = [f"Four panels over {frame['epoch'].max():.0f} epochs, {runs} run{'s' if runs > 1 else ''}."]
    for part in parts:
        loss, accuracy = last[f"{part}_loss"].mean(), last[f"{part}_accuracy"].mean()
        words.append(f"{part.capitalize()}: loss ends at {loss:.3g}, accuracy at {accuracy:.1f} %.")
    where = ", ".join(f"{epoch:.0f}" for epoch in events["epoch"])
    end = f"{last['weights'].mean():,.0f} weights at the end."
    words.append(f"Pruned after epoch {where}; {end}" if where else f"No pruning; {end}")
    return " ".join(words)


def _way_down(left: Axes, right: Axes, events: pd.DataFrame, end: float | None) -> list[str]:
    """Prunings as points on the rule, and as weights left per pruning in the panel beside it."""
    words = []
    means = marks.means(events, by=["series", "event"], columns=["weights"])
    for position, (name, rows) in enumerate(marks.groups(means, "series", events)):
        look = marks.series(position)
        rows = rows.sort_values("event")
        marks.bars(right, rows, "event", "weights", label=str(name), **look)
        if "rate" in events:
            on = events[events["series"] == name].dropna(subset=["rate"])
            small = {"linestyle": "", "markersize": 4, "alpha": 0.75, "zorder": 4}
            left.plot(on["weights"], on["rate"], marker=look["marker"], color=look["color"], **small)
        first, last = rows["weights"].iloc[[0, -1]]
        words.append(f"{name}: {first:,.0f} weights become {last:,.0f} in {len(rows) - 1} prunings.")
    if end is not None:
        right.axhline(end, **marks.reference())
    marks.counts(right, "y")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("prunings so far")
    right.set_title("weights left")
    right.legend()
    return words


def _counted(frame: pd.DataFrame, hue: str | None = None) -> dict[str, str]:
    """How many runs a picture of single runs holds, per series."""
    runs = frame.groupby(hue)["id"].nunique() if hue else frame[["id"]].nunique()
    several = runs.max() > 1
    text = f"{marks.spell(runs)} run{'s' if several else ''}"
    return {"n": text, "interval": "thin: single runs, thick: mean" if several else ""}
