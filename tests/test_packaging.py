"""What a user installs, cites and imports: one truth about dependencies, complete wheels, imports without torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from setuptools import find_packages

import prunelab
from prunelab.papers import papers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_conda_environment_is_pyproject_and_nothing_else():
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert wanted == [f"python {PROJECT['project']['requires-python']}", "pip", {"pip": ["-e .[all]"]}]


def test_all_is_every_extra_but_ray_and_the_models_of_one_benchmark():
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["all"] == [f"prunelab[{','.join(sorted(set(extras) - {'all', 'ray', 'zoo'}))}]"]


def test_the_makefile_takes_the_same_pythons():
    low, high = re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"(3, {low}) <= sys.version_info[:2] < (3, {high})" in makefile
    assert f"needs Python 3.{low} to 3.{int(high) - 1}," in makefile


@pytest.mark.parametrize(("words", "end"), [([], "--preset quick"), (["JOBS=3"], "--preset quick --jobs 3")])
def test_make_trains_in_as_many_processes_as_there_are_cores_unless_told(tmp_path, words, end):
    command = ["make", "-n", "reproduce", f"VENV={tmp_path / 'none'}", *words]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert [line.rstrip().endswith(end) for line in said.splitlines() if " reproduce " in line] == [True]


def test_every_package_and_every_data_file_is_in_the_wheel():
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "prunelab").rglob("*.py")}
    packages = find_packages(str(ROOT), **setuptools["packages"]["find"])
    assert sorted(packages) == sorted(".".join(folder.parts) for folder in folders)
    patterns = [(ROOT / package, file) for package, files in setuptools["package-data"].items() for file in files]
    assert [pattern for folder, pattern in patterns if not list(folder.glob(pattern))] == []
    named = [file for folder, pattern in patterns for file in folder.glob(pattern)]
    other = {file for file in (ROOT / "prunelab").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert {file.name for file in other - set(named)} == set()


def test_the_licence_is_the_one_that_is_named():
    assert PROJECT["project"]["license"] == "MIT"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License\n\nCopyright (c) 2026 prunelab contributors\n")


def test_the_citation_names_this_version_and_all_thirteen_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == prunelab.__version__ == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    references = citation["references"]
    assert len({reference["title"] for reference in references}) == len(references) == 13
    for reference in references:
        assert {"type", "title", "authors", "year"} <= set(reference)
        people = reference["authors"]
        assert all(set(person) <= {"family-names", "name-particle", "name"} for person in people)
        assert [person for person in people if people.count(person) > 1] == []  # the format refuses one entry twice


def test_the_papers_of_the_artefacts_are_cited_with_the_same_doi():
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    dois = {reference.get("doi") for reference in references}
    assert {paper.doi for paper in papers() if paper.doi} <= dois


def test_the_import_contracts_hold():
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize("module", ["", ".settings", ".runs", ".papers", ".plots", ".plots.tables", ".lab.widgets"])
def test_the_view_side_loads_no_torch(module):
    code = f"import sys, prunelab{module}; print([name for name in ('torch', 'torchvision') if name in sys.modules])"
    assert python(code) == "[]"


def test_importing_prunelab_takes_less_than_half_a_second():
    code = "import time; start = time.perf_counter(); import prunelab; print(time.perf_counter() - start)"
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_every_public_name_of_prunelab_can_be_had():
    missing = "import prunelab; print([name for name in prunelab.__all__ if not hasattr(prunelab, name)])"
    assert python(missing) == "[]"
