"""What a study costs beside its runs: here, in two processes, and when a worker is killed.

    python bench/study.py            # about a minute on two quiet cores

Runs are empty (a file is written, nothing is trained), so all that is measured is the study's own
work: looking for what is done, handing out, starting processes, replacing those that die.
"""

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import medssl_utils as medssl

GRID = {"method": ["random"], "label_fraction": [0.25, 0.5, 0.75, 1.0], "seed": list(range(10))}


def write_marks(cells, here, checkpoints):
    """Take the place of `_run_cells`: leave one file a run."""
    for cell in cells:
        name = f"{cell['seed']}_{cell['label_fraction']}"
        Path(cell["runs_dir"], name).touch()
    return [""] * len(cells)


def kill_once(cells, here, checkpoints):
    """The same, but the first worker that meets seed 5 dies in its second run."""
    flag = Path(cells[0]["runs_dir"], "killed")
    if cells[0]["seed"] == 5 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return write_marks(cells, here, checkpoints)


def measure(run_cells, workers: int) -> dict:
    """Return seconds of one study, and how many of its runs were reached."""
    kept = medssl._run_cells
    medssl._run_cells = run_cells
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        table = medssl.run_study(GRID, workers=workers, runs_dir=folder)
        seconds = time.perf_counter() - began
        reached = len(list(Path(folder).glob("?_*")))
    medssl._run_cells = kept
    return {
        "seconds": round(seconds, 2),
        "runs": reached,
        "done": int((table.status == "done").sum()),
    }


def time_plan(runs: int) -> dict:
    """Return seconds of a plan over runs of which all are done."""
    config = {"recipe": "linear", "image_size": 32}
    grid = {**GRID, "seed": list(range(runs // 4))}
    with tempfile.TemporaryDirectory() as folder:
        medssl.run_study(grid, runs_dir=folder, **config)
        began = time.perf_counter()
        plan = medssl.plan_study(grid, runs_dir=folder, **config)
        seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "runs": runs, "done": int((plan.status == "done").sum())}


def main() -> None:
    print(medssl.describe_environment(), "load", os.getloadavg()[0])
    measure(write_marks, 0)  # imports and phantoms: not timed
    rows = {
        "40 empty runs in this process": measure(write_marks, 0),
        "40 empty runs in 2 processes": measure(write_marks, 2),
        "the same, a worker killed": measure(kill_once, 2),
        "plan of 8 runs that are done": time_plan(8),
    }
    for name, row in rows.items():
        print(f"{name:32} {json.dumps(row)}")


if __name__ == "__main__":
    main()
