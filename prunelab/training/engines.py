"""Where a study trains: on this machine, or on a Dask or Ray cluster, chosen by one word.

>>> run_all(study, engine="dask")  # a cluster on this machine
>>> run_all(study, engine="dask://scheduler:8786")  # one that exists
>>> run_all(study, engine="ray://head:10001")

``"local"`` is joblib, whose processes write into the run store themselves. A cluster shares no disk: every part of a
study goes out in turns of some seconds. A worker gets settings, what is stored of the runs so far and the data, trains
in a store of its own, and sends home finished runs and checkpoints. The store at home is the only truth, so that a
worker that dies costs one turn, and a study that is killed goes on from what has come home.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import importlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from prunelab import digest, paths
from prunelab.budget import over
from prunelab.data.cache import cached, fill
from prunelab.errors import PrunelabError, first_line, nearest
from prunelab.runs import Store, progress
from prunelab.runs.locks import Writer
from prunelab.runs.provenance import cores
from prunelab.runs.scratch import scratch
from prunelab.settings import Run
from prunelab.training.observe import most_epochs
from prunelab.training.versions import register_again, registered, versions

log = logging.getLogger(__name__)

VARIABLE = "PRUNELAB_ENGINE"
TURN = 60.0  # seconds after which a worker sends home what it has, at the end of a round; our own default
LOST = 3  # times that a part is sent out again after its worker died, before its runs count as failed
AWAY = 300.0  # seconds that a scheduler may be away


class EngineError(PrunelabError):
    """An engine that does not exist, cannot be reached, or has workers of another version."""


class WorkerLost(EngineError):  # noqa: N818 (as Busy: what is the case)
    """The process that trained a part is gone; what it sent home is safe."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One turn of one part: everything that a worker needs.

    Attributes:
        runs: settings, one data set and one model.
        leaders: settings of the runs whose masks these follow.
        stored: run id -> file name -> bytes, what the store at home has of both.
        where: torch device.
        seconds: length of the turn; the epoch that is being trained is finished first.
        versions: of the machine at home; a worker with others refuses.
        own: methods, models and data that are registered at home.
    """

    runs: tuple[Mapping[str, Any], ...]
    leaders: tuple[Mapping[str, Any], ...]
    stored: Mapping[str, Mapping[str, bytes]]
    where: str
    seconds: float
    versions: Mapping[str, str]
    own: list[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a turn brought: the files of every run."""

    stored: Mapping[str, Mapping[str, bytes]]


class Engine(abc.ABC):
    """Runs functions in processes elsewhere. A new engine is a class with these methods and a line in ``ENGINES``."""

    name: ClassVar[str]

    def __init__(self, address: str, gpus: bool) -> None:
        self.address, self.gpus = address, gpus

    @property
    @abc.abstractmethod
    def workers(self) -> int:
        """Processes that can train side by side now."""

    @abc.abstractmethod
    def share(self, value: bytes) -> Any:
        """Put bytes where every worker can read them, sent once to each; gives what ``submit`` takes in their place."""

    @abc.abstractmethod
    def submit(self, function: Callable[..., Answer], *args: Any) -> Any:
        """Run a function on some worker; gives a handle that can be a key of a dict."""

    @abc.abstractmethod
    def done(self, handles: Sequence[Any]) -> list[Any]:
        """Wait up to a second; those that have finished or failed."""

    @abc.abstractmethod
    def result(self, handle: Any) -> Answer:
        """What the function returned, or its exception.

        Raises:
            WorkerLost: its process is gone.
        """

    @abc.abstractmethod
    def reconnect(self) -> None:
        """Find the cluster again after it was away; handles and shared bytes of before are void."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Where it is, in words, with the address of its dashboard if it has one."""

    @abc.abstractmethod
    def running(self) -> list[tuple[str, str]]:
        """What is being trained now, as pairs of worker and part."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let the cluster go; one that was started for this study ends."""


