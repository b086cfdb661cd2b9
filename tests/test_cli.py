"""The command line: what it prints, with which exit code it ends, and that a mistake is one line and no work."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from prunelab import cli, papers, paths
from prunelab.cli import main
from prunelab.headless import readme
from prunelab.plots import gallery
from prunelab.runs import Checkpoint, Store
from prunelab.settings import Prune, Run

RUNS = [Run(seed=seed, prune=Prune("magnitude", rounds=1)) for seed in range(3)]


@pytest.fixture
def call(capsys):
    """Run the program in this process: exit code, lines on stdout, lines on stderr."""

    def program(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return program


def save(run, state="complete"):
    """A run in the store, without training: its last round reached 0.8."""
    rounds = [{"round": r, "test_accuracy": 0.9 - r / 10, "seconds": 1.0, "finished": "2026-01-01"} for r in range(2)]
    with Store().claim(run) as writer:
        writer.save(Checkpoint({"w": np.ones(2)}, {}, rounds, [{"round": 0, "epoch": 1}, {"round": 1, "epoch": 2}]))
        if state == "complete":
            writer.finish({"w": np.ones(2)}, {"w": np.array([True, False])}, provenance={"device": "cpu"})
        elif state == "failed":
            writer.fail("the loss is not finite")
    return run.id


@pytest.fixture
def figure():
    """A committed figure of ``dyprune/rate`` whose claims are judged; returns the path of its JSON."""
    ours = {claim.quantity: claim.reported for claim in papers.artefact("dyprune/rate").claims}
    facts = {"preset": "paper", "alt": "a curve", "n": "1 seed", "claims": papers.verdicts("dyprune/rate", ours)}
    saved = gallery.save(None, "dyprune/rate", pd.DataFrame({"weights": [1000], "rate": [0.09]}), facts)
    saved.json.with_suffix(".png").write_bytes(b"a picture")
    return saved.json


def as_before_digests(figure):
    """The facts of a figure, in which no digest stands."""
    facts = json.loads(figure.read_text())
    return {name: fact for name, fact in facts.items() if name not in ("files", "sha256_of_this")}


# What can be asked for


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["data", "-h"], ["runs", "--help"]])
def test_help_names_every_command(call, words):
    code, out, err = call(*words)
    table = cli.COMMANDS.get(words[0], cli.COMMANDS)
    assert (code, err) == (0, [])
    assert {line.split()[0] for line in out if line.startswith("  ")} == set(table)


def test_nothing_asked_for_shows_the_commands_and_is_no_success(call):
    assert call() == (2, call("-h")[1], [])


def test_every_command_explains_itself(call):
    for name, command in cli.COMMANDS.items():
        for words in [[name]] if callable(command) else [[name, below] for below in command]:
            code, out, err = call(*words, "-h")
            text = " ".join(out)
            function = command if callable(command) else command[words[1]]
            assert (code, err) == (0, []), words
            assert function.__doc__.splitlines()[0].split()[0] in text or "options" in text, words


def test_the_version_is_that_of_the_package(call):
    from prunelab import __version__

    assert call("--version") == (0, [f"prunelab {__version__}"], [])


def test_help_and_list_load_no_torch():
    program = """\
