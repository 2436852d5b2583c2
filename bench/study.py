"""What a study costs on top of its training: runs, planning, resuming, and a full study on paper.

    python bench/study.py                    four to six minutes on one core
    python bench/study.py --cold 1 4 16 64   also the longest row, about ten minutes more
    python bench/study.py --rate 4000        the last table alone, for an ASSUMED rate

The tiny runs are real ones (ResNet50, phantoms, run folders) of two seconds and less, so that what
is not training shows. The plan of 10,000 runs is made from run folders on disk that hold the
small files that say how far a run is. The last tables are computed, not run, from the rate of every
device that is found here: the CPU, one GPU, and each of several GPUs while all of them train.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import medssl_utils as medssl  # noqa: E402

TINY = {"method": "SparK", "label_fraction": 0.1, "epochs": 1, "image_size": 16,
        "checkpoints_dir": str(ROOT / "checkpoints")}

# COVID-CT and OrganSMNIST: images in train, validation and test.
TASKS = {"covid_ct": (425, 118, 203), "organsmnist": (13_932, 2_452, 8_827)}
FRACTIONS, SEEDS, METHODS = (1.0, 0.5, 0.25, 0.1, 0.05), 5, 6


# =============================================================================
# One warm process, or a process for each run
# =============================================================================

ONE_RUN = """
import sys
sys.path.insert(0, {root!r})
import medssl_utils as medssl
medssl.run_study({{"seed": [{seed}]}}, progress="none", runs_dir={folder!r}, **{tiny!r})
"""


def run_warm(n: int, folder: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        medssl.run_study({"seed": range(n)}, progress="none", runs_dir=folder, **TINY)


def run_cold(n: int, folder: str) -> None:
    for seed in range(n):
        script = ONE_RUN.format(root=str(ROOT), seed=seed, folder=folder, tiny=TINY)
        subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def time_runs(run, n: int) -> tuple[float, float]:
    """Seconds of n runs in all, and those that the runs themselves took (train, test, write)."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(n, folder)
        total = time.perf_counter() - began
        own = medssl.load_runs(folder)["seconds"]
        assert len(own) == n
        return total, own.sum()


def print_runs(warm: list[int], cold: list[int]) -> float:
    """Print a row a number of runs; return the overhead of a further run in a warm process."""
    print("| runs | how | s in all | s a run | of it outside the run |")
    print("|---|---|---|---|---|")
    outside = {0: 0.0}
    for run, name, numbers in ((run_warm, "one warm process", warm),
                               (run_cold, "a process for each run", cold)):
        for n in numbers:
            total, own = time_runs(run, n)
            outside |= {n: total - own} if run is run_warm else {}
            print(f"| {n} | {name} | {total:.1f} | {total / n:.2f} | {(total - own) / n:.2f} |",
                  flush=True)
    few, many = sorted(outside)[-2:]  # not the first row: it pays for what is imported late
    return max(0.0, outside[many] - outside[few]) / (many - few)


# =============================================================================
# Ten thousand runs: plan and resume
# =============================================================================

BIG = {"method": ["random", *medssl.METHODS], "label_fraction": [0.05, 0.1, 0.25, 0.5, 1.0],
       "seed": list(range(5)), "lr": np.logspace(-4, -2, 10).tolist(),
       "weight_decay": np.logspace(-6, -2, 8).tolist()}


def print_planning() -> None:
    rows = []

    def timed(what: str, call):
        began = time.perf_counter()
        result = call()
        rows.append(f"| {what} | {time.perf_counter() - began:.1f} |")
        return result

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        same = {"runs_dir": folder, "checkpoints_dir": str(ROOT / "checkpoints"), "epochs": 1,
                "image_size": 16}
        medssl.plan_study({"method": BIG["method"]}, **same)  # stand-ins are written, code is warm
        plan = timed("plan, nothing done", lambda: medssl.plan_study(BIG, **same))
        assert len(plan) == 10_000 and set(plan["status"]) == {"to do"}
        cells = medssl._cells(BIG, same)
        for cell in cells:
            write_finished(medssl._cell_folder(cell))
        for cell in cells[-2:]:
            (medssl._cell_folder(cell) / "metrics.json").unlink()
        plan = timed("plan, 9,998 done", lambda: medssl.plan_study(BIG, **same))
        assert list(plan["status"][-2:]) == ["unfinished"] * 2
        done = timed("resume: plan, the 2 runs that are left, final look",
                     lambda: medssl.run_study(BIG, progress="none", **same))
        assert set(done["status"]) == {"done"} and not done["error"].any()
    print("\n| 10,000 runs | s |\n|---|---|\n" + "\n".join(rows))


