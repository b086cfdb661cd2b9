"""The curves that a paper's figures show, as numbers, and how ours lie beside them. No torch."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from prunelab import paths
from prunelab.errors import PrunelabError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.stats import Interval

BEST_TEST_EPOCH = "best_test_epoch_accuracy"
CLOSE = (
    0.015  # so near to the reported interval a point agrees; as much as a value read from a picture may be off at most
)
READING = 0.001  # by how much it is off on average, by a check against exact ones (share of 1)
NARROW = 0.025  # half of an interval of ours that is narrow enough to say something; our own default
SAME_POINT = 1e-3  # fractions that are the same point: those read from a picture were computed from the counts
_NOTHING = 1e-6  # stands for a fraction of 0, which has no logarithm


@functools.cache
def _all(paper: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(paths.PACKAGE / "papers" / paper / "reported.csv")


def reported(paper: str, figure: str) -> pd.DataFrame:
    """What a figure of a paper shows.

    Args:
        paper: ``"dropnet"``.
        figure: as the paper numbers it: ``"Fig 3"``, ``"Supp Fig 7"``; ``""``: no reported values, an empty table.

    Returns:
        strategy, fraction (of the units left), value, half (of the reported interval, NaN where none was read),
        source: ``authors' result files`` (exact) or ``read from the figure``.

    Raises:
        PrunelabError: a figure without reported values.
    """
    table = _all(paper)
    if figure and figure not in set(table["figure"]):
        raise PrunelabError(
            f"{paper}: no reported values of {figure!r}: {nearest(figure, sorted(set(table['figure'])))}"
        )
    return table[table["figure"] == figure].drop(columns="figure").reset_index(drop=True)


def beside(ours: pd.DataFrame, theirs: pd.DataFrame, y: str) -> pd.DataFrame:
    """Every reported point beside ours.

    A point agrees if ours lies within the reported interval and ``CLOSE``, or, where our own interval is narrow
    (``NARROW``), within that too. It does not agree where not even our interval reaches so far; where only the width
    of our interval, or a single run, lets it agree, it is undecided.
    A network of other widths than the paper's comes to slightly other fractions by layer: there the reported value is
    read between two.

    Args:
        ours: one row per run and round: strategy, fraction, seed, ``y``.
        theirs: of ``reported``.
        y: the column that is compared.

    Returns:
        strategy, fraction, reported, reported_half, ours, ours_half, n, difference (ours - reported), allowed, agrees;
        one row per point of ours. Where there is no reported value, its columns are NaN and ``agrees`` is None, as it
        is where a reported point is undecided.
    """
    import numpy as np
    import pandas as pd

    from prunelab import stats

    means = stats.summarise(ours, ["strategy", "fraction"], [y])
    theirs = theirs.rename(columns={"value": "reported", "half": "reported_half"})
    parts = []
    for name, own in means.groupby("strategy", sort=False):
        there = theirs[theirs["strategy"] == name].drop(columns="strategy").sort_values("fraction")
        if there.empty:
            parts.append(own.assign(reported=np.nan, reported_half=np.nan))
            continue
        own = pd.merge_asof(
            own.sort_values("fraction"), there, on="fraction", direction="nearest", tolerance=SAME_POINT
        )
        # In each round a fraction of what is left goes, so what lies between points is read on a log scale.
        at, points = (np.log(t["fraction"].clip(lower=_NOTHING)) for t in (own, there))
        apart = own["reported"].isna()
        for column in ("reported", "reported_half"):
            own.loc[apart, column] = np.interp(at[apart], points, there[column], left=np.nan, right=np.nan)
        parts.append(own)
    table = pd.concat(parts).rename(columns={y: "ours", f"{y}_half": "ours_half"})
    table["difference"] = table["ours"] - table["reported"]
    table = judged(table)
    order = list(dict.fromkeys(ours["strategy"]))
    table = table.sort_values(
        ["strategy", "fraction"], key=lambda c: c.map(order.index) if c.name == "strategy" else -c
    )
    columns = ["strategy", "fraction", "reported", "reported_half", "ours", "ours_half", "n", "difference", "allowed"]
    return table[[*columns, "agrees"]].reset_index(drop=True)


def judged(points: pd.DataFrame) -> pd.DataFrame:
    """The columns ``allowed`` and ``agrees`` of points, from the others; the rule of ``beside``."""
    off, own = points["difference"].abs(), points["ours_half"]
    near = points["reported_half"].fillna(0) + CLOSE
    allowed = near + own.where(own <= NARROW, 0).fillna(0)
    undecided = (off > allowed) & ((off <= near + own) | (points["n"] < 2))
    agrees = (off <= allowed).astype(object).where(points["reported"].notna() & ~undecided, None)
    return points.assign(allowed=allowed, agrees=agrees)


def agreeing(points: pd.DataFrame) -> Interval | float:
    """Of the curve that agrees least with the reported one, the share of points that do; NaN without reported values.

    Args:
        points: of ``beside``.

    Returns:
        A number; where points are undecided, the interval from "none of them agrees" to "all of them do".
    """
    import pandas as pd

    from prunelab.stats import Interval

    judged = points.dropna(subset=["reported"])
    if not len(judged):
        return math.nan
    told = pd.DataFrame({"surely": judged["agrees"].eq(True), "perhaps": ~judged["agrees"].eq(False)})
    low, high = (float(share) for share in told.groupby(judged["strategy"]).mean().min())
    return low if low == high else Interval((low + high) / 2, (high - low) / 2, int(judged["n"].min()), math.nan)


def lead(ours: pd.DataFrame, first: str, second: str, y: str, low: float = 0.0, high: float = 1.0) -> Interval:
    """By how much one curve lies above another, averaged over the fractions that both have, run by run.

    Args:
        ours: one row per run and round: strategy, fraction, seed, ``y``.
        first: a strategy.
        second: another; its values are interpolated where its fractions differ.
        y: the column that is compared.
        low: only fractions from here on,
        high: up to here; the dense networks (1) never count.

    Returns:
        The paired interval over seeds of mean(first) - mean(second), in the unit of ``y``; NaN where there is nothing.
    """
    import numpy as np

    from prunelab import stats

    def by_seed(name: str) -> dict[object, tuple[np.ndarray, np.ndarray]]:
        own = ours[(ours["strategy"] == name) & (ours["fraction"] < 1)].sort_values("fraction")
        return {seed: (g["fraction"].to_numpy(), g[y].to_numpy()) for seed, g in own.groupby("seed")}

    a, b = by_seed(first), by_seed(second)
    differences = {}
    for seed in a.keys() & b.keys():
        at = a[seed][0][(a[seed][0] >= max(low, b[seed][0][0])) & (a[seed][0] <= min(high, b[seed][0][-1]))]
        if len(at):
            differences[seed] = float(np.mean(np.interp(at, *a[seed]) - np.interp(at, *b[seed])))
    return stats.mean_interval(differences.values())


def loss_at(ours: pd.DataFrame, strategy: str, fraction: float, y: str) -> Interval:
    """What a curve has lost at a fraction of the units, compared with the dense networks of the same seeds.

    Args:
        ours: one row per run and round: strategy, fraction, seed, ``y``.
        strategy: which curve.
        fraction: interpolated between the measured ones.
        y: the column that is compared.

    Returns:
        The paired interval over seeds of dense - pruned, in the unit of ``y``.
    """
    import numpy as np

    from prunelab import stats

    own = ours[ours["strategy"] == strategy].sort_values("fraction")
    found = {}
    for seed, group in own.groupby("seed"):
        at, level = group["fraction"].to_numpy(), group[y].to_numpy()
        found[seed] = float(level[-1] - np.interp(fraction, at, level)) if at[0] <= fraction else float("nan")
    return stats.mean_interval(found.values())


def removed_without_loss(rounds: pd.DataFrame, strategy: str, tolerance: float = 0.0) -> Interval:
    """The largest share of the parameters that a strategy removes without loss, chosen on the validation part.

    Args:
        rounds: one row per run and round: strategy, seed, round, parameters, validation_accuracy.
        strategy: whose runs.
        tolerance: how much lower than the dense network's the validation accuracy may be, as a share.
    """
    from prunelab import stats

    found = []
    for _, own in rounds[rounds["strategy"] == strategy].sort_values("round").groupby("seed"):
        dense = own.iloc[0]
        enough = own[own["validation_accuracy"] >= dense["validation_accuracy"] - tolerance]
        found.append(1 - enough["parameters"].min() / dense["parameters"])
    return stats.mean_interval(found)


def mnist_comparison(network: str) -> pd.DataFrame:
    """What other methods reach on MNIST: test error in per cent and compression, as one of their papers tabulates them.

    Args:
        network: ``lenet_300_100`` or ``lenet_5``.

    Returns:
        method, test_error, compression, source. None of the rows is NNrelief's own: those could not be read.
    """
    import pandas as pd

    table = pd.read_csv(paths.PACKAGE / "papers" / "nnrelief" / "mnist_comparison.csv")
    if network not in set(table["network"]):
        raise PrunelabError(f"no comparison rows of {network!r}: {nearest(network, sorted(set(table['network'])))}")
    return table[table["network"] == network].drop(columns="network").reset_index(drop=True)


def literature(data: str, model: str = "") -> pd.DataFrame:
    """What pruning papers report, as Blalock et al. collected it: accuracy with compression or theoretical speed-up.

    Source: the table of results of 81 papers beside "What is the State of Neural Network Pruning?" (MLSys 2020), in
    github.com/JJGO/shrinkbench (MIT licence); rows with an accuracy and one of both, for small images.

    Args:
        data: as that table spells it: ``CIFAR-10``, ``CIFAR-100``.
        model: beginning of its name there, as ``ResNet-``; empty: all.

    Returns:
        paper, data, model, method, accuracy, dense_accuracy, compression_ratio, theoretical_speedup, source.
    """
    import pandas as pd

    table = pd.read_csv(paths.PACKAGE / "papers" / "related" / "literature.csv").rename(
        columns={"compression": "compression_ratio", "speedup": "theoretical_speedup"}
    )
    if data not in set(table["data"]):
        raise PrunelabError(f"no results in the literature on {data!r}: {nearest(data, sorted(set(table['data'])))}")
    return table[(table["data"] == data) & table["model"].str.startswith(model)].reset_index(drop=True)


def best_test_epochs(rounds: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """The rounds with the accuracy of the epoch that was best on the test part, which NNrelief's code reports.

    It is selected on the test part, so it is too high; it stands beside the honest one and decides nothing.

    Args:
        rounds: one row per run and round: id, round, train.test_every_epoch.
        epochs: one row per run and epoch: id, round, test_accuracy.

    Returns:
        ``rounds`` with a column more, NaN for runs that did not measure the test part after each epoch.
    """
    best = epochs.groupby(["id", "round"])["test_accuracy"].max().rename(BEST_TEST_EPOCH)
    found = rounds.merge(best.reset_index(), on=["id", "round"], how="left")
    measured = found["train.test_every_epoch"].astype("boolean").fillna(False).astype(bool)
    return found.assign(**{BEST_TEST_EPOCH: found[BEST_TEST_EPOCH].where(measured)})


def more_compression(rounds: pd.DataFrame, first: str, second: str) -> Interval:
    """By how much more one strategy has compressed at its last round than another: log of the ratio, paired by seed.

    Args:
        rounds: one row per run and round: strategy, seed, round, compression_ratio.
        first: a strategy.
        second: another.
    """
    import numpy as np

    from prunelab import stats

    last = rounds.loc[rounds.groupby(["strategy", "seed"])["round"].idxmax()].set_index(["strategy", "seed"])
    size = np.log(last["compression_ratio"])
    return stats.paired_difference(size[first], size[second])


def kept_at_compression(rounds: pd.DataFrame, least: float, y: str = "test_accuracy") -> Interval:
    """Accuracy of the first network with at least so much compression minus that of the dense one, paired by seed.

    Args:
        rounds: one row per run and round: seed, round, compression_ratio, ``y``.
        least: the compression; runs that do not reach it count as not measured.
        y: the column that is compared.
    """
    from prunelab import stats

    found = {}
    for seed, own in rounds.sort_values("round").groupby("seed"):
        reached = own.loc[own["compression_ratio"] >= least, y]
        found[seed] = float(reached.iloc[0] - own[y].iloc[0]) if len(reached) else float("nan")
    return stats.mean_interval(found.values())
