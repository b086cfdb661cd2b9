"""Pictures of results: each function takes a table, returns a ``Picture``, shows nothing and leaves no state behind.

Tables are those of the run store, one row per run and round (``rounds``) or per epoch (``epochs``), or what other
modules make of them. Several seeds give means with 95 % t intervals. Series differ in marker and line style as well as
in colour. By name every function also takes what ``pictures.Shown`` lists: title, provenance, look, size.
"""

from __future__ import annotations

from prunelab import lazy

__all__ = [
    "Picture",
    "accuracy_against_compression",
    "beside_methods",
    "beside_reported",
    "curve",
    "filters",
    "firing",
    "forms",
    "layers_over_rounds",
    "network",
    "ours_and_reported",
    "provenance",
    "rate_curve",
    "requested_against_achieved",
    "save",
    "saved",
    "schedule_curves",
    "sensitivity",
    "strategies",
    "tradeoffs",
    "training",
    "weights_left",
]

__getattr__, __dir__ = lazy.names(
    __name__,
    {
        "network": "prunelab.plots.drawing",
        **dict.fromkeys(("rate_curve", "training", "weights_left"), "prunelab.plots.epochs"),
        **dict.fromkeys(("provenance", "save", "saved"), "prunelab.plots.gallery"),
        **dict.fromkeys(
            ("filters", "firing", "layers_over_rounds", "schedule_curves", "sensitivity"), "prunelab.plots.layers"
        ),
        "ours_and_reported": "prunelab.plots.paired",
        "Picture": "prunelab.plots.pictures",
        **dict.fromkeys(("beside_methods", "beside_reported"), "prunelab.plots.reported"),
        **dict.fromkeys(
            ("accuracy_against_compression", "curve", "requested_against_achieved", "strategies"),
            "prunelab.plots.rounds",
        ),
        **dict.fromkeys(("forms", "tradeoffs"), "prunelab.plots.tradeoff"),
    },
)
