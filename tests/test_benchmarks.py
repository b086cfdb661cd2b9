"""The benchmarks' own arithmetic, and that what their README says is what they measured."""

import ast
import importlib.util
import itertools
import json
import re
import sys

import pytest

from prunelab import paths

FOLDER = paths.PACKAGE.parent / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("timing", "summary"))
RESULTS = sorted((FOLDER / "results").glob("*.json"))


def module(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


summary, timing = module("summary"), module("timing")


def test_the_readme_is_what_the_results_say():
    written = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert written == summary.text(), "run `python benchmarks/summary.py` and commit benchmarks/README.md"


def test_every_claim_is_in_the_readme_also_where_its_goal_was_missed(tmp_path, monkeypatch):
    machine = {"cpu": "A", "cores": 4, "threads": 2, "load": 1.0, "torch": "2.6"}
    rivals = {"theirs": {"median": 2.0, "lowest": 1.0, "highest": 3.0, "ratio": 1.0, "repeats": 7}}
    claims = [
        timing.claim("fast", 8.23, "x", at_least=11, quickest=9.5),
        timing.claim("cheap", 1.5, "%", at_most=2, spread=(1.0, 2.5)),
    ]
    values = {"date": "2026-01-01", "machine": machine, "claims": claims, "results": rivals}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "own.json").write_text(json.dumps(values))
    monkeypatch.setattr(summary, "HERE", tmp_path)
    lines = summary.text().splitlines()
    place = "A, 2 of 4 threads, load 1, torch 2.6 | 2026-01-01 |"
    assert f"| [own](own.py) | fast | 8.23x | 9.5x | at least 11x | ✗ | {place}" in lines
    assert f"| [own](own.py) | cheap | 1.5 % (1 to 2.5) |  | at most 2 % | ? | {place}" in lines
    assert "| own, 7 turns | median, ms | lowest | highest | ratio |" in lines
    assert "| theirs | 2,000.0 | 1,000.0 | 3,000.0 | 1.00 |" in lines


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_result_says_when_and_on_what_and_comes_from_a_script_that_is_there(file):
    values = json.loads(file.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", values["date"])
    assert {"cpu", "cores", "threads", "load", "torch"} <= set(values["machine"])
    assert file.stem in [script.stem for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_benchmark_says_what_it_does_and_names_only_what_exists(script):
    """The scripts are not run here, so at least what they import has to be there."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert "usage: " in ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "prunelab":
            home = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(home, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), alias.name


# timing.py


@pytest.fixture
def clock(monkeypatch):
    """Time that only passes when a rival says so."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_rivals_take_turns_and_the_first_turn_does_not_count(clock):
    order = []
    costs = {"a": itertools.chain([100.0], itertools.repeat(4.0)), "b": itertools.chain([100.0], [1.0, 2.0, 8.0])}

    def rival(name):
        order.append(name)
        clock[0] += next(costs[name])

    turns = {}
    found = timing.compare({"a": lambda: rival("a"), "b": lambda: rival("b")}, 3, turns=turns)
    assert "".join(order) == "abbaabba"
    assert turns == {"a": [4.0, 4.0, 4.0], "b": [1.0, 2.0, 8.0]}
    assert found["a"] == {"median": 4.0, "lowest": 4.0, "highest": 4.0, "ratio": 1.0, "repeats": 3}
    assert found["b"] == {"median": 2.0, "lowest": 1.0, "highest": 8.0, "ratio": 2.0, "repeats": 3}


def test_the_ratio_is_that_within_each_turn(clock):
    """A machine that becomes ten times slower half-way changes the medians and not the ratio."""
    costs = {"a": 6.0, "b": 2.0}
    speeds = {name: iter([1, 1, 1, 10, 10]) for name in costs}

    def rival(name):
        clock[0] += costs[name] * next(speeds[name])

    found = timing.compare({name: lambda name=name: rival(name) for name in costs}, 4)
    assert found["b"]["ratio"] == pytest.approx(3.0)


def test_the_quickest_turns_are_compared_with_each_other():
    results = {"a": {"lowest": 6.0}, "b": {"lowest": 2.0}, "c": {"lowest": 4.0}}
    assert timing.quickest(results, "b") == 3.0
    assert timing.quickest(results, "b", "c") == 2.0


def test_what_is_set_up_is_not_timed(clock):
    def setup():
        clock[0] += 50.0
        return 1.0

    def rival(seconds):
        clock[0] += seconds

    assert timing.compare({"a": rival}, 2, setup=setup)["a"]["median"] == 1.0


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (11.0, {"at_least": 11}, True),
        (10.9, {"at_least": 11}, False),
        (2.0, {"at_most": 2}, True),
        (2.1, {"at_most": 2}, False),
    ],
)
def test_a_goal_is_met_or_not(value, goal, met):
    assert timing.claim("t", value, "x", **goal)["met"] is met


@pytest.mark.parametrize(("spread", "met"), [((1.0, 2.0), True), ((1.0, 2.1), None), ((2.1, 3.0), False)])
def test_a_goal_within_the_noise_is_not_decided(spread, met):
    assert timing.claim("t", 1.5, "%", at_most=2, spread=spread)["met"] is met


def test_results_are_written_whole_and_name_no_host(tmp_path, monkeypatch):
    import platform

    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    path = timing.write("own", {"results": {}})
    assert [file.name for file in path.parent.iterdir()] == ["own.json"]
    content = path.read_text(encoding="utf-8")
    assert set(json.loads(content)) == {"date", "machine", "results"}
    assert len(platform.node()) < 3 or f'"{platform.node()}"' not in content
    assert sys.executable not in content
