"""DyPrune (EPIA 2023): artefacts and claims, reported numbers, and the protocol as settings."""

from __future__ import annotations

from prunelab.papers.dyprune.study import (
    ALSO_RISING,
    FIXED_ORDER,
    UNPRUNED,
    both_halves,
    dyprune,
    dyprune_strategies,
    headlines,
)

__all__ = [
    "ALSO_RISING",
    "FIXED_ORDER",
    "UNPRUNED",
    "both_halves",
    "dyprune",
    "dyprune_strategies",
    "headlines",
]
