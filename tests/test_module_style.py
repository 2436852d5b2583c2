"""The helper module keeps the promises that readers and notebooks rely on."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import medssl_utils as medssl

PATH = Path(__file__).resolve().parent.parent / "medssl_utils.py"
SOURCE = PATH.read_text("utf-8")
TREE = ast.parse(SOURCE)
SECTIONS = ["Checkpoints", "Data", "Training", "Evaluation", "Results", "Study", "Figures", "Demo"]
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]

# Imported where used: slow to import, or needed by one function only.
IMPORTED_LATE = ["medmnist", "gdown", "sklearn", "statsmodels", "scipy", "papermill",
                 "pydicom", "nibabel", "IPython", "ipywidgets"]

LOOK_AROUND_AN_IMPORT = """
import json, os, random, sys
import numpy, torch, torchvision, pandas
def state():
    return [repr(random.getstate()), repr(numpy.random.get_state()),
            torch.random.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_default_dtype().__repr__(), sorted(os.environ.items()), sorted(os.listdir())]
before, loaded = state(), set(sys.modules)
import medssl_utils
new = sorted({m.split(".")[0] for m in set(sys.modules) - loaded})
print(json.dumps({"same": state() == before, "new": new}))
"""


def test_all_names_what_exists():
    assert [n for n in medssl.__all__ if not hasattr(medssl, n)] == []
    assert len(set(medssl.__all__)) == len(medssl.__all__)


def test_all_is_the_first_statement_after_the_imports():
    body = [n for n in TREE.body[1:] if not isinstance(n, ast.Import | ast.ImportFrom)]
    assert isinstance(body[0], ast.Assign) and body[0].targets[0].id == "__all__"


def test_everything_public_has_a_docstring():
    public = [n for n in TREE.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    methods = [m for c in public if isinstance(c, ast.ClassDef) for m in c.body
               if isinstance(m, ast.FunctionDef)]
    named = [n for n in public + methods if not n.name.startswith("_")]
    assert [n.name for n in named if not ast.get_docstring(n)] == []


def test_everything_in_all_is_annotated():
    functions = [getattr(medssl, n) for n in medssl.__all__]
    functions = [f for f in functions if inspect.isfunction(f)]
    bare = [f.__name__ for f in functions for p in inspect.signature(f).parameters.values()
            if p.annotation is p.empty and p.kind is not p.VAR_KEYWORD]
    assert bare == []


def test_lines_are_at_most_100_characters():
    assert [i for i, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100] == []


def test_sections_stand_in_reading_order():
    banner = re.compile(r"^# ={70,}\n# (\w+)\n# ={70,}$", flags=re.MULTILINE)
    assert banner.findall(SOURCE) == SECTIONS


def test_the_module_docstring_lists_the_sections():
    assert re.findall(r"^    ([A-Z]\w+)  ", ast.get_docstring(TREE, clean=False),
                      flags=re.MULTILINE) == SECTIONS


def test_functions_are_short():
    lengths = sorted(n.end_lineno - n.lineno + 1 - docstring_lines(n) for n in FUNCTIONS)
    assert lengths[len(lengths) // 2] <= 15


def docstring_lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    has_one = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno - first.lineno + 1 if has_one else 0


def test_no_star_import():
    imports = [a.name for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom) for a in n.names]
    assert "*" not in imports


def test_strict_false_comes_with_a_look_at_both_key_sets():
    loose = [f for f in FUNCTIONS if "strict=False" in ast.unparse(f)]
    assert [f.name for f in loose if "missing_keys" not in ast.unparse(f)
            or "unexpected_keys" not in ast.unparse(f)] == []


def test_no_name_is_defined_twice():
    names = [n.name for n in TREE.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert sorted(names) == sorted(set(names))


def test_importing_has_no_side_effect_and_loads_nothing_heavy(tmp_path):
    done = subprocess.run([sys.executable, "-B", "-c", LOOK_AROUND_AN_IMPORT], cwd=tmp_path,
                          check=True, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(PATH.parent)})
    found = json.loads(done.stdout)
    assert found["same"]
    assert [m for m in IMPORTED_LATE if m in found["new"]] == []
