"""A study small enough for tests: toy images, a tiny network, and workers that fail on demand.

Worker processes get all of this with `run_cell`, which is handed to them in place of the module's.
What happens is steered by marker files in `data_dir`, and noted there.
"""

import os
import signal
import time
import types
from pathlib import Path

import torch
from test_training import SIZE, TinyBackbone, TinyNet, make_toy

import medssl_utils as medssl

REAL = {name: getattr(medssl, name) for name in (
    "_run_cell", "_time_steps", "fine_tune", "train_one_epoch")}
RUNNING: dict = {}  # the cell that this process is at

# What can stop a process before its second epoch.
STOPS = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
         "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
         "hang": lambda: time.sleep(600)}

# Settings that all tests share: two epochs of three steps.
TINY = {"dataset": "toy", "image_size": SIZE, "epochs": 2, "batch_size": 8}


def note(kind: str, text: str) -> None:
    with open(Path(RUNNING["data_dir"], kind), "a") as file:
        file.write(text + "\n")


def notes(folder: Path, kind: str) -> list[str]:
    path = Path(folder, kind)
    return path.read_text().splitlines() if path.exists() else []


def marked(kind: str) -> bool:
    """Whether the test put a marker there for this cell; one without `!` in it works once."""
    name = f"{kind}_{RUNNING['method']}_s{RUNNING['seed']}"
    folder = Path(RUNNING["data_dir"])
    if (folder / f"{name}!").exists():
        return True
    try:
        (folder / name).unlink()
    except FileNotFoundError:
        return False
    return True


def load_data(name, *, data_dir, **options):
    RUNNING["data_dir"] = data_dir
    note("loaded", f"{os.getpid()} {name}")
    if name != "toy":
        raise FileNotFoundError(f"no data set {name} here")
    return make_toy()


def load_backbone(method, *, weights="stand-in", folder="", seed=0):
    torch.manual_seed(seed)
    report = types.SimpleNamespace(method=method, weights=weights, fingerprint=f"{method}{seed}",
                                   demo=True, allow_extra=())
    return TinyBackbone(), report


def add_head(model, n_classes, seed):
    torch.manual_seed(seed)
    net = TinyNet()
    net.load_state_dict(model.state_dict(), strict=False)
    return net


def train_one_epoch(*args, epoch, seed, **options):
    """One epoch, noted at its end; on demand it fails, or its process is stopped before it."""
    if "method" not in RUNNING:  # while steps are timed
        return REAL["train_one_epoch"](*args, epoch=epoch, seed=seed, **options)
    for kind, stop in STOPS.items():
        if epoch == 1 and marked(kind):
            stop()
    if marked("fail"):
        raise medssl.TrainingError("the loss went up the wall")
    time.sleep(0.02)  # so that two studies meet
    result = REAL["train_one_epoch"](*args, epoch=epoch, seed=seed, **options)
    note("epochs", "{method} f{label_fraction} s{seed}".format(**RUNNING) + f" epoch {epoch}")
    return result


PATCHES = {"load_data": load_data, "load_backbone": load_backbone, "add_head": add_head,
           "train_one_epoch": train_one_epoch, "RESUME_SECONDS": 0.0, "BUSY_SECONDS": 0.1}


def install(put=setattr) -> None:
    """Make the module use the toys, in this process."""
    for name, value in PATCHES.items():
        put(medssl, name, value)


def run_cell(cell, moment=0):
    """Stands in for the module's `_run_cell`."""
    if medssl.add_head is not add_head:  # in a worker
        install()
    RUNNING.clear()
    RUNNING.update(cell)
    return REAL["_run_cell"](cell, moment)


def run_cell_on_cpu(cell, moment=0):
    """Stands in for `_run_cell` where GPUs are only said to be there: notes which was given."""
    with open(Path(cell["data_dir"], "devices"), "a") as file:
        file.write(f"{os.getpid()} {cell['device']}\n")
    return run_cell({**cell, "device": "cpu"}, moment)


def time_steps(cell):
    if medssl.add_head is not add_head:
        install()
    RUNNING.clear()
    return REAL["_time_steps"](cell)


def time_steps_and_say_where(cell):
    with open(Path(cell["data_dir"], "timed"), "a") as file:
        file.write(f"{os.getpid()}\n")
    return time_steps(cell)
