"""One global pruning call on VGG-19 for CIFAR (20 million weights): torch.nn.utils.prune against prunelab.

usage: python benchmarks/global_selection.py [--amount 0.8] [--repeats 7] [--threads 2]
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import timing
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import prunelab
from prunelab.masks import Masks, prunable

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512)


def vgg19() -> nn.Sequential:
    """The weights of VGG-19 with two hidden linear layers of 512; nothing is run through them here."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (inputs, outputs) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
        layers[f"conv_{index + 1}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
    for index, outputs in enumerate((512, 512, 10)):
        layers[f"linear_{index + 1}"] = nn.Linear(512, outputs)
    return nn.Sequential(layers)


def by_torch(model: nn.Module, amount: float) -> None:
    weights = [(model.get_submodule(name.removesuffix(".weight")), "weight") for name in prunable(model)]
    torch_prune.global_unstructured(weights, torch_prune.L1Unstructured, amount=amount)


def by_prunelab(model: nn.Module, amount: float) -> Masks:
    masks = prunelab.prune(model, "magnitude", amount)
    masks.apply_(model)
    return masks


def by_threshold(model: nn.Module, amount: float, kth: str) -> None:
    """The textbook way: one long vector, its k-th value, a comparison; ties at the threshold are all removed."""
    weights = [model.get_parameter(name).detach() for name in prunable(model)]
    scores = torch.cat([weight.abs().flatten() for weight in weights])
    count = round(amount * len(scores))
    threshold = (
        np.partition(scores.numpy(), count - 1)[count - 1].item() if kth == "numpy" else scores.kthvalue(count).values
    )
    for weight in weights:
        weight.mul_(weight.abs() > threshold)


def check_same(dense: nn.Module, amount: float) -> int:
    """How many weights both keep; refuses to compare unless they are the same, ties at the threshold apart."""
    theirs, ours = copy.deepcopy(dense), by_prunelab(copy.deepcopy(dense), amount)
    by_torch(theirs, amount)
    kept = {name: theirs.get_buffer(f"{name}_mask").bool() for name in ours}
    assert sum(int(mask.sum()) for mask in kept.values()) == ours.kept, "the counts differ"
    differing = [dense.get_parameter(name).detach()[ours[name] != kept[name]].abs() for name in ours]
    assert torch.cat(differing).unique().numel() <= 1, "the weights that are kept differ"
    return ours.kept


def main() -> None:
    options = timing.options(__doc__, amount=0.8, repeats=7)
    torch.manual_seed(0)
    dense = vgg19()
    kept = check_same(dense, options.amount)
    rivals = {
        "torch.nn.utils.prune": lambda model: by_torch(model, options.amount),
        "cat + kthvalue": lambda model: by_threshold(model, options.amount, "torch"),
        "cat + numpy.partition": lambda model: by_threshold(model, options.amount, "numpy"),
        "prunelab": lambda model: by_prunelab(model, options.amount),
    }
    results = timing.compare(rivals, options.repeats, setup=lambda: copy.deepcopy(dense))
    total = Masks.ones(dense).total
    print(f"{total:,} weights, {kept:,} kept by both, {options.threads} threads\n\n{timing.table(results)}")
    text = f"one global pruning of {total / 1e6:.1f} million weights, against torch.nn.utils.prune; the same are kept"
    values = {"weights": total, "kept": kept, "amount": options.amount}
    claims = [timing.faster(text, results, "prunelab", at_least=20)]
    timing.write("global_selection", {**values, "claims": claims, "results": results})


if __name__ == "__main__":
    main()
