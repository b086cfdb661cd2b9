"""Related methods that act while the network learns: DropNeuron, pruning filters while training, Play and Prune."""

from __future__ import annotations

from collections.abc import Sequence

from prunelab.errors import PrunelabError, nearest
from prunelab.settings import Data, Model, Prune, Run, Train

# experiment -> model, initialisation, validation, epochs, batch, learning rate falls by 5 % an epoch; strategy ->
# lambda_l1, lambda_dropneuron
DROPNEURON = {
    "lenet_300_100": ("lenet_300_100", "normal_0.01", 5000, 100, 256, False, {
        "DropNeuron": (1e-4, 5e-4), "L1 only": (1e-4, 0.0), "no penalty": (0.0, 0.0)}),
    "lenet_5": ("lenet_5_same", "truncated_0.01", 5000, 9, 64, False, {
        "DropNeuron": (1e-4, 5e-4), "L1 only": (2e-4, 0.0), "no penalty": (0.0, 0.0)}),
    "convnet": ("lenet_5_same", "truncated_0.1", 10000, 10, 64, True, {
        "DropNeuron": (2e-4, 5e-4), "L1 only": (2e-4, 0.0)}),
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
    data: str = "mnist",
    threshold: float = 0.01,
) -> dict[str, list[Run]]:
    """DropNeuron's classification experiments, in the settings of the published scripts: round 1 is the pruned network.

    Adam at 1e-3. Ours: 500,000 samples (LeNet-5) are 9 epochs; dropout is left out, since the scripts of LeNet-300-100
    throw its result away, and those of the others leave it on while testing; pixels of ConvNet are in [0, 1], not
    [-0.5, 0.5]; the samples that are held out are other ones.

    Args:
        experiment: ``lenet_300_100``, ``lenet_5`` or ``convnet``.
        seeds: independent runs of each strategy.
        epochs: of the training; None: the scripts'.
        train_size: training samples; None: all.
        hidden: other sizes of the network.
        data: another data set.
        threshold: below which a weight becomes zero.
    """
    if experiment not in DROPNEURON:
        raise PrunelabError(f"DropNeuron has no experiment {experiment!r}: {nearest(experiment, DROPNEURON)}")
    model, init, validation, length, batch, decays, strategies = DROPNEURON[experiment]
    length = epochs or length
    falling = {"lr_milestones": tuple(range(1, length)), "lr_factor": 0.95} if decays else {}
    train = Train(epochs=length, batch_size=batch, optimiser="adam", **falling)
    settings = Data(data, validation=validation if data == "mnist" else 0.1, train_size=train_size)
    return {
        name: [
            Run(
                settings,
                Model(model, tuple(hidden), init),
                train,
                Prune(
                    "dropneuron",
                    0.0,
                    1,
                    recover="none",
                    options={"l1": l1, "dropneuron": lengths, "threshold": threshold, "allow_empty": True},
                ),
                seed=seed,
            )
            for seed in range(seeds)
        ]
        for name, (l1, lengths) in strategies.items()
    }


def while_training(
    seeds: int = 3,
    *,
    fractions: Sequence[float] = (0.5, 0.8),
    model: str = "lenet_5",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 16,
    train_size: int | None = None,
) -> dict[str, list[Run]]:
    """Filters pruned while training, beside the unpruned training and the usual three steps: train, prune, retrain.

    SGD at 0.05 with momentum 0.9, a tenth of it after half and after three quarters of the training, batches of 128,
    weight decay 5e-4. The reference retrains for a sixteenth of the training (10 epochs of 160 in the paper's
    procedure) at the rate at which the training ended. Model, data and plan are our own; the paper has VGG-16 on
    CIFAR-10.

    Args:
        seeds: independent runs of each strategy.
        fractions: of the filters; the reference takes the first, the criteria are compared at the last.
        model: name in the registry.
        data: name of the data set.
        hidden: sizes of the model; (): its own.
        epochs: of the training.
        train_size: training samples; None: all.
    """
    plan = {"batch_size": 128, "optimiser": "sgd", "momentum": 0.9, "weight_decay": 5e-4}
    falls = tuple(dict.fromkeys(max(1, round(epochs * share)) for share in (0.5, 0.75))) if epochs > 1 else ()
    train = Train(epochs=epochs, lr=0.05, lr_milestones=falls, **plan)
    again = Train(epochs=max(1, round(epochs / 16)), lr=0.05 * 0.1 ** len(falls), **plan)
    least, most = fractions[0], fractions[-1]
    usual = Prune("magnitude", least, 1, options={"granularity": "filter", "scope": "layer"})
    ways: dict[str, tuple[Prune, Train | None]] = {"unpruned": (Prune("none"), None)}
    ways[f"train, prune {least:.0%}, retrain"] = usual, again
    for fraction in fractions:
        ways[f"l1, {fraction:.0%}"] = Prune("while_training", options={"score": "l1", "fraction": fraction}), None
    for score in CRITERIA[1:]:
        ways[f"{score}, {most:.0%}"] = Prune("while_training", options={"score": score, "fraction": most}), None
    settings, net = Data(data, train_size=train_size), Model(model, tuple(hidden))
    return {
        name: [Run(settings, net, train, prune, retrain, seed) for seed in range(seeds)]
        for name, (prune, retrain) in ways.items()
    }
