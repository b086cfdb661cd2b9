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
    "PruningExplorer",
    "Ranking",
    "Run",
    "Store",
    "Train",
    "TrainingTheatre",
    "channel_groups",
    "fit",
    "prune",
    "prune_",
    "recalibrate",
    "register",
    "report",
    "run_all",
    "sensitivity",
    "shrink",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "prune": "prunelab.pruners.apply",
        "prune_": "prunelab.pruners.apply",
        "register": "prunelab.pruners.registry",
        "Pruner": "prunelab.pruners.base",
        "Ranking": "prunelab.pruners.base",
        "sensitivity": "prunelab.pruners.sensitivity",
        "shrink": "prunelab.structure",
        "channel_groups": "prunelab.structure",
        "fit": "prunelab.structure",
        "recalibrate": "prunelab.structure",
        "report": "prunelab.structure.report",
        "Masks": "prunelab.masks",
        "Run": "prunelab.settings",
        "Data": "prunelab.settings",
        "Model": "prunelab.settings",
        "Train": "prunelab.settings",
        "Prune": "prunelab.settings",
        "run_all": "prunelab.training.experiment",
        "Store": "prunelab.runs",
        "PruningExplorer": "prunelab.lab.live",
        "TrainingTheatre": "prunelab.lab.theatre",
        "PrunelabError": "prunelab.errors",
    },
)
