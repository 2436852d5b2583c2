"""Do the intervals of `score_interval` and `compare_methods` keep their word?

    python bench/simulate_studies.py [--studies 500] [--draws 2000]

First the standard error of each score beside a bootstrap over patients or images. Then whole
studies are simulated, so that the truth is known. A study has six methods, a control among them;
four are equal to it, one is better. A test image has a difficulty that all methods share, one that
all seeds of a method share, and one of its own in each run. A seed moves all methods alike (the
labelled images) and each alone (head and order). Nothing is trained. In percent, nominal 95 and 5:
    mean, difference  95 % intervals that hold the truth, of a method's mean and of a difference
    run               the same of one run, whose truth is that network's own
    alarm             differences without one in truth that have p < 0.05, before correction
    any               studies with an alarm among the four equal methods, after Holm's
    power             studies that show the better method, after Holm's correction
    width             mean width of the interval of a method's mean
"""

import argparse
import itertools
import time

import numpy as np
import pandas as pd
from scipy.special import softmax
from scipy.stats import norm

import medssl_utils as medssl

SHARED, METHOD, OWN = 0.5, 0.2, 0.3  # variance of an image's difficulty; 1 in all
METHODS = 6  # the control first, the better one last
SCALE = norm.pdf(norm.ppf(0.8))  # of an AUC of 0.8, by the shift of the evidence


def make_test_set(n_test, shares, per_patient):
    """Return labels (N,) in the given shares, and patients (N,) whose images have one label."""
    ends = np.round(np.cumsum(shares) * n_test)
    labels = np.searchsorted(ends, np.arange(n_test), side="right")
    patients = [f"{label} {number // per_patient}" for number, label in enumerate(labels)]
    return labels, np.array(patients)


def draw_scores(rng, labels, patients, shifts, n_seeds, spread):
    """Draw the probabilities of one study, (M, n, N, C).

    Args:
        shifts: (M,) evidence for an image's own class; spread: its sd between seeds.
    """
    n_images, n_classes, n_methods = len(labels), labels.max() + 1, len(shifts)
    owners = np.unique(patients, return_inverse=True)[1]

    def difficulty(*shape):
        values = rng.normal(size=(*shape, n_images, n_classes))
        if owners.max() + 1 == n_images:
            return values
        of_patient = rng.normal(size=(*shape, owners.max() + 1, n_classes))
        return (values + of_patient[..., owners, :]) / np.sqrt(2)

    evidence = np.sqrt(SHARED) * difficulty(1, 1) + np.sqrt(METHOD) * difficulty(n_methods, 1)
    evidence = evidence + np.sqrt(OWN) * difficulty(n_methods, n_seeds)  # (M, n, N, C)
    of_seed = (rng.normal(size=n_seeds) + rng.normal(size=(n_methods, n_seeds))) / np.sqrt(2)
    shift = shifts[:, None] + spread * of_seed  # (M, n)
    evidence[..., np.arange(n_images), labels] += shift[..., None]
    return softmax(evidence, axis=-1)


def find_truth(rng, metric, labels, shifts, spread):
    """Return each method's true mean score (M,), over seeds and test sets of these shares."""
    if metric == "AUC" and labels.max() == 1:
        return norm.cdf(shifts / np.sqrt(1 + spread**2))
    labels, alone = np.repeat(labels, 24), np.arange(24 * len(labels))
    means = {}
    for shift in set(shifts):
        runs = [draw_scores(rng, labels, alone, np.array([shift]), 1, spread) for _ in range(300)]
        means[shift] = np.mean([medssl._influence(labels, run[0, 0], metric)[0] for run in runs])
    return np.array([means[shift] for shift in shifts])


