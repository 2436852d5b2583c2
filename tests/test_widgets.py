"""Widgets: they are moved, and what they show changes; and each has a plain call beside it."""

import ast
import io
import json
import re
import time

import ipywidgets
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from notebook_cells import ROOT, read_cells, run_cells
from PIL import Image
from test_results import write_study

import medssl_utils as medssl

# Of ipywidgets 7.7 (Colab) and 8 alike; what a notebook uses beyond needs a look at both.
COMMON = {"interactive", "interact_manual", "Dropdown", "Combobox", "SelectMultiple", "IntSlider",
          "FloatSlider", "Play", "VBox"}


def sources() -> dict[str, str]:
    return {path.stem: "\n".join(read_cells(path.stem))
            for path in sorted(ROOT.glob("notebooks/*.ipynb"))}


def controls(widget) -> dict:
    """The widgets of an `interactive`, by the name of the parameter that each one sets."""
    return {child._kwarg: child for child in widget.children if hasattr(child, "_kwarg")}


def pixels(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file))


# --- the viewer of notebook 06 --------------------------------------------------------------------


@pytest.fixture
def viewer(looked_inside):
    """The viewer of notebook 06, put back afterwards."""
    widget = looked_inside["viewer"]
    before = {name: control.value for name, control in controls(widget).items()}
    yield widget
    for name, value in before.items():
        controls(widget)[name].value = value


@pytest.mark.parametrize("name, value", [
    ("model", "SparK, randomised"), ("image", 7), ("layer", "layer3"), ("opacity", 0.0),
    ("level", 20.0), ("window", 40.0),
])
def test_moving_a_control_of_the_viewer_changes_the_picture(viewer, name, value):
    before = pixels(viewer.result)
    controls(viewer)[name].value = value
    after = pixels(viewer.result)
    assert before.shape == after.shape and (before != after).any()


def test_viewer_shows_what_the_plain_call_shows(viewer, looked_inside):
    asked = {name: control.value for name, control in controls(viewer).items()}
    assert (pixels(viewer.result) == pixels(looked_inside["look_at"](**asked))).all()


def test_window_and_level_are_in_the_units_of_the_image(looked_inside):
    drawn = []
    axis = type("Axis", (), {"imshow": lambda self, image, *a, **k: drawn.append(image),
                             "axis": lambda self, how: None})()
    hounsfield = np.array([[-1000.0, 40.0], [240.0, 3000.0]])
    looked_inside["overlay"](axis, hounsfield, np.zeros((1, 1)), low=40 - 200, high=40 + 200)
    assert drawn[0].tolist() == [[0.0, 0.5], [1.0, 1.0]]


# --- the checkpoint picker of notebook 06 ---------------------------------------------------------


def test_picking_another_checkpoint_examines_that_file(looked_inside, capsys):
    picker = controls(looked_inside["picker"])["path"]
    files = dict(picker.options)
    for method in ("MoCo", "SwAV"):
        name = medssl.CHECKPOINTS[method].filename
        picker.value = files[f"stand-in/{name}"]
        said = capsys.readouterr().out
        assert f"{name}: {method}" in said and "a further random network up to" in said


def test_a_file_that_is_no_checkpoint_is_named_by_the_picker(looked_inside, tmp_path, capsys):
    (tmp_path / "page.ckpt").write_text("<html>log in</html>")
    looked_inside["examine"](str(tmp_path / "page.ckpt"))
    assert "CheckpointError" in (said := capsys.readouterr().out) and "web page" in said


# --- the study explorer of notebook 05 ------------------------------------------------------------


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, {"random": 0.5, "SparK": 3.0})
    write_study(folder, {"random": 0.3, "SparK": 2.0}, label_fraction=0.5)
    cells = read_cells("05_compare_results")
    scope = {"study_dir": str(folder), "widgets": True}
    wanted = {line.split(":")[0] for line in cells[0].splitlines()} - set(scope)
    defaults = {}
    exec(cells[0], defaults)
    return run_cells("05_compare_results", "import medssl_utils", "def choose(", "runs = choose(",
                     "def seeds(", "def say(", "def draw_curves(", "def view(", "explorer =",
                     **{n: defaults[n] for n in wanted}, **scope)


@pytest.mark.parametrize("name, value", [
    ("metric", "ACC"), ("control", "SparK"), ("fractions", (1.0,)), ("methods", ("random",)),
])
def test_moving_a_control_of_the_explorer_changes_words_and_figure(explorer, capsys, name, value):
    widget = explorer["explorer"]
    control = controls(widget)[name]
    start, before = control.value, pixels(widget.result)
    control.value = value
    after, said = pixels(widget.result), capsys.readouterr().out
    control.value = start
    assert capsys.readouterr().out != said
    assert name == "control" or before.shape != after.shape or (before != after).any()


def test_a_choice_that_cannot_be_compared_is_answered_in_words(explorer, capsys):
    widget = controls(explorer["explorer"])["methods"]
    start, widget.value = widget.value, ("SparK",)
    assert "random" in capsys.readouterr().out
    widget.value = start


# --- the run monitor of notebook 04 ---------------------------------------------------------------

HISTORY = [{"epoch": e, "train_loss": 1 / (e + 1), "val_loss": 0.7, "val_AUC": 0.6 + e / 10,
            "val_ACC": 0.5} for e in range(3)]


