"""Words, units and number formats of the columns that are shown: one vocabulary for axes, tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunelab.errors import PrunelabError, nearest

if TYPE_CHECKING:
    import pandas as pd

MISSING = "–"  # noqa: RUF001 - an en dash, as in any printed table
TIMES = "×"  # noqa: RUF001
SIGNIFICANT = 3  # digits of a number whose column has no fixed count of decimals


@dataclass(frozen=True)
class Quantity:
    """How one column is shown.

    Attributes:
        label: in words, without the unit.
        unit: shown after the number; empty for counts and shares.
        scale: shown value = stored value * scale (100 for shares that are shown in per cent).
        decimals: digits after the point; None: as many as show three significant digits.
        trim: in sentences, leave out zeros at the end.
        log: whether an axis of it is logarithmic.
    """

    label: str
    unit: str = ""
    scale: float = 1.0
    decimals: int | None = None
    trim: bool = False
    log: bool = False

    @property
    def axis(self) -> str:
        """``test accuracy (%)``."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def decimals_for(self, values: Iterable[float]) -> int:
        """Digits after the point that suit all of ``values`` (stored, not scaled)."""
        if self.decimals is not None:
            return self.decimals
        sizes = [abs(v * self.scale) for v in values if math.isfinite(v) and v]
        return min(max(SIGNIFICANT - 1 - math.floor(math.log10(min(sizes))), 0), 6) if sizes else 0

    def number(self, value: float, decimals: int | None = None) -> str:
        """``97.10``: scaled, without the unit; a missing value is an en dash."""
        if not math.isfinite(value):
            return MISSING
        digits = self.decimals_for([value]) if decimals is None else decimals
        return f"{value * self.scale:,.{digits}f}"

    def text(self, value: float, half: float = math.nan) -> str:
        """``97.10 % ± 0.31``: with its unit and, where it is known, the half width of its interval."""
        digits = self.decimals_for([value])
        shown = self.number(value, digits)
        if self.trim and "." in shown:
            shown = shown.rstrip("0").rstrip(".")
        shown += f" {self.unit}" if self.unit else ""
        return f"{shown} ± {self.number(half, digits)}" if math.isfinite(half) else shown


def _accuracy(label: str) -> Quantity:
    return Quantity(label, "%", 100, 2)


PARTS = ("train", "validation", "test")
_KNOWN = {
    **{f"{part}_accuracy": _accuracy(f"{part} accuracy") for part in PARTS},
    **{f"{part}_loss": Quantity(f"{part} loss", decimals=4) for part in PARTS},
    "test_f1_macro": _accuracy("macro F1"),
    "best_test_epoch_accuracy": _accuracy("test accuracy of the best epoch, selected on the test set"),
    "pruned_test_accuracy": _accuracy("test accuracy before recovery"),
    **{f"{part}_difference": Quantity(f"difference in {part} accuracy", "points", 100, 2) for part in PARTS},
    "parameters_removed": Quantity("parameters removed", "%", 100, 2),
    "sparsity": Quantity("sparsity", decimals=4, trim=True),
    "spared": Quantity("units gone within a point", "%", 100, 1),
    "requested_sparsity": Quantity("requested sparsity", decimals=4, trim=True),
    "fraction": Quantity("fraction of units left", decimals=3, trim=True, log=True),
    "density": Quantity("density (share of weights left)", trim=True, log=True),
    "compression_ratio": Quantity("compression", TIMES, log=True),
    "weights": Quantity("weights left", decimals=0, log=True),
    "weights_total": Quantity("weights of the dense network", decimals=0, log=True),
    "parameters": Quantity("parameters left", decimals=0, log=True),
    "neurons_share": Quantity("share of neurons left", decimals=3, trim=True),
    "filters": Quantity("filters left", decimals=1, trim=True),
    "learning_macs": Quantity("multiply-accumulates that learn", decimals=0, log=True),
    "forward_share": Quantity("forward operations", "% of full training", 100, 1),
    "training_macs": Quantity("multiply-accumulates of the training", decimals=0, log=True),
    "training_seconds": Quantity("training and pruning time", "s"),
    "units": Quantity("neurons left", decimals=0, log=True),
    "units_total": Quantity("neurons of the dense network", decimals=0, log=True),
    "macs": Quantity("multiply-accumulates", decimals=0, log=True),
    "effective_macs": Quantity("effective multiply-accumulates", decimals=0, log=True),
    "test_error": Quantity("test error", "%", 100, 2),
    "flops": Quantity("FLOPs", decimals=0, log=True),
    "flops_left": Quantity("FLOPs left", "%", 100, 2),
    "counted_ratio": Quantity("compression, as published", TIMES, log=True),
    "firing_units": Quantity("units that fire", decimals=1, trim=True),
    "firing": Quantity("firing", "% of samples", 100, 1),
    "selected_classes": Quantity("classes per unit", decimals=2),
    "speedup": Quantity("measured speed-up", TIMES, log=True),
    "theoretical_speedup": Quantity("theoretical speed-up", TIMES, log=True),
    "kib": Quantity("size", "KiB", log=True),
    "seconds": Quantity("training time", "s"),
    "seconds_spent": Quantity("training time, shared by runs that begin alike", "s"),
    "prune_seconds": Quantity("pruning time", "s"),
    "minutes": Quantity("minutes"),
    "round": Quantity("round", decimals=0),
    "epoch": Quantity("epoch", decimals=0),
    "epochs": Quantity("epochs", decimals=0),
    "n": Quantity("n", decimals=0),
    "trigger": Quantity("relative gradient", decimals=4),
    "rate": Quantity("pruning rate", decimals=4),
}


def quantity(column: str) -> Quantity:
    """The way to show ``column``; an unknown one is shown under its own name, its settings prefix cut off."""
    return _KNOWN.get(column) or Quantity(column.rpartition(".")[2].replace("_", " "), trim=True)


def short(count: float) -> str:
    """``2.79M``, ``323k``, ``4.64k``, ``403``: a count where there is little room."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}" if count < 1000 else f"{count:.0f}"


def need(frame: pd.DataFrame, columns: Iterable[str], where: str, name: str | None = None) -> pd.DataFrame:
    """``frame`` itself, once it is known to have rows and ``columns``.

    Args:
        frame: a table from outside.
        columns: that it must have.
        where: for the message.
        name: the one of them that names the series; a row without a name would be lost without a word.

    Raises:
        PrunelabError: a missing column, with the nearest that is there; a row without a name; no row at all.
    """
    for column in columns:
        if column not in frame.columns:
            raise PrunelabError(
                f"{where}: the table has no column {column!r}: {nearest(column, map(str, frame.columns))}"
            )
    if frame.empty:
        raise PrunelabError(
            f"{where}: the table has no rows; check the query that selected them, or run the experiment first"
        )
    if name and (lost := int(frame[name].isna().sum())):
        raise PrunelabError(
            f"{where}: {lost} rows have no {name!r}; fill that column, or choose another for the series"
        )
    return frame
