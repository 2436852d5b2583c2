"""Every notebook with Colab's package versions and the README's cell: `make test-colab`."""

import json
import re
import subprocess

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT

PYTHON = ROOT / ".venv-colab" / "bin" / "python"
ADDRESS = "https://github.com/OWNER/REPOSITORY"


def versions() -> set[str]:
    """What is installed in the environment that stands for Colab's, as name==version."""
    command = [str(PYTHON), "-m", "pip", "list", "--format=freeze"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.colab
def test_all_notebooks_run_in_a_bare_colab_runtime(tmp_path, monkeypatch):
    from nbconvert.preprocessors import ExecutePreprocessor

    kernel = tmp_path / "jupyter" / "kernels" / "colab"
    kernel.mkdir(parents=True)
    argv = [str(PYTHON), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python", "env": {"PYTHONPATH": ""}}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    readme = (ROOT / "README.md").read_text("utf-8")
    cell = re.search(r"^```python\n(%pip.*?)^```", readme, re.M | re.S)[1]
    assert len(cell.splitlines()) == 3
    cell = cell.replace(ADDRESS, str(ROOT))  # a clone of what is committed here
    before = versions()
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(cell))
        executor = ExecutePreprocessor(kernel_name="colab", timeout=900)
        executor.preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
        print(f"{path.stem} runs")
    changed = [package.split("==")[0] for package in before - versions()]
    assert changed == ["gdown"]  # `make test-colab` makes the environment anew
