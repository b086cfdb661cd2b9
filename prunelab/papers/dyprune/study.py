"""DyPrune: data and their division, training, and the names of the strategies that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prunelab.errors import PrunelabError, nearest
from prunelab.settings import Data, Prune, Train

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.stats import Interval

UNPRUNED, FIXED_ORDER = "unpruned", "unpruned (batch order as published)"
_HEADLINE = "static trigger, dynamic rate, L1"  # scales the rate to the model and prunes throughout; our own choice
ALSO_RISING = (
    -1000.0
)  # lower end of the trigger's window that lets a rising loss prune as well; the published default is 0

_DYPRUNE_DATA = {
    # example.py: batches of 128, 50,000 / 10,000 / 10,000 samples.
    "fashion_mnist": (Data("fashion_mnist", validation=10_000), 128),
    # example.py: batches of 12, 100 / 25 / 25 samples. It scales by the extremes of all rows; ours are those of the
    # training rows.
    "iris": (Data("iris", validation=25, test=25, scaling="minmax"), 12),
    # Not in the paper: divided in the proportions of Iris, batches of 32.
    "digits": (Data("digits", validation=300, test=300), 32),
}


def dyprune(data: str, *, epochs: int = 25, train_size: int | None = None, shuffle: bool = True) -> tuple[Data, Train]:
    """Data and training of DyPrune: AdamW at 1e-3 with PyTorch's weight decay of 0.01, 25 epochs.

    Args:
        data: ``fashion_mnist`` or ``iris`` as in the paper's example.py, ``digits`` in their manner, or any other
            data set, with a tenth held out and batches of 128 (our own default).
        epochs: the budget.
        train_size: training samples that are used; None or 0: all. Validation and test parts are cut to as many.
        shuffle: False is as published: every epoch sees the same batches.
    """
    settings, batch_size = _DYPRUNE_DATA.get(data, (Data(data), 128))
    if train_size:
        settings = dataclasses.replace(settings, train_size=train_size, test_size=train_size)
    train = Train(epochs=epochs, batch_size=batch_size, weight_decay=0.01, shuffle=shuffle, test_every_epoch=True)
    return settings, train


def dyprune_strategies(
    triggers: Iterable[str] = ("dynamic", "static"),
    rates: Iterable[str | float] = ("dynamic", 0.5),
    scores: Iterable[str] = ("l1", "random"),
    variant: str = "corrected",
    also_rising: bool = False,
) -> dict[str, Prune]:
    """Every combination by the name that tables and figures use.

    Args:
        triggers: ``dynamic``, ``static`` (every 4 epochs, the published default).
        rates: ``dynamic`` or a fraction.
        scores: ``l1``, ``random``.
        variant: ``corrected`` or ``faithful``; the latter says "(as published)" in the names.
        also_rising: add the dynamic trigger that a rising loss sets off too, for L1: our own setting of the published
            ``pruning_min``.

    Returns:
        Name, such as ``dynamic trigger, rate 0.5, L1``, -> settings.
    """
    words = {"l1": "L1", "random": "random"}
    found: dict[str, Prune] = {}
    windows = [("dynamic", 0.0), ("static", 0.0), *([("dynamic", ALSO_RISING)] if also_rising else [])]
    triggers, known = list(triggers), {"dynamic", "static"}
    if wrong := [trigger for trigger in triggers if trigger not in known]:
        raise PrunelabError(f"trigger {wrong[0]!r}: {nearest(wrong[0], known)}")
    for trigger, minimum in windows:
        for rate in rates:
            for score in scores:
                if trigger not in triggers or (minimum < 0 and score != "l1"):
                    continue
                when = "rising loss too" if minimum < 0 else f"{trigger} trigger"
                name = (
                    f"{when}, {rate} rate, {words[score]}"
                    if isinstance(rate, str)
                    else f"{when}, rate {rate}, {words[score]}"
                )
                options = {"trigger": trigger, "rate": rate, "score": score, "variant": variant}
                if minimum < 0:
                    options["minimum"] = minimum
                found[name + (" (as published)" if variant == "faithful" else "")] = Prune("dyprune", options=options)
    return found


def headlines(last: pd.DataFrame) -> tuple[dict[str, Interval], dict[str, str]]:
    """What the claims on the headline ask for, for each variant: the numbers, and in words what was seen.

    Args:
        last: one row per run of the strategies and of the dense networks of both batch orders.
    """
    runs = last.set_index("strategy")
    pairs = {"corrected": (_HEADLINE, UNPRUNED), "faithful": (f"{_HEADLINE} (as published)", FIXED_ORDER)}
    found = {f"headline_{name}": both_halves(runs.loc[[a]], runs.loc[[b]]) for name, (a, b) in pairs.items()}
    return {name: number for name, (number, _) in found.items()}, {name: words for name, (_, words) in found.items()}


def both_halves(pruned: pd.DataFrame, dense: pd.DataFrame) -> tuple[Interval, str]:
    """Whether up to 98 % went *and* accuracy was kept, as one number: the half of the sentence that holds least.

    In points: of the weights gone beyond 98 %, and of the test accuracy above a loss of one point (our own reading of
    "without sacrificing"); that half of the two counts whose interval ends lower, or that fails.

    Args:
        pruned: one row per run: seed, weights, weights_total, test_accuracy.
        dense: likewise, of the same seeds.

    Returns:
        The interval over seeds, and what was seen in words.
    """
    from prunelab import stats

    mine, whole = (rows.set_index("seed") for rows in (pruned, dense))
    gone = stats.mean_interval(100 * (1 - mine["weights"] / mine["weights_total"]))
    change = stats.paired_difference(100 * mine["test_accuracy"], 100 * whole["test_accuracy"])
    return least(gone, change)


def least(gone: Interval, change: Interval) -> tuple[Interval, str]:
    """The margin of the weaker half: of the share of weights that went (%), and of the change of accuracy (points)."""
    halves = [dataclasses.replace(gone, mean=gone.mean - 98), dataclasses.replace(change, mean=change.mean + 1)]
    failing = [each for each in halves if each.n > 1 and each.high < 0]  # one that fails makes the sentence fail
    half = min(failing or halves, key=lambda each: each.mean - (0 if each.n < 2 else each.half))
    around = "" if change.n < 2 else f" ± {change.half:.2f}"
    return half, f"{gone.mean:.2f} % gone, {change.mean:+.2f}{around} points"
