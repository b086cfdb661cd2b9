"""Neural Network Relief (2021/2024): artefacts and claims, reported numbers, and the protocol as settings."""

from __future__ import annotations

from prunelab.papers.nnrelief.study import nnrelief

__all__ = ["nnrelief"]
