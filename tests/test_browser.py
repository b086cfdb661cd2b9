"""The notebooks as a person meets them: a real JupyterLab server, a real browser, keys pressed on a real slider."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import prunelab
from prunelab import data, models, paths
from prunelab.notebook_form import declared_parameters
from prunelab.results import Store

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "no-first-run")
SETTINGS = {  # all cells stay in the page, and nobody asks whether news are wanted
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
ERRORS = '[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]'
PATIENCE = 60_000  # milliseconds that a page may need on a busy machine


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


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with start_here.ipynb in it: JupyterLab saves what it opens, so it gets a copy."""
    if BROWSER is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'prunelab[test]'")
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: pip install 'prunelab[lab]'")
    shutil.copy(paths.notebooks() / "start_here.ipynb", tmp_path)
    return tmp_path


def accuracy_at(rate: float) -> float:
    """Test accuracy, in per cent, of the one run in the store, pruned without any help of the explorer."""
    store = Store()
    run = store.settings(store.ids()[0])
    dataset = data.load(run.data)
    model = models.build(run.model, dataset.shape, len(dataset.classes), 0)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in store.weights(run).items()})
    prunelab.prune(model, "magnitude", rate).apply_(model)
    with torch.no_grad():
        answers = model(dataset.scale(dataset.test.x)).argmax(1)
    return 100 * (answers == dataset.test.y).double().mean().item()


@pytest.mark.browser
def test_start_here_runs_and_its_slider_follows_the_keyboard(desk):
    start = declared_parameters(desk / "start_here.ipynb")["rate"].default
    with jupyterlab(desk) as (server, address):
        with page(address.format(path="start_here.ipynb")) as lab:
            run_all_cells(lab)
            assert lab.locator(ERRORS).count() == 0, lab.locator(ERRORS).all_inner_texts()
            sentence, slider = lab.get_by_role("status").filter(has_text="pruning rate"), lab.get_by_role("slider")
            assert f"pruning rate of {start * 100:.0f} %" in sentence.inner_text()
            slider.focus()
            for _ in range(5):
                lab.keyboard.press("ArrowRight")
            sentence.filter(has_text=f"pruning rate of {start * 100 + 5:.0f} %").wait_for()
            after = sentence.inner_text()
            lab.keyboard.press("Home")
            sentence.filter(has_text="pruning rate of 0 % (sparsity 0.000)").wait_for()
            assert lab.get_by_role("img", name=re.compile("Accuracy against pruning rate")).is_visible()
            assert lab.locator(ERRORS).count() == 0, lab.locator(ERRORS).all_inner_texts()
        processes = family(server.pid)
        assert len(processes) > 1, "there was no kernel"
    assert not [process for process in processes if process.is_running()]
    shown = float(re.search(r"images is ([\d.]+) %", after)[1])
    assert shown == pytest.approx(accuracy_at(round(start + 0.05, 4)), abs=0.051)
