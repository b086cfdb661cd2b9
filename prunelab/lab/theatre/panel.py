"""A run that is watched while it trains: what it does, what is decided, what is left, and four buttons.

The one trainer trains it, in a process of its own (``theatre.stage``); here are the controls, and what is heard from
there is drawn. What is shown are the rows that the run stores.
"""

from __future__ import annotations

import contextlib
import html
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any, Literal

import pandas as pd
import torch

from prunelab import pruners
from prunelab.errors import PrunelabError, as_output
from prunelab.lab.page import around, widgets
from prunelab.lab.theatre import view
from prunelab.lab.theatre.stage import GRACE, INTERRUPTED, stored
from prunelab.pruners.dyprune import DyPrune
from prunelab.runs import Store, frames
from prunelab.settings import Run
from prunelab.training import experiment
from prunelab.training.train import device as find_device

State = Literal[
    "ready", "starting", "training", "pausing", "paused", "stopping", "stopped", "complete", "failed", "broken"
]
OFFERED: dict[str, set[str]] = {  # the buttons that do something in a state; in the others, none does
    "ready": {"start"},
    "starting": {"stop"},
    "training": {"pause", "prune", "stop"},
    "pausing": {"start", "prune", "stop"},
    "paused": {"start", "prune", "stop"},
    "stopping": {"stop"},
    "stopped": {"start"},
    "broken": {"start"},
}
QUIET = {0, INTERRUPTED, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL}  # how a process ends that was told to


