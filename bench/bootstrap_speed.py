"""1,000 bootstrap draws of the AUC on a test set of OrganSMNIST's size: ours and scikit-learn's.

    python bench/bootstrap_speed.py

The scores are made up; both sides get the same ones. scikit-learn is timed on fewer draws and
scaled up. The values are compared draw by draw before anything is timed.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import medssl_utils as medssl  # noqa: E402

N, CLASSES, DRAWS = 8827, 11, 1000


def main() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, N)
    scores = rng.dirichlet(np.ones(CLASSES), N) + 0.3 * np.eye(CLASSES)[labels]
    scores = (scores / scores.sum(1, keepdims=True)).astype(np.float32)
    weights = medssl._resampling(np.arange(N), 5, 0)
    ours = medssl._weighted_score("AUC", labels, scores, weights)
    index = [np.repeat(np.arange(N), w.astype(int)) for w in weights.T]
    theirs = [roc_auc_score(labels[i], scores[i], multi_class="ovr") for i in index]
    print(f"largest difference over {len(theirs)} draws: {np.abs(ours - theirs).max():.1e}")

    seconds = {"medssl": [], "scikit-learn": []}
    for _ in range(5):
        began = time.perf_counter()
        interval = medssl.bootstrap_interval(labels, scores, "AUC", n_draws=DRAWS)
        seconds["medssl"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for i in index:
            roc_auc_score(labels[i], scores[i], multi_class="ovr")
        seconds["scikit-learn"].append((time.perf_counter() - began) * DRAWS / len(index))
    ours, theirs = (statistics.median(s) for s in seconds.values())
    print(f"AUC interval {interval[0]:.4f} to {interval[1]:.4f}")
    print(f"{DRAWS} draws, {N} images, {CLASSES} classes, median of 5: {ours:.2f} s; "
          f"scikit-learn {theirs:.1f} s; ratio {theirs / ours:.0f}; "
          f"{torch.get_num_threads()} of {os.cpu_count()} threads")


if __name__ == "__main__":
    main()
