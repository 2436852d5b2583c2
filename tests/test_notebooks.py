"""The notebooks: how they are written, and that they run, as committed and otherwise."""

import ast
import io
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from matplotlib import pyplot as plt
from notebook_cells import run_cells

import medssl_utils as medssl

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted(ROOT.glob("notebooks/*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)

MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp|opt|mnt|content)/|[A-Z]:\\")


def read_cells(path: Path) -> list[nbformat.NotebookNode]:
    """All cells but the one that `make badges` writes."""
    cells = nbformat.read(path, as_version=4).cells
    return [c for c in cells if "colab" not in c.metadata.get("tags", [])]


def read_code(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in read_cells(path) if c.cell_type == "code"]


def parse(cell: nbformat.NotebookNode) -> ast.Module:
    """The syntax tree of a code cell, without lines for the shell or for IPython."""
    return ast.parse(re.sub(r"^\s*[%!].*", "", cell.source, flags=re.MULTILINE))


def output_texts(cell: nbformat.NotebookNode) -> list[str]:
    """Every text in a cell's outputs: streams, plain text, HTML; no images."""
    texts = [o.text for o in cell.get("outputs", []) if "text" in o]
    for output in cell.get("outputs", []):
        texts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return texts


# --- how they are written -----------------------------------------------------------------------


@pytest.mark.parametrize(("stem", "names", "words"), [
    ("01_download_checkpoints", {"from_dir": "downloads"}, 'are for weights="published"'),
    ("02_load_and_check_keys", {"methods": ["random"]}, "choose among BYOL, SwAV, MoCo, SparK"),
    ("02_load_and_check_keys", {"methods": []}, "choose among BYOL, SwAV, MoCo, SparK"),
])
def test_01_and_02_refuse_what_they_would_pass_over(stem, names, words):
    with pytest.raises(ValueError, match=words):
        run_cells(stem, **names)


def test_there_are_notebooks():
    assert PATHS


@each_notebook
def test_is_committed_with_the_outputs_of_one_fresh_run(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert [c.source for c in cells for o in c.outputs if o.output_type == "error"] == []


@each_notebook
def test_carries_no_widget_and_no_papermill_metadata(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert {k for c in notebook.cells for k in c.metadata} <= {"tags", "jupyter"}
    kinds = {k for c in notebook.cells for o in c.get("outputs", []) for k in o.get("data", {})}
    assert [k for k in kinds if "widget" in k] == []


@each_notebook
def test_names_no_path_of_a_machine(path):
    texts = [t for c in read_cells(path) for t in (c.source, *output_texts(c))]
    assert [m[0] for t in texts if (m := MACHINE_PATH.search(t))] == []


@each_notebook
def test_prints_at_most_100_lines_a_cell(path):
    for cell in read_code(path):
        texts = [o.text for o in cell.outputs if "text" in o]
        texts += [o.data["text/plain"] for o in cell.outputs if "text/plain" in o.get("data", {})]
        assert sum(len(t.splitlines()) for t in texts) <= 100, cell.source


@each_notebook
def test_every_table_of_scores_or_answers_says_demo(path):
    tables = [o.data["text/html"] for cell in read_code(path) for o in cell.outputs
              if "text/html" in o.get("data", {})]
    scores = [t for t in tables if re.search(r"\b(AUC|ACC|prediction|val_AUC)\b", t)]
    assert [t for t in scores if "DEMO" not in t] == []
    assert scores or path.stem[:2] in ("01", "02")


@each_notebook
def test_opens_with_its_title_its_goals_and_its_needs(path):
    assert re.fullmatch(r"\d\d_[a-z_]+", path.stem)
    first = read_cells(path)[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert len(re.findall(r"^[-*] ", first.source, flags=re.MULTILINE)) >= 3
    assert re.search("minute|second", first.source, flags=re.IGNORECASE)


@each_notebook
def test_second_cell_holds_typed_literal_parameters_with_comments(path):
    cell = read_cells(path)[1]
    assert cell.metadata.get("tags") == ["parameters"]
    allowed = {"int", "float", "str", "bool"}
    allowed |= {f"list[{kind}]" for kind in allowed}
    last_lines = set()
    for statement in parse(cell).body:
        assert isinstance(statement, ast.AnnAssign), ast.unparse(statement)
        assert ast.unparse(statement.annotation) in allowed, ast.unparse(statement)
        ast.literal_eval(statement.value)
        last_lines.add(statement.end_lineno)
    tokens = tokenize.generate_tokens(io.StringIO(cell.source).readline)
    assert last_lines - {t.start[0] for t in tokens if t.type == tokenize.COMMENT} == set()


@each_notebook
def test_third_cell_imports_and_tells_versions_and_device(path):
    cell = read_cells(path)[2]
    assert cell.source.lstrip().startswith(("import", "from"))
    printed = "\n".join(output_texts(cell))
    assert "torch" in printed and len(printed.strip().splitlines()) == 1


@each_notebook
def test_code_cells_are_short(path):
    lengths = []
    for cell in read_code(path):
        lengths.append(len(cell.source.splitlines()))
        draws = "plt." in cell.source or "fig" in cell.source
        assert lengths[-1] <= (40 if draws else 25), cell.source
    assert statistics.median(lengths) <= 8


@each_notebook
def test_no_code_cell_stands_without_words(path):
    cells = read_cells(path)
    for i, cell in enumerate(cells[3:], start=3):
        around = [c.cell_type for c in (cells[i - 1], *cells[i + 1 : i + 2])]
        assert cell.cell_type == "markdown" or "markdown" in around, cell.source


@each_notebook
def test_leaves_helpers_and_training_loops_to_the_module(path):
    for cell in read_code(path):
        nodes = list(ast.walk(parse(cell)))
        assert not any(isinstance(n, ast.ClassDef) for n in nodes), cell.source
        assert not re.search(r"\.backward\(|strict\s*=\s*False|import \*", cell.source), cell.source


def test_no_function_stands_in_two_notebooks():
    names = [n.name for p in PATHS for c in read_code(p) for n in ast.walk(parse(c))
             if isinstance(n, ast.FunctionDef)]
    assert sorted(names) == sorted(set(names))


@each_notebook
def test_ends_with_findings_of_this_run(path):
    last = read_code(path)[-1]
    assert "\n".join(output_texts(last)).strip(), "the last code cell prints nothing"


def test_readme_table_lists_exactly_the_notebooks():
    readme = (ROOT / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| \[(\w+)\]\(notebooks/(\w+)\.ipynb\)", readme, flags=re.MULTILINE)
    assert listed == [(p.stem, p.stem) for p in PATHS]


# --- that they run ------------------------------------------------------------------------------

# Small for speed: one epoch on small pictures says nothing about a method, but runs every cell.
SMALL = {"epochs": 1, "image_size": 32}
TINY = {**SMALL, "weights": "stand-in", "dataset": "phantom"}


@pytest.fixture(scope="module")
def workbook(tmp_path_factory):
    """A copy of the notebooks in a folder of their own, with a small finished study beside it."""
    folder = tmp_path_factory.mktemp("workbook")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    runs = medssl.run_study(
        {"method": ["random", "SparK"], "label_fraction": [0.5, 1.0]}, workers=2, progress="none",
        notebook=folder / "notebooks" / "03_fine_tune.ipynb", study="workbook",
        **{name: folder / name.removesuffix("_dir") for name in (
            "runs_dir", "data_dir", "checkpoints_dir")}, **TINY)
    assert list(runs["error"]) == [""] * 4
    return folder


@pytest.mark.slow
@each_notebook
def test_runs_as_committed(path, workbook):
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env",
               "-p", "no:cacheprovider", f"notebooks/{path.name}"]
    done = subprocess.run(command, cwd=workbook, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def run_with(workbook: Path, stem: str, **parameters) -> nbformat.NotebookNode:
    """Run one notebook of the copy with other parameters; return the executed notebook."""
    output = workbook / f"{stem}_executed.ipynb"
    medssl.run_notebook(workbook / "notebooks" / f"{stem}.ipynb", output, parameters)
    return nbformat.read(output, as_version=4)


def test_study_leaves_four_runs_that_are_stamped(workbook):
    runs = medssl.load_runs(workbook / "runs" / "workbook")
    assert sorted(runs["method"]) == ["SparK", "SparK", "random", "random"]
    assert set(runs["label_fraction"]) == {0.5, 1.0}
    assert all("DEMO" in stamp for stamp in runs["stamp"])


@pytest.mark.slow
def test_05_compares_another_score(workbook):
    notebook = run_with(workbook, "05_compare_results", metric="ACC")
    text = "".join(t for c in notebook.cells for t in output_texts(c))
    assert "SparK" in text and "ACC" in text and "DEMO" in text


def write_medmnist(path: Path, n_labels: int, n_classes: int, channels: int) -> None:
    """A file in MedMNIST's layout, tiny for speed; label c is in every split."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 24), ("val", 18), ("test", 20)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 28, 28, 3)[:3 + channels // 3], np.uint8)
        i = np.arange(n)[:, None]
        arrays[f"{part}_labels"] = (i + np.arange(n_labels)) % (2 if n_labels > 1 else n_classes)
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)


@pytest.mark.slow
@pytest.mark.parametrize("dataset, layout, words", [
    ("chestmnist", (14, 2, 1), ["false alarms", "cardiomegaly", "wrong somewhere"]),
    ("retinamnist", (1, 5, 3), ["most confident mistakes", "test images are wrong"]),
])
def test_03_scores_several_labels_and_ordered_classes(workbook, dataset, layout, words):
    write_medmnist(workbook / "tiny" / f"{dataset}.npz", *layout)
    notebook = run_with(workbook, "03_fine_tune", **{**TINY, "dataset": dataset}, method="random",
                        unofficial=True, data_dir="../tiny", study=dataset, keep_best=False)
    text = "".join(t for c in notebook.cells for t in (c.source, *output_texts(c)))
    assert [w for w in words if w not in text] == []
    run = medssl.load_run(next((workbook / "runs" / dataset).glob("*/metrics.json")).parent)
    assert run.predictions["scores"].shape == (20, max(layout[:2]))
    drawn = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in
             o.get("data", {})]
    assert len(drawn) == (4 if dataset == "chestmnist" else 5)  # no confusion matrix of findings


@pytest.mark.slow
def test_04_runs_another_grid_and_leaves_what_it_promises(workbook):
    notebook = run_with(workbook, "04_run_study", **SMALL, methods=["MoCo"], fractions=[0.5],
                        seeds=[3], study="other", notebook="03_fine_tune.ipynb")
    text = "".join(t for c in notebook.cells for t in output_texts(c))
    assert "Runs: 1 in all, 1 to do." in text and "1 of 1 runs are done" in text
    assert "1 finished runs, 0 of them written again" in text
    runs = medssl.load_runs(workbook / "runs" / "other")
    asked = runs[["method", "label_fraction", "seed", "status", "stamp"]].to_numpy().tolist()
    assert asked == [["MoCo", 0.5, 3, "done", "DEMO"]]
    assert (runs["folder"][0] / "notebook.ipynb").exists()
    handed_over = re.search(r'In notebook 05 set study_dir = "(.+?)"', text)[1]
    assert (workbook / "notebooks" / handed_over).samefile(workbook / "runs" / "other")


@pytest.mark.slow
def test_04_shows_each_reason_in_full(workbook):
    notebook = run_with(workbook, "04_run_study", **SMALL, study="misspelt", methods=["Spark"])
    shown, = (c for c in notebook.cells if "runs failed" in "".join(output_texts(c)))
    table = next(o["data"]["text/html"] for o in shown.outputs if "data" in o)
    assert "SparK, random, ImageNet." in table  # where the message ends; pandas cuts it by itself


@pytest.mark.slow
def test_04_stops_after_the_plan_when_asked_to(workbook):
    notebook = run_with(workbook, "04_run_study", **SMALL, study="planned", dry_run=True)
    text = "".join(t for c in notebook.cells for t in output_texts(c))
    assert "Runs: 4 in all, 4 to do." in text and "nothing was run" in text
    assert not (workbook / "runs" / "planned").exists()


@pytest.mark.parametrize("names, drawn", [
    (["clear", "lesion"], "lesion (AUC = 0.75)"),  # one curve says it all
    (["clear", "lesion", "absent"], "clear (AUC = 0.75), lesion (AUC = 0.75)"),
])
def test_03_puts_into_words_the_roc_curves_that_it_draws_and_no_others(names, drawn):
    labels = np.array([0, 0, 1, 1])
    first = np.array([0.9, 0.4, 0.6, 0.1])
    scores = np.stack([first, 1 - first, *[0 * first] * (len(names) - 2)], axis=1)
    run = type("Run", (), {"stamp": "DEMO"})()
    scope = run_cells("03_fine_tune", "RocCurveDisplay", names=np.array(names), several=False,
                      labels=labels, scores=scores, truth=np.eye(len(names), dtype=int)[labels],
                      run=run, method="SparK", np=np, plt=plt, medssl=medssl)
    words = scope["figure"]._repr_mimebundle_()[0]["text/plain"]
    assert words.startswith(f"Left, ROC curves: {drawn}. Right, accuracy at the confidence")


BAD = {
    "method": ("Spark2", "Did you mean 'SparK'"),
    "dataset": ("phantoms", "Did you mean 'phantom'"),
    "label_fraction": (2.0, "label_fraction"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_03_refuses_a_bad_value_and_leaves_no_run(name, workbook, tmp_path):
    value, message = BAD[name]
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        run_with(workbook, "03_fine_tune", **{**TINY, name: value, "runs_dir": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


@each_notebook
def test_a_misspelt_parameter_is_refused(path, tmp_path):
    first = next(iter(papermill.inspect_notebook(str(path))))
    with pytest.raises(ValueError, match=f"Did you mean {first!r}"):
        medssl.run_notebook(path, tmp_path / "out.ipynb", {first + "x": 1})
    assert list(tmp_path.iterdir()) == []
