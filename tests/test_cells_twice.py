"""Every notebook with other parameters, by papermill; each of its cells twice, with one result."""

import copy
import re

import nbformat
import papermill
import pytest
from conftest import NOTEBOOKS

# Small for speed: it says nothing about a method, but runs every cell. Each is given what it has.
SMALL = {"epochs": 1, "seeds": [0, 1, 2], "label_fractions": [0.1, 1.0], "label_fraction": 0.2}
TIMES = re.compile(r"\d+(\.\d+)? ?(ms|s|min|minutes|seconds)\b|\d+:\d\d|0x[0-9a-f]+")


def texts_without_times(cell: nbformat.NotebookNode) -> list[str]:
    returned = [output.data for output in cell.outputs if output.output_type == "execute_result"]
    return [TIMES.sub("…", data.get("text/plain", "")) for data in returned]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_twice_with_the_same_result(path, workbook):
    notebook = nbformat.read(path, as_version=4)
    again = copy.deepcopy(notebook.cells[2:])  # all but the title and the parameters
    for cell in again:
        cell.id = f"again-{cell.id}"
    notebook.cells += again
    doubled = workbook / "notebooks" / path.name
    nbformat.write(notebook, doubled)
    names = papermill.inspect_notebook(doubled)
    given = {name: value for name, value in SMALL.items() if name in names}
    options = {"cwd": workbook / "notebooks", "progress_bar": False}
    executed = papermill.execute_notebook(doubled, None, given, **options)
    done = {cell.id: cell for cell in executed.cells}
    for cell in again:
        if cell.cell_type == "code" and "plan_study" not in cell.source:  # what is left changes
            first = done[cell.id.removeprefix("again-")]
            second = done[cell.id]
            assert texts_without_times(first) == texts_without_times(second), cell.source
