"""What README and CONTRIBUTING say is true: tables, code, commands and links."""

import re

import pandas as pd
import pytest
import torch
from torch import nn

from prunelab import cli, paths
from prunelab.headless import readme
from prunelab.plots import gallery

TEXTS = {name: (paths.root() / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
PYTHON = [(name, code) for name, text in TEXTS.items() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def test_the_table_of_artefacts_is_what_the_figures_give(monkeypatch):
    monkeypatch.delenv("PRUNELAB_FIGURES")  # the committed figures, not those of the tests
    assert readme.written(TEXTS["README.md"]) == TEXTS["README.md"], "run `prunelab readme` and commit README.md"


def test_the_gallery_is_what_the_figures_give(monkeypatch):
    monkeypatch.delenv("PRUNELAB_FIGURES")
    stands = (paths.figures() / "README.md").read_text(encoding="utf-8")
    assert stands == readme.pictures(), "run `prunelab readme` and commit figures/README.md"
    for link in re.findall(r"\]\(([^)#]+)\)", stands):
        assert (paths.figures() / link).exists(), link


def test_the_index_lists_every_notebook_as_it_is(monkeypatch):
    monkeypatch.delenv("PRUNELAB_FIGURES")
    stands = (paths.notebooks() / readme.INDEX).read_text(encoding="utf-8")
    assert stands == readme.text_of(readme.index()), "run `prunelab readme` and commit notebooks/index.ipynb"
    for path in paths.notebooks().rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts and path.name != readme.INDEX:
            assert f"({path.relative_to(paths.notebooks()).as_posix()})" in stands


def test_the_index_begins_where_one_should_and_names_the_preset_and_its_signs():
    assert readme.index()["cells"][1]["source"][2].startswith("- [Start here")
    assert "– not measured" in "".join(readme.index()["cells"][0]["source"])  # noqa: RUF001
    facts = {"preset": "paper", "n": "3 seeds", "claims": [{"kind": "claim", "verdict": "not measured"}]}
    gallery.save(None, "dyprune/claim_98", pd.DataFrame({"x": [1]}), facts)
    shown = "".join("".join(cell["source"]) for cell in readme.index()["cells"])
    assert "– 0 of 1 claim confirmed, 1 not measured (paper, 3 of 10 seeds) |" in shown  # noqa: RUF001


@pytest.mark.parametrize("block", range(len(PYTHON)))
def test_the_code_runs(block):
    def train(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.rand(8, 2, 4, 4)).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    example = torch.rand(5, 2, 4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    names = {"model": model, "train": train, "optimizer": optimizer, "example": example}
    code = PYTHON[block][1].replace("run_all(study)", "run_all(study, jobs=1, progress=False)")
    exec(compile(code, PYTHON[block][0], "exec"), names)
    if "small" in names:
        torch.testing.assert_close(names["small"].eval()(example), model.eval()(example))
        assert names["small"][0].out_channels == 4
    if "results" in names:
        assert len(names["results"].last) == 6
    if "LargestGo" in names:
        import prunelab

        kept = prunelab.prune(nn.Linear(4, 1), names["LargestGo"](), amount=0.25)
        assert kept.kept == 3


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXTS[name])
    assert links or name == "CONTRIBUTING.md"
    for link in links:
        assert (paths.root() / link).exists(), link


def test_every_file_that_contributing_names_exists():
    for file in re.findall(r"`([\w/]+\.(?:py|toml|ipynb))`", TEXTS["CONTRIBUTING.md"]):
        rooms = [path.name for path in (paths.root() / "prunelab").iterdir() if path.is_dir()]
        places = ("", *(f"prunelab/{name}" for name in ("", *rooms)))
        assert any((paths.root() / base / file).exists() for base in places), file


def test_contributing_says_where_every_module_is():
    modules = {file.name for file in (paths.root() / "prunelab").glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f"`{name}`" not in TEXTS["CONTRIBUTING.md"]} == set()


def test_every_command_exists():
    targets = set(re.findall(r"^([\w-]+):", (paths.root() / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for text in TEXTS.values():
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= targets
        for words in re.findall(r"(?:^|`)prunelab ([a-z]+(?: [a-z]+)?)", text, re.MULTILINE):
            first, _, second = words.partition(" ")
            assert first in cli.COMMANDS, words
            if isinstance(cli.COMMANDS[first], dict):
                assert second in cli.COMMANDS[first], words
