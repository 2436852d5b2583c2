"""Run every notebook as Colab would: its package versions, a kernel of its own, the Colab cell.

    make test-colab                      (builds .venv-colab from .ci/colab.txt; ten minutes)

Copies of the notebooks get the Colab cell of `make badges`, for an address that a local server
plays. Then each runs from top to bottom, the Colab cell twice, in a bare folder without this
project's code; a module named google.colab stands for Colab. At the end, no package that Colab
brings may have another version than before, but for gdown.

Usage: python .ci/colab.py PYTHON     (the Python of an environment with .ci/colab.txt installed)
"""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import badges
import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parent.parent
NAME = "someone/something"
START_UP = """
import sys, types
google, colab, drive = (types.ModuleType(n) for n in ("google", "google.colab", "drive"))
drive.mount = lambda folder: None
colab.drive, google.colab = drive, colab
sys.modules |= {"google": google, "google.colab": colab}
"""


def prepare(folder: Path) -> list[Path]:
    """Copy the project, set the address, write the Colab cells; return the notebooks."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    path = folder / "pyproject.toml"
    text = path.read_text("utf-8").replace(
        "[project.urls]\n", f'[project.urls]\nRepository = "https://github.com/{NAME}"\n')
    path.write_text(text, "utf-8")
    badges.main(folder)
    return sorted((folder / "notebooks").glob("*.ipynb"))


def serve(folder: Path) -> str:
    """Serve the helper under the path that GitHub gives it; return the server's address."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def add_kernel(folder: Path, python: str) -> None:
    """Make a kernel "colab" of that Python, which believes that it runs on Colab."""
    spec = folder / "jupyter" / "kernels" / "colab"
    spec.mkdir(parents=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    home = folder / "ipython"
    (home / "profile_default" / "startup").mkdir(parents=True)
    (home / "profile_default" / "startup" / "colab.py").write_text(START_UP)
    # no PYTHONPATH: only what is installed there, and the notebook's own folder
    environment = {"IPYTHONDIR": str(home), "PYTHONPATH": "", "OMP_NUM_THREADS": "2",
                   "PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # else Python 3.13 warns at each start
    (spec / "kernel.json").write_text(json.dumps(
        {"argv": argv, "display_name": "Colab", "language": "python", "env": environment}))
    os.environ["JUPYTER_PATH"] = str(folder / "jupyter")


def versions(python: str) -> dict[str, str]:
    """Name -> version of what is installed."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True,
                            capture_output=True, text=True).stdout
    return {p["name"].lower(): p["version"] for p in json.loads(listed)}


def run(path: Path, address: str, content: Path) -> float:
    """Run one notebook from top to bottom, its Colab cell twice; return its seconds.

    Raises on an error in a cell, and SystemExit where versions or GPU are not said.
    """
    notebook = nbformat.read(path, as_version=4)
    place, cell = next((i, c) for i, c in enumerate(notebook.cells)
                       if "colab" in c.metadata.get("tags", []))
    cell.source = cell.source.replace("https://raw.githubusercontent.com", address)
    cell.source = cell.source.replace('"/content/', f'"{content}/')
    notebook.cells.insert(place, nbformat.v4.new_code_cell(cell.source))
    began = time.monotonic()
    ExecutePreprocessor(kernel_name="colab", timeout=900).preprocess(
        notebook, {"metadata": {"path": str(content)}})
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    for word in ("GPU: ", "Python 3.", "torch 2."):
        if word not in said:
            sys.exit(f"{path.name} does not say {word!r}.")
    return time.monotonic() - began


def main(python: str) -> None:
    before = versions(python)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "project").mkdir()
        paths = prepare(folder / "project")
        project = badges.tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        served = folder / "served" / NAME / badges.tag(project)
        served.mkdir(parents=True)
        shutil.copy(ROOT / "medssl_utils.py", served)
        address, content = serve(folder / "served"), folder / "content"
        content.mkdir()
        add_kernel(folder, python)
        for path in paths:
            if path.name.startswith("05"):  # what 05 compares
                make_runs(content)
            print(f"{path.name}: {run(path, address, content):.0f} s", flush=True)
    after = versions(python)
    changed = {n: (v, after.get(n)) for n, v in before.items() if after.get(n) != v}
    print("Added:", ", ".join(sorted(set(after) - set(before))) or "nothing")
    print("Changed:", changed or "nothing")
    if set(changed) - {"gdown"}:
        sys.exit("A package that Colab brings was changed; only gdown may be.")


def make_runs(content: Path) -> None:
    """Make the small study that notebook 05 reads, where 03 and 04 would leave it."""
    import medssl_utils as medssl

    home = content / "medssl"
    medssl.run_study(
        {"method": ["random", "SparK"], "label_fraction": [0.5, 1.0], "seed": [0, 1]},
        progress="none", study="workbook", image_size=32, epochs=1, runs_dir=home / "runs",
        checkpoints_dir=home / "checkpoints", data_dir=home / "data")


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
