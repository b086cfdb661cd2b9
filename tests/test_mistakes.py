"""The ten mistakes that users make: each ends in one line that says what, where and what to do, before any work.

What stands on the disk before the mistake stands there after it, byte by byte, and no epoch is trained.
"""

import contextlib
import multiprocessing
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor

import filelock
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from torch import nn

from prunelab import cli, data, paths, prune
from prunelab.errors import PrunelabError
from prunelab.headless import runner as notebook_runner
from prunelab.masks import Masks
from prunelab.plots import gallery
from prunelab.runs import Checkpoint, Store, archive
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training import train
from prunelab.training.experiment import run_all

NET = Model("mlp", (6, 5))
THERE = Run(Data("iris"), NET, Train(epochs=2), Prune("magnitude", rounds=1), seed=7)  # a run that the store has


def run(method="magnitude", source="iris", model=NET, seed=0, **pruning):
    return Run(Data(source), model, Train(epochs=2), Prune(method, **pruning), seed=seed)


def study(*runs, **options):
    return run_all(runs, **{"jobs": 1, "progress": False, **options})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def kept(**shapes):
    return Masks({name.replace("_", "."): torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})


def save(writer):
    writer.save(Checkpoint({"w": np.ones(2)}, {}, [{"round": 0}], [{"round": 0, "epoch": 1}]))


