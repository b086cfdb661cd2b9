"""A run that is watched: the same rows as unwatched, whatever is pressed; and nothing that outlives it."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

import prunelab
from prunelab.errors import PrunelabError
from prunelab.lab.theatre import TrainingTheatre, view
from prunelab.lab.theatre.stage import EVERY, GRACE, Stage, stored
from prunelab.plots import network_svg
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training.experiment import check, train_population
from prunelab.training.observe import pruned_after

DIGITS = Data("digits", train_size=200, test_size=200)
NET = Model("mlp", (24, 16))
METHODS = {
    "dyprune": Prune("dyprune", options={"trigger": "static", "every": 3, "rate": 0.3}),
    "magnitude": Prune("magnitude", amount=0.5, rounds=2, recover="rewind"),
}
VOLATILE = ["seconds", "seconds_spent", "prune_seconds", "finished", "git_commit", "status"]


@pytest.fixture(autouse=True)
def one_thread():
    """Other numbers of threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(method="dyprune", **train):
    values = {"epochs": 10, "batch_size": 32, "lr": 3e-3, "test_every_epoch": method == "dyprune", **train}
    return Run(DIGITS, NET, Train(**values), METHODS[method])


def assert_same_results(a, b, one):
    for table in ("rounds", "epochs"):
        mine, yours = (getattr(s, table)([one]).drop(columns=VOLATILE, errors="ignore") for s in (a, b))
        pd.testing.assert_frame_equal(mine, yours)
    for what in ("weights", "masks", "removals"):
        mine, yours = (getattr(s, what)(one) for s in (a, b))
        assert mine.keys() == yours.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], yours[name])


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# ---- the trainer, watched ----


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_where_it_was_in_the_midst_of_a_round(tmp_path, method):
    one = run(method, patience=8 if method == "magnitude" else None, restore_best=method == "magnitude")
    cut, whole = Store(tmp_path / "cut"), Store(tmp_path / "whole")
    for stop in (2, 5, 6, 8):
        train_population([one], cut, watch=lambda now, stop=stop: "stop" if len(now.epochs) >= stop else "go on")
        assert (cut.status(one), len(cut.epochs(one, unfinished=True))) == ("partial", stop)
    train_population([one], cut)
    train_population([one], whole)
    assert_same_results(cut, whole, one.id)


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_pruning_on_request_makes_it_the_run_whose_settings_say_so(tmp_path, method, validated):
    one = run(method, validate_every_epoch=validated)
    store, plain = Store(tmp_path / "asked"), Store(tmp_path / "plain")
    asked = []

    def ask(now):
        if len(now.epochs) == 5 and now.may_prune:
            asked.append(now.run)
            return "prune"
        return "go on"

    train_population([one], store, watch=ask)
    other = pruned_after(one, 5)
    assert asked == [one]
    assert other.id != one.id
    assert (store.status(other), store.status(one)) == ("complete", "partial")
    weights = store.epochs(other)["weights"].tolist()
    assert weights[5] < weights[4]
    assert_same_results(store, (train_population([other], plain), plain)[1], other.id)
    train_population([one], store)  # the one without that pruning was left where it was, and goes on
    assert_same_results(store, (train_population([one], plain), plain)[1], one.id)


def test_prunings_that_would_never_happen_are_refused():
    with pytest.raises(PrunelabError, match="'none' with rounds = 0 never prunes"):
        check([dataclasses.replace(run(), prune=Prune("none", also_after=(3,)))])
    with pytest.raises(PrunelabError, match="should be below 10, the number of epochs"):
        check([pruned_after(run(), 10)])


def test_a_watcher_is_shown_the_end_and_the_network_that_goes_on(tmp_path):
    seen = []

    def watch(now):
        seen.append((len(now.epochs), now.weights, now.over))
        return "save" if len(seen) == 3 else "go on"

    one, store = run(), Store(tmp_path)
    train_population([one], store, watch=watch)
    assert [n for n, *_ in seen] == [0, 1, 2, 2, *range(3, 11)], "before the first, after each, and again after a wish"
    assert [over for *_, over in seen] == [False] * (len(seen) - 1) + [True]
    begins = store.epochs(one)["weights"].tolist()
    assert [kept for n, kept, over in seen if not over] == [begins[n] for n, _, over in seen if not over]


