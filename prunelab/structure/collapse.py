"""Layers that died: they lost all their weights, or no path of kept weights connects them with the inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from prunelab.masks import Masks

# These treat each unit by itself, so a dead unit stays dead; behind any other module all units count as alive.
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardtanh)
_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten)
_UNIT_BY_UNIT = (*_ACTIVATIONS, *_POOLING, nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d, nn.Identity)


def dead_layers(model: nn.Module, masks: Masks) -> list[str]:
    """Names of the layers behind which nothing depends on the input any more.

    A layer is dead when its whole weight is masked; one without any input has nothing to lose. In a chain (an
    ``nn.Sequential``, nested or not) it is also dead when all weights that it keeps come from units without a path to
    the inputs; only the layer where the path breaks is named. In other models paths are not followed, since a skip
    connection may keep them alive.
    """
    dead = [
        name.removesuffix(".weight")
        for name, mask in masks.items()
        if mask.ndim > 1 and mask.numel() and not masks.counts[name]
    ]
    before: nn.Linear | nn.Conv2d | None = None
    between: list[nn.Module] = []
    alive: Tensor | None = None  # which units of the layer before have a path to the inputs; None: all
    for name, module in in_order(model) or ():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if before is None or not reads_units(before, between, module):
                alive = None
            connected = _connected(module, masks.get(f"{name}.weight"), alive)
            if not connected.any() and name not in dead:
                dead.append(name)
            before, between, alive = module, [], connected if connected.any() else None
        elif isinstance(module, _UNIT_BY_UNIT):
            between.append(module)
        else:
            before = None
    return dead


def reads_units(before: nn.Linear | nn.Conv2d, between: Iterable[nn.Module], layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether the inputs of a layer are the units of the one before in their order, as many for each.

    Maps are, and maps that are flattened whole. Linear works on the last axis, so behind another Linear it is so as
    long as nothing is flattened into that axis; and of maps that are not flattened it reads the columns.
    """
    kinds = [module for module in between if isinstance(module, _POOLING)]
    flattens = [module for module in kinds if isinstance(module, nn.Flatten)]
    if isinstance(layer, nn.Conv2d):
        return isinstance(before, nn.Conv2d) and not flattens and layer.in_channels == before.out_channels
    if isinstance(before, nn.Linear):
        return len(kinds) == len(flattens) and layer.in_features == before.out_features
    whole = all(module.start_dim == 1 and module.end_dim in (-1, 3) for module in flattens)
    return bool(flattens) and whole and layer.in_features % before.out_channels == 0


def _connected(layer: nn.Linear | nn.Conv2d, mask: Tensor | None, alive: Tensor | None) -> Tensor:
    """Which units of the layer have a kept weight from a unit that is alive."""
    if is_lazy(layer.weight):  # before its first batch nobody knows its shape
        return torch.ones(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels, dtype=torch.bool)
    kept = torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask
    inputs = kept.shape[1]
    if alive is not None and not alive.all() and getattr(layer, "groups", 1) == 1:
        each = inputs // len(alive)  # a flattened map has several inputs per filter
        kept = kept[:, alive.to(kept.device).repeat_interleave(each)]
    return kept.flatten(1).count_nonzero(1) > 0  # any() is ten times slower


def in_order(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]] | None:
    """The modules of nested Sequentials in their order; None for anything else, whose forward may do what it likes."""
    if type(module).forward is not nn.Sequential.forward:
        return None
    links: list[tuple[str, nn.Module]] = []
    for name, child in module._modules.items():  # named_children() leaves out a module that comes twice
        links.extend(in_order(child, f"{prefix}{name}.") or [(f"{prefix}{name}", child)])
    return links
