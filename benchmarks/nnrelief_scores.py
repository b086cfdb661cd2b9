"""NNrelief's scores (mean of norms) on 1,000 images: all at once, and kernel by kernel and image by image.

usage: python benchmarks/nnrelief_scores.py [--images 1000] [--kernels 60] [--repeats 3] [--threads 2]

The loop takes one convolution of one image with one kernel after the other, as the equation reads; so many calls (1.6
million kernels of VGG-16 times 1,000 images) that only some, drawn evenly from every layer, are timed, and their mean
is multiplied by the number of all. The published code loops over the positions too, and would be slower still.
"""

from __future__ import annotations

import time

import timing
import torch
import torch.nn.functional as F
from torch import nn

from prunelab import models
from prunelab.pruners.signals import signals
from prunelab.settings import Model
from prunelab.structure.watch import evaluating

NETWORKS = {"LeNet-5": ("lenet_5", (1, 28, 28)), "VGG-16": ("vgg16", (3, 32, 32))}


def inputs_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0].abs()}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with evaluating(model), torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def loop(model: nn.Module, x: torch.Tensor, kernels: int, images: int) -> float:
    """Estimated seconds of the loop over all convolutions, from ``kernels`` kernels of each."""
    given, draw, total = inputs_of(model, x[:1]), torch.Generator().manual_seed(0), 0.0
    for name, maps in given.items():
        layer = model.get_submodule(name)
        size = layer.weight.detach().abs()
        outputs, channels = size.shape[:2]
        pairs = torch.randint(0, outputs * channels, (kernels,), generator=draw).tolist()
        begin = time.perf_counter()
        for pair in pairs:
            j, i = divmod(pair, channels)
            F.conv2d(maps[:, i : i + 1], size[j : j + 1, i : i + 1], None, layer.stride, layer.padding).norm().item()
        total += (time.perf_counter() - begin) / kernels * outputs * channels * images
    return total


def main() -> None:
    options = timing.options(__doc__, images=1000, kernels=60, repeats=3)
    found, claims = {}, []
    for title, (name, shape) in NETWORKS.items():
        model = models.build(Model(name, init="kaiming_normal"), shape, 10, 0)
        x = torch.rand(options.images, *shape, generator=torch.Generator().manual_seed(0))
        layers = [n for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
        rows = []
        for turn in range(options.repeats + 1):  # in turns; the first does not count
            estimated = loop(model, x, options.kernels, options.images)
            begin = time.perf_counter()
            signals(model, layers, x)
            seconds = time.perf_counter() - begin
            if turn:
                rows.append((estimated, seconds))
        ratios = sorted(a / b for a, b in rows)
        middle = ratios[len(ratios) // 2]
        print(f"{title}: loop {rows[-1][0]:,.0f} s (estimated), at once {rows[-1][1]:.2f} s, {middle:,.0f}x")
        found[title] = {"loop_estimated": [a for a, _ in rows], "at_once": [b for _, b in rows], "ratio": middle}
        text = f"NNrelief's scores of the convolutions of {title} on {options.images:,} images, against a loop"
        claims.append(timing.claim(text, middle, "x", at_least=100, spread=(ratios[0], ratios[-1])))
    timing.write("nnrelief_scores", {"images": options.images, "networks": found, "claims": claims})


if __name__ == "__main__":
    main()
