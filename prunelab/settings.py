"""Every hyper-parameter of a run, validated at the door; from them a readable id that names the run for ever.

A ``Run`` is what was asked for: data, model, training, pruning, seed. Nothing about the machine is in it, so the same
run has the same id everywhere. The hash at the end of the id covers only the fields that differ from their defaults: a
new field whose default changes nothing leaves every existing id as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as validated

from prunelab.errors import PrunelabError, nearest

T = TypeVar("T", bound=type)
Fraction = Annotated[float, Field(ge=0, lt=1)]
MOST = 2**63 - 1  # what a column of the tables holds; a larger number in one run would break the lists of all
Literals = str | int | float | bool | None


class SettingsError(PrunelabError):
    """A setting that no run can have."""


def settings(cls: T) -> T:
    """Make ``cls`` a frozen dataclass whose values are checked when it is built, with one line when one is wrong."""
    cls = validated(frozen=True, kw_only=False, config=ConfigDict(extra="forbid", arbitrary_types_allowed=False))(cls)
    build = cls.__init__

    @functools.wraps(build)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        names = [field.name for field in dataclasses.fields(cls)]
        if wrong := sorted(set(values) - set(names)):
            raise SettingsError(f"{cls.__name__} has no setting {wrong[0]!r}: {nearest(wrong[0], names)}")
        try:
            build(self, *args, **values)
        except ValidationError as error:
            raise SettingsError(f"{cls.__name__}: {_one_line(error, names)}") from None

    cls.__init__ = checked
    return cls


def _one_line(error: ValidationError, names: list[str]) -> str:
    """The first complaint of pydantic as ``where = value: what``; a value that was given by position gets its name."""
    first = error.errors()[0]
    head, *rest = first["loc"] or ("",)
    parts = [names[head] if isinstance(head, int) and head < len(names) else head, *rest]
    where = ".".join(str(part) for part in parts if not str(part).startswith(("tuple", "function", "literal")))
    what = first["msg"].removeprefix("Value error, ")
    return (
        f"{where} = {first['input']!r}: {what[:1].lower()}{what[1:]}"
        if where and first["type"] != "value_error"
        else what
    )


@settings
class Data:
    """What is learnt, and how it is divided.

    The validation part is cut from the training part by a permutation that depends on ``split_seed`` alone, so all
    seeds of a study see the same split, as in the papers.
    """

    name: str = "mnist"
    validation: float | int = 0.1  # fraction (below 1) or number of the training samples held out
    stratify: bool = False  # keep the class proportions in the held-out part
    test: float | int | None = (
        None  # for data without a test part (iris, digits): fraction or number; None: data set's own default
    )
    split_seed: Annotated[int, Field(ge=-MOST, le=MOST)] = 42
    train_size: int | None = None  # use only so many training samples; None: all
    test_size: int | None = None  # at most so many validation and test samples; None: all
    scaling: Literal["unit", "standard", "minmax", "minmax_all", "centred", "raw"] = (
        "unit"  # minmax_all looks at the test part too, as DyPrune does; centred: images from -0.5 to 0.5
    )
    target: Literal["label", "input"] = "label"  # input: the sample itself, for an autoencoder

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        for field in ("validation", "test", "train_size", "test_size"):
            value = getattr(self, field)
            if value is not None and (not value >= 0 or (field.endswith("_size") and value < 1)):
                least = "1 or more" if field.endswith("_size") else "0 or more"
                raise ValueError(f"{field} = {value}: should be {least}")
            if isinstance(value, float) and value >= 1 and not value.is_integer():
                raise ValueError(f"{field} = {value}: should be a fraction below 1 or a whole number of samples")


@settings
class Model:
    """Which network, how large, how initialised."""

    name: str = "mlp"
    hidden: tuple[
        Annotated[int, Field(ge=1)], ...
    ] = ()  # units or filters of the hidden layers; (): the model's own default
    init: Literal[
        "pytorch", "kaiming_normal", "glorot_uniform", "normal_0.01", "normal_1", "truncated_0.01", "truncated_0.1"
    ] = "pytorch"

    @property
    def label(self) -> str:
        """``mlp_40_40``: the name with its sizes."""
        return "_".join([self.name, *map(str, self.hidden)])


@settings
class Train:
    """One training, from fresh or rewound weights to its last epoch."""

    epochs: Annotated[int, Field(ge=1, le=MOST)] = 25
    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 128
    optimiser: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of SGD
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        0.0  # decoupled with adamw, in the gradient with adam and sgd
    )
    lr_milestones: tuple[
        Annotated[int, Field(ge=1)], ...
    ] = ()  # epochs after which the learning rate is multiplied by lr_factor
    lr_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    patience: Annotated[int, Field(ge=1)] | None = (
        None  # epochs without a lower validation loss before it stops; None: never
    )
    restore_best: bool = False  # go back to the weights of the lowest validation loss at the end
    shuffle: bool = True
    augment: Literal["none", "crop_flip", "affine"] = "none"
    test_every_epoch: bool = (
        False  # measure the test part each epoch, not only at the end of a round; never used for decisions
    )
    precision: Literal["float32", "bfloat16", "auto"] = (
        "float32"  # of the convolutions while training (and the products of networks that are no plain chain); weights,
        # their updates and all that is measured are float32. auto: bfloat16 where it is faster, which the rows say
    )
    validate_every_epoch: bool = (
        True  # False: the validation part is measured only where a round ends, which saves a third of the time and more
        # on small training parts; a method that decides by it has it measured all the same
    )

    def __post_init__(self) -> None:
        """Refuse decisions by what is not measured."""
        needing = "patience" if self.patience is not None else "restore_best" if self.restore_best else ""
        if needing and not self.validate_every_epoch:
            raise ValueError(f"{needing} needs the validation loss of every epoch: leave validate_every_epoch at True")


@settings
class Prune:
    """Which method, how much, how often, and what happens to the weights afterwards.

    ``options`` are the fields of the method's own class in ``prunelab.pruners``; they are checked against it before
    anything trains.
    """

    method: str = "none"
    amount: Fraction = 0.2  # fraction of the remaining units that goes in one round
    rounds: Annotated[int, Field(ge=0, le=MOST)] = (
        0  # prune-recover cycles after the dense round 0; methods that prune while training ignore it
    )
    stop: Annotated[float, Field(gt=0, le=1)] | None = None  # no further round once this density of units was trained
    recover: Literal["finetune", "rewind", "reinit", "none"] = "finetune"
    masks_of: str = ""  # id of a run that this one follows, round by round
    layers: tuple[str, ...] = ()  # names of the layers that may be pruned; (): every Linear and Conv2d of the model
    options: dict[str, Literals] = dataclasses.field(default_factory=dict)
    follow: Literal["masks", "counts"] = (
        "masks"  # what it takes of the run in masks_of: its masks, or only how much each layer keeps
    )
    also_after: tuple[
        Annotated[int, Field(ge=1)], ...
    ] = ()  # epochs, from the start of the run, after which it is pruned besides, as when somebody asked for it

    def __post_init__(self) -> None:
        """Refuse numbers that no JSON holds."""
        for name, value in self.options.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"options.{name} = {value}: should be a finite number")

    def __hash__(self) -> int:
        return hash(json.dumps(dataclasses.asdict(self), sort_keys=True))


@settings
class Run:
    """One independent run: everything that decides its numbers, the machine apart.

    What trains beside it is nothing of that: on a CPU it has the same bits in every company. Of the machine the number
    of threads decides too, where the network has convolutions or more than 600,000 parameters.
    """

    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    prune: Prune = Prune()
    retrain: Train | None = None  # training of the rounds after the first; None: as ``train``
    seed: Annotated[int, Field(ge=0, le=MOST)] = 0  # seeds the weights, the batch order and every random choice

    @property
    def id(self) -> str:
        """``dropnet-mlp_40_40-mnist-s3-1f9c2a7b``: method, model, data, seed, and a hash of all that is not default."""
        digest = hashlib.sha256(json.dumps(differences(self), sort_keys=True).encode()).hexdigest()[:8]
        return "-".join(
            [_plain(self.prune.method), _plain(self.model.label), _plain(self.data.name), f"s{self.seed}", digest]
        )

    def _repr_html_(self) -> str:
        """Its id, and all that is not default; as plain text a run is the call that makes it."""
        cells = (
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in _flat(differences(self))
        )
        return f"<table><caption>{html.escape(self.id)}</caption><tbody>{''.join(cells)}</tbody></table>"

    def asdict(self) -> dict[str, Any]:
        """Plain nested values, all of them, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def fromdict(cls, values: Mapping[str, Any]) -> Run:
        """The inverse of ``asdict``; a missing field takes its default, an unknown one is refused.

        Raises:
            SettingsError: one line that names the field.
        """
        parts = {"data": Data, "model": Model, "train": Train, "retrain": Train, "prune": Prune}
        return cls(
            **{name: parts[name](**v) if name in parts and isinstance(v, Mapping) else v for name, v in values.items()}
        )

    def flat(self) -> dict[str, Any]:
        """Columns of a table: data, model, method, seed; ``part.field`` for the rest; options as ``prune.name``."""
        columns: dict[str, Any] = {
            "data": self.data.name,
            "model": self.model.label,
            "method": self.prune.method,
            "seed": self.seed,
        }
        for part, values in self.asdict().items():
            if part in ("seed",) or values is None:
                continue
            options = values.pop("options", {})
            for name, value in {**values, **options}.items():
                columns[f"{part}.{name}"] = json.dumps(value) if isinstance(value, list | dict) else value
        return columns


def differences(value: Any) -> dict[str, Any]:
    """The fields of a settings object that differ from their defaults, nested, as plain values."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        own = getattr(value, field.name)
        if own == default:
            continue
        found[field.name] = differences(own) if dataclasses.is_dataclass(own) else own
    return found


def _flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """``train.epochs`` and its value, in words."""
    found = []
    for name, value in values.items():
        own = isinstance(value, Mapping)
        found += _flat(value, f"{above}{name}.") if own else [(f"{above}{name}", str(value))]
    return found


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", text.lower())
