"""From names to figures: what is run, what is left alone, and what a notebook that fails leaves behind."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from prunelab import cli, papers, paths
from prunelab.errors import PrunelabError
from prunelab.headless import reproduce
from prunelab.headless import runner as notebook_runner
from prunelab.headless.runner import NotebookFailed
from prunelab.plots import gallery
from prunelab.pruners import METHODS

LIBRARY = """\
[[paper]]
key = "toy"
title = "A toy"
authors = "A"
venue = "V"
year = 2024
doi = "10.1/toy"

[[paper]]
key = "other"
title = "Another"
authors = "B"
venue = "W"
year = 2025
doi = "10.1/other"

[[artefact]]
id = "toy/line"
paper = "toy"
title = "A line"
claim = "It rises."
data = []
presets.smoke = { epochs = 1 }
presets.quick = { epochs = 2 }
presets.paper = { epochs = 3 }
claims = [{ id = "enough", text = "t", source = "s", rule = "at_least", reported = 2, quantity = "epochs" }]

[[artefact]]
id = "toy/line_of_mnist"
paper = "toy"
title = "Another line"
claim = "It rises."
data = ["mnist"]
presets = { smoke = { epochs = 1 }, quick = { epochs = 2 }, paper = { epochs = 3 } }

[[artefact]]
id = "other/table"
paper = "other"
title = "A table"
claim = "It is full."
data = []
presets = { smoke = {}, quick = {}, paper = {} }
"""
PARAMETERS = """\
preset: str = "quick"
epochs: int = 1
jobs: int | None = None
device: str = "auto\""""
SAVE = """\
import pandas as pd
from prunelab import papers
from prunelab.plots import gallery
from prunelab.pruners import METHODS
claims = papers.verdicts("toy/line", {{"epochs": epochs}}) if {judged} else None
other = {{}} if epochs == {{"smoke": 1, "quick": 2, "paper": 3}}[preset] else {{"epochs": epochs}}
facts = {{"preset": preset, "overridden": other, "alt": "a line", "claims": claims}}
gallery.save(None, {id!r}, pd.DataFrame({{"epochs": [epochs]}}), facts)
"""


