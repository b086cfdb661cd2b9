"""The theatre: a run that is watched while a process of its own trains it.

``panel`` is what a notebook shows, ``stage`` the process behind it; ``view`` draws and loads no torch, so the theatre
itself is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunelab.theatre.panel import TrainingTheatre

__all__ = ["TrainingTheatre"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from prunelab.theatre import panel

        return getattr(panel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