def test_the_trigger_that_decides_is_in_the_rows(tmp_path):
    options = {"minimum": -0.5, "maximum": 0.3}
    one = dataclasses.replace(run(epochs=25), prune=Prune("dyprune", options=options))
    train_population([one], Store(tmp_path))
    rows = Store(tmp_path).epochs(one)
    falls = rows["validation_loss"].diff()
    np.testing.assert_allclose(rows["trigger"], falls / falls.cummin())
    fired = rows[rows["pruned"]]
    assert len(fired) > 1
    assert fired["trigger"].between(-0.5, 0.3).all()


# ---- the stage, without a process ----


def played(stage_store, one, said, **values):
    stage = Stage(said.append, stage_store, **values)
    stage.begin()
    thread = threading.Thread(target=train_population, args=([one], stage_store), kwargs={"watch": stage}, daemon=True)
    thread.start()
    return stage, thread


def rows_of(said):
    rows = []
    for message in said:
        rows[message["after"] :] = message["epochs"]
    return rows


def test_the_stage_pauses_prunes_and_goes_on_and_says_what_is_stored(tmp_path):
    said, store = [], Store(tmp_path)
    never = Prune("dyprune", options={"trigger": "static", "every": 100, "rate": 0.3})
    one = dataclasses.replace(run(epochs=14), prune=never)
    stage, thread = played(store, one, said, pace=0.05)
    wait_until(lambda: len(rows_of(said)) >= 2)
    stage.tell("pause")
    wait_until(lambda: said[-1]["paused"])
    paused = len(rows_of(said))
    time.sleep(0.2)
    assert len(rows_of(said)) == paused
    before = said[-1]["weights"][0]
    stage.tell("prune")
    wait_until(lambda: said[-1]["weights"][0] < before)
    assert not said[-1]["may_prune"], "once after an epoch"
    assert said[-1]["paused"]
    assert len(rows_of(said)) == paused
    stage.tell("go on")
    thread.join(30)
    other = pruned_after(one, paused)
    assert Run.fromdict([message["run"] for message in said if "run" in message][-1]) == other
    kept = store.epochs(other)
    told = pd.DataFrame(rows_of(said)).astype({"weights": float, "units": float})
    for column in ("round", "epoch", "train_loss", "validation_accuracy", "weights", "units", "pruned", "rate"):
        pd.testing.assert_series_equal(told[column], kept[column])
    again = stored(other, store)
    assert again["weights"][0] == said[-1]["weights"][0] == store.rounds(other)["weights"].iloc[-1]
    assert again["drawing"] == [message["drawing"] for message in said if "drawing" in message][-1]


def test_a_pruning_that_was_asked_for_before_leads_to_the_run_that_is_there(tmp_path):
    store, said = Store(tmp_path), []
    one = run()
    train_population([pruned_after(one, 5)], store)
    stage = Stage(said.append, store)
    stage.begin()

    def press(now):
        if len(now.epochs) == 5:
            stage.tell("prune")
        return stage(now)

    train_population([one], store, watch=press)
    assert stage.next == pruned_after(one, 5)
    assert store.status(one) == "partial"


def test_messages_are_few_however_fast_the_epochs(tmp_path):
    said = []
    begin = time.monotonic()
    _, thread = played(Store(tmp_path), run(epochs=60, test_every_epoch=False), said)
    thread.join(60)
    assert len(said) <= (time.monotonic() - begin) / EVERY + 4
    assert len(rows_of(said)) == 60


# ---- the widget and its process ----


def children():
    import psutil

    return [process for process in psutil.Process().children() if "prunelab.lab.theatre.stage" in process.cmdline()]


