"""The command line: it parses, calls and prints; what it does is done elsewhere and loaded only when asked for."""
# ruff: noqa: T201 - printing is this module's work

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

try:
    import tyro
except ImportError:  # a machine that only trains has no need of it
    sys.exit("prunelab: the command line needs tyro: install it with pip install 'prunelab[lab]'")

from prunelab import __version__, paths
from prunelab.errors import PrunelabError, nearest

if TYPE_CHECKING:
    from prunelab.headless.reproduce import Job
    from prunelab.plots.tables import Table

FAILED, WRONG, LEFT, INTERRUPTED = 1, 2, 3, 130  # exit codes

Names = tyro.conf.Positional[tuple[str, ...]]
Many = tyro.conf.UseAppendAction[tuple[str, ...]]


def list_() -> int:
    """Every table and figure that can be made again, and how far each paper has come."""
    from prunelab import papers
    from prunelab.plots import tables

    print(_fitted(tables.index(papers.artefacts())))
    print()
    print(_fitted(tables.by_paper()))
    return 0


def reproduce(
    artefacts: Names = (),
    /,
    paper: str | None = None,
    preset: Literal["smoke", "quick", "paper"] = "quick",
    p: Annotated[Many, tyro.conf.arg(aliases=["-p"], metavar="NAME=VALUE")] = (),
    jobs: int | None = None,
    device: str | None = None,
    engine: str | None = None,
    force: bool = False,
    into: Path | None = None,
    budget: str | None = None,
) -> int:
    """Run the notebooks of artefacts, and put what comes out beside the committed numbers; what is up to date stays.

    Args:
        artefacts: ids as `prunelab list` shows them, parts of ids, papers, or all.
        paper: all artefacts of a paper; those whose data is not at hand are passed over.
        preset: smoke takes seconds, quick minutes to two hours on two cores, paper is the protocol of the paper.
        p: a parameter of the notebooks; may be given several times.
        jobs: processes that train side by side; left out: one per core.
        device: auto, cpu or cuda.
        engine: local, dask or ray, or a cluster that exists, dask://HOST:PORT or ray://HOST:PORT.
        force: run also what is up to date.
        into: folder of the figures; left out: out. `--into figures` is for those who commit what comes out.
        budget: how long to train, like 90s, 10m or 2h; then all is saved, the exit code is 3 while something is left,
            and the same command goes on.
    """
    from prunelab import budget as time_limit
    from prunelab import papers
    from prunelab.headless import reproduce

    if jobs is not None and jobs < 1:
        raise PrunelabError(f"--jobs {jobs}: should be 1 or more")
    if device is not None:
        from prunelab.training.train import device as known

        known(device)
    _known_engine(engine)
    whole = paper is not None or any(name in ("all", *(known.key for known in papers.papers())) for name in artefacts)
    found = reproduce.chosen(artefacts, paper)
    machine = {"jobs": jobs, "device": device}
    end = time_limit.until(budget)
    failed, left = 0, 0
    folder = None if into is None else str(into.expanduser().resolve())
    with _variable("PRUNELAB_OUT", folder), _variable("PRUNELAB_ENGINE", engine):
        plan = reproduce.plan(found, preset, p, machine=machine, force=force, skip_missing_data=whole)
        for number, job in enumerate(plan, 1):
            head = f"[{number}/{len(plan)}] {job.artefact.id}"
            if job.reason:
                print(f"{head}: {job.reason}")
            elif time_limit.over(end):
                left += 1
                print(f"{head}: left, {time_limit.USED}")
            elif not _run(head, job, end):
                stopped = time_limit.over(end)
                failed, left = failed + (not stopped), left + stopped
        if preset != "smoke":  # whose numbers mean nothing
            _beside_committed(job for job in plan if not job.reason.startswith("skipped"))
        print(f"\nfigures: {paths.out()}\nexecuted notebooks: {paths.runs() / 'notebooks'}")
    if left:
        print(f"{left} of {len(plan)} are left: the same command goes on with them")
    return FAILED if failed else LEFT if left else 0


