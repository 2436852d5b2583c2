"""The list of dependencies, the files that repeat it, and the badges that need the address."""

import ast
import base64
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
import urllib.error
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image, ImageColor

import medssl_utils as medssl

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
RUNTIME = PROJECT["dependencies"]
TEST = PROJECT["optional-dependencies"]["test"]
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "test"}



def load_script(name: str):
    """A script of .ci as a module; .ci is no package, so not a plain import."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


badges, pages, figures = map(load_script, ("badges", "pages", "figures"))

CONDA_NAMES = {"pytorch": "torch", "pytorch-cpu": "torch"}  # conda name -> the one in pyproject
IMPORT_NAMES = {"scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml", "ipython": "IPython"}
# Dependencies that the notebooks and tests use without importing them.
NOT_IMPORTED = {"jupyterlab", "ipywidgets", "ipykernel", "nbval", "nbconvert", "onnx", "onnxscript",
                "jupyter-repo2docker", "pytest-xdist"}


def floors(requirements: list[str]) -> dict[str, str]:
    """Names, in pyproject's spelling, -> version floors."""
    parsed = [Requirement(r) for r in requirements]
    return {CONDA_NAMES.get(r.name, r.name).lower(): str(r.specifier) for r in parsed}


def conda_requirements(path: Path) -> list[str]:
    """The packages of a conda environment file, its pip section included, python and pip not."""
    items = yaml.safe_load(path.read_text("utf-8"))["dependencies"]
    names = [i for i in items if isinstance(i, str) and not i.startswith("python=")]
    names += [p for i in items if isinstance(i, dict) for p in i["pip"]]
    return [n for n in names if Requirement(n).name not in ("python", "pip")]


