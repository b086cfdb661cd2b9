"""The VGG19 of DropNet's notebook: 16 convolutions whose filters may go, BatchNorm once per stage, behind a ReLU."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from prunelab.errors import PrunelabError

DEPTHS = (2, 2, 4, 4, 4)  # convolutions of each stage


def dropnet_vgg19(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """``conv_1_1, relu_1_1, conv_1_2, relu_1_2, norm_1, pool_1, conv_2_1, ..., flatten, dense, relu_dense, output``.

    Source: the authors' notebook; Supplementary Fig. 1 draws one stage of 512 less. BatchNorm stands between the ReLU
    of the last convolution of a stage and its pooling, with the constants of Keras, whose momentum 0.99 is 0.01 in
    PyTorch's way of counting. The paper's mask comes after it, so a filter that is gone must give 0 there.

    Args:
        input_shape: ``(C, H, W)``; below 32 x 32 pixels the poolings that would leave nothing are left out (our own).
        hidden: Filters of the five stages, and the units of ``dense``, which the paper never masks (Tiny ImageNet:
            1,024).
        classes: Number of outputs.

    Raises:
        PrunelabError: The input is no image.
    """
    if len(input_shape) != 3:
        raise PrunelabError(f"needs images (C, H, W), not samples of shape {input_shape}")
    channels, height, width = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (depth, filters) in enumerate(zip(DEPTHS, hidden, strict=False), start=1):
        for number in range(1, depth + 1):
            layers[f"conv_{stage}_{number}"] = nn.Conv2d(channels, filters, 3, padding=1)
            layers[f"relu_{stage}_{number}"] = nn.ReLU()
            channels = filters
        layers[f"norm_{stage}"] = nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01)
        if min(height, width) >= 2:
            layers[f"pool_{stage}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
    layers |= {
        "flatten": nn.Flatten(),
        "dense": nn.Linear(channels * height * width, hidden[-1]),
        "relu_dense": nn.ReLU(),
        "output": nn.Linear(hidden[-1], classes),
    }
    return nn.Sequential(layers)
