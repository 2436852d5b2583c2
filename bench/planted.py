"""Is the planted truth found, and nothing else? Over seeds of the phantoms and numbers of threads.

    python bench/planted.py                    # seeds 0, 1, 2 by 1 and 2 threads
    python bench/planted.py --seeds 0 --threads 1

The demo's study (notebook 05: linear evaluation, 12 and 24 labels, ten seeds) on phantoms drawn
anew, with stand-ins planted anew for each number of threads. Expected in every row: the planted
two are better than `random` after Holm's correction, the random two are not told from it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import medssl_utils as medssl

GRID = {
    "method": ["random", *medssl.METHODS],
    "label_fraction": [0.05, 0.1],  # of 240
    "seed": list(range(10)),
}


def compare(folder: Path, demo_seed: int, threads: int):
    """Return the comparison of one study, and the seconds that it took."""
    path = folder / f"phantom_{demo_seed}.npz"
    medssl.save_data(medssl.demo_data(demo_seed), path)
    study = f"seed{demo_seed}_threads{threads}"
    began = time.perf_counter()
    runs = medssl.run_study(
        GRID,
        recipe="linear",
        image_size=32,
        dataset=str(path),
        study=study,
        runs_dir=str(folder),
        checkpoints_dir=str(folder / f"checkpoints{threads}"),
    )
    seconds = time.perf_counter() - began
    assert runs["status"].eq("done").all(), runs["error"].max()
    return medssl.compare_methods(medssl.load_runs(folder / study)), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    right = 0
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            torch.set_num_threads(threads)
            began = time.perf_counter()
            medssl.load_backbone("BYOL", folder=Path(folder, f"checkpoints{threads}"))
            seconds = time.perf_counter() - began
            print(medssl.describe_environment(), f"planted in {seconds:.0f} s", flush=True)
            for demo_seed in options.seeds:
                table, seconds = compare(Path(folder), demo_seed, threads)
                columns = ["name", "n_train", "mean", "sd", "difference", "p_holm"]
                print(f"phantoms of seed {demo_seed}, {threads} thread(s), {seconds:.0f} s")
                print(table[columns].round(4).to_string(index=False), flush=True)
                planted = table["name"].str.contains("planted")
                others = ~planted & (table["method"] != "random")
                found = (table["p_holm"] < 0.05) & (table["difference"] > 0)
                right += found[planted].all() and not (table["p_holm"] < 0.05)[others].any()
    studies = len(options.threads) * len(options.seeds)
    print(f"planted two found, random two not told from the control: {right} of {studies} studies")


if __name__ == "__main__":
    main()
