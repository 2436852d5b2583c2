"""Scores against scikit-learn, errors against a bootstrap, and what a comparison may say."""

import itertools
import json

import numpy as np
import pytest
from sklearn import metrics

import medssl_utils as medssl
from bench import simulate_studies

# One study, small for speed: phantom images, a network per method, a subset per seed.
SETTINGS = {"version": "0.2", "dataset": "toy", "class_names": ["healthy", "ill"], "stamp": ""}
SETTINGS |= {"dataset_fingerprint": "d", "test_fingerprint": "t", "labels_per_class": None}
SETTINGS |= {"stand_in": "", "weights": "file", "weights_redrawn": False, "warnings": []}
SETTINGS |= {"recipe": "recommended", "lr": 1e-3, "backbone_lr": 1e-4, "epochs": 5}
SETTINGS |= {"used_precision": "fp32", "mean": [0.5] * 3, "std": [0.5] * 3}


def write_run(study, method="random", seed=0, fraction=1.0, skill=0.5, n=60, **changes):
    """Write a run folder; two classes in turn, and what is drawn of images is the same in all."""
    labels = np.arange(n) % 2
    image = np.random.default_rng(1).normal(size=n)
    own = np.random.default_rng([seed, len(method), round(1000 * fraction)])
    evidence = skill * (2 * labels - 1) + image + 0.5 * own.normal(size=n) + 0.1 * own.normal()
    scores = np.stack([1 / (1 + np.exp(evidence)), 1 / (1 + np.exp(-evidence))], axis=1)
    settings = {**SETTINGS, "method": method, "name": method, "seed": seed}
    settings |= {"label_fraction": fraction, "n_train": int(100 * fraction)}
    settings |= {"weights_fingerprint": method, "subset_fingerprint": f"{fraction} {seed}"}
    patients = changes.pop("patients", np.full(n, ""))
    settings |= changes
    folder = study / f"{method}_{settings['recipe']}_{fraction}_{seed}_{settings['lr']}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    np.savez(folder / "predictions.npz", patients=patients, labels=labels, scores=scores)
    values = medssl.score(labels, scores)
    (folder / "history.csv").write_text("epoch\n0\n")
    (folder / "metrics.json").write_text(json.dumps({**values, "val": values, "seconds": 1.0}))
    return folder


def write_study(study, methods=("random", "BYOL"), seeds=5, fractions=(1.0,), skill=1.0, **changes):
    for method, seed, fraction in itertools.product(methods, range(seeds), fractions):
        strength = 0.3 if method == "random" else skill
        write_run(study, method, seed, fraction, skill=strength, **changes)
    return medssl.load_runs(study)


def draw(seed, classes, n=120, rounded=False):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    scores = rng.random((n, classes)) + 0.5 * (labels[:, None] == np.arange(classes))
    if rounded:  # many ties
        scores = np.round(scores * 3) + 1
    return labels, scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 11])
@pytest.mark.parametrize("seed", range(20))
def test_scores_are_scikit_learns(seed, classes):
    labels, scores = draw(seed, classes, rounded=seed % 2)
    answers = scores.argmax(1)
    one = scores[:, 1] if classes == 2 else scores
    average = "binary" if classes == 2 else "micro"
    expected = {
        "AUC": metrics.roc_auc_score(labels, one, multi_class="ovr"),
        "ACC": metrics.accuracy_score(labels, answers),
        "balanced ACC": metrics.balanced_accuracy_score(labels, answers),
        "F1": metrics.f1_score(labels, answers, average="macro"),
        "F1 paper": metrics.f1_score(labels, answers, average=average),
        "Brier": metrics.brier_score_loss(labels, scores, scale_by_half=True),
    }
    values = medssl.score(labels, scores)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("classes", [2, 4])
