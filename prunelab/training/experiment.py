"""From settings to results: prune-recover rounds of a population, resumed where they stopped, shared among processes.

>>> results = run_all([Run(seed=s) for s in range(3)])
>>> results.rounds
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from prunelab import models, pruners
from prunelab.budget import USED, OutOfTime, over, until
from prunelab.data import Dataset, load
from prunelab.errors import PrunelabError
from prunelab.runs import Store
from prunelab.runs.progress import shown, tick
from prunelab.runs.provenance import cores
from prunelab.runs.records import Damaged
from prunelab.runs.scratch import ends_with, scratch
from prunelab.settings import Run
from prunelab.training import engines
from prunelab.training.memory import keep_freed_memory
from prunelab.training.observe import Watch, most_epochs
from prunelab.training.run import Running
from prunelab.training.stack import ALONE, stackable
from prunelab.training.train import Population, device, knows_bfloat16
from prunelab.training.versions import register_again, registered, versions

log = logging.getLogger(__name__)

MOST_ALONE = 8  # runs that share no stack but a beginning, in one process: their weights are in memory side by side


@dataclass(frozen=True)
class Results:
    """Finished runs, as tables.

    Attributes:
        ids: the runs asked for, in order.
        store: where they lie.
        loaded: how many were complete already.
        trained: how many were trained to the end now.
        failed: id -> why, for runs that could not be finished.
        strategies: name -> ids, where the runs were given under names.
    """

    ids: list[str]
    store: Store = field(repr=False)
    loaded: int
    trained: int
    failed: dict[str, str]
    strategies: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, runs: Sequence[Run], store: Store, missing: Sequence[Run], strategies: dict[str, list[str]]) -> Results:
        """Of runs that are in the store now, of which some were missing before."""
        ids = [run.id for run in runs]
        failed = {id_: store.place(id_).reason() or "" for id_ in ids if store.status(id_) == "failed"}
        trained = sum(run.id not in failed for run in missing)
        return cls(ids, store, len(ids) - len(failed) - trained, trained, failed, strategies)

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
        each = [*(["strategy"] if self.strategies else []), "id"]  # a run may stand under several names
        last = rounds.loc[rounds.groupby(each)["round"].idxmax().sort_values()].reset_index(drop=True)
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
    store: Store | Path | str | None = None,
    device: str = "auto",
    jobs: int | None = None,
    engine: str | None = None,
    progress: bool = True,
    budget: float | str | None = None,
) -> Results:
    """Load what the store has, train the rest.

    What is damaged in the store, or was made by another version of its method, model or reader of data, is trained
    again, which is logged as a warning.

    Args:
        runs: what to run, or name -> runs, which gives the tables a column ``strategy``; a run that is named twice is
            trained once.
        store: where results lie, or the path of it; None: the store of the repository, or of ``PRUNELAB_RUNS``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        jobs: processes that train side by side; None: as many as there are cores (one on a GPU); on a cluster its
            workers decide.
        engine: ``"local"``, ``"dask"`` or ``"ray"`` for a cluster on this machine, ``"dask://HOST:PORT"`` or
            ``"ray://HOST:PORT"`` for one that exists; None: ``PRUNELAB_ENGINE``, or ``"local"``. See
            ``prunelab.training.engines``.
        progress: whether to show a bar.
        budget: how long to train, in seconds or like ``"10m"``; after the epoch in which it is used everything is
            saved, and the same call goes on from there. None: to the end, or as ``prunelab reproduce --budget`` says.

    Returns:
        The results; runs that failed are among them, with the reason.

    Raises:
        OutOfTime: the budget is used and runs are left; says how many.
        PrunelabError: a run that cannot be run, before any of them is trained.
    """
    end = until(budget)
    runs, strategies = asked_for(runs, jobs)
    kind, _ = engines.parse(engine)
    store = Store.of(store)
    where = _device(device)
    missing = unfinished(runs, store)
    check(missing)
    if not knows_bfloat16(where) and any(run.train.precision == "bfloat16" for run in missing):
        log.warning("precision = 'bfloat16': this machine computes it by detours, 'float32' is faster here")
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
        jobs = 1 if where.type == "cuda" or importlib.util.find_spec("joblib") is None else cores()
    leaders = [run for run in missing if not run.prune.masks_of]
    followers = [run for run in missing if run.prune.masks_of]
    with contextlib.nullcontext() if kind == "local" or not missing else engines.opened(engine, str(where)) as cluster:
        for part in filter(None, (leaders, followers)):  # whoever takes another's masks waits until they are there
            if over(end):
                break
            _train_all(part, store, str(where), max(1, min(jobs, len(part))), progress, end, cluster)
    if over(end) and (left := [run for run in missing if store.status(run) not in ("complete", "failed")]):
        raise OutOfTime(f"{USED}: {len(left)} of {len(runs)} runs are left; the same call goes on with them")
    return Results.of(runs, store, missing, strategies)


def unfinished(runs: Sequence[Run], store: Store) -> list[Run]:
    """The runs that have to be trained, or trained again, since what is stored of them cannot be used.

    Raises:
        StoreError: a run whose id is that of a stored one with other settings.
    """
    with ThreadPoolExecutor(4) as pool:  # hashlib lets go of the interpreter lock while it works
        odd = list(pool.map(lambda run: store.unusable(run, versions(run)), runs))
    known = {run.id: run for run in runs}
    done = ("complete", "failed")
    missing = {run.id: run for run, why in zip(runs, odd, strict=True) if why or store.status(run) not in done}
    for leader in {run.prune.masks_of for run in missing.values()} - missing.keys():
        try:
            if leader and store.status(leader) == "complete":
                store.removals(leader)
        except Damaged as error:
            if leader not in known:
                raise
            log.warning("%s: it is trained again", error.what)
            store.discard(leader)
            missing[leader] = known[leader]
    return list(missing.values())


def asked_for(
    runs: Iterable[Run] | Mapping[str, Iterable[Run]], jobs: int | None
) -> tuple[list[Run], dict[str, list[str]]]:
    """What ``run_all`` was asked for: every run once, and the ids that stand under each name.

    Raises:
        PrunelabError: no run, none under a name, or no process to train it.
    """
    groups = {name: _listed(group) for name, group in (runs if isinstance(runs, Mapping) else {"": runs}).items()}
    named = groups if isinstance(runs, Mapping) else {}
    if bare := [name for name, group in named.items() if not group]:
        raise PrunelabError(f"no runs of {bare[0]!r} were asked for: should be at least one; is the number of seeds 0?")
    once: dict[str, Run] = {}
    for run in itertools.chain(*groups.values()):
        if once.setdefault(run.id, run) != run:
            raise PrunelabError(f"two of the runs have the id {run.id} and other settings: ask for them apart")
    if not once:
        raise PrunelabError("no runs were asked for: should be at least one; is the number of seeds 0?")
    if jobs is not None and (not isinstance(jobs, Integral) or jobs < 1):
        raise PrunelabError(f"jobs = {jobs!r}: should be 1 or more, a whole number; None: one for each core")
    return list(once.values()), {name: [run.id for run in group] for name, group in named.items()}


def _listed(runs: Any) -> list[Run]:
    """Runs as a list; networks of tables have settings of another class, with an id all the same."""
    listed = list(runs) if isinstance(runs, Iterable) else None
    if listed is None or not all(hasattr(one, "id") for one in listed):
        raise PrunelabError(f"runs = {runs!r}: should be a list of Run(...), or name -> such a list")
    return listed


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
        if pruner.stores_features and run.train.augment != "none":
            raise PrunelabError(f"augment = {run.train.augment!r}: {run.prune.method!r} stores features, use 'none'")
        if run.data not in seen:
            seen[run.data] = load(run.data)
        data = seen[run.data]
        if not len(data.validation):
            share = f"Data.validation = {run.data.validation}"
            raise PrunelabError(f"{run.data.name}: {share} holds no sample out, and training measures them: take more")
        if not data.labelled:
            _check_numbers(run, pruner)
        if (key := (run.data, run.model, run.prune)) in checked:
            continue
        checked.add(key)
        model = models.build(run.model, data.shape, len(data.classes), run.seed)
        pruners.first_masks(model, pruner, run.prune.layers)


def _check_numbers(run: Run, pruner: Any) -> None:
    """Refuse, where the targets are numbers, what only makes sense for classes."""
    if pruner.classes_only:
        raise PrunelabError(f"method {run.prune.method!r} looks at labels: {run.data.name} has numbers as targets")
    if run.train.augment != "none":
        raise PrunelabError(f"augment = {run.train.augment!r}: leave it out where the targets are numbers")


def _check_also_after(run: Run, pruner: Any) -> None:
    """Refuse prunings on request that would never happen."""
    also, budget = run.prune.also_after, most_epochs(run)
    if not pruner.while_training and not run.prune.rounds:
        raise PrunelabError(f"also_after = {also}: {run.prune.method!r} with rounds = 0 never prunes; leave it out")
    if max(also) >= budget:
        raise PrunelabError(f"also_after = {also}: should be below {budget}, the number of epochs")


def _train_all(
    runs: Sequence[Run],
    store: Store,
    where: str,
    jobs: int,
    progress: bool,
    end: float | None = None,
    cluster: engines.Engine | None = None,
) -> None:
    """Spread the runs over processes: those that can share stacks stay together, every process gets about as many."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.data, run.model), []).append(run)
    jobs = jobs if cluster is None else max(1, cluster.workers)
    parts = [part for group in groups.values() for part in _deal(group, jobs)]
    if cluster is not None:
        log.warning("%d runs in %d parts on %d workers: %s", len(runs), len(parts), jobs, cluster.describe())
    with shown(sum(map(most_epochs, runs)), progress) as ticks:
        if cluster is not None:
            engines.train_on(cluster, parts, store, where, ticks, end)
            return
        if jobs == 1:
            for part in parts:
                train_population(part, store, where, ticks, end=end)
            return
        threads = max(1, min(cores() // jobs, torch.get_num_threads()))  # a limit that was set holds: OMP_NUM_THREADS
        side_by_side(train_population, parts, jobs, threads, store, where, ticks, None, end)


def side_by_side(
    work: Callable[..., None], parts: Iterable[Sequence[Run]], jobs: int, threads: int, *rest: Any
) -> None:
    """Do parts of a study in processes that end with this one.

    Args:
        work: a function that can be pickled, of runs and ``rest``.
        parts: the runs of each call.
        jobs: processes.
        threads: of torch in each of them.
        rest: what ``work`` takes besides.

    Raises:
        PrunelabError: one of the processes was killed.
    """
    from joblib import Parallel, delayed  # engines of other kinds (Ray, Dask) can be set as joblib backends

    own = registered()
    with scratch() as folder:
        tasks = (
            delayed(_in_worker)(work, [run.asdict() for run in part], threads, folder, own, rest) for part in parts
        )
        try:
            Parallel(n_jobs=jobs)(tasks)
        except BrokenExecutor:
            what = "a process that trained was killed, by somebody or for want of memory"
            remedy = f"try again, with fewer jobs than {jobs}; it goes on from what is saved"
            raise PrunelabError(f"{what}: {remedy}") from None


def _in_worker(
    work: Callable[..., None],
    runs: Sequence[Mapping[str, Any]],
    threads: int,
    folder: Path,
    own: list[tuple[Any, ...]],
    rest: Sequence[Any],
) -> None:
    with ends_with(folder):
        register_again(own)
        keep_freed_memory()
        torch.set_num_threads(threads)
        work([Run.fromdict(run) for run in runs], *rest)


def _deal(runs: Sequence[Run], jobs: int) -> list[list[Run]]:
    """Runs in as many hands as keep all processes busy, those that begin alike in one as far as that goes.

    Models that share no stack are dealt in smaller lots of one beginning: whoever is done early takes another.
    """
    first = load(runs[0].data)
    beginnings: dict[Any, list[Run]] = {}
    for run in runs:
        beginnings.setdefault((run.train, run.seed), []).append(run)
    if not _shares_stack(models.build(runs[0].model, first.shape, len(first.classes), 0)):
        size = min(MOST_ALONE, math.ceil(len(runs) / (2 * jobs)))
        return [own[i : i + size] for own in beginnings.values() for i in range(0, len(own), size)]
    if len(beginnings) == len(runs):
        return [list(runs[i::jobs]) for i in range(min(jobs, len(runs)))]
    ordered = list(itertools.chain(*beginnings.values()))
    cuts = [round(i * len(runs) / jobs) for i in range(jobs + 1)]
    return [ordered[i:j] for i, j in itertools.pairwise(cuts) if i < j]


def _shares_stack(model: nn.Module) -> bool:
    return stackable(model) and sum(p.numel() for p in model.parameters()) <= ALONE


def train_population(
    runs: Sequence[Run],
    store: Store,
    where: str = "cpu",
    ticks: Path | None = None,
    watch: Watch | None = None,
    end: float | None = None,
) -> None:
    """Train runs on one data set in lockstep, from wherever each of them stopped, until all are in the store.

    Args:
        runs: they share ``data`` and ``model``.
        store: the run store; a run that another process is training is waited for.
        where: a torch device.
        ticks: the file in which epochs are counted, see ``prunelab.runs.progress``.
        watch: asked after every epoch of every run what is to happen next, and shown, before the first one and after
            the last, how things stand. What it raises ends the training of all; they go on from what was last saved.
        end: when to stop, in seconds since 1970: after the epoch that is trained then, all are saved and let go.
    """
    if not runs or over(end):
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
            writer = claim.enter_context(store.claim(run, versions=versions(run)))
            if writer.complete or writer.failed:
                claim.close()
                tick(ticks, most_epochs(run))
            else:
                try:
                    one = Running(run, writer, data, where, claim, store)
                except Damaged as error:
                    log.warning("%s: the run begins again", error.what)
                    writer.restart()
                    one = Running(run, writer, data, where, claim, store)
                tick(ticks, one.reached)
                if watch is not None:
                    watch(one.seen())
                if not one.over:
                    active.append(one)
        while active:
            before = sum(one.reached for one in active)
            left = _one_epoch(active, population, watch)
            tick(ticks, sum(one.reached for one in active) - before)
            active = left
            if over(end):
                for one in active:
                    one.pause()
                return


def _one_epoch(active: list[Running], population: Population, watch: Watch | None = None) -> list[Running]:
    """One epoch for everybody; then each run alone decides whether its round is over."""
    data = population.data
    trained = population.epoch([run.member for run in active])
    asked = [run for run in active if run.wants_validation]
    validated = dict(zip(asked, population.evaluate([run.member for run in asked], data.validation), strict=True))
    for run, epoch in zip(active, trained, strict=True):
        run.observe(epoch, validated.get(run))
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
