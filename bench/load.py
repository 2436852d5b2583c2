"""Seconds and memory to load a checkpoint of true size: ours, and the authors' README snippet.

    python bench/load.py                     all four methods, eight minutes on two cores
    python bench/load.py --methods BYOL      one of them
    python bench/load.py --alone             on a shared machine: a time counts only if nothing else
                                             used the processor meanwhile (Linux; warm loads)

The files hold random numbers in the names, shapes and dtypes of the published ones; they lie in the
page cache. Each time is from the call until every weight was read once. "First" is the first load
of a fresh process after its imports, as in a notebook or a script: memory is new, and what is made
once is made. "Warm" is any later load in one process. Both are the median of interleaved rounds,
and a ratio is the median of the rounds' own ratios, so that what a neighbour slows down counts on
both sides. CPU is the processor time of all threads meanwhile (warm). Memory is the peak of the
fresh process beyond what it held after its imports; pages of a mapped file count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import nan
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torchvision  # noqa: E402
from faulty_checkpoints import METHODS, PREFIX, auxiliary, checkpoint, weights  # noqa: E402

import medssl_utils as medssl  # noqa: E402

# Bytes of the files that the authors' own code writes (MoCo: with the MLP head).
TRUE_SIZE = {"BYOL": 561_881_280, "SwAV": 224_409_379, "MoCo": 403_399_527, "SparK": 94_345_861}

# Shapes of the auxiliary tensors, by the end of their name; a momentum encoder is as the backbone.
SHAPES = {
    "BYOL": {r"projector\.model\.0\.weight": (4096, 2048),
             r"predictor\.model\.0\.weight": (4096, 256),
             r"model\.1\.(weight|bias|running_\w+)": (4096,), r"model\.3\.weight": (256, 4096),
             r"model\.3\.bias": (256,)},
    "SwAV": {r"projection_head\.0\.weight": (2048, 2048),
             r"projection_head\.[01]\.(weight|bias|running_\w+)": (2048,),
             r"projection_head\.3\.weight": (128, 2048), r"projection_head\.3\.bias": (128,),
             r"prototypes\.weight": (500, 128)},
    "MoCo": {r"(val_)?queue": (128, 65536), r"fc\.0\.weight": (2048, 2048), r"fc\.0\.bias": (2048,),
             r"fc\.2\.weight": (128, 2048), r"fc\.2\.bias": (128,)},
    "SparK": {},
}


def full_size(method: str, key: str, small: torch.Tensor) -> torch.Tensor:
    """An auxiliary tensor in its true shape."""
    backbone = weights().get(re.sub(r"^(target_network\.encoder|encoder_k)\.", "", key))
    if not small.is_floating_point():
        return small
    if backbone is not None:
        return torch.randn(backbone.shape)
    for ends, shape in SHAPES[method].items():
        if re.search(rf"(^|\.){ends}$", key):
            return torch.randn(shape)
    raise KeyError(f"no true shape is known for {key} of {method}")


def momentum(method: str, tensors: dict[str, torch.Tensor]) -> list[dict]:
    """What the optimizer of the Lightning files saved: one tensor for each parameter it trains."""
    ends = ("running_mean", "running_var", "num_batches_tracked")
    trained = [tensor for key, tensor in tensors.items() if not key.endswith(ends)
               and (method != "MoCo" or key.startswith("encoder_q."))]
    return [{"state": {i: {"momentum_buffer": torch.randn_like(tensor)}
                       for i, tensor in enumerate(trained)}, "param_groups": []}]


def write_file(method: str, folder: Path) -> Path:
    """Write a checkpoint of true size, under the name of the published one."""
    content = checkpoint(method)
    inside = content["module" if method == "SparK" else "state_dict"]
    inside.update({key: full_size(method, key, small) for key, small in auxiliary(method).items()})
    if method != "SparK":
        content["optimizer_states"] = momentum(method, inside)
    path = folder / medssl.CHECKPOINTS[method].filename
    torch.save(content, path)
    difference = path.stat().st_size / TRUE_SIZE[method] - 1
    if abs(difference) > 0.002:
        raise RuntimeError(f"{path.name} is {difference:+.2%} off the true size")
    return path


# =============================================================================
# The ways to load; each returns the model with weights in it
# =============================================================================


def snippet(method: str, path: Path) -> torch.nn.Module:
    """The snippet of the authors' README in our words."""
    model = torchvision.models.resnet50()
    content = torch.load(path)
    if "module" in content:
        content = content["module"]
    if "state_dict" in content:
        content = content["state_dict"]
    removed = {"SparK": "model."}.get(method, PREFIX[method])
    model.load_state_dict({k.replace(removed, ""): v for k, v in content.items()}, strict=False)
    return model