def test_a_score_that_needs_an_absent_class_is_undefined(classes):
    labels, scores = draw(0, classes)
    labels = np.minimum(labels, classes - 2)
    values = medssl.score(labels, scores)
    assert values["AUC"] is None and values["balanced ACC"] is None
    expected = metrics.f1_score(labels, scores.argmax(1), average="macro")
    assert values["F1"] == pytest.approx(expected, abs=1e-12)  # over the classes that occur


def test_calibration_error_is_the_weighted_gap_of_its_bins():
    labels, scores = draw(3, 3)
    sure, right, gap = scores.max(1), scores.argmax(1) == labels, 0
    for low in np.arange(15) / 15:
        images = (sure > low) & (sure <= low + 1 / 15)
        gap += abs(right[images].sum() - sure[images].sum()) / len(labels)
    assert medssl.score(labels, scores)["ECE"] == pytest.approx(gap, abs=1e-12)


def test_the_error_of_an_auc_is_delongs():
    labels, scores = draw(0, 2)
    ill, well = scores[labels == 1, 1], scores[labels == 0, 1]
    wins = (ill[:, None] > well) + (ill[:, None] == well) / 2  # (ill, well), a tie counts half
    moves = medssl._influence(labels, scores, "AUC")[1]
    expected = wins.mean(1).var() / len(ill) + wins.mean(0).var() / len(well)
    assert (moves**2).sum() == pytest.approx(expected, rel=1e-12)


def test_errors_agree_with_a_bootstrap():
    ratios = simulate_studies.compare_errors(n_draws=300, n_sets=1)
    assert ratios.min(axis=None) > 0.9 and ratios.max(axis=None) < 1.1


@pytest.mark.parametrize("metric", medssl.SCORES)
def test_an_interval_holds_its_score_and_stays_inside_0_and_1(metric):
    for seed in range(5):
        labels, scores = draw(seed, 3, n=20)
        low, high = medssl.score_interval(labels, scores, metric)
        assert 0 <= low <= medssl.score(labels, scores)[metric] <= high <= 1


def test_an_auc_of_exactly_1_has_the_interval_of_its_rarest_class():
    labels = np.repeat([0, 1], [50, 8])
    scores = np.stack([1 - labels, labels], axis=1) * 0.8 + 0.1
    low, high = medssl.score_interval(labels, scores)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 8)), 1.0)


@pytest.mark.parametrize("metric, defined", [("AUC", False), ("F1", False), ("ACC", True)])
def test_a_class_with_one_image_has_no_variance(metric, defined):
    labels, scores = draw(0, 2)
    labels = (np.arange(len(labels)) == 7).astype(int)
    assert (medssl.score_interval(labels, scores, metric) is not None) == defined


def test_images_of_one_patient_count_together_and_unknown_ones_alone():
    one, of_one = draw(0, 2, n=60)
    labels, scores = np.tile(one, 4), np.tile(of_one, (4, 1))
    patients = np.tile(np.arange(60).astype(str), 4)
    interval = medssl.score_interval(labels, scores, patients=patients)
    assert interval == pytest.approx(medssl.score_interval(one, of_one))
    unknown = medssl.score_interval(labels, scores, patients=np.full(240, ""))
    assert unknown == medssl.score_interval(labels, scores)


STUDIES = {
    "three seeds": {"n_seeds": 3},
    "ten seeds": {"sd": 0.03, "n_seeds": 10, "n_test": 118},
    "near 1, few ill": {"auc": 0.97, "better": 0.985, "shares": (193 / 203, 10 / 203)},
    "patients": {"per_patient": 3},
    "macro F1": {"metric": "F1", "shares": (0.5, 0.4, 0.1)},
}


@pytest.mark.parametrize("settings", STUDIES.values(), ids=STUDIES)
def test_intervals_keep_their_word_in_simulated_studies(settings):
    shares = simulate_studies.simulate(40, **settings)  # small for speed
    assert shares["mean"] >= 87 and shares["difference"] >= 90
    assert shares["alarm"] <= 8 and shares["any"] <= 8