def write(artefact, *cells, parameters=PARAMETERS):
    """The notebook of an artefact, with these cells after its parameters."""
    path = paths.notebooks() / f"{artefact}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=[head, *map(new_code_cell, cells)], metadata={"kernelspec": kernel})
    nbformat.write(notebook, path)


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A repository of three notebooks that only save their figure."""
    (tmp_path / "papers.toml").write_text(LIBRARY)
    library = papers.read(tmp_path / "papers.toml")
    monkeypatch.setattr("prunelab.papers.library._own", lambda: library)
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    for artefact in ("toy/line", "toy/line_of_mnist", "other/table"):
        write(artefact, SAVE.format(id=artefact, judged=artefact == "toy/line"))
    return tmp_path


@pytest.fixture
def ran(monkeypatch):
    """Notebooks run in this process, without a kernel; the list of those that ran, with their parameters."""
    runs = []

    def run(path, out, parameters, *, environment):
        names = {}
        runs.append((path.stem, parameters))
        for cell in nbformat.read(path, 4).cells:
            try:
                exec(cell.source, names)
            except ArithmeticError as error:
                raise NotebookFailed(f"{path}: {error!r}") from None
            names.update(parameters)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("executed")

    monkeypatch.setattr(notebook_runner, "run", run)
    return runs


@pytest.fixture
def call(capsys):
    def program(*words):
        code = cli.main(["reproduce", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return program


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def rows(name):
    return (paths.figures() / f"{name}.csv").read_text().split()[1:]


# What a name means


@pytest.mark.parametrize(
    ("names", "paper", "found"),
    [
        (["toy/line"], None, ["toy/line"]),
        (["line"], None, ["toy/line"]),
        (["of_mnist"], None, ["toy/line_of_mnist"]),
        (["toy"], None, ["toy/line", "toy/line_of_mnist"]),
        (["all"], None, ["toy/line", "toy/line_of_mnist", "other/table"]),
        ([], "other", ["other/table"]),
        (["line", "toy/line"], "other", ["other/table", "toy/line"]),
    ],
)
def test_an_artefact_is_named_by_its_id_its_paper_or_a_part_that_no_other_has(names, paper, found):
    assert [artefact.id for artefact in reproduce.chosen(names, paper)] == found


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["lin"], "artefact 'lin' is not clear: toy/line, toy/line_of_mnist"),
        (["other/tabel"], "no artefact 'other/tabel': did you mean 'other/table'?"),
        ([], "nothing was asked for"),
    ],
)
def test_a_name_that_means_nothing_or_two_things_is_refused(names, says):
    with pytest.raises(PrunelabError, match=says):
        reproduce.chosen(names)


# What will run, with which values


def planned(names=("toy/line",), *rest, **options):
    return reproduce.plan(reproduce.chosen(names), *rest, **options)


def test_values_come_from_the_preset_then_from_the_command_line():
    assert planned(("toy/line",), "paper")[0].parameters == {"preset": "paper", "epochs": 3}
    assert planned(("toy/line",), "paper", ["epochs=7"])[0].parameters == {"preset": "paper", "epochs": 7}


def test_a_value_reaches_only_the_notebooks_that_declare_it():
    write("other/table", parameters='preset: str = "quick"')
    line, table = planned(("toy/line", "other/table"), "smoke", ["epochs=7"], machine={"jobs": 2, "device": None})
    assert line.parameters == {"preset": "smoke", "epochs": 7, "jobs": 2}
    assert line.overridden == {"epochs": 7}
    assert table.parameters == {"preset": "smoke"}


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("epoch=7", "no parameter 'epoch'; did you mean 'epochs'?"),
        ("epochs=many", "epochs = 'many': should be int"),
        ("preset=paper", "choose it with --preset"),
    ],
)
def test_a_wrong_value_is_refused_before_the_first_notebook_runs(call, ran, assignment, says):
    code, out, err = call("toy/line", "other/table", "-p", assignment)
    assert (code, out, ran) == (cli.WRONG, "", [])
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("variable", ["PRUNELAB_RUNS", "PRUNELAB_OUT"])
def test_a_place_that_cannot_be_written_is_refused_before_the_first_notebook_runs(
    call, ran, monkeypatch, tmp_path, variable
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    code, out, err = call("toy/line")
    assert (code, out, ran) == (cli.WRONG, "", [])
    assert str(tmp_path / "file" / "below") in err
    assert f": set {variable} to a folder" in err
    assert err.count("\n") == 1


def test_a_whole_paper_passes_over_what_needs_a_download(call, ran, monkeypatch, tmp_path):
    monkeypatch.delenv("PRUNELAB_DATA", raising=False)
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    code, out, _ = call("--paper", "toy", "--preset", "smoke")
    assert code == 0
    assert [name for name, _ in ran] == ["line"]
    remedy = "skipped: mnist is not here; set PRUNELAB_DATA, or run `prunelab data prepare mnist`"
    assert f"[2/2] toy/line_of_mnist: {remedy}" in out
    assert call("toy/line_of_mnist", "--preset", "smoke")[0] == 0
    assert ran[-1][0] == "line_of_mnist"


# What is up to date


def test_a_second_call_does_nothing(call, ran):
    assert call("toy/line", "--preset", "smoke")[0] == 0
    before = {name: (paths.figures() / name).stat().st_mtime_ns for name in files(paths.figures())}
    code, out, _ = call("toy/line", "--preset", "smoke")
    assert (code, len(ran)) == (0, 1)
    assert "[1/1] toy/line: up to date" in out
    assert before == {name: (paths.figures() / name).stat().st_mtime_ns for name in files(paths.figures())}


def test_what_the_budget_does_not_reach_is_left_and_the_same_command_goes_on(call, ran, monkeypatch):
    code, _, err = call("toy/line", "--budget", "soon")
    assert (code, err) == (2, "prunelab: budget = 'soon': should be a length of time like 90s, 10m or 2h\n")
    monkeypatch.setattr("prunelab.budget.over", lambda end: len(ran) == 1)
    code, out, _ = call("toy/line", "other/table", "--preset", "smoke", "--budget", "10m")
    assert (code, len(ran)) == (3, 1)
    assert "[2/2] other/table: left, the time is used" in out
    assert "1 of 2 are left: the same command goes on with them" in out


def test_force_does_it_again(call, ran):
    call("toy/line", "--preset", "smoke")
    assert call("toy/line", "--preset", "smoke", "--force")[0] == 0
    assert len(ran) == 2


def test_a_changed_parameter_does_it_again_and_back_again(call, ran):
    for epochs in ("4", "5", "5", "4"):
        call("toy/line", "--preset", "smoke", "-p", f"epochs={epochs}")
    assert [parameters["epochs"] for _, parameters in ran] == [4, 5, 4]
    assert rows("smoke/toy/line") == ["4"]


def test_where_it_runs_decides_nothing(call, ran):
    call("toy/line", "--preset", "smoke", "--jobs", "1", "--device", "cpu")
    call("toy/line", "--preset", "smoke", "--jobs", "2")
    assert len(ran) == 1
    assert ran[0][1] == {"preset": "smoke", "epochs": 1, "jobs": 1, "device": "cpu"}


def change_claims(monkeypatch, tmp_path):
    (tmp_path / "papers.toml").write_text(LIBRARY.replace("reported = 2", "reported = 3"))
    library = papers.read(tmp_path / "papers.toml")
    monkeypatch.setattr("prunelab.papers.library._own", lambda: library)


@pytest.mark.parametrize(
    "change",
    [
        lambda *_: write("toy/line", SAVE.format(id="toy/line", judged=True) + "\n2 + 2"),
        change_claims,
        lambda *_: (paths.figures() / "smoke" / "toy" / "line.csv").unlink(),
        lambda *_: (paths.figures() / "smoke" / "toy" / "line.csv").write_text("epochs\n9\n"),
        lambda *_: reproduce.plan(reproduce.chosen(["toy/line"]), "smoke")[0].record.write_text('{"notebook": "'),
        lambda *_: reproduce.plan(reproduce.chosen(["toy/line"]), "smoke")[0].record.unlink(),
    ],
    ids=["notebook", "claims", "figure gone", "figure changed", "half a record", "no record"],
)
def test_what_changed_is_made_again(call, ran, monkeypatch, tmp_path, change):
    call("toy/line", "--preset", "smoke")
    change(monkeypatch, tmp_path)
    assert call("toy/line", "--preset", "smoke")[0] == 0
    assert len(ran) == 2
    assert rows("smoke/toy/line") == ["1"]


def test_a_comment_is_no_change_and_another_version_of_the_method_is(call, ran, monkeypatch, capsys):
    call("toy/line", "--preset", "smoke")
    write("toy/line", SAVE.format(id="toy/line", judged=True) + "  # said otherwise")
    call("toy/line", "--preset", "smoke")
    assert len(ran) == 1
    path = paths.figures() / "smoke" / "toy" / "line.json"
    facts = {**json.loads(path.read_text()), "versions": [{"kind": "method", "name": "dropnet", "version": 1}]}
    del facts["files"], facts["sha256_of_this"]
    path.write_text(json.dumps(facts))
    reproduce.plan(reproduce.chosen(["toy/line"]), "smoke")[0].remember()
    assert reproduce.plan(reproduce.chosen(["toy/line"]), "smoke")[0].reason == "up to date"
    mended = {**METHODS, "dropnet": METHODS["dropnet"]._replace(version=2)}
    monkeypatch.setattr("prunelab.training.versions._REGISTRIES", {"method": mended})
    assert reproduce.made_otherwise("smoke/toy/line", paths.out()) == "method dropnet of version 1, now 2"
    assert reproduce.plan(reproduce.chosen(["toy/line"]), "smoke")[0].reason == ""


def test_a_notebook_that_leaves_no_figure_is_never_up_to_date(call, ran):
    write("other/table", "1 + 1")
    assert call("other/table", "--preset", "smoke")[0] == 0
    assert call("other/table", "--preset", "smoke")[0] == 0
    assert len(ran) == 2


# Where figures go


def test_each_preset_has_its_place_and_quick_never_replaces_paper(call, ran):
    call("toy/line", "--preset", "smoke")
    assert files(paths.figures()) == ["smoke/toy/line.csv", "smoke/toy/line.json"]
    call("toy/line", "--preset", "quick")
    assert (rows("smoke/toy/line"), rows("toy/line")) == (["1"], ["2"])
    call("toy/line", "--preset", "paper")
    assert rows("toy/line") == ["3"]
    call("toy/line", "--preset", "quick")
    assert (rows("toy/line"), rows("quick/toy/line")) == (["3"], ["2"])
    assert gallery.saved("toy/line")["preset"] == "paper"

    done = len(ran)
    for preset in ("smoke", "quick", "paper"):
        assert ": up to date" in call("toy/line", "--preset", preset)[1]
    assert len(ran) == done


def test_other_parameters_than_the_presets_have_a_place_of_their_own(call, ran):
    call("toy/line", "--preset", "quick")
    assert "~ not at this budget" in call("toy/line", "--preset", "quick", "-p", "epochs=1")[1]
    assert (rows("toy/line"), rows("custom/toy/line")) == (["2"], ["1"])
    assert gallery.saved("custom/toy/line")["overridden"] == {"epochs": 1}
    for words in ((), ("-p", "epochs=1"), ("-p", "epochs=2")):  # the preset's own value is no other
        assert ": up to date" in call("toy/line", "--preset", "quick", *words)[1]
    assert len(ran) == 2


def test_what_is_computed_stands_beside_what_is_committed_and_leaves_it_alone(call, ran, monkeypatch, tmp_path):
    call("toy/line", "--preset", "quick")  # that is the committed one
    before = {name: (paths.figures() / name).read_bytes() for name in files(paths.figures())}
    monkeypatch.setenv("PRUNELAB_OUT", str(tmp_path / "out"))
    _, out, _ = call("toy/line", "--preset", "quick", "-p", "epochs=1")
    [row] = [line for line in out.splitlines() if line.startswith("claim  t ")]
    assert row.index("~ not at this budget") < row.index("✓ confirmed")
    assert "0 of 1 verdicts are those on the committed numbers" in out
    assert "1 of 1 verdicts are those on the committed numbers" in call("toy/line", "--preset", "quick")[1]
    assert files(tmp_path / "out") == [f"{n}{e}" for n in ("custom/toy/line", "toy/line") for e in (".csv", ".json")]
    assert before == {name: (paths.figures() / name).read_bytes() for name in files(paths.figures())}
    call("toy/line", "--preset", "paper", "--into", str(paths.figures()))
    assert rows("toy/line") == ["3"]
    assert paths.out() == tmp_path / "out"


def test_verdicts_are_shown_for_numbers_that_mean_something(call, ran):
    assert "confirmed" not in call("toy/line", "--preset", "smoke")[1]
    assert "✓ confirmed" in call("toy/line", "--preset", "quick")[1]


# What fails


def test_a_failing_notebook_stops_no_other_and_is_tried_again(call, ran):
    write("toy/line", "1 / 0")
    code, out, _ = call("toy/line", "other/table", "--preset", "smoke")
    assert code == cli.FAILED
    assert "[1/2] toy/line: FAILED: " in out
    assert "ZeroDivisionError" in out
    assert "[2/2] other/table: done in" in out
    assert files(paths.figures()) == ["smoke/other/table.csv", "smoke/other/table.json"]
    assert files(paths.runs()) == ["notebooks/other/table.ipynb", "notebooks/other/table.smoke.json"]

    write("toy/line", SAVE.format(id="toy/line", judged=True))
    assert call("toy/line", "other/table", "--preset", "smoke")[0] == 0
    assert [name for name, _ in ran] == ["line", "table", "line"]


def test_ctrl_c_ends_it_and_remembers_nothing(call, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebook_runner, "run", interrupted)
    code, out, err = call("toy/line", "other/table", "--preset", "smoke")
    assert (code, out) == (cli.INTERRUPTED, "")
    assert err.count("\n") == 1
    assert files(paths.runs()) == files(paths.figures()) == []


def test_with_a_kernel_the_figure_the_executed_copy_and_the_record_are_left(call):
    write("toy/line", SAVE.format(id="toy/line", judged=False))
    code, out, err = call("toy/line", "--preset", "smoke", "-p", "epochs=6")
    assert (code, err) == (0, "")
    assert "[1/1] toy/line: done in 0:" in out
    assert rows("smoke/toy/line") == ["6"]
    assert files(paths.runs()) == ["notebooks/toy/line.ipynb", "notebooks/toy/line.smoke.json"]
    record = json.loads((paths.runs() / "notebooks" / "toy" / "line.smoke.json").read_text())
    assert record["parameters"] == {"preset": "smoke", "epochs": 6}
    assert sorted(record["figures"]) == ["smoke/toy/line.csv", "smoke/toy/line.json"]
    assert "up to date" in call("toy/line", "--preset", "smoke", "-p", "epochs=6")[1]


def test_with_a_kernel_a_failure_leaves_the_failed_copy_alone(call):
    write("toy/line", "1 / 0", SAVE.format(id="toy/line", judged=True))
    code, out, _ = call("toy/line", "--preset", "smoke")
    assert code == cli.FAILED
    [line] = [line for line in out.splitlines() if "FAILED" in line]
    assert "cell 2 raised ZeroDivisionError" in line
    assert files(paths.figures()) == []
    assert files(paths.runs()) == ["notebooks/toy/line.failed.ipynb"]


# What is seen meanwhile


class Clock:
    """An event that is set at the third look."""

    def __init__(self):
        self.looks = 0

    def wait(self, seconds):
        self.looks += 1
        return self.looks > 2


def test_long_work_shows_progress_and_an_estimate(capsys, monkeypatch, tmp_path):
    (tmp_path / "ticks").write_bytes(b"." * 250)
    (tmp_path / "ticks.total").write_text("1000")
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    cli._watch("[1/1] toy/line", tmp_path / "ticks", 40.0, Clock())
    out = capsys.readouterr().out
    assert out == "[1/1] toy/line: 1:00, 250 of 1,000 epochs, about 3:00 left\n"  # one line, not one per look


def test_before_the_first_epoch_only_the_time_is_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("time.monotonic", lambda: 3700.0)
    cli._watch("a", tmp_path / "ticks", 0.0, Clock())
    assert capsys.readouterr().out == "a: 1:01:40\n"
