"""The greedy oracle on a network of DropNet's figures: all candidates of a round together, and one after the other.

usage: PRUNELAB_DATA=... python benchmarks/oracle.py [--samples 2000] [--repeats 3] [--threads 2]

Model A with 20 and 20 neurons (Fig. 13) and Model B with 20 and 20 filters (Fig. 14), on MNIST, before the first and
after the twentieth of the 36 rounds.
"""

from __future__ import annotations

import timing
import torch

from prunelab import data, models
from prunelab.masks import Masks
from prunelab.pruners.oracle import losses_without
from prunelab.pruners.units import unit_masks
from prunelab.settings import Data, Model

LAYERS = {"dropnet_a": ("hidden_1", "hidden_2"), "dropnet_b": ("conv_1", "conv_2")}
NAMES = {"dropnet_a": "784-20-20-10", "dropnet_b": "Conv20-Conv20"}


def main() -> None:
    options = timing.options(__doc__, samples=2000, repeats=3)
    mnist = data.load(Data("mnist", validation=0, train_size=options.samples))
    batches = [(mnist.scale(mnist.train.x), mnist.train.y)]
    found = {}
    for name, layers in LAYERS.items():
        for left in (20, 10):
            model = models.build(Model(name, (20, 20), "glorot_uniform"), mnist.shape, len(mnist.classes), 0)
            units = {layer: torch.arange(20) < left for layer in layers}
            (Masks.ones(model, layers) & unit_masks(model, units)).apply_(model)
            rivals = {
                how: lambda batched=batched, model=model, units=units: losses_without(
                    model, units, batches, batched=batched
                )
                for how, batched in (("one after the other", False), ("all together", True))
            }
            off = [rival() for rival in rivals.values()]
            worst = max(float((off[0][n][k] - off[1][n][k]).abs().max()) for n, k in units.items())
            title = f"{NAMES[name]}, {left} + {left} candidates"
            results = timing.compare(rivals, options.repeats)
            print(f"\n{title}; largest difference of a loss {worst:.1e}\n{timing.table(results)}")
            found[title] = {"largest_difference": worst, "results": results}
    timing.write("oracle", {"data": mnist.source, "samples": options.samples, "networks": found})


if __name__ == "__main__":
    main()
