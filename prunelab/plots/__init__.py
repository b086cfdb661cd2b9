"""Pictures of results: each function takes a table, returns a ``Picture``, shows nothing and leaves no state behind.

Tables are those of the run store, one row per run and round (``rounds``) or per epoch (``epochs``), or what other
modules make of them. Several seeds give means with 95 % t intervals. Series differ in marker and line style as well as
in colour. By name every function also takes what ``pictures.Shown`` lists: title, provenance, look, size.
"""

from prunelab.gallery import provenance, save, saved
from prunelab.plots.drawing import network
from prunelab.plots.epochs import rate_curve, training, weights_left
from prunelab.plots.layers import filters, firing, layers_over_rounds, schedule_curves, sensitivity
from prunelab.plots.paired import ours_and_reported
from prunelab.plots.pictures import Picture
from prunelab.plots.reported import beside_methods, beside_reported
from prunelab.plots.rounds import accuracy_against_compression, curve, requested_against_achieved, strategies
from prunelab.plots.tradeoff import forms, tradeoffs

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
