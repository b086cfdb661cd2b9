"""Which of the registered methods ``live`` can move by a rate, and what each of them can remove from a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from prunelab import pruners
from prunelab.masks import MaskError, Masks
from prunelab.pruners import Ranking
from prunelab.pruners.select import scored_names
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
    for name, (pruner, preset, default, _) in pruners.METHODS.items():
        fields = {each.name for each in dataclasses.fields(pruner)}  # type: ignore[arg-type]
        plain = any(other is pruner and not set_ for other, set_, *_ in pruners.METHODS.values())
        rest = {key: value for key, value in preset.items() if key != "granularity"}
        if not fields >= NEEDED or (preset and plain and pruner(**rest) == pruner()):
            continue
        method = pruner(**preset, **default)
        moves = isinstance(method, Ranking) and method.reads_amount and method.measured == 1
        if not moves or method.compares_with_start:
            continue
        free = "granularity" in fields - set(preset)
        own = [kind for kind in (kinds if free else []) if _has(pruner, preset, kind)] or [method.granularity]
        made = {kind: pruner(**preset, **({"granularity": kind} if free else {})) for kind in own}
        own = [kind for kind in own if _acts(model, dense, made[kind])]
        if own and (data or method.reads == "nothing"):
            found[name] = own
    return dict(sorted(found.items()))


def _has(pruner: Any, preset: Mapping[str, Any], granularity: str) -> bool:
    """Whether a method can be built for a granularity."""
    try:
        pruner(**preset, granularity=granularity)
    except SettingsError:
        return False
    return True


def _acts(model: nn.Module, dense: Masks, method: Ranking) -> bool:
    try:
        method.check(model, dense)
    except MaskError:
        return False
    return _competes(model, dense, method.granularity)


def _competes(model: nn.Module, dense: Masks, granularity: str) -> bool:
    try:
        return bool(scored_names(model, dense, granularity))  # type: ignore[arg-type]
    except MaskError:
        return False
