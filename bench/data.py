"""Folders of images: images per second, the second start, and peak memory as the folder grows.

    python bench/data.py                    all of it, about three minutes
    python bench/data.py --count 100        fewer files

The files are phantoms of 512 x 512 pixels: 8-bit PNG, JPEG, and DICOM of 16 bits, plain and RLE.
Beside `read_folder` stands the plain loop that one would write: open, convert to RGB, resize to
224 x 224, keep in a list; for DICOM `pixel_array`, stretched to 0..255. Rounds are interleaved,
each of ours with an empty cache; the files are in the system's memory for both. Memory is the peak
of a fresh process beyond what it held after its imports; pages of a mapped file count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import numpy as np  # noqa: E402
import pydicom  # noqa: E402
import torch  # noqa: E402
from fuzz_data import dicom_bytes  # noqa: E402
from PIL import Image  # noqa: E402

import medssl_utils as medssl  # noqa: E402

SIDE, SIZE = 512, 224  # pixels of the files and of what is made of them
KINDS = ("png", "jpg", "dcm", "rle.dcm")

PEAK = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
import data, medssl_utils
from sklearn.model_selection import StratifiedKFold
data.torch.set_num_threads(1)
def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(name))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
before = megabytes("VmRSS")
data.WAYS[sys.argv[2]](Path(sys.argv[3]))
print(megabytes("VmHWM") - before)
"""


def write_folder(folder: Path, kind: str, count: int) -> Path:
    """Write `count` files of one kind in two class folders."""
    phantoms = medssl.demo_data(0, n_train=40, n_val=4, n_test=4, image_size=128).train.images
    rng = np.random.default_rng(0)
    for i in range(count):
        smooth = Image.fromarray(phantoms[i % 40]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        grey = np.clip(np.asarray(smooth) + rng.normal(0, 4, (SIDE, SIDE)), 0, 255).astype(np.uint8)
        path = folder / ("ill", "well")[i % 2] / f"{i:05d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind.endswith("dcm"):
            path.write_bytes(dicom_bytes(grey.astype(np.uint16) * 16, compress=kind != "dcm",
                                         RescaleSlope=1, RescaleIntercept=-1024,
                                         PatientID=f"P{i // 4}"))
        else:
            Image.fromarray(grey).save(path)
    return folder


def one_by_one(folder: Path) -> list[np.ndarray]:
    """The plain loop: a file after the other into a list of (SIZE, SIZE, 3)."""
    images = []
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".dcm":
            values = pydicom.dcmread(path).pixel_array.astype(np.float32)
            values = (values - values.min()) / np.ptp(values) * 255
            image = Image.fromarray(values.astype(np.uint8))
        else:
            image = Image.open(path)
        images.append(np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)))
    return images


def ours(folder: Path) -> None:
    """`load_data` with an empty cache: listed, checked, decoded, split, mapped."""
    with tempfile.TemporaryDirectory() as cache:
        medssl.load_data(folder, image_size=SIZE, data_dir=cache)


WAYS: dict[str, Callable[[Path], object]] = {"one by one": one_by_one, "ours": ours}


def seconds(work: Callable[[Path], object], folder: Path) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    start, used = time.perf_counter(), time.process_time()
    work(folder)
    return time.perf_counter() - start, time.process_time() - used


def speed(folder: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each way and of our second start: by the clock, of the processor."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*WAYS, "again")}
    with tempfile.TemporaryDirectory() as cache:
        def again(folder: Path) -> None:
            medssl.load_data(folder, image_size=SIZE, data_dir=cache)

        again(folder)
        for _ in range(rounds):
            for name, way in {**WAYS, "again": again}.items():
                times[name].append(seconds(way, folder))
    return {name: tuple(map(statistics.median, zip(*pairs))) for name, pairs in times.items()}


def peak(way: str, folder: Path) -> int:
    """MB that a fresh process claims to read the folder."""
    path = json.dumps([str(ROOT), str(ROOT / "bench")])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK, path, way, str(folder)],
                          check=True, capture_output=True, text=True)
    return int(done.stdout)


def grow(folder: Path, target: Path, count: int) -> Path:
    """A folder of `count` files that are hard links to those of another."""
    sources = sorted(folder.rglob("*.*"))
    for i in range(count):
        source = sources[i % len(sources)]
        path = target / source.parent.name / f"{i:06d}{''.join(source.suffixes)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, path)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="files of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[250, 500, 1000, 2000],
                        help="files in the growing folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not Path("/proc/self/clear_refs").exists():
        options.sizes = []  # peak memory is measured on Linux only
    print(f"{os.cpu_count()} cores of {platform.machine()}, load {os.getloadavg()[0]:.1f}, Pillow "
          f"{Image.__version__}, pydicom {pydicom.__version__}, torch {torch.__version__}; "
          f"{options.count} files, median of {options.rounds}\n")
    with tempfile.TemporaryDirectory() as place:
        folders = {kind: write_folder(Path(place, kind), kind, options.count) for kind in KINDS}
        print("| files | one by one, images/s | ours, images/s | ratio | one by one, CPU ms an "
              "image | ours, CPU ms an image | second start, s |\n|---|---|---|---|---|---|---|")
        for kind, folder in folders.items():
            times = speed(folder, options.rounds)
            (plain, plain_used), (own, used), (again, _) = times.values()
            print(f"| {kind} | {options.count / plain:.0f} | {options.count / own:.0f} | "
                  f"{plain / own:.2f} | {plain_used / options.count * 1e3:.1f} | "
                  f"{used / options.count * 1e3:.1f} | {again:.2f} |", flush=True)
        print("\n| PNG files | one by one, MB | ours, MB |\n|---|---|---|")
        for count in options.sizes:
            folder = grow(folders["png"], Path(place, f"grown{count}"), count)
            print(f"| {count:,} | {peak('one by one', folder)} | {peak('ours', folder)} |",
                  flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
