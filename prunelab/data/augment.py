"""Random changes to whole batches of images, on the device where they are; every image gets its own draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelab.errors import PrunelabError, nearest

PADDING = 4  # pixels on each side before the crop, as is usual for CIFAR
# DropNet's settings of Keras' ImageDataGenerator for Tiny ImageNet.
ROTATION = 40.0  # degrees, either way
SHIFT = 0.2  # of the height and of the width, either way
SHEAR = 0.2  # degrees, either way: Keras reads shear_range as an angle in degrees, so next to nothing
ZOOM = 0.2  # the side that is seen is 0.8 to 1.2 of the image's, for height and width apart


def augment(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Change each image of a batch at random.

    ``crop_flip`` pads with 4 pixels of zero, crops back at a random place and mirrors left to right with probability
    1/2. ``affine`` is DropNet's set for Tiny ImageNet (in its published code), as Keras' ImageDataGenerator applies it:
    rotation, shift, shear and zoom about the centre in one bilinear resampling, outside filled with the nearest pixel,
    then the mirror.

    Args:
        x: Images [N, C, H, W], uint8 or float.
        kind: ``"none"``, ``"crop_flip"`` or ``"affine"``.
        generator: Source of all draws, on any device; the same state gives the same result.

    Returns:
        A new tensor of the same shape, type and device (for ``none`` the same tensor); uint8 is rounded.

    Raises:
        PrunelabError: an unknown kind, or no batch of images.
    """
    if kind == "none":
        return x
    if kind not in KINDS:
        raise PrunelabError(f"augment = {kind!r} is unknown: {nearest(kind, {'none', *KINDS})}")
    if x.ndim != 4:
        raise PrunelabError(f"augment = {kind!r} needs images [N, C, H, W], not shape {tuple(x.shape)}: use 'none'")
    return KINDS[kind](x, generator)


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crops of the zero-padded images, mirrored half of the time; see ``augment``."""
    n, device = len(x), generator.device
    top, left = torch.randint(2 * PADDING + 1, (2, n), generator=generator, device=device).to(x.device)
    mirrored = (torch.rand(n, generator=generator, device=device) < 0.5).to(x.device)
    padded = F.pad(x, (PADDING,) * 4)
    windows = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # views of all crops, [N, C, top, left, H, W]
    crops = windows[torch.arange(n, device=x.device), :, top, left]
    return torch.where(mirrored[:, None, None, None], crops.flip(3), crops)


def affine(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotated, shifted, sheared, zoomed and mirrored images; see ``augment``."""
    draws = torch.rand(len(x), 7, generator=generator, device=generator.device).to(x.device)
    theta = affine_matrices(draws, x.shape[2], x.shape[3])
    source = x if x.is_floating_point() else x.float()
    grid = F.affine_grid(theta.to(source.dtype), list(x.shape), align_corners=False)
    out = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out if x.is_floating_point() else out.round_().clamp_(0, 255).to(x.dtype)


def affine_matrices(draws: Tensor, height: int, width: int) -> Tensor:
    """Where each output pixel is looked up, as ``affine_grid`` takes it.

    Keras multiplies rotation, shift, shear and zoom in this order, in pixels about the centre, rows before columns.
    The mirror comes first on the way from output to input.

    Args:
        draws: Uniform in [0, 1), [N, 7]: rotation, shift of rows, of columns, shear, zoom of rows, of columns, mirror.
        height: H, in pixels.
        width: W, in pixels.

    Returns:
        float32 [N, 2, 3], from (x, y, 1) of the output to (x, y) of the input, both in -1..1 between the image's edges.
    """
    even = 2 * draws - 1
    angle, shear = torch.deg2rad(even[:, 0] * ROTATION), torch.deg2rad(even[:, 3] * SHEAR)
    down, right = even[:, 1] * SHIFT * height, even[:, 2] * SHIFT * width
    zoom_rows, zoom_columns = 1 + even[:, 4] * ZOOM, 1 + even[:, 5] * ZOOM
    mirror = torch.where(draws[:, 6] < 0.5, -1.0, 1.0)
    # rotation [[cos, -sin], [sin, cos]] times shear [[1, -sin], [0, cos]] adds the two angles in the second column
    row_row, column_row = angle.cos() * zoom_rows, angle.sin() * zoom_rows
    row_column = -(angle + shear).sin() * zoom_columns * mirror
    column_column = (angle + shear).cos() * zoom_columns * mirror
    row_shift = angle.cos() * down - angle.sin() * right
    column_shift = angle.sin() * down + angle.cos() * right
    x = torch.stack([column_column, column_row * height / width, 2 * column_shift / width], 1)
    y = torch.stack([row_column * width / height, row_row, 2 * row_shift / height], 1)
    return torch.stack([x, y], 1)


KINDS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = MappingProxyType(
    {"crop_flip": crop_flip, "affine": affine}
)
