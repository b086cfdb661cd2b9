"""Ten related methods: artefacts and claims, reported numbers, and the protocol as settings."""

from __future__ import annotations

from prunelab.papers.related.head_to_head import EXPECTED, UNITS, WEIGHTS, in_one_training, schedules
from prunelab.papers.related.lut_networks import weightless
from prunelab.papers.related.while_learning import dropneuron, learn_and_drop, play_and_prune, while_training
from prunelab.papers.related.without_retraining import coresets, retraining_free

__all__ = [
    "EXPECTED",
    "UNITS",
    "WEIGHTS",
    "coresets",
    "dropneuron",
    "in_one_training",
    "learn_and_drop",
    "play_and_prune",
    "retraining_free",
    "schedules",
    "weightless",
    "while_training",
]
