"""A notebook's code cells, executed in this process, so that a test can reach into them."""

from pathlib import Path
from typing import Any

import ipywidgets
import nbformat

ROOT = Path(__file__).resolve().parent.parent


def read_cells(stem: str) -> list[str]:
    """The sources of a notebook's code cells."""
    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
    tags = [cell.metadata.get("tags", []) for cell in cells]
    return [cell.source for cell, t in zip(cells, tags)
            if cell.cell_type == "code" and "colab" not in t]


def run_cells(stem: str, *parts: str, **names: Any) -> dict[str, Any]:
    """Execute a notebook; return its names, with what it displayed as the list `displayed`.

    Args:
        parts: only the cells that hold one of these texts, the parameters left out.
        names: parameters, or whatever else the cells find.
    """
    shown: list[Any] = []

    def display(thing: Any) -> None:
        shown.append(thing)
        if isinstance(thing, ipywidgets.interactive) and thing.result is None:
            thing.update()  # as ipywidgets 7 does on display, 8 before

    scope = {**names, "display": display, "displayed": shown}
    cells = read_cells(stem)
    if not parts:
        exec(cells[0], scope)
        scope.update(names)
    for source in cells[1:] if not parts else [c for c in cells if any(p in c for p in parts)]:
        exec(compile(source, f"{stem}.ipynb", "exec"), scope)
    return scope
