"""Fifteen seeds of a small network (784-40-40-10, batch 32, SGD), 400 steps each, each with its own batch order.

usage: PRUNELAB_DATA=... python benchmarks/population.py [--seeds 15] [--repeats 5] [--threads 2]

One after the other as a plain loop over tensors in memory, one after the other in prunelab, and all in lockstep.
"""

from __future__ import annotations

import argparse

import timing
import torch
from torch import nn

from prunelab import data, models
from prunelab.masks import Masks
from prunelab.settings import Data, Model, Train
from prunelab.train import Member, Population, generator

STEPS, BATCH, LR = 400, 32, 0.1


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, default=15)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=2)
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    mnist = data.load(Data("mnist", validation=0, train_size=STEPS * BATCH))
    train = Train(epochs=10**6, batch_size=BATCH, optimiser="sgd", lr=LR)

    def fresh(seed: int) -> nn.Module:
        return models.build(Model("mlp", (40, 40)), mnist.shape, len(mnist.classes), seed)

    def members() -> list[Member]:
        nets = [fresh(seed) for seed in range(options.seeds)]
        return [Member(net, train, Masks.ones(net), generator(seed, "order")) for seed, net in enumerate(nets)]

    def plain() -> None:
        for seed in range(options.seeds):
            model, draw = fresh(seed), generator(seed, "order")
            step = torch.optim.SGD(model.parameters(), lr=LR)
            losses, right = [], 0
            for x, y in data.batches(mnist.train, BATCH, draw):
                step.zero_grad()
                logits = model(mnist.scale(x))
                loss = nn.functional.cross_entropy(logits, y)
                loss.backward()
                step.step()
                losses.append(loss.item())
                right += (logits.argmax(1) == y).sum().item()

    rivals = {
        "plain loop, one after the other": plain,
        "prunelab, one after the other": lambda: [Population(mnist).epoch([member]) for member in members()],
        "prunelab, in lockstep": lambda: Population(mnist).epoch(members()),
    }
    results = timing.compare(rivals, options.repeats)
    print(f"{options.seeds} seeds, {STEPS} steps, {options.threads} threads\n\n{timing.table(results)}")
    shares = timing.shares(rivals["prunelab, in lockstep"])
    print(shares)
    text = f"{options.seeds} seeds of 784-40-40-10 in lockstep, against a plain loop, one after the other"
    claims = [timing.claim(text, results["prunelab, in lockstep"]["ratio"], "x", at_least=6)]
    values = {"seeds": options.seeds, "steps": STEPS, "batch_size": BATCH, "claims": claims}
    values |= {"results": results, "shares": shares}
    timing.write("population", {"data": mnist.source, **values})


if __name__ == "__main__":
    main()
