"""``prune`` applies a pruning method to any model; ``prune_`` also changes the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from prunelab.collapse import dead_layers
from prunelab.errors import PrunelabError, checked_seed
from prunelab.masks import MaskError, Masks, layer_of, named_layers
from prunelab.pruners.base import Pruner, Reweighting
from prunelab.pruners.registry import METHODS, build
from prunelab.pruners.select import Granularity, check_amount, scored_names
from prunelab.settings import Prune
from prunelab.structure.forward import copies, looking


def first_masks(model: nn.Module, pruner: Pruner, layers: Iterable[str] = ()) -> Masks:
    """The masks before the first round: everything in ``layers`` is kept.

    Raises:
        PrunelabError: a layer that does not exist, or that has nothing of the kind that the method removes.
    """
    layers = named_layers(layers)
    masks = Masks.ones(model, layers)
    granularity = getattr(pruner, "granularity", None)
    if granularity in get_args(Granularity):
        competing = scored_names(model, masks, granularity)
        if layers and (idle := [layer_of(name) for name in masks if name not in competing]):
            why = f"has no {granularity}s that may go, being of another kind or a layer that gives the answers"
            raise MaskError(f"layer {idle[0]!r} {why}: leave it out of layers")
    return masks


def prune(
    model: nn.Module,
    method: str | Pruner,
    amount: float | Mapping[str, float],
    *,
    layers: Iterable[str] | None = (),
    batches: Iterable[Any] | None = None,
    current: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> Masks:
    """Masks of ``model`` without the part that the method would remove; the model itself is not changed.

    Args:
        model: Any module with layers of weights; see ``masks.prunable``.
        method: A name of ``METHODS``, or a pruner of your own.
        amount: Fraction of the remaining weights or units that goes, in [0, 1); or layer -> fraction, each layer pruned
            by itself, as ``sensitivity`` proposes.
        layers: Names of the layers that may be pruned, of any class; ``()`` or None: all that ``masks.prunable`` knows.
            Where units go, those whose units are the outputs of the model stay whole; see ``select.scored_names``.
        batches: Inputs and targets, for methods that look at data.
        current: What earlier rounds left; None: everything is still there. ``amount`` is a fraction of this.
        start: Weights from before the training, parameter name -> tensor, for methods that compare with them.
        seed: Of every random choice, ties among them.
        **options: Fields of the method's class.

    Returns:
        Masks on the device of the model. ``masks.apply_(model)`` sets the pruned weights to zero, and
        ``masks.hold(model, optimizer)`` keeps them there while you train. Of a method that also changes the weights
        that are left (coresets) this is one half; ``prune_`` does both.

    Raises:
        PrunelabError: one line that says what is wrong, before any work; after it, unless ``allow_empty=True``, the
            name of a layer that would lose all its weights, or at which the last path from the inputs would end, of all
            layers together.
    """
    how = {"layers": layers, "batches": batches, "current": current, "start": start, "seed": seed}
    return _pruned(model, method, amount, **how, **options)[0]


def prune_(model: nn.Module, method: str | Pruner, amount: float | Mapping[str, float], **how: Any) -> Masks:
    """``prune``, and ``model`` is changed: pruned weights are zero, and others have the values that the method gives.

    Only methods that are ``Reweighting`` give any (coresets); with all others it is ``prune`` and ``masks.apply_``.

    Args:
        model: As for ``prune``.
        method: As for ``prune``.
        amount: As for ``prune``.
        **how: All that ``prune`` takes by name.

    Returns:
        The masks, which are applied already.
    """
    masks, weights = _pruned(model, method, amount, **how)
    put_weights(model, weights)
    masks.apply_(model)
    return masks


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give parameters other values, in place: parameter name -> values of its shape."""
    for name, values in weights.items():
        model.get_parameter(name).copy_(values)


def _pruned(
    model: nn.Module,
    method: str | Pruner,
    amount: float | Mapping[str, float],
    *,
    layers: Iterable[str] | None = (),
    batches: Iterable[Any] | None = None,
    current: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Masks, Mapping[str, Tensor]]:
    """What ``prune`` gives, and the new values of weights."""
    if not isinstance(model, nn.Module):
        raise PrunelabError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    checked_seed(seed)
    pruner = build(Prune(method=method, options=options)) if isinstance(method, str) else method
    if pruner is method and options:
        raise PrunelabError(f"option {min(options)!r} comes with a pruner that is already built: set it there")
    if isinstance(pruner, type) or not isinstance(pruner, Pruner):
        what = repr(method) if isinstance(method, str) else type(method).__name__
        whole = ", ".join(name for name, entry in METHODS.items() if hasattr(entry.pruner, "masks"))
        raise PrunelabError(f"{what} does not prune finished models: train with it, or choose from {whole}")
    if isinstance(batches, Tensor):
        raise PrunelabError("batches is a bare tensor: give batches=[(x, y)], inputs and targets in pairs")
    if getattr(pruner, "needs_start", False) and start is not None:
        pruner = pruner.since(start)
    before = current if isinstance(current, Masks) else Masks({} if current is None else current)
    before.check(model)
    with looking(model):
        parts, batches = _parts(model, pruner, amount, layers), copies(batches)  # every layer looks at them anew
        after, weights, draw = Masks({}), {}, torch.Generator().manual_seed(seed)
        for masks, own in parts:
            chosen = {layer_of(name) for name in masks}
            masks &= Masks({name: mask for name, mask in before.items() if layer_of(name) in chosen})
            if isinstance(pruner, Reweighting):
                found, changed = pruner.reweighted(model, batches, masks, own, draw)
                weights |= changed
            else:
                found = pruner.masks(model, batches, masks, own, draw)
            after &= found
    after &= before
    dead = [] if getattr(pruner, "allow_empty", False) else dead_layers(model, after)
    if dead and (newly := [name for name in dead if name not in dead_layers(model, before)]):
        what = f"layer {newly[0]!r} would die, since no kept weight connects it with the inputs"
        raise MaskError(f"{what}: remove less, use scope='layer', leave the layer out, or say allow_empty=True")
    return after, weights


def _parts(
    model: nn.Module, pruner: Pruner, amount: float | Mapping[str, float], layers: Iterable[str] | None
) -> list[tuple[Masks, float]]:
    """What is pruned together, kept whole, and by how much: all layers, or each that has an amount of its own."""
    layers = named_layers(layers)
    if not isinstance(amount, Mapping):
        check_amount(amount)
        return [(first_masks(model, pruner, layers), float(amount))]
    if not amount:
        raise PrunelabError("amount names no layer: should be layer -> fraction, or one number for all")
    if layers and (other := sorted({*layers} ^ {*amount})):
        raise PrunelabError(f"amount and layers differ at {other[0]!r}: name the layers in amount alone")
    for own in amount.values():
        check_amount(own)
    return [(first_masks(model, pruner, [layer]), float(own)) for layer, own in amount.items()]
