"""Related methods that act while it learns: DropNeuron, filters pruned in training, Play and Prune, Learn & drop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from prunelab.errors import PrunelabError, nearest
from prunelab.settings import Data, Model, Prune, Run, Train


@dataclass(frozen=True)
class _Experiment:
    """One of DropNeuron's scripts; strategies: name -> lambda_l1, lambda_dropneuron."""

    data: Data
    model: Model
    epochs: int
    batch: int
    strategies: Mapping[str, tuple[float, float]]
    threshold: float = 0.01
    ungrouped: str = ""
    decay: float = 1.0  # of the learning rate, an epoch
    shuffle: bool = True


DROPNEURON = {
    "sparse_regression": _Experiment(
        Data("sparse_regression", validation=100, scaling="raw"), Model("linear_chain", init="normal_1"), 100, 1,
        {"DropNeuron": (50.0, 250.0), "no penalty": (0.0, 0.0)}, ungrouped="output", shuffle=False),
    "autoencoder": _Experiment(
        Data("mnist", validation=5000, target="input"), Model("autoencoder", init="normal_1"), 50, 256,
        {"DropNeuron": (1e-5, 1e-5), "L1 only": (1e-5, 0.0), "no penalty": (0.0, 0.0)}, threshold=0.005),
    "lenet_300_100": _Experiment(
        Data("mnist", validation=5000), Model("lenet_300_100", init="normal_0.01"), 100, 256,
        {"DropNeuron": (1e-4, 5e-4), "L1 only": (1e-4, 0.0), "no penalty": (0.0, 0.0)}),
    "lenet_5": _Experiment(
        Data("mnist", validation=5000), Model("lenet_5_same", init="truncated_0.01"), 9, 64,
        {"DropNeuron": (1e-4, 5e-4), "no penalty": (0.0, 0.0)}),
    "convnet": _Experiment(
        Data("mnist", validation=10000, scaling="centred"), Model("lenet_5_same", init="truncated_0.1"), 10, 64,
        {"DropNeuron": (2e-4, 5e-4), "no penalty": (0.0, 0.0)}, decay=0.95),
}  # fmt: skip
CRITERIA = ("l1", "activation", "random")
TOLERANCES = (0.5, 1.0, 2.0)


def dropneuron(
    experiment: str = "lenet_300_100",
    seeds: int = 3,
    *,
    epochs: int | None = None,
    train_size: int | None = None,
    hidden: Sequence[int] = (),
    data: str = "",
    strategies: Iterable[str] = (),
) -> dict[str, list[Run]]:
    """DropNeuron's experiments, in the settings of the published scripts: round 0 is trained, round 1 thresholded.

    Adam at 1e-3. Ours: 500,000 samples (LeNet-5) are 9 epochs; the samples that are held out are other ones, and of the
    regression 100 more; dropout is left out, since two scripts throw its result away and two leave it on while testing.
    So the published rows with an active dropout (all others of LeNet-5 and ConvNet, one of the regression) are not
    among the strategies.

    Args:
        experiment: ``sparse_regression``, ``autoencoder``, ``lenet_300_100``, ``lenet_5`` or ``convnet``.
        seeds: independent runs of each strategy; the regression problem is the same for all.
        epochs: of the training; None: the scripts'.
        train_size: training samples; None or 0: all.
        hidden: other sizes of the network.
        data: another data set in place of MNIST, a tenth of it held out; "": MNIST.
        strategies: only those of these that the experiment has; (): all of it.
    """
    if experiment not in DROPNEURON:
        raise PrunelabError(f"DropNeuron has no experiment {experiment!r}: {nearest(experiment, DROPNEURON)}")
    own = DROPNEURON[experiment]
    known = {name for other in DROPNEURON.values() for name in other.strategies}
    if unknown := [name for name in strategies if name not in known]:
        raise PrunelabError(f"DropNeuron has no strategy {unknown[0]!r}: {nearest(unknown[0], known)}")
    length = epochs or own.epochs
    falls = tuple(range(1, length)) if own.decay < 1 else ()
    factor = own.decay if falls else 0.1
    train = Train(length, own.batch, "adam", lr_milestones=falls, lr_factor=factor, shuffle=own.shuffle)
    other = {"name": data, "validation": 0.1} if data not in ("", "mnist") and own.data.name == "mnist" else {}
    settings = replace(own.data, train_size=train_size or None, **other)
    net = replace(own.model, hidden=tuple(hidden))
    return {
        name: [
            Run(settings, net, train, Prune("dropneuron", 0.0, 1, recover="none", options=options), seed=seed)
            for seed in range(seeds)
        ]
        for name, (l1, lengths) in own.strategies.items()
        if not strategies or name in strategies
        for options in [_options(own, l1, lengths)]
    }


