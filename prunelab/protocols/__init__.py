"""The papers' protocols as settings: data and its division, training, and the names of what is compared."""

from __future__ import annotations

from prunelab.protocols.dropnet import dropnet
from prunelab.protocols.dyprune import ALSO_RISING, UNPRUNED, dyprune, dyprune_strategies
from prunelab.protocols.nnrelief import nnrelief
from prunelab.protocols.related import head_to_head, schedules
from prunelab.protocols.weightless import findings, largest_share, weightless
from prunelab.protocols.while_learning import dropneuron, while_training

__all__ = [
    "ALSO_RISING",
    "UNPRUNED",
    "dropnet",
    "dropneuron",
    "dyprune",
    "dyprune_strategies",
    "findings",
    "head_to_head",
    "largest_share",
    "nnrelief",
    "schedules",
    "weightless",
    "while_training",
]
