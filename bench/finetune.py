"""Fine-tuning: the authors' way of running their recipe against this project's engine.

    python bench/finetune.py

Both sides get the same images, initial weights, epochs, validation and device, and run in turns.
The baseline restates in our own words what the authors' notebooks do: PNG files decoded, normalised
and resized by workers in every epoch, NCHW float32, validation and test one image at a time, the
loss read at each step (on a GPU with TF32 convolutions, PyTorch's default). Ours is `fine_tune` on
the prepared file, in float32 and in bfloat16. Reading and preparing the images once is timed apart.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import medssl_utils as medssl

CEILING = 10_200  # img/s: training a ResNet50 at 224 px in bf16 on an H200, bound by its memory


class Files(Dataset):
    """PNG files, decoded, normalised and resized each time that they are asked for."""

    def __init__(self, paths, labels, data, size, flip):
        self.paths, self.labels, self.size, self.flip = paths, labels, size, flip
        self.mean, self.std = np.float32(data.mean), np.float32(data.std)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            pixels = np.array(image.convert("RGB"), np.float32) / 255
        x = torch.from_numpy((pixels - self.mean) / self.std).permute(2, 0, 1)
        x = F.interpolate(x[None], size=(self.size, self.size), mode="area")[0]
        if self.flip and torch.rand(()) < 0.5:
            x = x.flip(1)
        return x, int(self.labels[index])


def write_files(data, folder, config):
    """Write every image as a PNG file; return the three data sets of files."""
    parts = {}
    for part, split in data.parts.items():
        paths = [folder / f"{name}.png" for name in split.ids]
        for path, image in zip(paths, split.images, strict=True):
            Image.fromarray(image).save(path)
        parts[part] = Files(paths, split.labels, data, config.image_size, part == "train")
    return parts


def test_one_by_one(model, files, device, workers):
    """Return the probabilities (N, C) and labels (N,), one forward pass an image."""
    model.eval()
    rows, labels = [], []
    with torch.no_grad():
        for x, y in DataLoader(files, 1, num_workers=workers):
            rows.append(model(x.to(device)).softmax(1).cpu())
            labels.append(int(y))
    return torch.cat(rows).numpy(), np.array(labels)


def run_baseline(backbone, parts, config, device, workers):
    """Fine-tune and test the authors' way; return the test AUC and training images a second."""
    model = medssl.add_head(backbone, 2, 0).to(device)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    batches = DataLoader(parts["train"], config.batch_size, shuffle=True, num_workers=workers)
    best, weights, seconds = -1.0, None, 0.0
    for epoch in range(config.epochs):
        began = time.perf_counter()
        rate, _ = medssl.set_phase(model, config, epoch)
        optimizer.param_groups[0]["lr"] = rate
        for x, y in batches:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        seconds += time.perf_counter() - began
        scores, labels = test_one_by_one(model, parts["val"], device, workers)
        accuracy = (scores.argmax(1) == labels).mean()
        if accuracy > best:
            best = accuracy
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    scores, labels = test_one_by_one(model, parts["test"], device, workers)
    return medssl.score(labels, scores)["AUC"], config.epochs * len(parts["train"]) / seconds


def run_ours(backbone, report, data, config, device):
    """The same by `fine_tune`, in a folder of its own; training images a second, validation in."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"runs_dir": folder, "device": str(device), "on_epoch": len}
        run = medssl.fine_tune(backbone, report, data, config, keep_best=False, **options)
    return run.metrics["AUC"], config.epochs * len(data.train) / run.metrics["seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=400, help="of the PNG files, in pixels")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--images", type=int, nargs=3, default=[96, 40, 80])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--freeze-epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(10, os.cpu_count() or 1))
    device = medssl.pick_device()
    if device.type == "cuda":  # as many images as COVID-CT has, a fifth of the paper's epochs
        parser.set_defaults(image_size=224, images=[425, 118, 203], batch_size=64)
        parser.set_defaults(epochs=14, freeze_epochs=2, rounds=2)
    args = parser.parse_args()
    changes = {"epochs": args.epochs, "freeze_epochs": args.freeze_epochs}
    changes |= {"batch_size": args.batch_size, "image_size": args.image_size}
    paper = medssl.FineTuneConfig.named("paper", **changes)
    quick = replace(paper, precision="bf16")
    backbone, report = medssl.load_backbone("random")
    sizes = dict(zip(("n_train", "n_val", "n_test"), args.images, strict=True))
    print(medssl.describe_environment())
    print(f"{args.images} images of {args.side} px, trained at {args.image_size} px, {changes}")
    print(f"{args.workers} workers for the files")
    with tempfile.TemporaryDirectory() as folder:
        data = medssl.demo_data(image_size=args.side, **sizes)
        parts = write_files(data, Path(folder), paper)
        began = time.perf_counter()
        path = medssl.save_data(data, Path(folder, "phantom.npz"))
        data = medssl.load_data(path)
        print(f"the prepared file: {time.perf_counter() - began:.1f} s, once")
        ways = {
            "baseline": lambda: run_baseline(backbone, parts, paper, device, args.workers),
            "ours, fp32": lambda: run_ours(backbone, report, data, paper, device),
            "ours, bf16": lambda: run_ours(backbone, report, data, quick, device),
        }
        seconds = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                auc, rate = way()
                seconds[name].append(time.perf_counter() - began)
                print(
                    f"round {number}, {name}: {seconds[name][-1]:.1f} s, {rate:.1f} img/s, "
                    f"{rate / CEILING:.1%} of an H200's ceiling, AUC {auc:.3f}",
                    flush=True,
                )
    for name, of_rounds in seconds.items():  # the first round warms up
        ratios = [a / b for a, b in zip(seconds["baseline"][1:], of_rounds[1:], strict=True)]
        median = statistics.median(of_rounds[1:])
        print(f"{name}: {median:.1f} s, {statistics.median(ratios):.2f} times the baseline's speed")


if __name__ == "__main__":
    main()
