"""papers.toml and the verdicts: every rule on four numbers done by hand, every wrong entry refused by name."""

import math
import re
from types import SimpleNamespace

import pytest

from prunelab import papers, stats
from prunelab.papers import (
    AS_PUBLISHED,
    CONFIRMED,
    CONTRADICTED,
    KINDS,
    NO,
    NOT_AS_PUBLISHED,
    NOT_HERE,
    NOT_MEASURED,
    ONE_RUN,
    UNDECIDED,
    YES,
    Claim,
    PapersError,
)
from prunelab.plots import gallery, tables


def claim(rule, reported=None, tolerance=0.0, kind="claim"):
    return Claim("c", "text", "source", rule, "quantity", reported, tolerance, kind)


def interval(mean, half, n=3):
    return SimpleNamespace(mean=mean, half=half, n=n)


@pytest.mark.parametrize(
    ("rule", "reported", "tolerance", "ours", "verdict"),
    [
        ("at_least", 98, 0, interval(98.5, 0.5), CONFIRMED),  # 98.0 to 99.0
        ("at_least", 98, 0, interval(98.5, 0.6), UNDECIDED),  # 97.9 to 99.1
        ("at_least", 98, 0, interval(97.0, 0.9), CONTRADICTED),  # 96.1 to 97.9
        ("at_least", 98, 1, interval(97.5, 0.5), CONFIRMED),  # 97.0 to 98.0 against 97
        ("at_most", 8, 0, 8, CONFIRMED),
        ("at_most", 8, 0, 9, CONTRADICTED),
        ("at_most", 8, 0.5, interval(8.4, 0.2), UNDECIDED),  # 8.2 to 8.6 against 8.5
        ("within", 0.9, 0.1, interval(0.95, 0.04), CONFIRMED),  # 0.91 to 0.99 in 0.8 to 1.0
        ("within", 0.9, 0.1, interval(0.95, 0.06), UNDECIDED),  # 0.89 to 1.01
        ("within", 0.9, 0.1, interval(1.2, 0.1), CONTRADICTED),  # 1.1 to 1.3
        ("within", 323270, 0, 323270, CONFIRMED),
        ("within", 323270, 0, 323271, CONTRADICTED),
        ("order", None, 0, interval(0.02, 0.01), CONFIRMED),
        ("order", None, 0, interval(0.02, 0.02), UNDECIDED),  # touches 0: not above it
        ("order", None, 0, 0, CONTRADICTED),  # equal is not above
        ("order", None, 0.01, interval(-0.002, 0.005), CONFIRMED),  # -0.007 to 0.003: nowhere a point below
        ("order", None, 0.01, interval(-0.02, 0.005), CONTRADICTED),
        ("shown", None, 0, True, CONFIRMED),
        ("shown", None, 0, False, CONTRADICTED),
        ("shown", None, 0, interval(1.0, 0.0), CONFIRMED),
        ("shown", None, 0, interval(0.5, 0.3), UNDECIDED),  # seen in some runs
    ],
)
def test_the_interval_decides_by_the_rule(rule, reported, tolerance, ours, verdict):
    assert papers.judge(claim(rule, reported, tolerance), ours) == verdict


