"""Every notebook in JupyterLab in a real browser, as a person would run it: `make test-browser`."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "runs" / "browser"
NAMES = sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver here"),
]
# The notebook in front: its title, its kernel, and what each code cell gave.
STATE = """
    const panel = window.jupyterapp?.shell.currentWidget, model = panel?.content?.model;
    if (!model?.cells) return null;
    const cells = [...model.cells].filter(cell => cell.type === "code");
    return {title: panel.title.label, status: panel.sessionContext.kernelDisplayStatus,
            counts: cells.map(cell => cell.executionCount),
            errors: cells.flatMap(cell => cell.outputs.toJSON()).filter(
                output => output.output_type === "error").map(output => output.evalue)};
"""
CELLS = "return window.jupyterapp.shell.currentWidget.content.widgets.length;"
# The controls of a cell, which Lab draws once it is in view; what the cell shows.
CONTROLS = """
    const content = window.jupyterapp.shell.currentWidget.content;
    await content.scrollToItem(arguments[0], "end", 0);
    const node = content.widgets[arguments[0]].node;
    return [...node.querySelectorAll(".jp-OutputArea :is(.widget-dropdown select, .noUi-handle)")];
"""
SHOWN = """
    const node = window.jupyterapp.shell.currentWidget.content.widgets[arguments[0]].node;
    const output = node.querySelector(".jp-Cell-outputArea");
    return output.innerText + [...output.querySelectorAll("img")].map(image => image.src).join();
"""
PRESS = """
    const node = window.jupyterapp.shell.currentWidget.content.widgets[arguments[0]].node;
    node.querySelectorAll("button.widget-button").forEach(button => button.click());
"""


@pytest.fixture(scope="module")
def lab(workbook):
    """JupyterLab on a copy of the notebooks; yields a browser and the address."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--expose-app-in-browser", "--IdentityProvider.token=test"]
    own = {f"JUPYTERLAB_{kind}_DIR": str(workbook / kind) for kind in ("WORKSPACES", "SETTINGS")}
    with open(workbook / "lab.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=workbook, stdout=log, stderr=log, env={**os.environ, **own}
        )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1366,768"):  # a laptop
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    SHOTS.mkdir(parents=True, exist_ok=True)
    yield driver, f"http://localhost:{port}/lab/tree/notebooks/{{name}}?token=test"
    driver.quit()
    server.terminate()
    server.wait(30)


def wait_for(driver, ready, what: str, seconds: float = 120):
    """Ask until `ready(state of the notebook)` is true; return that state."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = driver.execute_script(STATE)
        if state and ready(state):
            return state
        time.sleep(0.5)
    driver.save_screenshot(str(SHOTS / "timeout.png"))
    pytest.fail(f"waited {seconds:g} s for {what}")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_the_menu_and_its_widgets_follow(name, lab):
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    browser, address = lab

    def click(css: str, text: str = "") -> None:
        found = [item for item in browser.find_elements(By.CSS_SELECTOR, css) if text in item.text]
        found[0].click()
        time.sleep(1)

    for _ in range(60):  # the server may still be starting
        try:
            browser.get(address.format(name=name))
            break
        except WebDriverException:
            time.sleep(1)
    wait_for(browser, lambda s: s["title"] == name and s["status"] == "idle", f"{name} to open")
    click(".lm-MenuBar-item", "Run")
    click('[data-command="runmenu:restart-and-run-all"]')
    click(".jp-Dialog .jp-mod-accept")
    wait_for(browser, lambda s: None in s["counts"] or s["status"] == "busy", f"{name} to start")

    def ended(state: dict) -> bool:
        return state["status"] == "idle" and (state["errors"] or None not in state["counts"])

    end = wait_for(browser, ended, f"{name} to end", 600)
    assert end["errors"] == []
    assert end["counts"] == list(range(1, len(end["counts"]) + 1))
    moved = 0
    for cell in range(browser.execute_script(CELLS)):
        for control in browser.execute_script(CONTROLS, cell):
            before = browser.execute_script(SHOWN, cell)
            if control.tag_name == "select":
                Select(control).select_by_index(1)
            else:
                control.send_keys(Keys.ARROW_DOWN)  # a lower number
            browser.execute_script(PRESS, cell)
            wait_for(
                browser,
                lambda s, i=cell, b=before: browser.execute_script(SHOWN, i) != b,
                f"cell {cell} to follow its control",
            )
            moved += 1
    browser.save_screenshot(str(SHOTS / name.replace(".ipynb", ".png")))
    assert "Error displaying widget" not in browser.find_element("tag name", "body").text
    assert moved or "ipywidgets" not in (ROOT / "notebooks" / name).read_text("utf-8")
