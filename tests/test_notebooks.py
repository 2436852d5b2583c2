"""Every notebook runs as committed: nbval over the seven, each reading what the others left."""

import sys

import psutil
import pytest
from conftest import NOTEBOOKS


def memory(process: psutil.Process) -> int:
    """Bytes that a process and its children hold, shared ones counted once (pss; Linux alone)."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            held = member.memory_full_info()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # ended meanwhile
        total += getattr(held, "pss", held.uss)
    return total


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_committed_in_the_memory_of_binder(path, workbook):
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env"]
    command += ["-p", "no:cacheprovider", f"notebooks/{path.name}"]
    peak = 0
    with open(workbook / "log", "w") as log:
        process = psutil.Popen(command, cwd=workbook, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, memory(process))
            psutil.wait_procs([process], timeout=0.5)
    print(f"{path.stem}: at most {peak / 1e6:.0f} MB")
    assert process.returncode == 0, (workbook / "log").read_text("utf-8")[-3000:]
    assert peak < 2e9  # what Binder gives
