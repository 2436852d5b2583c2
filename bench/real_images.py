"""All four recipes on real images, COVID-CT and PneumoniaMNIST, from random weights.

    python bench/real_images.py [--data ../shared/data] [--folder runs/real_images]
    python bench/real_images.py --long       also `paper` at 224 pixels, 12 epochs: an hour

A CPU cannot train 70 epochs at 224 pixels, so most runs are cut down and stamped SHORT: they show
that each recipe runs on real images and what it costs, not how good it is. No pre-trained weights
are in this: every backbone is torchvision's random initialisation. Beside them, without training:
which labels a small subset gets by our rule and by the authors'. Finished runs are only loaded.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import medssl_utils as medssl  # noqa: E402

# Data set, recipe, what is cut down, and the share of the labels.
SHORT = [
    ("covid_ct", "demo", {}, 1.0),
    ("covid_ct", "linear", {}, 1.0),
    ("covid_ct", "recommended", {"image_size": 64, "epochs": 20}, 1.0),
    ("covid_ct", "paper", {"image_size": 64, "epochs": 12}, 1.0),
    ("pneumoniamnist", "demo", {}, 0.1),
    ("pneumoniamnist", "linear", {"image_size": 64}, 1.0),
    ("pneumoniamnist", "recommended", {"image_size": 64, "epochs": 15}, 0.1),
    ("pneumoniamnist", "paper", {"image_size": 64, "epochs": 12}, 0.1),
]
LONG = [("covid_ct", "paper", {"epochs": 12}, 1.0)]  # across both boundaries of the schedule


def load(dataset: str, folder: Path, config: medssl.FineTuneConfig) -> medssl.DataSplits:
    """Load a data set; the rebuilt PneumoniaMNIST file under the name that the loader looks for."""
    options = {"image_size": config.image_size, "unofficial": True, "download": False,
               "dtype": "float32" if config.recipe == "paper" else "uint8"}
    if dataset == "covid_ct":
        return medssl.load_data(dataset, data_dir=folder, **options)
    rebuilt = folder / "pneumoniamnist" / "pneumoniamnist_rebuilt.npz"
    with tempfile.TemporaryDirectory() as place:
        if rebuilt.exists():
            Path(place, "pneumoniamnist.npz").symlink_to(rebuilt.resolve())
        return medssl.load_data(dataset, data_dir=place if rebuilt.exists() else folder, **options)


def run(dataset: str, recipe: str, changes: dict, fraction: float, options) -> medssl.Run:
    """Fine-tune from random weights; no stand-in is near, so that only a short run is stamped."""
    config = medssl.FineTuneConfig.named(recipe, dataset, **changes)
    return fine_tune(load(dataset, options.data, config), config, fraction, 0, options)


def fine_tune(data, config, fraction: float, seed: int, options) -> medssl.Run:
    """Every seed has the same random backbone here: a frozen one gives the same features."""
    return medssl.fine_tune(
        *medssl.load_backbone("random", weights="published"), data, config, seed=seed,
        label_fraction=fraction, runs_dir=options.folder.parent, study=options.folder.name,
        device=options.device, keep_best=False)


def row(run: medssl.Run) -> str:
    """A line of the table: the score with its interval over the test patients, and the cost."""
    facts, metrics, found = run.config, run.metrics, run.predictions
    scores = []
    for name in ("AUC", "ACC"):
        low, high = medssl.bootstrap_interval(found["labels"], found["scores"], name,
                                              groups=found["groups"])
        scores.append(f"{metrics[name]:.3f} ({low:.3f} to {high:.3f})")
    epochs, best = ("–", "–") if facts["recipe"] == "linear" else (
        facts["epochs"], metrics["best_epoch"])
    return " | ".join(map(str, (
        "", facts["dataset"], facts["recipe"], run.stamp or "full", facts["image_size"], epochs,
        f"{facts['n_train']} / {metrics['n_test']}", *scores, f"{metrics['F1 paper']:.3f}",
        best, f"{metrics['seconds']:.0f}", f"{metrics['memory_gb']:.1f}", ""))).strip()


def print_subsets(data: medssl.DataSplits) -> None:
    """Print which share of COVID small label subsets have, by both rules, over 100 seeds."""
    print("\n| rule | label fraction | images | share of COVID, 100 seeds |\n|---|---|---|---|")
    whole = (data.train.labels == 0).mean()
    for rule in ("stratified", "authors"):
        for fraction in (0.05, 0.1, 0.25):
            subsets = [medssl.label_subset(data.train.labels, fraction, seed=seed, rule=rule,
                                           groups=data.train.groups) for seed in range(100)]
            shares = [(data.train.labels[index] == 0).mean() for index in subsets]
            sizes = sorted({len(index) for index in subsets})
            print(f"| {rule} | {fraction:g} | {sizes[0]} to {sizes[-1]} | {np.min(shares):.2f} to "
                  f"{np.max(shares):.2f}, sd {np.std(shares):.3f} (all labels: {whole:.2f}) |")


def print_greys(data: medssl.DataSplits) -> None:
    """Print how well an image's mean and spread of grey alone tell the classes apart."""
    print("\n| AUC of one number | train | val | test |\n|---|---|---|---|")
    for name, number in (("mean grey", np.mean), ("standard deviation of grey", np.std)):
        aucs = []
        for part in (data.train, data.val, data.test):
            found = number(part.images.reshape(len(part), -1), axis=1) / 255
            scores = np.stack([1 - found, found], 1)
            aucs.append(f"{medssl.score(part.labels, scores)['AUC']:.2f}")
        print(f"| {name} | {' | '.join(aucs)} |")


def print_linear(options) -> None:
    """Print what further fractions and seeds of a linear evaluation cost at 224 pixels."""
    config = medssl.FineTuneConfig.named("linear")
    data = load("covid_ct", options.data, config)
    spent = [fine_tune(data, config, fraction, seed, options).metrics["seconds"]
             for fraction in (1.0, 0.5, 0.25, 0.1) for seed in range(5)]
    images = len(data.train) + len(data.val) + len(data.test)
    print(f"\nLinear evaluation of COVID-CT at 224 pixels, 4 fractions and 5 seeds: "
          f"{sum(spent):.0f} s for {len(spent)} runs, the features of {images} images included; "
          f"the median run {np.median(spent):.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--folder", type=Path, default=Path("runs/real_images"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--long", action="store_true", help="also an hour of `paper` at 224 pixels")
    options = parser.parse_args()
    if not (options.data / "covid_ct").is_dir():
        print(f"Skipped: COVID-CT is not in {options.data}. It is never downloaded for you; see "
              f"{medssl.COVID_CT_URL}.")
        return
    runs = [run(*setting, options) for setting in SHORT + LONG * options.long]
    print("\n| data | recipe | stamp | pixels | epochs | train / test images | AUC (95 %) | "
          "ACC (95 %) | F1 of the paper | best epoch | s | peak GB |\n" + "|---" * 12 + "|")
    print("\n".join(map(row, runs)))
    print_linear(options)
    small = load("covid_ct", options.data, medssl.FineTuneConfig(image_size=16))
    print_subsets(small)
    print_greys(small)
    print(f"\n{medssl.describe_environment(options.device)}")


if __name__ == "__main__":
    main()
