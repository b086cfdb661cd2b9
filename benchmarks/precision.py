"""Convolutional networks trained in bfloat16 and in float32: some steps of the same training, batches of 32.

usage: PRUNELAB_DATA=... python benchmarks/precision.py [--repeats 7] [--threads 2]

A processor without instructions for bfloat16 (AVX512_BF16, AMX) computes it by detours, slower than float32.
"""

from __future__ import annotations

from collections.abc import Callable

import timing

from prunelab import data, models
from prunelab.masks import Masks
from prunelab.settings import Data, Model, Train
from prunelab.training.train import Member, Population, generator

BATCH = 32
# name -> model, sizes, runs in lockstep, steps
CASES = {
    "DropNet's Model C": ("dropnet_c", (64, 64, 128, 128), 2, 6),
    "DropNet's ResNet18": ("dropnet_resnet18", (64, 128, 256, 512), 1, 3),
    "ResNet-20": ("resnet20", (16, 32, 64), 1, 6),
    "VGG-16": ("vgg16", (64, 128, 256, 512, 512, 512), 1, 2),
}


def case(name: str, repeats: int) -> dict[str, object]:
    model, hidden, runs, steps = CASES[name]
    images = data.load(Data("cifar10", validation=0, train_size=steps * BATCH))

    def rival(precision: str) -> Callable[[], object]:
        train = Train(epochs=10**6, batch_size=BATCH, optimiser="sgd", lr=0.01, precision=precision)
        nets = [models.build(Model(model, hidden), images.shape, len(images.classes), seed) for seed in range(runs)]
        members = [Member(net, train, Masks.ones(net), generator(seed, "order")) for seed, net in enumerate(nets)]
        population = Population(images)
        return lambda: population.epoch(members)

    results = timing.compare({name: rival(name) for name in ("float32", "bfloat16")}, repeats)
    print(f"\n{name}, {runs} runs, {steps} steps\n{timing.table(results)}")
    return {"data": images.source, "hidden": hidden, "runs": runs, "steps": steps, "results": results}


def main() -> None:
    options = timing.options(__doc__, repeats=7)
    cases = {name: case(name, options.repeats) for name in CASES}
    claims = [
        timing.faster(f"{name}: training in bfloat16 against float32", found["results"], "bfloat16", at_least=1.5)
        for name, found in cases.items()
    ]
    timing.write("precision", {"batch_size": BATCH, "claims": claims, "cases": cases})


if __name__ == "__main__":
    main()
