"""The related methods beside each other: one protocol, one budget, one data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunelab.settings import Data, Model, Prune, Run, Train

# name in legends -> method and options, as ``comparison.compare`` takes them; random and magnitude come by themselves
WEIGHTS = {
    "magnitude, by layer": "magnitude:scope=layer",
    "movement": "movement",
    "magnitude increase": "magnitude_increase",
    "SNIP": "snip",
    "Taylor": "taylor",
    "Wanda": "wanda",
}
UNITS = {
    "L1 units, by layer": "magnitude:granularity=unit,scope=layer",
    "L2 units": "magnitude:granularity=unit,norm=2",
    "Taylor units": "taylor:granularity=unit",
    "DropNet": "dropnet",
    "DropNet, by layer": "dropnet:scope=layer",
    "APoZ, by layer": "apoz:scope=layer",
    "Pruning at a Glance": "glance",
    "zero-keep, by layer": "zero_keep:scope=layer",
}
# what a bench should find again: quantity -> which strategy keeps more accuracy than which
EXPECTED = {
    "magnitude_over_random": ("magnitude", "random"),
    "magnitude_over_magnitude_by_layer": ("magnitude", "magnitude, by layer"),
    "l1_over_random": ("L1 units", "random units"),
    "dropnet_over_random": ("DropNet", "random units"),
    "dropnet_by_layer_over_random": ("DropNet, by layer", "random units"),
    "taylor_over_random": ("Taylor units", "random units"),
}
SCHEDULES = ("one_shot", "iterative", "agp", "linear", "cosine", "one_cycle")


def schedules(
    seeds: int = 3,
    *,
    sparsity: float = 0.95,
    model: str = "lenet_300_100",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 10,
    train_size: int | None = None,
) -> dict[str, list[Run]]:
    """One training of one length, pruned along each schedule; beside them the same training unpruned.

    The paper prunes ResNet-18 and VGG-16 on larger images; LeNet-300-100 on MNIST is our own choice.

    Args:
        seeds: independent runs of each schedule.
        sparsity: at the end.
        model: name in the registry.
        data: name of the data set.
        hidden: sizes of the model; (): its own.
        epochs: of the training.
        train_size: training samples; None or 0: all.
    """
    settings, net = Data(data, train_size=train_size or None), Model(model, tuple(hidden))
    train = Train(epochs=epochs, batch_size=128, optimiser="adam", test_every_epoch=True)
    ways = {name: Prune("scheduled", options={"schedule": name, "sparsity": sparsity}) for name in SCHEDULES}
    return _all({"unpruned": Prune("none"), **ways}, settings, net, train, seeds)


def in_one_training(
    seeds: int = 3,
    *,
    sparsity: float = 0.8,
    model: str = "lenet_300_100",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 16,
    train_size: int | None = None,
    test_size: int | None = None,
) -> dict[str, list[Run]]:
    """Methods that prune while the network trains, in one training of one length, beside the unpruned one.

    Adam at 1e-3, batches of 128. The protocol is our own default.

    Args:
        seeds: independent runs of each method.
        sparsity: that those with a schedule end at, of units where they remove units.
        model: name in the registry.
        data: name of the data set.
        hidden: sizes of the model; (): its own.
        epochs: of the training.
        train_size: training samples; None or 0: all.
        test_size: likewise validation and test samples.
    """
    train = Train(epochs=epochs, batch_size=128, optimiser="adam")
    units = {"granularity": "unit", "fraction": sparsity}
    ways = {
        "unpruned": Prune("none"),
        "L1 while training": Prune("while_training", options={"score": "l1", **units}),
        "activation while training": Prune("while_training", options={"score": "activation", **units}),
        "one-cycle": Prune("one_cycle", options={"sparsity": sparsity}),
        "gradual": Prune("gradual", options={"sparsity": sparsity}),
        "DyPrune": Prune("dyprune"),
    }
    return _all(
        ways,
        Data(data, train_size=train_size or None, test_size=test_size or None),
        Model(model, tuple(hidden)),
        train,
        seeds,
    )


def _all(ways: Mapping[str, Prune], data: Data, model: Model, train: Train, seeds: int) -> dict[str, list[Run]]:
    return {name: [Run(data, model, train, prune, seed=seed) for seed in range(seeds)] for name, prune in ways.items()}
