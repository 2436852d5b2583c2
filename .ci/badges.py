"""Write the Colab and Binder badges and the Colab cell, from one address.

The address is `Repository` in `[project.urls]` of pyproject.toml. Badges stand below the title of
README.md and of each notebook; the Colab cell follows each notebook's parameters. Without an
address all of them are removed. Running it twice changes nothing.

Usage: python .ci/badges.py [FOLDER]     (the repository's folder; the one above this file)
"""

import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote

import nbformat

MARK = "[![Open in Colab]"  # a badge line starts with this, so that the next run finds it
ON_COLAB = """\
import sys

keep_on_drive: bool = False  # on Colab: True keeps checkpoints, data and runs on your Google Drive
if "google.colab" in sys.modules:
    import os
    from importlib.util import find_spec
    from urllib.request import urlretrieve
    root = "/content/medssl"
    if keep_on_drive:
        from google.colab import drive
        drive.mount("/content/drive")
        root = "/content/drive/MyDrive/medssl"
    os.makedirs(f"{{root}}/notebooks", exist_ok=True)
    os.chdir(f"{{root}}/notebooks")
    helper = "https://raw.githubusercontent.com/{name}/{tag}/medssl_utils.py"
    urlretrieve(helper, "medssl_utils.py")
    missing = [p for p in {packages} if not find_spec(p)]
    %pip install -q "{gdown}" {{" ".join(missing)}}
    import torch
    print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")"""
NOT_ON_COLAB = ("medmnist", "papermill", "captum", "pydicom", "nibabel", "statsmodels",
                "safetensors", "filelock")  # those that are there already are left alone


def repository(project: dict) -> str | None:
    """`owner/name` of the repository; None while there is no address. Raises SystemExit."""
    url = project.get("urls", {}).get("Repository")
    if url is None:
        return None
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", url)
    if not match:
        sys.exit(f"pyproject.toml: Repository is {url!r}; Colab and Binder open notebooks from "
                 "addresses like https://github.com/OWNER/NAME.")
    return match[1]


def tag(project: dict) -> str:
    """The tag of this version: notebook, helper and environment of a badge are of one release."""
    return f"v{project['version']}"


def badge_line(name: str, notebook: str, tag: str) -> str:
    """The two badges that open `notebook`, as one line of Markdown."""
    colab = f"https://colab.research.google.com/github/{name}/blob/{tag}/notebooks/{notebook}"
    binder = f"https://mybinder.org/v2/gh/{name}/{tag}?urlpath=" + quote(
        f"lab/tree/notebooks/{notebook}", safe="")
    return (f"{MARK}(https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
            f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})")


def with_badges(markdown: str, line: str | None) -> str:
    """Put `line` below the title, in place of the one that is there; None removes it."""
    lines = markdown.split("\n")
    for i in [i for i, text in enumerate(lines) if text.startswith(MARK)]:
        del lines[i - 1 : i + 1]  # the badge line and the empty one above it
    if line:
        lines[1:1] = ["", line]
    return "\n".join(lines)


def colab_cell(name: str, project: dict) -> nbformat.NotebookNode:
    """The cell that prepares a bare Colab runtime and does nothing anywhere else."""
    names = {re.match(r"[\w-]+", d)[0]: d for d in project["dependencies"]}
    packages = [n for n in NOT_ON_COLAB if n in names]
    source = ON_COLAB.format(name=name, tag=tag(project), packages=packages, gdown=names["gdown"])
    return nbformat.v4.new_code_cell(source, metadata={"tags": ["colab"]}, id="colab")


def with_colab_cell(notebook: nbformat.NotebookNode, cell: nbformat.NotebookNode | None) -> None:
    """Put `cell` behind the parameters, in place of the one that is there; None removes it.

    The cell does nothing outside Colab, so the outputs below it stay true: their counts move on.
    """
    cells = [c for c in notebook.cells if "colab" not in c.metadata.get("tags", [])]
    step = (cell is not None) - (len(notebook.cells) - len(cells))
    for counted in [part for c in cells[2:] for part in (c, *c.get("outputs", []))]:
        if counted.get("execution_count"):
            counted.execution_count += step
    if cell:
        cell.execution_count = cells[1].execution_count and cells[1].execution_count + 1
        cells.insert(2, cell)
    notebook.cells = cells


def main(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    name = repository(project)
    paths = sorted((folder / "notebooks").glob("*.ipynb"))

    readme = folder / "README.md"
    line = badge_line(name, paths[0].name, tag(project)) if name else None
    readme.write_text(with_badges(readme.read_text("utf-8"), line), "utf-8")

    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        line = badge_line(name, path.name, tag(project)) if name else None
        notebook.cells[0].source = with_badges(notebook.cells[0].source, line)
        with_colab_cell(notebook, colab_cell(name, project) if name else None)
        nbformat.write(notebook, path)
    where = f"for {name}" if name else "removed: pyproject.toml has no Repository"
    print(f"Badges in README.md and {len(paths)} notebooks {where}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
