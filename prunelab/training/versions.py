"""Which version of a method, a model and a reader of data makes a run: when one is mended, its old numbers are known.

The version is a field of the entry in the registry; whoever changes what an entry computes counts it up. It is stored
with every run and figure and is no part of the id.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

from prunelab.data.sources import SOURCES
from prunelab.models import MODELS, weightless
from prunelab.pruners import METHODS
from prunelab.pruners.lut import Lut
from prunelab.settings import Run

_REGISTRIES: Mapping[str, Mapping[str, Any]] = {
    "method": ChainMap(METHODS, {"lut": Lut}),
    "model": ChainMap(MODELS, weightless.MODELS),
    "data": SOURCES,
}


def registered() -> list[tuple[Any, ...]]:
    """What the user registered, for the processes that train: kind, name, thing and options."""
    own = {"method": METHODS, "model": MODELS, "data": SOURCES}
    return [(kind, name, *entry) for kind, registry in own.items() for name, entry in registry.registered.items()]


def register_again(own: Iterable[tuple[Any, ...]]) -> None:
    """Register in this process what ``registered`` gave in another one."""
    for kind, name, thing, options in own:
        {"method": METHODS, "model": MODELS, "data": SOURCES}[kind].register(name, thing, **options)


def version(kind: str, name: str) -> int:
    """The version of a ``method``, a ``model`` or a reader of ``data`` today; 1 of what no registry names."""
    return getattr(_REGISTRIES[kind].get(name), "version", 1)


def versions(run: Run) -> dict[str, int]:
    """Those of a run, for ``Store.claim`` and ``Store.unusable``."""
    names = {"method": run.prune.method, "model": run.model.name, "data": run.data.name}
    return {kind: version(kind, name) for kind, name in names.items()}


def made_otherwise(made: Iterable[Mapping[str, Any]]) -> str:
    """In words, what of a figure was made by another version than there is now; empty where nothing was.

    Args:
        made: ``versions`` of the provenance of a figure: rows of ``kind``, ``name`` and ``version``.
    """
    rows = [(row["kind"], row["name"], row["version"]) for row in made]
    odd = [
        f"{kind} {name} of version {old}, now {version(kind, name)}"
        for kind, name, old in rows
        if old != version(kind, name)
    ]
    return ", ".join(odd)
