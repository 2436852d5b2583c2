"""Seconds and peak memory of every notebook, as committed, each in a fresh copy of the folder.

    python bench/notebooks.py            about four minutes on two cores
    python bench/notebooks.py 03 06      only these

Memory is that of the kernel and all processes that it starts (proportional set size, so that what
they share counts once), asked for ten times a second: what a Binder machine must have, with about
0.2 GB for JupyterLab itself.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import medssl_utils as medssl  # noqa: E402

COMMAND = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute",
           "--log-level=ERROR", "--output-dir=executed"]


def measure(path: Path, cwd: Path) -> tuple[float, float]:
    """Run a notebook; return its seconds and the peak of its processes' memory in GB."""
    began, peak = time.monotonic(), 0
    process = psutil.Popen([*COMMAND, str(path)], cwd=cwd)
    while process.poll() is None:
        peak = max(peak, sum(memory(p) for p in process.children(recursive=True)))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{path.name} failed.")
    return time.monotonic() - began, peak / 1e9


def memory(process: psutil.Process) -> int:
    """Bytes of one process; 0 when it has just ended."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def main(*chosen: str) -> None:
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if unknown := [c for c in chosen if not any(path.name.startswith(c) for path in paths)]:
        sys.exit(f"No notebook begins with {', '.join(unknown)}: "
                 f"choose among {', '.join(path.stem for path in paths)}.")
    print(medssl.describe_environment())
    print("| notebook | seconds | peak memory, GB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shutil.copytree(ROOT / "notebooks", folder / "notebooks")
        medssl.run_study(  # small for speed: what notebook 05 compares
            {"method": ["random", "SparK"], "label_fraction": [0.25, 1.0], "seed": [0, 1]},
            progress="none", study="workbook", image_size=32, epochs=1, runs_dir=folder / "runs",
            checkpoints_dir=folder / "checkpoints", data_dir=folder / "data")
        for path in paths:
            if not path.name.startswith(chosen or ""):
                continue
            seconds, peak = measure(folder / "notebooks" / path.name, folder)
            print(f"| {path.stem} | {seconds:.0f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
