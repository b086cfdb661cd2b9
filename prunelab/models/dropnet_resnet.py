"""The ResNet18 of DropNet's notebook: no BatchNorm, no strides, 20 convolutions whose filters may go."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from prunelab.errors import PrunelabError


class Block(nn.Module):
    """Two convolutions with ReLU, added to the shortcut; no ReLU after the addition.

    Args:
        channels: Of the input.
        filters: Of each convolution.
        shortcut: Whether a third convolution with ReLU stands on the shortcut, as in the first block of a stage that
            changes the number of channels; else the shortcut is the input itself.
    """

    def __init__(self, channels: int, filters: int, shortcut: bool) -> None:
        super().__init__()
        self.conv_1, self.relu_1 = _conv(channels, filters), nn.ReLU()
        self.conv_2, self.relu_2 = _conv(filters, filters), nn.ReLU()
        self.shortcut = nn.Sequential(OrderedDict(conv=_conv(channels, filters), relu=nn.ReLU())) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, filters, H, W]."""
        y = self.relu_2(self.conv_2(self.relu_1(self.conv_1(x))))
        return y + (x if self.shortcut is None else self.shortcut(x))


def dropnet_resnet18(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """``conv, relu, pool, stage_1, pool_1, ..., stage_4, average, flatten, output``.

    Source: the authors' notebook. Of Supplementary Fig. 1 it leaves out a MaxPool behind the last stage.

    Args:
        input_shape: ``(C, H, W)``; below 16 x 16 pixels the poolings that would leave nothing are left out (our own).
        hidden: Filters of the four stages; the first convolution has as many as the first stage.
        classes: Number of outputs.

    Raises:
        PrunelabError: The input is no image.
    """
    if len(input_shape) != 3:
        raise PrunelabError(f"needs images (C, H, W), not samples of shape {input_shape}")
    channels, side = hidden[0], min(input_shape[1:])
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=_conv(input_shape[0], channels), relu=nn.ReLU())
    if side >= 2:
        layers["pool"], side = nn.MaxPool2d(2), side // 2
    for stage, filters in enumerate(hidden, start=1):
        first, second = Block(channels, filters, shortcut=stage > 1), Block(filters, filters, shortcut=False)
        layers[f"stage_{stage}"] = nn.Sequential(OrderedDict(block_1=first, block_2=second))
        if stage < len(hidden) and side >= 2:
            layers[f"pool_{stage}"], side = nn.MaxPool2d(2), side // 2
        channels = filters
    layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "output": nn.Linear(channels, classes)}
    return nn.Sequential(layers)


def _conv(channels: int, filters: int) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, 3, padding=1)
