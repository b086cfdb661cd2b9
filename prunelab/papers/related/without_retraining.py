"""Methods that need no retraining: thresholds within a tolerated loss (Ashouri), and neural coresets (Mussay)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prunelab.errors import PrunelabError, nearest
from prunelab.settings import Data, Model, Prune, Run, Train

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.stats import Interval

RETRAINED = "in steps, fine-tuned"  # the reference of retraining_free
# name in legends -> method, options; each thins out every hidden layer by the same share
CORESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "coreset": ("coreset", {}),
        "coreset, not re-weighted": ("coreset", {"reweight": False}),
        "uniform": ("random_neuron", {"scope": "layer"}),
        "uniform, re-weighted": ("coreset", {"importance": False}),
        "largest weights": ("l2_neuron", {"scope": "layer"}),
    }
)


def retraining_free(
    seeds: int = 3,
    *,
    model: str = "lenet_5",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 6,
    rounds: int = 6,
    recovery: int = 1,
    train_size: int | None = None,
    held_out: int = 2000,
) -> dict[str, list[Run]]:
    """Dense networks, whose thresholds are searched afterwards, and what the usual fine-tuning reaches from them.

    The reference halves the weights by magnitude, all layers together, and fine-tunes, round after round. Adam at 1e-3,
    batches of 128. The whole protocol is our own; the paper prunes published networks for ImageNet.

    Args:
        seeds: independent networks.
        model: name in the registry.
        data: name of the data set.
        hidden: sizes of the model; (): its own.
        epochs: of the dense training.
        rounds: halvings of the reference.
        recovery: its epochs after each of them.
        train_size: training samples; None or 0: all.
        held_out: samples of the training part by which thresholds are chosen.
    """
    settings, net = Data(data, validation=held_out, train_size=train_size or None), Model(model, tuple(hidden))
    train, again = (Train(epochs=n, batch_size=128, optimiser="adam") for n in (epochs, recovery))
    halve = Prune("magnitude", 0.5, rounds)
    return {
        "dense": [Run(settings, net, train, seed=seed) for seed in range(seeds)],
        RETRAINED: [Run(settings, net, train, halve, again, seed) for seed in range(seeds)],
    }


def coresets(
    seeds: int = 3,
    *,
    kept: Sequence[float] = (0.5, 0.2, 0.1, 0.05),
    methods: Sequence[str] = ("coreset", "uniform", "largest weights"),
    model: str = "lenet_300_100",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 6,
    recovery: int = 4,
    train_size: int | None = None,
) -> dict[str, list[Run]]:
    """Dense networks, and the same thinned out once and fine-tuned: every method at every share of neurons kept.

    Adam at 1e-3, batches of 128. The paper's recipe is not known: epochs, and the same share in all hidden layers, are
    our own defaults; a tenth of the neurons of LeNet-300-100 is 30 and 10.

    Args:
        seeds: independent runs of each method and share.
        kept: shares of the neurons of each hidden layer.
        methods: names in ``CORESETS``.
        model: name in the registry; its fully connected hidden layers are thinned out.
        data: name of the data set.
        hidden: sizes of the model; (): its own.
        epochs: of the dense training.
        recovery: of the fine-tuning.
        train_size: training samples; None or 0: all.
    """
    if unknown := [name for name in methods if name not in CORESETS]:
        raise PrunelabError(f"coresets are not compared with {unknown[0]!r}: {nearest(unknown[0], CORESETS)}")
    settings, net = Data(data, train_size=train_size or None), Model(model, tuple(hidden))
    train, again = (Train(epochs=n, batch_size=128, optimiser="adam") for n in (epochs, recovery))
    study = {"dense": [Run(settings, net, train, seed=seed) for seed in range(seeds)]}
    for name in methods:
        method, options = CORESETS[name]
        study[name] = [
            Run(settings, net, train, Prune(method, round(1 - share, 6), 1, options=dict(options)), again, seed)
            for share in kept
            for seed in range(seeds)
        ]
    return study


def retrained(rounds: pd.DataFrame) -> pd.DataFrame:
    """The fine-tuned reference as ``pruners.retraining_free.sweep`` has its rows: one per run and round.

    Args:
        rounds: of the runs of ``retraining_free``: strategy, seed, round, sparsity, validation_ and test_accuracy.

    Returns:
        rule, seed, sparsity, loss (of validation accuracy, to the dense round of the same run), test_accuracy,
        test_difference.
    """
    own = rounds[rounds["strategy"] == RETRAINED].rename(columns={"strategy": "rule"})
    dense = own[own["round"] == 0].set_index("seed")
    loss = own["seed"].map(dense["validation_accuracy"]) - own["validation_accuracy"]
    gain = own["test_accuracy"] - own["seed"].map(dense["test_accuracy"])
    columns = ["rule", "seed", "sparsity", "loss", "test_accuracy", "test_difference"]
    return own.assign(sparsity=own["sparsity"].round(4), loss=loss, test_difference=gain)[columns]


def retraining_free_findings(best: pd.DataFrame) -> dict[str, Interval]:
    """What the claims on retraining-free pruning ask for, in points (of sparsity, of test accuracy), paired by seed.

    Args:
        best: one row per rule, tolerance and seed: the sparsest network within the tolerance: rule, tolerance (share
            of 1), seed, sparsity, test_difference; the fine-tuned reference among the rules.

    Returns:
        ``most_at_three`` and ``most_at_one``: sparsity of the best rule; ``gain_of_fine_tuning``: what the reference
        has more; ``test_loss_at_one``: mean over the rules; ``triangular_over_flat``, ``triangular_over_relative``.
    """
    from prunelab import stats

    sparsity = 100 * best.set_index(["rule", "tolerance", "seed"])["sparsity"].sort_index()
    at_one = {rule: sparsity[rule, 0.01] for rule in best["rule"].unique()}
    most = sparsity.drop(RETRAINED).groupby(["tolerance", "seed"]).max()
    free = best[(best["rule"] != RETRAINED) & (best["tolerance"] == 0.01)]
    return {
        "most_at_three": stats.mean_interval(most[0.03]),
        "gain_of_fine_tuning": stats.paired_difference(at_one[RETRAINED], most[0.01]),
        "test_loss_at_one": stats.mean_interval(-100 * free.groupby("seed")["test_difference"].mean()),
        **{
            f"triangular_over_{rule}": stats.paired_difference(at_one["triangular"], at_one[rule])
            for rule in ("flat", "relative")
        },
    }


def coreset_rows(rounds: pd.DataFrame, thinned: pd.DataFrame) -> pd.DataFrame:
    """The runs of ``coresets`` and what was measured without fine-tuning in one table, a name for each curve.

    Args:
        rounds: strategy, seed, round, prune.amount, test_accuracy, weights.
        thinned: of ``pruners.coreset.measure``: strategy, seed, fraction, error, test_accuracy.
    """
    import pandas as pd

    dense = rounds[rounds["strategy"] == "dense"].assign(fraction=1.0)
    tuned = rounds[rounds["round"] == 1].assign(fraction=lambda t: (1 - t["prune.amount"]).round(6))
    tuned = tuned.assign(strategy=tuned["strategy"] + ", fine-tuned")
    columns = ["strategy", "seed", "fraction", "test_accuracy", "weights"]
    return pd.concat([dense[columns], tuned[columns], thinned], ignore_index=True)


def coreset_findings(rows: pd.DataFrame) -> dict[str, Interval]:
    """What the claims on coresets ask for, paired by seed; shares of 1, errors relative.

    Args:
        rows: of ``coreset_rows``.

    Returns:
        ``gain_at_fewest``: accuracy of the fine-tuned coreset with the fewest neurons, minus the dense one's;
        ``error_below_uniform`` and ``_largest``: by how much its error is lower without fine-tuning, and
        ``tuned_over_uniform`` and ``_largest``: by how much its accuracy is higher with it, averaged over the shares.
    """
    from prunelab import stats

    means = rows.groupby(["strategy", "seed"])[["error", "test_accuracy"]].mean()
    tuned = {name: means["test_accuracy"][f"{name}, fine-tuned"] for name in ("coreset", "uniform", "largest weights")}
    mine = rows[rows["strategy"] == "coreset, fine-tuned"]
    fewest = mine[mine["fraction"] == mine["fraction"].min()].set_index("seed")["test_accuracy"]
    error = means["error"]
    found = {"gain_at_fewest": stats.paired_difference(fewest, means["test_accuracy"]["dense"])}
    for short, name in (("uniform", "uniform"), ("largest", "largest weights")):
        found[f"error_below_{short}"] = stats.paired_difference(error[name], error["coreset"])
        found[f"tuned_over_{short}"] = stats.paired_difference(tuned["coreset"], tuned[name])
    return found
