"""The run store: settings, rows, weights, masks and removals of every run, and their export and import. No torch.

``store`` finds and reads runs, ``locks`` gives a run to one process at a time, ``records`` and ``frames`` know the file
formats and the tables, ``archive`` carries runs between machines; ``provenance`` says what numbers were made with,
``progress`` how far a study is, ``columns`` what each column of the tables means.
"""

from __future__ import annotations

from prunelab import lazy

__all__ = ["Busy", "Checkpoint", "Status", "Store", "StoreError", "Writer"]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        **dict.fromkeys(("Busy", "Writer"), "prunelab.runs.locks"),
        **dict.fromkeys(("Checkpoint", "StoreError"), "prunelab.runs.records"),
        **dict.fromkeys(("Status", "Store"), "prunelab.runs.store"),
    },
)
