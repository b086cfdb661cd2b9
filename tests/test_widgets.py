"""Widgets without a browser: moving a control is setting its value."""

import builtins
import html
import io
import re

import pandas as pd
import pytest
from matplotlib import image

from prunelab.errors import PrunelabError
from prunelab.lab import widgets


def rows():
    return pd.DataFrame(
        [
            {
                **{"strategy": name, "seed": seed, "round": turn, "density": density + 1e-9 * seed},
                **{
                    "test_accuracy": 0.9 - 0.1 * turn + 0.01 * seed - (name == "random") * 0.2,
                    "weights": 1000 * density,
                },
            }
            for name, steps in (("l1", (1.0, 0.5, 0.05)), ("random", (1.0, 0.4)))
            for turn, density in enumerate(steps)
            for seed in (0, 1, 2)
        ]
    )


def parts(box):
    _, choice, seed, slider, sentence, picture, table, errors, _ = box.children
    return choice, seed, slider, sentence, picture, table, errors


def plain(widget):
    return re.sub("<[^>]*>", "", widget.value)


def test_the_slider_stops_at_measured_values_only():
    choice, _, slider, *_ = parts(widgets.explore(rows()))
    assert [value for _, value in slider.options] == [1.0, 0.5, 0.05]  # three seeds that agree are one position
    choice.value = "random"
    assert [value for _, value in slider.options] == [1.0, 0.4]


@pytest.mark.parametrize(
    ("x", "found"),
    [("fraction", [1.0, 0.5, 0.05]), ("macs", [100, 50, 5]), ("sparsity", [0.0, 0.5, 0.95])],
)
def test_the_slider_and_the_table_go_on_as_pruning_does(x, found):
    fraction = rows()["density"].round(2)
    own = rows().assign(fraction=fraction, macs=100 * fraction, sparsity=1 - fraction)
    slider, table = (parts(widgets.explore(own, x=x))[place] for place in (2, 5))
    assert [value for _, value in slider.options] == found
    places = [table.value.index(f">{value:g}<") for value in found]
    assert places == sorted(places)


def test_moving_the_slider_changes_sentence_picture_and_table_together():
    _, _, slider, sentence, picture, table, errors = parts(widgets.explore(rows()))
    slider.value = 0.05
    before = picture.value
    assert plain(sentence) == "l1: at density 0.05 (sparsity 0.95) test accuracy is 71.00 % ± 2.48 (n = 3)."
    assert 'aria-current="true"' in table.value.split("0.05<")[0].rpartition("<tr")[2]
    slider.value = 1.0
    assert plain(sentence) == "l1: at density 1 (sparsity 0) test accuracy is 91.00 % ± 2.48 (n = 3)."
    assert picture.value != before
    assert errors.outputs == ()


def test_the_picture_has_an_alternative_text_with_the_numbers():
    picture = parts(widgets.explore(rows()))[4]
    assert 'alt="Test accuracy against density' in picture.value
    assert "91.00 %" in picture.value


def test_another_strategy_keeps_the_nearest_position():
    choice, _, slider, sentence, *_ = parts(widgets.explore(rows()))
    slider.value = 0.5
    choice.value = "random"
    assert slider.value == 0.4
    assert plain(sentence).startswith("random: at density 0.4 (sparsity 0.6) test accuracy is 61.00 %")
    assert slider.index == 1


def test_one_seed_is_shown_without_an_interval():
    _, seed, slider, sentence, *_ = parts(widgets.explore(rows()))
    assert seed.label == "all (mean)"
    seed.value = 2
    slider.value = 0.5
    assert plain(sentence) == "l1: at density 0.5 (sparsity 0.5) test accuracy is 82.00 % (seed 2)."
    seed.label = "all (mean)"
    assert "(n = 3)" in plain(sentence)
    assert seed.label == "all (mean)"  # and not empty


