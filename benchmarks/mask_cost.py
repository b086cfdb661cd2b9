"""What masks cost a training step, in prunelab and with the hooks of torch.nn.utils.prune.

usage: PRUNELAB_DATA=... python benchmarks/mask_cost.py [--repeats 30] [--threads 2]

LeNet-300-100 on MNIST at batch 128 and a network of the size of VGG-16 for CIFAR at batch 32, both with 80 % of their
weights pruned. Each turn is one pass of a few steps; the learning rate is small, so that nothing is learnt by heart
and no gradient fades away.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import timing
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import prunelab
from prunelab import data, models
from prunelab.data import Dataset, Split
from prunelab.masks import Masks
from prunelab.settings import Data, Model, Train
from prunelab.training.train import Member, Population, generator

VGG_16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
OPTIMISERS: dict[str, dict[str, Any]] = {
    "SGD with momentum": {"optimiser": "sgd", "lr": 1e-4, "momentum": 0.9},
    "AdamW": {"optimiser": "adamw", "lr": 1e-5},
}


def vgg16() -> nn.Sequential:
    """The convolutions of VGG-16 and one linear layer: 14.7 million weights."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG_16:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def noise(samples: int) -> Dataset:
    """Random pixels in the shape of CIFAR-10: time does not depend on what is seen."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (samples, 3, 32, 32), generator=draw).to(torch.uint8)
    part = Split(x, torch.randint(0, 10, (samples,), generator=draw))
    return Dataset("noise", "random pixels", tuple("0123456789"), part, part, part)


def in_prunelab(dense: nn.Module, train: Train, images: Dataset, masks: Masks) -> Callable[[], Any]:
    member = Member(copy.deepcopy(dense), train, masks, generator(0, "order"))
    population = Population(images)
    return lambda: population.epoch([member])


def by_hand(dense: nn.Module, train: Train, images: Dataset, masks: Masks) -> Callable[[], None]:
    """The same training as a plain loop, masked by torch's hooks."""
    model = copy.deepcopy(dense)
    for name, mask in masks.items():
        torch_prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask)
    rule = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[train.optimiser]
    more = {"momentum": train.momentum} if train.optimiser == "sgd" else {}
    step = rule(model.parameters(), lr=train.lr, weight_decay=train.weight_decay, **more)
    draw = generator(0, "order")

    def turn() -> None:
        for x, y in data.batches(images.train, train.batch_size, draw):
            step.zero_grad()
            nn.functional.cross_entropy(model(images.scale(x)), y).backward()
            step.step()

    return turn


def measure(dense: nn.Module, train: Train, images: Dataset, repeats: int) -> dict[str, Any]:
    """Seconds per step of all four, and what the masks add in per cent: quartiles over the turns."""
    pruned = prunelab.prune(dense, "magnitude", 0.8)
    rivals = {
        "prunelab, no masks": in_prunelab(dense, train, images, Masks({})),
        "prunelab, masks": in_prunelab(dense, train, images, pruned),
        "plain loop, no masks": by_hand(dense, train, images, Masks({})),
        "plain loop, torch.nn.utils.prune": by_hand(dense, train, images, pruned),
    }
    turns: dict[str, list[float]] = {}
    results = timing.compare(rivals, repeats, turns=turns)

    def added(without: str, masked: str) -> list[float]:
        pairs = zip(turns[masked], turns[without], strict=True)
        return [round(100 * (q - 1), 1) for q in statistics.quantiles([m / w for m, w in pairs])]

    names = list(rivals)
    steps = -(-len(images.train) // train.batch_size)
    print(timing.table(results))
    found = {"prunelab": added(*names[:2]), "torch.nn.utils.prune": added(*names[2:])}
    print(f"masks add {found} per cent; {steps} steps a turn\n")
    return {"steps": steps, "results": results, "masks_add_percent": found}


def main() -> None:
    options = timing.options(__doc__, repeats=30)
    mnist, pixels = data.load(Data("mnist", validation=0, train_size=5120)), noise(32)
    lenet = models.build(Model("lenet_300_100"), mnist.shape, 10, seed=0)
    torch.manual_seed(0)
    vgg = vgg16()
    cases = {}
    for name, rule in OPTIMISERS.items():
        for what, dense, images, batch, repeats in (
            ("LeNet-300-100, batch 128", lenet, mnist, 128, options.repeats),
            ("VGG-16 for CIFAR, batch 32", vgg, pixels, 32, max(3, options.repeats // 3)),
        ):
            print(f"{what}, {name}")
            cases[f"{what}, {name}"] = measure(dense, Train(epochs=10**6, batch_size=batch, **rule), images, repeats)
    claims = []
    for name, case in cases.items():
        low, middle, high = case["masks_add_percent"]["prunelab"]
        most = 10 if name.startswith("LeNet") else 2
        text = f"what masks add to a step of {name}"
        best = 100 * (timing.quickest(case["results"], "prunelab, no masks", "prunelab, masks") - 1)
        claims.append(timing.claim(text, middle, "%", at_most=most, spread=(low, high), quickest=best))
    timing.write("mask_cost", {"data": mnist.source, "sparsity": 0.8, "claims": claims, "cases": cases})


if __name__ == "__main__":
    main()
