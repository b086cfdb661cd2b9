"""Fully connected networks of any depth."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict

from torch import nn

from prunelab.errors import PrunelabError


def mlp(*sizes: int) -> nn.Sequential:
    """``flatten, hidden_1, relu_1, hidden_2, relu_2, ..., output`` of the given sizes, with PyTorch's initialisation.

    Args:
        sizes: Input features, the hidden layers, classes: ``mlp(784, 1000, 1000, 1000, 10)`` is DyPrune's network.

    Returns:
        A chain that takes ``[N, ...]`` with ``sizes[0]`` numbers per sample and gives logits ``[N, sizes[-1]]``.

    Raises:
        PrunelabError: Fewer than two sizes, or one below 1.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise PrunelabError(f"mlp{sizes}: should be the input size, any hidden sizes and the classes, each at least 1")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, units) in enumerate(itertools.pairwise(sizes[:-1]), start=1):
        layers[f"hidden_{number}"] = nn.Linear(inputs, units)
        layers[f"relu_{number}"] = nn.ReLU()
    layers["output"] = nn.Linear(sizes[-2], sizes[-1])
    return nn.Sequential(layers)


def perceptron(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """``mlp`` for samples of any shape: DyPrune (its example.py), DropNet's Model A (its Fig. 2)."""
    return mlp(math.prod(input_shape), *hidden, classes)
