"""Each refusal of the notebook runner, on notebooks of two or three cells."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from prunelab import paths
from prunelab.headless.runner import (
    NotebookFailed,
    Parameter,
    check_parameters,
    declared_parameters,
    parse_assignment,
    run,
    tidy,
)

DECLARED = """\
epochs: int = 3  # times through the data
lr: float = 0.1  # learning rate, "size" of a step
seeds: list[int] = [0, 1]
name: str = "a=#b"  # text
quick: bool = True
limit: float | None = None  # seconds
options: dict = {}"""


def write(path: Path, *cells: str, parameters: str | None = "epochs: int = 1", kernel: str = "python3") -> Path:
    """A notebook with these code cells after its parameters."""
    head = [] if parameters is None else [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    kernelspec = {"name": kernel, "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=[*head, *map(new_code_cell, cells)], metadata={"kernelspec": kernelspec})
    nbformat.write(notebook, path)
    return path


def failure(tmp_path: Path, *cells: str, **limits: float) -> str:
    """The reason why a notebook with these cells is refused, once it is seen that only the failed copy is left."""
    path, out = write(tmp_path / "figure.ipynb", *cells), tmp_path / "out" / "figure.ipynb"
    with pytest.raises(NotebookFailed) as caught:
        run(path, out, **limits)
    assert [file.name for file in out.parent.iterdir()] == ["figure.failed.ipynb"]
    reason = str(caught.value)
    assert "\n" not in reason
    assert reason.startswith(str(path))
    assert reason.endswith("see " + str(tmp_path / "out" / "figure.failed.ipynb"))
    return reason


def test_papermill_logs_afterwards_as_before(tmp_path):
    log = logging.getLogger("papermill")
    before = log.level
    assert "broken" in failure(tmp_path, "raise ValueError('broken')")
    assert log.level == before


def gone(process: int) -> bool:
    """Whether a process has ended within five seconds."""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


# What a notebook can be asked for


def test_parameters_are_read_with_type_default_and_help(tmp_path):
    declared = declared_parameters(write(tmp_path / "a.ipynb", parameters=DECLARED))
    assert list(declared) == ["epochs", "lr", "seeds", "name", "quick", "limit", "options"]
    assert declared["lr"] == Parameter("lr", "float", 0.1, 'learning rate, "size" of a step')
    assert declared["name"] == Parameter("name", "str", "a=#b", "text")
    assert declared["limit"].type == "float | None"
    assert declared["seeds"].help == ""


@pytest.mark.parametrize("count", [0, 2])
def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path, count):
    path = write(tmp_path / "a.ipynb", parameters=None)
    notebook = nbformat.read(path, 4)
    notebook.cells = [new_code_cell("a: int = 1", metadata={"tags": ["parameters"]}) for _ in range(count)]
    nbformat.write(notebook, path)
    with pytest.raises(NotebookFailed, match=f"{count} cells are tagged 'parameters'; tag exactly one"):
        declared_parameters(path)


def test_parameters_in_a_markdown_cell_are_refused(tmp_path):
    cell = new_markdown_cell("a: int = 1", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    with pytest.raises(NotebookFailed, match="is markdown; tag a code cell"):
        declared_parameters(tmp_path / "a.ipynb")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("rate = 0.1", "line 1 is not a new 'name: type = literal"),
        ("keep: float = 1 - 0.2 * 2", "line 1 is not a new"),
        ("a: int", "line 1 is not a new"),
        ("import os", "line 1 is not a new"),
        ("a: int = 1\na: int = 2", "line 2 is not a new"),
        ("a: int =", "line 1 is not Python"),
        ("a: int = 0.5", "line 1: a = 0.5: should be int"),
        ("a: tuple = (1, 2)", "it would arrive changed"),
        ("a: Rate = 1", "type 'Rate' is not understood; use bool, int"),
    ],
)
def test_a_parameters_line_that_papermill_would_mistake_is_refused(tmp_path, line, complaint):
    with pytest.raises(NotebookFailed, match=complaint):
        declared_parameters(write(tmp_path / "a.ipynb", parameters=line))


def test_a_misspelt_parameter_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(NotebookFailed, match="no parameter 'epoch'; did you mean 'epochs'"):
        check_parameters(write(tmp_path / "a.ipynb", parameters=DECLARED), {"epoch": 1})


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 1.5},
        {"epochs": True},
        {"epochs": "3"},
        {"epochs": None},
        {"lr": "1e-3"},
        {"lr": False},
        {"seeds": 0},
        {"seeds": [0, 0.5]},
        {"name": 7},
        {"quick": 1},
        {"options": []},
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, wrong):
    with pytest.raises(NotebookFailed, match=rf"{next(iter(wrong))} = .*: should be .*, for example"):
        check_parameters(write(tmp_path / "a.ipynb", parameters=DECLARED), wrong)


@pytest.mark.parametrize(
    "changed",
    [
        {"seeds": (0, 1)},
        {"options": {1: 2}},
        {"options": {"deep": [(1,)]}},
        {"epochs": np.int64(3)},
        {"lr": np.float64(0.1)},
        {"lr": float("nan")},
        {"quick": np.bool_(True)},
        {"name": Path("a")},
    ],
)
def test_a_value_that_json_changes_is_refused(tmp_path, changed):
    with pytest.raises(NotebookFailed, match="it would arrive changed"):
        check_parameters(write(tmp_path / "a.ipynb", parameters=DECLARED), changed)


def test_a_whole_number_becomes_the_float_that_was_declared_and_none_passes_where_it_may(tmp_path):
    values = check_parameters(write(tmp_path / "a.ipynb", parameters=DECLARED), {"lr": 1, "limit": None, "seeds": []})
    assert values == {"lr": 1.0, "limit": None, "seeds": []}
    assert type(values["lr"]) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("epochs=5", 5),
        ("lr=1e-3", 1e-3),
        ("lr=2", 2.0),
        ("lr=-.5", -0.5),
        ("seeds=[0,1]", [0, 1]),
        ("seeds= [ ]", []),
        ("name=007", "007"),
        ("name=a=b [1]", "a=b [1]"),
        ("name=", ""),
        ("quick=false", False),
        ("quick=True", True),
        ("limit=None", None),
        ("limit=3", 3.0),
        ("options={'a': 1}", {"a": 1}),
    ],
)
def test_an_assignment_is_read_by_its_declared_type(tmp_path, text, value):
    declared = declared_parameters(write(tmp_path / "a.ipynb", parameters=DECLARED))
    name, parsed = parse_assignment(text, declared)
    assert (name, parsed, type(parsed)) == (text.split("=")[0], value, type(value))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("epochs", "write name=value"),
        ("epoch=3", "did you mean 'epochs'"),
        ("epochs=many", "epochs = 'many': should be int, for example 3"),
        ("epochs=007", "should be int"),
        ("quick=0", "should be bool"),
        ("quick=no", "should be bool"),
        ("seeds=0,1", "it would arrive changed"),
        ("seeds=__import__('os')", "should be list"),
        ("lr=1e999", "finite"),
        ("epochs=" + "(" * 5000, "should be int"),
        ("epochs={[]: 1}", "should be int"),
    ],
)
def test_an_assignment_that_means_nothing_is_refused(tmp_path, text, complaint):
    declared = declared_parameters(write(tmp_path / "a.ipynb", parameters=DECLARED))
    with pytest.raises(NotebookFailed, match=complaint):
        parse_assignment(text, declared)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not a notebook"),
        ("[]", "is not a notebook"),
        ("{}", "not a no"),
    ],
)
def test_a_file_that_is_no_notebook_is_refused_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "a.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NotebookFailed, match=complaint) as caught:
        declared_parameters(path)
    assert "\n" not in str(caught.value)


# Runs that end well


def test_a_notebook_runs_in_this_interpreter_with_the_values_asked_for(tmp_path, monkeypatch):
    """Whatever kernel the notebook names or the user has registered, and from wherever it is called."""
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = ["/nowhere/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "of the user", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)
    look = """\
