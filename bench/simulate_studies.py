"""Does `compare_methods` keep its word? Whole studies are simulated, so that the truth is known.

    python bench/simulate_studies.py [--studies 500]

A study has six methods, a control among them: four are equal to it, one is better by 0.05 AUC.
A test image has a difficulty that all methods share, one that all seeds of a method share, and
one of its own in each run. A seed moves all methods alike (the labelled images) and each alone
(head and order). The inference is the module's own, bootstrap included; nothing is trained.

Every line is one combination of seeds, test images and spread between seeds; shares in percent:
    mean, difference   95 % intervals that hold the truth: for a new seed and a new test set (new),
                       for a new seed on this test set, whose truth is that of its images (here)
    alarm              differences without one in truth that have p < 0.05, before correction
    any                studies with an alarm among the four equal methods, after Holm's correction
    power              studies that show the planted 0.05, before and after Holm's correction
    detectable         median of the column of that name: what would be shown in 80 %
    seeds only         alarms if an interval for this test set is read as one for new images
    percentile         coverage of a plain percentile bootstrap over the seeds' means
"""

import argparse
import gc
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import medssl_utils as medssl  # noqa: E402

PLANTED = 0.05
AUCS = (0.80, 0.80, 0.80, 0.80, 0.80, 0.80 + PLANTED)  # the control first
SHARED, METHOD, OWN = 0.5, 0.2, 0.3  # variance of an image's difficulty; 1 in all


def simulate_study(
    rng: np.random.Generator, n_seeds: int, n_test: int, seed_sd: float, n_draws: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one study.

    Args:
        seed_sd: standard deviation of the AUC between seeds at AUC 0.80.

    Returns:
        AUCs and their draws (methods, seeds, 1 + n_draws), and each method's true mean AUC (M,):
        over seeds and test sets, and over seeds on these test images.
    """
    labels = np.arange(n_test) % 2 == 1
    spread = seed_sd * np.sqrt(2) / norm.pdf(norm.ppf(AUCS[0]))       # in units of the scores
    subset, run = rng.normal(size=n_seeds), rng.normal(size=(len(AUCS), n_seeds))
    wobble = spread * (subset + run) / np.sqrt(2)                     # (M, n)
    shift = norm.ppf(AUCS) * np.sqrt(2 + spread**2)                   # (M,): exact over seeds
    images = np.sqrt(SHARED) * rng.normal(size=n_test) + np.sqrt(METHOD) * rng.normal(
        size=(len(AUCS), n_test))
    scores = (shift[:, None, None] + wobble[..., None]) * labels + images[:, None] + np.sqrt(
        OWN) * rng.normal(size=(len(AUCS), n_seeds, n_test))          # (M, n, N)
    weights = medssl._resampling(np.arange(n_test), n_draws, int(rng.integers(2**31)))
    values = np.array([[medssl._weighted_auc(labels, s, weights) for s in method]
                       for method in scores])
    here = [ndtr((m + x[labels][:, None] - x[~labels]) / np.sqrt(2 * OWN + spread**2)).mean()
            for m, x in zip(shift, images)]
    return values, np.array(AUCS), np.array(here)


def simulate(
    n_studies: int, n_seeds: int, n_test: int, seed_sd: float = 0.02, n_draws: int = 200,
) -> pd.Series:
    """Simulate studies of one kind; return the shares that the module docstring explains."""
    rng, rows = np.random.default_rng([n_seeds, n_test, round(1000 * seed_sd)]), []
    for _ in range(n_studies):
        x, truth, here = simulate_study(rng, n_seeds, n_test, seed_sd, n_draws)
        row = {}
        for name, images, true in (("new", True, truth), ("here", False, here)):
            def infer(draws):
                size = n_test // 2 if images else None  # half of them are ill
                return medssl._infer(draws, size, level=0.95, family=5)

            own, pairs = [infer(a) for a in x], [infer(a - x[0]) for a in x[1:]]
            p = np.array([f["p"] for f in pairs])
            row |= {
                f"mean, {name}": [f["low"] <= t <= f["high"] for f, t in zip(own, true)],
                f"difference, {name}": [f["low"] <= t - true[0] <= f["high"]
                                        for f, t in zip(pairs, true[1:])]}
            if images:
                holm = multipletests(p, method="holm")[1]
                row |= {"alarm": p[:-1] < 0.05, "any": holm[:-1].min() < 0.05,
                        "power": p[-1] < 0.05, "power, Holm": holm[-1] < 0.05,
                        "detectable": pairs[-1]["detectable"]}
            else:
                row["seeds only"] = p[:-1] < 0.05
        again = rng.choice(x[0, :, 0], (400, n_seeds)).mean(1)
        row["percentile"] = np.quantile(again, 0.025) <= truth[0] <= np.quantile(again, 0.975)
        rows.append(row)
    table = pd.DataFrame(rows)
    shares = {c: 100 * np.mean(np.stack(table[c].map(np.atleast_1d))) for c in table}
    return pd.Series(shares | {"detectable": table["detectable"].median()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage, false alarms and power, by simulation.")
    parser.add_argument("--studies", type=int, default=500, help="simulated studies per line")
    options = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage in every call, among all that torch has made
    began, lines = time.perf_counter(), {}
    for cell in itertools.product((0.01, 0.03), (3, 5, 10), (118, 203, 624)):
        lines[cell] = simulate(options.studies, cell[1], cell[2], cell[0])
    table = pd.DataFrame(lines).T.rename_axis(["sd of seeds", "n_seeds", "n_test"])
    shown = table.round(1).assign(detectable=table["detectable"].round(3))
    print(shown.to_string())
    covered = table[[c for c in table if c.startswith(("mean", "difference"))]]
    print(f"\n{options.studies} studies a line, {time.perf_counter() - began:.0f} s; "
          f"coverage {covered.min(axis=None):.1f} to {covered.max(axis=None):.1f} %, "
          f"false alarms at most {table['alarm'].max():.1f} %, "
          f"any after Holm at most {table['any'].max():.1f} %")
    gc.unfreeze()


if __name__ == "__main__":
    main()
