"""``prune`` applies a pruning method to any model; ``prune_`` also changes the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError, checked_seed
from prunelab.masks import MaskError, Masks, layer_of, named_layers
from prunelab.pruners.base import Context, Loss, Pruner, Ranking, Step
from prunelab.pruners.registry import METHODS, build
from prunelab.pruners.select import check_amount, scored_names
from prunelab.pruners.units import COUPLED
from prunelab.settings import Prune
from prunelab.structure.collapse import dead_layers
from prunelab.structure.forward import looking


def first_masks(model: nn.Module, pruner: Pruner, layers: Iterable[str] = ()) -> Masks:
    """The masks before the first round: everything in ``layers`` is kept.

    Raises:
        PrunelabError: a layer that does not exist, or that has nothing of the kind that the method removes.
    """
    layers = named_layers(layers)
    coupled = pruner.granularity in COUPLED
    try:
        masks = Masks.ones(model, layers)
    except MaskError:
        if layers or not coupled:
            raise
        masks = Masks({})  # its channels are those of layers of its own kinds
    competing = list(masks) if coupled else scored_names(model, masks, pruner.granularity)
    if layers and (idle := [layer_of(name) for name in masks if name not in competing]):
        why = f"has no {pruner.granularity}s that may go, being of another kind or a layer that gives the answers"
        raise MaskError(f"layer {idle[0]!r} {why}: leave it out of layers")
    pruner.check(model, masks)
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
    loss: Loss | None = None,
    example: Any = None,
    exact: bool = True,
    seed: int = 0,
    **options: Any,
) -> Masks:
    """Masks of ``model`` without the part that the method would remove; the model itself is not changed.

    Args:
        model: Any module with layers of weights; see ``masks.prunable``.
        method: A name of ``METHODS``, the import path of a ``Pruner``, ``"mymethods:LargestGo"``, or one that is built.
        amount: Fraction of the remaining weights or units that goes, in [0, 1); or layer -> fraction, each layer pruned
            by itself, as ``sensitivity`` proposes.
        layers: Names of the layers that may be pruned, of any class; ``()`` or None: all that ``masks.prunable`` knows.
            Where units go, those whose units are the outputs of the model stay whole; see ``select.scored_names``.
        batches: Inputs and targets, for methods that look at data.
        current: What earlier rounds left; None: everything is still there. ``amount`` is a fraction of this.
        start: Weights from before the training, parameter name -> tensor, for methods that compare with them.
        loss: Of outputs and targets, the mean over the batch, as ``torch.nn.functional.mse_loss``, for scores that are
            slopes of it; None: cross entropy, where the targets are classes.
        example: One batch of inputs, for methods that have to see the model run; None: inputs of ``batches``. A tensor,
            a tuple of arguments, or a dict of named ones.
        exact: With ``granularity="channel"`` or ``"head"``, whether channels over which LayerNorm or GroupNorm take
            statistics stay; False: they may go, and the smaller network is another function than the masked one.
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
    return _pruned(model, method, amount, loss=loss, example=example, exact=exact, **how, **options).masks


def prune_(model: nn.Module, method: str | Pruner, amount: float | Mapping[str, float], **how: Any) -> Masks:
    """``prune``, and ``model`` is changed: pruned weights are zero, and others have the values that the method gives.

    Only coresets give any; with all other methods it is ``prune`` and ``masks.apply_``.

    Args:
        model: As for ``prune``.
        method: As for ``prune``.
        amount: As for ``prune``.
        **how: All that ``prune`` takes by name.

    Returns:
        The masks, which are applied already.
    """
    step = _pruned(model, method, amount, **how)
    put_weights(model, step.weights)
    step.masks.apply_(model)
    return step.masks


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers other values, in place: name -> values of its shape."""
    own = dict(model.named_parameters()) | dict(model.named_buffers()) if weights else {}
    for name, values in weights.items():
        own[name].copy_(values)


def _pruned(
    model: nn.Module,
    method: str | Pruner,
    amount: float | Mapping[str, float],
    *,
    layers: Iterable[str] | None = (),
    batches: Iterable[Any] | None = None,
    current: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    example: Any = None,
    exact: bool = True,
    seed: int = 0,
    **options: Any,
) -> Step:
    """What ``prune`` gives, and the new values of weights."""
    if not isinstance(model, nn.Module):
        raise PrunelabError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    checked_seed(seed)
    pruner = build(Prune(method=method, options=options)) if isinstance(method, str) else method
    if pruner is method and options:
        raise PrunelabError(f"option {min(options)!r} comes with a pruner that is already built: set it there")
    if not isinstance(pruner, Pruner) or pruner.while_training:
        what = repr(method) if isinstance(method, str) else type(method).__name__
        whole = ", ".join(name for name, entry in METHODS.items() if not entry.pruner.while_training)
        raise PrunelabError(f"{what} does not prune finished models: train with it, or choose from {whole}")
    if isinstance(batches, Tensor):
        raise PrunelabError("batches is a bare tensor: give batches=[(x, y)], inputs and targets in pairs")
    if batches is not None and not isinstance(batches, Iterable):
        raise PrunelabError(f"batches is a {type(batches).__name__}: give pairs (x, y), as a list or a DataLoader")
    if loss is not None and not isinstance(loss, Callable):
        raise PrunelabError(f"loss = {loss!r}: should be a function of outputs and targets, as F.mse_loss")
    if batches is not None and iter(batches) is batches:
        batches = list(batches)  # a method may go through them several times
    draw = torch.Generator().manual_seed(seed)
    before = current if isinstance(current, Masks) else Masks({} if current is None else current)
    before.check(model)
    now = Context(model, before, draw, lambda: batches or (), lambda: start, loss, example, exact)
    whole = pruner.granularity in COUPLED and not named_layers(layers) and not isinstance(amount, Mapping)
    after, weights, parts = Masks({}), {}, []
    with looking(model):
        for masks, own in _parts(model, pruner, amount, layers):
            chosen = {layer_of(name) for name in masks}
            parts.append((masks & Masks({n: m for n, m in before.items() if whole or layer_of(n) in chosen}), own))
        _finite(model, (name for masks, _ in parts for name in masks))
        for step in _steps(pruner, now, parts):
            after, weights = after & step.masks, weights | dict(step.weights)
    after &= before
    dead = [] if pruner.allow_empty else dead_layers(model, after)
    if dead and (newly := [name for name in dead if name not in dead_layers(model, before)]):
        what = f"layer {newly[0]!r} would die, since no kept weight connects it with the inputs"
        raise MaskError(f"{what}: remove less, use scope='layer', leave the layer out, or say allow_empty=True")
    return Step(after, weights=weights)


def _steps(pruner: Pruner, now: Context, parts: list[tuple[Masks, float]]) -> Iterable[Step]:
    """Every part pruned by itself; where scores are measured only once, for all parts together."""
    if len(parts) == 1 or not isinstance(pruner, Ranking) or pruner.measured > 1:
        yield from (pruner.prune(now.having(masks), own) for masks, own in parts)
        return
    whole = Masks({name: mask for masks, _ in parts for name, mask in masks.items()})
    scores = pruner.scores(now.having(whole))
    for masks, own in parts:
        names = {*masks, *map(layer_of, masks)}
        alone = {name: score for name, score in scores.items() if name in names}
        yield Step(pruner.select(now.having(masks), alone, own))


def _finite(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse weights that are NaN, before anything is compared with them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        weight = parameters.get(name)
        if weight is not None and bool(weight.detach().sum().isnan()) and bool(weight.isnan().any()):
            raise PrunelabError(f"{name} has NaN among its weights: train again, or load weights from before that")


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
