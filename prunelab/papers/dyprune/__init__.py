"""DyPrune (EPIA 2023): artefacts and claims, reported numbers, and the protocol as settings."""

from __future__ import annotations

from prunelab.papers.dyprune.study import ALSO_RISING, UNPRUNED, dyprune, dyprune_strategies

__all__ = ["ALSO_RISING", "UNPRUNED", "dyprune", "dyprune_strategies"]
