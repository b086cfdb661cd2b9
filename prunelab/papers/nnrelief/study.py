"""NNrelief: data, training and pruning of its experiments, as its README and argument parser give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunelab.errors import PrunelabError, nearest
from prunelab.settings import Data, Model, Prune, Run, Train

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.stats import Interval

LEARNT = 0.2  # accuracy from which a loss of two points is judged; our own default
# model -> data, epochs, decay, retraining epochs, decay, optimiser, lr, alpha_conv, alpha_fc, rounds, pruning set
_EXPERIMENTS = {
    "lenet_300_100": ("mnist", 60, (30,), 60, (30,), "adam", 1e-3, 0.9, 0.95, 20, 1000),
    "lenet_5": ("mnist", 60, (30,), 60, (30,), "adam", 1e-3, 0.9, 0.95, 20, 1000),
    "vgg_like": ("cifar10", 150, (80, 120), 60, (20, 40), "adam", 1e-3, 0.95, 0.95, 6, 1000),
    "resnet20": ("cifar10", 150, (80, 120), 60, (20, 40), "sgd", 0.1, 0.95, 0.99, 10, 1000),
    "resnet56": ("cifar100", 200, (120, 160), 80, (30, 60), "adam", 1e-3, 0.95, 0.99, 10, 2000),
}


def nnrelief(
    model: str,
    seeds: int = 5,
    *,
    data: str = "",
    hidden: Sequence[int] = (),
    epochs: int | None = None,
    retrain_epochs: int | None = None,
    rounds: int | None = None,
    train_size: int | None = None,
    optimiser: str = "",
    alpha_fc: float | None = None,
    alpha_conv: float | None = None,
    samples: int | None = None,
    variant: str = "corrected",
    precision: str = "float32",
) -> list[Run]:
    """The runs of one experiment, in the published settings unless an argument says otherwise.

    Batches of 120, weight decay 5e-4 in the gradient, the learning rate a tenth after each milestone (which move with
    the number of epochs), Kaiming normal weights. LeNets go back to their first weights after each pruning, the others
    are fine-tuned. Ours are a tenth of the training data held out, batches in new order, and the last epoch counts;
    ``faithful`` holds one sample out, keeps the data's order, and measures the test part after each epoch, since the
    published code keeps the epoch with the best test accuracy and goes on from it; ours goes on from the last epoch.

    Args:
        model: ``lenet_300_100``, ``lenet_5``, ``vgg_like``, ``resnet20`` or ``resnet56``.
        seeds: independent runs; how many the paper has is not known.
        data: another data set than the experiment's.
        hidden: other sizes of the network.
        epochs: of the first training.
        retrain_epochs: of each further one.
        rounds: prunings.
        train_size: training samples; None or 0: all. Validation and test parts are cut to as many.
        optimiser: ``adam`` (1e-3) or ``sgd`` (0.1, momentum 0.9) in place of the experiment's. VGG-like has 0.01 with
            SGD, our own default: its published rate is not known, and at 0.1 it learns little in a short training.
        alpha_fc: share of the signal that stays in fully connected layers.
        alpha_conv: likewise in convolutions.
        samples: size of the pruning set.
        variant: ``corrected``, or ``faithful``: the published code's rules.
        precision: of the convolutions while training; the paper's is ``float32``.
    """
    if model not in _EXPERIMENTS:
        raise PrunelabError(f"NNrelief has no experiment with {model!r}: {nearest(model, _EXPERIMENTS)}")
    name, first, decay, again, decay_again, rule, lr, conv, dense, cycles, drawn = _EXPERIMENTS[model]
    if optimiser:
        rule, lr = optimiser, {"adam": 1e-3, "sgd": 0.01 if model == "vgg_like" else 0.1}.get(optimiser, lr)
    images = (data or name).startswith(("cifar", "tiny"))
    common = {
        "batch_size": 120,
        "optimiser": rule,
        "lr": lr,
        "momentum": 0.9 if rule == "sgd" else 0.0,
        "weight_decay": 5e-4,
        "shuffle": variant != "faithful",
        "augment": "crop_flip" if images else "none",
        "test_every_epoch": variant == "faithful",
        "precision": precision,
    }
    length, length_again = epochs or first, retrain_epochs or (epochs if epochs and epochs < again else again)
    train = Train(epochs=length, lr_milestones=_moved(decay, first, length), **common)
    retrain = Train(epochs=length_again, lr_milestones=_moved(decay_again, again, length_again), **common)
    options = {
        "alpha_fc": dense if alpha_fc is None else alpha_fc,
        "alpha_conv": conv if alpha_conv is None else alpha_conv,
        "samples": drawn if samples is None else samples,
        "variant": variant,
        "allow_empty": True,
    }
    if variant == "faithful":
        options["conv_reduce"] = "sum" if model.startswith("lenet") else "norm_of_mean"
    recover = "rewind" if model.startswith("lenet") else "finetune"
    prune = Prune("nnrelief", 0.0, cycles if rounds is None else rounds, recover=recover, options=options)
    settings = Data(
        data or name,
        validation=1 if variant == "faithful" else 0.1,  # one sample is the least that training takes
        train_size=train_size or None,
        test_size=train_size or None,
        scaling="standard" if images else "unit",
    )
    net = Model(model, tuple(hidden), "kaiming_normal")
    return [Run(settings, net, train, prune, retrain, seed) for seed in range(seeds)]


def worse_change(rounds: pd.DataFrame) -> Interval | None:
    """Of the strategies the one that lost most accuracy from the dense network to the last round: its paired change.

    Args:
        rounds: strategy, seed, round, test_accuracy; one row per run and round.

    Returns:
        Last round minus dense, as a share of 1, with its interval; None where a dense network knows less than
        ``LEARNT``: two points of next to nothing are no loss to speak of.
    """
    from prunelab import stats

    changes = []
    for _, own in rounds.groupby("strategy", sort=False):
        by_round = own.pivot(index="round", columns="seed", values="test_accuracy")
        if by_round.iloc[0].mean() < LEARNT:
            return None
        changes.append(stats.paired_difference(by_round.iloc[-1], by_round.iloc[0]))
    return min(changes, key=lambda change: change.mean)


def error_at(rounds: pd.DataFrame, least: float) -> Interval:
    """Test error (%) of the first network of each run that is compressed so much: errors compare at one compression.

    Args:
        rounds: of one strategy: seed, round, compression_ratio, test_accuracy.
        least: the compression; runs that do not reach it count as not measured.
    """
    from prunelab import stats

    reached = rounds[rounds["compression_ratio"] >= least].sort_values("round").groupby("seed")["test_accuracy"].first()
    return stats.mean_interval(100 * (1 - reached))


def _moved(milestones: Sequence[int], whole: int, epochs: int) -> tuple[int, ...]:
    """Milestones at the same share of a shorter training."""
    return tuple(dict.fromkeys(max(1, round(m * epochs / whole)) for m in milestones if epochs > 1))
