"""Run a notebook headless through papermill, and refuse every failure that papermill keeps quiet about.

papermill runs the default of a misspelt parameter, calls a run that timed out or lost its kernel "completed", takes
``sys.exit(0)`` for success, and never sees an error inside an ``Output`` widget. Here a notebook either ran from its
first to its last cell with the values that were asked for, or it is a ``NotebookFailed`` with one line that says why.
No other module knows papermill.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from prunelab import paths
from prunelab.headless.form import (
    KERNEL,
    NotebookFailed,
    Parameter,
    check_parameters,
    declared_parameters,
    parse_assignment,
    short,
    tags,
    tidy,
)
from prunelab.runs.scratch import scratch

__all__ = [
    "NotebookFailed",
    "Parameter",
    "check_parameters",
    "declared_parameters",
    "parse_assignment",
    "run",
    "tidy",
]

# Seconds for a kernel to go once its work is done: half of them before it is told again, half before it is killed. One
# ipykernel in ten blocks itself while it shuts down (7.4.0), and would take 3 s more each time.
SHUTDOWN = 2.0
OWN_CELLS = {"injected-parameters", "papermill-error-cell-tag"}  # tags of the cells that papermill adds


def run(
    path: str | Path,
    out: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    cwd: Path | None = None,
    cell_timeout: float | None = None,
    time_limit: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Execute a notebook from its first to its last cell; the executed copy appears only when every cell ran cleanly.

    The kernel is the interpreter that runs prunelab, whatever kernels are registered on the machine. papermill changes
    the directory of the whole process while it runs, so call this from one thread only.

    Args:
        path: The notebook.
        out: Where the executed copy goes; a failed one lies beside it as ``<stem>.failed.ipynb``.
        parameters: What replaces the defaults of the ``parameters`` cell.
        cwd: Working directory of the kernel; None: the repository root.
        cell_timeout: Seconds that one cell may take; None: no limit.
        time_limit: Seconds that all cells together may take; None: no limit.
        environment: Variables that the kernel has on top of this process's own.

    Raises:
        NotebookFailed: One line with every reason. After ``KeyboardInterrupt`` no file is left and no kernel runs.
    """
    path, out = Path(path), Path(out)
    values = check_parameters(path, parameters or {})
    cwd = paths.root() if cwd is None else Path(cwd)
    failed = out.with_suffix(".failed.ipynb")
    _check_places(path, out, cwd)
    with scratch() as folder:
        part = folder / "part.ipynb"
        reasons = _execute(path, part, values, cwd, folder, cell_timeout, time_limit, environment or {})
        if reasons:
            kept = f"; see {failed}" if part.exists() and _move(part, failed) else ""
            raise NotebookFailed(f"{path}: {'; '.join(reasons)}{kept}")
        _move(part, out)
        failed.unlink(missing_ok=True)


def _check_places(path: Path, out: Path, cwd: Path) -> None:
    if out.suffix != ".ipynb" or out.resolve() == path.resolve():
        raise NotebookFailed(f"{path}: cannot write the executed copy to {out}; give another file that ends in .ipynb")
    if not cwd.is_dir():
        raise NotebookFailed(f"{path}: working directory {cwd} does not exist")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass  # a folder that takes no file is better met now than after an hour of training
    except OSError as error:
        raise NotebookFailed(f"{path}: cannot write into {out.parent}: {error.strerror}") from None


def _move(part: Path, target: Path) -> bool:
    """Put a file in its place at one stroke, also across file systems."""
    with paths.replacing(target) as near:
        shutil.copyfile(part, near)
    return True