def imported_modules() -> set[str]:
    """Top-level names that the module, the notebooks, the tests and the scripts import."""
    patterns = ("medssl_utils.py", "tests/*.py", "bench/*.py", ".ci/*.py")
    sources = [p.read_text("utf-8") for pattern in patterns for p in ROOT.glob(pattern)]
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(c.source for c in cells if c.cell_type == "code")
        sources.append(re.sub(r"^\s*[%!].*", "", code, flags=re.MULTILINE))
    found = set()
    for node in (n for s in sources for n in ast.walk(ast.parse(s))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_environment_file_matches_pyproject():
    assert floors(conda_requirements(ROOT / "environment.yml")) == floors(RUNTIME + TEST)


def test_binder_environment_matches_pyproject():
    assert floors(conda_requirements(ROOT / "binder" / "environment.yml")) == floors(RUNTIME)


@pytest.mark.parametrize("name", ["environment.yml", "binder/environment.yml"])
def test_torch_and_torchvision_both_come_from_conda(name):
    items = yaml.safe_load((ROOT / name).read_text("utf-8"))["dependencies"]
    conda = {Requirement(i).name for i in items if isinstance(i, str) and "python=" not in i}
    assert "torchvision" in conda and conda & {"pytorch", "pytorch-cpu"}


def test_environment_python_matches_pyproject():
    items = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    assert "python" + PROJECT["requires-python"] in items


def test_binder_builds_from_its_folder_with_a_python_that_fits(tmp_path):
    shutil.copytree(ROOT / "binder", tmp_path / "binder")
    shutil.copy(ROOT / "environment.yml", tmp_path)  # beside it, as in the repository
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", "."]
    plan = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr[-1000:]
    said = plan.stdout + plan.stderr
    assert "--file \"binder/environment.yml\"" in said and "./binder/postBuild" in said
    version = re.search(r"conda environment for python=(\S+)", said)[1]
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(version + ".0")


def test_a_changed_floor_would_be_noticed(tmp_path):
    drifted = tmp_path / "environment.yml"
    text = (ROOT / "environment.yml").read_text("utf-8")
    drifted.write_text(text.replace("pandas>=2.2", "pandas>=2.1"), "utf-8")
    assert floors(conda_requirements(drifted)) != floors(RUNTIME + TEST)


def test_every_import_is_a_declared_dependency():
    declared = {IMPORT_NAMES.get(n, n) for n in floors(RUNTIME + TEST)}
    patterns = ("*.py", "tests/*.py", "bench/*.py", ".ci/*.py", "bench")
    local = {p.stem for pattern in patterns for p in ROOT.glob(pattern)}
    assert imported_modules() - declared - local - sys.stdlib_module_names == set()


@pytest.mark.parametrize("extra", ["dask", "export"])
def test_an_extra_is_tested(extra):
    assert floors(EXTRAS[extra]).items() <= floors(TEST).items()


def test_every_dependency_is_used():
    used = imported_modules() | NOT_IMPORTED
    assert [n for n in floors(RUNTIME + TEST) if IMPORT_NAMES.get(n, n) not in used] == []


def test_every_dependency_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    lines = re.findall(r'^    "[\w.\[\]-]+>=.*$', text, flags=re.MULTILINE)
    assert len(lines) == len(RUNTIME + TEST + sum(EXTRAS.values(), []))
    assert [line for line in lines if not re.search(r'",\s+# \w', line)] == []


# --- badges: one address, in pyproject.toml ---------------------------------------------------


@pytest.fixture
def copy_of_project(tmp_path):
    """README, notebooks and pyproject.toml in a folder of their own, without an address."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    set_address(tmp_path, None)
    return tmp_path


def set_address(folder: Path, url: str | None) -> None:
    """Set or remove Repository in the folder's pyproject.toml, then write the badges."""
    path = folder / "pyproject.toml"
    text = re.sub(r"^Repository = .*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    line = f'[project.urls]\nRepository = "{url}"\n' if url else "[project.urls]\n"
    path.write_text(text.replace("[project.urls]\n", line), "utf-8")
    badges.main(folder)


def written_files(folder: Path) -> dict[str, bytes]:
    paths = [folder / "README.md", *folder.glob("notebooks/*.ipynb")]
    return {p.name: p.read_bytes() for p in paths}


def test_badges_open_each_notebook_at_the_address(copy_of_project):
    set_address(copy_of_project, "https://github.com/someone/something")
    paths = sorted(copy_of_project.glob("notebooks/*.ipynb"))
    assert paths
    for path in paths:
        first = nbformat.read(path, as_version=4).cells[0].source
        tag = f"v{PROJECT['version']}"
        assert f"/github/someone/something/blob/{tag}/notebooks/{path.name})" in first
        assert f"/gh/someone/something/{tag}?urlpath=lab%2Ftree%2Fnotebooks%2F{path.name})" in first
    readme = (copy_of_project / "README.md").read_text("utf-8")
    assert f"/blob/{tag}/notebooks/{paths[0].name})" in readme
    assert f"?urlpath=lab%2Ftree%2Fnotebooks%2F{paths[0].name})" in readme


def test_colab_cell_follows_the_parameters(copy_of_project):
    set_address(copy_of_project, "https://github.com/someone/something.git")
    for path in copy_of_project.glob("notebooks/*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert cells[1].metadata.tags == ["parameters"]
        assert cells[2].metadata.tags == ["colab"]
        assert f"someone/something/v{PROJECT['version']}/medssl_utils.py" in cells[2].source
        assert '"gdown>=6"' in cells[2].source
        counts = [c.execution_count for c in cells if c.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))


def colab_brings() -> dict[str, str]:
    """Name -> version of what `make test-colab` takes for a Colab runtime's own."""
    lines = (ROOT / ".ci" / "colab.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_what_colab_brings_or_the_cell_installs_is_all_that_notebooks_need():
    brings = colab_brings()
    allowed = {name for name, floor in floors(RUNTIME).items()
               if name in brings and SpecifierSet(floor).contains(brings[name])}
    # gdown is upgraded; Colab's own server and kernel serve in place of the others
    others = set(floors(RUNTIME)) - allowed - set(badges.NOT_ON_COLAB)
    assert others == {"gdown", "jupyterlab", "ipykernel"}


def test_readme_installs_in_colab_what_is_missing_there():
    command = re.search(r"%pip install -q (.*)", (ROOT / "README.md").read_text("utf-8"))[1]
    missing = set(badges.NOT_ON_COLAB) - set(colab_brings())
    assert set(shlex.split(command)) == {*missing, "gdown" + floors(RUNTIME)["gdown"]}


@pytest.fixture
def colab_cell(tmp_path, monkeypatch):
    """Run the Colab cell without pip, in a folder that stands for /content and for the address."""
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.chdir(tmp_path)
    source = badges.colab_cell("someone/something", PROJECT).source
    source = re.sub(r"^ *%pip.*", "", source, flags=re.MULTILINE).replace("/content", str(tmp_path))
    source = source.replace("https://raw.githubusercontent.com", tmp_path.as_uri())
    return lambda: exec(compile(source, "colab", "exec"), {})


def test_colab_cell_fetches_the_helper_of_the_tag_and_can_run_twice(colab_cell, tmp_path):
    served = tmp_path / "someone" / "something" / f"v{PROJECT['version']}" / "medssl_utils.py"
    served.parent.mkdir(parents=True)
    served.write_text("there")
    colab_cell()
    colab_cell()
    assert (tmp_path / "medssl" / "notebooks" / "medssl_utils.py").read_text() == "there"
    assert Path.cwd() == tmp_path / "medssl" / "notebooks"


def test_colab_cell_stops_where_the_helper_cannot_be_fetched(colab_cell, tmp_path):
    with pytest.raises(urllib.error.URLError):
        colab_cell()
    assert list((tmp_path / "medssl" / "notebooks").iterdir()) == []


def test_badges_written_twice_change_nothing(copy_of_project):
    set_address(copy_of_project, "https://github.com/someone/something")
    once = written_files(copy_of_project)
    set_address(copy_of_project, "https://github.com/someone/something")
    assert written_files(copy_of_project) == once


def test_badges_follow_a_new_address(copy_of_project):
    set_address(copy_of_project, "https://github.com/someone/something")
    set_address(copy_of_project, "https://github.com/another/place")
    text = b"".join(written_files(copy_of_project).values())
    assert b"another/place" in text and b"someone/something" not in text


def test_without_an_address_there_is_no_badge(copy_of_project):
    before = written_files(copy_of_project)
    assert b"colab-badge" not in b"".join(before.values())
    set_address(copy_of_project, "https://github.com/someone/something")
    set_address(copy_of_project, None)
    assert written_files(copy_of_project) == before


def test_an_address_that_badges_cannot_use_is_refused(copy_of_project):
    with pytest.raises(SystemExit, match="https://github.com/OWNER/NAME"):
        set_address(copy_of_project, "https://example.org/someone/something")


def test_committed_badges_match_the_address(copy_of_project):
    set_address(copy_of_project, PROJECT["urls"].get("Repository"))
    committed = {p: (ROOT / ("" if p == "README.md" else "notebooks") / p).read_bytes()
                 for p in written_files(copy_of_project)}
    assert written_files(copy_of_project) == committed


# --- web pages and pictures ---------------------------------------------------------------------


def write_notebook(path: Path, text: str) -> None:
    """A notebook of some text and one picture that carries words."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    picture = nbformat.v4.new_output(
        "display_data", {"image/png": base64.b64encode(file.getvalue()).decode()},
        metadata={"image/png": {"alt": "a black point"}})
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("", outputs=[picture])]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def test_web_pages_link_to_each_other_and_keep_the_words_of_pictures(tmp_path):
    write_notebook(tmp_path / "notebooks" / "01_one.ipynb", "Go on in [two](02_two.ipynb).")
    write_notebook(tmp_path / "notebooks" / "02_two.ipynb", "as committed")
    write_notebook(tmp_path / "runs" / "study" / "02_two.ipynb", "as it ran")
    pages.main(tmp_path, "study")
    html = {p.name: p.read_text("utf-8") for p in (tmp_path / "runs" / "html").iterdir()}
    assert sorted(html) == ["01_one.html", "02_two.html"]
    for text in html.values():
        assert set(re.findall(r'href="(\w+\.\w+)"', text)) == set(html)
        assert 'alt="a black point"' in text
        assert not re.search(r'src="https?:|import\("https?:', text), "a page fetches a script"
    assert "as it ran" in html["02_two.html"] and "as committed" not in html["02_two.html"]


def test_pictures_of_the_readme_are_those_of_the_notebooks(copy_of_project):
    committed = sorted((ROOT / "notebooks" / "figures").iterdir())
    figures.main(copy_of_project)
    assert [p.name for p in committed] == [
        p.name for p in sorted((copy_of_project / "notebooks" / "figures").iterdir())]
    for path in committed:
        one, two = (np.asarray(Image.open(p).convert("RGB"), float) for p in (
            path, copy_of_project / "notebooks" / "figures" / path.name))
        assert one.shape == two.shape and np.abs(one - two).mean() < 1, path.name  # 0 to 255


def test_pictures_of_the_readme_keep_the_colour_of_each_method():
    image = Image.open(ROOT / "notebooks" / "figures" / "05_compare_results.png").convert("RGB")
    pixels = np.asarray(image, int).reshape(-1, 3)
    colors = {m: ImageColor.getrgb(medssl.METHOD_COLORS[m]) for m in ("random", *medssl.METHODS)}
    away = {method: np.abs(pixels - color).sum(1).min() for method, color in colors.items()}
    assert max(away.values()) < 30, away  # of 765


# --- make ---------------------------------------------------------------------------------------


def test_make_passes_only_parameters_that_the_notebooks_have():
    import papermill

    plan = subprocess.run(["make", "-n", "workbook"], cwd=ROOT, check=True, capture_output=True,
                          text=True).stdout.replace("\\\n", " ")
    commands = [line for line in plan.splitlines() if "-m papermill" in line]
    assert len(commands) == 6
    for line in commands:
        notebook = ROOT / re.search(r"notebooks/\w+\.ipynb", line)[0]
        known = papermill.inspect_notebook(notebook)
        assert set(re.findall(r" -[rp] (\w+) ", line)) <= set(known)


@pytest.mark.parametrize("given, meant", [
    ("organsmnist", "organsmnist"), ("tests", f"{ROOT}/tests"), (f"{ROOT}/tests", f"{ROOT}/tests"),
])
def test_make_names_a_folder_of_images_so_that_notebooks_find_it(given, meant):
    plan = subprocess.run(["make", "-n", "workbook", f"DATASET={given}"], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
    assert f'-r dataset "{meant}"' in plan and f"['{meant}']" in plan


@pytest.mark.parametrize("settings, methods", [
    ([], ["random", *medssl.METHODS]),
    (["WEIGHTS=published"], ["random", *medssl.METHODS]),
    (["WEIGHTS=published", "DATASET=organsmnist", "RECIPE=paper"],
     ["random", *medssl.METHODS, "ImageNet"]),
])
def test_make_shows_notebook_04_every_method_of_the_grid(settings, methods):
    plan = subprocess.run(["make", "-n", "workbook", *settings], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout.replace("\\\n", " ")
    given = re.search(r'notebooks/04_run_study.* -y "(.*)"', plan)[1]
    assert yaml.safe_load(given)["methods"] == methods


def test_an_old_python_is_refused_with_the_way_out(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    old = tmp_path / "old python"
    old.write_text("#!/bin/sh\nexit 1\n")  # stands for a Python that fails the version question
    old.chmod(0o755)
    made = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert made.returncode != 0
    assert "Python 3.11 or newer is needed" in made.stdout
    assert not (tmp_path / ".venv").exists()
