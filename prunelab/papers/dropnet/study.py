"""DropNet: for every figure of the paper and its supplement, what is trained and how many units each round has."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prunelab.errors import PrunelabError, nearest
from prunelab.papers import reported as curves
from prunelab.settings import Data, Model, Prune, Run, Train

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.stats import Interval

METRICS = ("min", "max", "random", "min_layer", "max_layer", "random_layer")
_WORDS = {"min": "minimum", "max": "maximum", "random": "random", "apoz": "apoz"}
_NEW_DRAW = 20  # the paper's code draws the other initialisation with seed + 20
_CHANNELS = {"dropnet_c": ("conv_1", "conv_2", "conv_3", "conv_4")}  # its fully connected layer is not masked
_VGG = tuple(f"conv_{stage}_{i}" for stage, depth in enumerate((2, 2, 4, 4, 4), 1) for i in range(1, depth + 1))


@dataclass(frozen=True)
class Figure:
    """What one figure of the paper shows.

    Attributes:
        kind: metrics against each other; with the greedy oracle (one unit a round); from the original against a new
            initialisation; fractions per round; APoZ against E(a).
        data: name of the data set.
        model: name in the registry.
        hidden: its sizes; (): its default.
        units: of each masked layer.
        amount: the fraction p.
        stop: the last point is the first one at or below this fraction.
        measure: what is on the vertical axis.
        reported: the figure under which ``references`` has the curves; "": none.
        metrics: the curves.
        order: the curves from best to worst, as the text has them.
        poor: curves, each with the fraction from which on down the text calls it poor, and one that is not.
        spare: the fraction of units left down to which, in the text, the best curve loses no accuracy.
        alike: pairs of curves that the text calls equal, and the fraction down to which.
    """

    kind: Literal["metrics", "oracle", "initialisation", "fractions", "apoz"]
    data: str
    model: str
    hidden: tuple[int, ...]
    units: tuple[int, ...]
    amount: float = 0.2
    stop: float = 0.1
    measure: str = "test_accuracy"
    reported: str = ""
    metrics: tuple[str, ...] = METRICS
    order: tuple[str, ...] = ()
    poor: tuple[tuple[str, float, str], ...] = ()
    spare: float | None = None
    alike: tuple[tuple[str, str, float], ...] = ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Curves of which the text calls the first the better one, or no worse."""
        if self.kind == "apoz":
            return [("min", "apoz"), ("min_layer", "apoz_layer")]
        return list(itertools.pairwise(self.order))


def _chain(kind: str, data: str, model: str, hidden: tuple[int, ...], reported: str = "", **more: object) -> Figure:
    return Figure(kind, data, model, hidden, hidden, reported=reported, **more)  # type: ignore[arg-type]


_RESNET = {"model": "dropnet_resnet18", "hidden": (), "units": tuple(n for n in (64, 128, 256, 512) for _ in range(5))}
_VGG19 = {"model": "dropnet_vgg19", "hidden": (), "units": (64, 64, 128, 128, *[256] * 4, *[512] * 8)}
_SMALL_C, _C128, _C_FALLING = (64, 64, 128, 128), (128, 128, 128, 128), (128, 128, 64, 64)
_TRAIN = {"measure": "train_accuracy"}
_NEW_DRAWN = {"metrics": ("min",), "alike": (("min", "randominit", 0.3),)}
_FRACTIONS = {"metrics": ("min",), "alike": (("0.2", "0.5", 0.3),), "order": ("0.2", "0.5")}
_ORDER_C = ("min_layer", "min", "random_layer", "random", "max_layer", "max")
_TINY = {"kind": "metrics", "data": "tiny_imagenet", "amount": 0.5}
_APOZ = {"kind": "apoz", "data": "cifar10", "amount": 0.1, "metrics": ("min", "min_layer", "apoz", "apoz_layer")}