class Dask(Engine):
    """A Dask cluster; on GPU machines tasks ask for the resource ``GPU=1`` (``dask worker --resources GPU=1``)."""

    name = "dask"

    def __init__(self, address: str, gpus: bool) -> None:
        super().__init__(address, gpus)
        self._distributed = _needed("distributed", "dask")
        self._cluster: Any = None
        if not address:
            quiet = {"silence_logs": logging.ERROR, "dashboard_address": "127.0.0.1:0"}
            self._cluster = self._distributed.LocalCluster(n_workers=cores(), threads_per_worker=1, **quiet)
        self._connect(30)

    def _connect(self, seconds: float) -> None:
        where = self._cluster or f"tcp://{self.address}"
        try:
            self._client = self._distributed.Client(where, timeout=seconds)
        except (OSError, ValueError) as error:
            raise EngineError(
                f"no Dask scheduler answers at {self.address} ({first_line(error)}): start one with `dask scheduler`"
            ) from None

    @property
    @override
    def workers(self) -> int:
        return sum(w["nthreads"] for w in self._client.scheduler_info(n_workers=-1)["workers"].values())

    @override
    def share(self, value: bytes) -> Any:
        return self._client.scatter(value, hash=True, broadcast=True)

    @override
    def submit(self, function: Callable[..., Answer], *args: Any) -> Any:
        resources = {"GPU": 1} if self.gpus else None
        key = f"{_label(args[0])}-{time.monotonic_ns()}"
        return self._client.submit(function, *args, key=key, pure=False, resources=resources)

    @override
    def done(self, handles: Sequence[Any]) -> list[Any]:
        if self._client.status != "running":
            raise ConnectionError("the scheduler is away")
        given_up = self._distributed.client.FuturesCancelledError
        with contextlib.suppress(TimeoutError, self._distributed.TimeoutError, given_up):
            self._distributed.wait(list(handles), timeout=1, return_when="FIRST_COMPLETED")
        return [handle for handle in handles if handle.status != "pending"]

    @override
    def result(self, handle: Any) -> Answer:
        if handle.status == "cancelled" and self._client.status == "running":
            raise WorkerLost("and the data that it held with it")
        try:
            return handle.result()
        except self._distributed.KilledWorker as error:
            raise WorkerLost(first_line(error)) from None
        except (self._distributed.CancelledError, self._distributed.comm.CommClosedError) as error:
            raise ConnectionError(first_line(error)) from None

    @override
    def reconnect(self) -> None:
        with contextlib.suppress(Exception):
            self._client.close(timeout=1)
        self._connect(AWAY)
        self._client.wait_for_workers(1, timeout=AWAY)

    @override
    def describe(self) -> str:
        return f"Dask at {self._client.scheduler_info()['address']}, dashboard {self._client.dashboard_link}"

    @override
    def running(self) -> list[tuple[str, str]]:
        found = self._client.processing()
        return [(worker, key.rpartition("-")[0]) for worker, keys in found.items() for key in map(str, keys)]

    @override
    def close(self) -> None:
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


class Ray(Engine):
    """A Ray cluster; on GPU machines every task has a GPU of its own."""

    name = "ray"

    def __init__(self, address: str, gpus: bool) -> None:
        super().__init__(address, gpus)
        self._ray = _needed("ray", "ray")
        self._init()

    def _init(self) -> None:
        where = (
            {"address": f"ray://{self.address}"} if self.address else {"num_cpus": cores(), "include_dashboard": False}
        )
        try:
            self._ray.init(**where, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, OSError, RuntimeError) as error:
            raise EngineError(
                f"no Ray cluster answers at {self.address} ({first_line(error)}): start one with `ray start --head`"
            ) from None

    @property
    @override
    def workers(self) -> int:
        return int(self._ray.cluster_resources().get("GPU" if self.gpus else "CPU", 0))

    @override
    def share(self, value: bytes) -> Any:
        return self._ray.put(value)

    @override
    def submit(self, function: Callable[..., Answer], *args: Any) -> Any:
        options = {"num_gpus": 1} if self.gpus else {"num_cpus": 1}
        task = self._ray.remote(**options, max_retries=0, name=_label(args[0]))(function)
        return task.remote(*args)

    @override
    def done(self, handles: Sequence[Any]) -> list[Any]:
        return self._ray.wait(list(handles), num_returns=1, timeout=1)[0]

    @override
    def result(self, handle: Any) -> Answer:
        errors = self._ray.exceptions
        try:
            return self._ray.get(handle)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            raise WorkerLost(first_line(error)) from None
        except errors.RayTaskError as error:
            raise error.as_instanceof_cause() from None

    @override
    def reconnect(self) -> None:
        self._ray.shutdown()
        end = time.monotonic() + AWAY
        while True:
            try:
                return self._init()
            except EngineError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    @override
    def describe(self) -> str:
        return f"Ray at {self.address or 'this machine'}"

    @override
    def running(self) -> list[tuple[str, str]]:
        from ray.util.state import list_tasks

        tasks = list_tasks(filters=[("state", "=", "RUNNING")])
        return [(str(task.get("node_id"))[:8], task["name"]) for task in tasks]

    @override
    def close(self) -> None:
        self._ray.shutdown()


