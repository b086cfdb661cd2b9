"""Any methods beside each other on any models: one budget, the same seeds, and the controls that belong to a claim.

>>> studies = compare(["snip", "magnitude:scope=layer"], models=["lenet_300_100"], controls=True)
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from prunelab import models, stats
from prunelab.data import Dataset
from prunelab.errors import PrunelabError, nearest
from prunelab.pruners import METHODS, build
from prunelab.pruners.units import COUPLED
from prunelab.pruners.while_training import training_cost
from prunelab.runs import Store
from prunelab.runs.columns import need
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.structure.report import latencies
from prunelab.structure.shrink import ShrinkError, shrink
from prunelab.training.experiment import Results
from prunelab.training.load import masks_at

Grid = dict[str, list[Run]]
ADAM = Train(batch_size=128, optimiser="adam")


def compare(
    methods: Sequence[str] | Mapping[str, str],
    *,
    models: Sequence[str] = ("lenet_300_100",),
    data: str = "mnist",
    amounts: Sequence[float] = (0.5,),
    rounds: int = 5,
    seeds: int = 3,
    epochs: int = 6,
    recovery: int = 2,
    train_size: int | None = None,
    test_size: int | None = None,
    train: Train = ADAM,
    hidden: Sequence[int] = (),
    only: Sequence[str] = (),
    controls: bool | Sequence[str] = False,
) -> dict[str, Grid]:
    """A grid of methods x models x amounts x seeds with random and magnitude pruning beside them.

    Every run trains ``epochs`` dense epochs (round 0 is the dense baseline), then, ``rounds`` times, removes an amount
    of what is left and fine-tunes for ``recovery`` epochs: with 0.5 and 5 rounds, compressions of 2, 4, 8, 16 and 32.
    Adam at 1e-3, batches of 128, unless ``train`` says otherwise. The protocol
    is our own default.

    Args:
        methods: names of ``pruners.METHODS``, options behind a colon: ``"taylor:granularity=unit,scope=layer"``; or
            name in legends -> such a word.
        models: names of ``models.MODELS``.
        data: name of the data set.
        amounts: fractions of the remaining weights or units, per round; each is a curve of its own.
        rounds: prunings.
        seeds: independent runs of each method.
        epochs: of the dense training.
        recovery: epochs after each pruning.
        train_size: training samples; None: all.
        test_size: likewise validation and test samples.
        train: how all are trained; the numbers of epochs are those above.
        hidden: other sizes of the models; (): their own.
        only: of the methods, names in legends; (): all.
        controls: for every method, or those named as in legends, also random (a shuffled mask) and magnitude pruning
            with its layer proportions, and its masks on newly drawn weights (see ``controls_of``).

    Returns:
        Model -> name in legends -> runs.

    Raises:
        PrunelabError: a method that is unknown, or that prunes while it trains.
    """
    train, again = (dataclasses.replace(train, epochs=n) for n in (epochs, recovery))
    named = methods if isinstance(methods, Mapping) else {method_of(spec)[0]: spec for spec in methods}
    if unknown := sorted({*only} - {*named}):
        raise PrunelabError(f"only {unknown[0]!r}: {nearest(unknown[0], named)}")
    named = {name: spec for name, spec in named.items() if not only or name in only}
    chosen = [(name, *method_of(spec)[1:]) for name, spec in named.items()]
    wanted = {name for name, *_ in chosen} if controls is True else set(controls or ())
    if unknown := sorted(wanted - {name for name, *_ in chosen}):
        raise PrunelabError(f"controls of {unknown[0]!r}: {nearest(unknown[0], [name for name, *_ in chosen])}")
    studies: dict[str, Grid] = {}
    for model in models:
        study: Grid = {}
        for amount in amounts:
            rate = f", {100 * amount:.10g}% a round" if len(amounts) > 1 else ""
            for name, prune in _with_baselines(chosen, amount, rounds).items():
                own = Run(
                    Data(data, train_size=train_size or None, test_size=test_size or None),
                    Model(model, tuple(hidden)),
                    train,
                    prune,
                    again,
                )
                study[name + rate] = [dataclasses.replace(own, seed=seed) for seed in range(seeds)]
                if name in wanted and name not in _BASELINES:
                    study |= controls_of(name + rate, study[name + rate])
        studies[model] = study
    return studies


_BASELINES = (
    "random",
    "magnitude",
    *(f"{name} {kind}" for kind in ("units", "channels", "heads") for name in ("random", "L1")),
)


def method_of(spec: str) -> tuple[str, str, dict[str, Any]]:
    """``"snip:scope=layer"`` -> its name in legends, the method, its options.

    Raises:
        PrunelabError: an option without a value.
    """
    method, _, rest = spec.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise PrunelabError(f"method {spec!r}: write options as name=value, as in {method}:{option}=...")
        try:
            options[option.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[option.strip()] = value.strip()
    name = method.strip()
    return name + "".join(f", {key} {value}" for key, value in options.items()), name, options


def _with_baselines(methods: Iterable[tuple[str, str, dict[str, Any]]], amount: float, rounds: int) -> dict[str, Prune]:
    """Legend -> settings; random and magnitude come first, of weights, units, or both as the methods need."""
    chosen: dict[str, Prune] = {}
    for name, method, options in methods:
        prune = Prune(method, amount, rounds, options=options)
        pruner = build(prune)
        if pruner.while_training or method == "none":
            raise PrunelabError(f"{method!r} has no rounds to compare: choose one that prunes trained networks")
        emptied = "allow_empty" in {field.name for field in dataclasses.fields(pruner)}  # type: ignore[arg-type]
        if emptied and not pruner.keeps_one:
            prune = dataclasses.replace(prune, options={"allow_empty": True, **options})
        chosen[name] = prune
    baselines: dict[str, Prune] = {}
    for prune in chosen.values():
        for name, baseline in _of_kind(prune).items():
            baselines[name] = Prune(baseline[0], amount, rounds, options={**baseline[1], "allow_empty": True})
    return {**baselines, **{name: prune for name, prune in chosen.items() if prune not in baselines.values()}}


def _of_kind(prune: Prune) -> Mapping[str, tuple[str, dict[str, Any]]]:
    """Random and magnitude pruning of the same things: single weights, units, or channels that go together."""
    granularity = build(prune).granularity
    if granularity == "weight":
        return {"random": ("random", {}), "magnitude": ("magnitude", {})}
    coupled = granularity in COUPLED
    unit, name = {"granularity": granularity if coupled else "unit"}, f"{granularity}s" if coupled else "units"
    return {f"random {name}": ("random", unit), f"L1 {name}": ("magnitude", unit)}


def _of_units(prune: Prune) -> bool:
    return build(prune).granularity != "weight"


def controls_of(name: str, runs: Sequence[Run]) -> Grid:
    """Three controls of finished masks, run by run: each follows the run with its seed, round by round.

    - ``random, layers as X``: as many per layer as X keeps, drawn at random, which is X's mask shuffled in each layer;
    - ``magnitude, layers as X``: as many per layer as X keeps, the largest;
    - ``X, new weights``: X's masks on weights drawn anew in every round, trained for the whole budget up to that round.

    Sources: Blalock et al., MLSys 2020, appendix B (the first two); Frankle et al., ICLR 2021, section 4 (shuffled and
    re-initialised).

    Args:
        name: of the method in legends.
        runs: its runs.
    """
    found: Grid = {}
    for run in runs:
        kinds = {label.split()[0].lower().replace("l1", "magnitude"): b for label, b in _of_kind(run.prune).items()}
        for label, (method, options) in kinds.items():
            prune = dataclasses.replace(
                run.prune, method=method, options={**options, "allow_empty": True}, masks_of=run.id, follow="counts"
            )
            found.setdefault(f"{label}, layers as {name}", []).append(dataclasses.replace(run, prune=prune))
        whole = run.train.epochs + run.prune.rounds * (run.retrain or run.train).epochs
        prune = dataclasses.replace(run.prune, masks_of=run.id, recover="reinit")
        again = dataclasses.replace(run.retrain or run.train, epochs=whole)
        found.setdefault(f"{name}, new weights", []).append(dataclasses.replace(run, prune=prune, retrain=again))
    return found


def comparable() -> list[str]:
    """Names of the methods that ``compare`` takes."""
    return [name for name in METHODS if name != "none" and not build(Prune(name)).while_training]


def costs(study: Grid, results: Results) -> pd.DataFrame:
    """The rounds with three columns more, for a grid of one model.

    - ``kind``: ``"weights"`` or ``"units"``, what the method removes;
    - ``theoretical_speedup``: dense over effective multiply-accumulates;
    - ``fraction``: of what was asked to stay.
    """
    rounds = results.rounds
    kinds = {name: "units" if _of_units(runs[0].prune) else "weights" for name, runs in study.items()}
    theory = rounds["macs"].max() / rounds["effective_macs"]
    kind = rounds["strategy"].map(kinds)
    return rounds.assign(kind=kind, theoretical_speedup=theory, fraction=1 - rounds["requested_sparsity"])


def leads(
    rounds: pd.DataFrame, pairs: Mapping[str, tuple[str, str]], *, cost: str = "compression_ratio"
) -> dict[str, stats.Interval]:
    """By how much the test accuracy of one method lies above that of another at the same cost, run by run.

    Accuracy is read between the rounds on a log scale of the cost, and the difference is averaged evenly over the range
    that both runs cover. A run counts up to the round in which its last unit between inputs and outputs goes: from then
    on it gives the same answer to everything, however it is trained, and one such round would decide the whole mean.

    Args:
        rounds: one row per run and round: strategy, seed, round, units, test_accuracy, ``cost``; the dense networks of
            round 0 never count.
        pairs: name -> two strategies.
        cost: what is the same: ``"compression_ratio"``; ``"fraction"`` of the units or operations that is left.

    Returns:
        Name -> the paired interval over seeds of first - second, as a share of 1; NaN where no seed has a range that
        both cover.
    """
    need(rounds, ["strategy", "seed", "round", "units", "test_accuracy", cost], "comparison.leads")
    pruned = rounds[rounds["round"] > 0].sort_values("round", kind="stable")
    connected = (pruned["units"] > 0).groupby([pruned["strategy"], pruned["seed"]]).cummin()
    curves = {
        key: (np.log(own[cost].to_numpy()), own["test_accuracy"].to_numpy())
        for key, own in pruned[connected].sort_values(cost, kind="stable").groupby(["strategy", "seed"])
    }
    found = {}
    for name, (first, second) in pairs.items():
        seeds = [seed for seed in rounds["seed"].unique() if (first, seed) in curves and (second, seed) in curves]
        found[name] = stats.mean_interval(_difference(curves[first, seed], curves[second, seed]) for seed in seeds)
    return found


def _difference(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean height of one curve over another where both are, NaN where there is no such place; x of both rises."""
    low, high = max(one[0][0], two[0][0]), min(one[0][-1], two[0][-1])
    at = np.linspace(low, high, 101)
    return float(np.mean(np.interp(at, *one) - np.interp(at, *two))) if low <= high else math.nan


