"""Every notebook in JupyterLab in a real browser, as a person would run it.

`make test-browser` runs this; it needs Debian's chromium and chromium-driver (or any Chromium with
its driver) and takes about eight minutes. Screenshots are kept in runs/browser.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import medssl_utils as medssl

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "runs" / "browser"
NAMES = sorted(p.name for p in ROOT.glob("notebooks/*.ipynb"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here"),
]
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1366,768")  # a laptop
# The state of the notebook in front: its cells, the kernel, and what the cells gave.
STATE = """
    const panel = window.jupyterapp?.shell.currentWidget, model = panel?.content?.model;
    if (!model?.cells) return null;
    const cells = [...model.cells].filter(cell => cell.type === "code");
    return {title: panel.title.label, status: panel.sessionContext.kernelDisplayStatus,
            counts: cells.map(cell => cell.executionCount),
            outputs: cells.map(cell => cell.outputs.toJSON())};
"""
SHOW_CELL = """
    const panel = window.jupyterapp.shell.currentWidget;
    return panel.content.scrollToItem(arguments[0], "start", 0).then(() => true);
"""

NODE = "const node = window.jupyterapp.shell.currentWidget.content.widgets[arguments[0]].node;"
# What a cell shows and the window cuts off, or scrolls sideways to show.
CUT = NODE + """
    const edge = window.jupyterapp.shell.currentWidget.node.getBoundingClientRect().right;
    const shown = ".jp-OutputArea-output, .jp-OutputArea-output :is(img, table, svg)";
    return [...node.querySelectorAll(shown)].filter(
        part => part.getBoundingClientRect().right > edge || part.scrollWidth > part.clientWidth + 1
    ).map(part => part.tagName + " " + part.innerText?.slice(0, 60));
"""
CONTROLS = NODE + "return node.querySelectorAll('.widget-interact select').length;"
SHOWN = NODE + """
    const box = node.querySelector(".widget-interact");
    return box.innerText + [...box.querySelectorAll("img")].map(img => img.src).join();
"""
# Menus whose longest entry is cut off: where all entries begin alike, none could be told apart.
CUT_MENUS = NODE + """
    const pen = document.createElement("canvas").getContext("2d");
    const menus = [...node.querySelectorAll(".widget-interact select:not([multiple])")];
    return menus.flatMap(menu => {
        pen.font = getComputedStyle(menu).font;
        return [...menu.options].map(entry => entry.text).filter(
            text => pen.measureText(text).width > menu.clientWidth - 24);  // room for the arrow
    });
"""
INTO_VIEW = NODE + "node.querySelector('.widget-interact').scrollIntoView({block: 'center'});"
CHOOSE_ANOTHER = NODE + """
    for (const menu of node.querySelectorAll(".widget-interact select")) {
        if (menu.multiple || menu.options.length < 2) continue;
        menu.selectedIndex = (menu.selectedIndex + 1) % menu.options.length;
        menu.dispatchEvent(new Event("change", {bubbles: true}));
        node.querySelector(".widget-interact button.jupyter-button")?.click();  // interact_manual
        return true;
    }
    return false;
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab as `make lab` starts it, on a copy of the notebooks; yields its address."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for path in (folder / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        cell = notebook.cells[1]
        cell.source = cell.source.replace("widgets: bool = False", "widgets: bool = True")
        nbformat.write(notebook, path)
    medssl.run_study(  # small for speed: what notebook 05 compares
        {"method": ["random", "SparK"], "label_fraction": [0.5, 1.0], "seed": [0, 1]}, workers=2,
        progress="none", study="workbook", runs_dir=folder / "runs", image_size=32, epochs=1,
        checkpoints_dir=folder / "checkpoints", data_dir=folder / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = subprocess.run(["make", "-n", "lab"], cwd=ROOT, check=True, capture_output=True,
                          text=True).stdout
    start = said.split(" -m jupyterlab ")[1].splitlines()[0].split()
    command = [sys.executable, "-m", "jupyterlab", *start, "--no-browser", "--allow-root",
               f"--port={port}", "--expose-app-in-browser", "--IdentityProvider.token=test"]
    own = {f"JUPYTERLAB_{kind}_DIR": str(folder / kind) for kind in ("WORKSPACES", "SETTINGS")}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log,
                                  env={**os.environ, **own})
    yield f"http://localhost:{port}/lab/tree/notebooks/{{name}}?token=test"
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def browser(lab):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    SHOTS.mkdir(parents=True, exist_ok=True)
    yield driver
    driver.quit()


