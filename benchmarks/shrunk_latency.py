"""Latency of VGG-16 for CIFAR with 80 % of its channels gone: masked, shrunk, built that small, and by torch-pruning.

usage: python benchmarks/shrunk_latency.py [--batch 64] [--repeats 25] [--threads 2]     # needs torch-pruning (PyPI)

VGG-16 with BatchNorm and one fully connected layer, 14.7 million parameters, random weights. In every convolution the
filters with the largest L1 norms stay. torch-pruning (PyPI) is told to remove the same filters, and all that should
compute the same is compared before anything is timed. "Rounded down" keeps the widths 13, 26, ... rounded down to
multiples of 8, as torch-pruning's ``round_to=8`` does; "rounded up" is ``shrink(..., round_to=8)``, which fills up.
"Inference form" is ``shrink(..., fold_batchnorm=True)``; what torch-pruning gives keeps its BatchNorms. The part of the
MACs that is left is a bound for the part of the time, unless a narrow layer does more of them in a second than a wide
one.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import timing
import torch
import torch_pruning
import torchvision
from torch import Tensor, nn

from prunelab.masks import Masks
from prunelab.pruners.units import unit_masks
from prunelab.structure import cost, shrink

PART = 0.8
SMALL = ("shrunk", "built so", "torch-pruning")
GOALS = (("", "", 8.5), (", rounded down", "", 6.3), (", rounded down", ", channels_last", 3.6))  # % of the dense time


def vgg(widths: list[int] | None = None) -> nn.Sequential:
    """VGG-16 for 32 x 32 images, in evaluation mode; ``widths`` are those of the 13 convolutions."""
    features = torchvision.models.vgg16_bn().features
    layers: list[nn.Module] = []
    channels, left = 3, list(widths or [])
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            width = left.pop(0) if widths else layer.out_channels
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
            channels = width
        elif not isinstance(layer, nn.BatchNorm2d):
            layers.append(nn.ReLU() if isinstance(layer, nn.ReLU) else layer)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10)).eval()


def kept(model: nn.Module, multiple: int) -> dict[str, Tensor]:
    """Convolution -> the filters that stay, bool."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            width = layer.out_channels - int(PART * layer.out_channels)
            best = layer.weight.detach().abs().flatten(1).sum(1).topk(max(width // multiple, 1) * multiple).indices
            found[name] = torch.zeros(layer.out_channels, dtype=torch.bool).index_fill_(0, best, True)
    return found


def by_torch_pruning(model: nn.Module, units: dict[str, Tensor], example: Tensor) -> nn.Module:
    """The same filters removed with torch-pruning's dependency graph."""
    model = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    for name, keep in units.items():
        gone = (~keep).nonzero().flatten().tolist()
        graph.get_pruning_group(model.get_submodule(name), torch_pruning.prune_conv_out_channels, idxs=gone).prune()
    return model.eval()


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    model = copy.deepcopy(model)
    masks.apply_(model)
    return model


def last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def main() -> None:
    options = timing.options(__doc__, batch=64, repeats=25)
    torch.manual_seed(0)
    dense, x = vgg(), torch.randn(options.batch, 3, 32, 32)
    models: dict[str, nn.Module] = {"dense": dense}
    for words, multiple in (("", 1), (", rounded down", 8)):
        units = kept(dense, multiple)
        masks = unit_masks(dense, units)
        models |= {} if words else {"masked": masked(dense, masks)}
        models[f"shrunk{words}"] = shrink(dense, masks, x[:2])
        models[f"shrunk{words}, inference form"] = shrink(dense, masks, x[:2], fold_batchnorm=True)
        models[f"built so{words}"] = vgg([int(keep.sum()) for keep in units.values()])
        models[f"torch-pruning{words}"] = by_torch_pruning(dense, units, x[:1])
        with torch.inference_mode():
            expected = masked(dense, masks)(x)
            for name in (f"shrunk{words}", f"shrunk{words}, inference form", f"torch-pruning{words}"):
                error = float((models[name](x) - expected).abs().max() / expected.abs().max())
                if error > 1e-5:
                    raise SystemExit(f"{name} gives other outputs than the masked model, by {error:.1e}")
        if not words:
            models["shrunk, rounded up"] = shrink(dense, masks, x[:2], round_to=8)
    both = ("shrunk", "shrunk, rounded down")
    for name in ("dense", *both, *(f"{name}, inference form" for name in both), "torch-pruning, rounded down"):
        models[f"{name}, channels_last"] = last(models[name])

    def rival(name: str) -> Any:
        model, inputs = models[name], x
        if name.endswith("channels_last"):
            inputs = x.to(memory_format=torch.channels_last)

        def work() -> None:
            with torch.inference_mode():
                model(inputs)

        return work

    # The small ones are timed again among themselves, in more turns: they differ by less than the dense one disturbs.
    groups = {"against the dense network": list(models), "among the small": [n for n in models if n.startswith(SMALL)]}
    turns: dict[str, dict[str, list[float]]] = {group: {} for group in groups}
    cases = {}
    for (group, names), repeats in zip(groups.items(), (options.repeats, 6 * options.repeats), strict=True):
        cases[group] = {"results": timing.compare({n: rival(n) for n in names}, repeats, turns=turns[group])}
        print(f"{group}, {options.threads} threads, batch {options.batch}\n\n{timing.table(cases[group]['results'])}\n")

    def ratios(name: str, other: str) -> list[float]:
        own = turns["against the dense network" if "dense" in (name, other) else "among the small"]
        return [a / b for a, b in zip(own[name], own[other], strict=True)]

    def claim(text: str, values: list[float], unit: str, **goal: float) -> dict[str, Any]:
        low, middle, high = statistics.quantiles(values, n=4)
        return timing.claim(text, middle, unit, spread=(round(low, 2), round(high, 2)), **goal)

    what = f"VGG-16 for CIFAR, {100 * PART:g} % of the channels gone, batch {options.batch}"
    longer = [100 * (ratio - 1) for ratio in ratios("shrunk", "built so")]
    claims = [claim(f"{what}: shrunk, longer than a network built with these widths", longer, "%", at_most=5)]
    for form in ("", ", inference form"):
        for width, layout, goal in GOALS:
            own, case = f"shrunk{width}{form}{layout}", f"{what}{width}{layout}: shrunk{form}"
            against = ratios(f"torch-pruning{width}{layout}", own)
            claims.append(claim(f"{case}, against torch-pruning with the same filters", against, "x", at_least=1))
            part = [100 * ratio for ratio in ratios(own, "dense")]
            claims.append(claim(f"{case}, time of the dense network", part, "%", at_most=goal))
    facts = {
        name: {
            "widths": [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)],
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": cost.macs(model, (3, 32, 32)),
        }
        for name, model in models.items()
    }
    timing.write("shrunk_latency", {"batch": options.batch, "models": facts, "claims": claims, "cases": cases})


if __name__ == "__main__":
    main()
