"""How long a move of the pruning-rate slider takes, from the event to the new picture: LeNet-300-100 and LeNet-5.

usage: PRUNELAB_DATA=... python benchmarks/slider_latency.py [--moves 200] [--threads 2]

Each move goes to a rate that was not visited before, so that nothing is remembered: selection, masks, one evaluation,
sentence, curve and table. The message to the browser and its drawing are not in it.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import timing
import torch

from prunelab import data, models, settings
from prunelab.live import PruningExplorer

SAMPLES = {"lenet_300_100": 2000, "lenet_5": 500}  # images per evaluation


def moves(model: str, images: data.Dataset, samples: int, count: int) -> np.ndarray:
    """Seconds of ``count`` moves in random order, after one that does not count."""
    dense = models.build(settings.Model(model), images.shape, len(images.classes), seed=0)
    explorer = PruningExplorer(dense, images, evaluate=samples)
    rates = np.random.default_rng(0).permutation(np.linspace(0.001, 0.998, count + 1)).tolist()
    explorer.rate.options = [(f"{rate:.4f}", rate) for rate in sorted(rates)]
    seconds = []
    for rate in rates:
        start = time.perf_counter()
        explorer.rate.value = rate
        seconds.append(time.perf_counter() - start)
    assert len(explorer.visited) >= count, "a move was not measured"
    return np.array(seconds[1:])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--moves", type=int, default=200)
    options.add_argument("--threads", type=int, default=2)
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    images = data.load("mnist")
    found = {}
    for model, samples in SAMPLES.items():
        seconds = moves(model, images, samples, options.moves)
        p50, p95, highest = (
            round(float(value) * 1e3, 1) for value in (*np.percentile(seconds, (50, 95)), seconds.max())
        )
        found[model] = {"samples": samples, "moves": options.moves, "p50_ms": p50, "p95_ms": p95, "highest_ms": highest}
        print(f"{model:14} {samples:5,} images  p50 {p50:6.1f} ms  p95 {p95:6.1f} ms  highest {highest:6.1f} ms")
    claims = [
        timing.claim(f"a move of the slider on {model}, 95th percentile", row["p95_ms"], "ms", at_most=100)
        for model, row in found.items()
    ]
    timing.write("slider_latency", {"data": images.source, "claims": claims, "results": found})


if __name__ == "__main__":
    main()
