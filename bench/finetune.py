"""Fine-tuning: the authors' way of running their recipe against the engine of this project.

    python bench/finetune.py                    five minutes on two CPU cores
    python bench/finetune.py                    on a GPU: as many phantoms as COVID-CT has images,
                                                224 px, batch 64, 14 epochs, 2 rounds
    python bench/finetune.py --folder data/covid_ct --epochs 70 --freeze-epochs 10    on a GPU

Both sides get the same PNG files, initial weights, epochs, validation and device, and are timed
from the files on disk to the test scores, in turns, in one run. The baseline restates in our own
words what the authors' notebooks do on every run: decode, normalise and resize each image in
workers in every epoch, NCHW float32, validation and test one image at a time, the loss read at
each step. Ours runs twice: at equal precision (the `paper` recipe; on a GPU with TF32 convolutions,
PyTorch's default, which the baseline keeps), and as recommended (the same schedule on uint8 images
in bf16 where the device computes in it). On a GPU it runs twice more: with the step recorded as a
CUDA graph, and compiled and recorded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import medssl_utils as medssl  # noqa: E402

CEILING = 10_200  # img/s: training a ResNet50 at 224 px in bf16 on an H200, memory-bound
TASKS = {"COVID-CT": (425, 118, 203), "OrganSMNIST-sized": (13_932, 2_452, 8_827)}
CLASSES = medssl.COVID_CT_CLASSES


def write_images(folder: Path, sizes: dict[str, int], side: int) -> None:
    """Write phantoms as PNG files in the published layout of COVID-CT."""
    data = medssl.demo_data(image_size=side, **{f"n_{part}": n for part, n in sizes.items()})
    for label, kind in enumerate(CLASSES):
        (folder / f"CT_{kind}").mkdir(parents=True)
        (folder / "Data-split" / kind).mkdir(parents=True)
        for part in medssl.SPLITS:
            split = getattr(data, part)
            chosen = np.flatnonzero(split.labels == label)
            names = [f"{split.ids[i]}.png" for i in chosen]
            for name, i in zip(names, chosen):
                Image.fromarray(split.images[i]).convert("RGB").save(folder / f"CT_{kind}" / name)
            (folder / "Data-split" / kind / f"{part}CT_{kind}.txt").write_text("\n".join(names))


# =============================================================================
# The baseline
# =============================================================================


class Files(Dataset):
    """PNG files, decoded, normalised and resized each time that they are asked for."""

    def __init__(self, folder: Path, part: str, size: int, flip: bool) -> None:
        self.size, self.flip, self.items = size, flip, []
        for label, kind in enumerate(CLASSES):
            listed = (folder / "Data-split" / kind / f"{part}CT_{kind}.txt").read_text()
            names = [line.strip() for line in listed.split("\n") if line.strip()]
            home = folder if (folder / f"CT_{kind}").is_dir() else folder / "Images-processed"
            self.items += [(home / f"CT_{kind}" / name, label) for name in names]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"), np.float32) / 255
        mean, std = np.float32(medssl.COVID_CT_MEAN), np.float32(medssl.COVID_CT_STD)
        x = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)
        x = F.interpolate(x[None], size=(self.size, self.size), mode="area")[0]
        return (x.flip(1) if self.flip and torch.rand(()) < 0.5 else x), label


def run_baseline(folder: Path, config: medssl.FineTuneConfig, device: torch.device,
                 workers: int) -> tuple[float, dict[str, list[float]]]:
    """Fine-tune and test; return the test AUC and (images, seconds) of each phase."""
    seconds: dict[str, list[float]] = {}
    model = new_model().to(device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    train, val, test = (Files(folder, part, config.image_size, part == "train")
                        for part in medssl.SPLITS)
    batches = DataLoader(train, config.batch_size, shuffle=True, num_workers=workers)
    best, kept = -1.0, None
    for epoch in range(config.epochs):
        phase = medssl.phase_of(config, epoch)
        medssl.set_phase(model, phase)
        for group in optimizer.param_groups:
            group["lr"] = phase.lr
        with timed(seconds, "frozen" if phase.trainable != "all" else "training", len(train)):
            for x, y in batches:
                loss = F.cross_entropy(model(x.to(device)), y.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
        with timed(seconds, "evaluation", len(val)):
            scores, labels = test_one_by_one(model, val, device, workers)
        accuracy = float(((scores > 0.5) == labels).mean())
        if accuracy > best:
            best, kept = accuracy, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    with timed(seconds, "evaluation", len(test)):
        scores, labels = test_one_by_one(model, test, device, workers)
    return float(roc_auc_score(labels, scores)), seconds


@torch.no_grad()
def test_one_by_one(model, files: Files, device, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of class 1 and the label of each image, one forward pass each."""
    model.eval()
    found = [(model(x.to(device)).softmax(1)[0, 1].item(), y.item())
             for x, y in DataLoader(files, 1, num_workers=workers)]
    return tuple(np.array(found).T)


# =============================================================================
# Ours
# =============================================================================


