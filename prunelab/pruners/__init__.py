"""Pruning methods: what a method is (``base``), the methods by name (``registry``), and ``prune`` (``apply``).

A method is a score, a granularity, a scope, a schedule and a way to recover; a file of its own is there only for what
is new in it. ``select`` removes the lowest scores exactly, ``schedules`` says when and how much, ``sensitivity`` prunes
one layer at a time. Importing a module of this package loads no other one.
"""

from __future__ import annotations

from prunelab import lazy

__all__ = [
    "METHODS",
    "Context",
    "Method",
    "Pruner",
    "Ranking",
    "Step",
    "build",
    "erk",
    "first_masks",
    "prune",
    "prune_",
    "put_weights",
    "register",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        **dict.fromkeys(("Context", "Pruner", "Ranking", "Step"), "prunelab.pruners.base"),
        "erk": "prunelab.pruners.amounts",
        **dict.fromkeys(("METHODS", "Method", "build", "register"), "prunelab.pruners.registry"),
        **dict.fromkeys(("first_masks", "prune", "prune_", "put_weights"), "prunelab.pruners.apply"),
    },
)
