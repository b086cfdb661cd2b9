"""Two methods side by side, from runs or from means; and that this needs no torch."""

import re
import subprocess
import sys
import textwrap

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from prunelab import paths
from prunelab.errors import PrunelabError
from prunelab.lab import versus, widgets
from prunelab.lab.versus import Results
from prunelab.stats import mean_interval

ROOT = paths.root()
NOTEBOOK = ROOT / "notebooks" / "explore" / "compare_methods.ipynb"


def runs():
    """By hand: a is two points above b, seed by seed; at round 2 it is one above, or one below."""
    found = []
    for turn, size, gaps in ((0, 1.0, (0, 0, 0)), (1, 2.0, (0.02, 0.02, 0.023)), (2, 4.0, (0.01, -0.01, 0.001))):
        for seed, gap in enumerate(gaps):
            base = {"seed": seed, "round": turn, "compression_ratio": size}
            found.append({**base, "strategy": "b", "test_accuracy": 0.8 + 0.05 * seed})
            found.append({**base, "strategy": "a", "test_accuracy": 0.8 + 0.05 * seed + gap})
            found.append({**base, "strategy": "c <x>", "test_accuracy": 0.5, "compression_ratio": 1.5 * size})
    return pd.DataFrame(found)


def means():
    rows = [("b", 1, 2.0, 0.80, 0.03), ("a", 1, 2.0, 0.90, 0.04), ("b", 2, 4.0, 0.7, 0.03), ("a", 2, 4.0, 0.74, 0.04)]
    names = ["strategy", "round", "compression_ratio", "test_accuracy", "test_accuracy_half"]
    return pd.DataFrame(rows, columns=names).assign(n=3)


def parts(box):
    _, slider, row, sentence, table, errors, _ = box.children
    return (slider, *row.children, sentence, table, errors)


def plain(widget):
    return re.sub("<[^>]*>", "", widget.value)


def results(rows):
    return Results.of(rows, "compression_ratio", "test_accuracy")


def test_runs_of_one_seed_are_compared_with_each_other():
    found = results(runs()).difference("a", "b", 1)
    assert (found.n, found.mean) == (3, pytest.approx(0.021))
    assert found.half == pytest.approx(mean_interval([0.02, 0.02, 0.023]).half)
    words = results(runs()).words("a", "b", 1)
    assert words.endswith("a is 2.10 ± 0.43 points above b over 3 seeds: the 95 % interval is clear of zero.")
    two = results(runs().query("seed > 0")).words("a", "b", 1)
    assert "over 2 seeds (too few for an interval to say much)" in two
    assert words.startswith("Test accuracy: a 87.10 % ± 12.80 (n = 3) at 2.00 ×, b 85.00 % ± 12.42")  # noqa: RUF001
    assert "a is 2.10 ± 0.43 points" not in results(runs()).words("a", "b", 2)
    assert "b is 2.10 ± 0.43 points below a" in results(runs()).words("b", "a", 1)


def test_an_interval_with_zero_in_it_is_undecided():
    words = results(runs()).words("a", "b", 2)
    assert words.endswith("Undecided: the difference of 0.03 ± 2.49 points over 3 seeds can have either sign.")


def test_of_means_alone_the_half_widths_are_added_in_squares():
    found = results(means()).difference("a", "b", 1)
    assert (found.mean, found.half, found.n) == (pytest.approx(0.1), pytest.approx(0.05), 3)
    assert "a is 10.00 ± 5.00 points above b: the 95 % interval is clear of zero" in results(means()).words("a", "b", 1)
    assert "Undecided: the difference of 4.00 ± 5.00 points" in results(means()).words("a", "b", 2)


def test_that_interval_is_no_narrower_than_welchs():
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.normal(0, 1, 3), rng.normal(0.5, rng.uniform(0.1, 3), 3)
        welch = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        ours = np.hypot(mean_interval(a).half, mean_interval(b).half)
        assert ours >= (welch.high - welch.low) / 2 - 1e-12


def test_one_run_and_unequal_compressions_decide_nothing():
    one = results(runs())
    assert one.words("a", "b", 1, seed=2).endswith("a is 2.30 points above b in one run, which decides nothing.")
    assert "compressed differently, so this decides nothing" in one.words("c <x>", "b", 1)
    assert one.words("a", "a", 1).endswith("Choose two to compare.")


def test_what_was_not_measured_is_said_and_not_drawn():
    rows = runs()
    rows = rows[~((rows["strategy"] == "a") & (rows["round"] == 2))]
    assert results(rows).words("a", "b", 2) == "a was not measured here; nothing is interpolated."
    table = results(rows).html("a", "b", 2)
    (row,) = re.findall('<tr class="one">.*?</tr>', table)
    assert "<circle" not in row
    assert "<td>–</td>" in row  # noqa: RUF001


def test_positions_are_the_measured_ones_named_by_their_compression():
    assert results(runs()).positions == [("1 to 1.5 ×", 0), ("2 to 3 ×", 1), ("4 to 6 ×", 2)]  # noqa: RUF001
    alone = runs()[runs()["strategy"] != "c <x>"].drop(columns="round")
    assert results(alone).positions == [("1 ×", 1.0), ("2 ×", 2.0), ("4 ×", 4.0)]  # noqa: RUF001