import sys
from prunelab.cli import main
assert main(["--help"]) == main(["reproduce", "--help"]) == main(["list"]) == 0
heavy = {"torch", "torchvision", "sklearn", "matplotlib", "papermill", "IPython"} & set(sys.modules)
sys.exit(f"loaded: {sorted(heavy)}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "dyprune/rate" in result.stdout


# What was asked wrongly


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lst"], "there is no command 'lst': did you mean 'list'?"),
        (["runs", "shwo"], "there is no command 'runs shwo': did you mean 'show'?"),
        (["data", "remove"], "there is no command 'data remove'"),
        (["reproduce", "rate", "--jbos", "2"], "reproduce has no option '--jbos': did you mean '--jobs'?"),
        (["runs", "gc", "--dryrun"], "runs gc has no option '--dryrun': did you mean '--dry-run'?"),
        (["list", "--all"], "list has no option '--all'"),
        (["list", "dyprune"], "dyprune; `prunelab list -h` says more"),
        (["runs", "export"], "PATH"),
        (["runs", "export", ""], "'.' is no name of a file: give the path of a tar file"),
        (["runs", "gc", "--days", "soon"], "--days: could not convert string to float: 'soon'"),
        (["runs", "gc", "--days", "-1"], "days = -1.0: should be 0 or more"),
        (["runs", "gc", "--days", "nan"], "days = nan: should be 0 or more"),
        (["runs", "show", "dropnet"], "no run 'dropnet'"),
        (["verify", "dyprune/raet"], "no artefact 'dyprune/raet': did you mean 'dyprune/rate'?"),
        (["reproduce"], "nothing was asked for: give artefacts, a paper or 'all'"),
        (["reproduce", "dyprune/rata"], "no artefact 'dyprune/rata': did you mean 'dyprune/rate'?"),
        (["reproduce", "table"], "artefact 'table' is not clear: dyprune/table"),
        (["reproduce", "--paper", "dyprun"], "no paper 'dyprun': did you mean 'dyprune'?"),
        (["reproduce", "dyprune/rate", "--preset", "huge"], "'huge'"),
        (["reproduce", "dyprune/rate", "--jobs", "two"], "--jobs"),
        (["reproduce", "dyprune/rate", "--jobs", "0"], "--jobs 0: should be 1 or more"),
        (["reproduce", "dyprune/rate", "--device", "gpu"], "device 'gpu': no such device"),
        (["reproduce", "dyprune/rate", "-p", "event=3"], "no parameter 'event'; did you mean 'events'?"),
        (["reproduce", "dyprune/rate", "-p", "events"], "'events' is no parameter; write name=value"),
        (["reproduce", "dyprune/rate", "-p", "events=1.5"], "events = 1.5: should be int | None"),
        (["reproduce", "dyprune/rate", "-p", "preset=smoke"], "choose it with --preset"),
        (["data", "prepare", "mnits"], "unknown data set 'mnits': did you mean 'mnist'?"),
        (["data", "prepare", "../etc"], "data set name '../etc': use lower-case letters"),
        (["data", "prepare", "own", "--from", "nowhere"], "nowhere: no such file or folder"),
        (["data", "verify", "mnits"], "unknown data set 'mnits': did you mean 'mnist'?"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_nothing_runs(call, monkeypatch, words, says):
    monkeypatch.setattr("prunelab.headless.runner.run", lambda *_, **__: pytest.fail("a notebook was run"))
    code, out, err = call(*words)
    assert (code, out) == (cli.WRONG, [])
    assert len(err) == 1
    assert err[0].startswith("prunelab: ")
    assert says in err[0]
    assert not (paths.runs() / "notebooks").exists()
    assert list(paths.figures().iterdir()) == []


def test_ctrl_c_ends_with_130_and_one_line(call, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", interrupted)
    code, out, err = call("list")
    assert (code, out) == (130, [])
    assert err == ["prunelab: interrupted; finished rounds are kept, the same command goes on from there"]


def test_a_fault_of_the_package_is_not_disguised_as_one_of_the_user(monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "list", broken)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "prunelab.cli", "-h"]
    result = subprocess.run(command, check=False, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


# Artefacts


def test_list_shows_every_artefact(call):
    code, out, _ = call("list")
    assert code == 0
    every = papers.artefacts()
    assert [line.split()[0] for line in out[2 : 2 + len(every)]] == [artefact.id for artefact in every]
    assert any("not made yet" in line for line in out)
    assert out[2 + len(every)].startswith("`prunelab reproduce ARTEFACT`")
    assert [line.split()[0] for line in out[-4:]] == [
        paper.title.replace(":", "").split()[0] for paper in papers.papers()
    ]


def test_status_tells_figures_runs_and_data_sets(call, figure, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path))
    save(RUNS[0])
    save(RUNS[1], "failed")
    save(RUNS[2], "interrupted")
    call("data", "prepare", "iris")
    code, out, err = call("status")
    assert (code, err) == (0, [])
    lines = {line.split()[0]: line for line in out if line}
    assert "preset paper, 1 seed" in lines["dyprune/rate"]
    assert "not made yet" in lines["dyprune/training"]
    assert out[-2].endswith(": 1 complete, 1 failed, 1 partial")
    assert out[-1] == f"prepared data sets in {tmp_path}: iris"


def test_verify_believes_the_numbers_and_not_the_verdicts_beside_them(call, figure):
    code, out, _ = call("verify", "dyprune/rate")
    assert code == 0
    assert out[-1].split() == ["dyprune/rate", "paper", "✓", *["13", "of", "13", "checks", "as", "published"]]

    figure.write_text(figure.read_text().replace('"ours": 0.', '"ours": 0.5', 1))
    code, out, _ = call("verify", "dyprune/rate")
    assert code == cli.FAILED
    assert "rate.json: damaged, or no JSON (its bytes are not those that were written); delete it" in out[-1]

    facts = as_before_digests(figure)
    facts["claims"][0]["ours"] = 0.5
    figure.write_text(json.dumps(facts))
    code, out, _ = call("verify", "dyprune/rate")
    assert code == cli.FAILED
    assert "claim 'rate_403' says 'as published', its number gives 'not as published'" in out[-1]


def test_verify_of_what_claims_nothing_is_no_failure(call):
    saved = gallery.save(None, "dropnet/networks", pd.DataFrame({"x": [1]}), {"preset": "quick"})
    saved.json.with_suffix(".png").write_bytes(b"a picture")
    code, out, _ = call("verify", "dropnet/networks")
    assert (code, out[-1].split()[:2]) == (0, ["dropnet/networks", "quick"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts: facts["claims"][0].pop("verdict"),
        lambda facts: facts["claims"][0].pop("ours"),
        lambda facts: facts["claims"][0].update(ours="many"),
        lambda facts: facts["claims"][0].update(verdict="true"),
        lambda facts: facts["claims"][0].update(reported="99"),
        lambda facts: facts.update(claims="confirmed"),
    ],
)
def test_verify_says_which_claims_are_damaged(call, figure, damage):
    facts = as_before_digests(figure)
    damage(facts)
    figure.write_text(json.dumps(facts))
    code, out, err = call("verify", "dyprune/rate")
    assert (code, len(out), err) == (cli.FAILED, 1, [])
    assert "its claims are no table of verdicts; run `prunelab reproduce dyprune/rate --into figures --force`" in out[0]


@pytest.mark.parametrize("ending", [".png", ".csv"])
def test_verify_misses_a_file(call, figure, ending):
    figure.with_suffix(ending).unlink()
    code, out, _ = call("verify", "rate")
    assert code == cli.FAILED
    assert (
        f"figures/dyprune/rate{ending} is missing; run `prunelab reproduce dyprune/rate --into figures --force`"
        in out[-1]
    )


def test_verify_opens_the_numbers_beside_a_figure(call, figure):
    figure.with_suffix(".csv").write_text("weights,rate\n1000,0.08\n")
    code, out, _ = call("verify", "rate")
    assert code == cli.FAILED
    assert "figures/dyprune/rate.csv is not what was saved with it; run `prunelab reproduce dyprune/rate" in out[-1]


def test_verify_opens_the_numbers_of_a_picture(call, monkeypatch, tmp_path):
    shutil.copytree(paths.root() / "figures" / "dropnet", tmp_path / "dropnet")
    monkeypatch.setenv("PRUNELAB_FIGURES", str(tmp_path))
    assert call("verify", "dropnet/figure_13")[0] == 0
    table = tmp_path / "dropnet" / "figure_13.csv"
    points = pd.read_csv(table)
    points.assign(ours=points["ours"] - 0.5).to_csv(table, index=False)
    code, out, _ = call("verify", "dropnet/figure_13")
    assert (code, "of the points agree" in out[-1]) == (cli.FAILED, True)
    table.write_bytes(b"\xff\x00")
    assert call("verify", "dropnet/figure_13")[0] == cli.FAILED


def test_verify_of_what_was_never_made_says_so_and_fails(call):
    code, out, _ = call("verify")
    assert code == cli.FAILED
    assert len(out) == len(papers.artefacts())
    assert all(f"there are no numbers in {paths.figures()}; run `prunelab reproduce " in line for line in out)


def test_readme_writes_its_table_once(call, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    file = tmp_path / "README.md"
    marks = f"{readme.FAST}\n{readme.FASTER}\n{readme.ZOO}\n{readme.ZOO_END}\n"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\n{marks}after\n")
    assert call("readme") == (0, ["README.md, figures/README.md and the index notebook were brought up to date"], [])
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert f"| DyPrune | 0 of {len(papers.artefacts('dyprune'))} | 0 |" in text
    assert (paths.figures() / "README.md").read_text().count("Not made yet.") == len(papers.artefacts())
    assert call("readme") == (0, ["README.md, figures/README.md and the index notebook are up to date"], [])

    file.write_text("no table")
    code, _, err = call("readme")
    assert (code, len(err)) == (cli.WRONG, 1)
    assert "put them around the table" in err[0]
    assert file.read_text() == "no table"


# Data sets


def test_a_data_set_is_prepared_listed_and_verified(call, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path))
    monkeypatch.delenv("PRUNELAB_DATA", raising=False)
    assert call("data", "verify") == (0, ["no data set is prepared yet"], [])
    code, out, _ = call("data", "list")
    assert code == 0
    states = {line.split()[0]: line for line in out}
    assert states["iris"].endswith("from scikit-learn")
    assert states["mnist"].endswith("from download")

    assert call("data", "prepare", "iris") == (0, [f"iris is ready: {tmp_path / 'data' / 'iris.safetensors'}"], [])
    row = next(line for line in call("data", "list")[1] if line.startswith("iris"))
    assert "150 samples" in row
    assert "ready" in row
    assert call("data", "verify") == (0, ["iris sound"], [])

    file = tmp_path / "data" / "iris.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    code, out, _ = call("data", "verify", "iris")
    assert code == cli.FAILED
    assert "write it again, `prunelab data prepare iris`" in out[0]


# Runs


def test_an_empty_store_is_said_to_be_empty(call):
    assert call("runs", "list") == (0, [f"no runs in {paths.runs()}"], [])
    assert call("runs", "gc") == (0, ["0.0 MB were freed"], [])


def test_runs_are_listed_and_shown(call):
    ids = [save(RUNS[0]), save(RUNS[1], "failed"), save(RUNS[2], "interrupted")]
    code, out, _ = call("runs", "list")
    assert code == 0
    assert [line.split()[:3] for line in out[1:]] == [
        [ids[0], "complete", "2"],
        [ids[1], "failed", "2"],
        [ids[2], "partial", "2"],
    ]
    code, out, _ = call("runs", "show", ids[1].removesuffix(ids[1][-6:]))
    shown = json.loads("\n".join(out))
    assert code == 0
    assert (shown["id"], shown["status"], shown["reason"]) == (ids[1], "failed", "the loss is not finite")
    assert shown["settings"]["seed"] == 1
    assert [row["test_accuracy"] for row in shown["rounds"]] == [0.9, 0.8]


def test_runs_travel_and_what_is_there_stays(call, monkeypatch, tmp_path):
    ids, archive = [save(run) for run in RUNS[:2]], tmp_path / "runs.tar"
    assert call("runs", "export", archive) == (0, [f"2 runs in {archive}"], [])
    assert call("runs", "discard", ids[0]) == (0, [f"{ids[0]} is gone"], [])
    assert call("runs", "import", archive) == (0, ["1 new, 1 existing, 0 busy"], [])
    assert Store().ids() == ids
    assert call("runs", "export", tmp_path / "one.tar", ids[1]) == (0, [f"1 runs in {tmp_path / 'one.tar'}"], [])


def test_damaged_runs_are_named_and_dropped_when_told(call):
    ids = [save(RUNS[0]), save(RUNS[1], "failed"), save(RUNS[2], "interrupted")]
    assert call("runs", "check") == (0, ["3 sound"], [])
    masks = paths.runs() / ids[0] / "masks.safetensors"
    masks.write_bytes(masks.read_bytes()[:-1])
    for words, code, left in (((), 1, ids), (("--repair",), 0, ids[1:]), ((), 0, ids[1:])):
        found, out, _ = call("runs", "check", *words)
        assert (found, Store().ids(unfinished=True)) == (code, left)
        assert out[0].startswith(f"{masks} is damaged (") == (len(out) == 2)
        assert out[0].endswith(": dropped") == bool(words)


def test_an_archive_that_cannot_be_written_or_read_is_one_line(call, tmp_path):
    save(RUNS[0])
    code, _, err = call("runs", "export", tmp_path / "nowhere" / "runs.tar")
    assert (code, len(err)) == (cli.WRONG, 1)
    assert "runs.tar cannot be written" in err[0]
    assert err[0].endswith("give a path in a folder that can")
    code, _, err = call("runs", "import", tmp_path / "none.tar")
    assert (code, err) == (cli.WRONG, [f"prunelab: there is no archive {tmp_path / 'none.tar'}"])


def test_gc_says_what_would_go_and_deletes_only_when_told(call):
    ids = [save(RUNS[0]), save(RUNS[1], "failed")]
    code, out, _ = call("runs", "gc", "--failed", "--dry-run")
    assert code == 0
    assert out[0].startswith("failed run: ")
    assert out[-1].endswith("MB would be freed")
    assert Store().ids() == ids
    assert call("runs", "gc")[1] == ["0.0 MB were freed"]
    assert call("runs", "gc", "--failed")[1][-1].endswith("MB were freed")
    assert Store().ids(unfinished=True) == ids[:1]


# JupyterLab


def test_lab_opens_the_first_notebook_with_this_python(call, monkeypatch):
    asked = []

    def lab(command, **options):
        asked.append((command, options["env"]["JUPYTER_PREFER_ENV_PATH"]))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", lab)
    assert call("lab")[0] == 7
    [(command, prefer)] = asked
    assert command[:4] == [sys.executable, "-m", "jupyter", "lab"]
    assert command[4].endswith((".ipynb", "notebooks"))
    assert prefer == "1"


def test_lab_without_jupyterlab_says_how_to_get_it(call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call("lab")
    assert (code, len(err)) == (cli.WRONG, 1)
    assert err[0].endswith("pip install 'prunelab[lab]'")
