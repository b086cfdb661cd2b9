"""One epoch of LeNet-300-100 on MNIST, batch 128: the loops people write with a DataLoader against prunelab.

usage: PRUNELAB_DATA=... python benchmarks/epoch.py [--repeats 3] [--threads 2]

All see all 60,000 images, standardised, in random order, and take the same SGD steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import timing
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import MNIST

from prunelab import data, models, paths
from prunelab.masks import Masks
from prunelab.settings import Data, Model, Train
from prunelab.training.train import Member, Population, generator

BATCH, LR = 128, 0.05


def loop(model: nn.Module, optimiser: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """The textbook epoch, with the running loss and accuracy that prunelab keeps as well."""
    losses, right = [], 0
    for x, y in batches:
        optimiser.zero_grad()
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        right += (logits.argmax(1) == y).sum().item()


def main() -> None:
    options = timing.options(__doc__, repeats=3)
    mnist = data.load(Data("mnist", validation=0, scaling="standard"))
    mean, std = (float(value) / mnist.peak for value in (mnist.shift, mnist.spread))
    files = MNIST(
        paths.data_root(),
        transform=transforms.Compose([transforms.ToTensor(), transforms.Normalize((mean,), (std,))]),
    )
    tensors = TensorDataset(mnist.scale(mnist.train.x), mnist.train.y)
    draw = torch.Generator().manual_seed(0)

    def fresh() -> nn.Module:
        return models.build(Model("lenet_300_100"), mnist.shape, len(mnist.classes), seed=0)

    def rival(batches: Iterable[tuple[Tensor, Tensor]]):
        model = fresh()
        optimiser = torch.optim.SGD(model.parameters(), lr=LR)
        return lambda: loop(model, optimiser, batches)

    class Rows:
        """What a loop by hand can do with tensors in memory."""

        def __iter__(self):
            return ((tensors.tensors[0][i], tensors.tensors[1][i]) for i in torch.randperm(60_000).split(BATCH))

    model = fresh()
    train = Train(epochs=10**6, batch_size=BATCH, optimiser="sgd", lr=LR)
    member, population = Member(model, train, Masks.ones(model), generator(0, "order")), Population(mnist)

    def batches_alone() -> None:
        for x, _ in data.batches(mnist.train, BATCH, draw):
            mnist.scale(x)

    rivals = {
        "DataLoader, images, num_workers=0": rival(DataLoader(files, BATCH, shuffle=True)),
        "DataLoader, images, num_workers=2": rival(
            DataLoader(files, BATCH, shuffle=True, num_workers=2, persistent_workers=True)
        ),
        "DataLoader, TensorDataset": rival(DataLoader(tensors, BATCH, shuffle=True)),
        "float32 tensors, indexed by hand": rival(Rows()),
        "prunelab": lambda: population.epoch([member]),
        "prunelab, batches alone, no training": batches_alone,
    }
    results = timing.compare(rivals, options.repeats)
    print(f"{options.threads} threads\n\n{timing.table(results)}")
    shares = timing.shares(lambda: population.epoch([member]))
    print(shares)
    by_hand = "float32 tensors, indexed by hand"
    ours, rows = (results[name]["ratio"] for name in ("prunelab", by_hand))
    best = [timing.quickest(results, "prunelab", against) for against in (None, by_hand)]
    text = "an epoch of LeNet-300-100 on MNIST, against a DataLoader of torchvision"
    claims = [
        timing.claim(text, ours, "x", at_least=11, quickest=best[0]),
        timing.claim(f"the same, against {by_hand}", ours / rows, "x", at_least=1, quickest=best[1]),
    ]
    values = {"data": mnist.source, "batch_size": BATCH, "claims": claims, "results": results, "shares": shares}
    timing.write("epoch", values)


if __name__ == "__main__":
    main()
