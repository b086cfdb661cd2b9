"""Training convolutional networks of which filters are masked: without them, and with masks alone, batches of 32.

usage: PRUNELAB_DATA=... python benchmarks/narrowed_training.py [--repeats 5] [--threads 2]

Of each layer the same share of the filters is left, drawn at random, so that additions join channels of different
layers: a channel of a skip goes only where all layers that add to it lost it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import timing
import torch
from torch import nn

from prunelab import data, models
from prunelab.masks import Masks
from prunelab.pruners.units import unit_masks
from prunelab.settings import Data, Model, Train
from prunelab.training import train
from prunelab.training.narrow import Narrow
from prunelab.training.train import Member, Population, generator

BATCH = 32
LEFT = (0.5, 0.2)
CASES = {  # name -> model, sizes, steps
    "DropNet's ResNet18": ("dropnet_resnet18", (64, 128, 256, 512), 2),
    "DropNet's VGG19": ("dropnet_vgg19", (64, 128, 256, 512, 512, 256), 2),
    "ResNet-20": ("resnet20", (16, 32, 64), 4),
}


def masks_of(net: nn.Module, left: float) -> Masks:
    draw = torch.Generator().manual_seed(0)
    kept = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            rows = len(module.weight)
            kept[name] = torch.rand(rows, generator=draw).argsort() < round(left * rows)
    return unit_masks(net, kept)


def case(name: str, left: float, repeats: int) -> dict[str, object]:
    model, hidden, steps = CASES[name]
    images = data.load(Data("cifar10", validation=0, train_size=steps * BATCH))
    settings = Train(epochs=10**6, batch_size=BATCH, optimiser="sgd", lr=0.01)

    def rival(cut: bool) -> Callable[[], object]:
        net = models.build(Model(model, hidden), images.shape, len(images.classes), seed=0)
        member = Member(net, settings, masks_of(net, left), generator(0, "order"))
        population = Population(images)
        whole = mock.patch.object(train, "narrow", lambda model, masks, example: Narrow(model, masks, {}))
        with contextlib.nullcontext() if cut else whole:  # it is asked once, while nothing changes
            population.epoch([member])
        return lambda: population.epoch([member])

    results = timing.compare({"masks only": rival(False), "narrowed": rival(True)}, repeats)
    print(f"\n{name}, {left:.0%} of the filters, {steps} steps\n{timing.table(results)}")
    return {"data": images.source, "hidden": hidden, "left": left, "steps": steps, "results": results}


def main() -> None:
    options = timing.options(__doc__, repeats=5)
    goals = {("DropNet's ResNet18", 0.2): 3, ("DropNet's VGG19", 0.2): 3, ("ResNet-20", 0.2): 1.5}
    cases = {f"{name}, {left:.0%} of the filters": (name, left) for name in CASES for left in LEFT}
    found = {text: case(name, left, options.repeats) for text, (name, left) in cases.items()}
    claims = [
        timing.faster(f"{text}: training without the others", found[text]["results"], "narrowed", at_least=goals[which])
        for text, which in cases.items()
        if which in goals
    ]
    timing.write("narrowed_training", {"batch_size": BATCH, "claims": claims, "cases": found})


if __name__ == "__main__":
    main()