def run_ours(folder: Path, config: medssl.FineTuneConfig, device: torch.device,
             dtype: str) -> tuple[float, dict[str, list[float]]]:
    """The same through the engine; decoding once is part of the time, and is reported."""
    seconds: dict[str, list[float]] = {}
    with timed(seconds, "decoding", 0):
        data = medssl.load_data(folder, image_size=config.image_size, dtype=dtype)
    seconds["decoding"][0] = sum(len(getattr(data, part)) for part in medssl.SPLITS)
    prep = medssl.Preprocessing(data.mean, data.std, config.image_size)
    model = new_model().to(device, memory_format=torch.channels_last)
    optimizer = medssl.make_optimizer(model, config)
    images, labels, held_out = (torch.as_tensor(a).to(device) for a in (
        data.train.images, data.train.labels, data.val.images))
    val = replace(data.val, images=held_out)
    best, kept, steps = -1.0, None, {}
    for epoch in range(config.epochs):
        frozen = medssl.phase_of(config, epoch).trainable != "all"
        with timed(seconds, "frozen" if frozen else "training", len(labels)):
            medssl.train_one_epoch(model, images, labels, optimizer, config, prep, epoch=epoch,
                                   seed=0, kept=steps)
        with timed(seconds, "evaluation", len(data.val)):
            _, scores, _ = medssl.evaluate(model, val, prep,
                                           precision=medssl._precision(config, device))
        if scores["ACC"] > best:
            best = scores["ACC"]
            kept = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    with timed(seconds, "evaluation", len(data.test)):
        _, scores, _ = medssl.evaluate(model, data.test, prep)
    return scores["AUC"], seconds


# =============================================================================
# The race
# =============================================================================


class timed:
    """Add the images and the seconds of a block to a phase; a GPU's work is waited for."""

    def __init__(self, seconds: dict[str, list[float]], phase: str, images: int) -> None:
        self.entry, self.images = seconds.setdefault(phase, [0, 0.0]), images

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.entry[0] += self.images
        self.entry[1] += time.perf_counter() - self.began


def new_model() -> torch.nn.Module:
    """torchvision's initialisation with seed 0 and a head for two classes."""
    backbone, _ = medssl.load_backbone("random", seed=0)
    return medssl.add_head(backbone, len(CLASSES), 0)


def rates(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Images per second of each phase."""
    return {phase: n / s for phase, (n, s) in seconds.items()}


def extrapolate(rate: dict[str, float], task: tuple[int, int, int], epochs: int = 70) -> float:
    """Seconds of a whole run of `task`, computed from the rates: 10 frozen epochs, then all.
    The baseline decodes in each epoch, within its rates; ours once."""
    train, val, test = task
    frozen = rate.get("frozen", rate["training"])
    return (10 * train / frozen + (epochs - 10) * train / rate["training"]
            + (epochs * val + test) / rate["evaluation"]
            + (sum(task) / rate["decoding"] if "decoding" in rate else 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="COVID-CT's layout; default: phantoms")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--side", type=int, default=400, help="of the phantoms' PNG files, pixels")
    parser.add_argument("--train", type=int, default=96)
    parser.add_argument("--val", type=int, default=40)
    parser.add_argument("--test", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--freeze-epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="1e-4 is the paper's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=min(10, os.cpu_count() or 1))
    device = medssl.pick_device()
    if device.type == "cuda":  # where a smaller task would show what it costs to begin
        parser.set_defaults(image_size=224, train=425, val=118, test=203, epochs=14,
                            freeze_epochs=2, batch_size=64, rounds=2)
    args = parser.parse_args()
    paper = replace(
        medssl.FineTuneConfig.paper("covid_ct"), image_size=args.image_size, epochs=args.epochs,
        freeze_epochs=args.freeze_epochs, batch_size=args.batch_size, lr=args.lr,
        backbone_lr=args.lr)
    cuda = device.type == "cuda"
    equal, quick = (replace(paper, precision=p) for p in ("tf32" if cuda else "fp32", "auto"))
    print(medssl.describe_environment(), f"bf16: {medssl._precision(quick, device) == 'bf16'}")
    print(f"{args.image_size} px, batch {args.batch_size}, {args.epochs} epochs "
          f"({args.freeze_epochs} frozen), {args.rounds} rounds in turns")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "images"
        if args.folder is None:
            write_images(folder, {part: getattr(args, part) for part in medssl.SPLITS}, args.side)
        ways = {"baseline": lambda: run_baseline(folder, paper, device, args.workers),
                "ours, equal precision": lambda: run_ours(folder, equal, device, "float32"),
                "ours, as recommended": lambda: run_ours(folder, quick, device, "uint8")}
        if cuda:
            graph = replace(quick, cuda_graph=True)
            both = replace(graph, compile=True)
            ways |= {"ours, recorded": lambda: run_ours(folder, graph, device, "uint8"),
                     "ours, compiled and recorded": lambda: run_ours(folder, both, device, "uint8")}
        report(race(ways, args.rounds), ceiling=cuda and args.image_size == 224)


def race(ways: dict, rounds: int) -> dict[str, list[tuple[float, float, dict]]]:
    """Run all ways in turns; return (seconds, AUC, phases) of each round. The first warms up."""
    found: dict[str, list[tuple[float, float, dict]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            auc, seconds = way()
            if number:
                found[name].append((time.perf_counter() - began, auc, seconds))
    return found


def report(found: dict[str, list[tuple[float, float, dict]]], ceiling: bool) -> None:
    """Print a row a way: medians over the rounds, ratios to the baseline, computed whole runs."""
    base = [whole for whole, _, _ in found["baseline"]]
    for name, rows in found.items():
        speeds = [rates(seconds) for _, _, seconds in rows]
        rate = {phase: statistics.median(s[phase] for s in speeds) for phase in speeds[0]}
        whole = statistics.median(row[0] for row in rows)
        ratio = statistics.median(b / row[0] for b, row in zip(base, rows))
        print(f"\n{name}: {whole:.1f} s from files to scores, {ratio:.2f}x the baseline; "
              f"test AUC {statistics.median(row[1] for row in rows):.3f}")
        print("  img/s: " + ", ".join(f"{phase} {value:.1f}" for phase, value in rate.items()))
        print("  computed: " + ", ".join(f"{task} {extrapolate(rate, size):,.0f} s a run"
                                         for task, size in TASKS.items()))
        if ceiling:
            print(f"  training at {rate['training'] / CEILING:.0%} of the ceiling of an H200")


if __name__ == "__main__":
    main()