def ours(cache: bool | str) -> Callable[[str, Path], torch.nn.Module]:
    return lambda method, path: medssl.load_backbone(method, path, cache=cache)[0]


WAYS: dict[str, Callable[[str, Path], torch.nn.Module]] = {
    "README snippet": snippet,
    "ours, original file, every check": ours(False),
    "ours, cache, verified each time": ours("verify"),
    "ours, cache, unchanged since verified": ours(True),
}
GOALS = {"ours, original file, every check": 1.0, "ours, cache, verified each time": 4.0,
         "ours, cache, unchanged since verified": 8.0}


def read_every_weight(model: torch.nn.Module) -> float:
    return sum(float(tensor.sum()) for name, tensor in model.state_dict().items()
               if not name.startswith("fc."))


def seconds(way: str, method: str, path: Path) -> tuple[float, float]:
    """(from call to answer, of processor time) to load a file once."""
    start, worked = time.perf_counter(), time.process_time()
    read_every_weight(WAYS[way](method, path))
    return time.perf_counter() - start, time.process_time() - worked


def seconds_alone(way: str, method: str, path: Path) -> tuple[float, float]:
    """The same, again and again until other processes used under 15 % of the processor."""
    while True:
        time.sleep(0.2)
        busy, everything = processor_ticks()
        own = sum(os.times()[:2])
        taken = seconds(way, method, path)
        own = (sum(os.times()[:2]) - own) * os.sysconf("SC_CLK_TCK")
        now_busy, now_everything = processor_ticks()
        if now_busy - busy - own < 0.15 * (now_everything - everything):
            return taken


def processor_ticks() -> tuple[int, int]:
    """(ticks in which the processor worked, all ticks) since the machine started."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def first(way: str, method: str, path: Path) -> tuple[float, float]:
    """(seconds, peak memory in MiB beyond its imports) of a fresh process that loads the file."""
    command = [sys.executable, __file__, "--first", way, method, str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return tuple(json.loads(done.stdout))


def print_first(way: str, method: str, path: str) -> None:
    before = resident("VmRSS")
    taken, _ = seconds(way, method, Path(path))
    print(json.dumps([taken, (resident("VmHWM") - before) / 1024]))


def resident(field: str) -> float:
    """Memory of this process in KiB: VmRSS now, VmHWM at its peak; NaN where there is no /proc."""
    status = Path("/proc/self/status")
    return float(re.search(rf"{field}:\s+(\d+)", status.read_text())[1]) if status.exists() else nan


# =============================================================================
# The table
# =============================================================================


def measure(method: str, path: Path, rounds: int, timed: Callable) -> list[str]:
    """Rows of the table for one method."""
    ours(True)(method, path)  # writes the cache
    for way in WAYS:
        seconds(way, method, path)  # warms the page cache and the code
    warm, fresh = {way: [] for way in WAYS}, {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            warm[way].append(timed(way, method, path))
    for _ in range(rounds):
        for way in WAYS:
            fresh[way].append(first(way, method, path))
    rows = []
    for way in WAYS:
        times, ratios = zip(*(summary(taken, way) for taken in (fresh, warm)))
        rows.append(" | ".join([
            f"| {method}", way, *times, f"{statistics.median(c for _, c in warm[way]) * 1e3:.0f}",
            *ratios, f"≥ {GOALS[way]:g}" if way in GOALS else "",
            f"{max(mib for _, mib in fresh[way]):.0f} |"]))
    return rows


def summary(taken: dict[str, list[tuple[float, float]]], way: str) -> tuple[str, str]:
    """(median and range of a way's times in ms, how many times as fast as the snippet)."""
    walls, base = ([wall for wall, _ in taken[name]] for name in (way, "README snippet"))
    ratio = statistics.median(slow / wall for slow, wall in zip(base, walls))
    return (f"{statistics.median(walls) * 1e3:.0f} ({min(walls) * 1e3:.0f}–"
            f"{max(walls) * 1e3:.0f})", f"{ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--first", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first:
        print_first(*options.first)
        return
    print(f"{processor()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
          f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"median of {options.rounds}{', alone on the machine' * options.alone}, load "
          f"{' '.join(f'{n:.1f}' for n in getattr(os, 'getloadavg', tuple)())}\n")
    timed = seconds_alone if options.alone else seconds
    print("| file | way | first, ms (range) | warm, ms (range) | CPU ms | first: times as fast as the "
          "snippet | warm | goal | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            path = write_file(method, Path(folder))
            for row in measure(method, path, options.rounds, timed):
                print(row, flush=True)


def processor() -> str:
    """Name of the processor; "unknown processor" where the system does not tell."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
