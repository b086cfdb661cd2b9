"""The lab bench for neural-network pruning.

``import prunelab`` loads no torch; the names of the compute side are fetched when they are first used.
"""

from __future__ import annotations

from prunelab import lazy

__version__ = "0.1.0"

__all__ = [
    "Data",
    "Masks",
    "Model",
    "Prune",
    "PrunelabError",
    "Pruner",
    "Run",
    "Train",
    "TrainingTheatre",
    "prune",
    "register",
    "run_all",
    "shrink",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "prune": "prunelab.pruners.apply",
        "register": "prunelab.pruners.registry",
        "Pruner": "prunelab.pruners.base",
        "shrink": "prunelab.structure",
        "Masks": "prunelab.masks",
        "Run": "prunelab.settings",
        "Data": "prunelab.settings",
        "Model": "prunelab.settings",
        "Train": "prunelab.settings",
        "Prune": "prunelab.settings",
        "run_all": "prunelab.training.experiment",
        "TrainingTheatre": "prunelab.lab.theatre",
        "PrunelabError": "prunelab.errors",
    },
)
