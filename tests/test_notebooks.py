"""Every committed notebook is fit to be committed, and runs from end to end at preset smoke."""

import json
import re
from pathlib import Path

import pytest

from prunelab import papers, paths
from prunelab.headless.runner import check_parameters, declared_parameters, run, tidy

NOTEBOOKS = sorted(
    file.relative_to(paths.notebooks()).as_posix()
    for file in paths.notebooks().rglob("*.ipynb")
    if ".ipynb_checkpoints" not in file.parts and file.name != "index.ipynb"  # no code in it; see test_readme
)
ARTEFACTS = papers.artefacts()
OTHERS = sorted(set(NOTEBOOKS) - {artefact.notebook for artefact in ARTEFACTS})


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_is_tidy(notebook):
    assert tidy(paths.notebooks() / notebook) == []


@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda artefact: artefact.id)
@pytest.mark.parametrize("preset", ["smoke", "quick", "paper"])
def test_a_notebook_takes_the_values_of_every_preset(artefact, preset):
    values = artefact.parameters(preset)
    assert check_parameters(paths.notebooks() / artefact.notebook, values) == values


@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda artefact: artefact.id)
def test_a_notebook_leaves_its_values_to_the_preset_and_says_what_was_overridden(artefact):
    own = declared_parameters(paths.notebooks() / artefact.notebook)
    assert own["preset"].default == "quick"
    assert set(own) - {"jobs", "device", "engine"} == artefact.parameters("quick").keys()
    assert {own[name].default for name in set(own) - {"preset", "device", "engine", "figure"}} <= {None}
    if artefact.kind:
        first = papers.artefact(f"{artefact.paper}/{own['figure'].default}")
        assert first.notebook == artefact.notebook
    code = (paths.notebooks() / artefact.notebook).read_text(encoding="utf-8")
    assert "use = papers.chosen(ARTEFACT, globals())" in code
    assert not re.search(r"[(,:] preset[,)]", code)  # a label without what was overridden


def run_at_smoke(notebook: str, parameters: dict, tmp_path: Path) -> Path:
    """Run a notebook with figures and runs in the test's own folder; returns the folder of the figures."""
    places = {"PRUNELAB_FIGURES": str(tmp_path / "figures"), "PRUNELAB_RUNS": str(tmp_path / "runs")}
    run(paths.notebooks() / notebook, tmp_path / "executed.ipynb", parameters, time_limit=300, environment=places)
    return tmp_path / "figures"


@pytest.mark.notebook
@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda artefact: artefact.id)
def test_the_notebook_of_an_artefact_runs_and_leaves_its_figure(artefact, tmp_path):
    figures = run_at_smoke(artefact.notebook, artefact.parameters("smoke"), tmp_path)
    base = figures / "smoke" / artefact.figure
    facts = json.loads(base.with_name(base.name + ".json").read_text(encoding="utf-8"))
    assert facts["artefact"] == artefact.id
    assert facts["preset"] == "smoke"
    assert facts["alt"]
    assert len(base.with_name(base.name + ".csv").read_text(encoding="utf-8").splitlines()) > 1


@pytest.mark.notebook
@pytest.mark.parametrize("notebook", OTHERS)
def test_a_notebook_of_no_artefact_runs(notebook, tmp_path):
    parameters = {"preset": "smoke"} if "preset" in declared_parameters(paths.notebooks() / notebook) else {}
    run_at_smoke(notebook, parameters, tmp_path)


@pytest.mark.notebook
def test_plain_papermill_too_leaves_the_numbers_of_other_parameters_elsewhere(tmp_path, monkeypatch):
    papermill = pytest.importorskip("papermill")
    monkeypatch.setenv("PRUNELAB_OUT", str(tmp_path))
    notebook = paths.notebooks() / "dyprune" / "rate.ipynb"
    papermill.execute_notebook(notebook, tmp_path / "o.ipynb", {"events": 8}, progress_bar=False, cwd=paths.root())
    facts = json.loads((tmp_path / "custom" / "dyprune" / "rate.json").read_text(encoding="utf-8"))
    assert (facts["preset"], facts["overridden"]) == ("quick", {"events": 8})
    assert not (tmp_path / "dyprune").exists()
