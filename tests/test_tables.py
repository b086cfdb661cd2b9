"""Tables to read: the numbers behind them are the numbers of the runs, and no cell can break the page."""

import numpy as np
import pandas as pd
import pytest

from prunelab import papers, plots, stats
from prunelab.errors import PrunelabError
from prunelab.plots import tables
from prunelab.runs import columns as quantities


def rounds():
    return pd.DataFrame(
        {
            "id": ["b0", "b1", "b2", "a0"],
            "strategy": ["b", "b", "b", "a"],
            "seed": [0, 1, 2, 0],
            "round": [1, 1, 1, 0],
            "test_accuracy": [0.90, 0.91, 0.92, 0.5],
            "weights": [1000.0, 2000.0, 3000.0, 2794000.0],
            "seconds": [0.011, 0.012, 0.013, 3.0],
            "test_f1_macro": [np.nan] * 4,
        }
    )


def test_a_comparison_gives_means_intervals_and_n_in_the_order_of_the_rows():
    table = tables.comparison(rounds(), metrics=["test_accuracy", "weights"])
    half = 4.302653 * 0.01 / np.sqrt(3)  # t of 2 degrees of freedom, by hand
    assert list(table.numbers["strategy"]) == ["b", "a"]
    assert table.numbers["test_accuracy_half"].tolist() == pytest.approx([half, np.nan], nan_ok=True)
    assert table.frame["test accuracy (%)"].tolist() == ["91.00 ± 2.48", "50.00"]
    assert table.frame["weights left"].tolist() == ["2,000 ± 2,484", "2,794,000"]
    assert table.frame["n"].tolist() == ["3", "1"]
    assert "no ± where n = 1" in table.caption


def test_a_quantity_that_nobody_measured_is_left_out():
    table = tables.comparison(rounds(), metrics=["test_accuracy", "test_f1_macro"])
    assert list(table.frame) == ["strategy", "test accuracy (%)", "n"]


def test_small_numbers_keep_three_digits_and_one_column_has_one_count_of_decimals():
    column = tables.comparison(rounds(), metrics=["seconds"]).frame["training time (s)"]
    assert column.tolist() == ["0.0120 ± 0.0025", "3.0000"]


def test_plain_text_lines_up_and_markdown_and_html_escape():
    table = tables.Table(
        pd.DataFrame({"name|x": ["<b>", "a|b"], "value": ["1", "-20.5"]}), pd.DataFrame(), "note & more"
    )
    assert str(table).splitlines() == [
        "name|x  value",
        "──────  ─────",
        "<b>         1",
        "a|b     -20.5",
        "note & more",
    ]
    assert table.markdown() == "| name\\|x | value |\n| --- | ---: |\n| <b> | 1 |\n| a\\|b | -20.5 |\n"
    page = table._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "note &amp; more" in page


def test_the_chosen_row_stands_out_and_is_named_to_screen_readers():
    table = tables.Table(pd.DataFrame({"x": ["1", "2"]}), pd.DataFrame(), chosen=1)
    assert table._repr_html_().count("aria-current") == 1
    assert 'aria-current="true" style="font-weight:bold"><td style="text-align:right">2<' in table._repr_html_()


def test_verdicts_show_sign_number_interval_and_what_was_wanted():
    ours = {"iris": stats.mean_interval([0.9, 1.1, 0.8]), "digits": -0.02}
    table = tables.verdicts(papers.verdicts("dyprune/claim_98", ours, seen={"iris": "99 % gone"}))
    assert table.frame["reported"].tolist() == ["≥ 0"] * 3
    assert table.frame["ours"].tolist() == ["0.93 ± 0.38 (99 % gone)", "-0.0200", quantities.MISSING]
    assert table.frame["verdict"].tolist() == ["✓ yes", "✗ no", f"{quantities.MISSING} not measured"]
    assert "color:" in table._repr_html_()


def test_verdicts_on_what_is_seen_and_what_was_not_measured():
    table = tables.verdicts(papers.verdicts("dyprune/training", {"pruned_in_both_halves": False, "prunings": 7}))
    rows = table.frame.set_index("reported")
    assert (rows.loc["yes", "ours"], rows.loc["yes", "verdict"]) == ("no", "~ not at this budget")
    assert table.frame["kind"].tolist() == ["claim", "check", "check", "check"]
    assert (rows.loc["≤ 8", "ours"], rows.loc["≤ 8", "difference"]) == ("7", "-1")
    assert rows.loc["≥ 3", "ours"].tolist() == [quantities.MISSING] * 2


def test_the_summary_names_the_worst_first():
    def rows(kind, *verdicts):
        return [{"kind": kind, "verdict": verdict} for verdict in verdicts]

    claims = rows("claim", "confirmed", "contradicted", "undecided (interval spans)", "undecided (one run)")
    assert tables.summary(claims) == "✗ 1 of 4 claims confirmed, 1 contradicted, 2 undecided"
    mixed = rows("claim", "not at this budget") + rows("check", *["as published"] * 2) + rows("question", "yes", "no")
    assert tables.summary(mixed) == (
        "~ 0 of 1 claim confirmed, 1 not at this budget; ✓ 2 of 2 checks as published; ✗ 1 of 2 questions yes, 1 no"
    )
    assert tables.summary([]) == "nothing to judge"


