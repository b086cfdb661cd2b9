"""The related methods beside each other: one protocol, one budget, one data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prunelab.errors import PrunelabError, nearest
from prunelab.settings import Data, Model, Prune, Run, Train

# name in legends -> method, options; the controls (random, magnitude) come first
WEIGHTS = {
    "random": ("random", {}),
    "magnitude": ("magnitude", {}),
    "magnitude, by layer": ("magnitude", {"scope": "layer"}),
    "movement": ("movement", {}),
    "magnitude increase": ("magnitude_increase", {}),
    "SNIP": ("snip", {}),
    "Taylor": ("taylor", {}),
    "Wanda": ("wanda", {}),
}
UNITS = {
    "random": ("random", {"granularity": "unit"}),
    "L1": ("magnitude", {"granularity": "unit"}),
    "L1, by layer": ("magnitude", {"granularity": "unit", "scope": "layer"}),
    "L2": ("magnitude", {"granularity": "unit", "norm": 2}),
    "Taylor": ("taylor", {"granularity": "unit"}),
    "DropNet": ("dropnet", {}),
    "APoZ": ("apoz", {}),
    "Pruning at a Glance": ("glance", {}),
    "zero-keep, by layer": ("zero_keep", {"scope": "layer"}),
}
SCHEDULES = ("one_shot", "iterative", "agp", "linear", "cosine", "one_cycle")


def head_to_head(
    kind: str,
    seeds: int = 3,
    *,
    model: str = "lenet_300_100",
    data: str = "mnist",
    hidden: Sequence[int] = (),
    epochs: int = 6,
    recovery: int = 2,
    rounds: int = 5,
    train_size: int | None = None,
    methods: Iterable[str] = (),
) -> dict[str, list[Run]]:
    """Every method halves what is left, round after round, and fine-tunes: compressions of 2, 4, 8, 16, 32.

    All have the same budget: ``epochs`` of dense training, then ``recovery`` epochs after each pruning. Adam at 1e-3,
    batches of 128. The whole protocol is our own default.

    Args:
        kind: ``"weights"`` or ``"units"``.
        seeds: independent runs of each method.
        model: name in the registry.
        data: name of the data set.
        hidden: sizes of the model; (): its own.
        epochs: of the dense training.
        recovery: epochs after each pruning.
        rounds: prunings.
        train_size: training samples; None: all.
        methods: only these; (): all.

    Returns:
        Name, as the legend has it, -> runs.
    """
    tables = {"weights": WEIGHTS, "units": UNITS}
    if kind not in tables:
        raise PrunelabError(f"kind {kind!r}: {nearest(kind, tables)}")
    table = tables[kind]
    if unknown := [name for name in methods if name not in table]:
        raise PrunelabError(f"no method {unknown[0]!r} among those that remove {kind}: {nearest(unknown[0], table)}")
    settings = Data(data, train_size=train_size, test_size=None)
    train, again = (Train(epochs=n, batch_size=128, optimiser="adam") for n in (epochs, recovery))
    return {
        name: [
            Run(
                settings,
                Model(model, tuple(hidden)),
                train,
                Prune(method, 0.5, rounds, options=options if method == "glance" else {**options, "allow_empty": True}),
                again,
                seed,
            )
            for seed in range(seeds)
        ]
        for name, (method, options) in table.items()
        if not methods or name in methods
    }


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
        train_size: training samples; None: all.
    """
    settings, net = Data(data, train_size=train_size), Model(model, tuple(hidden))
    train = Train(epochs=epochs, batch_size=128, optimiser="adam", test_every_epoch=True)
    ways = {name: Prune("scheduled", options={"schedule": name, "sparsity": sparsity}) for name in SCHEDULES}
    return {
        name: [Run(settings, net, train, prune, seed=seed) for seed in range(seeds)]
        for name, prune in {"unpruned": Prune("none"), **ways}.items()
    }