def test_epochs_can_be_walked_through_like_rounds():
    frame = (
        rows()
        .rename(columns={"round": "epoch", "test_accuracy": "validation_accuracy"})
        .rename(columns={"strategy": "method"})
    )
    _, _, slider, sentence, *_ = parts(widgets.explore(frame, x="epoch", y="validation_accuracy"))
    assert slider.description == "epoch"
    slider.value = 2
    assert plain(sentence) == "l1: at epoch 2 validation accuracy is 71.00 % ± 2.48 (n = 3)."


def test_controls_are_described_in_words_that_are_not_cut_off():
    choice, seed, slider, *_ = parts(widgets.explore(rows()))
    assert [c.description for c in (choice, seed, slider)] == ["strategy", "seed", "density (share of weights left)"]
    assert {c.style.description_width for c in (choice, seed, slider)} == {"initial"}


def test_an_error_in_a_callback_is_shown_raised_and_leaves_no_old_picture(monkeypatch):
    _, _, slider, sentence, picture, table, errors = parts(widgets.explore(rows()))

    def broken(*args, **values):
        raise RuntimeError("no ink left")

    monkeypatch.setattr(widgets.plots, "curve", broken)
    with pytest.raises(RuntimeError, match="no ink left"):
        slider.value = 0.05
    (output,) = errors.outputs
    assert (output["output_type"], output["ename"], output["evalue"]) == ("error", "RuntimeError", "no ink left")
    assert any("broken" in line for line in output["traceback"])
    assert (sentence.value, picture.value, table.value) == ("", "", "")
    monkeypatch.undo()
    slider.value = 1.0
    assert errors.outputs == ()
    assert "91.00" in sentence.value


def test_an_error_is_found_in_the_saved_state_of_the_widgets(monkeypatch):
    from ipywidgets.embed import dependency_state, embed_data

    box = widgets.explore(rows())
    monkeypatch.setattr(widgets.plots, "curve", lambda *args, **values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parts(box)[2].value = 0.05
    states = embed_data([box], state=dependency_state([box]))["manager_state"]["state"].values()
    found = [o["ename"] for state in states for o in state["state"].get("outputs", ()) if o["output_type"] == "error"]
    assert found == ["ZeroDivisionError"]


def test_nothing_between_two_measurements_can_be_asked_for():
    with pytest.raises(PrunelabError, match=r"density = 0.3 was not measured for 'l1'; the nearest is 0.5"):
        widgets.view(rows(), "density", "test_accuracy", "strategy", "l1", None, 0.3)


def test_a_wrong_column_or_one_without_values_is_refused():
    with pytest.raises(PrunelabError, match="did you mean 'density'"):
        widgets.explore(rows(), x="densty")
    with pytest.raises(PrunelabError, match="test_accuracy against density: the table has no rows"):
        widgets.explore(rows().assign(test_accuracy=float("nan")))


def test_without_ipywidgets_one_line_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **values):
        if name == "ipywidgets":
            raise ModuleNotFoundError(name)
        return real(name, *args, **values)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'prunelab\[lab\]'"):
        widgets.explore(rows())


@pytest.mark.parametrize("made", [widgets.explore, widgets.compare])
def test_where_nothing_runs_there_is_a_picture_and_the_sentence(made):
    table = rows().assign(compression_ratio=lambda own: 1 / own["density"].round(3))
    box = made(table[table["round"] < 2])
    shown = box._repr_mimebundle_()
    assert image.imread(io.BytesIO(shown["image/png"])).shape[2] == 4
    texts = [str(getattr(part, "value", "")) for part in box.children]
    sentence = html.unescape(re.sub("<[^>]*>", "", next(text for text in texts if "aria-live" in text)))
    assert shown["text/plain"] == sentence
    gone = box.children[0].value
    assert "The kernel of this page has gone" in gone
    assert ".prunelab-gone {display: none}" in gone, "only a page without a kernel says so"