ENGINES: Mapping[str, type[Engine]] = {"dask": Dask, "ray": Ray}


def parse(engine: str | None) -> tuple[str, str]:
    """``"dask://host:8786"`` as its kind and its address; None is ``PRUNELAB_ENGINE``, or ``"local"``.

    Raises:
        EngineError: no such engine, or an address of another form.
    """
    word = engine or os.environ.get(VARIABLE) or "local"
    kind, slashes, address = word.partition("://")
    if kind not in ("local", *ENGINES):
        raise EngineError(f"engine = {word!r}: {nearest(kind, ('local', *ENGINES))}; with an address: dask://HOST:8786")
    host, _, port = address.rpartition(":")
    if slashes and (kind == "local" or not host or not port.isdigit()):
        raise EngineError(
            f"engine = {word!r}: should be {kind if kind != 'local' else 'dask'}://HOST:PORT, or {kind!r}"
        )
    return kind, address


@contextlib.contextmanager
def opened(engine: str, device: str) -> Iterator[Engine]:
    """The engine of that name, as long as the ``with`` block lasts.

    Raises:
        EngineError: a library that is not installed, or a cluster that does not answer.
    """
    kind, address = parse(engine)
    one = ENGINES[kind](address, device.startswith("cuda"))
    try:
        yield one
    finally:
        one.close()


