"""Files of every kind with random changes: read as they were or refused in one line, and never as other numbers."""

import hashlib
import json
import random
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from prunelab import data, paths, prune
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.plots import gallery
from prunelab.runs import Checkpoint, Store, archive
from prunelab.settings import Prune, Run
from prunelab.structure import export

RUN = Run(seed=3, prune=Prune(method="dropnet", rounds=2))
TRIALS = [30, pytest.param(500, marks=pytest.mark.slow)]


def changed(content, draw):
    """Bytes with one random damage: bits, bytes, a piece that is lost, doubled, zero or from elsewhere, an end."""
    content, size = bytearray(content), len(content)
    at, length = draw.randrange(size), draw.choice([1, 2, 8, 64, 512])
    what = draw.randrange(8)
    if what <= 2:
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            content[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif what == 3:
        content[at : at + length] = draw.randbytes(min(length, size - at))
    elif what == 4:
        content[at : at + length] = bytes(min(length, size - at))
    elif what == 5:
        del content[at : at + length]
    elif what == 6:
        content[at:at] = content[at : at + length]
    else:
        content = content[:at] if draw.random() < 0.7 else content + draw.randbytes(length)
    return bytes(content)


def same(value):
    """A digest of anything that a reader gives."""
    if isinstance(value, pd.DataFrame):
        value = value.to_json(double_precision=15, orient="split")
    if isinstance(value, dict):
        value = sorted((name, same(entry)) for name, entry in value.items())
    if isinstance(value, np.ndarray | torch.Tensor):
        array = np.asarray(value)
        value = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
    return hashlib.sha256(repr(value).encode()).hexdigest()


def saved(store):
    rng = np.random.default_rng(0)
    mask = rng.random((40, 30)) < 0.5
    weights = {"a.weight": rng.normal(size=(40, 30)).astype(np.float32), "a.bias": np.zeros(40, np.float32)}
    removals = {
        "round/a.weight": np.where(mask, -1, 1).astype(np.int16),
        "score/a.weight": np.where(mask, np.nan, 0.5).astype(np.float32),
    }
    rounds = [{"round": r, "test_accuracy": 0.9 - r / 10, "note": "fine", "snr": r} for r in range(3)]
    epochs = [{"round": r // 4, "epoch": r + 1, "train_loss": 1 / (r + 1), "pruned": r == 4} for r in range(12)]
    with store.claim(RUN) as writer:
        writer.save(Checkpoint({"w": rng.normal(size=2000)}, {"losses": [0.5, 0.25]}, rounds, epochs))
        yield writer
        writer.finish(weights, {"a.weight": mask}, removals, {"device": "cpu", "threads": 2})


def of_a_run(name):
    def make(folder):
        store = Store(folder / "runs")
        for _ in saved(store):
            pass

        def read():
            fresh = Store(store.root)
            state = [fresh.check(RUN), fresh.unusable(RUN, {"method": 1}), fresh.status(RUN)]
            shown = fresh.show(RUN)
            del shown["bytes"]
            tables = [same(fresh.rounds(RUN)), same(fresh.epochs(RUN))]
            return same(
                [state, shown, tables, *(same(getattr(fresh, t)(RUN)) for t in ("weights", "masks", "removals"))]
            )

        return store.root / RUN.id / name, read

    return make


def of_a_partial_run(failed):
    def make(folder):
        store = Store(folder / "runs")
        writing = saved(store)
        writer = next(writing)
        if failed:
            writer.fail("the loss was nan")
        writing.close()
        place = store.place(RUN.id)

        def read():
            fresh = Store(store.root)
            fresh.check(RUN)
            if why := fresh.unusable(RUN):
                raise PrunelabError(why)
            found = {} if failed else writer.checkpoint.__dict__
            return same([place.reason(), same(fresh.rounds(RUN, unfinished=True)), same(dict(found))])

        return place.partial / ("failed.json" if failed else "checkpoint.safetensors"), read

    return make


def prepared(_):
    path = data.prepare("digits")

    def read():
        digits = data.load("digits")
        return same([same(digits.train.x), same(digits.train.y), same(digits.test.x), digits.classes, digits.source])

    return path, read


def mask_file(folder):
    path = folder / "masks.safetensors"
    draw = torch.Generator().manual_seed(0)
    Masks({f"layer{i}.weight": torch.rand(20, 30, generator=draw) < 0.5 for i in range(3)}).save(path)
    return path, lambda: same(dict(Masks.load(path)))


def model_file(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    path = export.save(folder / "model.safetensors", model, prune(model, "magnitude", 0.5))

    def read():
        loaded, masks = export.load(path, model)
        return same([same(dict(loaded.state_dict())), same(dict(masks)), repr(loaded)])

    return path, read


def figure_file(ending):
    def make(_):
        class Picture:
            alt = "a picture"

            def png(self):
                return bytes(range(256)) * 20

        facts = {"preset": "quick", "claims": [{"claim": "a", "ours": 97.1, "verdict": "confirmed"}], "n": 3}
        gallery.save(Picture(), "toy/line", pd.DataFrame({"x": np.linspace(0, 1, 50)}), facts)
        base = paths.figures() / "toy" / "line"

        def read():
            facts = gallery.saved("toy/line")
            if problem := gallery.damage("toy/line"):
                raise PrunelabError(problem)
            return same(json.dumps(facts, sort_keys=True))

        return base.with_name(f"line{ending}"), read

    return make


def tar_file(folder):
    store = Store(folder / "runs")
    for _ in saved(store):
        pass
    path = folder / "runs.tar"
    archive.export(store, path)

    def read():
        other = folder / "other"
        shutil.rmtree(other, ignore_errors=True)
        try:
            archive.import_(Store(other), path)
        except PrunelabError:
            assert [entry.name for entry in other.rglob("*") if entry.is_file()] == []
            raise
        return same({str(p.relative_to(other)): same(p.read_bytes()) for p in sorted(other.rglob("*")) if p.is_file()})

    return path, read


KINDS = {
    **{name: of_a_run(name) for name in (
        "settings.json", "rounds.parquet", "epochs.parquet", "provenance.json", "weights.safetensors",
        "masks.safetensors", "removals.safetensors",
    )},
    "checkpoint.safetensors": of_a_partial_run(failed=False),
    "failed.json": of_a_partial_run(failed=True),
    "prepared data set": prepared,
    "file of masks": mask_file,
    "file of a model": model_file,
    **{f"figure {ending}": figure_file(ending) for ending in (".json", ".csv", ".png")},
    "archive": tar_file,
}  # fmt: skip


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_change_of_a_file_changes_a_number(tmp_path, monkeypatch, tally, kind, trials):
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    path, read = KINDS[kind](tmp_path)
    original, expected, draw = path.read_bytes(), read(), random.Random(kind)
    count, silent = tally(f"changed {kind}"), []
    for _ in range(trials):
        content = changed(original, draw)
        path.write_bytes(content)
        try:
            found = read()
            fine = found == expected
        except PrunelabError as error:
            fine = "\n" not in str(error)
        if not fine:
            silent.append(content)
        count.add("survived" if fine else "lost")
    assert not silent, f"{len(silent)} of {trials}"
    path.write_bytes(original)
    assert read() == expected