def simulate(
    n_studies: int,
    metric: str = "AUC",
    auc: float = 0.8,
    better: float = 0.85,
    shares: tuple = (0.5, 0.5),
    n_test: int = 203,
    n_seeds: int = 5,
    sd: float = 0.02,
    per_patient: int = 1,
) -> pd.Series:
    """Simulate studies of one kind; return the columns that the module docstring explains."""
    rng = np.random.default_rng([n_seeds, n_test, round(1000 * sd), round(1000 * auc)])
    labels, patients = make_test_set(n_test, shares, per_patient)
    spread = sd / SCALE
    aucs = np.array([auc] * (METHODS - 1) + [better])
    shifts = norm.ppf(aucs) * np.sqrt(1 + spread**2)
    truth = find_truth(rng, metric, labels, shifts, spread)
    true_run = find_truth(rng, metric, labels, shifts[:1], 0.0)[0]
    owners = np.unique(patients, return_inverse=True)[1]
    size = medssl._measure(labels, np.eye(labels.max() + 1)[labels], patients, metric)[2]
    rows = []
    for _ in range(n_studies):
        scores = draw_scores(rng, labels, patients, shifts, n_seeds, spread)
        study = []
        for method in scores:
            runs = [medssl._influence(labels, run, metric) for run in method]
            moves = np.stack([np.bincount(owners, weights=run[1]) for run in runs])
            study.append((np.array([run[0] for run in runs]), moves))
        values, moves = study[0]
        run = draw_scores(rng, labels, patients, shifts[:1], 1, 0.0)[0, 0]
        low, high = medssl.score_interval(labels, run, metric, patients=patients)
        row = {"run": low <= true_run <= high}
        means = [medssl._share_interval(*method, size) for method in study]
        row["mean"] = np.mean([m[0] <= t <= m[1] for m, t in zip(means, truth, strict=True)])
        row["width"] = np.mean([high - low for low, high in means]) / 100
        gains, p = [], []
        for (others, their_moves), true in zip(study[1:], truth[1:], strict=True):
            pair = (others - values, their_moves - moves, size)
            low, high, chance = medssl._difference_interval(*pair)
            gains.append(low <= true - truth[0] <= high)
            p.append(chance)
        p = pd.Series(p).sort_values()
        holm = (p * np.arange(len(p), 0, -1)).cummax()
        equal = p.index < len(p) - 1
        row |= {"difference": np.mean(gains), "alarm": np.mean(p[equal] < 0.05)}
        row |= {"any": holm[equal].min() < 0.05, "power": holm[~equal].max() < 0.05}
        rows.append(row)
    return 100 * pd.DataFrame(rows).astype(float).mean()


def compare_errors(n_draws: int, n_sets: int = 5) -> pd.DataFrame:
    """Return the error by influence values over that of a bootstrap, mean over test sets."""
    kinds = {
        "2 classes, 203 images": ((0.5, 0.5), 203, 1),
        "11 classes, 624 images": ((1 / 11,) * 11, 624, 1),
        "2 classes, 203 images of 68 patients": ((0.5, 0.5), 203, 3),
    }
    ratios = {}
    for (kind, facts), metric in itertools.product(kinds.items(), medssl.SCORES):
        rng = np.random.default_rng(7)
        labels, patients = make_test_set(facts[1], facts[0], facts[2])
        members = pd.Series(range(len(labels))).groupby(patients).agg(list).to_list()
        found = []
        for _ in range(n_sets):
            scores = draw_scores(rng, labels, patients, np.ones(1), 1, 0.0)[0, 0]
            value, moves, size = medssl._measure(labels, scores, patients, metric)
            error = medssl._spread(np.array([value]), moves[None], size)[0]
            draws = []
            for _ in range(n_draws):
                units = rng.integers(len(members), size=len(members))
                images = np.concatenate([members[unit] for unit in units])
                draws.append(medssl._influence(labels[images], scores[images], metric)[0])
            found.append(error / np.nanstd(draws))
        ratios.setdefault(metric, {})[kind] = np.mean(found)
    return pd.DataFrame(ratios).T.round(3)


def list_studies() -> dict[str, dict]:
    """Return name -> settings of each line of the second table."""
    studies = {}
    for sd, n_seeds, n_test in itertools.product((0.01, 0.03), (3, 5, 10), (118, 203, 624)):
        facts = {"sd": sd, "n_seeds": n_seeds, "n_test": n_test}
        studies[f"sd {sd}, {n_seeds} seeds, {n_test} images"] = facts
    for ill, auc, n_seeds in itertools.product((101.5, 16, 10), (0.9, 0.97, 0.99), (3, 5)):
        shares = (1 - ill / 203, ill / 203)
        facts = {"auc": auc, "better": (1 + auc) / 2, "shares": shares, "n_seeds": n_seeds}
        studies[f"AUC {auc}, {ill:g} of 203 ill, {n_seeds} seeds"] = facts
    for auc in (0.8, 0.97):
        facts = {"auc": auc, "better": auc + (1 - auc) / 4, "per_patient": 3}
        studies[f"AUC {auc}, 203 images of 68 patients"] = facts
    scores = ("F1", "balanced ACC", "ACC", "Brier")
    for metric, shares in itertools.product(scores, ((1 / 3,) * 3, (0.5, 0.4, 0.1))):
        words = ", ".join(f"{share:.0%}" for share in shares)
        studies[f"{metric}, 3 classes: {words}"] = {"metric": metric, "shares": shares}
    return studies


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors, coverage, alarms and power.")
    parser.add_argument("--studies", type=int, default=500, help="simulated studies per line")
    parser.add_argument("--draws", type=int, default=2000, help="draws of each bootstrap")
    options = parser.parse_args()
    began = time.perf_counter()
    print("Standard error by influence values / by bootstrap")
    print(compare_errors(options.draws).to_string(), flush=True)
    print("\nCoverage, false alarms and power in percent", flush=True)
    for name, facts in list_studies().items():
        print(f"{name}: {simulate(options.studies, **facts).round(3).to_dict()}", flush=True)
    print(f"\n{options.studies} studies a line, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
