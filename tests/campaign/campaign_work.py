"""What is killed, filled up and locked out: the work of the campaign, in children that are forked from one process.

``python campaign_work.py`` reads lines of JSON: ``{"do", ...}`` forks a child that does it and prints its number,
``{"wait"}`` prints how it ended. torch is loaded once, so that hundreds of children cost little.
"""
# ruff: noqa: T201 - it talks to the tests by what it prints

import json
import logging
import os
import random
import resource
import sys
import traceback

import numpy as np
import pandas as pd

from prunelab.errors import PrunelabError
from prunelab.plots import gallery
from prunelab.runs import Checkpoint, Store, archive
from prunelab.settings import Data, Model, Prune, Run, Train

DATA = Data("digits", train_size=200, test_size=200)


def studied(count, epochs=2):
    """Runs that take parts of a second each, with two prunings."""
    train = Train(epochs=epochs, batch_size=32, lr=3e-3)
    return [
        Run(DATA, Model("mlp", (8,)), train, Prune("magnitude", amount=0.5, rounds=2), seed=seed)
        for seed in range(count)
    ]


def sweep(root, count, jobs=1, epochs=2):
    from prunelab.training.experiment import run_all

    print(run_all(studied(count, epochs), store=root, jobs=jobs, progress=False))


def fake(root, count, seed, size=20_000):
    """Three rounds of each run in an order of its own, without torch: what is saved tells who and when."""
    runs = [Run(seed=number) for number in range(count)]
    random.Random(seed).shuffle(runs)
    for run in runs:
        with Store(root).claim(run) as writer:
            if writer.complete:
                continue
            begun = writer.checkpoint
            for done in range(1 if begun is None else begun.state["done"] + 1, 4):
                rows = [{"round": r, "test_accuracy": run.seed + r / 10} for r in range(done)]
                tensors = {"w": np.full(size, run.seed + done / 10)}
                writer.save(
                    Checkpoint(tensors, {"done": done}, rows, [{"round": r, "epoch": r + 1} for r in range(done)])
                )
            writer.finish({"w": np.full(size, float(run.seed))}, {"w": np.ones(size, bool)})


def export(root, path):
    archive.export(Store(root), path)


def bring(root, path):
    archive.import_(Store(root), path)


def clear(root):
    archive.gc(Store(root), days=0, failed=True, dry_run=False)


def figure(folder, number):
    class Picture:
        alt = "a picture"

        def png(self):
            return bytes([number % 256]) * 3_000_000

    os.environ["PRUNELAB_FIGURES"] = os.environ["PRUNELAB_OUT"] = folder
    gallery.save(Picture(), "toy/line", pd.DataFrame({"x": [float(number)] * 5_000}), {"preset": "quick", "n": number})


def _child(order):
    """In the child: do it; 0 done, 3 refused in one line, 4 a traceback."""
    os.setsid()
    with open(order["log"], "w") as log:  # noqa: PTH123
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
    try:
        if "bytes" in order:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["bytes"], order["bytes"]))
        if order.get("nobody"):
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        WORK[order["do"]](**order["with"])
        code = 0
    except PrunelabError as error:
        print(f"REFUSED {error}", file=sys.stderr)
        code = 3 if "\n" not in str(error) else 4
    except BaseException:  # noqa: BLE001 - told apart from what is refused
        traceback.print_exc()
        code = 4
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


WORK = {one.__name__: one for one in (sweep, fake, export, bring, clear, figure)}


def main():
    import torch

    from prunelab.data import load
    from prunelab.training import experiment  # noqa: F401 - so that the children have it

    torch.set_num_threads(1)
    load(DATA)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif (child := os.fork()) == 0:
            _child(order)
        else:
            print(child, flush=True)


if __name__ == "__main__":
    main()
