"""From settings to stored results for weightless networks: one pass of training, then rounds in which tables go.

The counterpart of ``prunelab.training.experiment``, whose runs train by gradient; both write into the same run store.
A network is trained once for all runs that differ only in how it is pruned.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunelab.data import Dataset, Split, load
from prunelab.errors import PrunelabError, nearest
from prunelab.masks import Masks
from prunelab.models import weightless
from prunelab.models.weightless import Network, tied, votes
from prunelab.pruners.lut import Lut, cross_entropy
from prunelab.runs import Checkpoint, Store, provenance
from prunelab.runs.progress import shown, tick
from prunelab.settings import Prune, Run
from prunelab.training.experiment import Results, asked_for, side_by_side, unfinished
from prunelab.training.removals import Removals
from prunelab.training.train import f1_macro, generator
from prunelab.training.versions import versions

METHOD, LUTS = "lut", "luts"
PARTS = ("train", "validation", "test")


def run_all(
    runs: Iterable[Run] | Mapping[str, Iterable[Run]],
    *,
    store: Store | Path | str | None = None,
    jobs: int | None = 1,
    progress: bool = True,
) -> Results:
    """Load what the store has, train and prune the rest.

    Args:
        runs: what to run, or name -> runs, which gives the tables a column ``strategy``. Their method is "lut", their
            model one of ``weightless.MODELS``; of ``train`` nothing is used.
        store: where results lie; None: the store of the repository, or of ``PRUNELAB_RUNS``.
        jobs: processes side by side; None: as many as there are cores.
        progress: whether to show a bar.

    Returns:
        As ``experiment.run_all``. Rows of rounds have three more columns: ``kib`` (size of the tables that are left),
        ``bleach`` and ``tied`` (share of the test samples whose highest vote several classes have). ``weights`` and
        ``parameters`` count entries of tables, ``units`` tables, ``units_by_layer`` those of each class.

    Raises:
        PrunelabError: a run that cannot be run, before any of them begins.
    """
    runs, strategies = asked_for(runs, jobs)
    store = Store.of(store)
    missing = unfinished(runs, store)
    check(missing)
    groups: dict[Any, list[Run]] = {}
    for run in missing:
        groups.setdefault((run.data, run.model, run.seed), []).append(run)
    with shown(sum(1 + run.prune.rounds for run in missing), progress) as ticks:
        _in_processes(list(groups.values()), store, jobs, ticks)
    return Results.of(runs, store, missing, strategies)


def build(prune: Prune) -> Lut:
    """The pruner that the settings name, with its options checked.

    Raises:
        PrunelabError: another method, no such option, or rounds that would remove everything.
    """
    if prune.method != METHOD:
        raise PrunelabError(f"method {prune.method!r} does not prune weightless networks: use {METHOD!r}")
    known = [field.name for field in dataclasses.fields(Lut)]  # type: ignore[arg-type]
    for option in prune.options:
        if option not in known:
            raise PrunelabError(f"method {METHOD!r} has no option {option!r}: {nearest(option, known)}")
    pruner = Lut(**prune.options)
    if prune.rounds * pruner.share >= 1 - 1e-9:
        much = f"rounds = {prune.rounds} with share = {pruner.share}"
        raise PrunelabError(f"{much} would remove every table: rounds * share should be below 1")
    return pruner


def check(runs: Iterable[Run]) -> None:
    """Refuse runs that cannot be run, before anything is trained.

    Raises:
        PrunelabError: one line.
    """
    for run in runs:
        build(run.prune)
        weightless.sizes(run.model)
    for data in {run.data for run in runs}:
        if load(data).train.y.is_floating_point():
            raise PrunelabError(f"data {data.name!r} has numbers to meet, not classes: a weightless network votes")


def _in_processes(groups: Sequence[list[Run]], store: Store, jobs: int | None, ticks: Path) -> None:
    cores = provenance.cores()
    jobs = min(jobs or cores, len(groups))
    if jobs < 2 or importlib.util.find_spec("joblib") is None:
        for group in groups:
            run_group(group, store, ticks)
        return
    side_by_side(run_group, groups, jobs, max(1, cores // jobs), store, ticks)


def run_group(runs: Sequence[Run], store: Store, ticks: Path | None = None) -> None:
    """Train one network, and prune it as each run asks.

    Args:
        runs: they share ``data``, ``model`` and ``seed``.
        store: the run store; a run that another process holds is waited for.
        ticks: the file in which rounds are counted, see ``prunelab.runs.progress``.
    """
    trained: _Trained | None = None
    for run in sorted(runs, key=lambda run: run.id):
        with store.claim(run, versions=versions(run)) as writer:
            if not (writer.complete or writer.failed):
                trained = trained or _Trained(run)
                trained.prune(run, writer)
        tick(ticks, 1 + run.prune.rounds)


class _Trained:
    """One network, and what its filters answer on each part of the data."""

    def __init__(self, run: Run) -> None:
        self.data = load(run.data)
        begin = time.perf_counter()
        self.network = train(self.data, run)
        self.seconds = time.perf_counter() - begin
        parts = {name: arrays(getattr(self.data, name)) for name in PARTS}
        if not len(parts["validation"][0]):  # the end of the training part, or all of it, took its place
            x, y = parts["train"]
            out = weightless.held_out(len(x))
            parts["train"], parts["validation"] = (x[: len(x) - out], y[: len(y) - out]), (x[-out:], y[-out:])
        self.labels = {name: y for name, (_, y) in parts.items()}
        self.responses = {name: self.network.responses(x) for name, (x, _) in parts.items()}

    def prune(self, run: Run, writer: Any) -> None:
        """All rounds of one run, into the store."""
        pruner, draw = build(run.prune), generator(run.seed, "pruning")
        everything = torch.ones(self.network.kept.shape, dtype=torch.bool)
        current, bias = everything, np.zeros(len(everything), np.int64)
        removals, scores, rows = Removals.start(Masks({LUTS: everything})), None, []
        for number in range(run.prune.rounds + 1):
            begin, requested = time.perf_counter(), round(number * pruner.share, 9)
            if number:
                if scores is None:
                    scores = pruner.scores(self.responses["train"], self.labels["train"], draw)
                after = pruner.select(scores, current, requested, draw)
                removals = removals.add(number, Masks({LUTS: current}), Masks({LUTS: after}), {LUTS: scores})
                current = after
            heard = {part: votes(self.responses[part], current.numpy()) for part in PARTS}
            if pruner.compensate and not bool(current.all()):  # where nothing went there is nothing to make up for
                bias = pruner.bias(heard["train"], self.labels["train"], draw)
            seconds = time.perf_counter() - begin if number else 0.0
            rows.append(self._row(number, requested, current, {part: v + bias for part, v in heard.items()}, seconds))
        self._store(writer, rows, current, bias, removals)

    def _row(
        self, number: int, requested: float, kept: Tensor, heard: Mapping[str, np.ndarray], seconds: float
    ) -> dict[str, Any]:
        measured: dict[str, Any] = {}
        for part, y in self.labels.items():
            measured[f"{part}_accuracy"] = float((heard[part].argmax(1) == y).mean())
            measured[f"{part}_loss"] = cross_entropy(heard[part], y)
        predicted, y = (torch.from_numpy(each) for each in (heard["test"].argmax(1), self.labels["test"]))
        luts, total = int(kept.sum()), kept.numel()
        entries = self.network.sizes.entries
        return {
            "round": number,
            "source": self.data.source,
            "requested_sparsity": requested,
            "sparsity": 1 - luts / total,
            "density": luts / total,
            "compression_ratio": total / luts,
            "weights": luts * entries,
            "weights_total": total * entries,
            "parameters": luts * entries,
            "units": luts,
            "units_total": total,
            "units_by_layer": kept.sum(1).tolist(),
            **measured,
            "test_f1_macro": f1_macro(predicted, y, len(self.data.classes)),
            "epochs": int(number == 0),
            "epoch": 1,
            "seconds": self.seconds if number == 0 else 0.0,
            "prune_seconds": seconds,
            "kib": self.network.sizes.kib(luts),
            "bleach": self.network.bleach,
            "tied": tied(heard["test"]),
            **provenance.row(provenance.hardware(), torch.get_num_threads()),
        }

    def _store(
        self, writer: Any, rows: list[dict[str, Any]], kept: Tensor, bias: np.ndarray, removals: Removals
    ) -> None:
        """The tables lie there as they are counted: one bit per entry; those that went are zero."""
        writer.save(Checkpoint({}, {"final": True}, rows, []))
        code = self.network.code
        tables = self.network.tables & kept.numpy()[:, :, None]
        arrays = {"thresholds": code.thresholds, "order": code.order, "constants": code.constants, "bias": bias}
        writer.finish(
            weights={**arrays, "tables": np.packbits(tables, axis=-1), "bleach": np.array(self.network.bleach)},
            masks={LUTS: kept.numpy()},
            removals={name: tensor.numpy() for name, tensor in removals.tensors().items()},
            provenance=provenance.collect(provenance.hardware(), torch.get_num_threads()),
        )


def train(data: Dataset, run: Run) -> Network:
    """The dense network of a run; its validation part, where it has one, chooses the bleach."""
    x, y = arrays(data.train)
    validation = arrays(data.validation) if len(data.validation) else None
    draw = generator(run.seed, "weightless")
    return weightless.fit(x, y, weightless.sizes(run.model), len(data.classes), draw, validation)


def arrays(part: Split) -> tuple[np.ndarray, np.ndarray]:
    """Samples as [N, features], images as they are stored, and labels."""
    return part.x.flatten(1).numpy(), part.y.numpy()


def restore(store: Store, run: Run | str) -> Network:
    """The network that a run ended with, from the store.

    Raises:
        StoreError: no such run, or it is not complete.
        PrunelabError: the run is none of a weightless network.
    """
    settings, kept, held = store.settings(run), store.masks(run), store.weights(run)
    if LUTS not in kept:
        raise PrunelabError(f"run {settings.id} has no look-up tables: it is not of a weightless network")
    sizes = weightless.sizes(settings.model)
    code = weightless.Code(held["thresholds"], held["order"], held["constants"], sizes.entries)
    tables = np.unpackbits(held["tables"], axis=-1, count=sizes.entries).astype(bool)
    return Network(sizes, code, tables, int(held["bleach"]), kept[LUTS], held["bias"])