class TrainingTheatre(widgets.VBox):
    """Watch a run train: loss, accuracy, the trigger and the rate of DyPrune, weights left, the network; and act.

    The run is an ordinary one: it lands in the store with the rows that it would have had anyway, and one that was
    stopped goes on where it was. "Prune now" prunes after the epoch that is running; from then on it is another run,
    whose settings (``Prune.also_after``) say so. Training ends with the kernel, and when the kernel is interrupted. An
    error is shown in red in the widget; ``check`` raises it again. Where nobody can press a button, as under
    papermill, the run is trained before the widget is shown, and its errors are raised.

    Attributes:
        run: the settings of the run that is shown.
        state: ``ready``, ``starting``, ``training``, ``pausing``, ``paused``, ``stopping``, ``stopped``, ``complete``,
            ``failed`` or ``broken``.
        store: where it lands.
        buttons: ``start``, ``pause``, ``prune`` and ``stop``, by these names.

    Args:
        settings: the run. One that is stored already is shown as it was.
        store: None: the store of the repository, or of ``PRUNELAB_RUNS``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        pace: seconds that an epoch takes at least, so that eyes can follow; the waiting is in no number.
        at_once: train before anything else happens; None: where the cell was sent by a program that answers no
            questions.

    Raises:
        PrunelabError: one line, before anything trains.
    """

    def __init__(
        self,
        settings: Run,
        *,
        store: Store | None = None,
        device: str = "auto",
        pace: float = 0.0,
        at_once: bool | None = None,
    ) -> None:
        if not isinstance(settings, Run):
            raise PrunelabError(f"TrainingTheatre: settings is a {type(settings).__name__}: give a prunelab.Run")
        if not isinstance(pace, int | float) or not 0 <= pace < 60:
            raise PrunelabError(f"TrainingTheatre: pace = {pace!r}: should be seconds per epoch, from 0 to 60")
        at_once = _nobody_is_there() if at_once is None else at_once
        self._pace = 0.0 if at_once else float(pace)
        self.store, self._device = store or Store(), str(find_device(device))
        experiment.check([settings])
        if (leader := settings.prune.masks_of) and self.store.status(leader) != "complete":
            raise PrunelabError(f"run {settings.id} follows {leader!r}, which is not in the store: train that first")
        self.run, self._asked = settings, settings
        self.state: State = "ready"
        self._lock = threading.RLock()
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None
        self._failure: Exception | None = None
        self._rows: list[dict[str, Any]] = []
        super().__init__(around(*self._controls()))
        self.add_class("prunelab-page")
        self._look_up()
        if at_once:
            self.start()
            self.wait()
            self.check()

    @property
    def epochs(self) -> pd.DataFrame:
        """The rows that are shown, one per epoch, with the columns of ``Store.epochs`` that are no settings."""
        with self._lock:
            return pd.DataFrame(self._rows, columns=list(frames.EPOCHS))

    def start(self) -> None:
        """Begin, or go on after a pause or a stop; what is stored already is not trained again."""
        self._act("start")

    def pause(self) -> None:
        """Wait, once the epoch is done that is running."""
        self._act("pause")

    def prune_now(self) -> None:
        """Prune after the epoch that is running, or at once when paused; from then on it is another run."""
        self._act("prune")

    def stop(self) -> None:
        """Save after the epoch that is running, and end; asked again: end at once."""
        self._act("stop")

    def wait(self, seconds: float | None = None) -> None:
        """Until the training has ended, or so many seconds; an interrupt stops it.

        The kernel is busy meanwhile, so nobody can press a button.
        """
        try:
            if self._listener is not None:
                self._listener.join(seconds)
        except KeyboardInterrupt:
            self.stop()
            raise

    def check(self) -> None:
        """Raise the first error that there was, if there was any; a run that failed is one."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Take the widget off the screen and end the training, if there is one."""
        process = getattr(self, "_process", None)
        if process is not None:
            _say_no_more(process)
        super().close()

    def __repr__(self) -> str:
        return self._words()

    # -- the screen ---------------------------------------------------------------------------------------------------

    def _controls(self) -> list[widgets.Widget]:
        """Everything on the screen, from top to bottom, which is also the order of the keyboard."""

        def button(description: str, icon: str, tooltip: str, act: Any) -> widgets.Button:
            made = widgets.Button(description=description, icon=icon, tooltip=tooltip, layout={"width": "9.5em"})
            made.on_click(lambda _: act())
            return made

        self.buttons = {
            "start": button("start", "play", "train, or go on", self.start),
            "pause": button("pause", "pause", "wait after this epoch", self.pause),
            "prune": button("prune now", "scissors", "after this epoch, or at once when paused", self.prune_now),
            "stop": button("stop", "stop", "save after this epoch, and end", self.stop),
        }
        self._sentence, self._panel, self._errors = widgets.HTML(), widgets.HTML(), widgets.Output()
        row = widgets.HBox(list(self.buttons.values()), layout={"flex_flow": "row wrap"})
        return [row, self._sentence, self._panel, self._errors]

    def _act(self, button: str) -> None:
        """Do what a button says, where it can be pressed now; an error is shown and raised."""
        with self._lock:
            if self.buttons[button].disabled:
                return
            try:
                if button != "start":
                    if self.state == "stopping" and self._process is not None:
                        self._process.kill()
                    self.state = {"pause": "pausing", "stop": "stopping"}.get(button, self.state)
                    self._tell(button)
                elif self._process is not None:
                    self.state = "training"
                    self._tell("go on")
                else:
                    self._open()
                    self.state = "starting"
                self._paint()
            except Exception as error:
                self._fail(error)
                raise

    def _paint(self) -> None:
        """Show what is known."""
        offered = OFFERED.get(self.state, set())
        for name, button in self.buttons.items():
            button.disabled = name not in offered or (name == "prune" and not self._may_prune)
        self.buttons["start"].description = "go on" if self._rows and self.state != "complete" else "start"
        self.buttons["stop"].description = "stop at once" if self.state == "stopping" else "stop"
        words, decision = html.escape(self._words()), html.escape(self._decision())
        room = "min-height: 2.9em; line-height: 1.45"  # two lines, so that nothing below them moves
        self._sentence.value = f'<div style="{room}"><span role="status">{words}</span><br>{decision}</div>'
        pruner = pruners.build(self.run.prune)
        window = (pruner.minimum, pruner.maximum) if isinstance(pruner, DyPrune) else None
        self._panel.value = view.panel(self._rows, self._budget, self._weights, self._drawing, window)

    def _words(self) -> str:
        """Where the run stands, in a sentence."""
        epoch = f"epoch {self._rows[-1]['epoch']}" if self._rows else "the first epoch"
        words = {
            "ready": "Not trained yet: press start.",
            "starting": "Getting ready.",
            "training": "Training.",
            "pausing": "Pausing after this epoch.",
            "paused": f"Paused after {epoch}.",
            "stopping": "Stopping after this epoch; at once, and what was not saved will be trained again.",
            "stopped": f"Stopped after {epoch}, and goes on from there.",
            "complete": f"Complete after {epoch}, and in the store.",
            "failed": f"Failed after {epoch}: {self._failure}.",
            "broken": "Ended with the error below.",
        }[self.state]
        if self.run == self._asked:
            return f"{words} Run {self.run.id}."
        also = " and ".join(map(str, self.run.prune.also_after))
        return f"{words} Pruned on request after epoch {also}, which makes it another run: {self.run.id}."

    def _decision(self) -> str:
        """What was decided after the newest epoch, with the numbers of its row."""
        if not self._rows:
            return ""
        row, pruner = self._rows[-1], pruners.build(self.run.prune)
        words = []
        if isinstance(pruner, DyPrune):
            value = row["trigger"]
            words.append("no trigger yet" if value is None or math.isnan(value) else f"trigger {value:.3g}")
            low = f"from {pruner.minimum:g} " if pruner.minimum >= -1 else ""
            when = f"{low}up to {pruner.maximum:g}, then waits {pruner.cooldown} epochs"
            words.append(f"DyPrune prunes {when if pruner.trigger == 'dynamic' else f'every {pruner.every} epochs'}")
        if pruned := view.prunings([row], self._weights[0]):
            rate = row["rate"]
            asked = "" if rate is None or math.isnan(rate) else f"rate {rate:.3f}, "
            words.append(f"pruned: {asked}{100 * pruned[0][1]:.1f} % of the weights went")
        else:
            words.append("not pruned")
        return f"After epoch {row['epoch']}: {'; '.join(words)}."

    def _fail(self, error: Exception, trace: list[str] | None = None) -> None:
        """Keep the first error, show the newest."""
        self._failure = self._failure or error
        self._errors.outputs = (as_output(error, trace),)

    # -- the process --------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Start the process, and a thread that listens to it; both end with the kernel."""
        if self.store.status(self.run) == "running":
            raise PrunelabError(
                f"{self.run.id} is being trained already: wait for it, or, if in this kernel, interrupt it"
            )
        self._failure, self._errors.outputs = None, ()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (the thread closes it)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "encoding": "utf-8"}
        self._process = subprocess.Popen([sys.executable, "-m", "prunelab.lab.theatre.stage"], **pipes)
        asked = {"run": self.run.asdict(), "root": str(self.store.root.resolve()), "device": self._device}
        self._tell({**asked, "threads": torch.get_num_threads(), "pace": self._pace})
        self._listener = threading.Thread(target=self._listen, args=(self._process, errors), daemon=True)
        self._listener.start()

    def _tell(self, what: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # it ended at this moment, which the listener will find
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(json.dumps(what) + "\n")
                self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        """In a thread: show what the process says until it ends, then what it left in the store."""
        try:
            for line in process.stdout or ():
                with self._lock:
                    self._take(json.loads(line))
                    self._paint()
        except Exception as error:  # noqa: BLE001 (shown, and raised by check)
            self._fail(error)
        _hang_up(process)
        with errors:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        with self._lock:
            self._process = None
            if process.returncode not in QUIET and self._failure is None:
                self._fail(PrunelabError(f"the training broke off, exit status {process.returncode}: {last}"))
            try:
                self._look_up()
            except Exception as error:  # noqa: BLE001 (shown, and raised by check)
                self._fail(error)

    def _take(self, message: dict[str, Any]) -> None:
        """Make what was said what is known."""
        if said := message.get("error"):
            self._fail(PrunelabError(f"the training ended: {said['ename']}: {said['evalue']}"), said["traceback"])
            return
        if "run" in message:
            self.run = Run.fromdict(message["run"])
        self._rows[message["after"] :] = message["epochs"]
        self._budget, self._weights, self._may_prune = message["budget"], message["weights"], message["may_prune"]
        self._drawing = message.get("drawing", getattr(self, "_drawing", ""))
        if message["paused"] and self.state == "pausing":
            self.state = "paused"
        elif self.state == "starting":
            self.state = "training"

    def _look_up(self) -> None:
        """Take what the store has in place of what was heard, and show it."""
        self._take(stored(self.run, self.store))
        status = self.store.status(self.run)
        if status == "failed":
            self._failure = PrunelabError(f"{self.store.place(self.run.id).reason()}")
        if status in ("complete", "failed"):
            self.state = status
        elif self._failure is not None:
            self.state = "broken"
        else:
            self.state = "stopped" if self._rows else "ready"
        self._paint()


def _hang_up(process: subprocess.Popen[str]) -> None:
    """End a process: where its input ends it saves and ends; one that does not is killed."""
    _say_no_more(process)
    try:
        process.wait(GRACE + 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _say_no_more(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        if process.stdin is not None:
            process.stdin.close()


def _nobody_is_there() -> bool:
    """Whether the cell that runs was sent by a program that answers no questions, such as papermill or nbconvert."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and kernel.get_parent().get("content", {}).get("allow_stdin") is False
