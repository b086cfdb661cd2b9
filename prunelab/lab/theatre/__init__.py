"""The theatre: a run that is watched while a process of its own trains it.

``panel`` is what a notebook shows, ``stage`` the process behind it; ``view`` draws and loads no torch, so the theatre
itself is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunelab import lazy

if TYPE_CHECKING:
    from prunelab.lab.theatre.panel import TrainingTheatre

__all__ = ["TrainingTheatre"]

__getattr__, __dir__ = lazy.names(__name__, {"TrainingTheatre": "prunelab.lab.theatre.panel"})