def _options(own: _Experiment, l1: float, lengths: float) -> dict[str, float | str | bool]:
    """Options of the pruner; ``allow_empty``, so that a network without a connection left is a result too."""
    options = {"l1": l1, "dropneuron": lengths, "threshold": own.threshold, "allow_empty": True}
    return options | ({"ungrouped": own.ungrouped} if own.ungrouped else {})


def while_training(
    seeds: int = 3,
    *,
    fractions: Sequence[float] = (0.5, 0.8),
    model: str = "lenet_5",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 16,
    train_size: int | None = None,
    test_size: int | None = None,
) -> dict[str, list[Run]]:
    """Filters pruned while training, beside the unpruned training and the usual three steps: train, prune, retrain.

    SGD at 0.05 with momentum 0.9, a tenth of it after half and after three quarters of the training, batches of 128,
    weight decay 5e-4. The reference removes all filters at once, by L1, when the training is over, and retrains for a
    sixteenth of it (the paper retrains for 10 epochs; 160 is the length that we take for its training) at the rate at
    which it ended. Model, data and plan are our own; the paper has VGG-16 on CIFAR-10. One part in fifty is held out,
    which decides nothing.

    Args:
        seeds: independent runs of each strategy.
        fractions: of the filters; the reference takes the first, the criteria are compared at the last.
        model: name in the registry.
        data: name of the data set.
        hidden: sizes of the model; (): its own.
        epochs: of the training.
        train_size: training samples; None or 0: all.
        test_size: test samples; None or 0: all.
    """
    falls = tuple(dict.fromkeys(max(1, round(epochs * share)) for share in (0.5, 0.75))) if epochs > 1 else ()
    train = Train(epochs, 128, "sgd", 0.05, momentum=0.9, weight_decay=5e-4, lr_milestones=falls)
    least, most = fractions[0], fractions[-1]
    longer = replace(train, epochs=epochs + max(1, round(epochs / 16)))
    usual = {"fraction": least, "start": (epochs - 0.75) / longer.epochs, "stop": (epochs - 0.25) / longer.epochs}
    ways = {"unpruned": (Prune("none"), train)}
    ways[f"train, prune {least:.0%}, retrain"] = Prune("while_training", options=usual), longer
    for fraction in fractions:
        ways[f"l1, {fraction:.0%}"] = Prune("while_training", options={"score": "l1", "fraction": fraction}), train
    for score in CRITERIA[1:]:
        ways[f"{score}, {most:.0%}"] = Prune("while_training", options={"score": score, "fraction": most}), train
    settings = Data(data, validation=0.02, train_size=train_size or None, test_size=test_size or None)
    net = Model(model, tuple(hidden))
    return {
        name: [Run(settings, net, plan, prune, seed=seed) for seed in range(seeds)]
        for name, (prune, plan) in ways.items()
    }


