"""Which of the registered methods ``live`` can move by a rate, and what each of them can remove from a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from prunelab import pruners
from prunelab.masks import MaskError, Masks, layer_of
from prunelab.pruners import Ranking
from prunelab.pruners.select import norms_behind, scored_names
from prunelab.settings import SettingsError

NEEDED = {"scope", "allow_empty"}  # options of a method that have to be there, so that a rate can be moved
GRANULARITIES = ("weight", "neuron", "filter", "unit")


def offered(model: nn.Module, dense: Masks, data: bool = True) -> dict[str, list[str]]:
    """The registered methods that rank what a finished model has, each score once: name -> its granularities.

    Args:
        model: The model.
        dense: Masks that keep all of it.
        data: whether there are inputs and targets for methods that look at them.
    """
    kinds = [kind for kind in GRANULARITIES if _competes(model, dense, kind)]
    if not {"neuron", "filter"} <= set(kinds):
        kinds = [kind for kind in kinds if kind != "unit"]  # it would be the same as the one that there is
    found = {}
    for name, (pruner, preset, _) in pruners.METHODS.items():
        fields = {each.name for each in dataclasses.fields(pruner)}  # type: ignore[arg-type]
        plain = any(other is pruner and not set_ for other, set_, _ in pruners.METHODS.values())
        rest = {key: value for key, value in preset.items() if key != "granularity"}
        if not fields >= NEEDED or (preset and plain and pruner(**rest) == pruner()):
            continue
        method = pruner(**preset)
        reads = getattr(method, "needs_data", name in ("dropnet", "apoz"))
        if not isinstance(method, Ranking) or getattr(method, "needs_start", False) or getattr(method, "one", False):
            continue
        free = "granularity" in fields - set(preset)
        own = [k for k in (kinds if free else [method.granularity]) if _has(pruner, preset, k if free else None)]
        own = [kind for kind in own if _competes(model, dense, kind)]
        if getattr(method, "score", "") == "batchnorm":
            own = own if norms_behind(model, [layer_of(weight) for weight in dense]) else []
        if own and (data or not reads):
            found[name] = own
    return dict(sorted(found.items()))


def _has(pruner: Any, preset: Mapping[str, Any], granularity: str | None) -> bool:
    """Whether a method can be built for a granularity; None: for that which it has."""
    try:
        pruner(**preset, **({} if granularity is None else {"granularity": granularity}))
    except SettingsError:
        return False
    return True


def _competes(model: nn.Module, dense: Masks, granularity: str) -> bool:
    try:
        return bool(scored_names(model, dense, granularity))  # type: ignore[arg-type]
    except MaskError:
        return False
