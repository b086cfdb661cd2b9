"""Pictures: what is drawn is what the table says, the same numbers give the same bytes, and files are saved whole."""

import itertools
import json
import math
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from prunelab import papers, paths, plots
from prunelab.errors import PrunelabError
from prunelab.plots import gallery, marks, pictures

LOSSES = [1.0, 0.6, 0.5, 0.49, 0.51, 0.46]  # falls of 0.4, 0.1, 0.01, -0.02 and 0.05


def epochs(seeds=2, pruned_after=(3,), **columns):
    rows = [
        {
            **{"id": f"run{seed}", "seed": seed, "epoch": epoch, "seconds": 2.0, "units": 30.0},
            **{"validation_loss": loss + 0.1 * seed, "validation_accuracy": 0.9 - loss / 2},
            **{"test_loss": loss + 0.3, "test_accuracy": 0.8 - loss / 2},
            **{"weights": 1000.0 / 4 ** sum(epoch > at for at in pruned_after), "pruned": epoch in pruned_after},
        }
        for seed in range(seeds)
        for epoch, loss in enumerate(LOSSES, start=1)
    ]
    return pd.DataFrame(rows).assign(**columns)


def rounds(seeds=3, strategies=("none", "l1", "random")):
    rows = [
        {
            **{"id": f"{name}{seed}", "seed": seed, "strategy": name, "round": 0, "data": "iris"},
            **{"compression_ratio": 50.0 * i or 1.0, "density": 1 / (50 * i or 1), "weights": 1000.0 / (i or 1)},
            **{"test_accuracy": 0.9 - 0.1 * i + 0.01 * seed, "units": 20.0},
            **{"seconds": 3.0, "prune_seconds": 0.0, "device": "cpu", "threads": 2.0},
        }
        for i, name in enumerate(strategies)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def line(ax, label):
    return next(found for found in ax.lines if found.get_label() == label)


def words(picture):
    return [text.get_text() for text in picture.findobj(mpl.text.Text)]


# -- trainings --------------------------------------------------------------------------------------------------------


def test_the_four_panels_of_a_training_hold_loss_gradient_accuracy_and_its_gradient():
    loss, relative, accuracy, slope = plots.training(epochs(1)).axes[:4]
    assert line(loss, "validation").get_ydata() == pytest.approx(LOSSES)
    gradient = line(relative, "validation").get_ydata()
    assert gradient == pytest.approx([1, 0.25, 0.025, -0.05, 0.125])  # from epoch 2 on: falls / 0.4, by hand
    assert line(accuracy, "test").get_ydata()[0] == pytest.approx(30)  # per cent
    assert line(slope, "test").get_ydata()[0] == pytest.approx(20)  # points


def test_the_thick_line_of_several_runs_is_their_mean_and_ends_with_the_shortest():
    frame = epochs(2)
    frame = frame[(frame["id"] == "run0") | (frame["epoch"] < 5)]
    mean = line(plots.training(frame).axes[0], "validation")
    assert list(mean.get_xdata()) == [1, 2, 3, 4]
    assert mean.get_ydata() == pytest.approx([value + 0.05 for value in LOSSES[:4]])


def test_a_pruning_is_marked_between_its_epoch_and_the_next_with_the_weights_left_after_it():
    picture = plots.training(epochs(2, pruned_after=(3,)))
    at = [found.get_xdata()[0] for found in picture.axes[0].lines if list(found.get_xdata()) == [3.5, 3.5]]
    assert at == [3.5]
    assert "250" in words(picture)
    assert "Pruned after epoch 3; 250 weights at the end." in picture.alt


def test_no_pruning_and_no_test_values_need_no_marks():
    frame = epochs(1, pruned_after=(), test_loss=np.nan, test_accuracy=np.nan)
    picture = plots.training(frame)
    assert [text for text in ("test", "weights left after pruning") if text in words(picture)] == []
    assert "No pruning" in picture.alt


def test_the_trigger_that_the_method_saw_is_shown_where_it_is_known():
    frame = epochs(1, trigger=[np.nan, np.nan, 0.7, np.nan, np.nan, np.nan])
    assert line(plots.training(frame).axes[1], "validation").get_ydata()[:3] == pytest.approx([1, 0.7, 0.025])


def test_what_is_left_is_drawn_per_series():
    frame = pd.concat([epochs(2).assign(strategy=name, id=lambda rows, n=name: n + rows["id"]) for name in ("b", "a")])
    picture = plots.weights_left(frame, hue="strategy", title="Here")
    assert [text for text in words(picture) if text in ("a", "b")] == ["b", "a"]  # in the order of the table
    assert "Here" in words(picture)
    assert "n = 2 runs" in " ".join(words(picture))


def test_the_rate_curve_marks_the_fixed_point_and_the_prunings():
    points = pd.DataFrame({"weights": [100, 400, 1000, 5000], "rate": [0, 0, 0.09, 0.25]})
    events = pd.DataFrame(
        {"series": "formula", "event": [0, 1, 2], "weights": [5000, 3750, 2900], "rate": [0.25, 0.22, np.nan]}
    )
    rule, way = plots.rate_curve(points, events).axes
    assert 400 in [found.get_xdata()[0] for found in rule.lines]
    assert list(line(way, "formula").get_ydata()) == pytest.approx([5000, 3750, 2900])
    assert len(plots.rate_curve(points).axes) == 1
    assert "5,000 weights become 2,900 in 2 prunings" in plots.rate_curve(points, events).alt


# -- results ----------------------------------------------------------------------------------------------------------


def test_accuracy_against_compression_draws_means_with_t_intervals_and_n():
    picture = plots.accuracy_against_compression(rounds(), provenance={"data": ["iris"], "hardware": "cpu"})
    ax = picture.axes[0]
    point = line(ax, "l1 (n = 3)")
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((50, 81))
    half = 4.302653 * 1 / np.sqrt(3)  # t of 2 degrees of freedom, sd of 80, 81, 82
    heights = [np.ptp(s[:, 1]) for c in ax.collections for s in getattr(c, "get_segments", list)() if np.ptp(s[:, 1])]
    assert heights[0] == pytest.approx(2 * half, rel=1e-5)
    assert "n = 3 seeds · mean ± 95 % t interval · data: iris · cpu" in words(picture)


def test_the_dense_baseline_is_that_of_the_runs_that_were_never_pruned():
    half_trained = rounds(strategies=("l1",)).assign(test_accuracy=0.1, id=[f"l1{seed}" for seed in range(3)])
    frame = pd.concat([half_trained, rounds().assign(round=lambda rows: rows["strategy"].ne("none").astype(int))])
    ax = plots.accuracy_against_compression(frame).axes[0]
    assert line(ax, "dense (n = 3)").get_ydata()[0] == pytest.approx(91)


def test_dense_networks_of_one_seed_count_once():
    start = rounds(strategies=("x",)).assign(strategy="l1", id=lambda rows: "l1" + rows["seed"].astype(str))
    both = pd.concat([start, start.assign(strategy="random", id=lambda rows: "random" + rows["seed"].astype(str))])
    later = rounds().query("strategy != 'none'").assign(round=1)
    assert line(plots.accuracy_against_compression(pd.concat([both, later])).axes[0], "dense (n = 3)")


def test_dense_networks_that_differ_begin_the_curves_of_their_own():
    start = rounds(strategies=("x",)).assign(strategy="adam", id=lambda rows: "adam" + rows["seed"].astype(str))
    other = start.assign(
        strategy="sgd", id=lambda rows: "sgd" + rows["seed"].astype(str), test_accuracy=start["test_accuracy"] - 0.2
    )
    both = pd.concat([start, other])
    later = both.assign(round=1, compression_ratio=4.0)
    ax = plots.accuracy_against_compression(pd.concat([both, later])).axes[0]
    assert not [one for one in ax.get_lines() if str(one.get_label()).startswith("dense")]
    assert list(line(ax, "sgd (n = 3)").get_xdata()) == [1, 4]


def test_nothing_but_dense_rows_is_refused():
    with pytest.raises(PrunelabError, match="every row is dense"):
        plots.accuracy_against_compression(rounds(strategies=("none",)))


def test_a_curve_runs_from_dense_to_sparse_and_rings_what_was_measured():
    frame = rounds().assign(strategy="l1")
    ax = plots.curve(frame, "density", "test_accuracy", "strategy", mark=0.02, chosen="l1").axes[0]
    assert ax.xaxis_inverted()
    rings = [found for found in ax.lines if found.get_markersize() == 13]
    assert [(r.get_xdata()[0], r.get_ydata()[0]) for r in rings] == [(0.02, pytest.approx(81))]
    away = plots.curve(frame, "density", "test_accuracy", "strategy", mark=0.5).axes[0]
    assert [len(found.get_xdata()) for found in away.lines if found.get_markersize() == 13] == [0]


def test_strategies_stand_in_the_order_of_the_table_with_all_their_runs():
    picture = plots.strategies(rounds(), metrics=["test_accuracy", "weights"], baseline="none")
    accuracy = picture.axes[0]
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["none", "l1", "random"]
    seen = [found.get_xdata() for found in accuracy.lines if len(found.get_xdata()) == 3]
    assert np.concatenate(seen) == pytest.approx([90, 91, 92, 80, 81, 82, 70, 71, 72])
    assert "l1: 81.00 % ± 2.48" in picture.alt


def test_no_axis_goes_beyond_what_is_possible():
    wild = rounds().assign(test_accuracy=[0.9, 0.9, 0.9, 0.2, 0.9, 0.99, 0.1, 0.9, 1.0])
    low, high = plots.accuracy_against_compression(wild).axes[0].get_ylim()
    assert low >= -3
    assert high <= 103


def test_where_an_interval_says_nothing_there_are_the_runs_and_no_bar():
    means = pd.DataFrame(
        {"test_accuracy": [0.9] * 4, "test_accuracy_half": [0.1, 0.101, 0.1, math.nan], "n": [3, 3, 2, 1]}
    )
    assert marks.reach(means, "test_accuracy")["up"].notna().tolist() == [True, False, False, False]
    two = plots.accuracy_against_compression(rounds(2))
    assert not np.isfinite(
        np.concatenate([part for bar in two.axes[0].collections for part in bar.get_segments()])
    ).any()
    assert "t interval" not in " ".join(words(two))
    three = plots.accuracy_against_compression(rounds())
    assert "none of fewer than 3 runs" not in " ".join(words(three))


def test_a_line_joins_means_of_as_many_runs_only():
    rows = pd.DataFrame(
        {"seed": [0, 1, 2] * 3, "round": [0] * 3 + [1] * 3 + [2] * 3, "test_accuracy": [0.9, 0.8, 0.7] * 3}
    )
    ax = plots.curve(rows[:-1], "round", "test_accuracy").axes[0]  # one run has a round less
    joined, alone = (found for found in ax.lines if found.get_markersize() == 6.5)
    assert [list(found.get_xdata()) for found in (joined, alone)] == [[0, 1], [2]]
    assert (alone.get_linestyle(), alone.get_markerfacecolor()) == ("None", "none")


def test_the_interval_of_a_ratio_is_that_of_its_log():
    rows = pd.DataFrame({"strategy": "a", "compression_ratio": [2.0, 4.0, 8.0]})
    found = marks.means(rows, ["strategy"], ["compression_ratio"]).iloc[0]
    times = 2 ** (4.302653 / math.sqrt(3))  # the logs are a factor of 2 apart: their deviation is log 2
    assert found["compression_ratio"] == pytest.approx(4)
    assert found["compression_ratio_times"] == pytest.approx(times, rel=1e-5)
    ends = marks.reach(marks.means(rows, ["strategy"], ["compression_ratio"]), "compression_ratio").iloc[0]
    assert ends.tolist() == pytest.approx([4 - 4 / times, 4 * times - 4], rel=1e-5)


def test_a_mean_beyond_the_window_is_written_at_its_edge():
    rows = pd.DataFrame({"strategy": [*"aaabbb"], "test_accuracy": [0.9, 0.91, 0.92, 0.1, 0.11, 0.12]})
    shown = {"guides": {"test_accuracy": 89}, "windows": {"test_accuracy": (80, 100)}}
    ax = plots.strategies(rows, metrics=["test_accuracy"], **shown).axes[0]
    assert ax.get_xlim() == (80, 100)
    assert "← 11" in [text.get_text() for text in ax.texts]
    assert 89 in [found.get_xdata()[0] for found in ax.lines]
    means = pd.DataFrame({"strategy": ["a"], "test_accuracy": [0.91], "test_accuracy_half": [0.02], "n": [3]})
    ax = plots.strategies(means, metrics=["test_accuracy"]).axes[0]
    assert [len(found.get_xdata()) for found in ax.lines if found.get_markersize() == 3] == []  # no runs, no dots


def test_the_runs_behind_a_picture_are_saved_one_line_each_without_their_settings():
    rows = pd.DataFrame({"seed": [0, 1], "round": 0, "test_accuracy": [0.9, 0.8], "train.lr": 0.1})
    numbers = pd.DataFrame({"x": [1]})
    base = plots.save(None, "p/a", numbers, {"preset": "quick"}, runs=rows).csv
    assert base.with_name("a_runs.csv").read_text().splitlines() == ["seed,round,test_accuracy", "0,0,0.9", "1,0,0.8"]


def test_a_single_seed_has_no_interval_and_says_so():
    picture = plots.accuracy_against_compression(rounds(1))
    assert "n = 1 seed" in words(picture)
    assert "±" not in picture.alt


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.training(epochs().drop(columns="weights")), "plots.training: .*'weights'"),
        (lambda: plots.training(epochs().head(0)), "no rows"),
        (lambda: plots.curve(rounds(), "density", "test_acuracy"), "did you mean 'test_accuracy'"),
        (lambda: plots.curve(rounds().assign(test_accuracy=np.nan), "density", "test_accuracy"), "no rows"),
        (lambda: plots.strategies(rounds(), "method"), "no column 'method'"),
        (lambda: plots.strategies(rounds().replace({"strategy": {"l1": None}})), "3 rows have no 'strategy'"),
        (lambda: plots.strategies(rounds(), look="dimmed"), "look = 'dimmed'"),
    ],
)
def test_a_wrong_table_or_look_is_refused_in_one_line(draw, message):
    with pytest.raises(PrunelabError, match=message) as caught:
        draw()
    assert "\n" not in str(caught.value)


