"""The drawing of a network: each living connection has a line, each neuron a place, and large layers stay small."""

import time

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PathCollection

from prunelab.errors import PrunelabError
from prunelab.plots import drawing

FIRST = np.array([[0.5, 0.0, -1.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.25]])  # 3 inputs, 4 hidden neurons
LAST = np.array([[1.0, 3.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.125]])  # 2 outputs


def curves(picture):
    """The collections of connections; the circles of neurons are path collections too, of rounder paths."""
    found = [c for c in picture.axes[0].collections if isinstance(c, PathCollection)]
    return [c for c in found if all(path.vertices.shape == (4, 2) for path in c.get_paths())]


def words(picture):
    return [text.get_text() for text in picture.findobj(mpl.text.Text) if text.get_text()]


def test_a_neuron_lives_when_it_has_an_input_and_an_output():
    live = drawing._live([FIRST, LAST])
    assert [column.tolist() for column in live] == [[True, False, True], [True, False, False, True], [True, True]]


def test_every_living_connection_of_a_small_network_is_one_line_and_no_other_is():
    first, last = curves(drawing.network([FIRST, LAST]))
    assert len(first.get_paths()) == np.count_nonzero(FIRST)
    assert len(last.get_paths()) == np.count_nonzero(LAST)
    y = drawing._spread(3), drawing._spread(4)
    ends = {(tuple(path.vertices[0]), tuple(path.vertices[-1])) for path in first.get_paths()}
    assert ends == {((0, y[0][j]), (1, y[1][i])) for i, j in zip(*np.nonzero(FIRST), strict=True)}


def test_larger_weights_are_wider_and_signs_differ_in_colour_and_dashes():
    first, _ = curves(drawing.network([FIRST, LAST]))
    hidden = drawing._spread(4)
    looks = {
        (path.vertices[0][1], path.vertices[-1][1]): (width, tuple(colour[:3]), dash[1] is not None)
        for path, width, colour, dash in zip(
            first.get_paths(), first.get_linewidths(), first.get_edgecolors(), first.get_linestyles(), strict=True
        )
    }
    inputs = drawing._spread(3)
    positive, negative, weak = (inputs[0], hidden[0]), (inputs[2], hidden[0]), (inputs[2], hidden[3])
    assert looks[negative][0] > looks[positive][0] > looks[weak][0]
    assert looks[negative][1] != looks[positive][1]
    assert (looks[negative][2], looks[positive][2]) == (True, False)
    idle = (inputs[0], hidden[2])  # the largest weight of all, but it leads to a neuron without outputs
    assert looks[idle][0] < looks[weak][0] + 0.3
    assert looks[idle][1] not in (looks[positive][1], looks[negative][1])


def test_layers_are_named_and_counted_and_dead_neurons_are_not_hidden():
    picture = drawing.network([FIRST, LAST])
    assert {"In", "HL 1", "Out", "2 of 3", "2 of 4", "2"} <= set(words(picture))
    assert {"4 of\n12", "4 of\n8"} <= set(words(picture))
    assert picture.alt == (
        "Drawing of a network: 8 of 20 weights are left (40 %). Live neurons: In 2 of 3, HL 1 2 of 4, Out 2 of 2."
    )


def test_what_was_removed_from_the_network_still_counts_where_its_first_sizes_are_given():
    picture = drawing.network([FIRST, LAST], before=[3, 100, 2], provenance={"n": "3 seeds", "data": ["iris"]})
    assert {"2 of 100", "2 of 3", "4 of\n300", "4 of\n200", "n = 1 network · data: iris"} <= set(words(picture))
    assert "8 of 500 weights are left (1.6 %)" in picture.alt


def test_inputs_and_classes_are_named_where_they_are_drawn_singly():
    picture = drawing.network([FIRST, LAST], inputs=["length", "width", "height"], outputs=["yes", "no"])
    assert {"length", "width", "height", "yes", "no"} <= set(words(picture))
    large = drawing.network([np.ones((2, 60))], inputs=[f"pixel {i}" for i in range(60)])
    assert not [word for word in words(large) if word.startswith("pixel")]


def test_a_large_layer_in_which_few_live_shows_these_and_one_circle_for_the_others():
    live = np.zeros(100, bool)
    live[[3, 50, 99]] = True
    column = drawing._column(live, 20)
    assert len(column.y) == 4
    assert column.slot[[3, 50, 99]].tolist() == [0, 1, 2]
    assert set(column.slot[~live]) == {3}
    assert (column.dead, column.barred) == (97, False)
    picture = drawing.network([live[:, None] * 1.0, live[None] * 1.0])
    assert "97 dead" in words(picture)


@given(st.lists(st.booleans(), min_size=1, max_size=1200).map(np.array), st.integers(6, 40))
def test_every_unit_has_a_place_and_places_go_down_the_column(live, most):
    column = drawing._column(live, most)
    assert len(column.slot) == len(live)
    assert set(column.slot) <= set(range(len(column.y)))
    assert (np.diff(column.y) < 0).all()
    assert np.abs(column.y).max() <= drawing.HEIGHT / 2 + 1e-9
    assert len(column.y) <= max(most, 2 * drawing.ENDS + drawing.BINS)
    alone = column.single[column.slot]
    assert np.unique(column.slot[alone]).size == alone.sum()  # no two neurons in one circle
    if column.dead:
        assert not live[~alone].any()


def test_a_dense_network_of_millions_of_weights_is_drawn_in_few_lines():
    generator = np.random.default_rng(0)
    shapes = [(1000, 784), (1000, 1000), (1000, 1000), (10, 1000)]
    start = time.perf_counter()
    picture = drawing.network([generator.normal(size=shape).astype(np.float32) for shape in shapes])
    assert time.perf_counter() - start < 10
    most = 2 * (2 * drawing.ENDS + drawing.BINS) ** 2
    assert all(len(found.get_paths()) <= most for found in curves(picture))
    assert "2,794,000 of 2,794,000 weights" in picture.alt


def test_a_network_without_any_weight_left_is_still_drawn():
    picture = drawing.network([np.zeros((30, 4)), np.zeros((3, 30))])
    assert "0 of 210 weights are left (0 %)" in picture.alt
    assert len(picture.png(50)) > 1000


def test_the_same_network_gives_the_same_bytes_and_dark_gives_others():
    first = drawing.network([FIRST, LAST]).png(50)
    assert drawing.network([FIRST, LAST]).png(50) == first
    assert drawing.network([FIRST, LAST], look="dark").png(50) != first


@pytest.mark.parametrize(
    ("weights", "more", "message"),
    [
        ([], {}, "no layers"),
        ([np.ones(3)], {}, r"layer 0 should be a matrix \[out, in\] of finite numbers, got shape \(3,\)"),
        ([np.ones((2, 3)), np.ones((2, 3))], {}, "layer 1 takes 3 inputs, the one before has 2 outputs"),
        ([np.array([[np.nan]])], {}, "finite"),
        ([FIRST, LAST], {"names": ["a", "b"]}, "2 entries for 3 columns"),
        ([FIRST, LAST], {"before": [3, 100]}, "2 entries for 3 columns before pruning"),
        ([FIRST, LAST], {"outputs": ["a"]}, "1 entries for 2 outputs"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(weights, more, message):
    with pytest.raises(PrunelabError, match=message) as caught:
        drawing.network(weights, **more)
    assert "\n" not in str(caught.value)
