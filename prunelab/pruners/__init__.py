"""The pruning methods by name, and ``prune``, which applies one of them to any model.

To add a method: one file beside this one with a frozen dataclass that is a ``Pruner``, and one line in ``METHODS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from prunelab.collapse import dead_layers
from prunelab.errors import PrunelabError, nearest
from prunelab.masks import MaskError, Masks, layer_of
from prunelab.pruners.dyprune import DyPrune
from prunelab.pruners.magnitude import Magnitude
from prunelab.pruners.none import Dense
from prunelab.pruners.random import Random
from prunelab.pruners.select import Granularity, check_amount, scored_names
from prunelab.settings import Prune

__all__ = ["METHODS", "Method", "Pruner", "Ranking", "build", "prune", "start"]


@runtime_checkable
class Pruner(Protocol):
    """A frozen dataclass whose fields are the method's hyper-parameters."""

    def masks(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, amount: float, generator: torch.Generator
    ) -> Masks:
        """What is left of ``current`` when a fraction ``amount`` of it is gone. Pure: changes neither the model nor anything else.

        Args:
            model: The model as it was trained; its pruned weights are zero.
            batches: Inputs and targets, for methods that look at data.
            current: What is still there.
            amount: Fraction of the remaining units, in [0, 1).
            generator: The only source of randomness.
        """
        ...


@runtime_checkable
class Ranking(Pruner, Protocol):
    """A pruner that ranks before it removes, so that the scores can go on record: ``masks`` is ``select`` after ``scores``."""

    def scores(
        self, model: nn.Module, batches: Iterable[Any] | None, current: Masks, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scores, higher = keep: parameter name -> one per weight, or layer name -> one per unit."""
        ...

    def select(
        self, model: nn.Module, scores: Mapping[str, Tensor], current: Masks, amount: float, generator: torch.Generator
    ) -> Masks:
        """What is left of ``current`` when the lowest scores are gone."""
        ...


class Method(NamedTuple):
    """What a name stands for: a class, and the fields that the name itself sets, which no option may set again."""

    pruner: type[Pruner]
    preset: Mapping[str, Any] = MappingProxyType({})


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        # the three papers
        "dyprune": Method(DyPrune),
        # (dropnet and nnrelief go here)
        # controls and plain methods
        "none": Method(Dense),
        "random": Method(Random),
        "magnitude": Method(Magnitude),
        "l1_weight": Method(Magnitude, {"granularity": "weight", "norm": 1}),
        "l1_neuron": Method(Magnitude, {"granularity": "neuron", "norm": 1}),
        "l1_filter": Method(Magnitude, {"granularity": "filter", "norm": 1}),
        "l2_neuron": Method(Magnitude, {"granularity": "neuron", "norm": 2}),
        "l2_filter": Method(Magnitude, {"granularity": "filter", "norm": 2}),
        "random_neuron": Method(Random, {"granularity": "neuron"}),
        "random_filter": Method(Random, {"granularity": "filter"}),
    }
)


def build(prune: Prune) -> Pruner:
    """The pruner that the settings name, with its options checked.

    Raises:
        PrunelabError: no such method, no such option, a value that the option cannot have, or an option that the name already sets.
    """
    if prune.method not in METHODS:
        raise PrunelabError(f"there is no pruning method {prune.method!r}: {nearest(prune.method, METHODS)}")
    pruner, preset = METHODS[prune.method]
    free = [field.name for field in dataclasses.fields(pruner) if field.name not in preset]  # type: ignore[arg-type]
    for option in prune.options:
        if option in preset:
            raise PrunelabError(
                f"method {prune.method!r} itself sets {option} = {preset[option]!r}: leave the option out, or choose another method"
            )
        if option not in free:
            raise PrunelabError(f"method {prune.method!r} has no option {option!r}: {nearest(option, free)}")
    return pruner(**preset, **prune.options)


def start(model: nn.Module, pruner: Pruner, layers: Iterable[str] = ()) -> Masks:
    """The masks before the first round: everything in ``layers`` is kept.

    Raises:
        PrunelabError: a layer that does not exist, or that has nothing of the kind that the method removes.
    """
    layers = [layers] if isinstance(layers, str) else list(layers)
    masks = Masks.ones(model, layers)
    granularity = getattr(pruner, "granularity", None)
    if granularity in get_args(Granularity):
        competing = scored_names(model, masks, granularity)
        if layers and (idle := [layer_of(name) for name in masks if name not in competing]):
            raise MaskError(
                f"layer {idle[0]!r} has no {granularity}s that may go (wrong kind, or the last layer): leave it out of layers"
            )
    return masks


def prune(
    model: nn.Module,
    method: str | Pruner,
    amount: float,
    *,
    layers: Iterable[str] = (),
    batches: Iterable[Any] | None = None,
    current: Masks | None = None,
    seed: int = 0,
    **options: Any,
) -> Masks:
    """Masks of ``model`` without the part that the method would remove; the model itself is not changed.

    Args:
        model: Any module with Linear or Conv2d layers.
        method: A name of ``METHODS``, or a pruner of your own.
        amount: Fraction of the remaining weights or units that goes, in [0, 1).
        layers: Names of the layers that may be pruned; ``()``: all Linear and Conv2d.
        batches: Inputs and targets, for methods that look at data.
        current: What earlier rounds left; None: everything is still there. ``amount`` is a fraction of this.
        seed: Of every random choice, ties among them.
        **options: Fields of the method's class.

    Returns:
        Masks on the device of the model. ``masks.apply_(model)`` sets the pruned weights to zero; ``masks.hold(model, optimizer)`` keeps
        them there while you train.

    Raises:
        PrunelabError: one line that says what is wrong, before any work. Afterwards, unless ``allow_empty=True``: the name of a layer that
            would lose all its weights, or at which the last path from the inputs would end.
    """
    if not isinstance(model, nn.Module):
        raise PrunelabError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    check_amount(amount)
    if isinstance(method, str):
        pruner = build(Prune(method=method, options=options))
    elif options:
        raise PrunelabError(
            f"option {min(options)!r} comes with a pruner that is already built: set it there, or give the method by name"
        )
    else:
        pruner = method
    chosen = start(model, pruner, layers)
    if current is not None:
        current.check(model)
        names = {layer_of(name) for name in chosen}
        aside = Masks({name: mask for name, mask in current.items() if layer_of(name) not in names})
        chosen &= Masks({name: mask for name, mask in current.items() if layer_of(name) in names})
    else:
        aside = Masks({})
    after = pruner.masks(model, batches, chosen, amount, torch.Generator().manual_seed(seed))
    after = after & aside if aside else after
    dead = [] if getattr(pruner, "allow_empty", False) else dead_layers(model, after)
    if dead and (newly := [name for name in dead if name not in dead_layers(model, chosen & aside)]):
        raise MaskError(
            f"layer {newly[0]!r} would die, no kept weight connects it with the inputs: "
            "remove less, use scope='layer', leave the layer out, or say allow_empty=True"
        )
    return after