import json, os, sys, pathlib
seen = [sys.executable, os.getcwd(), os.environ["NEW"], epochs, lr, seeds, name, quick, limit, options]
pathlib.Path(os.environ["SEEN"]).write_text(json.dumps(seen))"""
    path = write(tmp_path / "a {b}.ipynb", look, "", "# only a comment", parameters=DECLARED, kernel="of_the_author")
    out, seen = tmp_path / "deep" / "er" / "a.ipynb", tmp_path / "seen.json"
    out.parent.mkdir(parents=True)
    out.with_suffix(".failed.ipynb").write_text("of an earlier run")
    values = {"lr": 1, "seeds": [2], "name": "7", "quick": False, "options": {"a": [None]}}

    run(path, out, values, environment={"NEW": "cost $HOME", "SEEN": str(seen)})

    expected = [sys.executable, str(paths.root()), "cost $HOME", 3, 1.0, [2], "7", False, None, {"a": [None]}]
    assert json.loads(seen.read_text()) == expected
    assert [file.name for file in out.parent.iterdir()] == ["a.ipynb"]
    assert Path.cwd() == tmp_path


# Failures that papermill keeps quiet about, or leaves lying about


def test_an_error_is_named_with_its_cell_and_the_cells_after_it(tmp_path):
    reason = failure(tmp_path, "1", "raise ValueError('two\\nlines')", "3", "4")
    assert "cell 3 raised ValueError: two lines; never ran: cell 4, cell 5;" in reason


def test_exit_with_success_half_way_is_a_failure(tmp_path):
    assert "cell 2 raised SystemExit: 0; never ran: cell 3;" in failure(tmp_path, "import sys; sys.exit(0)", "2")


def test_a_cell_that_takes_too_long_is_a_failure(tmp_path):
    reason = failure(tmp_path, "import time; time.sleep(60)", "2", cell_timeout=0.5)
    assert "cell 2 took longer than 0.5 s; never ran: cell 3;" in reason


def test_cells_that_take_too_long_together_are_a_failure(tmp_path):
    reason = failure(tmp_path, "import time", "time.sleep(60)", "3", cell_timeout=30, time_limit=0.5)
    assert "was cut off: all cells took 0.5 s; never ran:" in reason


def test_a_dead_kernel_is_a_failure_although_every_status_says_completed(tmp_path):
    reason = failure(tmp_path, "import os; os.kill(os.getpid(), 9)", "2")
    assert "cell 2 lost its kernel, as happens when memory runs out; never ran: cell 3;" in reason
    copy = nbformat.read(tmp_path / "out" / "figure.failed.ipynb", 4)
    assert {cell.metadata.papermill.status for cell in copy.cells} == {"completed"}


def test_execution_counts_of_an_earlier_run_are_no_witness(tmp_path):
    path = write(tmp_path / "a.ipynb", "import sys; sys.exit(0)", "2")
    notebook = nbformat.read(path, 4)
    for count, cell in enumerate(notebook.cells, 1):
        cell.execution_count = count
    nbformat.write(notebook, path)
    with pytest.raises(NotebookFailed, match="never ran: cell 3"):
        run(path, tmp_path / "out.ipynb")


def test_a_cell_that_its_tag_skips_is_a_failure(tmp_path):
    path = write(tmp_path / "a.ipynb", "1", "2")
    notebook = nbformat.read(path, 4)
    notebook.cells[1].metadata.tags = ["skip-execution"]
    nbformat.write(notebook, path)
    with pytest.raises(NotebookFailed, match="never ran: cell 2"):
        run(path, tmp_path / "out.ipynb")


@pytest.mark.parametrize(
    "swallowing",
    [
        "out = w.Output()\nwith out:\n    1 / 0",
        "w.interactive_output(lambda a: 1 / a, {'a': w.IntSlider(value=0)})",
        "w.interact(lambda a: 1 / a, a=w.IntSlider(value=0));",
    ],
    ids=["Output", "interactive_output", "interact"],
)
def test_an_error_that_a_widget_swallows_is_a_failure(tmp_path, swallowing):
    reason = failure(tmp_path, f"import ipywidgets as w\n{swallowing}", "2")
    assert "a widget raised ZeroDivisionError: division by zero;" in reason


def test_a_kernel_that_does_not_start_is_a_failure(tmp_path):
    path = write(tmp_path / "a.ipynb", "1")
    with pytest.raises(NotebookFailed, match=r"Kernel died before.*never ran: cell 1, cell 2") as caught:
        run(path, tmp_path / "out.ipynb", environment={"PYTHONHOME": str(tmp_path)})
    assert "\n" not in str(caught.value)


def test_a_scratch_folder_whose_path_is_too_long_for_a_socket_is_no_hindrance(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    run(write(tmp_path / "a.ipynb", "1"), tmp_path / "out.ipynb")
    assert (tmp_path / "out.ipynb").is_file()
    assert list(deep.iterdir()) == []


def test_output_widgets_do_not_stall_the_cells_that_show_them(tmp_path):
    """Their messages share a socket with the replies; a reply that is overlooked is waited for without end."""
    path = write(tmp_path / "a.ipynb", "import ipywidgets as w", *["out = w.Output()\nwith out:\n    print(1)"] * 30)
    run(path, tmp_path / "out.ipynb", time_limit=60)
    assert (tmp_path / "out.ipynb").is_file()


def test_a_failure_keeps_the_good_copy_of_an_earlier_run(tmp_path):
    path = write(tmp_path / "a.ipynb", "1 / epochs")
    run(path, tmp_path / "out.ipynb")
    before = (tmp_path / "out.ipynb").read_bytes()
    with pytest.raises(NotebookFailed, match="ZeroDivisionError"):
        run(path, tmp_path / "out.ipynb", {"epochs": 0})
    assert (tmp_path / "out.ipynb").read_bytes() == before


# Refused before a kernel starts


def test_bad_places_are_refused_before_anything_runs(tmp_path):
    path = write(tmp_path / "a.ipynb", "raise RuntimeError")
    (tmp_path / "file").touch()
    for out, complaint in [
        (path, "give another file"),
        (tmp_path / "a.html", "ends in .ipynb"),
        (tmp_path / "file" / "a.ipynb", "cannot write into"),
    ]:
        with pytest.raises(NotebookFailed, match=complaint):
            run(path, out)
    with pytest.raises(NotebookFailed, match=r"working directory .* does not exist"):
        run(path, tmp_path / "b.ipynb", cwd=tmp_path / "none")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ipynb", "file"]


@pytest.mark.skipif(os.name != "posix", reason="signals between processes")
def test_an_interrupt_leaves_no_file_and_no_kernel(tmp_path):
    """Ctrl-C during the last of the cells: neither copy, nor scratch folder, nor kernel is left."""
    pid = tmp_path / "pid"
    mark = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))"
    write(tmp_path / "figure.ipynb", f"{mark}\ntime.sleep(60)")
    script = f"""\
