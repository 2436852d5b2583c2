"""Scores, tables and what may be compared with what."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

import medssl_utils as medssl


def write_run(folder, method="random", seed=0, auc=0.7, done=True, **changes):
    """A run folder with the two files that a comparison reads."""
    config = {
        "dataset": "toy", "method": method, "recipe": "demo", "label_fraction": 1.0,
        "seed": seed, "stamp": "DEMO", "weights": "stand-in", "n_train": 10, "image_size": 64,
        "epochs": 3, "weights_fingerprint": method, "test_fingerprint": "t",
        "subset_fingerprint": f"s{seed}", **changes}
    name = "_".join(str(v) for v in (method, seed, *changes.values()))
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if done:
        scores = {"ACC": 0.5, "balanced ACC": 0.5, "AUC": auc, "F1": 0.5, "F1 paper": 0.5}
        (path / "metrics.json").write_text(json.dumps(scores))
    return path


# --- scores ------------------------------------------------------------------------------------

def test_two_class_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    p = rng.random(50)
    found = medssl.score(labels, np.column_stack([1 - p, p]))
    said = (p > 0.5).astype(int)
    assert found == {
        "ACC": metrics.accuracy_score(labels, said),
        "balanced ACC": metrics.balanced_accuracy_score(labels, said),
        "AUC": metrics.roc_auc_score(labels, p),
        "F1": metrics.f1_score(labels, said, average="macro"),
        "F1 paper": metrics.f1_score(labels, said)}


def test_many_class_scores_are_scikit_learns_and_micro_f1_is_accuracy():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 4
    scores = rng.dirichlet(np.ones(4), 60)
    found = medssl.score(labels, scores)
    assert found["AUC"] == metrics.roc_auc_score(labels, scores, multi_class="ovr")
    assert found["F1 paper"] == pytest.approx(found["ACC"])


def test_several_labels_an_image_are_scored_label_by_label():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (40, 3))
    scores = rng.random((40, 3))
    found = medssl.score(labels, scores)
    assert found["AUC"] == metrics.roc_auc_score(labels, scores)
    assert found["ACC"] == ((scores > 0.5) == labels).mean()


def test_always_answering_noncovid_gives_the_papers_f1_of_068():
    """FACTS: 98 COVID (label 0) and 105 NonCOVID test images; why we report macro F1 as well."""
    labels = np.repeat([0, 1], [98, 105])
    found = medssl.score(labels, np.tile([0.0, 1.0], (203, 1)))
    assert found["F1 paper"] == pytest.approx(0.68, abs=0.005)
    assert found["F1"] == pytest.approx(0.34, abs=0.005)


def test_auc_without_both_classes_is_undefined_not_a_number():
    found = medssl.score(np.zeros(5, int), np.tile([0.9, 0.1], (5, 1)))
    assert found["AUC"] is None and found["balanced ACC"] is None
    assert medssl.bootstrap_interval(np.zeros(5, int), np.tile([0.9, 0.1], (5, 1))) is None


def test_bootstrap_interval_holds_the_score_and_follows_its_seed():
    rng = np.random.default_rng(1)
    labels = np.arange(80) % 2
    p = np.clip(0.5 + 0.2 * (labels - 0.5) + 0.2 * rng.normal(size=80), 0, 1)
    scores = np.column_stack([1 - p, p])
    one, two = (medssl.bootstrap_interval(labels, scores, n_draws=100, seed=3) for _ in "ab")
    assert one == two
    assert one[0] < medssl.score(labels, scores)["AUC"] < one[1]


def test_patients_are_scored_once_and_unknown_ones_left_out():
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    found = medssl.pool_by_patient(labels, scores, np.array(["p", "p", "q", ""]))
    assert found[0].tolist() == [0, 1]
    np.testing.assert_allclose(found[1], [[0.7, 0.3], [0.1, 0.9]])


def test_a_patient_with_two_labels_is_named():
    with pytest.raises(ValueError, match="patient 'p' carry different labels"):
        medssl.pool_by_patient(np.array([0, 1]), np.eye(2), np.array(["p", "p"]))


# --- tables ------------------------------------------------------------------------------------

def test_load_runs_lists_finished_and_unfinished(tmp_path):
    write_run(tmp_path, "random", 0)
    write_run(tmp_path, "BYOL", 0, done=False)
    runs = medssl.load_runs(tmp_path).set_index("method")
    assert runs["status"].to_dict() == {"random": "done", "BYOL": "unfinished"}
    assert runs.loc["random", "AUC"] == 0.7


def test_load_runs_says_when_there_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="notebook 03"):
        medssl.load_runs(tmp_path)


def test_comparison_gives_mean_sd_n_and_paired_differences(tmp_path):
    for seed, (random, byol) in enumerate([(0.6, 0.7), (0.7, 0.9)]):
        write_run(tmp_path, "random", seed, random)
        write_run(tmp_path, "BYOL", seed, byol)
    table = medssl.compare_methods(medssl.load_runs(tmp_path)).set_index("method")
    row = table.loc["BYOL"]
    assert (row["n"], row["n_pairs"]) == (2, 2)
    assert row["mean"] == pytest.approx(0.8)
    assert row["sd"] == pytest.approx(np.std([0.7, 0.9], ddof=1))
    assert row["difference"] == pytest.approx(0.15)
    assert row["difference_sd"] == pytest.approx(np.std([0.1, 0.2], ddof=1))


def test_a_seed_without_its_control_is_counted_but_not_paired(tmp_path):
    write_run(tmp_path, "random", 0, 0.6)
    for seed in (0, 1):
        write_run(tmp_path, "BYOL", seed, 0.8)
    row = medssl.compare_methods(medssl.load_runs(tmp_path)).set_index("method").loc["BYOL"]
    assert (row["n"], row["n_pairs"]) == (2, 1)


def test_an_undefined_score_makes_the_mean_undefined(tmp_path):
    for seed, auc in enumerate([0.8, None]):
        write_run(tmp_path, "random", seed, auc)
    table = medssl.compare_methods(medssl.load_runs(tmp_path))
    assert table["n"].item() == 2 and pd.isna(table["mean"].item())


@pytest.mark.parametrize("change, words", [
    ({"stamp": ""}, "never compared with real"),
    ({"stamp": "SHORT"}, "never compared with real"),
    ({"test_fingerprint": "other"}, "differ in test_fingerprint"),
    ({"image_size": 32}, "differ in image_size"),
    ({"subset_fingerprint": "other"}, "different labelled images"),
])
def test_what_must_not_be_mixed_is_refused(tmp_path, change, words):
    write_run(tmp_path, "random")
    write_run(tmp_path, "BYOL", **change)
    with pytest.raises(ValueError, match=words):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_a_method_run_twice_with_different_settings_is_refused(tmp_path):
    write_run(tmp_path, "random")
    write_run(tmp_path, "random", weights_fingerprint="other")
    with pytest.raises(ValueError, match="random was run twice"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_a_missing_control_is_named(tmp_path):
    write_run(tmp_path, "BYOL")
    with pytest.raises(ValueError, match="No run of the control 'random'"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_figure_of_label_fractions_carries_its_stamp_and_a_line_a_method(tmp_path):
    for fraction in (0.25, 1.0):
        for method in ("random", "BYOL"):
            write_run(tmp_path, method, 0, label_fraction=fraction)
    figure = medssl.plot_label_fractions(medssl.load_runs(tmp_path))
    axis = figure.axes[0]
    assert axis.get_title().startswith("DEMO")
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["random", "BYOL"]


# --- study -------------------------------------------------------------------------------------

def test_grid_expands_to_every_combination():
    cells = medssl.expand_grid({"method": ["a", "b"], "seed": [0, 1]})
    assert cells == [{"method": m, "seed": s} for m in "ab" for s in (0, 1)]


def test_study_refuses_threads():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="Threads share"):
        medssl.run_study({"seed": [0]}, executor=pool)