FIGURES: dict[str, Figure] = {
    "figure_03": _chain(
        "metrics",
        "mnist",
        "dropnet_a",
        (40, 40),
        "Fig 3",
        stop=0.05,
        order=("min_layer", "min", "random_layer", "max_layer", "random", "max"),
        poor=(("max", 0.5, "random"),),
        spare=0.4,
    ),
    "figure_04": _chain(
        "metrics", "mnist", "dropnet_a", (20, 40), "Fig 4", stop=0.05, order=("min", "random", "max"), spare=0.4
    ),
    "figure_05": _chain(
        "metrics",
        "mnist",
        "dropnet_a",
        (40, 20),
        stop=0.05,
        order=("min", "random_layer", "random", "max_layer", "max"),
        poor=(("max", 0.6, "random"),),
        spare=0.4,
    ),
    "figure_06": _chain(
        "metrics",
        "mnist",
        "dropnet_b",
        (64, 64),
        "Fig 6",
        stop=0.0157,
        order=("min_layer", "random_layer", "min", "random", "max_layer", "max"),
        poor=(("max", 0.3, "random"),),
        spare=0.1,
    ),
    "figure_07": _chain(
        "metrics",
        "mnist",
        "dropnet_b",
        (32, 64),
        "Fig 7",
        stop=0.0417,
        order=("min", "min_layer", "random_layer", "random", "max_layer", "max"),
        poor=(("max", 0.5, "random"),),
        spare=0.1,
    ),
    "figure_08": _chain(
        "metrics",
        "mnist",
        "dropnet_b",
        (64, 32),
        stop=0.0417,
        order=("min", "min_layer", "random", "random_layer", "max_layer", "max"),
        poor=(("max", 0.2, "random"),),
        spare=0.1,
    ),
    "figure_09": _chain(
        "metrics",
        "cifar10",
        "dropnet_c",
        _SMALL_C,
        "Fig 9",
        order=_ORDER_C,
        alike=(("min", "min_layer", 0.5),),
        spare=0.5,
    ),
    "figure_10": _chain(
        "metrics",
        "cifar10",
        "dropnet_c",
        (128, 128, 256, 256),
        "Fig 10",
        order=_ORDER_C,
        alike=(("min", "min_layer", 0.5),),
        spare=0.5,
    ),
    "figure_11": Figure(
        "metrics",
        "cifar10",
        **_RESNET,
        reported="Fig 11",
        order=("min_layer", "min", "random_layer", "random", "max_layer", "max"),
    ),
    "figure_12": Figure(
        "metrics",
        "cifar10",
        **_VGG19,
        reported="Fig 12",
        order=("min_layer", "random_layer", "random", "max_layer", "min", "max"),
        poor=(("max", 0.5, "random"), ("max_layer", 0.2, "min_layer")),  # at 0.2 random is at chance as well
        spare=0.2,
    ),
    "figure_13": _chain("oracle", "mnist", "dropnet_a", (20, 20), "Fig 13", order=("oracle", "min", "random", "max")),
    "figure_14": _chain(
        "oracle",
        "mnist",
        "dropnet_b",
        (20, 20),
        "Fig 14",
        alike=(("oracle", "min", 0.1), ("min", "random", 0.1)),
        poor=(("max", 0.4, "random"),),
    ),
    "figure_15": _chain("initialisation", "mnist", "dropnet_a", (20, 20), "Fig 15", **_NEW_DRAWN),
    "figure_16": _chain("initialisation", "mnist", "dropnet_b", (64, 64), "Fig 16", **_NEW_DRAWN),
    "figure_17": _chain("initialisation", "cifar10", "dropnet_c", _SMALL_C, "Fig 17", **_NEW_DRAWN),
    "figure_18": _chain("fractions", "mnist", "dropnet_a", (20, 20), "Fig 18", **_FRACTIONS),
    "figure_19": _chain("fractions", "mnist", "dropnet_b", (64, 64), "Fig 19", stop=0.0079, **_FRACTIONS),
    "figure_20": _chain("fractions", "cifar10", "dropnet_c", _SMALL_C, "Fig 20", **_FRACTIONS),
    "supplement_figure_02": _chain("metrics", "cifar10", "dropnet_c", _SMALL_C, "Supp Fig 2", **_TRAIN),
    "supplement_figure_03": _chain("metrics", "cifar10", "dropnet_c", _C128, "Supp Fig 3", **_TRAIN),
    "supplement_figure_04": _chain("metrics", "cifar10", "dropnet_c", _C_FALLING, "Supp Fig 4", **_TRAIN),
    "supplement_figure_06": _chain("metrics", "cifar10", "dropnet_c", _C128, "Supp Fig 6"),
    "supplement_figure_07": _chain("metrics", "cifar10", "dropnet_c", _C_FALLING, "Supp Fig 7"),
    "supplement_figure_08": Figure("metrics", "cifar10", **_RESNET, reported="Supp Fig 8", **_TRAIN),
    "supplement_figure_10": Figure("metrics", "cifar10", **_VGG19, reported="Supp Fig 10", **_TRAIN),
    "supplement_figure_12": Figure(
        "initialisation", "cifar10", **_RESNET, reported="Supp Fig 12", metrics=("min",), amount=0.2
    ),
    "supplement_figure_13": Figure(
        "initialisation", "cifar10", **_RESNET, reported="Supp Fig 13", metrics=("min_layer",)
    ),
    "supplement_figure_14": Figure("initialisation", "cifar10", **_VGG19, reported="Supp Fig 14", metrics=("min",)),
    "supplement_figure_15": Figure(
        "initialisation", "cifar10", **_VGG19, reported="Supp Fig 15", metrics=("min_layer",)
    ),
    "supplement_figure_16": Figure(**_TINY, **_RESNET, reported="Supp Fig 16", **_TRAIN),
    "supplement_figure_17": Figure(**_TINY, **_RESNET, reported="Supp Fig 17"),
    "supplement_figure_18": Figure(**_TINY, **_VGG19, reported="Supp Fig 18", **_TRAIN),
    "supplement_figure_19": Figure(**_TINY, **_VGG19, reported="Supp Fig 19"),
    "supplement_figure_20": Figure(**_APOZ, **_RESNET, reported="Supp Fig 20", **_TRAIN),
    "supplement_figure_21": Figure(**_APOZ, **_RESNET, reported="Supp Fig 21"),
    "supplement_figure_22": Figure(**_APOZ, **_VGG19, reported="Supp Fig 22", **_TRAIN),
    "supplement_figure_23": Figure(**_APOZ, **_VGG19, reported="Supp Fig 23"),
}


