"""The pruning methods by name.

To add a method to the package: one file beside this one with a class that is a ``Pruner``, made with ``settings``, and
one line in ``METHODS``. A method of a notebook or of another package is registered, or named by its import path.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic.dataclasses import is_pydantic_dataclass

from prunelab.errors import PrunelabError, nearest
from prunelab.pruners.base import Pruner
from prunelab.pruners.coreset import Coreset
from prunelab.pruners.criterion import Criterion, NofM
from prunelab.pruners.dropnet import DropNet
from prunelab.pruners.dropneuron import DropNeuron
from prunelab.pruners.dyprune import DyPrune
from prunelab.pruners.glance import Glance
from prunelab.pruners.learn_and_drop import LearnAndDrop
from prunelab.pruners.magnitude import Magnitude
from prunelab.pruners.nnrelief import NNrelief
from prunelab.pruners.none import Dense
from prunelab.pruners.oracle import Oracle
from prunelab.pruners.play_and_prune import PlayAndPrune
from prunelab.pruners.random import Random
from prunelab.pruners.retraining_free import RetrainingFree
from prunelab.pruners.scheduled import Scheduled
from prunelab.pruners.while_training import WhileTraining
from prunelab.pruners.zero_keep import ZeroKeep
from prunelab.registry import Registry
from prunelab.settings import Prune, settings


class Method(NamedTuple):
    """What a name stands for.

    Attributes:
        pruner: a class.
        preset: the fields that the name itself sets, which no option may set again.
        default: fields that have another default than the class's.
        version: counted up when the numbers of the method change, so that stored runs of it are made again.
    """

    pruner: type[Pruner]
    preset: Mapping[str, Any] = MappingProxyType({})
    default: Mapping[str, Any] = MappingProxyType({})
    version: int = 1


def _adopted(pruner: Any, **preset: Any) -> Method:
    """A class of the user's own as an entry; its fields are checked as those of this package's methods are."""
    if not isinstance(pruner, type) or not issubclass(pruner, Pruner) or inspect.isabstract(pruner):
        what = repr(getattr(pruner, "__name__", pruner))
        raise PrunelabError(f"{what} is no class that derives from prunelab.Pruner and has its prune, or scores")
    checked = pruner if is_pydantic_dataclass(pruner) and "__dataclass_fields__" in vars(pruner) else settings(pruner)
    if wrong := sorted(set(preset) - {field.name for field in dataclasses.fields(checked)}):
        raise PrunelabError(f"{pruner.__name__} has no field {wrong[0]!r}")
    return Method(checked, MappingProxyType(preset), version=getattr(pruner, "version", 1))


METHODS: Registry[Method] = Registry(
    "pruning method",
    {
        # the three papers
        "dyprune": Method(DyPrune),
        "dropnet": Method(DropNet),
        "dropnet_oracle": Method(Oracle),
        "apoz": Method(DropNet, {"metric": "apoz"}),
        "nnrelief": Method(NNrelief),
        # related methods
        "dropneuron": Method(DropNeuron),
        "while_training": Method(WhileTraining),
        "play_and_prune": Method(PlayAndPrune),
        "learn_and_drop": Method(LearnAndDrop),
        "glance": Method(Glance),
        "zero_keep": Method(ZeroKeep),
        "coreset": Method(Coreset),
        "retraining_free": Method(RetrainingFree),
        "one_cycle": Method(Scheduled, {"schedule": "one_cycle"}),
        "gradual": Method(Scheduled, {"schedule": "agp"}),
        "scheduled": Method(Scheduled),
        # controls and plain methods
        "none": Method(Dense),
        "random": Method(Random),
        "magnitude": Method(Magnitude),
        "l1_weight": Method(Magnitude, {"granularity": "weight", "norm": 1}),
        "l1_neuron": Method(Magnitude, {"granularity": "neuron", "norm": 1}),
        "l1_filter": Method(Magnitude, {"granularity": "filter", "norm": 1}),
        "l2_neuron": Method(Magnitude, {"granularity": "neuron", "norm": 2}),
        "l2_filter": Method(Magnitude, {"granularity": "filter", "norm": 2}),
        "random_neuron": Method(Random, {"granularity": "neuron"}),
        "random_filter": Method(Random, {"granularity": "filter"}),
        # other scores of the field
        "movement": Method(Criterion, {"score": "movement"}),
        "magnitude_increase": Method(Criterion, {"score": "magnitude_increase"}),
        "moved_magnitude": Method(Criterion, {"score": "moved_magnitude"}),
        "snip": Method(Criterion, {"score": "snip", "granularity": "weight"}),
        "taylor": Method(Criterion, {"score": "taylor"}),
        "wanda": Method(Criterion, {"score": "wanda", "granularity": "weight"}),
        "slimming": Method(Criterion, {"score": "batchnorm"}, {"granularity": "filter"}),
        "lamp": Method(Criterion, {"score": "lamp"}),
        "fpgm": Method(Criterion, {"score": "fpgm"}, {"granularity": "filter"}),
        "signal": Method(Criterion, {"score": "signal"}, {"granularity": "channel"}),
        "obd": Method(Criterion, {"score": "obd"}),
        "fisher": Method(Criterion, {"score": "fisher"}),
        "grasp": Method(Criterion, {"score": "grasp"}),
        "synflow": Method(Criterion, {"score": "synflow"}),
        "n_of_m": Method(NofM),
    },
    _adopted,
)


def build(prune: Prune) -> Pruner:
    """The pruner that the settings name, with its options checked.

    Raises:
        PrunelabError: no such method, no such option, a value the option cannot have, or one that the name itself sets.
    """
    pruner, preset, default, _ = METHODS.find(prune.method)
    free = [field.name for field in dataclasses.fields(pruner) if field.name not in preset]  # type: ignore[arg-type]
    for option in prune.options:
        if option in preset:
            value = f"{option} = {preset[option]!r}"
            raise PrunelabError(f"method {prune.method!r} itself sets {value}: leave it out, or choose another method")
        if option not in free:
            raise PrunelabError(f"method {prune.method!r} has no option {option!r}: {nearest(option, free)}")
    return pruner(**preset, **{**default, **prune.options})


def register(name: str, pruner: type[Pruner], **preset: Any) -> None:
    """Make a method of your own known by a name: to ``prune``, to runs and studies, and to the explorer.

    >>> prunelab.register("largest_go", LargestGo)

    Args:
        name: the name.
        pruner: the class, a ``Pruner``.
        **preset: fields that the name itself sets.

    Raises:
        PrunelabError: the name is taken, or the class is no ``Pruner``.
    """
    METHODS.register(name, pruner, **preset)
