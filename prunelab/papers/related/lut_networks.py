"""Weightless networks and their pruning (Susskind et al., ESANN 2022), as settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from prunelab.errors import PrunelabError
from prunelab.runs.columns import need
from prunelab.settings import Data, Model, Prune, Run, Train

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.stats import Interval

SCOPES = ("position", "discriminator", "global")
TEST: Mapping[str, int] = MappingProxyType({"iris": 50, "digits": 297})  # of 150: a third, as in BTHOWeN's code
VARIANTS = ("_small", "_medium", "_large")


def weightless(
    models: Sequence[str] = ("bthowen_mnist_small",),
    seeds: int = 5,
    *,
    small_seeds: int | None = None,
    rounds: int = 19,
    share: float = 0.05,
    scopes: Sequence[str] = SCOPES,
    train_size: int | None = None,
    variant: Literal["faithful", "corrected"] = "corrected",
) -> dict[str, list[Run]]:
    """Look-up tables removed in equal steps: by each scope, with and without bias, and at random as a control.

    As in BTHOWeN no part is held out by the settings: the network keeps the last tenth of large data for its bleach. Of
    data without a test part each seed divides anew, since one division of 150 flowers says little (our own choice; the
    published code has one). The steps and the control, as many random tables from each discriminator, are our own.

    Args:
        models: names in ``prunelab.models.weightless.MODELS``; the name says which data set.
        seeds: independent networks of each model.
        small_seeds: the same for data of which each seed divides anew; None: as many.
        rounds: steps.
        share: of the dense network's tables, in each step.
        scopes: what competes.
        train_size: training samples of the data that have a test part; None: all.
        variant: ``"faithful"``: score and bias exactly as published.

    Returns:
        Name of the way -> its runs, of all models and seeds.
    """
    if not models:
        raise PrunelabError("no weightless model was named: should be at least one, such as 'bthowen_mnist_small'")
    ways: dict[str, dict[str, str | float | bool]] = {}
    for scope in scopes:
        ways[scope] = {"scope": scope, "compensate": False}
        ways[f"{scope} + bias"] = {"scope": scope, "compensate": True}
    ways["random + bias"] = {"scope": "discriminator", "score": "random", "compensate": True}

    def run(model: str, seed: int, options: Mapping[str, str | float | bool]) -> Run:
        name = data_of(model)
        own = {"train_size": train_size or None} if name not in TEST else {"test": TEST[name], "split_seed": seed}
        prune = Prune("lut", 0.0, rounds, recover="none", options={**options, "share": share, "variant": variant})
        return Run(Data(name, validation=0, **own), Model(model), Train(epochs=1), prune, seed=seed)

    count = {model: (small_seeds or seeds) if data_of(model) in TEST else seeds for model in models}
    return {
        name: [run(model, seed, options) for model in models for seed in range(count[model])]
        for name, options in ways.items()
    }


def data_of(model: str) -> str:
    """The data set in a model's name: ``bthowen_mnist_small`` is for ``mnist``."""
    name = model.removeprefix("bthowen_")
    return next((name.removesuffix(variant) for variant in VARIANTS if name.endswith(variant)), name)


def largest_share(rounds: pd.DataFrame, loss: float = 0.01) -> pd.Series:
    """How much can go: the largest sparsity up to which test accuracy is never more than ``loss`` below the dense one.

    Args:
        rounds: rows of runs: model, strategy, seed, round, sparsity, test_accuracy.
        loss: as a share; 0.01 is a point.

    Returns:
        Sparsity, with the index model, strategy, seed, in the order of the rows.
    """
    keys = ["model", "strategy", "seed"]
    need(rounds, [*keys, "round", "sparsity", "test_accuracy"], "protocols.largest_share")
    rows = rounds.sort_values("round", kind="stable")
    dense = rows.groupby(keys)["test_accuracy"].transform("first")
    fine = (rows["test_accuracy"] >= dense - loss - 1e-9).groupby([rows[key] for key in keys]).cummin()
    return rows[fine].sort_index(kind="stable").groupby(keys, sort=False)["sparsity"].max()


def findings(rounds: pd.DataFrame, at: float = 0.4, way: str = "discriminator + bias") -> dict[str, Interval]:
    """The numbers that the claims are about, of every model there is; accuracies and differences in points.

    Args:
        rounds: rows of all ways of ``weightless``.
        at: share of the tables that is gone, for comparisons at one share; those that were not measured are left out.
        way: what the paper's claim is taken to be about.

    Returns:
        For each model ``accuracy_`` of the dense network; ``change_`` from dense to ``at``; ``bias_`` (what the bias
        gains there where all tables compete); ``score_`` (what the score gains there over random tables; of a mean over
        all shares the last few would make up most). And ``average_share``: the largest share (%) that costs at most a
        point, averaged over the models, of the seeds that all models have.
    """
    from prunelab import stats

    found: dict[str, Interval] = {}
    percent = rounds.assign(percent=100 * rounds["test_accuracy"])
    for model, rows in percent.groupby("model", sort=False):
        name = str(model).removeprefix("bthowen_")
        gone = rows["requested_sparsity"].round(6)
        by_seed = rows.set_index(["strategy", "seed"])["percent"]
        dense, there = by_seed[(gone == 0).to_numpy()], by_seed[(gone == round(at, 6)).to_numpy()]
        found[f"accuracy_{name}"] = stats.mean_interval(dense[way])
        if len(there):
            found[f"change_{name}"] = stats.paired_difference(there[way], dense[way])
            found[f"bias_{name}"] = stats.paired_difference(there["global + bias"], there["global"])
            found[f"score_{name}"] = stats.paired_difference(there[way], there["random + bias"])
    shares = largest_share(rounds).xs(way, level="strategy").unstack("model").dropna()
    return {**found, "average_share": stats.mean_interval(100 * shares.mean(axis=1))}
