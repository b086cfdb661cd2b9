"""The notebooks as a person meets them: a real JupyterLab server, a real browser, keys pressed on a real slider."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

import prunelab
from prunelab import data, models, paths
from prunelab.headless.form import declared_parameters
from prunelab.runs import Store

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "no-first-run")
SETTINGS = {  # all cells stay in the page, and nobody asks whether news are wanted
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
PATIENCE = 180_000  # milliseconds that a page may need on a busy machine


@contextlib.contextmanager
def jupyterlab(folder: Path, settings: dict[str, dict] = SETTINGS) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server on a free port with settings of its own; its process, and an address to which paths are added."""
    for name, values in settings.items():
        place = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(values), encoding="utf-8")
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    own |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    environment = os.environ | {variable: str(folder / name) for variable, name in own.items()}
    environment |= {"JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield server, _address(server, folder)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _address(server: subprocess.Popen, folder: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        for found in (folder / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(json.JSONDecodeError):  # it is being written at this moment
                facts = json.loads(found.read_text(encoding="utf-8"))
                return f"{facts['url']}lab/tree/{{path}}?reset&token={facts['token']}"
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start:\n{(folder / 'server.log').read_text(encoding='utf-8')[-3000:]}")


@contextlib.contextmanager
def page(address: str, size: tuple[int, int] = (1400, 1000)):
    """A page of a fresh browser at that address."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=[f"--{switch}" for switch in SWITCHES])
        try:
            opened = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
            opened.set_default_timeout(PATIENCE)
            opened.goto(address, wait_until="load")
            yield opened
        finally:
            browser.close()


def run_all_cells(page) -> None:
    """Through the menu; back when every code cell has a number."""
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
    page.get_by_text("| Idle").wait_for()  # in the status bar: the kernel is there
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    page.wait_for_function(
        r"""() => { const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
                    return prompts.length && prompts.every(p => /^\[\d+\]:$/.test(p.textContent.trim())); }"""
    )


def family(pid: int) -> list:
    """The process and all its descendants."""
    import psutil

    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def copied(names: Iterable[str], folder: Path) -> Path:
    """The folder with copies of notebooks, since JupyterLab saves what it opens; skips where there is no browser."""
    if BROWSER is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'prunelab[test]'")
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: pip install 'prunelab[lab]'")
    for name in names:
        shutil.copy(paths.notebooks() / f"{name}.ipynb", folder)
    return folder


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with the notebooks that are opened here."""
    return copied(("start_here", "explore/pruning_rate", "explore/compare_methods"), tmp_path)


def press(lab, name: str) -> None:
    lab.locator(".jupyter-widgets button", has_text=re.compile(f"^{name}$")).click()


def sentence(lab):
    return lab.get_by_role("status").filter(has_text="pruning rate")


def accuracy_shown(lab) -> float:
    return float(re.search(r"images is ([\d.]+) %", sentence(lab).inner_text())[1])


def errors(lab) -> list[str]:
    return lab.locator(ERRORS).all_inner_texts()


def cut_off(lab) -> list[str]:
    """Labels and buttons whose text is longer than they are wide."""
    return lab.evaluate(
        """() => [...document.querySelectorAll('.widget-label, .jupyter-button, .widget-readout, select')]
            .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"""
    )


def places(lab) -> list[dict]:
    """Where slider, buttons and pictures stand in the page."""
    parts = [lab.get_by_role("slider").first.locator("xpath=../../.."), *lab.locator(".prunelab-live").all()]
    return [{key: part.bounding_box()[key] for key in ("x", "y")} for part in parts]


def drag_to(lab, share: float) -> None:
    """The slider's handle, with the mouse, to a share of its range, with stops on the way."""
    handle = lab.get_by_role("slider").first
    begin, rail = handle.bounding_box(), lab.locator(".noUi-base").first.bounding_box()
    x, y = begin["x"] + begin["width"] / 2, begin["y"] + begin["height"] / 2
    lab.mouse.move(x, y)
    lab.mouse.down()
    lab.mouse.move(rail["x"] + share * rail["width"], y, steps=25)
    lab.mouse.up()


def notebook(path: Path, *cells: str) -> None:
    """A notebook of the test's own."""
    import nbformat

    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(made, path)


def accuracy_at(rate: float) -> float:
    """Validation accuracy, in per cent, of the one run in the store, pruned without any help of the explorer."""
    store = Store()
    run = store.settings(store.ids()[0])
    dataset = data.load(run.data)
    model = models.build(run.model, dataset.shape, len(dataset.classes), 0)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in store.weights(run).items()})
    prunelab.prune(model, "magnitude", rate).apply_(model)
    with torch.no_grad():
        answers = model(dataset.scale(dataset.validation.x)).argmax(1)
    return 100 * (answers == dataset.validation.y).double().mean().item()