def test_the_index_reads_minutes_and_verdicts_of_what_was_saved():
    shown = papers.verdicts("dyprune/training", {"prunings": 9})
    numbers = pd.DataFrame({"epoch": [1]})
    plots.save(None, "dyprune/training", numbers, {"preset": "paper", "minutes": 12.34, "claims": shown})
    table = tables.index(papers.artefacts("dyprune"), links=True)
    rows = table.frame.set_index("artefact")
    training = rows.loc["`dyprune/training`"]
    assert training["title"].endswith("](#dyprune/training)")
    assert training["preset"] == "paper"
    assert training["minutes"] == "12.3"
    missing = quantities.MISSING
    claim, check = (
        f"{missing} 0 of 1 claim confirmed, 1 not measured",
        "✗ 0 of 3 checks as published, 1 not as published",
    )
    assert training["verdict"] == f"{claim}; {check}, 2 not measured"
    rest = rows.drop(training.name)
    assert set(rest["verdict"]) == {"not made yet"}
    assert set(rest["minutes"]) == {quantities.MISSING}
    assert len(rows) == len(papers.artefacts("dyprune"))


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        (None, quantities.MISSING),
        ({"preset": "paper", "n": "3 seeds"}, "paper, 3 of 10 seeds"),
        ({"preset": "paper", "n": "1 seed"}, "paper, 1 of 10 seeds"),
        ({"preset": "paper", "n": "10 seeds"}, "paper"),
        ({"preset": "paper", "n": "as in each figure"}, "paper"),
        ({"preset": "quick"}, "quick"),
    ],
)
def test_a_preset_that_was_run_with_fewer_seeds_says_so(facts, shown):
    artefact = papers.artefact("dyprune/table_iris")  # 10 seeds
    assert tables.preset(artefact, facts) == shown
    if facts:
        plots.save(None, artefact.figure, pd.DataFrame({"x": [1]}), facts)
        assert tables.index([artefact]).frame["preset"].tolist() == [shown]


def test_papers_are_counted_by_what_was_saved():
    shown = papers.verdicts("dyprune/training", {"prunings": 9})
    plots.save(None, "dyprune/training", pd.DataFrame({"epoch": [1]}), {"preset": "paper", "claims": shown})
    table = tables.by_paper()
    first = table.numbers.set_index("paper").loc["dyprune"]
    assert (first["made"], first["of"]) == (1, len(papers.artefacts("dyprune")))
    assert first[["claims", "confirmed", "contradicted", "undecided", "not measured"]].tolist() == [1, 0, 0, 0, 1]
    assert first[["checks", "as published", "not as published", "questions"]].tolist() == [3, 0, 1, 0]
    assert table.frame.iloc[0, 0] == "DyPrune"
    assert table.numbers.loc[1:, "made"].sum() == 0


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(PrunelabError, match="no column 'test_acuracy': did you mean 'test_accuracy'"):
        tables.comparison(rounds(), metrics=["test_acuracy"])


@pytest.mark.parametrize(
    ("column", "value", "half", "text"),
    [
        ("test_accuracy", 0.971, 0.0031, "97.10 % ± 0.31"),
        ("sparsity", 0.95, np.nan, "0.95"),
        ("density", 0.04398, np.nan, "0.044"),
        ("compression_ratio", 22.7, np.nan, "22.7 ×"),  # noqa: RUF001
        ("weights", 2794000, np.nan, "2,794,000"),
        ("round", 0, np.nan, "0"),
        ("prune.amount", 0.25, np.nan, "0.25"),
        ("test_difference", -0.0123, 0.0045, "-1.23 points ± 0.45"),
        ("test_loss", np.nan, np.nan, quantities.MISSING),
    ],
)
def test_numbers_are_shown_in_their_units(column, value, half, text):
    assert quantities.quantity(column).text(value, half) == text


@pytest.mark.parametrize(
    ("count", "text"), [(403, "403"), (999.6, "1k"), (4637, "4.64k"), (2794000, "2.79M"), (0.05, "0.05")]
)
def test_counts_are_short_where_there_is_little_room(count, text):
    assert quantities.short(count) == text


def test_a_table_fits_the_terminal_and_loses_no_word():
    rows = [{"claim": "the masks of one method are kept", "n": "3", "verdict": "✓ confirmed"}] * 2
    table = tables.Table(pd.DataFrame(rows), pd.DataFrame(), "the interval decides what is confirmed")
    lines = table.text(40).splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[2:4] == ["the masks of one method   3  ✓ confirmed", "are kept"]
    assert table.text(200) == str(table)
    assert max(map(len, table.text(10).splitlines())) > 10  # columns have a least width