def _needed(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise EngineError(f"engine {extra!r} needs {module}: install it with pip install 'prunelab[{extra}]'") from None


def _label(work: Work) -> str:
    first = Run.fromdict(dict(work.runs[0])).id
    return first if len(work.runs) == 1 else f"{first}+{len(work.runs) - 1}"


def software() -> dict[str, str]:
    """Versions that have to be the same on both sides."""
    from prunelab import __version__

    return {"prunelab": __version__, "torch": torch.__version__.partition("+")[0]}


# -- at home ----------------------------------------------------------------------------------------------------------


def train_on(
    engine: Engine,
    parts: Sequence[Sequence[Run]],
    store: Store,
    where: str,
    ticks: Path | None = None,
    end: float | None = None,
) -> None:
    """Train parts of a study on a cluster, turn by turn, until all their runs are in the store at home.

    Args:
        engine: where.
        parts: lists of runs that share data and model; an idle worker takes half of what another part has left.
        store: the store at home; its runs are held by this process until they have come home.
        where: torch device of the workers.
        ticks: the file in which epochs are counted, see ``prunelab.runs.progress``.
        end: when to stop, in seconds since 1970; nothing is sent out after that.

    Raises:
        EngineError: workers of another version, or runs whose workers died too often.
    """
    with contextlib.ExitStack() as claims:
        writers: dict[str, Writer] = {}
        for run in sorted((run for part in parts for run in part), key=lambda run: run.id):
            writer = claims.enter_context(store.claim(run, versions=versions(run)))
            if writer.complete or writer.failed:
                progress.tick(ticks, most_epochs(run))
            else:
                writers[run.id] = writer
        _Study(engine, store, writers, where, ticks, end).train(
            [[run for run in part if run.id in writers] for part in parts]
        )


class _Study:
    """What is out, what has come home, and who is held up."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        writers: Mapping[str, Writer],
        where: str,
        ticks: Path | None,
        end: float | None,
    ) -> None:
        self.engine, self.store, self.writers = engine, store, writers
        self.where, self.ticks, self.end = where, ticks, end
        self.out: dict[Any, list[Run]] = {}
        self.shared: dict[str, Any] = {}
        self.reached: dict[str, int] = {}
        self.lost: dict[str, int] = {}

    def train(self, parts: Sequence[Sequence[Run]]) -> None:
        """Send everything out, and again what comes back unfinished."""
        waiting = [list(part) for part in parts if part]
        while waiting or self.out:
            try:
                while waiting:
                    if not over(self.end):
                        self._send(waiting[0])
                    waiting.pop(0)
                for handle in self.engine.done(list(self.out)):
                    waiting += self._spread(self._home(handle))
            except ConnectionError:
                log.warning("the scheduler is away: waiting for it")
                waiting += self.out.values()
                self.out.clear()
                self.shared.clear()
                self.engine.reconnect()
        if given_up := sorted(run_id for run_id, times in self.lost.items() if times > LOST):
            raise EngineError(
                f"{given_up[0]} lost its worker {LOST + 1} times, and {len(given_up) - 1} more did: look at the memory "
                "of the workers; what they sent home is stored, run_all goes on from there"
            )

    def _send(self, part: list[Run]) -> None:
        ids = {run.prune.masks_of for run in part} - {""}
        leaders = [found.run for leader in sorted(ids) if (found := self.store.place(leader).manifest()) is not None]
        stored = {run.id: self.store.place(run.id).stored() for run in (*leaders, *part)}
        settings = [tuple(run.asdict() for run in runs) for runs in (part, leaders)]
        turn = TURN if self.end is None else max(0.0, min(TURN, self.end - time.time()))
        work = Work(*settings, stored, self.where, turn, software(), registered())
        self.out[self.engine.submit(train_turn, work, self._data(part[0].data.name))] = part

    def _data(self, name: str) -> Any:
        if name not in self.shared:
            self.shared[name] = self.engine.share(fill(name).read_bytes())
        return self.shared[name]

    def _home(self, handle: Any) -> list[Run]:
        """Store what a turn brought; the runs that it left unfinished."""
        part = self.out.pop(handle)
        try:
            answer = self.engine.result(handle)
        except ConnectionError:
            self.out[handle] = part
            raise
        except WorkerLost as error:
            for run in part:
                self.lost[run.id] = self.lost.get(run.id, 0) + 1
            log.warning("a worker died (%s): its %d runs go to another one", error, len(part))
            self.shared.clear()  # what it held may be gone
            return [run for run in part if self.lost[run.id] <= LOST]
        left = []
        for run in part:
            writer = self.writers[run.id]
            writer.adopt(answer.stored.get(run.id, {}))
            now = most_epochs(run)
            if not (writer.complete or writer.failed):
                left.append(run)
                now = len(found.epochs) if (found := self.store.place(run.id).manifest()) is not None else 0
            progress.tick(self.ticks, now - self.reached.get(run.id, 0))
            self.reached[run.id] = now
        return left

    def _spread(self, part: list[Run]) -> list[list[Run]]:
        """A part in two where a worker would be idle."""
        if len(part) < 2 or len(self.out) + 1 >= self.engine.workers:
            return [part] if part else []
        middle = len(part) // 2
        return [part[:middle], part[middle:]]


# -- on a worker ------------------------------------------------------------------------------------------------------


def train_turn(work: Work, prepared: bytes) -> Answer:
    """Train a part for a turn in a store of its own; what a worker does.

    Args:
        work: settings and what is stored of them.
        prepared: the file of the prepared data set.

    Raises:
        EngineError: this machine has another version of prunelab or torch.
    """
    from prunelab.training.experiment import train_population

    register_again(work.own)
    host = socket.gethostname()
    if wrong := [name for name, version in software().items() if work.versions[name] != version]:
        name = wrong[0]
        raise EngineError(
            f"worker {host} has {name} {software()[name]}, this machine {work.versions[name]}: install the same there"
        )
    runs, leaders = ([Run.fromdict(dict(run)) for run in settings] for settings in (work.runs, work.leaders))
    torch.set_num_threads(1)  # a worker is a process for one core, or for one GPU
    with scratch() as folder:
        _keep(prepared, cached(runs[0].data.name))
        store = Store(folder / "runs")
        for run in (*leaders, *runs):
            with store.claim(run, versions=versions(run)) as writer:
                writer.adopt(work.stored[run.id])
        train_population(runs, store, work.where, end=time.time() + work.seconds)
        return Answer({run.id: store.place(run.id).stored() for run in runs})


def _keep(prepared: bytes, path: Path) -> None:
    """Put the prepared data set where this machine looks for it, unless it is there."""
    if not path.exists() or digest.of(path) != digest.of(prepared):
        path.parent.mkdir(parents=True, exist_ok=True)
        with paths.replacing(path) as part:
            part.write_bytes(prepared)