@pytest.mark.browser
def test_start_here_runs_and_its_slider_follows_the_keyboard(desk):
    start = declared_parameters(desk / "start_here.ipynb")["rate"].default
    with jupyterlab(desk) as (server, address):
        with page(address.format(path="start_here.ipynb")) as lab:
            run_all_cells(lab)
            assert lab.locator(ERRORS).count() == 0, lab.locator(ERRORS).all_inner_texts()
            slider = lab.get_by_role("slider", name="pruning rate")
            assert f"pruning rate of {start * 100:.0f} %" in sentence(lab).inner_text()
            slider.focus()
            for _ in range(5):
                lab.keyboard.press("ArrowRight")
            sentence(lab).filter(has_text=f"pruning rate of {start * 100 + 5:.0f} %").wait_for()
            after = accuracy_shown(lab)
            lab.keyboard.press("Home")
            sentence(lab).filter(has_text="pruning rate of 0 % (sparsity 0.000)").wait_for()
            assert lab.get_by_role("img", name=re.compile("Accuracy against pruning rate")).is_visible()
            assert lab.locator(ERRORS).count() == 0, lab.locator(ERRORS).all_inner_texts()
        processes = family(server.pid)
        assert len(processes) > 1, "there was no kernel"
    assert not [process for process in processes if process.is_running()]
    assert after == pytest.approx(accuracy_at(round(start + 0.05, 4)), abs=0.051)


@pytest.mark.browser
def test_the_explorer_is_dragged_undone_kept_and_fine_tuned(desk):
    with jupyterlab(desk) as (_, address), page(address.format(path="pruning_rate.ipynb"), (1400, 1600)) as lab:
        run_all_cells(lab)
        assert errors(lab) == []
        sentence(lab).filter(has_text="90 % (sparsity 0.900)").wait_for()
        before = places(lab)
        drag_to(lab, 0.4)
        sentence(lab).filter(has_text=re.compile("rate of (39|4[0-2]) %")).wait_for()
        lab.wait_for_timeout(500)  # the last position wins
        rate = int(re.search(r"rate of (\d+) %", sentence(lab).inner_text())[1])
        assert accuracy_shown(lab) == pytest.approx(accuracy_at(rate / 100), abs=0.051)
        press(lab, "undo")
        sentence(lab).filter(has_text="90 % (sparsity 0.900)").wait_for()
        assert accuracy_shown(lab) == pytest.approx(accuracy_at(0.9), abs=0.051)
        rate = lab.get_by_role("slider", name="pruning rate")
        rate.focus()
        lab.keyboard.press("End")
        sentence(lab).filter(has_text="99.9 % (sparsity 0.999)").wait_for()
        lab.wait_for_function("e => e.getAttribute('aria-valuetext') == '99.9 %'", arg=rate.element_handle())
        lab.get_by_label("%", exact=True).fill("97.3")
        lab.keyboard.press("Enter")
        sentence(lab).filter(has_text="97.3 % (sparsity 0.973)").wait_for()
        lab.get_by_role("slider", name="compression").focus()
        lab.keyboard.press("Home")
        sentence(lab).filter(has_text="rate of 0 % (sparsity 0.000)").wait_for()
        lab.get_by_label("%", exact=True).fill("89")
        lab.keyboard.press("Enter")
        sentence(lab).filter(has_text="89 % (sparsity 0.890)").wait_for()
        lab.get_by_label("weights of").select_option("hidden_2")
        lab.get_by_role("img", name=re.compile("of 30,000 are kept")).wait_for()
        press(lab, "keep these masks")
        lab.get_by_text("Kept as explorer.kept: sparsity 0.890.").wait_for()
        pruned = accuracy_shown(lab)
        press(lab, "fine-tune 1 epoch")
        sentence(lab).filter(has_text="89 % (sparsity 0.890) after 1 epoch of fine-tuning").wait_for()
        assert accuracy_shown(lab) > pruned
        assert places(lab) == before, "the layout jumps"
        assert cut_off(lab) == []
        lab.get_by_role("button", name="network", exact=True).click()
        lab.get_by_role("img", name=re.compile("Network at a pruning rate of 89 %. Live units: in 64")).wait_for()
        press(lab, "units")
        lab.get_by_role("button", name=re.compile("Layer by layer: no layer")).focus()
        lab.keyboard.press("Enter")
        lab.get_by_role("slider", name="hidden_1").focus()
        lab.keyboard.press("ArrowRight")
        sentence(lab).filter(has_text="89 %, hidden_1 0 % (sparsity").wait_for()
        assert cut_off(lab) == []
        assert errors(lab) == []


