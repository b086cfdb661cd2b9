"""What the trainer makes of a method's step, for tests that act on a network without training it."""

from types import SimpleNamespace

import torch

from prunelab.masks import Masks
from prunelab.pruners import Context, put_weights
from prunelab.structure.chains import whole_index


def acted(pruner, now, amount=0.0):
    """The network after a step: its model, masks, moments, and all that the step says."""
    step = pruner.prune(now, amount)
    chosen = step.masks if step.chosen is None else step.chosen
    model, masks, moments, index = now.model, step.masks, now.moments, whole_index(now.model)
    if step.cut is not None:
        model, index = step.cut.model, step.cut.index
        masks = Masks({name: step.cut.cut(name, mask) for name, mask in masks.items()})
        moments = {kind: {n: step.cut.cut(n, t) for n, t in own.items()} for kind, own in moments.items()}
    put_weights(model, step.weights)
    if step.cut is not None and step.fresh:
        masks.apply_(model)
    own = {"model": model, "masks": masks, "moments": None if step.fresh else moments, "index": index}
    return SimpleNamespace(**vars(step) | own | {"masks_before_removal": chosen})


def looked_at(model, batches=(), masks=None, generator=None, **more):
    """A network at the moment at which it is pruned, all of it still there."""
    masks = Masks.ones(model) if masks is None else masks
    return Context(model, masks, generator or torch.Generator().manual_seed(0), lambda: batches, **more)
