"""The process in which a watched run trains: it says in lines of JSON what happens, and does what it is told.

``python -m prunelab.lab.theatre.stage`` reads its first line as ``{"run", "root", "device", "threads", "pace"}`` and
every other one as a word of ``WORDS``. It is a process of its own so that no interrupt, restart or crash of the kernel
leaves anything behind: an interrupt reaches it too, and where its input ends, it ends. Then it has ``GRACE`` to finish
its epoch and save; a training in a thread could be told nothing while the kernel is idle.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from prunelab import models, pruners
from prunelab.data import load
from prunelab.plots import network_svg
from prunelab.runs import Store, frames, records
from prunelab.settings import Run
from prunelab.structure.chains import ShrinkError, chain
from prunelab.training.experiment import train_population
from prunelab.training.observe import Seen, most_epochs, pruned_after
from prunelab.training.train import device

WORDS = ("go on", "pause", "prune", "stop")
EVERY = 0.3  # seconds between two messages at least
DRAW = 0.9  # seconds between two drawings at least
SAVE = 20.0  # seconds of training that a crash may cost, at most, and the epoch that it happens in
GRACE = 2.0  # seconds to end by itself, once the kernel was interrupted or is gone
INTERRUPTED = 130  # what it exits with where that was not enough


class Stage:
    """What the trainer asks after every epoch: shows how things stand, waits while it is paused, passes wishes on.

    Args:
        say: takes each message.
        store: to see whether a run that is pruned on request is there already.
        pace: seconds that an epoch takes at least.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None], store: Store, pace: float = 0.0) -> None:
        self.next: Run | None = None  # the run to go on with: one that was pruned here before, and is in the store
        self._say, self._store = say, store
        self._told = threading.Condition()
        self._paused = self._prune = self._stop = False
        self._drawn = self._sent = -float("inf")
        self._saved = self._asked = time.monotonic()
        self._pace = pace
        self._known: list[tuple[Any, ...]] = []  # the rows that were sent, as far as they can change
        self._id, self._drawing, self._begins = "", "", True

    def begin(self) -> None:
        """A run is trained from here on; what is wished before its first epoch is done after it."""
        self.next, self._begins = None, True

    def tell(self, word: str) -> None:
        """Do as told, now or after the epoch; what is no word of ``WORDS`` is a mistake of the program."""
        with self._told:
            if word not in WORDS:
                raise ValueError(f"{word!r} is none of {WORDS}")
            self._stop |= word == "stop"
            self._prune |= word == "prune"
            self._paused = {"pause": True, "go on": False}.get(word, self._paused)
            self._told.notify_all()

    def __call__(self, now: Seen) -> Literal["go on", "prune", "save", "stop"]:
        """See ``experiment.Watch``."""
        if now.over or self._begins:
            self._begins = False
            self._show(now, at_once=True)
            return "go on"
        with self._told:
            self._told.wait_for(lambda: self._paused or self._wanted(now), self._asked + self._pace - time.monotonic())
            self._asked = time.monotonic()
            waits = self._paused and not self._wanted(now)
            self._show(now, at_once=waits)
            self._told.wait_for(lambda: not self._paused or self._wanted(now))
            if waits and not self._paused:
                self._show(now, at_once=True)
            if self._stop:
                return "stop"
            if self._prune and now.may_prune:
                self._prune = False
                other = pruned_after(now.run, int(now.epochs[-1]["epoch"]))
                self.next = None if self._store.status(other) == "missing" else other
                return "stop" if self.next else "prune"
        if time.monotonic() - self._saved > SAVE:
            self._saved = time.monotonic()
            return "save"
        return "go on"

    def _wanted(self, now: Seen) -> bool:
        return self._stop or (self._prune and now.may_prune)

    def _show(self, now: Seen, at_once: bool) -> None:
        """Say what is new: rows, weights and, where there was time for it, a drawing."""
        moment = time.monotonic()
        changed = [(row["epoch"], row["pruned"], row["test_loss"]) for row in now.epochs]
        same = sum(a[:2] == b[:2] for a, b in zip(self._known, changed, strict=False))
        at_once |= len(self._known) > same  # the last row is not what was shown
        if not (at_once or moment - self._sent >= EVERY):
            return
        message: dict[str, Any] = {
            "after": same,
            "epochs": now.epochs[same:],
            "budget": now.budget,
            "weights": [now.weights, now.weights_total],
            "may_prune": now.may_prune,
            "paused": self._paused and not now.over,
        }
        if now.run.id != self._id:
            self._id = now.run.id
            message |= {"run": now.run.asdict(), "after": 0, "epochs": list(now.epochs)}
        if at_once or moment - self._drawn >= DRAW:
            drawing = drawn(now)
            message |= {"drawing": drawing} if drawing != self._drawing else {}
            self._drawing, self._drawn = drawing, time.monotonic()
        self._say(message)
        self._sent, self._known = time.monotonic(), changed


