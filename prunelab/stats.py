"""Means with Student-t intervals over independent runs, and paired differences.

Three seeds are few: half the width of a 95 % interval is then 4.3 standard errors, not 1.96. What is shown as an
interval in prunelab is always this one, with its n beside it. NaN stands for "not measured" and counts as no run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from prunelab.errors import PrunelabError, nearest


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over ``n`` runs and how far from it the true mean may be.

    Attributes:
        mean: Of the values that are not NaN; NaN where there are none.
        half: Half the width of the interval; NaN below two values, since one run says nothing about the spread.
        n: Number of values.
        sd: Sample standard deviation (n - 1 in the denominator); NaN below two values.
        level: Fraction of such intervals that contain the true mean, for normal values.
    """

    mean: float
    half: float
    n: int
    sd: float
    level: float = 0.95

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        half = "" if math.isnan(self.half) else f" ± {self.half:.4g}"
        return f"{self.mean:.4g}{half} (n = {self.n})"


def mean_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """The mean and its Student-t interval, ``mean ± t(level, n - 1) · sd / sqrt(n)``.

    Args:
        values: One number per independent run.
        level: Confidence level, between 0 and 1.

    Raises:
        PrunelabError: a level that is no fraction.
    """
    numbers = np.asarray([*values], dtype=float)
    numbers = numbers[~np.isnan(numbers)]
    n = len(numbers)
    with np.errstate(invalid="ignore"):  # a loss that grew to inf has mean inf and no interval
        mean = float(numbers.mean()) if n else math.nan
        sd = float(numbers.std(ddof=1)) if n > 1 else math.nan
    if n > 1 and (numbers == numbers[0]).all():  # their mean may be off by a rounding, and with it the deviation
        mean, sd = float(numbers[0]), 0.0
    return Interval(mean, float(_half(np.array(sd), np.array(n), level)), n, sd, level)


def paired_difference(
    a: Sequence[float] | Mapping[object, float] | pd.Series,
    b: Sequence[float] | Mapping[object, float] | pd.Series,
    level: float = 0.95,
) -> Interval:
    """The mean of ``a - b`` over runs that share a seed, with its interval; narrower than that of two unpaired means.

    Args:
        a: One number per seed; a mapping or a Series is matched by its keys, a sequence by position.
        b: The same for what is compared with.
        level: Confidence level, between 0 and 1.

    Returns:
        The interval of the differences; a pair with a NaN counts as none.

    Raises:
        PrunelabError: numbers without a partner.
    """
    keyed = isinstance(a, Mapping | pd.Series) and isinstance(b, Mapping | pd.Series)
    left, right = (pd.Series(x, dtype=float) if keyed else pd.Series([*x], dtype=float) for x in (a, b))
    if not (left.index.is_unique and right.index.is_unique):
        raise PrunelabError(
            "a paired difference needs one number per seed: a seed occurs twice, so choose one round or epoch"
        )
    if alone := [*left.index.symmetric_difference(right.index)]:
        what = (
            f"{alone[0]!r} is only on one side; index both by seed"
            if keyed
            else f"there are {len(left)} and {len(right)} numbers"
        )
        raise PrunelabError(f"a paired difference needs a partner for each number: {what}")
    with np.errstate(invalid="ignore"):
        return mean_interval(left - right.reindex(left.index), level)


def summarise(
    df: pd.DataFrame, by: str | Sequence[str], columns: str | Sequence[str], level: float = 0.95
) -> pd.DataFrame:
    """Mean and half width of the interval of each column, in each group of runs.

    Args:
        df: Within each group one row per independent run, so one round or epoch: group by ``round`` too, or filter.
        by: Columns that make a group; a missing value is a value of its own.
        columns: Columns of numbers.
        level: Confidence level, between 0 and 1.

    Returns:
        One row per group, sorted: the columns of ``by``; ``column`` and ``column_half`` for each column, over the runs
        that have it; and ``n``, the number of runs: the smallest, where some columns were measured in fewer runs.

    Raises:
        PrunelabError: a column that does not exist.
    """
    by, columns = ([names] if isinstance(names, str) else [*names] for names in (by, columns))
    if not by or not columns:
        raise PrunelabError("summarise needs at least one column to group by and one of numbers")
    for name in [*by, *columns]:
        if name not in df:
            raise PrunelabError(f"no column {name!r}: {nearest(name, map(str, df.columns))}")
    groups = df[columns].astype(float).groupby([df[name] for name in by], dropna=False, observed=True)
    with np.errstate(invalid="ignore"):
        mean, sd, n = groups.mean(), groups.std(ddof=1), groups.count()
    found = {}
    for name in columns:
        found[name] = mean[name]
        found[f"{name}_half"] = pd.Series(_half(sd[name].to_numpy(), n[name].to_numpy(), level), index=n.index)
    # A column that nobody measured is NaN for all to see; it must not hide how many runs the others are from.
    fewest = n.where(n > 0).min(axis="columns").fillna(0).astype("int64")
    return pd.DataFrame({**found, "n": fewest}).reset_index()


def _half(sd: np.ndarray, n: np.ndarray, level: float) -> np.ndarray:
    """Half the width of the interval; NaN where ``sd`` is."""
    if not 0 < level < 1:
        raise PrunelabError(f"level = {level}: should be a fraction between 0 and 1, as 0.95")
    try:
        from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats takes three times as long to load
    except ImportError:
        raise PrunelabError("intervals need scipy: install it with pip install 'prunelab[lab]'") from None
    return stdtrit(np.maximum(n - 1, 1), (1 + level) / 2) * sd / np.sqrt(np.maximum(n, 1))