def test_series_never_differ_in_colour_alone():
    looks = [marks.series(i) for i in range(63)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 63
    for first, second in itertools.pairwise(looks):
        assert all(first[part] != second[part] for part in ("color", "marker", "linestyle"))


# -- the picture itself -----------------------------------------------------------------------------------------------


def test_the_same_numbers_give_the_same_bytes_whatever_style_is_in_force():
    first = plots.training(epochs(), title="A").png()
    with mpl.rc_context({"font.size": 20, "xtick.labelcolor": "red", "axes.grid": False}):
        assert plots.training(epochs(), title="A").png() == first
        picture = plots.training(epochs(), title="A")
    assert picture.png() == first
    assert b"Software" not in first
    assert b"tIME" not in first


def test_dark_and_light_differ_and_leave_the_users_style_alone():
    before = dict(mpl.rcParams)
    light, dark = (plots.strategies(rounds(), look=look) for look in ("light", "dark"))
    assert light.png(60) != dark.png(60)
    assert dark.get_facecolor() == mpl.colors.to_rgba("#111827")
    assert dict(mpl.rcParams) == before


def test_a_picture_can_be_read_aloud():
    picture = plots.training(epochs(1))
    assert f'alt="{picture.alt}"' in picture._repr_html_()
    assert str(picture) == picture.alt
    picture.alt = '"<b>'
    assert 'alt="&quot;&lt;b&gt;"' in picture.html(30)


def test_the_view_side_loads_neither_torch_nor_pyplot():
    code = (
        "import sys, pandas as pd; from prunelab import plots; from prunelab.plots import tables; "
        "from prunelab.lab import widgets; "
        "rows = pd.DataFrame({'density': [1.0, 0.5], 'test_accuracy': [0.9, 0.8]}); "
        "plots.curve(rows, 'density', 'test_accuracy').png(); "
        "print([name for name in ('torch', 'torchvision', 'matplotlib.pyplot', 'seaborn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- what is saved ----------------------------------------------------------------------------------------------------


def saved(preset, picture="picture", artefact="p/a", **more):
    picture = pictures.Picture(figsize=(1, 1), alt="one dot") if picture == "picture" else picture
    numbers = pd.DataFrame({"name": ["a"], "value": [1 / 3], "count": [2794000]})
    return plots.save(picture, artefact, numbers, {"preset": preset, **more})


def test_a_picture_is_saved_with_its_numbers_and_its_provenance():
    found = saved("paper", n="3 seeds", verdicts=pd.DataFrame({"verdict": ["confirmed"], "half": [np.nan]}))
    assert found.name == "p/a"
    assert found.csv.read_text() == "name,value,count\na,0.333333,2794000\n"
    facts = json.loads(found.json.read_text())
    assert facts["verdicts"] == [{"verdict": "confirmed", "half": None}]
    assert (facts["artefact"], facts["preset"], facts["alt"], facts["n"]) == ("p/a", "paper", "one dot", "3 seeds")
    assert found.png.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in found.png.parent.iterdir()) == ["a.csv", "a.json", "a.png"]


def test_saving_again_changes_no_byte():
    first = {path: path.read_bytes() for path in saved("quick")[1:4]}
    assert {path: path.read_bytes() for path in saved("quick")[1:4]} == first


def test_smoke_goes_aside_and_quick_never_replaces_paper():
    assert saved("smoke").name == "smoke/p/a"
    assert gallery.saved("p/a") is None
    assert saved("quick").name == "p/a"
    assert saved("paper").name == "p/a"
    aside = saved("quick")
    assert aside.name == "quick/p/a"
    assert "the numbers of preset paper stay where they are" in str(aside)
    assert gallery.saved("p/a")["preset"] == "paper"
    assert gallery.saved("quick/p/a")["preset"] == "quick"
    assert saved("paper").name == "p/a"


def test_other_parameters_than_the_presets_go_aside_and_are_in_the_caption():
    assert saved("paper", overridden={}).name == "p/a"
    aside = saved("paper", overridden={"seeds": 1})
    assert aside.name == "custom/p/a"
    assert gallery.saved("custom/p/a")["overridden"] == {"seeds": 1}
    assert saved("smoke", overridden={"seeds": 1}).name == "smoke/p/a"
    use = papers.chosen("dyprune/table_iris", {"preset": "quick", "seeds": 1, "epochs": None, "hidden": [100] * 3})
    facts = plots.provenance(rounds(), use)
    assert (facts["preset"], facts["overridden"]) == ("quick", {"seeds": 1})
    assert "preset quick · but seeds = 1" in pictures.caption(facts)


def test_a_table_without_a_picture_is_saved_too():
    assert saved("quick", picture=None).png is None
    assert "table with 1 rows" in gallery.saved("p/a")["alt"]


def test_a_failure_while_saving_leaves_the_old_files_and_no_other():
    old = saved("quick")
    before = {path: path.read_bytes() for path in old[1:4]}

    class Broken(pictures.Picture):
        def png(self, dpi=None):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        saved("quick", Broken(alt="x"), n="9 seeds")
    assert {path: path.read_bytes() for path in old.csv.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artefact": "../a"}, "should be paper/name"),
        ({"artefact": "a"}, "should be paper/name"),
        ({"preset": "full"}, "one of smoke, quick, paper"),
        ({"picture": Figure()}, "no alternative text"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(change, message):
    with pytest.raises(PrunelabError, match=message):
        saved(**{"preset": "quick", **change})
    assert list(paths.figures().iterdir()) == []


def test_a_damaged_provenance_is_named_and_not_overwritten():
    found = saved("quick")
    found.json.write_text("{")
    with pytest.raises(PrunelabError, match=r"a\.json: damaged, or no JSON .* delete it"):
        saved("quick")
    assert found.json.read_text() == "{"


def test_provenance_is_read_from_the_rounds():
    facts = plots.provenance(rounds(), "quick", protocol="25 epochs")
    assert facts == {
        "preset": "quick", "n": "3 seeds", "interval": "mean ± 95 % t interval", "data": ["iris"], "runs": 9,
        "hardware": "cpu, 2 threads", "minutes": 0.45, "protocol": "25 epochs",
    }  # fmt: skip
    alike = rounds().assign(seconds_spent=[1.0] * 6 + [math.nan] * 3)  # trained once for three; rows of earlier runs
    assert plots.provenance(alike, "quick")["minutes"] == (6 * 1.0 + 3 * 3.0) / 60
    cut = {"source": list("AAABBBBBB"), "data.train_size": [2000.0] * 3 + [9.0] * 3 + [np.nan] * 3}
    parts = rounds().assign(**cut, **{"data.test_size": [1000.0] * 3 + [np.nan] * 6})
    assert plots.provenance(parts, "quick")["data"] == [
        "A, 2,000 training and 1,000 test samples",
        "B, 9 or all training samples",
    ]
    reduced = rounds().assign(**{"train.precision": ["float32"] * 6 + ["bfloat16"] * 3})
    assert plots.provenance(reduced, "quick")["hardware"] == "cpu, 2 threads, bfloat16"
    claims = pd.DataFrame({"verdict": ["confirmed"]})
    assert plots.provenance(rounds(), "quick", claims=claims)["claims"] is claims
    shown = plots.provenance(rounds(), "quick", claims=pd.DataFrame({"claim": ["<a>", "b"]}))
    assert "runs of each point: " in repr(shown)
    assert "claims: 2 rows" in repr(shown)
    assert shown._repr_html_().index(">data<") < shown._repr_html_().index("<summary>more</summary>")
    assert "{" not in repr(shown)
    with pytest.raises(PrunelabError, match="did you mean 'quick'"):
        plots.provenance(rounds(), "quik")


def test_what_json_does_not_know_becomes_plain():
    value = {
        "a": np.float32(0.5),
        "b": np.arange(2),
        "c": {3, 1},
        "d": float("inf"),
        "e": (0.1 + 0.2, "x"),
        4: np.bool_(True),
    }
    assert gallery.plain(value) == {"a": 0.5, "b": [0, 1], "c": [1, 3], "d": None, "e": [0.3, "x"], "4": True}


def test_layers_over_rounds_say_where_the_units_went():
    rows = [
        {"id": f"run-{seed}", "round": r, "units_by_layer": str([8 - 2 * r - seed, 4])}
        for seed in (0, 1)
        for r in (0, 1)
    ]
    picture = plots.layers_over_rounds(pd.DataFrame(rows))
    assert picture.alt == "Units left in each layer over 2 rounds: layer 1 from 8 to 5.5, layer 2 from 4 to 4."
    assert [text.get_text() for text in picture.axes[0].texts] == ["7.5", "5.5", "4", "4"]


def test_reported_curves_are_drawn_under_ours_and_counted():
    points = pd.DataFrame(
        {
            "strategy": ["min", "min", "max"], "fraction": [1.0, 0.5, 1.0], "ours": [0.9, 0.8, 0.9], "ours_half": 0.01,
            "n": 3, "reported": [0.9, 0.7, None], "reported_half": 0.01, "agrees": [True, False, None],
        }
    )  # fmt: skip
    picture = plots.beside_reported(points, "test_accuracy", title="T")
    assert "min: 1 of 2 points agree" in picture.alt
    assert "max: no reported values" in picture.alt
    together = ["ours: test accuracy (%)", "reported: test accuracy (%)"]
    assert titles(picture) == [*together, "min: 1 of 2 agree", "max"]
    assert [len(found.get_xdata()) for found in picture.axes[1].lines] == [2, 0]  # of max nothing is known
    assert picture.axes[0].get_xlim()[0] > picture.axes[0].get_xlim()[1]  # from the whole network to nothing
    assert keys(picture) == ["min", "max", "reported, with its interval"]
    rule = "agree: no further from the reported interval than 1.5 points, or than our own interval, where it is narrow"
    assert f"n = 3 seeds · mean ± 95 % t interval; {rule}" in words(picture)
    few = points.assign(agrees=[True, None, None], strategy=["0.2", "0.2", "0.9"])  # fractions that go in each round
    picture = plots.beside_reported(few, "test_accuracy")
    assert titles(picture)[2:] == ["p = 0.2: 1 of 2 agree, 1 undecided", "p = 0.9"]
    assert keys(picture)[:2] == ["p = 0.2", "p = 0.9"]
    assert "undecided: only by the width of our interval" in " ".join(words(picture)).replace("\n", " ")


def titles(picture):
    return [ax.get_title("left") for ax in picture.axes if ax.get_visible()]


def keys(picture):
    return [text.get_text() for text in picture.legends[0].texts]


def test_levels_that_are_not_as_published_are_not_counted_and_nothing_reported_needs_no_key():
    points = pd.DataFrame(
        {"strategy": "min", "fraction": [1.0, 0.5], "ours": 0.9, "ours_half": 0.01, "n": 3, "reported": [0.9, 0.7],
         "reported_half": 0.01, "agrees": [True, False]}
    )  # fmt: skip
    picture = plots.beside_reported(points, "test_accuracy", judged=False)
    assert titles(picture)[2:] == ["min"]
    assert keys(picture) == ["min", "reported, with its interval"]
    assert not [text for text in [picture.alt, *words(picture)] if "agree" in text]
    alone = plots.beside_reported(points.assign(reported=np.nan, agrees=None), "test_accuracy")
    assert keys(alone) == ["min"]
    assert not [text for text in words(alone) if "agree" in text]


def test_no_two_methods_of_a_sheet_look_alike_and_each_looks_the_same_in_all_panels():
    names = [f"method {i}" for i in range(14)]
    rows = pd.DataFrame(
        {"strategy": name, "round": r, "compression_ratio": 2.0**r, "speedup": 1.5**r, "test_accuracy": 0.9 - i / 99}
        for i, name in enumerate(names)
        for r in (0, 1)
    )
    fewer = rows[rows["strategy"].isin(names[1::2])]  # a method stands elsewhere among them
    picture = plots.tradeoffs({"all": (rows, "compression_ratio"), "some": (fewer, "speedup")})
    looks = [
        {one.get_label(): (one.get_color(), one.get_marker()) for one in ax.lines if one.get_label() in names}
        for ax in picture.axes
    ]
    assert [len(looks[0]), len(looks[1])] == [len(set(looks[0].values())), 7] == [14, 7]
    assert looks[1].items() <= looks[0].items()


def test_a_map_of_one_seed_says_so_whatever_was_run():
    patterns = pd.DataFrame(
        {"network": "before", "layer": "h", "unit": [0, 1] * 2, "class": [7, 7, 8, 8], "firing": 0.5, "seed": 3}
    )
    picture = plots.firing(patterns, provenance={"n": "3 seeds", "interval": "mean ± 95 % t interval"})
    assert "n = 1 seed" in words(picture)
    assert (picture.axes[0].get_xlabel(), picture.axes[0].get_ylabel()) == ("unit", "class")


def test_units_are_drawn_as_images_of_their_weights_and_dead_ones_are_crossed():
    weights = np.zeros((20, 3, 2, 2))
    weights[:5] = np.arange(60).reshape(5, 3, 2, 2) - 30
    picture = plots.filters(weights, most=18)
    drawn = [ax for ax in picture.axes if ax.images]
    assert len(drawn) == 18
    assert np.allclose(drawn[1].images[0].get_array(), weights[1].mean(0))
    assert [len(ax.lines) for ax in drawn] == [0] * 5 + [2] * 13
    assert picture.alt == "Incoming weights of 18 of 20 units as images; 5 of 20 units keep a weight."
    assert plots.filters(weights).png() == plots.filters(weights).png()
    with pytest.raises(PrunelabError, match=r"weights of shape \(3, 4\)"):
        plots.filters(np.zeros((3, 4)))


def test_what_was_requested_stands_against_what_was_achieved():
    rows = pd.DataFrame(
        {"strategy": ["a", "a", "b"], "requested_sparsity": [0.5, 0.75, 0.5], "sparsity": [0.5, 0.75, 0.4]}
    )
    picture = plots.requested_against_achieved(rows)
    assert line(picture.axes[0], "b").get_xydata().tolist() == [[0.5, 0.4]]
    assert picture.alt.endswith("Largest difference: a 0.0000; b 0.1000.")
    with pytest.raises(PrunelabError, match="requested"):
        plots.requested_against_achieved(rows.assign(sparsity=math.nan))


@pytest.mark.parametrize(("letters", "columns"), [(10, 4), (36, 2), (42, 1)])
def test_the_legend_gives_way_to_a_long_title(letters, columns):
    with pictures.canvas(size=(9, 3), title="m" * letters) as (picture, axes):
        lines = [axes[0, 0].plot([0, 1])[0] for _ in range(4)]
        picture.key(lines, ["ours", "theirs", "reported", "random"], columns=4)
    picture.png(picture.dpi)
    (legend,) = picture.legends
    beside = {round(text.get_window_extent().x0) for text in legend.texts}
    title = next(text for text in picture.texts if text.get_text().startswith("m"))
    assert (len(beside), len(legend.texts)) == (columns, 4)
    assert title.get_window_extent().x1 < legend.get_window_extent().x0