def wait_for(driver, ready, what: str, seconds: float = 60):
    """Ask until `ready(state of the notebook)` gives something; return that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = driver.execute_script(STATE)
        if state and (found := ready(state)):
            return found
        time.sleep(0.5)
    driver.save_screenshot(str(SHOTS / "timeout.png"))
    pytest.fail(f"waited {seconds:g} s for {what}; see {SHOTS / 'timeout.png'}")


def open_notebook(driver, lab: str, name: str) -> None:
    """Open a notebook in Lab and wait for its kernel."""
    from selenium.common.exceptions import WebDriverException

    for _ in range(60):  # the server may still be starting
        try:
            driver.get(lab.format(name=name))
            break
        except WebDriverException:
            time.sleep(1)
    wait_for(driver, lambda s: s["title"] == name and s["status"] == "idle", f"{name} to open")


def run_all(driver, name: str) -> dict:
    """Choose Run All Cells from the menu, wait for the end, return the notebook's state."""
    from selenium.webdriver.common.by import By

    menu = driver.find_elements(By.CSS_SELECTOR, ".lm-MenuBar-item")
    next(item for item in menu if item.text == "Run").click()
    wait_for(driver, lambda s: driver.find_elements(
        By.CSS_SELECTOR, '[data-command="runmenu:restart-and-run-all"]'), "the menu")
    # a fresh kernel: the counts then begin at 1, whatever stood in the file
    driver.find_element(By.CSS_SELECTOR, '[data-command="runmenu:restart-and-run-all"]').click()
    time.sleep(1)
    for button in driver.find_elements(By.CSS_SELECTOR, ".jp-Dialog .jp-mod-accept"):
        button.click()
    wait_for(driver, lambda s: None in s["counts"] or s["status"] == "busy", f"{name} to start")
    return wait_for(
        driver, lambda s: s["status"] == "idle" and (errors(s) or None not in s["counts"]) and s,
        f"{name} to end", 600)


def errors(state: dict) -> list[str]:
    """Every error among a notebook's outputs."""
    return [f"{output['ename']}: {output['evalue']}" for outputs in state["outputs"]
            for output in outputs if output["output_type"] == "error"]


def cut_off(driver) -> list[str]:
    """What is wider than a laptop's window, in any cell; Lab draws a cell once it is in view."""
    cells = driver.execute_script(
        "return window.jupyterapp.shell.currentWidget.content.widgets.length;")
    found = []
    for cell in range(cells):
        driver.execute_script(SHOW_CELL, cell)
        found += driver.execute_script(CUT, cell)
    return found


def cells_with_controls(driver) -> list[int]:
    """Numbers of the cells whose output has controls that a function follows."""
    return driver.execute_script("""
        const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells];
        return cells.map((cell, i) => i).filter(i => cells[i].type === "code" &&
            /\\binteract(ive|_manual)?\\(/.test(cells[i].sharedModel.getSource()));""")


def move(driver, name: str, cell: int) -> None:
    """Choose another entry of a cell's first menu; wait until what it shows has changed."""
    driver.execute_script(SHOW_CELL, cell)
    wait_for(driver, lambda s: driver.execute_script(CONTROLS, cell), "controls")
    assert driver.execute_script(CUT_MENUS, cell) == [], "wider than their menu"
    before = driver.execute_script(SHOWN, cell)
    assert driver.execute_script(CHOOSE_ANOTHER, cell), "no menu with a second entry"
    wait_for(driver, lambda s: driver.execute_script(SHOWN, cell) != before,
             f"cell {cell} of {name} to follow its menu", 120)
    time.sleep(1)  # for the picture to be drawn
    driver.execute_script(INTO_VIEW, cell)
    driver.save_screenshot(str(SHOTS / name.replace(".ipynb", f"_cell{cell}.png")))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_from_the_menu_without_an_error(name, browser, lab):
    open_notebook(browser, lab, name)
    state = run_all(browser, name)
    browser.save_screenshot(str(SHOTS / name.replace(".ipynb", ".png")))
    assert errors(state) == []
    assert state["counts"] == list(range(1, len(state["counts"]) + 1))
    for cell in cells_with_controls(browser):
        move(browser, name, cell)
    page = browser.find_element("tag name", "body").text
    assert "Error displaying widget" not in page and "Loading widget" not in page
    assert cut_off(browser) == [], "wider than a laptop's window shows"