import signal
from pathlib import Path
from prunelab.headless.runner import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
here = Path({str(tmp_path)!r})
run(here / "figure.ipynb", here / "out" / "figure.ipynb")
"""
    (tmp_path / "script.py").write_text(script)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=30)[1].decode()

    assert process.returncode not in (0, None)
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert list((tmp_path / "out").iterdir()) == []
    assert list(scratch.iterdir()) == []
    assert gone(int(pid.read_text()))


# What may be committed


def test_a_stripped_notebook_is_tidy(tmp_path):
    path = write(tmp_path / "a.ipynb", "total = epochs + 1\ntotal", parameters="epochs: int = 1  # how often")
    assert tidy(path) == []


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        (["def f(): pass"], "cell 2: def or class; its place is the package"),
        (["class A: pass"], "cell 2: def or class"),
        (["!pip install torch"], "cell 2: a shell command"),
        (["files = !ls"], "cell 2: a shell command"),
        (["%%bash\nls"], "cell 2: a shell command"),
        (["%pip install torch"], "cell 2: a shell command"),
        (["%load_ext autoreload"], "cell 2: a magic"),
        (["path = '/home/me/data'"], "cell 2: absolute path"),
        (["path = '~/data'"], "cell 2: absolute path"),
        (["path = 'C:\\\\data'"], "cell 2: absolute path"),
        (["epochs = 9"], "cell 2: sets the parameter 'epochs' anew"),
        (["for epochs in range(2): pass"], "cell 2: sets the parameter 'epochs' anew"),
        (["a b"], "cell 2: not Python"),
        (["1"] * 12, "13 cells, at most 12"),
        (["1\n" * 60], "61 lines of code, at most 60"),
    ],
)
def test_what_does_not_belong_into_a_reproduction_is_named(tmp_path, cells, complaint):
    found = tidy(write(tmp_path / "a.ipynb", *cells))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    "fine", ["'https://a.org/home/b'", "1 != 2", "a = 7 % 3", "x = y / data / 2", "f'{a}/tmp'", "# ab!", "'a:\\n'"]
)
def test_what_only_looks_untidy_is_let_be(tmp_path, fine):
    assert tidy(write(tmp_path / "a.ipynb", fine)) == []


def test_notebooks_to_explore_in_may_define_functions_and_reload(tmp_path):
    (tmp_path / "explore").mkdir()
    path = write(tmp_path / "explore" / "a.ipynb", "%load_ext autoreload\ndef f(): pass", "!ls")
    assert tidy(path) == ["cell 3: a shell command, whose failure would not be seen"]


def test_an_executed_notebook_is_not_tidy(tmp_path):
    path = write(tmp_path / "a.ipynb", "print(epochs)")
    run(path, tmp_path / "out.ipynb")
    found = "\n".join(tidy(tmp_path / "out.ipynb"))
    assert "metadata not stripped: papermill" in found
    assert "cell 2: outputs or execution count not stripped" in found


def test_other_kernels_and_tags_that_hide_failures_are_named(tmp_path):
    path = write(tmp_path / "a.ipynb", "1 / 0", kernel="prunelab")
    notebook = nbformat.read(path, 4)
    notebook.cells[1].metadata.tags = ["raises-exception"]
    nbformat.write(notebook, path)
    assert tidy(path) == ["kernel is 'prunelab', not 'python3'", "cell 2: tag 'raises-exception' hides a failure"]


def test_a_notebook_without_parameters_is_not_tidy(tmp_path):
    assert "0 cells are tagged" in tidy(write(tmp_path / "a.ipynb", parameters=None))[0]
