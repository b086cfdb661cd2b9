"""Some seeds of DropNet's Models A, B and C (batch 32, SGD), some steps each, one after the other and in lockstep.

usage: PRUNELAB_DATA=... python benchmarks/population.py [--seeds 15] [--repeats 5] [--threads 2]

One after the other as a plain loop over tensors in memory, one after the other in prunelab, and all in lockstep. The
first round of a figure is that of six metrics which prune later, and so begin alike: prunelab trains each seed once.
"""

from __future__ import annotations

import timing
import torch
from torch import nn

from prunelab import data, models
from prunelab.masks import Masks
from prunelab.settings import Data, Model, Train
from prunelab.training.train import Member, Population, generator

BATCH, LR = 32, 0.1
# name -> data, model, hidden, steps, seeds (None: as many as asked for), batches in the data's order as in DropNet, and
# how many curves begin with each seed
CASES = {
    "A, own batches": ("mnist", "dropnet_a", (40, 40), 400, None, False, 1),
    "A, the data's order": ("mnist", "dropnet_a", (40, 40), 400, None, True, 1),
    "A, the first round of a figure": ("mnist", "dropnet_a", (40, 40), 400, 3, True, 6),
    "B": ("mnist", "dropnet_b", (64, 64), 12, 5, True, 1),
    "B, a tenth of the filters": ("mnist", "dropnet_b", (6, 6), 100, 5, True, 1),
    "B, the first round of a figure": ("mnist", "dropnet_b", (64, 64), 12, 2, True, 6),
    "C": ("cifar10", "dropnet_c", (64, 64, 128, 128), 6, 5, True, 1),
}


def case(name: str, seeds: int, repeats: int) -> dict[str, object]:
    dataset, model, hidden, steps, own, fixed, curves = CASES[name]
    seeds = own or seeds
    images = data.load(Data(dataset, validation=0, train_size=steps * BATCH))
    train = Train(epochs=10**6, batch_size=BATCH, optimiser="sgd", lr=LR, shuffle=not fixed)

    def fresh(seed: int) -> nn.Module:
        return models.build(Model(model, hidden), images.shape, len(images.classes), seed)

    def members() -> list[Member]:
        nets = [(seed, fresh(seed)) for seed in range(seeds) for _ in range(curves)]
        return [Member(net, train, Masks.ones(net), generator(seed, "order"), beginning=seed) for seed, net in nets]

    def plain() -> None:
        for seed in sorted([*range(seeds)] * curves):
            net, draw = fresh(seed), None if fixed else generator(seed, "order")
            step = torch.optim.SGD(net.parameters(), lr=LR)
            losses, right = [], 0
            order = torch.arange(len(images.train.y)) if fixed else torch.randperm(len(images.train.y), generator=draw)
            for index in order.split(BATCH):
                x, y = images.train.x[index], images.train.y[index]
                step.zero_grad()
                logits = net(images.scale(x))
                loss = nn.functional.cross_entropy(logits, y)
                loss.backward()
                step.step()
                losses.append(loss.item())
                right += (logits.argmax(1) == y).sum().item()

    rivals = {
        "plain loop, one after the other": plain,
        "prunelab, one after the other": lambda: [Population(images).epoch([member]) for member in members()],
        "prunelab, in lockstep": lambda: Population(images).epoch(members()),
    }
    results = timing.compare(rivals, repeats)
    print(f"\n{name}: {curves} x {seeds} runs, {steps} steps\n{timing.table(results)}")
    shares = timing.shares(rivals["prunelab, in lockstep"])
    return {
        "data": images.source,
        "hidden": hidden,
        "seeds": seeds,
        "curves": curves,
        "steps": steps,
        "results": results,
        "shares": shares,
    }


def main() -> None:
    options = timing.options(__doc__, seeds=15, repeats=5)
    cases = {name: case(name, options.seeds, options.repeats) for name in CASES}
    claims = [
        timing.faster(
            f"{found['seeds']} seeds of DropNet's Model {name}, in lockstep, against a plain loop, one after the other",
            found["results"],
            "prunelab, in lockstep",
            at_least=6,
        )
        for name, found in cases.items()
        if name.startswith("A")  # the network that the goal was set for
    ]
    timing.write("population", {"batch_size": BATCH, "claims": claims, "cases": cases})


if __name__ == "__main__":
    main()
