"""What a model computes, seen by running it once: what goes together, what is dead, and the model without it."""

from prunelab.structure.fit import fit, recalibrate
from prunelab.structure.groups import Groups, Slice, Space, channel_groups
from prunelab.structure.shrink import NotRemoved, ShrinkError, Shrunk, carry, remove_dead, shrink
from prunelab.structure.watch import StructureError, watch

__all__ = [
    "Groups", "NotRemoved", "ShrinkError", "Shrunk", "Slice", "Space", "StructureError", "carry", "channel_groups",
    "fit", "recalibrate", "remove_dead", "shrink", "watch",
]  # fmt: skip