def text(widget):
    return re.sub("<[^>]*>", " ", widget.value)


def test_start_pause_stop_go_on_and_finish_with_the_rows_of_a_plain_experiment(tmp_path):
    threads = set(threading.enumerate())  # of other tests
    one, store = run(epochs=30), Store(tmp_path / "watched")
    theatre = TrainingTheatre(one, store=store, device="cpu", pace=0.05)
    buttons, sentence, panel = theatre.buttons, theatre.children[2], theatre.children[3]
    assert [name for name, button in buttons.items() if not button.disabled] == ["start"]
    assert "Not trained yet" in sentence.value
    assert children() == []
    buttons["start"].click()
    wait_until(lambda: len(theatre.epochs) >= 2)
    assert len(children()) == 1
    buttons["pause"].click()
    wait_until(lambda: theatre.state == "paused")
    shown = len(theatre.epochs)
    assert f"Paused after epoch {shown}" in text(sentence)
    assert f"{shown} of 30" in " ".join(text(panel).split())
    with pytest.raises(PrunelabError, match="is being trained already"):
        TrainingTheatre(one, store=store).start()
    buttons["start"].click()
    wait_until(lambda: len(theatre.epochs) >= shown + 2)
    buttons["stop"].click()
    theatre.wait(30)
    stopped = len(theatre.epochs)
    assert (theatre.state, children(), store.status(one)) == ("stopped", [], "partial")
    assert stopped == len(store.epochs(one, unfinished=True)) < 30
    later = TrainingTheatre(one, store=store, device="cpu")  # as after a restart
    assert len(later.epochs) == stopped
    assert later.buttons["start"].description == "go on"
    later.start()
    later.wait(60)
    later.check()
    assert (later.state, children()) == ("complete", [])
    wait_until(lambda: set(threading.enumerate()) <= threads)
    assert all(button.disabled for button in later.buttons.values())
    plain = Store(tmp_path / "plain")
    train_population([one], plain)
    assert_same_results(store, plain, one.id)
    for frame in (later.epochs, TrainingTheatre(one, store=store).epochs):
        assert frame["validation_loss"].tolist() == plain.epochs(one)["validation_loss"].tolist()


def test_an_error_of_the_training_is_shown_and_raised_by_check(tmp_path):
    (tmp_path / "file").write_text("no folder")
    theatre = TrainingTheatre(run(), store=Store(tmp_path / "file" / "runs"))
    theatre.check()
    theatre.start()
    theatre.wait(30)
    (shown,) = theatre.children[4].outputs
    assert "StoreError" in shown["evalue"]
    assert "stage.py" in "".join(shown["traceback"])
    assert theatre.state == "broken"
    with pytest.raises(PrunelabError, match="the training ended: StoreError"):
        theatre.check()


def test_where_nobody_is_there_it_trains_at_once_and_a_failed_run_is_an_error(tmp_path):
    wild = run(optimiser="sgd", lr=1e18)
    with pytest.raises(PrunelabError, match="not finite"):
        TrainingTheatre(wild, store=Store(tmp_path), at_once=True)
    assert Store(tmp_path).status(wild) == "failed"