@dataclass(frozen=True)
class Study:
    """The runs behind a figure.

    Attributes:
        figure: what it shows.
        runs: method, as the legend names it -> its runs, one per seed.
        counts: method -> units left in each round, those of round 0 first.
        as_published: whether data, training and network are the paper's; only then are levels of accuracy compared.
        published_units: of each masked layer, in the paper.
    """

    figure: Figure
    runs: dict[str, list[Run]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    as_published: bool = True
    published_units: tuple[int, ...] = ()

    def __str__(self) -> str:
        """How much is to be trained, and where by-layer curves have to fall because a layer has nothing left."""
        runs, rounds = sum(map(len, self.runs.values())), max(map(len, self.counts.values()))
        words = f"{runs} runs, {rounds} rounds at most"
        here, there = self._emptied(self.figure.units), self._emptied(self.published_units)
        if here is None or here == there:
            return words
        place = "nowhere in this figure" if there is None else f"at {there:.2f}"
        return (
            f"{words}\nBy layer, the narrowest is empty once {here:.2f} of the units are left: from there on accuracy "
            f"is chance. At the paper's widths that comes {place}."
        )

    def _emptied(self, units: Sequence[int]) -> float | None:
        """The fraction of units left at which a layer has none, where every layer loses at least one a round."""
        shown = self.figure
        if not any(name.endswith("_layer") for name in _curves(shown)):
            return None
        left = _by_round(units, shown.amount, shown.stop, layer=True)
        return next((sum(each) / sum(units) for each in left if 0 in each), None)

    def fractions(self, rounds: pd.DataFrame) -> pd.DataFrame:
        """The rounds of these runs with two more columns: ``units_left`` (masked layers only), ``fraction`` of them."""
        import pandas as pd

        rows = [(name, r, n, n / own[0]) for name, own in self.counts.items() for r, n in enumerate(own)]
        table = pd.DataFrame(rows, columns=["strategy", "round", "units_left", "fraction"])
        # The new draw of a seed is compared with the original of that seed, so it goes by the same number.
        other = rounds["strategy"] == "randominit"
        rounds = rounds.assign(seed=rounds["seed"].where(~other, rounds["seed"] - _NEW_DRAW))
        return rounds.merge(table, on=["strategy", "round"], how="left")

    def numbers(self, rounds: pd.DataFrame, points: pd.DataFrame) -> dict[str, Any]:
        """Our number for every claim that is made of this figure.

        Args:
            rounds: of ``fractions``.
            points: of ``reported_curves.beside``.

        Returns:
            ``agreeing``: of ``reported_curves.agreeing``, unless the runs are not as published: a part of the data
            gives other levels, which contradicts nothing. And of the curves: ``a_over_b``, the paired lead of one over
            the next in the text's order; ``a_over_x_when_poor``; ``kept``, pruned - dense at the spare fraction, of the
            better one of min and min_layer in the text; ``a_beside_b``; where the text says something of the kind.
        """
        agreeing = {"agreeing": curves.agreeing(points)} if self.figure.reported and self.as_published else {}
        return agreeing | self._of_curves(rounds, self.figure.units)

    def reported_numbers(self) -> dict[str, float]:
        """The same numbers of the reported curves; of those that could not be read, none."""
        shown = self.figure
        theirs = curves.reported("dropnet", shown.reported).rename(columns={"value": shown.measure}).assign(seed=0)
        return {name: each.mean for name, each in self._of_curves(theirs, self.published_units).items()}

    def _of_curves(self, rounds: pd.DataFrame, units: Sequence[int]) -> dict[str, Interval]:
        """What is said of curves, as numbers, from our rounds or from the reported points.

        Where each layer loses at least one unit a round, a layer runs empty by the rule, whatever the metric: those
        points say nothing about it, and are left out.
        """
        shown, y, found = self.figure, self.figure.measure, {}
        if (empty := self._emptied(units)) is not None:
            rounds = rounds[
                ~rounds["strategy"].str.endswith("_layer") | (rounds["fraction"] > empty + curves.SAME_POINT)
            ]
        there = set(rounds["strategy"])
        for first, second in shown.pairs:
            if {first, second} <= there:
                found[f"{_plain(first)}_over_{_plain(second)}"] = curves.lead(rounds, first, second, y)
        for name, fraction, other in shown.poor:
            if {other, name} <= there:
                found[f"{other}_over_{name}_when_poor"] = curves.lead(rounds, other, name, y, high=fraction)
        for first, second, fraction in shown.alike:
            if {first, second} <= there:
                found[f"{_plain(first)}_beside_{_plain(second)}"] = curves.lead(rounds, first, second, y, low=fraction)
        best = next((name for name in shown.order if name in ("min", "min_layer")), "min")
        if shown.spare is not None and best in there:
            lost = curves.loss_at(rounds, best, shown.spare, y)
            found["kept"] = dataclasses.replace(lost, mean=-lost.mean)
        return found


def left_after_rounds(
    units: Sequence[int], amount: float, stop: float, *, layer: bool = False, one: bool = False
) -> list[int]:
    """Units that each round has, until the first count at or below ``stop`` of all.

    Args:
        units: of each masked layer.
        amount: the fraction p: ``int(p * remaining)`` go, at least one.
        stop: a fraction.
        layer: p holds in every layer, each loses at least one, down to none.
        one: exactly one goes in each round; with ``layer`` one of each layer.

    Source: section 3.2 of the paper and its code: 80, 64, 52, 42, 34, 28, ... for two layers of 40 at p = 0.2.
    """
    return [sum(left) for left in _by_round(units, amount, stop, layer=layer, one=one)]


def _by_round(
    units: Sequence[int], amount: float, stop: float, *, layer: bool = False, one: bool = False
) -> Iterator[list[int]]:
    """Units that each round has, of each layer, or of all together."""
    left = list(units) if layer else [sum(units)]
    yield left
    while sum(left) > stop * sum(units):
        left = [n - min(n, 1 if one else max(1, int(amount * n))) for n in left]
        yield left


def dropnet(
    figure: str,
    seeds: int = 15,
    *,
    epochs: int = 100,
    patience: int | None = None,
    train_size: int | None = None,
    methods: Iterable[str] = (),
    data: str = "",
    hidden: Sequence[int] = (),
    rounds: int | None = None,
    variant: str = "faithful",
    precision: str = "float32",
) -> Study:
    """The runs behind a figure of DropNet, in the paper's protocol unless an argument says otherwise.

    A tenth of the training data is held out (stratified, split seed 42). SGD at 0.1 without momentum, batches of 32 in
    the data's own order, at most 100 epochs, stop after 5 without a lower validation loss (Tiny ImageNet: 10, with
    augmentation), the last weights stay; Glorot uniform; rewind to theta_0 after every pruning.

    Args:
        figure: a name of ``FIGURES``.
        seeds: independent runs of each curve; the paper has 15.
        epochs: the most of one training.
        patience: epochs without a lower validation loss that end a training; None: the paper's, 5, Tiny ImageNet 10.
            On a part of the data epochs have fewer steps, and so few of them may end before learning has begun. 0:
            nothing but the budget ends a training, and the validation part is measured only then.
        train_size: training samples; None or 0: all. Validation and test parts are cut to as many.
        methods: only these curves; (): all of the figure.
        data: another data set than the figure's, for a quick look.
        hidden: other sizes of the model than the figure's, for a quick look; its masked layers have as many units.
        rounds: no more than so many prunings; None or 0: until the figure ends.
        variant: ``faithful``: the published code's selection, with which the reported numbers were made.
        precision: of the convolutions while training; the paper's is ``float32``.
    """
    if figure not in FIGURES:
        raise PrunelabError(f"DropNet has no figure {figure!r}: {nearest(figure, FIGURES)}")
    shown = FIGURES[figure]
    if hidden:
        shown = dataclasses.replace(shown, units=_masked_units(shown, tuple(hidden)))
    if data:
        shown = dataclasses.replace(shown, data=data)
    tiny = shown.data == "tiny_imagenet"
    settings = Data(shown.data, stratify=True, train_size=train_size or None, test_size=train_size or None)
    published = 10 if tiny else 5  # patience
    train = Train(
        epochs=epochs,
        batch_size=32,
        optimiser="sgd",
        lr=0.1,
        patience=(published if patience is None else patience) or None,
        shuffle=False,
        augment="affine" if tiny else "none",
        precision=precision,
        validate_every_epoch=patience != 0,
    )
    layers = _VGG if shown.model == "dropnet_vgg19" else _CHANNELS.get(shown.model, ())
    model = Model(shown.model, tuple(hidden) or shown.hidden, "glorot_uniform")
    part = train_size or hidden or data or (train.epochs, train.patience) != (100, published)
    study = Study(shown, as_published=not part, published_units=FIGURES[figure].units)
    for name, (metric, scope, amount, one, new_draw) in _curves(shown).items():
        by_layer = scope == "layer"
        counts = left_after_rounds(shown.units, amount, shown.stop, layer=by_layer, one=one)
        counts = counts[: rounds + 1] if rounds else counts
        options = {"scope": scope, "variant": variant, "allow_empty": True}
        if metric == "oracle":
            prune = Prune("dropnet_oracle", 0.0, len(counts) - 1, None, "rewind", "", layers, options)
        else:
            options |= {"metric": _WORDS[metric], **({"one": True} if one else {})}
            prune = Prune("dropnet", 0.0 if one else amount, len(counts) - 1, None, "rewind", "", layers, options)
        own = [Run(settings, model, train, prune, seed=seed) for seed in range(seeds)]
        if new_draw:
            own = [
                dataclasses.replace(run, prune=dataclasses.replace(prune, masks_of=run.id), seed=run.seed + _NEW_DRAW)
                for run in own
            ]
        study.runs[name], study.counts[name] = own, counts
    if unknown := [name for name in methods if name not in study.runs]:
        raise PrunelabError(f"{figure} has no curve {unknown[0]!r}: {nearest(unknown[0], study.runs)}")
    if chosen := list(methods):
        keep = {name: study.runs[name] for name in study.runs if name in chosen}
        counts = {name: study.counts[name] for name in keep}
        return dataclasses.replace(study, runs=keep, counts=counts)
    return study


def _curves(figure: Figure) -> dict[str, tuple[str, str, float, bool, bool]]:
    """Legend -> metric, scope, fraction, one unit a round, from a new draw of the weights."""
    if figure.kind == "fractions":
        return {f"{p}": ("min", "global", p, False, False) for p in (0.2, 0.3, 0.4, 0.5, 0.9)}
    if figure.kind == "initialisation":
        (name,) = figure.metrics
        return {name: _split(name, figure, False), "randominit": _split(name, figure, True)}
    if figure.kind == "oracle":  # its "random" takes one unit of each layer, section 3.4
        each = {"oracle": "global", "min": "global", "max": "global", "random": "layer"}
        return {name: (name, scope, figure.amount, True, False) for name, scope in each.items()}
    return {name: _split(name, figure, False) for name in figure.metrics}


def _split(name: str, figure: Figure, new_draw: bool) -> tuple[str, str, float, bool, bool]:
    metric, _, layer = name.partition("_")
    return metric, "layer" if layer else "global", figure.amount, False, new_draw


def _masked_units(figure: Figure, hidden: tuple[int, ...]) -> tuple[int, ...]:
    if figure.model == "dropnet_resnet18":
        return tuple(itertools.chain.from_iterable([n] * 5 for n in hidden))
    if figure.model == "dropnet_vgg19":
        depths = (2, 2, 4, 4, 4)
        return tuple(n for n, depth in zip(hidden, depths, strict=False) for _ in range(depth))
    return hidden


def _plain(name: str) -> str:
    """The name of a curve as a part of a quantity's: ``0.2`` is ``p20``."""
    return f"p{round(100 * float(name))}" if name[0].isdigit() else name