@pytest.fixture
def study(tmp_path):
    """A study with a finished run, one that trains, and one that has just begun."""
    for name in ("begun", "done", "trains"):
        folder = tmp_path / "tiny" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(
            {"method": "SparK", "dataset": "toy", "stamp": "DEMO"}))
    medssl._save_resume(tmp_path / "tiny" / "trains" / "last.pt", history=HISTORY[:2],
                        model={"weight": torch.zeros(3)})
    finish(tmp_path / "tiny" / "done")
    return tmp_path / "tiny"


def finish(folder):
    pd.DataFrame(HISTORY).to_csv(folder / "history.csv", index=False)
    np.savez(folder / "predictions.npz", labels=np.zeros(2))
    (folder / "metrics.json").write_text(json.dumps({"best_epoch": 2, "lr": 1e-3}))


def start_monitor(study):
    return run_cells("04_run_study", "def epochs_so_far(", "def watch(", "monitor =", json=json,
                     pd=pd, torch=torch, time=time, medssl=medssl, Path=type(study), plan=range(4),
                     runs_dir=str(study.parent), study=study.name, widgets=True)


def test_monitor_tells_finished_runs_from_others_and_how_far_they_are(study):
    table = start_monitor(study)["displayed"][0].set_index("run")
    assert table["done"].to_dict() == {"begun": False, "done": True, "trains": False}
    assert table["epochs"].to_dict() == {"begun": 0, "done": 3, "trains": 2}
    assert table.loc["trains", "val_AUC"] == pytest.approx(0.7)


def test_monitor_shows_the_run_that_is_picked(study):
    monitor = start_monitor(study)["monitor"]
    controls(monitor)["run"].value = "trains"
    assert monitor.result["epoch"].tolist() == [0, 1]
    controls(monitor)["run"].value = "done"
    assert "chosen: epoch 2" in str(monitor.result._repr_mimebundle_()[0]["text/plain"])


def test_monitor_looks_again_when_it_ticks(study):
    monitor = start_monitor(study)["monitor"]
    before = monitor.result
    finish(study / "trains")
    controls(monitor)["again"].value += 1
    assert (int(before["done"].sum()), int(monitor.result["done"].sum())) == (1, 2)


def test_monitor_offers_a_run_that_began_after_it_was_drawn(study):
    monitor = start_monitor(study)["monitor"]
    controls(monitor)["run"].value = "trains"
    (study / "another").mkdir()
    (study / "another" / "config.json").write_text((study / "done" / "config.json").read_text())
    controls(monitor)["again"].value += 1
    assert controls(monitor)["run"].options == ("all", "another", "begun", "done", "trains")
    assert controls(monitor)["run"].value == "trains"
    assert monitor.result["epoch"].tolist() == [0, 1]


def test_monitor_of_a_study_that_has_not_begun_is_empty(tmp_path):
    assert len(start_monitor(tmp_path / "nothing")["displayed"][0]) == 0


def test_a_widget_moved_in_a_kernel_fills_its_output(study):
    """As in JupyterLab: a kernel, messages, and the output area of the widget."""
    from nbconvert.preprocessors import ExecutePreprocessor

    cells = [c for c in read_cells("04_run_study") if any(
        part in c for part in ("import medssl_utils", "def epochs_so_far(", "def watch(",
                               "monitor ="))]
    settings = (f"device, widgets, plan = 'cpu', True, range(4)\n"
                f"runs_dir, study = {str(study.parent)!r}, {study.name!r}")
    moved = "monitor.children[0].value = 'trains'"
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(source) for source in (settings, *cells, moved)])
    client = ExecutePreprocessor(timeout=120, kernel_name="python3")
    client.preprocess(notebook, {"metadata": {"path": str(ROOT / "notebooks")}})
    outputs = [state["outputs"] for state in client.widget_state.values() if "outputs" in state]
    text = json.dumps(outputs)
    assert "train_loss" in text and "2 of them done" not in text
    assert "0.7" in text and "begun" not in re.sub("3 begun", "", text)


# --- all of them ----------------------------------------------------------------------------------


def test_only_what_ipywidgets_7_and_8_share_is_used():
    used = set()
    for source in sources().values():
        tree = ast.parse(re.sub(r"^\s*[%!].*", "", source, flags=re.MULTILINE))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ipywidgets":
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module == "ipywidgets":
                used |= {alias.name for alias in node.names}
    assert used and used <= COMMON
    assert all(hasattr(ipywidgets, name) for name in used)


@pytest.mark.parametrize("stem, call", [
    ("04_run_study", "watch"), ("05_compare_results", "view"), ("06_look_inside", "look_at"),
    ("06_look_inside", "examine"),
])
def test_every_widget_stands_over_a_function_that_works_without_it(stem, call):
    tree = ast.parse(sources()[stem])
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == call]
    assert len(functions) == 1 and "widgets" not in ast.unparse(functions[0])
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    over = [n for n in calls if ast.unparse(n.func).endswith("interactive")]
    assert any(ast.unparse(n.args[0]) == call for n in over)
    plain = [n for n in calls if ast.unparse(n.func) == call]
    assert plain or stem.startswith("05"), "05 draws its static twin further up"


def test_no_widget_is_shown_unless_it_is_asked_for():
    import papermill

    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        parameters = papermill.inspect_notebook(str(path))
        flag = {"widgets"} & set(parameters)
        assert ("ipywidgets" in sources()[path.stem]) == bool(flag), path.stem
        assert all(parameters[name]["default"] == "False" for name in flag)
