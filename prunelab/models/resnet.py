"""Residual networks for small images: He et al., CVPR 2016, section 4.2, with shortcuts of option A."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.gates import Gate


class Block(nn.Module):
    """Two convolutions with BatchNorm; the shortcut takes every second pixel and adds channels of zeros (option A).

    The shortcut has no weights; a ``Gate`` in it is where masks can close its channels.

    Args:
        channels: of the input.
        filters: of both convolutions; as many as ``channels``, or more, half of the new ones before and half behind.
        stride: of the first convolution; 2 where the maps become smaller.
    """

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.norm_1, self.relu_1 = nn.BatchNorm2d(filters), nn.ReLU()
        self.conv_2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm_2, self.relu_2 = nn.BatchNorm2d(filters), nn.ReLU()
        before = (filters - channels) // 2
        self.stride, self.padding = stride, (0, 0, 0, 0, before, filters - channels - before)
        self.shortcut = Gate(filters)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, filters, H / stride, W / stride]."""
        y = self.norm_2(self.conv_2(self.relu_1(self.norm_1(self.conv_1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if any(self.padding):
            x = F.pad(x, self.padding)
        return self.relu_2(y + self.shortcut(x))


def resnet(depth: int) -> Callable[[tuple[int, ...], tuple[int, ...], int], nn.Sequential]:
    """A builder of the network with so many layers, 6 n + 2: ``conv, norm, relu, stage_1, stage_2, stage_3, ...``."""
    blocks = (depth - 2) // 6

    def build(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
        if len(input_shape) != 3:
            raise PrunelabError(f"needs images (C, H, W), not samples of shape {input_shape}")
        if list(hidden) != sorted(hidden):
            raise PrunelabError(f"hidden = {hidden}: a stage should have no fewer filters than the one before")
        channels = hidden[0]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
        )
        for stage, filters in enumerate(hidden, start=1):
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            for number in range(1, blocks + 1):
                parts[f"block_{number}"] = Block(channels, filters, 2 if number == 1 and stage > 1 else 1)
                channels = filters
            layers[f"stage_{stage}"] = nn.Sequential(parts)
        layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "output": nn.Linear(channels, classes)}
        return nn.Sequential(layers)

    return build
