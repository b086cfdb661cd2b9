"""The lab bench for neural-network pruning.

``import prunelab`` loads no torch; the names of the compute side are fetched when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "prune": "prunelab.pruners",
    "Masks": "prunelab.masks",
    "Run": "prunelab.settings",
    "Data": "prunelab.settings",
    "Model": "prunelab.settings",
    "Train": "prunelab.settings",
    "Prune": "prunelab.settings",
    "run_all": "prunelab.experiment",
    "TrainingTheatre": "prunelab.theatre",
    "PrunelabError": "prunelab.errors",
}

__all__ = ["Data", "Masks", "Model", "Prune", "PrunelabError", "Run", "Train", "TrainingTheatre", "prune", "run_all"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'prunelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
