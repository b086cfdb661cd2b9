"""The networks by name; each builds for any input shape and any number of classes.

To add one: a file with a builder ``(input_shape, hidden, classes) -> nn.Module`` and one line in ``MODELS``. One of a
notebook or another package is registered, or named by its import path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunelab import settings
from prunelab.errors import PrunelabError, checked_seed, nearest
from prunelab.models.convnet import dropnet_b, dropnet_c
from prunelab.models.dropnet_resnet import dropnet_resnet18
from prunelab.models.dropnet_vgg import dropnet_vgg19
from prunelab.models.dropneuron import autoencoder, linear_chain
from prunelab.models.initialisation import initialise
from prunelab.models.lenet import lenet_5, lenet_5_same, lenet_300_100
from prunelab.models.mlp import mlp, perceptron
from prunelab.models.resnet import resnet
from prunelab.models.vgg import vgg11, vgg13, vgg16, vgg19, vgg_like
from prunelab.registry import Registry

__all__ = ["MODELS", "Architecture", "build", "initialise", "layer_widths", "mlp", "other_sizes", "register"]


@dataclass(frozen=True)
class Architecture:
    """How a network is built, and how large it is unless ``settings.Model.hidden`` says otherwise."""

    build: Callable[[tuple[int, ...], tuple[int, ...], int], nn.Module]  # (input_shape, hidden, classes)
    hidden: tuple[int, ...]
    any_depth: bool = False  # False: hidden has as many numbers as the default
    version: int = 1  # counted up when what is built changes, so that stored runs of it are made again


def _adopted(thing: Any, **sizes: Any) -> Architecture:
    """A builder of the user's own as an entry; ``hidden`` and ``any_depth`` as in ``Architecture``."""
    if isinstance(thing, Architecture) and not sizes:
        return thing
    if not callable(thing) or isinstance(thing, nn.Module):
        what = "should be a function (input_shape, hidden, classes) -> torch.nn.Module, or an Architecture"
        raise PrunelabError(f"{thing!r:.60} {what}")
    return Architecture(thing, **{"hidden": (), "any_depth": not sizes.get("hidden"), **sizes})


MODELS: Registry[Architecture] = Registry(
    "model",
    {
        "mlp": Architecture(perceptron, (1000, 1000, 1000), any_depth=True),  # DyPrune, example.py
        "lenet_300_100": Architecture(lenet_300_100, (300, 100)),
        "lenet_5": Architecture(lenet_5, (20, 50, 500)),
        "lenet_5_same": Architecture(lenet_5_same, (32, 64, 512)),
        "linear_chain": Architecture(linear_chain, (5,), any_depth=True),
        "autoencoder": Architecture(autoencoder, (128, 64, 128), any_depth=True),
        "dropnet_a": Architecture(perceptron, (40, 40)),
        "dropnet_b": Architecture(dropnet_b, (64, 64)),
        "dropnet_c": Architecture(dropnet_c, (64, 64, 128, 128)),
        "vgg_like": Architecture(vgg_like, (64, 128, 256, 512, 512, 512)),
        "vgg11": Architecture(vgg11, (64, 128, 256, 512, 512, 512)),
        "vgg13": Architecture(vgg13, (64, 128, 256, 512, 512, 512)),
        "vgg16": Architecture(vgg16, (64, 128, 256, 512, 512, 512)),
        "vgg19": Architecture(vgg19, (64, 128, 256, 512, 512, 512)),
        **{f"resnet{depth}": Architecture(resnet(depth), (16, 32, 64)) for depth in (20, 32, 44, 56, 110)},
        "dropnet_resnet18": Architecture(dropnet_resnet18, (64, 128, 256, 512)),
        "dropnet_vgg19": Architecture(dropnet_vgg19, (64, 128, 256, 512, 512, 256)),
    },
    _adopted,
)


def register(name: str, model: Callable[..., nn.Module] | Architecture, **sizes: Any) -> None:
    """Make a network of your own known by a name, as those of this package are.

    Args:
        name: the name.
        model: a function ``(input_shape, hidden, classes) -> nn.Module``, or an ``Architecture``.
        **sizes: ``hidden``: the default sizes; ``any_depth``: whether there may be other than so many.

    Raises:
        PrunelabError: the name is taken, or it is no function.
    """
    MODELS.register(name, model, **sizes)


def build(model: settings.Model, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """The network that ``model`` describes, in float32 on the CPU, its weights decided by ``seed`` alone.

    Args:
        model: Name, hidden sizes (empty: the default of ``MODELS``) and initialisation.
        input_shape: Shape of one sample, ``(C, H, W)`` or ``(features,)``.
        classes: Number of outputs.
        seed: Seeds the weights; the global random generators are left as they were.

    Returns:
        A module that takes ``[N, *input_shape]`` float32 and gives logits ``[N, classes]``.

    Raises:
        PrunelabError: Unknown name, hidden sizes of the wrong number, or an input that the network cannot take.
    """
    architecture = MODELS.find(model.name)
    hidden = model.hidden or architecture.hidden
    if len(hidden) != len(architecture.hidden) and not architecture.any_depth:
        raise PrunelabError(
            f"model {model.name!r}: hidden = {hidden} has {len(hidden)} sizes: "
            f"should have {len(architecture.hidden)}, like {architecture.hidden}"
        )
    if len(input_shape) not in (1, 3) or min(input_shape) < 1:
        raise PrunelabError(f"model {model.name!r}: input shape {input_shape}: should be (features,) or (C, H, W)")
    if classes < 1:
        raise PrunelabError(f"model {model.name!r}: {classes} classes: should be at least 1")
    checked_seed(seed)
    # torch.manual_seed would seed the accelerators too, so the CPU generator is forked and seeded by itself.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(seed)
        try:
            built = architecture.build(tuple(input_shape), hidden, classes)
        except PrunelabError as error:
            raise PrunelabError(f"model {model.name!r}: {error}") from None
        if not isinstance(built, nn.Module):
            raise PrunelabError(f"model {model.name!r} gives a {type(built).__name__}: should be a torch.nn.Module")
        initialise(built, model.init)
    return built


def other_sizes(name: str, hidden: Sequence[int], own: Sequence[int] = ()) -> str:
    """For a caption: the sizes of a network where they are not those that it should have, else ``""``.

    Args:
        name: in ``MODELS``.
        hidden: its sizes; (): those of ``own``.
        own: what they should be; (): the default of ``MODELS``.
    """
    own = tuple(own) or MODELS[name].hidden
    if tuple(hidden) in ((), own):
        return ""
    return f"widths {'-'.join(map(str, hidden))} in place of {'-'.join(map(str, own))}"


def layer_widths(model: nn.Module, layers: Collection[str] = ()) -> list[tuple[str, int]]:
    """The hidden layers in forward (module) order with their units: neurons of a Linear, filters of a Conv2d.

    Args:
        model: Any network; its last Linear or Conv2d counts as the output layer and is left out.
        layers: Names of the layers to look at; empty means all.

    Returns:
        ``[("hidden_1", 40), ("hidden_2", 40)]``.

    Raises:
        PrunelabError: A name in ``layers`` that is no hidden layer of the model.
    """
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    widths = [(name, layer.weight.shape[0]) for name, layer in found[:-1]]
    known = [name for name, _ in widths]
    if unknown := [name for name in layers if name not in known]:
        raise PrunelabError(f"the model has no hidden layer {unknown[0]!r}: {nearest(unknown[0], known)}")
    return [(name, units) for name, units in widths if not layers or name in layers]
