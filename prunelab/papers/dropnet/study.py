"""DropNet: for every figure of the paper and its supplement, what is trained and how many units each round has."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prunelab.errors import PrunelabError, nearest
from prunelab.papers import reported as curves
from prunelab.papers.curves import Curves, plain
from prunelab.papers.library import AT_LEVEL, artefacts
from prunelab.settings import Data, Model, Prune, Run, Train

if TYPE_CHECKING:
    import pandas as pd

    from prunelab.stats import Interval

_WORDS = {"min": "minimum", "max": "maximum", "random": "random", "apoz": "apoz"}
_NEW_DRAW = 20  # the paper's code draws the other initialisation with seed + 20
_CHANNELS = {"dropnet_c": ("conv_1", "conv_2", "conv_3", "conv_4")}  # its fully connected layer is not masked
_VGG = tuple(f"conv_{stage}_{i}" for stage, depth in enumerate((2, 2, 4, 4, 4), 1) for i in range(1, depth + 1))

FIGURES: dict[str, Curves] = {own.id.partition("/")[2]: own.curves for own in artefacts("dropnet") if own.curves}


@dataclass(frozen=True)
class Study:
    """The runs behind a figure.

    Attributes:
        figure: what it shows.
        runs: method, as the legend names it -> its runs, one per seed.
        counts: method -> units left in each round, those of round 0 first.
        as_published: whether data, training and network are the paper's.
        published_units: of each masked layer, in the paper.
    """

    figure: Curves
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
            ``agreeing``: of ``reported_curves.agreeing``, where the runs are at the paper's level: other levels
            contradict nothing. And of the curves: ``a_over_b``, the paired lead of one over
            the next in the text's order; ``a_over_x_when_poor``; ``kept``, pruned - dense at the spare fraction, of the
            better one of min and min_layer in the text; ``a_beside_b``; where the text says something of the kind.
        """
        agreeing = {"agreeing": curves.agreeing(points)} if self.figure.reported and self.level(points) else {}
        return agreeing | self._of_curves(rounds, self.figure.units)

    def level(self, points: pd.DataFrame) -> bool:
        """Whether data, training and network are the paper's, or the dense networks within 1.5 points of its own.

        Args:
            points: of ``reported_curves.beside``.
        """
        if self.as_published or points.empty:
            return self.as_published
        dense = points[points["fraction"] == 1]
        return bool(abs(dense["ours"].mean() - dense["reported"].mean()) <= AT_LEVEL)

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
                found[f"{plain(first)}_over_{plain(second)}"] = curves.lead(rounds, first, second, y)
        for name, fraction, other in shown.poor:
            if {other, name} <= there:
                found[f"{other}_over_{name}_when_poor"] = curves.lead(rounds, other, name, y, high=fraction)
        for first, second, fraction, _ in shown.alike:
            if {first, second} <= there:
                found[f"{plain(first)}_beside_{plain(second)}"] = curves.lead(rounds, first, second, y, low=fraction)
        if shown.spare and shown.best in there:
            lost = curves.loss_at(rounds, shown.best, shown.spare[0], y)
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
        shown = dataclasses.replace(shown, masked=_masked_units(shown, tuple(hidden)))
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


def _curves(figure: Curves) -> dict[str, tuple[str, str, float, bool, bool]]:
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


def _split(name: str, figure: Curves, new_draw: bool) -> tuple[str, str, float, bool, bool]:
    metric, _, layer = name.partition("_")
    return metric, "layer" if layer else "global", figure.amount, False, new_draw


def _masked_units(figure: Curves, hidden: tuple[int, ...]) -> tuple[int, ...]:
    if figure.model == "dropnet_resnet18":
        return tuple(itertools.chain.from_iterable([n] * 5 for n in hidden))
    if figure.model == "dropnet_vgg19":
        depths = (2, 2, 4, 4, 4)
        return tuple(n for n, depth in zip(hidden, depths, strict=False) for _ in range(depth))
    return hidden
