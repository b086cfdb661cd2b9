"""The pictures of the explorer: numbers in, HTML out."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib import image

from prunelab.lab.live import view


def test_the_curve_puts_points_where_they_belong():
    left, right = view.LEFT, view.WIDTH - view.RIGHT
    top, bottom = view.TOP, view.HEIGHT - view.BOTTOM
    drawn = view.curve([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], (0.5, 0.5), 1.0, 'a "b" <c>')
    points = [float(number) for number in re.split("[ ,]", re.search('points="([^"]*)"', drawn)[1])]
    assert points == [left, top, (left + right) / 2, (top + bottom) / 2, right, bottom]  # in the order of the rates
    assert f'class="here" cx="{(left + right) / 2}" cy="{(top + bottom) / 2}"' in drawn
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in drawn
    assert "dense 100.0 %" in drawn


def test_the_layers_are_a_table_whose_bars_are_the_densities():
    rows = [
        {"parameter": "<a>.weight", "kept": 250, "total": 1000},
        {"parameter": "b.weight", "kept": 0, "total": 1000},
    ]
    table = view.layers(rows)
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", table)] == [25.0, 0.0, 12.5]
    assert re.findall("<td>([^<]*)</td>", table)[-3:] == ["250", "2,000", "0.1250"]
    assert "<th>&lt;a&gt;</th>" in table
    assert "<img" not in table


def test_the_units_are_cells_whose_opacity_is_what_they_keep():
    shares = np.linspace(0, 1, 600)
    picture = view.strip(shares)
    assert 'alt="599 of 600 units keep a weight"' in picture
    image = pixels(base64.b64decode(re.search('base64,([^"]*)', picture)[1]))
    assert image.shape == (3, 200, 4)
    opacity = image[..., 3].reshape(-1)
    assert opacity[0] == 0
    assert opacity[-1] == 1
    assert (np.diff(opacity) >= 0).all()
    assert (opacity[1:] > 0.2).all(), "a unit that keeps a little is not one that keeps nothing"


def pixels(content):
    return image.imread(io.BytesIO(content))


def test_the_histogram_draws_counts_on_a_log_axis_and_both_thresholds():
    drawn = view.histogram(2.0, [1, 10, 100, 10], [0, 10, 100, 0], 1.0, "a <cut>")
    all_, kept = re.findall('d="([^"]*)"', drawn)
    heights = [[float(y) for y in re.findall(r"V([\d.]+)", path)] for path in (all_, kept)]
    base = view.LOW - view.BOTTOM
    assert heights[1][0] == heights[1][3] == heights[1][4] == base
    a, b, c = (base - heights[0][i] for i in (0, 1, 2))
    assert b - a == pytest.approx(c - b, abs=0.2) == pytest.approx(2 * (b - a) / 2, abs=0.2)
    assert a > 0, "one weight can be seen"
    left, right = view.LEFT, view.WIDTH - view.RIGHT
    cuts = [float(x) for x in re.findall('class="cut" x1="([^"]*)"', drawn)]
    assert cuts == [left + (right - left) / 4, left + (right - left) * 3 / 4]
    assert "110 of 121 are kept. a &lt;cut&gt;" in drawn


@pytest.mark.parametrize(("count", "words"), [(12, "12 bytes"), (1_064_800, "1.06 MB"), (999, "999 bytes")])
def test_bytes_are_put_in_words(count, words):
    assert view.size(count) == words
