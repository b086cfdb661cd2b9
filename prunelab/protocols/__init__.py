"""The papers' protocols as settings: data and its division, training, and the names of what is compared."""

from __future__ import annotations

from prunelab.protocols.dropnet import dropnet
from prunelab.protocols.dyprune import ALSO_RISING, UNPRUNED, dyprune, dyprune_strategies
from prunelab.protocols.nnrelief import nnrelief
from prunelab.protocols.related import EXPECTED, UNITS, WEIGHTS, in_one_training, schedules
from prunelab.protocols.weightless import weightless
from prunelab.protocols.while_learning import dropneuron, learn_and_drop, play_and_prune, while_training
from prunelab.protocols.without_retraining import coresets, retraining_free

__all__ = [
    "ALSO_RISING",
    "EXPECTED",
    "UNITS",
    "UNPRUNED",
    "WEIGHTS",
    "coresets",
    "dropnet",
    "dropneuron",
    "dyprune",
    "dyprune_strategies",
    "in_one_training",
    "learn_and_drop",
    "nnrelief",
    "play_and_prune",
    "retraining_free",
    "schedules",
    "weightless",
    "while_training",
]
