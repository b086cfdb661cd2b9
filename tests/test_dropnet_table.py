"""How much of a network went before its curve fell, by hand; the table of all networks."""

import math

import pandas as pd
import pytest

from prunelab.errors import PrunelabError
from prunelab.papers.dropnet import networks as dropnet_table
from prunelab.papers.dropnet.study import FIGURES
from prunelab.plots.paired import ours_and_reported


def points(**curves):
    fractions = [1.0, 0.8, 0.64, 0.5]
    return pd.concat(
        [
            pd.DataFrame({"strategy": name, "fraction": fractions, "reported": own[0], "ours": own[1], "n": 3})
            for name, own in curves.items()
        ]
    )


def test_units_are_spared_down_to_the_first_point_that_fell():
    nan = math.nan
    found = dropnet_table.spared(
        points(
            min=([0.98, 0.97, 0.975, 0.5], [0.95, 0.96, 0.938, 0.95]),  # falls at 0.5; falls at 0.64 and comes back
            max=([nan] * 4, [0.9, 0.88, 0.9, 0.9]),  # no reported curve; falls at once
        )
    ).set_index("strategy")
    assert found.loc["min", "reported"] == pytest.approx(1 - 0.64)
    assert found.loc["min", "ours"] == pytest.approx(1 - 0.8)
    assert math.isnan(found.loc["max", "reported"])
    assert found.loc["max", "ours"] == 0
    assert found["n"].tolist() == [3, 3]
    lenient = dropnet_table.spared(points(min=([0.98] * 4, [0.95, 0.96, 0.938, 0.95])), within=0.02)
    assert lenient[["reported", "ours"]].to_numpy().tolist() == [[0.5, 0.5]]


def test_the_table_has_a_row_for_each_network_and_does_without_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNELAB_FIGURES", str(tmp_path))
    rows = dropnet_table.networks()
    assert set(rows["figure"].value_counts()) == {6}
    assert rows["ours"].isna().all()
    text = str(dropnet_table.table(rows))
    assert "Model B, Conv 64-64, MNIST" in text
    first = rows[rows["figure"] == "Fig. 3"].iloc[0]
    assert first["units"] == 80
    assert first["parameters"] == 784 * 40 + 40 + 40 * 40 + 40 + 40 * 10 + 10  # 33,450
    assert first["macs"] == 784 * 40 + 40 * 40 + 40 * 10
    folder = tmp_path / "dropnet"
    folder.mkdir()
    points(min=([0.98, 0.97, 0.975, 0.5], [0.95, 0.95, 0.95, 0.95])).to_csv(folder / "figure_03.csv")
    ours = dropnet_table.networks(["figure_03"])
    assert ours["ours"].max() == 0.5
    assert "50 (36)" in str(dropnet_table.table(ours))


def test_a_network_that_learnt_little_has_no_share_of_ours():
    found = dropnet_table.spared(points(min=([0.98] * 4, [0.48] * 4), max=([0.98] * 4, [0.5] * 4))).set_index(
        "strategy"
    )
    assert math.isnan(found.loc["min", "ours"])
    assert found.loc["max", "ours"] == found.loc["min", "reported"] == 0.5


def test_the_caption_names_what_the_figures_were_made_with(tmp_path, monkeypatch):
    facts = {
        "figure_03": {"preset": "quick", "n": "10 seeds", "data": ["MNIST"], "hardware": "cpu"},
        "figure_04": {"preset": "quick", "n": "5 seeds", "data": ["MNIST, 2,000 training samples"], "hardware": "cpu"},
    }
    monkeypatch.setattr(dropnet_table.gallery, "saved", lambda artefact: facts.get(artefact.split("/")[1]))
    rows = pd.DataFrame({"artefact": ["dropnet/figure_03", "dropnet/figure_04", "dropnet/figure_05"], "ours": 0.5})
    assert dropnet_table.sources(rows) == {
        "n": "5 seeds to 10 seeds",
        "interval": "",
        "data": ["MNIST", "MNIST, 2,000 training samples"],
        "hardware": "cpu",
    }


@pytest.mark.parametrize("wrong", ["figure_33", "figure_18"])
def test_a_figure_that_shows_something_else_is_refused_by_name(wrong):
    with pytest.raises(PrunelabError, match=f"no figure '{wrong}' shows test accuracy by metric"):
        dropnet_table.networks([wrong])


def test_units_are_those_of_the_paper():
    units = {name: sum(FIGURES[name].units) for name in ("figure_03", "figure_09", "figure_11", "figure_12")}
    assert units == {"figure_03": 80, "figure_09": 384, "figure_11": 4800, "figure_12": 5504}


def test_what_was_only_reported_is_drawn_without_seeds_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNELAB_FIGURES", str(tmp_path))
    rows = dropnet_table.networks(["figure_03"])
    picture = ours_and_reported(rows, ["spared"], ["figure", "strategy"])
    assert "Fig. 3: min, units gone within a point: reported 35.0 %." in picture.alt