def test_the_process_ends_and_saves_when_it_is_interrupted_or_its_kernel_is_gone(tmp_path):
    ends = {
        "interrupted": lambda process: process.send_signal(signal.SIGINT),
        "terminated": lambda process: process.terminate(),
        "kernel gone": lambda process: process.stdin.close(),
    }
    runs = [run(epochs=10_000 + i) for i in range(3)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-m", "prunelab.lab.theatre.stage"], **pipes) for _ in runs]
    for one, process in zip(runs, processes, strict=True):
        asked = {"run": one.asdict(), "root": str(tmp_path), "device": "cpu", "threads": 1, "pace": 0.02}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
    for one, process, (how, end) in zip(runs, processes, ends.items(), strict=True):
        with process:
            assert [json.loads(process.stdout.readline())["budget"] for _ in range(2)] == [one.train.epochs] * 2
            end(process)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            assert process.wait(GRACE + 3) == 0, how
        assert Store(tmp_path).status(one) == "partial"
        assert len(Store(tmp_path).epochs(one, unfinished=True)) >= 1


def test_a_button_that_is_off_does_nothing(tmp_path):
    theatre = TrainingTheatre(run(), store=Store(tmp_path))
    for press in (theatre.pause, theatre.prune_now, theatre.stop):
        press()
    assert (theatre.state, children()) == ("ready", [])


def test_an_error_of_the_picture_is_shown_raised_and_kept(tmp_path, monkeypatch):
    theatre = TrainingTheatre(run(), store=Store(tmp_path))

    def broken(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(view, "panel", broken)
    monkeypatch.setattr(TrainingTheatre, "_open", lambda self: None)
    with pytest.raises(RuntimeError, match="no ink"):
        theatre.start()
    assert theatre.children[4].outputs[0]["evalue"] == "no ink"
    with pytest.raises(RuntimeError, match="no ink"):
        theatre.check()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"settings": "dyprune"}, "settings is a str: give a prunelab.Run"),
        ({"settings": dataclasses.replace(run(), prune=Prune("dyprun"))}, "did you mean 'dyprune'"),
        ({"settings": dataclasses.replace(run(), prune=Prune("magnitude", masks_of="nobody"))}, "follows 'nobody'"),
        ({"pace": -1}, "pace = -1"),
        ({"pace": "0.5"}, "pace = '0.5'"),
        ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_what_cannot_be_watched_is_refused_in_one_line(tmp_path, wrong, words):
    with pytest.raises(PrunelabError, match=re.escape(words)) as caught:
        TrainingTheatre(**{"settings": run(), "store": Store(tmp_path), **wrong})
    assert "\n" not in str(caught.value)
    assert prunelab.TrainingTheatre is TrainingTheatre


# ---- the picture ----


def row(epoch, weights, **values):
    nothing = dict.fromkeys(("test_loss", "test_accuracy", "rate", "trigger"), math.nan)
    usual = {"train_loss": 1.0, "train_accuracy": 0.5, "validation_loss": 1.0, "validation_accuracy": 0.5, "seconds": 1}
    return {"epoch": epoch, "round": 0, "weights": weights, "pruned": False, **nothing, **usual, **values}


def test_prunings_are_those_of_the_rows_and_of_the_network_as_it_is_now():
    rows = [row(1, 100, pruned=True), row(2, 80), row(3, 80), row(4, 40)]
    assert view.prunings(rows, 40) == [(1, pytest.approx(0.2)), (3, pytest.approx(0.5))]
    assert view.prunings(rows, 10)[-1] == (4, pytest.approx(0.75))
    assert view.prunings([], 10) == []


def test_the_accuracy_in_large_digits_is_the_last_that_was_measured():
    rows = [
        {"epoch": n, "weights": 9, "pruned": False, "validation_accuracy": a} for n, a in ((1, 0.25), (2, math.nan))
    ]
    assert "25.0 %" in view.numbers(rows, 5, (9, 9))
    assert "none yet" in view.numbers(rows[1:], 5, (9, 9))


def test_points_stand_where_they_belong_on_axes_as_long_as_the_training():
    rows = [row(1, 100, validation_accuracy=0.0), row(4, 100, validation_accuracy=1.0)]
    drawn = view.curves(rows, "accuracy", 4, [(1, 0.5)], ["validation"])
    left, right = view.LEFT, view.WIDTH - view.RIGHT
    top, bottom = view.TOP, view.HEIGHT - view.BOTTOM
    per_epoch = (right - left) / 4.5
    points = [float(number) for number in re.split("[ ,]", re.search('points="([^"]*)"', drawn)[1])]
    assert points == pytest.approx([left + per_epoch, bottom, left + 4 * per_epoch, top], abs=0.06)
    assert float(re.search('class="mark" x1="([^"]*)"', drawn)[1]) == pytest.approx(left + 1.5 * per_epoch, abs=0.06)
    assert "validation 100. Pruned after epoch 1." in drawn