def test_the_table_draws_means_and_intervals_where_they_belong():
    table = results(means()).html("a", "b", 1)
    (a,), (b,) = (re.findall(f'<tr class="{kind}">.*?</tr>', table) for kind in ("one", "two"))
    at, left, right = (float(re.search(f'{name}="([^"]*)"', a)[1]) for name in ("cx", "x1", "x2"))
    ends = re.findall('<line class="bar" x1="([^"]*)" x2="([^"]*)"', a)[0]
    assert (float(ends[0]) + float(ends[1])) / 2 == pytest.approx(at, abs=0.1)
    square = float(re.search('<rect class="dot" x="([^"]*)"', b)[1]) + 5
    scale = (at - square) / 0.1
    assert (float(ends[1]) - float(ends[0])) / 2 == pytest.approx(0.04 * scale, abs=0.15)
    assert "Highest mean of 2: a." in table
    assert "90.00 % ± 4.00" in a
    assert left <= right


def test_means_that_are_nearly_alike_are_drawn_with_their_whole_intervals():
    rows = means().assign(test_accuracy=[0.9, 0.90001] * 2, test_accuracy_half=0.004)
    table = results(rows).html("a", "b", 1)
    for left, right in re.findall('<line class="bar" x1="([^"]*)" x2="([^"]*)"', table):
        assert versus.EDGE < float(left) < float(right) < versus.WIDTH - versus.EDGE
    assert "Highest mean of 2: b, and 1 more with the same number." in table


def test_names_are_escaped():
    assert "c &lt;x&gt;" in results(runs()).html("a", "b", 1)
    assert "c <x>" not in results(runs()).html("a", "b", 1)


def test_moving_a_control_changes_sentence_and_table_together():
    slider, one, two, seed, sentence, table, errors = parts(widgets.compare(runs()))
    assert (one.value, two.value, slider.value, seed.value) == ("a", "b", 1, "all (mean)")
    assert plain(sentence) == results(runs()).words("a", "b", 1)
    before = table.value
    slider.value = 2
    assert "Undecided" in plain(sentence)
    assert table.value != before
    seed.value = 1
    assert "in one run" in plain(sentence)
    two.value = "c <x>"
    assert "compressed differently" in plain(sentence)
    assert errors.outputs == ()


def test_without_single_runs_there_is_no_seed_to_choose():
    _, _, _, seed, *_ = parts(widgets.compare(means()))
    assert seed.disabled
    assert seed.label == "all (mean)"  # not empty


def test_an_error_is_shown_raised_and_leaves_no_old_picture(monkeypatch):
    slider, *_, sentence, table, errors = parts(widgets.compare(runs()))
    monkeypatch.setattr(Results, "html", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slider.value = 0
    assert [output["ename"] for output in errors.outputs] == ["ZeroDivisionError"]
    assert (sentence.value, table.value) == ("", "")
    monkeypatch.undo()
    slider.value = 2
    assert errors.outputs == ()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (runs().drop(columns="compression_ratio"), "no column 'compression_ratio'"),
        (runs().assign(test_accuracy=float("nan")), "the table has no rows"),
        (runs()[runs()["strategy"] == "a"], "only 'a': two are needed"),
        (pd.concat([runs(), runs()]), "a seed occurs twice at one round of one strategy"),
    ],
)
def test_a_table_that_cannot_be_compared_is_refused(rows, words):
    with pytest.raises(PrunelabError, match=re.escape(words)):
        widgets.compare(rows)


def environment():
    """Package -> what is asked of it, in the environment of the binder."""
    wanted = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    return dict((*line.split(" ", 1), "")[:2] for line in wanted)


def test_the_binder_asks_for_the_same_versions_as_the_package_and_for_no_torch():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = environment()
    assert not {"torch", "pytorch", "torchvision"} & set(asked)
    for name, version in asked.items():
        if name == "python":
            assert f'requires-python = "{version}"' in project
        elif name != "pip":
            assert f'"{name.removesuffix("-base")}{version}"' in project, name


def test_the_notebook_needs_no_more_than_the_binder_has():
    """Its code in an interpreter in which everything else that prunelab may need cannot be imported."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'^    "([A-Za-z0-9_-]+)[><]', text, re.MULTILINE)) - {"prunelab"}
    known = {"scikit-learn": "sklearn", "import-linter": "importlinter", "pytest-xdist": "xdist"}
    lacking = sorted(known.get(n, n) for n in listed - {name.removesuffix("-base") for name in environment()})
    assert {"torch", "torchvision", "pyarrow", "safetensors"} <= set(lacking)
    cells = nbformat.read(NOTEBOOK, 4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    head = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {lacking!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}} here")

        sys.meta_path.insert(0, Absent())
    """
    check = "assert len(results) >= 2, results\nprint([type(rows).__name__ for rows in results.values()])"
    done = subprocess.run(
        [sys.executable, "-c", f"{textwrap.dedent(head)}\n{code}\n{check}"],
        capture_output=True,
        text=True,
        cwd=NOTEBOOK.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("compare_methods", {"tables": "related/hed*"}, "there is no figures/related/hed*.csv"),
        ("watch_dyprune", {"strategy": "dynamic"}, "strategy = 'dynamic': should be one of ['dynamic trigger, "),
        ("watch_dyprune", {"hidden": 100}, "Model: hidden = 100"),
        ("what_pruning_buys", {"preset": "quik"}, "preset 'quik': did you mean 'quick'?"),
    ],
)
def test_a_mistyped_parameter_is_refused_in_one_line(name, wrong, words):
    book = nbformat.read(NOTEBOOK.with_stem(name), as_version=4)
    parameters, first = [cell.source for cell in book.cells if cell.cell_type == "code"][:2]
    here = {}
    exec(parameters, here)
    with pytest.raises(PrunelabError, match=re.escape(words)):
        exec(first, here | wrong)