def write_finished(folder: Path) -> None:
    """The small files by which a study knows a finished run, and what it cost."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "history.csv").write_text("epoch,seconds\n0,0.5\n")
    (folder / "metrics.json").write_text(json.dumps({"seconds": 1.0}))


# =============================================================================
# On paper: the full study
# =============================================================================


def measure_rates() -> dict[str, float]:
    """Training images a second of the devices found here, of each one of them."""
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    found = {"the CPU": ["cpu"], "one GPU": gpus[:1],
             f"each of {len(gpus)} GPUs at once": gpus if len(gpus) > 1 else []}
    return {name: measure_rate(devices) for name, devices in found.items() if devices}


def measure_rate(devices: list[str], image_size: int = 224) -> float:
    """Training images a second of a device by the recommended recipe, while all of them train.

    Each has a process of its own, as in a study. The first round starts processes and kernels, so
    that in the second, which counts, all work side by side.
    """
    with ProcessPoolExecutor(len(devices), get_context("spawn")) as pool:
        for _ in range(2):
            seconds = list(pool.map(time_device, devices, [image_size] * len(devices)))
    return float(np.mean(1 / np.array(seconds)))


def time_device(device: str, image_size: int) -> float:
    """Seconds a training image, as a plan times them; a pass of several steps on a GPU."""
    cell, = medssl._cells({"device": [device]}, {"recipe": "recommended", "image_size": image_size})
    return medssl._time_steps(cell, steps=7 if device.startswith("cuda") else 1)  # 240 phantoms


def print_full_study(rate: float, overhead: float, source: str) -> None:
    print(f"\nOn paper: {METHODS} initialisations, fractions {FRACTIONS}, {SEEDS} seeds; {source}: "
          f"{rate:.3g} training images/s at 224 px, {overhead:.2f} s overhead a run\n")
    print("| recipe | task | runs | training images | h on 1 device | h on 8 |")
    print("|---|---|---|---|---|---|")
    for recipe in ("recommended", "paper"):
        both = []
        for task, sizes in TASKS.items():
            runs = [run_images(recipe, f, *sizes) for _ in range(SEEDS) for f in FRACTIONS
                    for _ in range(METHODS)]
            both += runs
            print_row(recipe, task, runs, rate, overhead)
        print_row(recipe, "both", both, rate, overhead)


def run_images(recipe: str, fraction: float, train: int, val: int, test: int) -> float:
    """Work of a run in training images, as `plan_study` counts it."""
    epochs = medssl.FineTuneConfig.named(recipe).epochs
    return epochs * (fraction * train + val / 3) + (val + test) / 3


def print_row(recipe: str, task: str, runs: list[float], rate: float, overhead: float) -> None:
    hours = []
    for devices in (1, 8):
        ends = [0.0] * devices  # the next run goes to the device that is free first
        for images in runs:
            heapq.heapreplace(ends, ends[0] + images / rate + overhead)
        hours.append(max(ends) / 3600)
    print(f"| {recipe} | {task} | {len(runs)} | {sum(runs) / 1e6:.1f} M | {hours[0]:.3g} | "
          f"{hours[1]:.3g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warm", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--cold", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rate", type=float, help="training images per second at 224 px")
    parser.add_argument("--overhead", type=float, default=0.5, help="seconds a run, with --rate")
    options = parser.parse_args()
    if options.rate:
        print_full_study(options.rate, options.overhead, "ASSUMED")
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"{where or 'CPU'}, {torch.get_num_threads()} of {os.cpu_count()} threads, torch "
          f"{torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    overhead = print_runs(options.warm, options.cold)
    print_planning()
    for device, rate in measure_rates().items():
        print_full_study(rate, overhead, f"MEASURED on {device}")
    if not torch.cuda.is_available():
        print("\nNo GPU is here. --rate takes the rate of one; its table is then marked ASSUMED.")


if __name__ == "__main__":
    main()
