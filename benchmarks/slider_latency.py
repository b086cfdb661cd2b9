"""How long a move of the pruning-rate slider takes, from the event to the new picture: LeNet-300-100, LeNet-5, VGG-16.

usage: PRUNELAB_DATA=... python benchmarks/slider_latency.py [--moves 200] [--threads 2] [--large-threads 2]

Each move goes to a rate that was not visited before, so that nothing is remembered: selection, masks, evaluation,
sentence, numbers, curve, histogram, and the table with a picture of the units of each layer, or a drawing of the
network. It is made as the browser
makes it, inside a running loop: where a network is slow, the first picture has the accuracy on part of the sample, and
the time until all of it was measured stands beside it. The message to the browser and its drawing are not in it. VGG-16
takes ``--large-threads`` and a tenth of the moves.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
import timing
import torch

from prunelab import data, models, settings
from prunelab.lab.live import PruningExplorer

CASES = [  # network, data, images per evaluation, what is shown, and the most that 95 of 100 moves may take, in ms
    ("lenet_300_100", "mnist", 2000, "units", 100),
    ("lenet_300_100", "mnist", 2000, "network", 100),
    ("lenet_5", "mnist", 500, "units", 100),
    ("lenet_5", "mnist", 500, "network", 100),
    ("vgg16", "cifar10", 256, "units", 500),
]


def moves(model: str, images: data.Dataset, samples: int, view: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of ``count`` moves in random order, after one that does not count: to the first picture, and to the last.

    Only the first is what one waits for: a move ends what is still measured for the one before.
    """
    dense = models.build(settings.Model(model), images.shape, len(images.classes), seed=0)
    explorer = PruningExplorer(dense, images, evaluate=samples)
    explorer.view.value = view
    rates = np.linspace(0.001, 0.998, count + 1).tolist()
    explorer.rate.options = [(f"{rate:.4f}", rate) for rate in rates]
    seconds = []

    async def drag() -> None:
        for index in np.random.default_rng(0).permutation(len(rates)).tolist():
            start = time.perf_counter()
            explorer.rate.set_state({"index": index})
            first = time.perf_counter()
            while explorer._rest is not None:
                await asyncio.sleep(0)
            seconds.append((first - start, time.perf_counter() - start))

    asyncio.run(drag())
    explorer.check()
    assert len(explorer.visited) >= count, "a move was not measured"
    first, last = np.array(seconds[1:]).T
    return first, last


def main() -> None:
    options = timing.options(__doc__, moves=200, large_threads=2)
    found, claims, sources = {}, [], {}
    for model, name, samples, view, limit in CASES:
        large = model == "vgg16"
        torch.set_num_threads(options.large_threads if large else options.threads)
        images = data.load(name)
        seconds, whole = moves(model, images, samples, view, options.moves // 10 if large else options.moves)
        quickest, p50, p95, highest = (round(float(v) * 1e3, 1) for v in np.percentile(seconds, (0, 50, 95, 100)))
        times = {"quickest_ms": quickest, "p50_ms": p50, "p95_ms": p95, "highest_ms": highest}
        times |= {f"whole_p{p}_ms": round(float(np.percentile(whole, p)) * 1e3, 1) for p in (50, 95)}
        drawn = ", the network drawn" * (view == "network")
        found[model + drawn] = {"samples": samples, "moves": len(seconds), "threads": torch.get_num_threads(), **times}
        sources[name] = images.source
        text = f"a move of the slider on {model}{drawn}, {samples:,} images, 95th percentile"
        if times["whole_p95_ms"] > p95:
            text += f" to the first picture; all images are measured after {times['whole_p95_ms']:,.0f} ms"
        claims.append(timing.claim(text, p95, "ms", at_most=limit, quickest=quickest))
        print(f"{model + drawn:32} {samples:5,} images  " + "  ".join(f"{k} {v:.1f}" for k, v in times.items()))
    timing.write("slider_latency", {"data": ", ".join(sources.values()), "claims": claims, "results": found})


if __name__ == "__main__":
    main()
