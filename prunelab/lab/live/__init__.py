"""The explorer: sliders on a model that is in memory, and the views that follow them.

``view`` draws and loads no torch; so the explorer itself is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunelab import lazy

if TYPE_CHECKING:
    from prunelab.lab.live.explorer import PruningExplorer

__all__ = ["PruningExplorer"]

__getattr__, __dir__ = lazy.names(__name__, {"PruningExplorer": "prunelab.lab.live.explorer"})
