"""DropNeuron's two networks that give numbers, not classes: its regression.py and autoencoder.py."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict

from torch import nn


def linear_chain(input_shape: tuple[int, ...], hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """``flatten, hidden_1, output`` without any activation: 20-5-1 in the paper's sparse regression."""
    return _chain((math.prod(input_shape), *hidden, outputs), None)


def autoencoder(input_shape: tuple[int, ...], hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Fully connected, a sigmoid behind every layer, the output too: 784-128-64-128-784 and 218,192 parameters."""
    return _chain((math.prod(input_shape), *hidden, outputs), nn.Sigmoid)


def _chain(sizes: tuple[int, ...], activation: type[nn.Module] | None) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    names = [*(f"hidden_{number}" for number in range(1, len(sizes) - 1)), "output"]
    for name, (inputs, units) in zip(names, itertools.pairwise(sizes), strict=True):
        layers[name] = nn.Linear(inputs, units)
        if activation is not None:
            layers[f"act_{name}"] = activation()
    return nn.Sequential(layers)
