"""The house keeps its shape: a thin helper, notebooks in one form, one list of dependencies."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
HELPER = (ROOT / "medssl_utils.py").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

MACHINE_PATH = re.compile(
    r"(?<![\w.])/(root|work|home/\w+|Users/\w+|tmp/[\w.-]+)/|[A-Z]:\\\\?Users"
)
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
OTHER_NAMES = {"pytorch": "torch", "pytorch-cpu": "torch", "dask[distributed]": "dask"}
OTHER_NAMES |= {"sklearn": "scikit-learn", "PIL": "pillow", "IPython": "ipython"}
OTHER_NAMES |= {"distributed": "dask", "google": "jupyterlab"}  # google: a module of Colab's


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: no blank line, comment or docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source + "\n").readline):
        if token.type not in (*NO_CODE, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node):
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def read_code(path: Path) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook, with lines for the shell and for IPython as `pass`."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    for cell in cells:
        cell.source = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.M)
    return cells


def floors(text: str) -> dict[str, str]:
    """Name of each package -> its lowest version, for every `name>=version` in a text."""
    pairs = re.findall(r"([\w.\[\]-]+)>=([\d.]+)", text)
    return {OTHER_NAMES.get(name, name): version for name, version in pairs}


def test_the_helper_stays_thin():
    lines = code_lines(HELPER)
    sizes = []
    for node in ast.walk(ast.parse(HELPER)):
        if isinstance(node, ast.FunctionDef):
            size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            sizes.append((size, node.name))
    too_long = [name for size, name in sizes if size > 40 and name != "fine_tune" or size > 60]
    assert len(lines) <= 1500 and len(sizes) <= 120 and too_long == []
    tokens = tokenize.generate_tokens(io.StringIO(HELPER).readline)
    assert len([t for t in tokens if t.type not in (*NO_CODE, tokenize.ENDMARKER)]) <= 14_500


def test_importing_the_helper_loads_nothing_heavy():
    heavy = {"sklearn", "scipy", "matplotlib", "gdown", "medmnist", "joblib", "captum", "IPython"}
    program = "import sys, torchvision, pandas; modules = set(sys.modules); import medssl_utils; "
    program += "print(*(set(sys.modules) - modules))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & heavy == set()


@each_notebook
def test_a_notebook_opens_with_title_goals_time_parameters_and_versions(path):
    title, parameters, imports = nbformat.read(path, as_version=4).cells[:3]
    assert title.source.startswith("# ") and len(re.findall(r"^- ", title.source, re.M)) >= 3
    assert re.search("minute|second", title.source)
    assert parameters.metadata.tags == ["parameters"]
    statements = ast.parse(parameters.source).body
    assert len(statements) <= 12
    for statement in statements:
        ast.literal_eval(statement.value)  # papermill sets numbers, texts, truths, lists of them
    assert "torch" in imports.outputs[-1].text


@each_notebook
def test_cells_are_short_and_committed_with_the_outputs_of_one_fresh_run(path):
    assert set(nbformat.read(path, as_version=4).metadata) <= {"kernelspec", "language_info"}
    cells = read_code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [str(output.get("data", output.output_type)) for c in cells for output in c.outputs]
    assert [kind[:99] for kind in kinds if kind == "error" or "widget-view" in kind] == []
    tagged = [cell for cell in cells if "reader" in cell.metadata.get("tags", [])]
    lengths = [len(code_lines(cell.source)) for cell in cells[1:] if cell not in tagged]
    assert max(lengths) <= 16 and statistics.median(lengths) <= 6
    assert max([len(code_lines(cell.source)) for cell in tagged], default=0) <= 30


def test_no_tracked_text_names_a_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    texts = [ROOT / name for name in listed.split("\n") if name.endswith((".py", ".md", ".ipynb"))]
    assert [p.name for p in texts if p.exists() and MACHINE_PATH.search(p.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "name, extras", [("environment.yml", ["test"]), ("binder/environment.yml", [])]
)
def test_an_environment_file_agrees_with_pyproject(name, extras):
    wanted = [*PROJECT["dependencies"]]
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    listed = floors((ROOT / name).read_text("utf-8"))
    listed.pop("python", None)
    assert listed == floors("\n".join(wanted))


def test_every_import_is_a_declared_dependency():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/*.py")]
    sources = [path.read_text("utf-8") for path in files]
    sources += [cell.source for path in NOTEBOOKS for cell in read_code(path)]
    names = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    names -= sys.stdlib_module_names | {path.stem for path in files} | {"bench", "tests"}
    declared = floors("\n".join(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]))
    assert {OTHER_NAMES.get(name, name) for name in names} <= set(declared)


def test_the_readme_is_short_and_what_it_names_exists():
    assert len(README.split()) <= 900
    assert re.findall(r"\]\(notebooks/(\w+\.ipynb)\)", README) == [p.name for p in NOTEBOOKS]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    commands = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert (
        {"workbook", "lab", "test"} <= commands <= set(re.findall(r"^([a-z-]+):", makefile, re.M))
    )
    assert [n for n in re.findall(r"\]\((?!http)([^)#]+)", README) if not (ROOT / n).exists()] == []


def test_the_python_of_the_readme_runs(stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(stand_ins)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    blocks = [block for block in blocks if "%pip" not in block]  # test_colab.py runs that one
    assert blocks
    for block in blocks:
        exec(block.replace('"published"', '"stand-in"'), {})