def _execute(
    path: Path,
    part: Path,
    values: dict[str, Any],
    cwd: Path,
    scratch: Path,
    cell_timeout: float | None,
    time_limit: float | None,
    environment: Mapping[str, str],
) -> list[str]:
    """Let papermill run the notebook into ``part``; returns every reason to call it failed, none for success."""
    import papermill  # here, because it takes a second that listing and checking need not wait for
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    log_of_papermill = logging.getLogger("papermill")
    loudness = log_of_papermill.level
    log_of_papermill.setLevel(logging.CRITICAL + 1)  # what it logs is a reason below, in fewer words
    end = math.inf if time_limit is None else time.monotonic() + time_limit
    log = scratch / "kernel.log"
    current = ""  # id of the cell that runs

    def seconds_left(cell: NotebookNode) -> float | None:
        nonlocal current
        current = cell.get("id", "")
        left = min(end - time.monotonic(), math.inf if cell_timeout is None else cell_timeout)
        return None if math.isinf(left) else max(left, 0.001)  # 0 would mean no limit

    reason = fate = told = ""
    try:
        papermill.execute_notebook(
            _no_fields(path),
            _no_fields(part),
            values,
            kernel_name=KERNEL,
            language="python",
            cwd=str(cwd),
            progress_bar=False,
            start_timeout=120,
            iopub_timeout=60,  # the default of 4 s is too short for a figure on a busy machine
            timeout_func=seconds_left,
            kernel_manager_class=_own_kernel(scratch, log, environment),
            config=Config({"KernelManager": {**_transport(scratch), "shutdown_wait_time": SHUTDOWN}}),
        )
    except KeyboardInterrupt:  # the cell ends with one too, and nobody is left whom its task could tell
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
        raise
    except papermill.PapermillExecutionError as error:
        told = short(str(error))  # the executed copy has it too, with the number of its cell
    except CellTimeoutError:
        all_cells = time.monotonic() >= end
        fate = f"was cut off: all cells took {time_limit:g} s" if all_cells else f"took longer than {cell_timeout:g} s"
    except DeadKernelError:
        fate = "lost its kernel, as happens when memory runs out"
    except Exception as error:  # noqa: BLE001 - whatever papermill and its libraries raise is a reason, and is told
        reason = short(f"{type(error).__name__}: {error}") + _last_line(log)
    finally:
        log_of_papermill.setLevel(loudness)
    found = _problems(nbformat.read(part, 4), current, fate) if part.exists() else []
    if reason or not found:  # whatever was raised, it is never taken for success
        found = [line for line in (reason or fate or told, *found) if line]
    return found


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((f" ({short(line)})" for line in reversed(lines) if line.strip()), "")


def _no_fields(path: Path) -> str:
    """The path for papermill, which fills in ``{name}``: a brace that is meant has to be doubled."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def _own_kernel(scratch: Path, log: Path, environment: Mapping[str, str]) -> type:
    """A kernel manager that starts this interpreter, instead of whatever is registered as ``python3`` for this user.

    The kernel gets an IPython folder of its own, so that no start-up file or history of the user takes part, and what
    it says outside its cells goes to ``log``.
    """
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.channels import AsyncZMQSocketChannel
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    variables = {"IPYTHONDIR": str(scratch / "ipython"), **environment}
    escaped = {name: value.replace("$", "$$") for name, value in variables.items()}  # the values are templates there

    class WakefulChannel(AsyncZMQSocketChannel):
        def send(self, msg: dict[str, Any]) -> None:
            # Sending (what answers an Output widget) takes away the signal that a reply has come in meanwhile, and the
            # cell would wait for that reply for ever (jupyter_client 8.10). To ask for the events gives it back.
            super().send(msg)
            self.socket.get(zmq.EVENTS)

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict(), env=escaped)

        async def start_kernel(self, **options: Any) -> None:
            with log.open("wb") as stderr:  # the kernel has its own copy of the handle
                await AsyncKernelManager.start_kernel(self, stderr=stderr, **options)

        def client(self, **options: Any) -> Any:
            client = super().client(**options)
            client.shell_channel_class = WakefulChannel
            return client

    return OwnKernel


def _transport(scratch: Path) -> dict[str, str]:
    """Sockets that no other run can hold: files in the scratch folder; TCP where a path cannot be a socket."""
    sockets = str(scratch / "k")
    return {"transport": "ipc", "ip": sockets} if os.name == "posix" and len(sockets.encode()) < 90 else {}


def _problems(notebook: NotebookNode, current: str, fate: str) -> list[str]:
    """Everything that says that an executed notebook is not a finished one.

    The status that papermill writes is not believed: only a cell that has an execution count ran.

    Args:
        notebook: The executed copy.
        current: Id of the cell that ran last.
        fate: What ended that cell from outside; empty when nothing did.
    """
    found, idle, number = [], [], 0
    for cell in notebook.cells:
        own = bool(OWN_CELLS.intersection(tags(cell)))
        number += not own
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        where = "the cell of parameters given" if own else f"cell {number}"
        if fate and cell.get("id") == current:
            found.append(f"{where} {fate}")
            continue
        if cell.get("execution_count") is None:
            idle.append(where)
        found += [f"{where} raised {_error(output)}" for output in cell.outputs if output.output_type == "error"]
    state = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for model in state.values():
        outputs = model.get("state", {}).get("outputs") or []
        found += [f"a widget raised {_error(output)}" for output in outputs if output["output_type"] == "error"]
    return [*found, *([f"never ran: {', '.join(idle)}"] if idle else [])]


def _error(output: Mapping[str, Any]) -> str:
    return short(f"{output['ename']}: {output['evalue']}")