OWN = """
import ipywidgets, torch
from prunelab import data, models, settings
from prunelab.lab.live import PruningExplorer

digits = data.load("digits")
model = models.build(settings.Model("mlp", hidden=(40, 20)), digits.shape, 10, seed=0)
explorer = PruningExplorer(model, digits, rate=0.5, tuning=settings.Train(batch_size=1))
measure = explorer._subject.answers
explorer._subject.answers = lambda masks: measure(masks) if masks.sparsity < 0.99 else [][int(masks.sparsity)]
explorer
"""


@pytest.mark.browser
def test_an_error_is_shown_in_the_widget_and_a_training_ends_with_its_kernel(desk):
    notebook(desk / "own.ipynb", OWN)
    with jupyterlab(desk) as (server, address), page(address.format(path="own.ipynb")) as lab:
        run_all_cells(lab)
        assert errors(lab) == []
        lab.get_by_role("slider").first.focus()
        lab.keyboard.press("End")
        lab.locator(ERRORS).filter(has_text="IndexError: list index out of range").wait_for()
        assert not lab.get_by_role("img", name=re.compile("Accuracy against pruning rate")).is_visible(), (
            "an old picture"
        )
        press(lab, "undo")
        sentence(lab).filter(has_text="rate of 50 %").wait_for()
        assert errors(lab) == []
        kernel = [process for process in family(server.pid) if "ipykernel_launcher" in " ".join(process.cmdline())]
        assert len(kernel) == 1
        press(lab, "fine-tune 1 epoch")
        lab.wait_for_function("() => document.querySelector('.jupyter-widgets .progress-bar').style.width > '0%'")
        assert lab.locator(".jupyter-widgets button", has_text="undo").is_disabled()
        press(lab, "stop")
        lab.get_by_text("Stopped: the network is as it was before.").wait_for()
        press(lab, "fine-tune 1 epoch")
        lab.locator(".jupyter-widgets button", has_text=re.compile("^stop$")).and_(lab.locator(":enabled")).wait_for()
        lab.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Kernel$")).click()
        lab.locator(".lm-Menu-itemLabel", has_text=re.compile("^Restart Kernel")).first.click()
        lab.locator(".jp-Dialog button", has_text="Restart").click()
        end = time.monotonic() + 20
        while kernel[0].is_running() and time.monotonic() < end:
            time.sleep(0.1)
        assert not kernel[0].is_running(), "the training holds its kernel"
        lab.get_by_role("alert").filter(has_text="The kernel of this page has gone").wait_for()


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_stored_results_are_compared_and_pictures_follow_the_theme(desk, theme):
    picture = "import pandas as pd\nfrom prunelab import plots\n" + (
        "rows = pd.DataFrame({'density': [1.0, 0.5], 'test_accuracy': [0.9, 0.8]})\n"
        "plots.curve(rows, 'density', 'test_accuracy')"
    )
    notebook(desk / "picture.ipynb", picture, f"{OWN}\nipywidgets.HBox([explorer, PruningExplorer(model, digits)])")
    settings = SETTINGS | {"apputils-extension/themes": {"theme": theme}}
    with jupyterlab(desk, settings) as (_, address):
        with page(address.format(path="compare_methods.ipynb")) as lab:
            run_all_cells(lab)
            assert errors(lab) == []
            verdict = lab.get_by_role("status").filter(has_text="Test accuracy:").first
            before = verdict.inner_text()
            lab.get_by_role("slider").first.focus()
            lab.keyboard.press("ArrowRight")
            lab.wait_for_function("text => document.querySelector('.widget-html p').innerText != text", arg=before)
            assert re.search(r"clear of zero|Undecided|decides nothing", verdict.inner_text())
            assert cut_off(lab) == []
            assert errors(lab) == []
        with page(address.format(path="picture.ipynb")) as lab:
            run_all_cells(lab)
            drawn = lab.locator("img.prunelab-picture")
            look = drawn.evaluate("e => getComputedStyle(e).filter")
            assert look == ("invert(1) hue-rotate(180deg)" if theme.endswith("Dark") else "none")
            edges = "e => [e, e.closest('.widget-vbox')].map(part => part.getBoundingClientRect().right)"
            found = lab.locator(".prunelab-live .facts").all()
            assert len(found) == 2
            for numbers in found:  # two explorers side by side have less room
                inner, outer = numbers.evaluate(edges)
                assert inner <= outer