def drawn(now: Seen) -> str:
    """The network as it is now."""
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in now.model.named_parameters()}
    masks = {name: mask.cpu().numpy() for name, mask in now.masks.items()}
    return _drawing(now.model, weights, masks, list(now.widths.values()), now.epochs)


def stored(run: Run, store: Store) -> dict[str, Any]:
    """What the store has of a run, as a message: all its rows, and the network after the last of them."""
    status, place = store.status(run), store.place(run.id)
    data = load(run.data)
    dense = models.build(run.model, data.shape, len(data.classes), run.seed)
    total = pruners.first_masks(dense, pruners.build(run.prune), run.prune.layers).weights.total
    rows: list[dict[str, Any]] = []
    if place.folder.is_dir() or place.partial.is_dir():
        table = store.epochs(run, unfinished=True)
        rows = [{str(k): v for k, v in row.items() if k in frames.EPOCHS} for row in table.to_dict("records")]
    if status == "complete":
        weights, masks = store.weights(run), store.masks(run)
    else:
        path = place.partial / records.CHECKPOINT
        tensors = records.read(path, records.decode_checkpoint).tensors if path.exists() else {}
        weights, masks = (
            {name.removeprefix(part): array for name, array in tensors.items() if name.startswith(part)}
            for part in ("model/", "mask/")
        )
    weights = weights or {name: tensor.detach().numpy() for name, tensor in dense.named_parameters()}
    kept = sum(int(mask.sum()) for mask in masks.values() if mask.ndim > 1) if masks else total
    widths = [units for _, units in models.layer_widths(dense)]
    return {
        "after": 0,
        "epochs": rows,
        "budget": most_epochs(run),
        "weights": [kept, total],
        "may_prune": False,
        "paused": False,
        "drawing": _drawing(dense, weights, masks, widths, rows),
    }


def _drawing(
    model: nn.Module,
    weights: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    widths: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """The network, whose layers are in the order of ``model``; bars of its layers where it is no chain."""
    words = f"after epoch {rows[-1]['epoch']}" if rows else "before training"
    try:
        return network_svg.network([weights[f"{link.name}.weight"] for link in chain(model)], widths, words)
    except ShrinkError:
        bars = [(name, int(mask.sum()), mask.size) for name, mask in masks.items() if mask.ndim > 1]
        return network_svg.layers(bars or [(n, w.size, w.size) for n, w in weights.items() if w.ndim > 1], words)


def play(asked: dict[str, Any], stage: Stage, store: Store) -> None:
    """Train the run, and, where a pruning on request leads to a run that is there already, go on with that one."""
    torch.set_num_threads(asked["threads"])
    run: Run | None = Run.fromdict(asked["run"])
    where = str(device(asked["device"]))
    while run is not None:
        stage.begin()
        train_population([run], store, where, watch=stage)
        run = stage.next


def main() -> None:
    """Play what standard input asks for; standard output belongs to the messages alone."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    speaking = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with speaking:
            out.write(json.dumps(message) + "\n")
            out.flush()

    asked = json.loads(sys.stdin.readline() or "null")
    if asked is None:
        return
    store = Store(asked["root"])
    stage = Stage(say, store, asked["pace"])
    ending = threading.Event()

    def end(*_: Any) -> None:
        """Stop after this epoch, or in the midst of it where it takes too long."""
        if not ending.is_set():
            ending.set()
            threading.Timer(GRACE, os._exit, [INTERRUPTED]).start()
            threading.Thread(target=stage.tell, args=["stop"], daemon=True).start()  # the lock may be ours

    def listen() -> None:
        try:
            for line in sys.stdin:
                stage.tell(json.loads(line))
        finally:
            end()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    threading.Thread(target=listen, daemon=True).start()
    try:
        play(asked, stage, store)
    except BaseException as error:  # noqa: BLE001 (said to whoever watches, who raises it)
        lines = traceback.format_exception(error)
        say({"error": {"ename": type(error).__name__, "evalue": str(error), "traceback": lines}})
    finally:
        out.flush()
        os._exit(0)  # without waiting for the thread that listens


if __name__ == "__main__":
    main()
