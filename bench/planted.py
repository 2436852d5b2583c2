"""A truth is planted, and the comparison has to find it, from the checkpoint file to the sentence.

    python bench/planted.py [--images 1200] [--epochs 4] [--seeds 5] [--folder F]

A ResNet50 learns to tell phantoms apart, from many labelled phantoms that no later step sees. Its
weights are written into each method's checkpoint layout, loaded through `load_backbone` like any
file, and evaluated linearly on few labels of other phantoms. Each method must then be said to be
better than `random`. The usual stand-ins, whose weights are random, are compared the same way and
reported whatever they show. CPU, 48 pixels, as in the pre-training; about ten minutes on one core.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import medssl_utils as medssl  # noqa: E402

LINEAR = medssl.FineTuneConfig.named(
    "linear", image_size=48, normalise="dataset")  # size and intensities that the weights know
FRACTIONS = (0.05, 0.2)


def train_backbone(images: int, epochs: int, folder: Path) -> dict[str, torch.Tensor]:
    """Train a ResNet50 from scratch on many phantoms; return its 318 backbone tensors."""
    data = medssl.demo_data(seed=1234, n_train=images, n_val=160, n_test=160)
    config = medssl.FineTuneConfig.named("demo", epochs=epochs, batch_size=32)
    run = medssl.fine_tune(*medssl.load_backbone("random"), data, config, runs_dir=folder,
                           study="pre-training", device="cpu")
    print(f"pre-training: {images} phantoms, {epochs} epochs, test AUC {run.metrics['AUC']:.3f}")
    state = load_file(run.folder / "best.safetensors")
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def plant(backbone: dict[str, torch.Tensor], method: str, folder: Path) -> Path:
    """Write a checkpoint in the layout of `method` that holds `backbone`."""
    path, known = medssl.write_demo_checkpoint(method, folder), medssl.CHECKPOINTS[method]
    file = torch.load(path, weights_only=True)
    tensors = file[known.wrapper]
    for name, value in backbone.items():
        assert known.prefix + name in tensors
        tensors[known.prefix + name] = value
    del file[medssl.STAND_IN_MARK]
    torch.save(file, path)
    return path


def run_study(paths: dict[str, Path], seeds: int, folder: Path) -> str:
    """Evaluate every checkpoint and `random` linearly; return what notebook 05 would say."""
    data = medssl.demo_data(seed=0)
    for method in ("random", *paths):
        for seed in range(seeds):
            backbone = medssl.load_backbone(method, paths.get(method), seed=seed)
            for fraction in FRACTIONS:
                medssl.fine_tune(*backbone, data, LINEAR, label_fraction=fraction, seed=seed,
                                 runs_dir=folder.parent, study=folder.name, device="cpu",
                                 progress="none", keep_best=False)
    table = medssl.compare_methods(medssl.load_runs(folder))
    print(table[["label_fraction", "method", "n", "mean", "sd", "difference", "difference_low",
                 "difference_high", "p_holm"]].round(3).to_string(index=False))
    return medssl.describe_comparison(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Is a planted truth found?")
    parser.add_argument("--images", type=int, default=1200, help="phantoms to pre-train on")
    parser.add_argument("--epochs", type=int, default=4, help="of pre-training")
    parser.add_argument("--seeds", type=int, default=5, help="of the study")
    parser.add_argument("--folder", help="keep the runs there; finished ones are only loaded")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        began, folder = time.perf_counter(), Path(options.folder or name)
        backbone = train_backbone(options.images, options.epochs, folder)
        print(f"{time.perf_counter() - began:.0f} s")
        planted = {m: plant(backbone, m, folder / "planted") for m in medssl.METHODS}
        said = run_study(planted, options.seeds, folder / "planted-study")
        print(said)
        found = [f"{m} is better than random" in line for m in medssl.METHODS
                 for line in said.splitlines()]
        print(f"planted: {sum(found)} of {len(medssl.METHODS) * len(FRACTIONS)} said to be better "
              "than random\n")
        stand_ins = {m: medssl.write_demo_checkpoint(m, folder / "stand-in")
                     for m in medssl.METHODS}
        print(run_study(stand_ins, options.seeds, folder / "stand-in-study"))
        print(f"{time.perf_counter() - began:.0f} s, {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