def trainings(results: Results, samples: int) -> pd.DataFrame:
    """What whole trainings cost and brought, one row per run: ``training_cost`` beside the last accuracy.

    Args:
        results: of methods that prune in one training.
        samples: of the training part.
    """
    last = results.last[["strategy", "id", "test_accuracy", "compression_ratio"]]
    return training_cost(results.rounds, samples).merge(last).assign(round=0)


def speedups(
    study: Mapping[str, Sequence[Run]], store: Store, dataset: Dataset, *, batch: int = 256, repeats: int = 21
) -> pd.DataFrame:
    """How much faster the networks of every round really are, with what is dead cut out: their latency, measured.

    Latency depends on what is left, not on the values of the weights, so the networks are those of the first run of
    each method, shrunk by their masks, with first weights. Dense and shrunk are timed in turns.

    Args:
        study: name -> finished runs. Those that remove single weights are passed over, since a shrunk network is
            hardly smaller then, and those that follow others (the controls).
        store: where they lie.
        dataset: theirs, for the size of a sample.
        batch: samples at a time.
        repeats: turns.

    Returns:
        One row per name and round after the first: strategy, id, round, latency (median, seconds), dense_latency,
        speedup (median of dense over median of shrunk). A network that cannot be shrunk, since a layer is empty, has
        no row.
    """
    x = dataset.scale(dataset.test.x[:batch])
    rows = []
    for name, runs in study.items():
        run, removals = runs[0], store.removals(runs[0].id)
        if run.prune.masks_of or not _of_units(run.prune):
            continue
        dense = models.build(run.model, dataset.shape, len(dataset.classes), run.seed).eval()
        for number in range(1, run.prune.rounds + 1):
            try:
                small = shrink(dense, masks_at(removals, number), x[:2])
            except ShrinkError:
                continue
            times = {key: median(own) for key, own in latencies({"dense": dense, "small": small}, x, repeats).items()}
            both = {"latency": times["small"], "dense_latency": times["dense"]}
            rows.append(
                {"strategy": name, "id": run.id, "round": number, **both, "speedup": times["dense"] / times["small"]}
            )
    return pd.DataFrame(rows)
