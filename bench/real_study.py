"""A small study on real images: PneumoniaMNIST at its own 28 pixels, linear evaluation.

    python bench/real_study.py [--data data] [--unofficial] [--folder runs/real_study]

Compared are `random` and the four stand-ins, whose weights are random too: no difference is
planted, and none should be reported. What the study shows is that the path from real images to the
sentence works, and how large a difference this test set and three seeds could have shown. With
published weights, run notebooks 04 and 05. CPU; a second call only loads what the first one did.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import medssl_utils as medssl  # noqa: E402

GRID = {"method": ["random", *medssl.METHODS], "label_fraction": [0.01, 0.05, 0.25],
        "seed": [0, 1, 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description="A small study on real images.")
    parser.add_argument("--data", default="data", help="folder of pneumoniamnist.npz")
    parser.add_argument("--unofficial", action="store_true", help="accept a rebuilt file")
    parser.add_argument("--folder", default="runs/real_study", help="where the runs go")
    options = parser.parse_args()
    began, folder = time.perf_counter(), Path(options.folder)
    medssl.run_study(GRID, workers=1, dataset="pneumoniamnist", recipe="linear", image_size=28,
                     data_dir=options.data, unofficial=options.unofficial, study=folder.name,
                     runs_dir=str(folder.parent), checkpoints_dir=str(folder / "checkpoints"),
                     device="cpu")
    table = medssl.compare_methods(medssl.load_runs(folder))
    print(table[["label_fraction", "method", "n", "mean", "sd", "low", "high", "difference",
                 "difference_low", "difference_high", "p_holm", "detectable"]].round(3).to_string(
                     index=False))
    print(medssl.describe_comparison(table))
    print(f"{time.perf_counter() - began:.0f} s, {table['n_test'].iloc[0]} test images")


if __name__ == "__main__":
    main()
