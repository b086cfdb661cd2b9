"""The papers' protocols as settings: data and its division, training, and the names of what is compared."""

from __future__ import annotations

from prunelab.protocols.comparison import comparable, compare, controls_of
from prunelab.protocols.dropnet import dropnet
from prunelab.protocols.dyprune import ALSO_RISING, UNPRUNED, dyprune, dyprune_strategies
from prunelab.protocols.nnrelief import nnrelief
from prunelab.protocols.related import head_to_head, schedules

__all__ = [
    "ALSO_RISING",
    "UNPRUNED",
    "comparable",
    "compare",
    "controls_of",
    "dropnet",
    "dyprune",
    "dyprune_strategies",
    "head_to_head",
    "nnrelief",
    "schedules",
]
