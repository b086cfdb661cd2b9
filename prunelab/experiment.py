"""From settings to results: prune-recover rounds of a population, resumed where they stopped, shared among processes.

>>> results = run_all([Run(seed=s) for s in range(3)])
>>> results.rounds
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from prunelab import cost, models, provenance, pruners
from prunelab.chains import ShrinkError, live_units, spread, then, whole_index
from prunelab.data import Dataset, load
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.models import layer_widths
from prunelab.prefix import learning_macs
from prunelab.progress import shown, tick
from prunelab.pruners.during import Change, DuringTraining, Moment, Penalising, Progress, Remembering
from prunelab.pruners.select import keep_as_many
from prunelab.removals import Removals
from prunelab.results import Checkpoint, Store
from prunelab.settings import Run
from prunelab.train import EVALUATION_BATCH, Epoch, Evaluation, Member, Population, device, generator

log = logging.getLogger(__name__)

REINIT_SEED = 20  # added to the seed for a new draw of the weights, as in DropNet's code


@dataclass(frozen=True)
class Seen:
    """A run after an epoch, for whoever watches it train; nothing of it may be changed.

    Attributes:
        run: its settings.
        epochs: its rows so far; the last one changes when the network is pruned on request.
        rounds: likewise, of the rounds that have ended.
        budget: epochs that it takes at most.
        model: the network with which the next epoch begins.
        masks: what of it stays zero.
        widths: layer -> units or filters of the dense network.
        weights: prunable weights that are left.
        weights_total: those of the dense network.
        may_prune: whether a pruning can be asked for now.
        over: whether it trains no more.
    """

    run: Run
    epochs: Sequence[Mapping[str, Any]]
    rounds: Sequence[Mapping[str, Any]]
    budget: int
    model: nn.Module
    masks: Masks
    widths: Mapping[str, int]
    weights: int
    weights_total: int
    may_prune: bool
    over: bool


# What is to happen next, asked after every epoch; it may take its time. "prune": at once, which makes the run another
# one, ``pruned_after``; "save": so that a killed run goes on from here; "stop": save, and train no more.
Watch = Callable[[Seen], Literal["go on", "prune", "save", "stop"]]


def pruned_after(run: Run, epoch: int) -> Run:
    """The run that is pruned after ``epoch`` as well, whatever its method says: other settings, another id."""
    also = (*run.prune.also_after, epoch)
    return dataclasses.replace(run, prune=dataclasses.replace(run.prune, also_after=also))


@dataclass(frozen=True)
class Results:
    """Finished runs, as tables.

    Attributes:
        ids: the runs asked for, in order.
        store: where they lie.
        loaded: how many were there already.
        trained: how many were trained now.
        failed: id -> why, for runs that could not be finished.
        strategies: name -> ids, where the runs were given under names.
    """

    ids: list[str]
    store: Store = field(repr=False)
    loaded: int
    trained: int
    failed: dict[str, str]
    strategies: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @property
    def rounds(self) -> pd.DataFrame:
        """One row per run and round."""
        return self._named(self.store.rounds(self.ids, unfinished=bool(self.failed)))

    @property
    def epochs(self) -> pd.DataFrame:
        """One row per run and epoch."""
        return self._named(self.store.epochs(self.ids, unfinished=bool(self.failed)))

    @property
    def last(self) -> pd.DataFrame:
        """The last round of every run; ``epochs``, ``seconds`` and ``prune_seconds`` are those of all its rounds."""
        rounds = self.rounds
        last = rounds.loc[rounds.groupby("id")["round"].idxmax().sort_values()].reset_index(drop=True)
        spent = rounds.drop_duplicates(["id", "round"]).groupby("id")[["epochs", "seconds", "prune_seconds"]].sum()
        return last.assign(**{name: last["id"].map(column) for name, column in spent.items()})

    def _named(self, frame: pd.DataFrame) -> pd.DataFrame:
        """With a first column ``strategy``, in the order in which the strategies were given."""
        if not self.strategies:
            return frame
        names = pd.DataFrame(
            [(name, i) for name, ids in self.strategies.items() for i in ids], columns=["strategy", "id"]
        )
        return names.merge(frame, on="id", how="inner")

    def __str__(self) -> str:
        failed = "".join(f"; {id_} failed: {reason}" for id_, reason in self.failed.items())
        return f"{len(self.ids)} runs: {self.loaded} loaded, {self.trained} trained{failed}"


def run_all(
    runs: Iterable[Run] | Mapping[str, Iterable[Run]],
    *,
    store: Store | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: bool = True,
) -> Results:
    """Load what the store has, train the rest.

    Args:
        runs: what to run, or name -> runs, which gives the tables a column ``strategy``; a run that is named twice is
            trained once.
        store: where results lie; None: the store of the repository, or of ``PRUNELAB_RUNS``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        jobs: processes that train side by side; None: as many as there are cores (one on a GPU).
        progress: whether to show a bar.

    Returns:
        The results; runs that failed are among them, with the reason.

    Raises:
        PrunelabError: a run that cannot be run, before any of them is trained.
    """
    named = {name: list(group) for name, group in runs.items()} if isinstance(runs, Mapping) else {}
    runs = list({run.id: run for run in (itertools.chain(*named.values()) if named else runs)}.values())
    if not runs:
        raise PrunelabError("no runs were asked for: should be at least one; is the number of seeds 0?")
    if jobs is not None and jobs < 1:
        raise PrunelabError(f"jobs = {jobs}: should be 1 or more; None: one for each core")
    store = store or Store()
    where = _device(device)
    missing = [run for run in runs if store.status(run) not in ("complete", "failed")]
    check(missing)
    known = {run.id for run in runs}
    for run in missing:
        if (leader := run.prune.masks_of) and leader not in known and store.status(leader) != "complete":
            raise PrunelabError(
                f"run {run.id} takes the masks of {leader!r}, which is neither stored nor among the runs"
            )
        if leader and run.prune.follow == "counts" and not isinstance(pruners.build(run.prune), pruners.Ranking):
            raise PrunelabError(
                f"run {run.id} follows the counts of another: {run.prune.method!r} has no scores to rank"
            )
    if jobs is None:
        jobs = 1 if where.type == "cuda" or importlib.util.find_spec("joblib") is None else _cores()
    leaders = [run for run in missing if not run.prune.masks_of]
    followers = [run for run in missing if run.prune.masks_of]
    for part in filter(None, (leaders, followers)):  # whoever takes another's masks waits until they are there
        _train_all(part, store, str(where), max(1, min(jobs, len(part))), progress)
    failed = {run.id: store.place(run.id).reason() or "" for run in runs if store.status(run) == "failed"}
    strategies = {name: [run.id for run in group] for name, group in named.items()}
    return Results([run.id for run in runs], store, len(runs) - len(missing), len(missing), failed, strategies)


_device = device  # the parameter of run_all shadows the function


def check(runs: Iterable[Run]) -> None:
    """Refuse runs that cannot be run, before anything trains: unknown names, layers, options, sizes that do not fit.

    Raises:
        PrunelabError: one line.
    """
    seen: dict[Any, Dataset] = {}
    checked = set()
    for run in runs:
        pruner = pruners.build(run.prune)
        if run.prune.also_after:
            _check_also_after(run, pruner)
        if getattr(pruner, "stores_features", False) and run.train.augment != "none":
            raise PrunelabError(f"augment = {run.train.augment!r}: {run.prune.method!r} stores features, use 'none'")
        if run.data not in seen:
            seen[run.data] = load(run.data)
        data = seen[run.data]
        if not data.labelled:
            _check_numbers(run, pruner)
        if (key := (run.data, run.model, run.prune)) in checked:
            continue
        checked.add(key)
        model = models.build(run.model, data.shape, len(data.classes), run.seed)
        pruners.first_masks(model, pruner, run.prune.layers)
        if isinstance(pruner, DuringTraining):
            pruner.check(model)


def _check_numbers(run: Run, pruner: Any) -> None:
    """Refuse, where the targets are numbers, what only makes sense for classes."""
    if getattr(pruner, "score", "") in ("snip", "taylor") or isinstance(pruner, pruners.Oracle):
        raise PrunelabError(f"method {run.prune.method!r} looks at labels: {run.data.name} has numbers as targets")
    if run.train.augment != "none":
        raise PrunelabError(f"augment = {run.train.augment!r}: leave it out where the targets are numbers")


def _check_also_after(run: Run, pruner: Any) -> None:
    """Refuse prunings on request that would never happen."""
    also, budget = run.prune.also_after, most_epochs(run)
    if not isinstance(pruner, DuringTraining) and not run.prune.rounds:
        raise PrunelabError(f"also_after = {also}: {run.prune.method!r} with rounds = 0 never prunes; leave it out")
    if max(also) >= budget:
        raise PrunelabError(f"also_after = {also}: should be below {budget}, the number of epochs")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train_all(runs: Sequence[Run], store: Store, where: str, jobs: int, progress: bool) -> None:
    """Spread the runs over processes: those that can share stacks stay together, every process gets about as many."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.data, run.model), []).append(run)
    parts = [part for group in groups.values() for part in _deal(group, jobs, len(groups))]
    with shown(sum(map(most_epochs, runs)), progress) as ticks:
        if jobs == 1:
            for part in parts:
                train_population(part, store, where, ticks)
            return
        from joblib import Parallel, delayed  # engines of other kinds (Ray, Dask) can be set as joblib backends

        threads = max(1, _cores() // jobs)
        Parallel(n_jobs=jobs)(
            delayed(_in_worker)([run.asdict() for run in part], store.root, where, threads, ticks) for part in parts
        )


def most_epochs(run: Run) -> int:
    """Epochs that a run can take at most."""
    during = isinstance(pruners.build(run.prune), DuringTraining)
    return run.train.epochs + (0 if during else run.prune.rounds * (run.retrain or run.train).epochs)


def _deal(runs: Sequence[Run], jobs: int, groups: int) -> list[list[Run]]:
    """Runs in as many hands as keep all processes busy; models too large to gain from a stack are dealt one by one."""
    first = load(runs[0].data)
    model = models.build(runs[0].model, first.shape, len(first.classes), 0)
    if len(_stack_mates(model, runs)) == 1:
        return [[run] for run in runs]
    hands = max(1, min(jobs, len(runs)))
    return [list(runs[i::hands]) for i in range(hands)]


def _stack_mates(model: nn.Module, runs: Sequence[Run]) -> Sequence[Run]:
    from prunelab.stack import stackable
    from prunelab.train import ALONE

    small = stackable(model) and sum(p.numel() for p in model.parameters()) <= ALONE
    return runs if small else runs[:1]


def _in_worker(runs: list[dict[str, Any]], root: Path, where: str, threads: int, ticks: Path) -> None:
    torch.set_num_threads(threads)
    train_population([Run.fromdict(run) for run in runs], Store(root), where, ticks)


def train_population(
    runs: Sequence[Run],
    store: Store,
    where: str = "cpu",
    ticks: Path | None = None,
    watch: Watch | None = None,
) -> None:
    """Train runs on one data set in lockstep, from wherever each of them stopped, until all are in the store.

    Args:
        runs: they share ``data`` and ``model``.
        store: the run store; a run that another process is training is waited for.
        where: a torch device.
        ticks: the file in which epochs are counted, see ``prunelab.progress``.
        watch: asked after every epoch of every run what is to happen next, and shown, before the first one and after
            the last, how things stand. What it raises ends the training of all; they go on from what was last saved.
    """
    if not runs:
        return
    data = load(runs[0].data, device=where)
    population = Population(data)
    with contextlib.ExitStack() as claims:
        active = []
        for run in sorted(
            runs, key=lambda r: r.id
        ):  # one order for all processes, so that two that wait cannot wait for each other
            claim = contextlib.ExitStack()
            claims.push(claim)
            writer = claim.enter_context(store.claim(run))
            if writer.complete or writer.failed:
                claim.close()
                tick(ticks, most_epochs(run))
            else:
                one = _Active(run, writer, data, where, claim, store)
                tick(ticks, most_epochs(run) if one.over else len(one.epochs))
                if watch is not None:
                    watch(one.seen())
                if not one.over:
                    active.append(one)
        while active:
            left = _one_epoch(active, population, watch)
            tick(ticks, len(active) + sum(most_epochs(one.run) - len(one.epochs) for one in active if one.over))
            active = left


def _one_epoch(active: list[_Active], population: Population, watch: Watch | None = None) -> list[_Active]:
    """One epoch for everybody; then each run alone decides whether its round is over."""
    data = population.data
    trained = population.epoch([run.member for run in active])
    validated = population.evaluate([run.member for run in active], data.validation)
    for run, epoch, validation in zip(active, trained, validated, strict=True):
        run.observe(epoch, validation)
    restored = [run for run in active if run.restore_best()]
    for run, validation in zip(
        restored, population.evaluate([r.member for r in restored], data.validation), strict=True
    ):
        run.validation = validation
    asked = [run for run in active if run.wants_test]
    for run, test in zip(asked, population.evaluate([r.member for r in asked], data.test), strict=True):
        run.test = test
    for run in active:
        run.close_epoch(population)
        if watch is not None:
            run.heed(watch, population)
    return [run for run in active if not run.over]


class _Active:
    """A run while it trains: its member of the population, its rounds so far, and the claim on its folder."""

    def __init__(
        self, run: Run, writer: Any, data: Dataset, where: str, claim: contextlib.ExitStack, store: Store
    ) -> None:
        self.run, self.writer, self.data, self.where, self.claim = run, writer, data, where, claim
        self.store = store
        self.pruner = pruners.build(run.prune)
        self.during = isinstance(self.pruner, DuringTraining)
        self.dense = models.build(run.model, data.shape, len(data.classes), run.seed)
        self.widths = dict(layer_widths(self.dense))
        self.shapes = {name: p.shape for name, p in self.dense.named_parameters()}
        self.choice = generator(run.seed, "pruning")
        self.rounds: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.losses_of_batches: list[float] = []
        self.accuracies: list[float] = []
        self.last: int | None = None
        self.round = 0
        self.requested = 0.0
        self.state: dict[str, Tensor] = {}
        self.index = whole_index(self.dense)
        self.over = False
        self._counted: tuple[int, dict[str, int]] = -1, {}
        self.validation: Evaluation | None = None
        self.test: Evaluation | None = None
        dense_masks = pruners.first_masks(self.dense, self.pruner, run.prune.layers)
        self.weights_total = dense_masks.weights.total
        self.removals = Removals.start(dense_masks)
        order = generator(run.seed, "order")
        self.member = Member(
            models.build(run.model, data.shape, len(data.classes), run.seed), run.train, dense_masks, order
        )
        if isinstance(self.pruner, Remembering):
            self.state = dict(self.pruner.first_state(self.member.model))
        frozen = () if writer.checkpoint is None else tuple(writer.checkpoint.state.get("frozen", ()))
        if writer.checkpoint is not None:
            self._resume(writer.checkpoint)
        self.member.model.to(where)
        self.member.masks = self.member.masks.to(where)
        self.member.moments = {k: {n: t.to(where) for n, t in own.items()} for k, own in self.member.moments.items()}
        for modules in () if self.over else frozen:
            self.member.freeze(modules, self._outputs(modules))
        self._penalise()

    # -- one epoch ----------------------------------------------------------------------------------------------------

    def observe(self, epoch: Epoch, validation: Evaluation) -> None:
        """Take in what the epoch brought, and see whether it ends the round."""
        self.trained, self.validation, self.test = epoch, validation, None
        self.losses.append(validation.loss)
        self.losses_of_batches.append(validation.loss_of_batches)
        self.accuracies.append(validation.accuracy)
        self.member.observe(validation.loss)
        self.acts, self.signal = False, float("nan")
        if self.during:
            self.signal = self.pruner.signal(self._progress()) if hasattr(self.pruner, "signal") else self.signal
            self.acts = not self.member.done and self.pruner.due(self._progress())
        if len(self.epochs) + 1 in self.run.prune.also_after and self._can_prune:
            self.acts = True

    @property
    def _can_prune(self) -> bool:
        return not self.member.done and (self.during or self.round < self.run.prune.rounds)

    @property
    def round_ends(self) -> bool:
        return self.acts or self.member.done

    @property
    def wants_test(self) -> bool:
        return (
            self.test is None and self.member.failure is None and (self.run.train.test_every_epoch or self.round_ends)
        )

    def restore_best(self) -> bool:
        """Whether the weights were put back to those of the best epoch, so that they have to be measured again."""
        if self.member.done and self.member.best is not None and self.member.stale:
            self.member.restore_best()
            return True
        return False

    def close_epoch(self, population: Population) -> None:
        """Write the epoch down; at the end of a round prune, save, and go on or finish."""
        if self.member.failure is not None:
            self._fail(self.member.failure)
            return
        row = self._epoch_row()
        self.epochs.append(row)
        if self.round_ends:
            self._end_round(row, population)

    def _end_round(self, row: dict[str, Any], population: Population) -> None:
        if self.during:
            self._during(row)
        else:
            self._rounds(population)

    # -- somebody watches ---------------------------------------------------------------------------------------------

    def seen(self) -> Seen:
        """How things stand."""
        trained = bool(self.epochs) and self.epochs[-1]["round"] == self.round
        kept, can = self.member.masks.weights.kept, trained and not self.over and self._can_prune
        state = (self.run, self.epochs, self.rounds, most_epochs(self.run), self.member.model, self.member.masks)
        return Seen(*state, self.widths, kept, self.weights_total, can, self.over)

    def heed(self, watch: Watch, population: Population) -> None:
        """Do what the watcher wishes, until it wishes nothing but to go on."""
        while (wish := watch(self.seen())) != "go on" and not self.over:
            self._save()
            if wish == "stop":
                self._leave()
            elif wish == "prune" and self.seen().may_prune:
                self._prune_early(population)

    def _prune_early(self, population: Population) -> None:
        """Prune after the epoch that was just written down: from now on it is the run whose settings say so.

        The run that it was until now stays in the store as it is, and can go on without this pruning.
        """
        row = self.epochs[-1]
        run, other = pruned_after(self.run, row["epoch"]), contextlib.ExitStack()
        if (status := self.store.status(run)) != "missing":
            raise PrunelabError(f"run {run.id} is {status} in the store already: go on with that one, or discard it")
        writer = other.enter_context(self.store.claim(run, wait=False))
        self.claim.close()
        self.claim.push(other)
        self.run, self.writer, self.acts = run, writer, True
        if self.wants_test:
            self.test = population.evaluate([self.member], self.data.test)[0]
            row.update(test_loss=self.test.loss, test_accuracy=self.test.accuracy)
        self._end_round(row, population)

    def _epoch_row(self) -> dict[str, Any]:
        test = self.test
        return {
            "round": self.round,
            "epoch": len(self.epochs) + 1,
            "train_loss": self.trained.loss,
            "train_accuracy": self.trained.accuracy,
            "validation_loss": self.validation.loss,
            "validation_accuracy": self.validation.accuracy,
            "test_loss": float("nan") if test is None else test.loss,
            "test_accuracy": float("nan") if test is None else test.accuracy,
            "seconds": self.trained.seconds,
            "lockstep": self.trained.lockstep,
            "weights": self.member.masks.weights.kept,
            "units": sum(self._units().values()),
            "pruned": False,
            "rate": float("nan"),
            "trigger": self.signal,
        }

    # -- the end of a round -------------------------------------------------------------------------------------------

    def _during(self, row: dict[str, Any]) -> None:
        """A method that prunes while training: it acts, or the budget is spent."""
        if not self.acts:
            self._write_round(0.0)
            self._finish()
            return
        begin = time.perf_counter()
        self.member.detach()
        change = self.pruner.act(self._moment())
        more = change.frozen > sum(self.member.frozen[-1:])
        features = self._outputs(change.frozen) if more else None
        seconds = time.perf_counter() - begin
        self.last = len(self.losses) - 1
        if change.failure is not None:
            self._write_round(seconds, change.failure)
            self._fail(change.failure)
            return
        self._write_round(seconds, change.note)
        row["pruned"], row["rate"] = not change.note, change.rate
        self.state = dict(change.state)
        self._take(change)
        self.member.change(change.model, change.masks, change.moments)
        if features is not None:
            self.member.freeze(change.frozen, features)
        self._penalise()
        self._save()

    def _outputs(self, modules: int) -> Tensor:
        """What the first modules give for every training sample, in a file in the folder of the run."""
        folder = self.store.place(self.run.id).partial
        folder.mkdir(parents=True, exist_ok=True)
        return self.member.outputs(modules, self.data, folder)

    def _penalise(self) -> None:
        """The penalty of the method, if it has one, for the network as it is now."""
        if isinstance(self.pruner, Penalising):
            self.member.penalty = self.pruner.penalty(self.member.model, self.state)

    def _progress(self) -> Progress:
        epochs, lr = self.member.train.epochs, self.member.lr_of(self.member.epoch - 1)
        return Progress(self.losses, self.losses_of_batches, epochs, self.last, self.accuracies, lr)

    def _moment(self) -> Moment:
        member = self.member
        return Moment(
            member.model, member.masks, member.moments, self.state, self.choice, self._progress(), self._batches
        )

    def _rounds(self, population: Population) -> None:
        """A method of whole rounds: train, prune, recover."""
        prune = self.run.prune
        self._write_round(0.0)
        while True:
            density = 1 - self._removed_units() if prune.stop is not None else 1.0
            if self.round >= prune.rounds or (prune.stop is not None and density <= prune.stop):
                self._finish()
                return
            begin = time.perf_counter()
            self.member.detach()
            model, current = self.member.model, self.member.masks
            try:
                scores, masks, weights = self._pruned(model, current)
            except PrunelabError as error:
                self._fail(str(error))
                return
            seconds = time.perf_counter() - begin
            self._take(Change(model, masks, None, masks, whole_index(model), prune.amount, scores))
            self.member.restart(self.run.retrain or self.run.train)
            self.member.change(self._recovered(prune.recover, weights), masks)
            self._penalise()
            self.losses, self.losses_of_batches, self.accuracies, self.last = [], [], [], None
            if prune.recover != "none":
                self._save()
                return
            self.validation, self.test = (
                population.evaluate([self.member], part)[0] for part in (self.data.validation, self.data.test)
            )
            self._write_round(seconds)
            self._save()

    def _pruned(
        self, model: nn.Module, current: Masks
    ) -> tuple[Mapping[str, Tensor] | None, Masks, Mapping[str, Tensor]]:
        """Scores where there are any, masks, and the new values of parameters that the method changes."""
        amount, pruner = self.run.prune.amount, self.pruner
        if self.run.prune.masks_of and self.run.prune.follow == "masks":
            return None, current & self._followed(), {}
        if getattr(pruner, "needs_start", False):
            pruner = pruner.since(dict(self._fresh(self.run.seed).named_parameters()))
        if isinstance(pruner, pruners.Reweighting):
            return None, *pruner.reweighted(model, self._batches(), current, amount, self.choice)
        if not isinstance(pruner, pruners.Ranking):
            return None, pruner.masks(model, self._batches(), current, amount, self.choice), {}
        scores = pruner.scores(model, self._batches(), current, self.choice)
        if self.run.prune.masks_of:
            return scores, keep_as_many(model, scores, current, self._followed(), self.choice), {}
        return scores, pruner.select(model, scores, current, amount, self.choice), {}

    def _followed(self) -> Masks:
        """What the run that this one follows kept in the round that begins now."""
        removals = self.store.removals(self.run.prune.masks_of)
        return masks_at(removals, self.round + 1).to(self.where)

    def _recovered(self, how: str, weights: Mapping[str, Tensor]) -> nn.Module:
        """The network with which the next round begins; new values of weights hold for the trained one."""
        if how == "rewind":
            return self._fresh(self.run.seed)
        if how == "reinit":
            return self._fresh(self.run.seed + REINIT_SEED)
        pruners.put_weights(self.member.model, weights)
        return self.member.model

    def _fresh(self, seed: int) -> nn.Module:
        return models.build(self.run.model, self.data.shape, len(self.data.classes), seed).to(self.where)

    def _batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The training part in its own order, scaled, for scores that look at data; about 2 million numbers a batch.

        A method that judges networks by data that they have not learnt (``held_out``) gets the validation part.
        """
        split = self.data.validation if getattr(self.pruner, "held_out", False) else self.data.train
        size = max(1, min(EVALUATION_BATCH, 2**21 // math.prod(self.data.shape)))
        for start in range(0, len(split.y), size):
            yield self.data.scale(split.x[start : start + size]), self.data.target(split.y[start : start + size])

    def _take(self, change: Change) -> None:
        """Record what goes, in the coordinates of the dense network, and begin the next round."""
        before = self._in_dense(self.member.masks, self.index)
        scores = None if change.scores is None else self._in_dense(self._per_weight(change.scores), self.index)
        chosen = self._in_dense(change.masks_before_removal, self.index)
        if change.returns:
            self.removals, before = self.removals.restored(Masks(chosen)), chosen
        self.round += 1
        self.removals = self.removals.add(self.round, Masks(before), Masks(chosen), scores)
        self.index = then(self.index, change.index)
        left = self._in_dense(change.masks, self.index)
        self.removals = self.removals.add(self.round, Masks(chosen), Masks(left), None)  # went with their unit
        self.requested = 1 - (1 - self.requested) * (1 - change.rate)

    def _in_dense(self, tensors: Mapping[str, Tensor], index: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {name: spread(t.cpu(), index[name], self.shapes[name]) for name, t in tensors.items()}

    def _per_weight(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores of units, given by layer, as scores of their weights and biases."""
        found = {}
        for name, score in scores.items():
            for parameter in [name] if name in self.shapes else [f"{name}.weight", f"{name}.bias"]:
                if parameter in self.member.masks:
                    shape = self.member.masks[parameter].shape
                    found[parameter] = (
                        score.view(-1, *[1] * (len(shape) - score.dim())).expand(shape)
                        if score.shape != shape
                        else score
                    )
        return found

    def _units(self) -> dict[str, int]:
        """Live units by layer; they change only with the masks, and every epoch asks for them."""
        if self._counted[0] != self.member.version:
            self._counted = self.member.version, self._count_units()
        return self._counted[1]

    def _count_units(self) -> dict[str, int]:
        try:
            return live_units(self.member.model, self.member.masks)
        except ShrinkError:  # not a chain: a unit is alive while it has an input
            return {
                name: int(self.member.masks[f"{name}.weight"].flatten(1).any(1).sum())
                if f"{name}.weight" in self.member.masks
                else width
                for name, width in self.widths.items()
            }

    def _removed_units(self) -> float:
        return 1 - sum(self._units().values()) / sum(self.widths.values())

    def _write_round(self, prune_seconds: float, note: str = "") -> None:
        """The row of the round that has just ended: the network as it was trained and measured."""
        done = [row for row in self.epochs if row["round"] == self.round]
        masks, units = self.member.masks, self._units()
        kept = masks.weights.kept  # biases that go with their unit are not among the weights
        price = cost.summarise(self.member.model, self.data.shape, masks)
        self.rounds.append(
            {
                "round": self.round,
                "source": self.data.source,
                "requested_sparsity": self.requested,
                "sparsity": 1 - kept / self.weights_total,
                "density": kept / self.weights_total,
                "compression_ratio": self.weights_total / kept if kept else float("inf"),
                "weights": kept,
                "weights_total": self.weights_total,
                "parameters": price.nonzero,
                "units": sum(units.values()),
                "units_total": sum(self.widths.values()),
                "units_by_layer": list(units.values()),
                "train_loss": self.trained.loss,
                "train_accuracy": self.trained.accuracy,
                "validation_loss": self.validation.loss,
                "validation_accuracy": self.validation.accuracy,
                "test_loss": self.test.loss,
                "test_accuracy": self.test.accuracy,
                "test_f1_macro": self.test.f1_macro,
                "epochs": len(done),
                "epoch": len(self.epochs),
                "seconds": sum(row["seconds"] for row in done),
                "prune_seconds": prune_seconds,
                "macs": price.macs,
                "effective_macs": price.effective_macs,
                **self._learning_macs(),
                "note": note,
                **provenance.row(*_machine(self.where)),
            }
        )

    def _learning_macs(self) -> dict[str, int]:
        """Those of a sample in the part of the network that trained, where layers may drop out of the training."""
        if not getattr(self.pruner, "stores_features", False):
            return {}
        return {"learning_macs": learning_macs(self.member.model, self.data.shape, sum(self.member.frozen[-1:]))}

    # -- the record ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self.member.detach()
        self._save(final=True)
        self._seal()

    def _seal(self) -> None:
        """Move the run into the store; also what is left to do when it was killed just before."""
        index = {f"index.{name}.{axis}": i for name, axes in self.index.items() for axis, i in enumerate(axes)}
        self.writer.finish(
            weights=_arrays(self.member.model.state_dict()),
            masks=_arrays(self.member.masks),
            removals=_arrays({**self.removals.tensors(), **index}),
            provenance=provenance.collect(*_machine(self.where)),
        )
        self._leave()

    def _fail(self, reason: str) -> None:
        log.warning("run %s failed: %s", self.run.id, reason)
        self._save()
        self.writer.fail(reason)
        self._leave()

    def _leave(self) -> None:
        self.over = True
        self.claim.close()

    def _save(self, final: bool = False) -> None:
        """Everything from which the run goes on with the same bits."""
        member = self.member
        tensors = {
            **{f"model/{n}": t for n, t in member.model.state_dict().items()},
            **{f"mask/{n}": t for n, t in member.masks.items()},
            **{f"moment/{kind}/{n}": t for kind, own in member.moments.items() for n, t in own.items()},
            **{f"state/{n}": t for n, t in self.state.items()},
            **{f"best/{n}": t for n, t in (member.best or {}).items()},
            **{f"removals/{n}": t for n, t in self.removals.tensors().items()},
            **{f"index/{n}/{axis}": i for n, axes in self.index.items() for axis, i in enumerate(axes)},
            "generator/order": member.order.get_state(),
            "generator/choice": self.choice.get_state(),
        }
        state = {
            "final": final,
            "round": self.round,
            "epoch": member.epoch,
            "steps": member.steps,
            "requested": self.requested,
            "last": self.last,
            "losses": self.losses,
            "losses_of_batches": self.losses_of_batches,
            "accuracies": self.accuracies,
            "best_loss": member.best_loss,
            "stale": member.stale,
            "frozen": list(member.frozen),
        }
        self.writer.save(Checkpoint(_arrays(tensors), state, self.rounds, self.epochs))

    def _resume(self, checkpoint: Checkpoint) -> None:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in checkpoint.tensors.items()}
        state = checkpoint.state

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix + "/"): t for n, t in tensors.items() if n.startswith(prefix + "/")}

        self.rounds, self.epochs = list(checkpoint.rounds), list(checkpoint.epochs)
        self.round, self.requested, self.last = state["round"], state["requested"], state["last"]
        self.losses, self.losses_of_batches = list(state["losses"]), list(state["losses_of_batches"])
        self.accuracies = list(state.get("accuracies", ()))
        index = part("index")
        self.index = {n: tuple(index[f"{n}/{axis}"] for axis in range(len(shape))) for n, shape in self.shapes.items()}
        self.state = part("state")
        self.removals = Removals.from_tensors(part("removals"))
        self.choice.set_state(tensors["generator/choice"])
        member = self.member
        member.order.set_state(tensors["generator/order"])
        member.model = _reshaped(member.model, self.index)
        member.model.load_state_dict(part("model"))
        member.masks = Masks(part("mask"))
        for name, tensor in part("moment").items():
            kind, _, parameter = name.partition("/")
            member.moments.setdefault(kind, {})[parameter] = tensor
        member.epoch, member.steps = state["epoch"], state["steps"]
        member.best_loss, member.stale, member.best = state["best_loss"], state["stale"], part("best") or None
        if self.round and not self.during:
            member.train = self.run.retrain or self.run.train
        if state["final"]:
            self._seal()


def masks_at(removals: Mapping[str, Any], round: int) -> Masks:
    """The masks that a finished run had in a round, from ``Store.removals(id)``."""
    return Removals.from_tensors({name: torch.from_numpy(array) for name, array in removals.items()}).kept(round)


def _reshaped(model: nn.Module, index: Mapping[str, tuple[Tensor, ...]]) -> nn.Module:
    """The dense model cut to the shapes of a checkpoint; layers that are whole stay the same object."""
    if all(len(i) == size for n, p in model.named_parameters() for i, size in zip(index[n], p.shape, strict=True)):
        return model
    from prunelab.chains import chain, remove_units

    hidden = [link.name for link in chain(model)[:-1]]
    return remove_units(model, {name: index[f"{name}.weight"][0] for name in hidden}).model


def _machine(where: str) -> tuple[str, int]:
    """What trains, in words, and with how many threads."""
    name = torch.cuda.get_device_name(where) if where.startswith("cuda") else provenance.hardware()
    return name, torch.get_num_threads()


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
