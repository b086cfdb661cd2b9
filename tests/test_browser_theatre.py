"""The theatre as a person meets it: buttons pressed in a real JupyterLab, a kernel interrupted and restarted."""

import re
import time
from pathlib import Path

import pytest
from test_browser import ERRORS, SETTINGS, copied, family, jupyterlab, page, run_all_cells

from prunelab.lab.theatre.stage import GRACE
from prunelab.runs import Store

NOTEBOOK = "watch_dyprune.ipynb"


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with a copy of the notebook in it."""
    return copied(["explore/watch_dyprune"], tmp_path)


def press(lab, name):
    lab.locator(".jp-OutputArea button", has_text=re.compile(f"^\\s*{name}\\s*$")).click()


def kernel_menu(lab, item):
    lab.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Kernel$")).click()
    lab.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}")).first.click()


def status(lab):
    return lab.get_by_role("status").filter(has_text=re.compile("Run dyprune|another run"))


def epoch(lab):
    return int(re.match(r"\d+", lab.locator(".prunelab-theatre .numbers b").first.inner_text())[0])


def epoch_reaches(lab, number):
    lab.wait_for_function(
        "least => parseInt(document.querySelector('.prunelab-theatre .numbers b').textContent) >= least", arg=number
    )


def stages(server):
    """The processes in which a theatre trains."""
    import psutil

    found = []
    for process in family(server.pid):
        try:
            if "prunelab.lab.theatre.stage" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def gone(processes, seconds):
    end = time.monotonic() + seconds
    while any(process.is_running() and process.status() != "zombie" for process in processes):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.browser
def test_the_epochs_rise_and_nothing_is_left_after_an_interrupt_and_a_restart(desk):
    store = Store()
    with jupyterlab(desk) as (server, address):
        with page(address.format(path=NOTEBOOK)) as lab:
            run_all_cells(lab)
            assert lab.locator(ERRORS).count() == 0, lab.locator(ERRORS).all_inner_texts()
            assert "Not trained yet" in status(lab).inner_text()
            assert (stages(server), epoch(lab)) == ([], 0)
            panel = lab.locator(".prunelab-theatre")
            before = panel.bounding_box()
            press(lab, "start")
            epoch_reaches(lab, 6)
            after = panel.bounding_box()
            assert (before["x"], before["width"], before["height"]) == (after["x"], after["width"], after["height"])
            (first,) = stages(server)
            kernel_menu(lab, "Interrupt Kernel")
            status(lab).filter(has_text=re.compile("Stopped after epoch")).wait_for()
            assert gone([first], GRACE + 3)
            stopped = epoch(lab)
            (run_id,) = store.ids(unfinished=True)
            assert (store.status(run_id), len(store.epochs(run_id, unfinished=True))) == ("partial", stopped)

            press(lab, "go on")
            epoch_reaches(lab, stopped + 3)
            (second,) = stages(server)
            kernel = second.parent()
            kernel_menu(lab, "Restart Kernel…")
            lab.locator(".jp-Dialog button.jp-mod-accept").click()
            assert gone([second], GRACE + 5)
            assert gone([kernel], 20)
            assert store.status(run_id) == "partial"
            run_all_cells(lab)
            status(lab).filter(has_text=re.compile("Stopped after epoch")).wait_for()
            assert epoch(lab) == len(store.epochs(run_id, unfinished=True)) >= stopped
            press(lab, "go on")
            epoch_reaches(lab, epoch(lab) + 2)
            press(lab, "pause")
            status(lab).filter(has_text=re.compile("Paused after epoch")).wait_for()
            paused = epoch(lab)
            time.sleep(1)
            assert epoch(lab) == paused
            assert lab.locator(ERRORS).count() == 0, lab.locator(ERRORS).all_inner_texts()
        processes = family(server.pid)
        assert len(stages(server)) == 1
    assert gone(processes, GRACE + 3)  # the one that was paused as well
    assert store.status(run_id) == "partial"


CONTRAST = r"""() => {
    const theatre = document.querySelector('.prunelab-theatre');
    const probe = theatre.appendChild(document.createElement('i'));
    const rgb = colour => { probe.style.color = colour;
        return getComputedStyle(probe).color.match(/[\d.]+/g).map(Number) };
    const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map(c => c / 255).map(
        c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4); return 0.2126 * x + 0.7152 * y + 0.0722 * z };
    const paper = light(rgb('var(--paper)'));
    const found = {};
    for (const name of ['--jp-content-font-color1', '--one', '--two', '--three', '--grey']) {
        const ink = light(rgb(`var(${name})`));
        found[name] = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    }
    probe.remove();
    return {paper, found};
}"""


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_it_can_be_read_in_a_light_and_in_a_dark_theme(desk, theme):
    settings = {**SETTINGS, "apputils-extension/themes": {"theme": theme}}
    with jupyterlab(desk, settings) as (_, address), page(address.format(path=NOTEBOOK)) as lab:
        run_all_cells(lab)
        colours = lab.evaluate(CONTRAST)
        assert (colours["paper"] > 0.5) == (theme == "JupyterLab Light")
        assert colours["found"].pop("--jp-content-font-color1") > 7
        assert min(colours["found"].values()) > 3, colours  # WCAG: 3 for parts of graphics
        boxes = [chart.bounding_box() for chart in lab.locator(".prunelab-theatre .parts svg").all()]
        assert len(boxes) == 5
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a["x"] >= b["x"] + b["width"] or b["x"] >= a["x"] + a["width"]
                assert apart or a["y"] >= b["y"] + b["height"] or b["y"] >= a["y"] + a["height"], "they overlap"