def no_network(*_, **__):
    raise urllib.error.URLError("no route to host")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Iris, prepared; the cache of the session is no good here, as other tests may write to it at any moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        data.prepare("iris")
        return paths.cache()


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    """A user's folder: a file, an empty folder, junk, a notebook, a run; no CUDA, no network, no training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNELAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PRUNELAB_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("PRUNELAB_CACHE", str(cache))
    monkeypatch.delenv("PRUNELAB_DATA", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(train.Population, "epoch", lambda *_: pytest.fail("an epoch was trained"))
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").write_bytes(b"junk" * 50)
    cells = [new_code_cell("epochs: int = 3", metadata={"tags": ["parameters"]}), new_code_cell("open('ran', 'w')")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "figure.ipynb")
    with Store().claim(THERE) as writer:
        save(writer)
        writer.finish({"w": np.ones(2)}, {"w": np.array([True, False])})
    return tmp_path


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def prepared():
    files = (path for path in paths.cache().rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.stat().st_mtime_ns for path in files}


@contextlib.contextmanager
def nothing_changes(folder):
    before = content(folder), prepared()
    yield
    assert (content(folder), prepared()) == before


# What lies wrong before the mistake is made


def empty_root(here, monkeypatch):
    monkeypatch.setenv("PRUNELAB_DATA", str(here / "empty"))
    monkeypatch.setenv("PRUNELAB_CACHE", str(here / "cache"))


def truncated_mnist(here, monkeypatch):
    folder = here / "root" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte").write_bytes(bytes([0, 0, 8, int(name[-1]), 0, 0, 0, 9]) + b"\x01" * 8)
    monkeypatch.setenv("PRUNELAB_DATA", str(here / "root"))
    monkeypatch.setenv("PRUNELAB_CACHE", str(here / "cache"))


def truncated_rounds(here, monkeypatch):
    file = here / "runs" / THERE.id / "rounds.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def truncated_archive(here, monkeypatch):
    archive.export(Store(), here / "runs.tar")
    (here / "runs.tar").write_bytes((here / "runs.tar").read_bytes()[:4000])


def half_a_figure(here, monkeypatch):
    (here / "figures" / "dyprune").mkdir(parents=True)
    (here / "figures" / "dyprune" / "rate.json").write_text('{"preset": "qui')


def empty_class(here, monkeypatch):
    (here / "tree" / "train" / "rose").mkdir(parents=True)


def empty_run(here, monkeypatch):
    (here / "runs" / run().id).mkdir()


def no_cache(here, monkeypatch):
    monkeypatch.setenv("PRUNELAB_CACHE", str(here / "file" / "cache"))


def no_figures(here, monkeypatch):
    monkeypatch.setenv("PRUNELAB_FIGURES", str(here / "file" / "figures"))


def no_runs(here, monkeypatch):
    monkeypatch.setenv("PRUNELAB_RUNS", str(here / "file" / "runs"))


def picture():
    gallery.save(None, "own/table", pd.DataFrame({"a": [1]}), {"preset": "quick", "alt": "a table"})


def as_is(here, monkeypatch):
    """Nothing lies wrong."""


MISTAKES = {
    "misspelt parameter": [
        (as_is, lambda: Train(epocs=3), "Train has no setting 'epocs': did you mean 'epochs'?"),
        (
            as_is,
            lambda: Run.fromdict({"prune": {"amuont": 0.2}}),
            "Prune has no setting 'amuont': did you mean 'amount'?",
        ),
        (as_is, lambda: Train(optimiser="adm"), "Train: optimiser = 'adm': input should be 'sgd', 'adam' or 'adamw'"),
        (as_is, lambda: study(run("magnitud")), "no pruning method 'magnitud': did you mean 'magnitude'?"),
        (
            as_is,
            lambda: study(run(options={"scop": "layer"})),
            "'magnitude' has no option 'scop': did you mean 'scope'?",
        ),
        (as_is, lambda: study(run(model=Model("lenet5"))), "there is no model 'lenet5': did you mean 'lenet_5'?"),
        (as_is, lambda: prune(network(), "magnitude", 0.5, nrom=2), "has no option 'nrom': did you mean 'norm'?"),
        (as_is, lambda: Store().rounds(methd="x"), "results have no column 'methd': did you mean 'method'?"),
        (
            as_is,
            lambda: notebook_runner.run("figure.ipynb", "out/figure.ipynb", {"epoch": 1}),
            "figure.ipynb: no parameter 'epoch'; did you mean 'epochs'?",
        ),
    ],
    "rate 1.2": [
        (as_is, lambda: Prune("magnitude", amount=1.2), "Prune: amount = 1.2: input should be less than 1"),
        (as_is, lambda: Prune("magnitude", 1.2), "Prune: amount = 1.2: input should be less than 1"),
        (as_is, lambda: Prune("magnitude", -0.2), "Prune: amount = -0.2: input should be greater than or equal to 0"),
        (as_is, lambda: Prune("magnitude", float("nan")), "Prune: amount = nan"),
        (as_is, lambda: prune(network(), "magnitude", 1.2), "amount = 1.2: should be at least 0 and below 1"),
        (as_is, lambda: study(run("dyprune", options={"rate": 1.2})), "rate = 1.2: should be 'dynamic' or a fraction"),
    ],
    "unknown data set": [
        (as_is, lambda: data.load("mnits"), "unknown data set 'mnits': did you mean 'mnist'?"),
        (as_is, lambda: study(run(), run(source="mnits")), "unknown data set 'mnits': did you mean 'mnist'?"),
        (as_is, lambda: data.load("CIFAR-10"), "data set name 'CIFAR-10': use lower-case letters"),
        (as_is, lambda: data.load("flowers"), "`prunelab data prepare flowers --from PATH` makes one of a folder"),
    ],
    "unwritable store": [
        (no_runs, lambda: study(run()), "file/runs cannot be written (Not a directory): set PRUNELAB_RUNS to a folder"),
        (
            as_is,
            lambda: study(run(), store=Store("file")),
            "file cannot be written (Not a directory): set PRUNELAB_RUNS",
        ),
        (no_cache, lambda: data.load("iris"), "cannot be written (Not a directory): set PRUNELAB_CACHE to a folder"),
        (no_figures, picture, "(Not a directory): set PRUNELAB_FIGURES to a folder"),
        (
            as_is,
            lambda: archive.export(Store(), "file/runs.tar"),
            "file/runs.tar cannot be written (Not a directory): give",
        ),
        (as_is, lambda: kept(w=2).save("file/masks"), "file/masks: masks cannot be written there"),
        (as_is, lambda: notebook_runner.run("figure.ipynb", "file/out.ipynb"), "figure.ipynb: cannot write into file"),
    ],
    "empty folder": [
        (as_is, lambda: data.prepare("own", "empty"), "empty: no train/<class>/ folder in it: lay it out as"),
        (empty_class, lambda: data.prepare("own", "tree"), "class 'rose' has no image in its train part: add one"),
        (empty_root, lambda: data.load("tiny_imagenet"), "empty has no tiny-imagenet-200", "--from PATH"),
        (empty_run, lambda: Store().rounds(), "settings.json is missing: 'prunelab runs check --repair'"),
        (no_runs, lambda: archive.export(Store(), "runs.tar"), "file/runs has no complete run to export"),
    ],
    "corrupt file": [
        (truncated_mnist, lambda: data.load("mnist"), "MNIST/raw/train-", "fetch"),
        (as_is, lambda: data.prepare("own", "junk"), "junk: not a readable folder, zip or tar", "fetch it again"),
        (truncated_rounds, lambda: Store().rounds(), "rounds.parquet is damaged", "'prunelab runs check --repair'"),
        (truncated_archive, lambda: archive.import_(Store(), "runs.tar"), "runs.tar is", "export it again"),
        (as_is, lambda: Masks.load("junk"), "junk: not a file of masks", "write it again with Masks.save"),
        (as_is, lambda: notebook_runner.run("junk", "out.ipynb"), "junk: is not a notebook"),
        (
            half_a_figure,
            lambda: gallery.saved("dyprune/rate"),
            "rate.json: damaged, or no JSON",
            "make the artefact again",
        ),
    ],
    "layer name that does not exist": [
        (as_is, lambda: study(run(), run(layers=("hiden_1",))), "no layer 'hiden_1': did you mean 'hidden_1'?"),
        (as_is, lambda: prune(network(), "magnitude", 0.5, layers=("3",)), "the model has no layer '3': known: 0, 2"),
        (as_is, lambda: kept(**{"9_weight": (8, 4)}).check(network()), "no parameter '9.weight'", "did you mean"),
        (
            as_is,
            lambda: kept(**{"0_weight": (4, 8)}).apply_(network()),
            "0.weight: the parameter has shape 8 x 4, its mask",
        ),
    ],
    "all weights pruned": [
        (as_is, lambda: prune(network(), "magnitude", 1.0), "amount = 1.0: should be at least 0 and below 1"),
        (
            as_is,
            lambda: prune(network(), "magnitude", 0.99),
            "layer '2' would lose all 24 that it has left: remove less",
        ),
        (
            as_is,
            lambda: prune(network(), "l1_neuron", 0.99),
            "layer '0' would lose all 8 that it has left: remove less",
        ),
        (as_is, lambda: Prune("magnitude", amount=1), "Prune: amount = 1: input should be less than 1"),
    ],
    "CUDA asked for and absent": [
        (
            as_is,
            lambda: study(run(), device="cuda"),
            "device 'cuda': this machine has no usable CUDA; use device='auto'",
        ),
        (as_is, lambda: train.device("cuda:1"), "device 'cuda:1': this machine has no usable CUDA"),
        (as_is, lambda: data.load("iris", device="cuda"), "'cuda' was asked for, but torch sees no CUDA here: use"),
        (as_is, lambda: train.device("gpu"), "device 'gpu': no such device; use 'auto', 'cpu' or 'cuda'"),
    ],
}
CASES = [
    pytest.param(*case[:2], case[2:], id=f"{what}-{i}") for what, own in MISTAKES.items() for i, case in enumerate(own)
]


@pytest.mark.parametrize(("arrange", "mistake", "says"), CASES)
def test_a_mistake_is_one_line_before_any_work(here, monkeypatch, arrange, mistake, says):
    arrange(here, monkeypatch)
    with nothing_changes(here), pytest.raises(PrunelabError) as caught:
        mistake()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(here), "")) < 320
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("arrange", "words", "says"),
    [
        (as_is, "reproduce dyprune/rate -p evnts=3", "no parameter 'evnts'; did you mean 'events'?"),
        (as_is, "data prepare mnits", "unknown data set 'mnits': did you mean 'mnist'?"),
        (no_runs, "reproduce dyprune/rate", "cannot be written (Not a directory): set PRUNELAB_RUNS to a folder"),
        (no_runs, "runs import junk", "cannot be written (Not a directory): set PRUNELAB_RUNS to a folder"),
        (no_cache, "data prepare iris", "cannot be written (Not a directory): set PRUNELAB_CACHE to a folder"),
        (no_figures, "reproduce dyprune/rate", "(Not a directory): set PRUNELAB_OUT to a folder"),
        (no_figures, "list", "(Not a directory): set PRUNELAB_FIGURES to a folder"),
        (as_is, "data prepare own --from empty", "empty: no train/<class>/ folder in it"),
        (empty_run, "runs list", "settings.json is missing: 'prunelab runs check --repair'"),
        (as_is, "runs import junk", "junk is damaged or no plain tar"),
        (truncated_rounds, "runs list", "rounds.parquet is damaged"),
        (truncated_rounds, f"runs show {THERE.id}", "rounds.parquet is damaged"),
        (as_is, "reproduce dyprune/rate --device cuda", "device 'cuda': this machine has no usable CUDA"),
    ],
)
def test_on_the_command_line_too(here, monkeypatch, capsys, arrange, words, says):
    monkeypatch.setattr(notebook_runner, "run", lambda *_, **__: pytest.fail("a notebook was run"))
    arrange(here, monkeypatch)
    with nothing_changes(here):
        code = cli.main(words.split())
    out, err = capsys.readouterr()
    assert (code, out) == (cli.WRONG, "")
    assert err.startswith("prunelab: ")
    assert err.count("\n") == 1
    assert says in err


# All weights pruned, which only shows while it trains


@pytest.mark.parametrize("recover", ["finetune", "rewind", "none"])
def test_a_run_that_loses_a_layer_ends_with_its_name_and_keeps_the_rounds_before(tmp_path, recover):
    store, wild = Store(tmp_path / "runs"), run(amount=0.97, rounds=3, recover=recover)
    results = study(wild, run(seed=1), store=store)
    assert list(results.failed) == [wild.id]
    assert "\n" not in str(results)
    assert "layer 'hidden_" in results.failed[wild.id]
    assert "remove less" in results.failed[wild.id]
    assert results.rounds.loc[results.rounds["id"] == wild.id, "round"].tolist() == [0]
    assert store.status(run(seed=1)) == "complete"


# Two at once


@pytest.fixture
def other(here):
    """Another process trains ``run()`` at this moment: it holds the lock."""
    place = Store().place(run().id)
    place.lock_file.parent.mkdir(exist_ok=True)
    with filelock.FileLock(place.lock_file):
        yield place


def claimed():
    with Store().claim(run(), wait=False):
        pytest.fail("two hold one run")


def claimed_twice():
    with Store().claim(run(seed=1)), Store().claim(run(seed=1)):
        pytest.fail("two hold one run")


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (claimed, f"{run().id} is being trained already: wait for it, or leave it out"),
        (lambda: Store().discard(run().id), f"{run().id} is being trained already"),
        (claimed_twice, "is claimed twice by the same process: name each run once"),
    ],
)
def test_two_at_once_are_told_apart_in_one_line(here, other, mistake, says):
    other.partial.mkdir()
    with nothing_changes(here), pytest.raises(PrunelabError) as caught:
        mistake()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_another_process_trains_is_running_and_cannot_be_replaced(here, other):
    other.partial.mkdir()
    assert Store().status(run()) == "running"
    elsewhere = Store(here / "elsewhere")
    with elsewhere.claim(run()) as writer:
        save(writer)
        writer.finish({"w": np.ones(2)}, {"w": np.array([True, False])})
    archive.export(elsewhere, here / "runs.tar")
    report = archive.import_(Store(), here / "runs.tar")
    assert (report.new, report.busy) == ([], [run().id])
    assert archive.gc(Store(), days=0, dry_run=False) == []
    assert other.partial.is_dir()


STUDY = """\
from prunelab import Data, Model, Prune, Run, Train, run_all
pruning = Prune("magnitude", rounds=1)
runs = [Run(Data("iris"), Model("mlp", (6, 5)), Train(epochs=20), pruning, seed=seed) for seed in range(2)]
run_all(runs, jobs=1, progress=False)
"""


@pytest.mark.notebook
def test_two_notebooks_with_the_same_study_share_its_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNELAB_RUNS", str(tmp_path / "runs"))
    notebooks = [tmp_path / f"{me}.ipynb" for me in range(2)]
    for me, path in enumerate(notebooks):
        head = new_code_cell(f"me: int = {me}", metadata={"tags": ["parameters"]})
        nbformat.write(new_notebook(cells=[head, new_code_cell(STUDY)]), path)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(notebook_runner.run, notebooks, [tmp_path / "out" / path.name for path in notebooks]))
    assert len(Store().ids(unfinished=True)) == 2
    assert Store().rounds()["round"].tolist() == [0, 1, 0, 1]
    assert not list((tmp_path / "runs").glob("*.partial"))