def play_and_prune(
    seeds: int = 3,
    *,
    tolerances: Sequence[float] = TOLERANCES,
    fractions: Sequence[float] = (0.5, 0.7, 0.85),
    model: str = "lenet_5",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 24,
    train_size: int | None = None,
    test_size: int | None = None,
    orthogonality: float = 0.0,
) -> dict[str, list[Run]]:
    """Play and Prune at several tolerances, beside the unpruned training and plain L1 filter pruning in as many epochs.

    A quarter of the training trains the whole network, by SGD at 0.02 with momentum 0.9, batches of 32 and weight decay
    5e-4; after three quarters of that, and to the end, the rate is a tenth. L1 filter pruning then takes its fraction
    of the filters of each layer at once and fine-tunes for the rest. Model, plan and constants are our own: a fifth of
    the filters counts as unimportant, lambda is 2e-3 and the threshold's factor 1.5, so that few and short epochs are
    enough to reach the tolerance.

    Args:
        seeds: independent runs of each strategy.
        tolerances: of Play and Prune, in percentage points.
        fractions: of the filters of each layer that L1 filter pruning removes.
        model: name in the registry.
        data: name of the data set; of MNIST 5,000 samples are held out, of any other a tenth.
        hidden: sizes of the model; (): its own.
        epochs: of the whole training, at least 4.
        train_size: training samples; None or 0: all.
        test_size: test samples, and at most as many that are held out; None: all.
        orthogonality: lambda_o of Play and Prune.
    """
    if epochs < 4:
        raise PrunelabError(f"epochs = {epochs}: should be at least 4, of which a quarter trains the whole network")
    first = max(1, epochs // 4)
    train = Train(epochs, 32, "sgd", 0.02, 0.9, 5e-4, lr_milestones=(max(1, round(0.75 * first)),))
    dense, tuning = replace(train, epochs=first), replace(train, epochs=epochs - first, lr=0.002, lr_milestones=())
    options = {"start": first / epochs, "alpha": 0.2, "strength": 2e-3, "delta": 1.5, "orthogonality": orthogonality}
    ways: dict[str, tuple[Prune, Train, Train | None]] = {"unpruned": (Prune("none"), train, None)}
    for points in tolerances:
        prune = Prune("play_and_prune", options={**options, "tolerance": points})
        ways[f"Play and Prune, {points:g} {'point' if points == 1 else 'points'}"] = prune, train, None
    for fraction in fractions:
        prune = Prune("l1_filter", fraction, 1, options={"scope": "layer"})
        ways[f"L1, {fraction:.0%}"] = prune, dense, tuning
    settings = Data(data, 5000 if data == "mnist" else 0.1, train_size=train_size or None, test_size=test_size or None)
    return {
        name: [Run(settings, Model(model, tuple(hidden)), plan, prune, again, seed) for seed in range(seeds)]
        for name, (prune, plan, again) in ways.items()
    }


def learn_and_drop(
    seeds: int = 3,
    *,
    thresholds: Sequence[float] = (0.2, 0.3, 0.5),
    model: str = "dropnet_c",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 30,
    train_size: int | None = None,
    test_size: int | None = None,
    lr: float = 0.02,
) -> dict[str, list[Run]]:
    """Layers that have settled drop out of the training, at several thresholds, beside the full training.

    SGD at a constant rate with momentum 0.9, batches of 64, no augmentation. All of it is our own default: the paper's
    rule, optimiser and epochs are not known.

    Args:
        seeds: independent runs of each strategy.
        thresholds: of the relative change below which a layer has settled.
        model: name in the registry, a chain.
        data: name of the data set.
        hidden: sizes of the model; (): its own.
        epochs: of the training.
        train_size: training samples; None or 0: all.
        test_size: test samples, and at most as many that are held out; None: all.
        lr: learning rate.
    """
    train = Train(epochs, 64, "sgd", lr, momentum=0.9)
    ways = {"full training": Prune("none")}
    for threshold in thresholds:
        ways[f"learn & drop, {threshold:g}"] = Prune("learn_and_drop", options={"threshold": threshold})
    settings = Data(data, train_size=train_size or None, test_size=test_size or None)
    return {
        name: [Run(settings, Model(model, tuple(hidden)), train, prune, seed=seed) for seed in range(seeds)]
        for name, prune in ways.items()
    }
