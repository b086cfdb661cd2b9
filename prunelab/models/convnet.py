"""Chains of convolutions with pooling, among them DropNet's Models B and C."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from prunelab.errors import PrunelabError


def convnet(
    input_shape: tuple[int, ...],
    filters: tuple[int, ...],
    classes: int,
    *,
    kernel: int,
    padding: int,
    dense: int | None = None,
) -> nn.Sequential:
    """``conv_1, relu_1, pool_1, conv_2, ..., flatten, [dense, relu_dense,] output``.

    Args:
        input_shape: ``(C, H, W)`` of one sample.
        filters: Filters of each convolution; a ReLU and a 2 x 2 max-pooling follow each.
        classes: Number of outputs.
        kernel: Side of the kernels, in pixels.
        padding: Zeros on each side, in pixels.
        dense: Units of one hidden fully connected layer before the output; None for none.

    Raises:
        PrunelabError: The input is no image, or so small that a layer would have nothing to give on.
    """
    if len(input_shape) != 3:
        raise PrunelabError(f"needs images (C, H, W), not samples of shape {input_shape}: use 'mlp'")
    channels, height, width = input_shape
    shrinks = kernel - 1 - 2 * padding  # pixels that a convolution takes off each side length
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, units in enumerate(filters, start=1):
        layers[f"conv_{number}"] = nn.Conv2d(channels, units, kernel, padding=padding)
        layers[f"relu_{number}"] = nn.ReLU()
        layers[f"pool_{number}"] = nn.MaxPool2d(2)
        channels, height, width = units, height - shrinks, width - shrinks
        if min(height, width) < 2:
            layer = f"conv_{number}" if min(height, width) < 1 else f"pool_{number}"
            too_small, size = " x ".join(map(str, input_shape[1:])), _smallest(len(filters), shrinks)
            raise PrunelabError(f"{too_small} pixels are too few for layer {layer!r}: needs {size} x {size} or more")
        height, width = height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    features = channels * height * width
    if dense is not None:
        layers["dense"] = nn.Linear(features, dense)
        layers["relu_dense"] = nn.ReLU()
        features = dense
    layers["output"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def _smallest(depth: int, shrinks: int) -> int:
    """The side length, in pixels, of which ``depth`` convolutions with pooling leave one pixel."""
    size = 1
    for _ in range(depth):
        size = 2 * size + shrinks
    return size


def dropnet_b(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """DropNet's Model B: two convolutions of 3 x 3 (Fig. 2)."""
    return convnet(input_shape, hidden, classes, kernel=3, padding=1)


def dropnet_c(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """DropNet's Model C: four convolutions of 3 x 3, then ``dense``: 256 units, in the paper never masked (Fig. 2)."""
    return convnet(input_shape, hidden, classes, kernel=3, padding=1, dense=256)