def test_finished_runs_of_several_studies_are_read_once_each(tmp_path):
    write_run(tmp_path / "a", seed=0, fraction=0.07)
    write_run(tmp_path / "b", seed=1, labels_per_class=5)
    (write_run(tmp_path / "b", seed=2) / "metrics.json").unlink()
    runs = medssl.load_runs(tmp_path / "a", tmp_path / "b", tmp_path)
    assert list(runs["seed"]) == [0, 1] and list(runs["labels"]) == ["7 %", "5 per class"]
    with pytest.raises(FileNotFoundError, match="nothing-here.*notebook 05"):
        medssl.load_runs(tmp_path / "nothing-here")


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "predictions.npz"])
def test_a_damaged_file_is_named(tmp_path, name):
    runs = write_study(tmp_path)
    path = runs["folder"].iloc[0] / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{path.parent.name}.*delete that folder"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_differences_are_paired_by_seed_and_corrected_by_holm(tmp_path):
    write_study(tmp_path, ("SparK",), skill=0.3)
    runs = write_study(tmp_path)
    table = medssl.compare_methods(runs).set_index("method")
    values = {m: np.array(v) for m, v in table["values"].items()}
    gains = values["BYOL"] - values["random"]
    assert table.loc["BYOL", "difference"] == pytest.approx(gains.mean())
    assert table.loc["BYOL", "difference_sd"] == pytest.approx(gains.std(ddof=1))
    assert list(table["n_pairs"].dropna()) == [5, 5]
    least, most = sorted(table["p"].dropna())
    assert sorted(table["p_holm"].dropna()) == pytest.approx([2 * least, max(2 * least, most)])
    above_0 = table.loc[["BYOL", "SparK"], "difference_low"] > 0
    assert list(above_0) == list(table.loc[["BYOL", "SparK"], "p"] < 0.05) == [True, False]


@pytest.mark.parametrize("loss", [False, True])
def test_no_interval_leaves_what_is_possible(tmp_path, loss):
    runs = write_study(tmp_path, seeds=3, fractions=(0.1, 1.0), skill=5.0, n=8)
    table = medssl.compare_methods(runs, loss=loss)
    assert table["difference_low"].min() >= -1 and table["difference_high"].max() <= 1
    assert table["low"].min() >= (-1 if loss else 0) and table["high"].max() <= 1


def test_two_seeds_are_too_few_and_the_sentence_says_so(tmp_path):
    table = medssl.compare_methods(write_study(tmp_path, seeds=2))
    assert table[["low", "high", "difference_low", "p", "p_holm"]].isna().all(axis=None)
    assert table["mean"].notna().all()
    assert "3 seeds" in medssl.describe_comparison(table)


def test_a_fixed_network_with_all_labels_counts_once_in_a_linear_evaluation(tmp_path):
    options = {"recipe": "linear", "subset_fingerprint": "all"}
    for seed in range(4):
        own = {"weights_redrawn": True, "weights_fingerprint": f"{seed}"}
        write_run(tmp_path, "random", seed, **options, **own)
        write_run(tmp_path, "BYOL", seed, **options)
    table = medssl.compare_methods(medssl.load_runs(tmp_path)).set_index("method")
    assert list(table["n"]) == [1, 4]  # BYOL, random
    assert np.isnan(table.loc["BYOL", "low"]) and np.isfinite(table.loc["random", "low"])
    assert table.loc["BYOL", "n_pairs"] == 4  # random networks still differ


def test_a_loss_is_what_the_same_seed_had_with_all_labels_minus_what_it_has(tmp_path):
    runs = write_study(tmp_path, fractions=(0.1, 1.0))
    values = runs.pivot(index=["method", "seed"], columns="labels", values="AUC")
    table = medssl.compare_methods(runs, loss=True)
    assert medssl.describe_comparison(table).startswith("loss of test AUC from 100 % of the")
    table = table.set_index("method")
    losses = (values["100 %"] - values["10 %"]).groupby("method").mean()
    assert table["mean"].to_dict() == pytest.approx(losses.to_dict())
    assert list(table["labels"].unique()) == ["10 %"]
    with pytest.raises(ValueError, match="No two runs .* one of them with labels == '100 %'"):
        medssl.compare_methods(runs[runs["label_fraction"] < 1], loss=True)


