"""The explorer: sliders on a model that is in memory, and the views that follow them.

``view`` draws and loads no torch; so the explorer itself is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunelab.live.explorer import PruningExplorer

__all__ = ["PruningExplorer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from prunelab.live import explorer

        return getattr(explorer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
