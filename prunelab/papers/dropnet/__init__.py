"""DropNet (ICML 2020): artefacts and claims, reported numbers, and the protocol as settings."""

from __future__ import annotations

from prunelab.papers.dropnet.study import dropnet

__all__ = ["dropnet"]