def test_patients_are_compared_by_their_mean_probability(tmp_path):
    patients = np.array([f"{i % 2} {i // 6}" for i in range(60)])
    patients[:6] = ""
    runs = write_study(tmp_path, patients=patients)
    table = medssl.compare_methods(runs, per="patient")
    assert set(table["n_test"]) == {len(np.unique(patients)) - 1}
    with pytest.raises(ValueError, match="(?i)compare per image"):
        medssl.compare_methods(write_study(tmp_path / "unknown"), per="patient")


REFUSALS = {
    "other images": ({"test_fingerprint": "other"}, "differ in test_fingerprint"),
    "demo with real": ({"stamp": "DEMO"}, "mix DEMO, SHORT or real"),
    "other labels": ({"subset_fingerprint": "other"}, "differ in subset_fingerprint"),
    "a setting": ({"epochs": 6}, r"differ in epochs: 5, 6.*by=\['epochs'\]"),
    "a setting of the future": ({"sparkle": True}, "differ in sparkle"),
    "precision": ({"used_precision": "bf16"}, "differ in used_precision"),
    "normalisation of one method": ({"mean": [0.1] * 3}, "differ in mean"),
    "weights of one method": ({"weights_fingerprint": "other"}, "differ in weights_fingerprint"),
    "rates of one method": ({"lr": 0.5}, "differ in lr"),
    "the same run twice": ({"seed": 4}, "differ in folder"),
}


@pytest.mark.parametrize("change, words", REFUSALS.values(), ids=REFUSALS)
def test_unlike_runs_are_refused_with_what_differs(tmp_path, change, words):
    write_study(tmp_path)
    write_run(tmp_path, "random", 5)
    write_run(tmp_path / "again", "BYOL", **{"seed": 5, **change})
    with pytest.raises(ValueError, match=words):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_settings_stand_side_by_side_when_asked_for(tmp_path):
    write_study(tmp_path, lr=1e-3)
    write_study(tmp_path, lr=1e-4)
    table = medssl.compare_methods(medssl.load_runs(tmp_path), by=["lr"])
    assert list(table["lr"]) == [1e-4, 1e-4, 1e-3, 1e-3]
    table = medssl.compare_methods(medssl.load_runs(tmp_path), by=["lr", "labels_per_class"])
    assert len(table) == 4, "a setting that is not set drops no run"


@pytest.mark.parametrize("option", ["metric", "control", "per", "by"])
def test_a_misspelt_option_is_named(tmp_path, option):
    with pytest.raises((ValueError, KeyError), match="'x'"):
        medssl.compare_methods(write_study(tmp_path), **{option: "x"})


@pytest.mark.parametrize("metric, word", [("AUC", "higher"), ("Brier", "lower")])
def test_the_answer_names_the_better_method(tmp_path, metric, word):
    runs = write_study(tmp_path, seeds=8, fractions=(0.1,), skill=3.0, n=200)
    text = medssl.describe_comparison(medssl.compare_methods(runs, metric))
    assert f"10 % of the labels: BYOL {word} than random: " in text


def test_a_demo_without_a_difference_says_both(tmp_path):
    runs = write_study(tmp_path, skill=0.3, stamp="DEMO")
    text = medssl.describe_comparison(medssl.compare_methods(runs))
    assert "100 % of the labels: BYOL no difference from random shown: " in text
    assert text.startswith("DEMO test AUC") and "tell nothing about BYOL" in text


def test_one_network_under_two_names_gets_no_interval(tmp_path):
    runs = write_study(tmp_path, ("MoCo", "BYOL"))  # drawn alike
    text = medssl.describe_comparison(medssl.compare_methods(runs, control="MoCo"))
    assert "no interval" in text and "nan" not in text