@contextlib.contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """An environment variable as long as the ``with`` lasts, for notebooks too; None: as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            os.environ.update({} if before is None else {name: before})


def _known_engine(engine: str | None) -> None:
    if engine is not None:
        from prunelab.training.engines import parse

        parse(engine)


def _beside_committed(jobs: Iterable[Job]) -> None:
    """The verdicts on what was computed here, beside those on the committed numbers."""
    from prunelab.plots import gallery, tables

    for job in jobs:
        here = gallery.saved(job.place, paths.out()) or {}
        there = gallery.saved(job.artefact.figure) if paths.out() != paths.figures() else None
        if claims := here.get("claims"):
            print(f"\n{job.artefact.id}: {job.artefact.title}")
            print(_fitted(tables.stored_verdicts(claims, there)))


def compare(
    methods: Names,
    /,
    models: tuple[str, ...] = ("lenet_300_100",),
    data: str = "mnist",
    amounts: tuple[float, ...] = (0.5,),
    rounds: int = 5,
    seeds: int = 3,
    epochs: int = 6,
    recovery: int = 2,
    train_size: int = 0,
    controls: bool = False,
    jobs: int | None = None,
    device: str = "auto",
    engine: str | None = None,
    save: Path | None = None,
) -> int:
    """Put pruning methods beside each other, and beside random and magnitude pruning, with one training budget.

    Args:
        methods: names, options behind a colon, as in taylor:granularity=unit,scope=layer.
        models: architectures.
        data: data set.
        amounts: fractions of what is left that go in a round.
        rounds: prunings; five halvings are compressions of 2, 4, 8, 16 and 32.
        seeds: independent runs of each method.
        epochs: of the dense training.
        recovery: epochs after each pruning.
        train_size: training samples; 0: all.
        controls: also shuffled masks, magnitude with each method's layer proportions, and its masks on new weights.
        jobs: processes that train side by side; left out: one per core.
        device: auto, cpu or cuda.
        engine: local, dask or ray, or a cluster that exists, dask://HOST:PORT or ray://HOST:PORT.
        save: a file for the numbers, one row per run and round, as CSV.
    """
    from prunelab.plots import checklist, tables
    from prunelab.runs.records import writing
    from prunelab.training import comparison
    from prunelab.training.experiment import run_all

    if not methods:
        raise PrunelabError(f"compare what? Name one method or more of: {', '.join(comparison.comparable())}")
    if save is not None:
        if not save.parent.is_dir():
            raise PrunelabError(f"--save {save}: there is no folder {save.parent}; make it first")
        if save.is_dir():
            raise PrunelabError(f"--save {str(save)!r} is a folder: give the name of a file")
        with writing(save, "give a path that can be"), tempfile.TemporaryFile(dir=save.parent):
            pass  # now, not after the training
    studies = comparison.compare(
        methods, models=models, data=data, amounts=amounts, rounds=rounds, seeds=seeds, epochs=epochs,
        recovery=recovery, train_size=train_size or None, controls=controls,
    )  # fmt: skip
    named = {(model, name): runs for model, study in studies.items() for name, runs in study.items()}
    several = len(studies) > 1
    labels = {key: f"{key[0]}: {key[1]}" if several else key[1] for key in named}
    results = run_all({labels[key]: runs for key, runs in named.items()}, jobs=jobs, device=device, engine=engine)
    found = results.rounds
    metrics = ["test_accuracy", "compression_ratio", "effective_macs"]
    print(_fitted(tables.comparison(found, by=["strategy", "round"], metrics=metrics)))
    print(f"\n{checklist.checklist(found)}\n\n{results}; {epochs} + {rounds} x {recovery} epochs each")
    if save is not None:
        with writing(save, "give a path that can be; what was trained is kept"):
            found.to_csv(save, index=False)
        print(f"numbers: {save}")
    return FAILED if results.failed else 0


def _fitted(table: Table) -> str:
    """A table for whoever reads: as wide as the terminal, or in full where the output goes elsewhere."""
    return table.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None)


def _run(head: str, job: Job, end: float | None = None) -> bool:
    """One notebook, with a line that moves; whether it ran to its end."""
    from prunelab import budget
    from prunelab.headless import runner as notebook_runner
    from prunelab.runs import progress
    from prunelab.runs.scratch import scratch

    begin, ended = time.monotonic(), False
    with scratch() as folder:
        ticks = folder / "progress"
        over = threading.Event()
        thread = threading.Thread(target=_watch, args=(head, ticks, begin, over), daemon=True)
        thread.start()
        try:
            environment = {progress.VARIABLE: str(ticks)} | ({} if end is None else {budget.VARIABLE: str(end)})
            notebook_runner.run(job.notebook, job.executed, job.parameters, environment=environment)
            line, ended = f"{head}: done in {_clock(time.monotonic() - begin)}", True
        except notebook_runner.NotebookFailed as error:
            line = f"{head}: {'stopped' if budget.USED in str(error) else 'FAILED'}: {error}"
        finally:
            over.set()
            thread.join()
    print(f"{_CLEAR}{line}", flush=True)
    if ended:
        job.remember()
    return ended


_CLEAR = "\r\033[K" if sys.stdout.isatty() else ""


def _watch(head: str, ticks: Path, begin: float, over: threading.Event) -> None:
    """What the notebook is doing: on a terminal a line that is rewritten, elsewhere a line every 30 s."""
    from prunelab.runs import progress

    lively = sys.stdout.isatty()
    shown = ""
    while not over.wait(0.5 if lively else 30):
        done, total = progress.look(ticks)
        spent = time.monotonic() - begin
        line = f"{head}: {_clock(spent)}"
        if total:
            left = f", about {_clock(spent / done * (total - done))} left" if 0 < done < total else ""
            line += f", {done:,} of {total:,} epochs{left}"
        if lively:
            print(f"{_CLEAR}{line}", end="", flush=True)
        elif line != shown:
            print(line, flush=True)
        shown = line


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def verify(artefacts: Names = (), /, write: bool = False) -> int:
    """Judge the committed numbers again; 1 when a verdict is not what they give, or a file or all of it is missing.

    Args:
        artefacts: as for reproduce; none: all.
        write: first write the verdicts that today's claims and rules give; the numbers stay.
    """
    from prunelab.headless import reproduce
    from prunelab.plots import tables

    found = reproduce.chosen(artefacts or ("all",))
    if write:
        print(f"{reproduce.rewrite(found)} files in {paths.figures()} were judged anew\n")
    checks = reproduce.verify(found)
    for check in checks:
        if check.claims:
            print(f"{check.artefact.id} ({check.preset})")
            print(f"{_fitted(tables.stored_verdicts(check.claims))}\n")
    for check in checks:
        print(f"{check.artefact.id:28s} {check.preset or '-':6s} {check.problem or check.verdict}")
    return FAILED if any(check.problem for check in checks) else 0


def status(engine: str | None = None) -> int:
    """Which artefacts, runs and data sets are there, which were made by another version; or what trains on a cluster.

    Args:
        engine: dask://HOST:PORT or ray://HOST:PORT: show what its workers train now.
    """
    if engine is not None:
        return _cluster(engine)
    from prunelab import data, papers
    from prunelab.headless import reproduce
    from prunelab.plots import gallery
    from prunelab.runs import Store, StoreError
    from prunelab.training.versions import versions

    for artefact in papers.artefacts():
        try:
            facts = gallery.saved(artefact.figure) or {}
            other = reproduce.made_otherwise(artefact.figure)
        except PrunelabError as error:
            print(f"{artefact.id:28s} {error}")
            continue
        commit = facts.get("git_commit") or ["-"]
        known = (
            f"preset {facts['preset']}, {facts.get('n', 'n = -')}, commit {', '.join(commit)}"
            if facts
            else "not made yet"
        )
        print(f"{artefact.id:28s} {known}{f'; reproduce makes it again: {other}' if other else ''}")
    store = Store()
    counts: dict[str, int] = {}
    odd = []
    for run in store.ids(unfinished=True):
        state = store.status(run)
        counts[state] = counts.get(state, 0) + 1
        try:
            found = store.place(run).manifest()
            odd += [found.made_otherwise(versions(found.run))] if found else []
        except StoreError as error:
            odd.append(str(error))
    print(f"\nruns in {store.root}: " + (", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "none"))
    for line in filter(None, odd):
        print(f"  {line}")
    ready = [row["name"] for row in data.available() if row["prepared"]]
    print(f"prepared data sets in {paths.cache()}: {', '.join(ready) or 'none'}")
    return 0


def _cluster(engine: str) -> int:
    from prunelab.training.engines import EngineError, opened, parse

    if not parse(engine)[1]:
        raise EngineError(f"engine = {engine!r}: give the address of a cluster that exists, as dask://HOST:PORT")
    with opened(engine, "cpu") as cluster:
        print(f"{cluster.describe()}: {cluster.workers} workers")
        for worker, part in cluster.running():
            print(f"{worker:28s} {part}")
    return 0


def readme() -> int:
    """Write the tables of README.md, the gallery figures/README.md, and the index notebook."""
    from prunelab.headless import readme

    print(
        "README.md, figures/README.md and the index notebook "
        + ("were brought" if readme.update() else "are")
        + " up to date"
    )
    return 0


def lab() -> int:
    """Open JupyterLab, with this Python, on the first notebook."""
    first = next(
        (p for name in ("index", "start_here") if (p := paths.notebooks() / f"{name}.ipynb").exists()),
        paths.notebooks(),
    )
    environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"}
    if importlib.util.find_spec("jupyterlab") is None:
        raise PrunelabError("JupyterLab is not installed for this Python: pip install 'prunelab[lab]'")
    command = [sys.executable, "-m", "jupyter", "lab", str(first)]
    return subprocess.run(command, cwd=paths.root(), env=environment, check=False).returncode


# -- data
# ---------------------------------------------------------------------------------------------------------------


def data_list() -> int:
    """Known data sets, and where each would come from."""
    from prunelab import data

    rows = data.available()
    wide = max(len(row["name"]) for row in rows)
    for row in rows:
        images = "" if row["images"] is None else f"{row['images']:>9,} samples"
        state = f"ready, {row['bytes'] / 1e6:,.0f} MB" if row["prepared"] else f"from {row['origin']}"
        print(f"{row['name']:{wide}s} {row['source']:30s} {images:18s} {state}")
    return 0


def data_prepare(
    name: tyro.conf.Positional[str], /, from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
) -> int:
    """Decode a data set once and for all.

    Args:
        name: of a data set; with --from it may be a new one.
        from_: a folder, zip or tar of {train,test}/<class>/<image>.
    """
    from prunelab import data

    path = data.prepare(name, from_)
    print(f"{name} is ready: {path}")
    return 0


def data_verify(name: tyro.conf.Positional[str] | None = None, /) -> int:
    """Read prepared data sets whole and compare their digests.

    Args:
        name: one data set; left out: all that are prepared.
    """
    from prunelab import data

    rows = data.verify(name)
    wide = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:{wide}s} {'sound' if row['ok'] else row['problem']}")
    if not rows:
        print("no data set is prepared yet")
    return 0 if all(row["ok"] for row in rows) else FAILED


# -- runs
# ---------------------------------------------------------------------------------------------------------------


def runs_list() -> int:
    """Every run of the store."""
    from prunelab.runs import Store

    listing = Store().list()
    columns = [
        c for c in ("id", "status", "rounds", "last_test_accuracy", "seconds", "bytes", "finished") if c in listing
    ]
    print(listing[columns].to_string(index=False) if len(listing) else f"no runs in {Store().root}")
    return 0


def runs_show(run: tyro.conf.Positional[str], /) -> int:
    """Everything about one run, as JSON.

    Args:
        run: its id, or the beginning of it.
    """
    from prunelab.runs import Store

    print(json.dumps(Store().show(run), indent=2, default=str))
    return 0


def runs_export(path: tyro.conf.Positional[Path], runs: Names = (), /) -> int:
    """Write complete runs into one tar file, to take them to another machine.

    Args:
        path: of the tar file.
        runs: ids; none: all.
    """
    from prunelab.runs import Store, archive

    print(f"{len(archive.export(Store(), path, runs or None))} runs in {path}")
    return 0


def runs_import(path: tyro.conf.Positional[Path], /) -> int:
    """Bring the runs of a tar file into the store; those that are there stay as they are.

    Args:
        path: what `prunelab runs export` wrote.
    """
    from prunelab.runs import Store, archive

    report = archive.import_(Store(), path)
    print(", ".join(f"{len(getattr(report, part))} {part}" for part in report.__dataclass_fields__))
    return 0


def runs_check(runs: Names = (), /, repair: bool = False) -> int:
    """Read every file of the runs and compare its digest; 1 where one is damaged and stays.

    Args:
        runs: ids; none: all.
        repair: drop damaged runs, so that they are trained again when they are next asked for.
    """
    from prunelab.runs import Store, archive

    counts: dict[str, int] = {}
    left = 0
    for found in archive.check(Store(), runs or None, repair):
        counts[found.state] = counts.get(found.state, 0) + 1
        left += bool(found.problem) and not found.dropped
        if found.problem:
            print(f"{found.problem}{': dropped' if found.dropped else ''}")
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or f"no runs in {Store().root}")
    return FAILED if left else 0


def runs_gc(days: float = 7, failed: bool = False, dry_run: bool = False) -> int:
    """Delete what no process will use again; complete runs are never touched.

    Args:
        days: how old an unfinished run has to be.
        failed: delete failed runs too, so that they are tried again.
        dry_run: only say what would go.
    """
    from prunelab.runs import Store, archive

    garbage = archive.gc(Store(), days, failed, dry_run)
    for item in garbage:
        print(f"{item.what}: {item.path} ({item.bytes / 1e6:,.1f} MB)")
    print(f"{sum(i.bytes for i in garbage) / 1e6:,.1f} MB {'would be' if dry_run else 'were'} freed")
    return 0


def runs_discard(run: tyro.conf.Positional[str], /) -> int:
    """Delete one run, so that it is trained again when it is next asked for.

    Args:
        run: its id, or the beginning of it.
    """
    from prunelab.runs import Store

    store = Store()
    store.discard(run_id := store.id(run))
    print(f"{run_id} is gone")
    return 0


COMMANDS: dict[str, Callable[..., int] | dict[str, Callable[..., int]]] = {
    "list": list_,
    "reproduce": reproduce,
    "compare": compare,
    "verify": verify,
    "status": status,
    "data": {"list": data_list, "prepare": data_prepare, "verify": data_verify},
    "runs": {
        "list": runs_list,
        "show": runs_show,
        "export": runs_export,
        "import": runs_import,
        "check": runs_check,
        "gc": runs_gc,
        "discard": runs_discard,
    },
    "lab": lab,
    "readme": readme,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The program: exit code 0, 1 where something failed, 2 where something was asked wrongly, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no check mark shows a question mark
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except PrunelabError as error:
        print(f"prunelab: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(
            f"{_CLEAR}prunelab: interrupted; finished rounds are kept, the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED
    except BrokenPipeError:  # `prunelab runs list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    if words[:1] in (["--version"], ["-V"]):
        print(f"prunelab {__version__}")
        return 0
    program, table = "prunelab", COMMANDS
    while True:
        if not words or words[0] in ("-h", "--help"):
            print(_overview(program, table))
            return 0 if words else WRONG
        if words[0] not in table:
            asked = f"{program} {words[0]}".partition(" ")[2]
            raise PrunelabError(f"there is no command {asked!r}: {nearest(words[0], table)}")
        program, command, words = f"{program} {words[0]}", table[words[0]], words[1:]
        if callable(command):
            break
        table = command  # type: ignore[assignment]
    return _parsed(command, program, words)()


def _parsed(command: Callable[..., int], program: str, words: list[str]) -> Callable[[], int]:
    """The command with its arguments, not yet called; what tyro says about wrong ones becomes one line."""

    @functools.wraps(command)
    def later(*positional: object, **options: object) -> Callable[[], int]:
        return functools.partial(command, *positional, **options)

    said = io.StringIO()
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(later, prog=program, args=words, config=config)
    except SystemExit as stop:
        if not stop.code:  # it has shown the help
            return lambda: 0
    options = inspect.signature(command).parameters.values()
    known = ["--" + p.name.strip("_").replace("_", "-") for p in options if p.kind is not p.POSITIONAL_ONLY]
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            raise PrunelabError(f"{program.partition(' ')[2]} has no option {flag!r}: {nearest(flag, known)}")
    raise PrunelabError(f"{_complaint(said.getvalue()) or 'these arguments mean nothing'}; `{program} -h` says more")


def _complaint(box: str) -> str:
    """The first paragraph of a box as tyro draws them: a title, then paragraphs that rules divide."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│|╭╮╰╯+ ") for line in plain.strip().splitlines()[1:]]
    rules = [not line.strip("─-") for line in lines]
    paragraphs = itertools.groupby(zip(lines, rules, strict=True), key=lambda pair: pair[1])
    found = (" ".join(line for line, _ in group) for rule, group in paragraphs if not rule)
    return next(found, "").partition(" Got errors:")[0].strip(" .")


def _overview(program: str, table: dict) -> str:
    lines = [f"usage: {program} COMMAND ...", ""]
    for name, command in table.items():
        words = command.__doc__.splitlines()[0] if callable(command) else ", ".join(command)
        lines.append(f"  {name:10s} {words}")
    return "\n".join([*lines, "", f"{program} COMMAND -h says more."])


if __name__ == "__main__":
    sys.exit(main())