def test_the_trigger_is_in_the_shade_exactly_when_it_is_in_the_window():
    rows = [row(1, 9), row(2, 9, trigger=1.0), row(3, 9, trigger=0.04), row(4, 9, trigger=-0.2), row(5, 9, trigger=-7)]
    drawn = view.trigger(rows, 6, [(3, 0.1)], (0.0, 0.05))
    band = re.search('class="band" .* y="([^"]*)" height="([^"]*)"', drawn)
    high, low = float(band[1]), float(band[1]) + float(band[2])
    dots = [float(y) for y in re.findall(r'<circle class="\w+" cx="[^"]*" cy="([^"]*)"', drawn)]
    fired = float(re.search(r'class="fired" d="M[\d.]+ ([\d.]+)', drawn)[1]) + 5.5
    assert dots[0] < high < fired < low < dots[1] < dots[2]
    assert drawn.count('class="beyond"') == 1


def test_a_network_is_drawn_with_what_lives_and_nothing_else():
    first = np.array([[1.0, 0, 0], [0, -2.0, 0], [0, 0, 0]])
    second = np.array([[3.0, 0, 0], [0, 0, 4.0]])
    drawn = network_svg.network([first, second], [5], "after epoch 3")
    assert drawn.count('class="dead"') == 1 + 2 + 0, "without a connection on one side, none goes through"
    assert drawn.count('class="live"') == 2 + 1 + 2
    assert sum(path.count("M") for path in re.findall(r' d="(M[^"]*)"', drawn)) == 4
    assert "layer 1 1 of 5" in drawn


def test_kernels_are_drawn_by_filter_and_large_layers_as_bars():
    kernels = np.zeros((40, 1, 3, 3))
    kernels[:4] = -1
    flat = np.ones((2, 40 * 4))
    flat[:, 4:] = 0
    drawn = network_svg.network([kernels, flat], [40], "after epoch 1")
    assert "layer 1 1 of 40" in drawn
    assert drawn.count('class="minus"') == 0
    bars = network_svg.layers([("<a>.weight", 1, 4), ("b.weight", 0, 2)], "after epoch 1")
    assert "&lt;a&gt; 25.0 %" in bars
    assert "b 0.0 %" in bars


def test_connections_between_pieces_of_bars_are_those_that_live():
    random = np.random.default_rng(1)
    first, second = (random.normal(size=shape) * (random.random(shape) < 0.004) for shape in ((90, 200), (30, 90)))
    drawn = network_svg.network([first, second], [90], "")
    through = (first != 0).any(1) & (second != 0).any(0)
    layers = (
        (first, through, (first != 0).any(0), (200, 90)),
        (second, (second != 0).any(1), through, (90, 30)),
    )
    for name, side in (("plus", 1), ("minus", -1), ("idle", 0)):
        expected = set()
        for matrix, out, into, units in layers:
            passes = out[:, None] & into
            wanted = (np.sign(matrix) == side) & passes if side else (matrix != 0) & ~passes
            places = np.argwhere(wanted) * [min(network_svg.PIECES, count) for count in units[::-1]] // units[::-1]
            expected |= {(units, *pair) for pair in places.tolist()}
        found = sum(path.count("M") for path in re.findall(rf'class="{name}"[^>]* d="(M[^"]*)"', drawn))
        assert found == len(expected)
        assert found


def test_a_picture_takes_a_few_milliseconds_and_is_small():
    random = np.random.default_rng(0)
    weights = [random.normal(size=shape) for shape in ((300, 784), (100, 300), (10, 100))]
    rows = [row(epoch, 1000, trigger=0.1) for epoch in range(1, 201)]
    begin = time.process_time()
    drawn = network_svg.network(weights, [300, 100], "")
    shown = view.panel(rows, 200, (1000, 1000), drawn, (0.0, 0.05))
    assert time.process_time() - begin < 0.5
    assert len(shown) < 200_000