@pytest.mark.parametrize("rule", ["at_least", "at_most", "within", "order", "shown"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_run_alone_decides_nothing(rule, kind):
    reported = None if rule in ("order", "shown") else 0.5
    for value in (0.0, 1.0):
        assert papers.judge(claim(rule, reported, kind=kind), stats.mean_interval([value])) == ONE_RUN


def test_each_kind_has_its_own_words_and_only_a_claim_needs_the_papers_budget():
    good, bad = interval(1.0, 0.1), interval(-1.0, 0.1)
    words = {"claim": (CONFIRMED, CONTRADICTED), "check": (AS_PUBLISHED, NOT_AS_PUBLISHED), "question": (YES, NO)}
    for kind, (yes, no) in words.items():
        own = claim("order", kind=kind)
        assert (papers.judge(own, good, level=False), papers.judge(own, bad, level=True)) == (yes, no)
        assert papers.judge(own, bad, level=False) == (NOT_HERE if kind == "claim" else no)
        assert papers.judge(own, interval(0.0, 1.0), level=False) == UNDECIDED


def test_a_published_preset_is_at_the_papers_level_unless_more_than_its_seeds_was_overridden():
    own = papers.artefact("dyprune/table_fashion_mnist")
    row = next(c for c in own.claims if c.kind == "claim")
    given = {"figure": "table_fashion_mnist", "preset": "paper"}

    def level(**more):
        return papers.library.at_level(own, row, papers.chosen(own.id, given | more))

    assert level()
    assert level(seeds=3)  # fewer runs widen the interval, and that decides
    assert not level(epochs=3)
    assert not level(preset="quick")
    lost = papers.verdicts(papers.chosen(own.id, given), {"headline_faithful": interval(-5.0, 1.0)})
    assert lost.set_index("claim").loc["headline_faithful", "verdict"] == CONTRADICTED
    lost = papers.verdicts(papers.chosen(own.id, given | {"epochs": 2}), {"headline_faithful": interval(-5.0, 1.0)})
    assert lost.set_index("claim").loc["headline_faithful", "verdict"] == NOT_HERE


def test_stored_rows_are_judged_by_todays_rules_and_a_new_claim_is_not_measured():
    judged = papers.verdicts("dyprune/claim_98", {"iris": interval(0.5, 0.2)}, seen={"iris": "99 % gone"})
    rows = gallery.plain(judged)
    again = papers.rejudged(papers.artefact("dyprune/claim_98"), rows)
    assert gallery.plain(again) == rows
    rows[0]["ours"] = -3.0
    assert papers.rejudged(papers.artefact("dyprune/claim_98"), rows[:1])[0]["verdict"] == NO
    assert {row["verdict"] for row in papers.rejudged(papers.artefact("dyprune/claim_98"), [])} == {NOT_MEASURED}


def test_no_committed_claim_is_contradicted_below_the_papers_level(monkeypatch):
    monkeypatch.delenv("PRUNELAB_FIGURES")
    for artefact in papers.artefacts():
        for row in (gallery.saved(artefact.figure) or {}).get("claims") or []:
            assert row["verdict"] != CONTRADICTED or row["level"], (artefact.id, row["claim"])


@pytest.mark.parametrize("ours", [None, math.nan, stats.mean_interval([])])
def test_nothing_measured_is_no_verdict(ours):
    assert papers.judge(claim("at_least", 1), ours) == NOT_MEASURED


@pytest.mark.parametrize(("rule", "ours"), [("shown", 3), ("within", "many"), ("at_least", [1, 2])])
def test_a_value_of_the_wrong_kind_is_refused(rule, ours):
    with pytest.raises(PapersError, match="claim 'c'"):
        papers.judge(claim(rule, None if rule == "shown" else 1), ours)


def test_every_claim_gets_a_row_and_what_was_left_out_is_not_measured():
    seen = papers.verdicts("dyprune/training", {"prunings": 7, "pruned_in_both_halves": True})
    assert list(seen["claim"]) == [c.id for c in papers.artefact("dyprune/training").claims]
    row = seen.set_index("claim").loc["at_most_8"]
    assert (row["reported"], row["ours"], row["difference"], row["verdict"]) == (8, 7, -1, AS_PUBLISHED)
    assert math.isnan(row["n"])
    assert set(seen.loc[seen["ours"].isna(), "verdict"]) == {NOT_MEASURED}


def test_the_interval_and_its_n_are_in_the_verdict():
    ours = stats.mean_interval([98.9, 99.1, 98.8])
    row = papers.verdicts("dyprune/claim_98", {"iris": ours}).iloc[0]
    assert row["interval"] == pytest.approx(4.302653 * 0.152753 / math.sqrt(3), rel=1e-5)  # t, sd and n by hand
    assert (row["n"], row["verdict"]) == (3, YES)


def test_a_number_that_no_claim_asks_for_is_refused_with_the_nearest():
    with pytest.raises(PapersError, match="did you mean 'prunings'"):
        papers.verdicts("dyprune/training", {"pruning": 7})


def test_a_wrong_artefact_or_paper_gets_the_nearest():
    with pytest.raises(PapersError, match="did you mean 'dyprune/training'"):
        papers.artefact("dyprune/trainig")
    with pytest.raises(PapersError, match="did you mean 'dyprune'"):
        papers.artefacts("dyprun")
    with pytest.raises(PapersError, match="did you mean 'dropnet/figure_03'"):
        papers.artefact("dropnet/figure_3")
    with pytest.raises(PapersError, match="did you mean 'smoke'"):
        papers.artefact("dyprune/rate").parameters("smok")


def test_every_artefact_of_the_package_has_a_paper_three_presets_and_its_own_names():
    for artefact in papers.artefacts():
        name = f"{artefact.paper}/{artefact.kind}" if artefact.kind else artefact.id
        assert artefact.notebook == f"{name}.ipynb"
        assert artefact.figure == artefact.id
        assert artefact.claims or "is our own" in artefact.note, artefact.id
        assert all(c.source and not c.source.startswith("our own") for c in artefact.claims if c.kind == "claim")
        assert artefact.parameters("smoke")["preset"] == "smoke"
    assert {a.id for a in papers.artefacts("dyprune")} >= {"dyprune/rate", "dyprune/claim_98"}


def test_the_reported_rates_follow_the_formula():
    rates = [c for c in papers.artefact("dyprune/rate").claims if c.id.startswith("rate_")]
    assert len(rates) == 8
    for one in rates:
        weights = int(one.id.removeprefix("rate_"))
        assert one.reported == round(min(max((math.log(weights) - 6) / 10, 0), 0.9), 6), one.id


def test_the_reported_sizes_follow_the_formula_event_by_event():
    reported = {c.id: c.reported for c in papers.artefact("dyprune/rate").claims if c.id.startswith("weights_")}
    left = 784 * 1000 + 2 * 1000 * 1000 + 1000 * 10
    for event in range(1, 16):
        left -= round((math.log(left) - 6) / 10 * left)
        assert reported.pop(f"weights_{event}", left) == left
    assert not reported


PAPER = 'paper = [{key = "p", title = "T", authors = "A", venue = "V", year = 2023, doi = "d"}]\n'
PRESETS = "presets = {smoke = {}, quick = {}, paper = {}}"


def written(tmp_path, artefacts):
    path = tmp_path / "papers.toml"
    path.write_text(f"{PAPER}artefact = [{artefacts}]\n")
    return path


def entry(id_="p/a", more=PRESETS):
    return f'{{id = "{id_}", paper = "{id_.split("/")[0]}", title = "t", claim = "c", data = [], {more}}}'


def judged(rule):
    return f'{PRESETS}, claims = [{{id = "c", text = "", source = "", quantity = "q", rule = {rule}}}]'


@pytest.mark.parametrize(
    ("artefacts", "complaint"),
    [
        (entry(more="presets = {smoke = {}}"), "presets should be smoke, quick, paper, got smoke"),
        (entry(more="presets = {smoke = {a = 1}, quick = {a = 2}, paper = {}}"), "preset paper says nothing of a"),
        (entry(more="presets = {smoke = {a = 1}, quick = {}, paper = {}}"), "preset quick says nothing of a"),
        (entry(more="presets = {all = {without = 1}, smoke = {}, quick = {}, paper = {}}"), "can be called 'without'"),
        (entry() + "," + entry(), "'p/a' stands there twice"),
        (entry("q/a"), "paper 'q'"),
        (entry("p/A"), "small letters"),
        (entry(more=f"{PRESETS}, colour = 1"), "colour"),
        (entry(more=judged('"about"')), "rule"),
        (entry(more=judged('"within"')), "needs a reported number"),
        (entry(more=judged('"shown", reported = 1')), "takes no reported number"),
        (entry(more=judged('"shown", tolerance = -1')), "tolerance = -1"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_line_that_names_it(tmp_path, artefacts, complaint):
    with pytest.raises(PapersError, match=re.escape(complaint)) as caught:
        papers.read(written(tmp_path, artefacts))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("papers.toml: ")


def test_a_file_that_is_no_toml_or_not_there_is_refused(tmp_path):
    with pytest.raises(PapersError, match="No such file"):
        papers.read(tmp_path / "nothing.toml")
    (tmp_path / "bad.toml").write_text("paper = [")
    with pytest.raises(PapersError, match="no valid TOML"):
        papers.read(tmp_path / "bad.toml")


def test_parameters_keep_the_types_they_were_written_in(tmp_path):
    more = "presets = {all = {a = 1, b = 2.0, c = true, d = [3, 4]}, smoke = {b = 1.0}, quick = {}, paper = {}}"
    _, (artefact,) = papers.read(written(tmp_path, entry(more=more)))
    values = artefact.parameters("smoke")
    assert [type(values[name]) for name in "abcd"] == [int, float, bool, list]
    assert values["b"] == 1.0


def test_a_notebook_takes_what_was_given_and_else_the_presets_values():
    use = papers.chosen("dyprune/table_iris", {"preset": "quick", "seeds": 1, "epochs": 25, "hidden": None, "other": 3})
    assert (use.seeds, use.epochs, use.hidden, use.preset) == (1, 25, [100, 100, 100], "quick")
    assert use.overridden == {"seeds": 1}  # 25 epochs are the preset's own
    more = {"data": "iris", "train_size": 0, "published_seeds": 10}
    assert use.parameters == {"hidden": [100] * 3, "epochs": 25, "seeds": 1, **more}
    assert use.without("hidden", "epochs") == {"seeds": 1, **more}
    assert str(use).endswith("; given: seeds = 1")
    with pytest.raises(PapersError, match="preset 'qick': did you mean 'quick'"):
        papers.chosen("dyprune/table_iris", {"preset": "qick"})


def test_the_papers_own_lead_stands_beside_ours_and_decides_nothing():
    ours = interval(0.02, 0.005, 5)
    judged = papers.verdicts("dropnet/figure_03", {"random_over_max": ours}, {"random_over_max": 0.281})
    row = judged[judged["claim"] == "random_over_max"].iloc[0]
    assert (row["reported"], row["verdict"]) == (0.281, CONFIRMED)
    assert row["difference"] == pytest.approx(-0.261)
    shown = tables.verdicts(judged).frame.set_index("claim").loc["random does better than max."]
    assert shown["reported"] == "+0.2810 (> 0)"
    assert judged.set_index("claim").loc["agreeing", "reported"] == 0.9
