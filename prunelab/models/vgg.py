"""VGG with BatchNorm for small images, in the forms of NNrelief's code."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from prunelab.errors import PrunelabError

DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(
    depths: Sequence[int], input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int, *, dense: int
) -> nn.Sequential:
    """``conv_1_1, norm_1_1, relu_1_1, ..., pool_1, conv_2_1, ..., flatten, dense_1, relu_dense_1, ..., output``.

    Args:
        depths: convolutions of each of the five stages; a 2 x 2 max-pooling follows each stage.
        input_shape: ``(C, H, W)``; below 32 x 32 pixels the poolings that would leave nothing are left out (our own).
        hidden: filters of the five stages, and the units of the fully connected layers.
        classes: number of outputs.
        dense: how many fully connected layers there are before the output.

    Raises:
        PrunelabError: the input is no image.
    """
    if len(input_shape) != 3:
        raise PrunelabError(f"needs images (C, H, W), not samples of shape {input_shape}")
    *filters, units = hidden
    channels, height, width = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (depth, outputs) in enumerate(zip(depths, filters, strict=True), start=1):
        for number in range(1, depth + 1):
            layers[f"conv_{stage}_{number}"] = nn.Conv2d(channels, outputs, 3, padding=1)
            layers[f"norm_{stage}_{number}"] = nn.BatchNorm2d(outputs)
            layers[f"relu_{stage}_{number}"] = nn.ReLU()
            channels = outputs
        if min(height, width) >= 2:
            layers[f"pool_{stage}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    sizes = [channels * height * width, *[units] * dense]
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
        layers[f"dense_{number}"] = nn.Linear(inputs, outputs)
        layers[f"relu_dense_{number}"] = nn.ReLU()
    layers["output"] = nn.Linear(units, classes)
    return nn.Sequential(layers)


def vgg_like(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """NNrelief's VGG-like: the convolutions of VGG-16, one fully connected layer, dropout before the output."""
    chain = vgg(DEPTHS[16], input_shape, hidden, classes, dense=1)
    named = OrderedDict(chain.named_children())
    output = named.pop("output")
    return nn.Sequential(OrderedDict(**named, dropout=nn.Dropout(), output=output))


# 8, 10, 13 and 16 convolutions, and two fully connected layers before the output
vgg11, vgg13, vgg16, vgg19 = (functools.partial(vgg, depths, dense=2) for depths in DEPTHS.values())
