"""Scores, tables and what may be compared with what."""

import gc
import importlib.util
import json
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from notebook_cells import run_cells
from sklearn import metrics
from statsmodels.stats.multitest import multipletests

import medssl_utils as medssl

LABELS = np.arange(60) % 2


@pytest.fixture(autouse=True, scope="module")
def frozen_garbage():
    """statsmodels collects garbage in every call, among all that torch has made: 0.6 s each."""
    gc.freeze()
    yield
    gc.unfreeze()


def draw_scores(strength, seed, labels=LABELS):
    """(N, 2) probabilities of a model that is right the more often the larger `strength`."""
    p = 1 / (1 + np.exp(-strength * (2 * labels - 1) - np.random.default_rng(seed).normal(
        size=len(labels))))
    return np.column_stack([1 - p, p])


def auc(scores, labels=LABELS):
    return metrics.roc_auc_score(labels, scores[:, 1])


def write_run(folder, method="random", seed=0, scores=None, done=True, labels=LABELS, groups=None,
              **changes):
    """A run folder with the three files that a comparison reads."""
    config = {
        "dataset": "toy", "method": method, "recipe": "demo", "label_fraction": 1.0,
        "seed": seed, "stamp": "DEMO", "weights": "stand-in", "n_train": 10, "image_size": 64,
        "epochs": 3, "weights_fingerprint": method, "test_fingerprint": "t",
        "subset_fingerprint": f"s{seed}", "augment": [], **changes}
    path = folder / "_".join(str(v) for v in (method, seed, *changes.values()))
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    scores = draw_scores(1, [seed, len(method)], labels) if scores is None else scores
    groups = np.full(len(labels), "") if groups is None else groups
    arrays = {"ids": np.arange(len(labels)).astype(str), "groups": groups, "labels": labels,
              "scores": scores}
    if done:
        np.savez(path / "predictions.npz", **arrays, **{f"val_{k}": v for k, v in arrays.items()})
        (path / "metrics.json").write_text(json.dumps(medssl.score(labels, scores)))
    return path


def write_study(folder, strengths, seeds=3, **changes):
    """A run for every method in {method: strength of its signal} and every seed."""
    for i, (method, strength) in enumerate(strengths.items()):
        for seed in range(seeds):
            write_run(folder, method, seed, draw_scores(strength, [i, seed]), **changes)
    return medssl.load_runs(folder)


# --- scores ------------------------------------------------------------------------------------

def test_two_class_scores_are_scikit_learns():
    scores = draw_scores(0.5, 0)
    said, p = scores.argmax(1), scores[:, 1]
    assert medssl.score(LABELS, scores, threshold=0.3) == {
        "ACC": metrics.accuracy_score(LABELS, said),
        "balanced ACC": metrics.balanced_accuracy_score(LABELS, said),
        "AUC": metrics.roc_auc_score(LABELS, p),
        "F1": metrics.f1_score(LABELS, said, average="macro"),
        "F1 paper": metrics.f1_score(LABELS, said),
        "sensitivity": metrics.recall_score(LABELS, p >= 0.3),
        "specificity": metrics.recall_score(LABELS, p >= 0.3, pos_label=0),
        "Brier": pytest.approx(metrics.brier_score_loss(LABELS, p))}


def test_many_class_scores_are_scikit_learns_and_micro_f1_is_accuracy():
    labels = np.arange(60) % 4
    scores = np.random.default_rng(0).dirichlet(np.ones(4), 60)
    found = medssl.score(labels, scores)
    assert found["AUC"] == metrics.roc_auc_score(labels, scores, multi_class="ovr")
    assert found["F1 paper"] == pytest.approx(found["ACC"])
    assert found["sensitivity"] is None
    truth = np.eye(4)[labels]
    assert found["Brier"] == pytest.approx(2 * np.mean(
        [metrics.brier_score_loss(truth[:, c], scores[:, c]) for c in range(4)]))


def test_several_labels_an_image_are_scored_label_by_label():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (40, 3))
    scores = rng.random((40, 3))
    found = medssl.score(labels, scores)
    assert found["AUC"] == metrics.roc_auc_score(labels, scores)
    assert found["ACC"] == ((scores > 0.5) == labels).mean()
    assert found["Brier"] == pytest.approx(((scores - labels) ** 2).mean())


def test_always_answering_noncovid_gives_the_papers_f1_of_068():
    """FACTS: 98 COVID (label 0) and 105 NonCOVID test images; why we report macro F1 as well."""
    labels = np.repeat([0, 1], [98, 105])
    found = medssl.score(labels, np.tile([0.0, 1.0], (203, 1)))
    assert found["F1 paper"] == pytest.approx(0.68, abs=0.005)
    assert found["F1"] == pytest.approx(0.34, abs=0.005)


def test_auc_without_both_classes_is_undefined_not_a_number():
    labels, scores = np.zeros(5, int), np.tile([0.9, 0.1], (5, 1))
    found = medssl.score(labels, scores, threshold=0.5)
    assert [k for k, v in found.items() if v is None] == [
        "balanced ACC", "AUC", "sensitivity", "specificity"]
    assert medssl.bootstrap_interval(labels, scores) is None
    assert medssl.choose_threshold(labels, scores) is None


def test_threshold_has_the_largest_sum_of_sensitivity_and_specificity():
    scores = draw_scores(0.5, 1)
    chosen = medssl.choose_threshold(LABELS, scores)

    def total(threshold):
        found = medssl.score(LABELS, scores, threshold=threshold)
        return found["sensitivity"] + found["specificity"]

    assert total(chosen) == max(total(t) for t in scores[:, 1])


def test_threshold_is_finite_for_a_model_that_is_always_wrong():
    """Its best operating point is to say class 1 never, at infinity; JSON has no infinity."""
    assert np.isfinite(medssl.choose_threshold(LABELS, np.eye(2)[1 - LABELS]))


def test_patients_are_scored_once_and_unknown_ones_left_out():
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    found = medssl.pool_by_patient(labels, scores, np.array(["p", "p", "q", ""]))
    assert found[0].tolist() == [0, 1]
    np.testing.assert_allclose(found[1], [[0.7, 0.3], [0.1, 0.9]])


def test_patients_with_several_labels_each_are_scored_once():
    labels = np.array([[1, 0, 1], [1, 0, 1], [0, 0, 1]])
    scores = np.array([[0.2, 0.4, 0.6], [0.4, 0.4, 0.8], [0.1, 0.1, 0.1]])
    truth, mean = medssl.pool_by_patient(labels, scores, np.array(["a", "a", "b"]))
    assert truth.tolist() == [[1, 0, 1], [0, 0, 1]]
    np.testing.assert_allclose(mean, [[0.3, 0.4, 0.7], [0.1, 0.1, 0.1]])


def test_no_confusion_matrix_is_drawn_of_several_labels():
    run = types.SimpleNamespace(predictions={"labels": np.eye(3, dtype=int)},
                                config={"class_names": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="no confusion matrix. Score each label"):
        medssl.plot_confusion(run)


def test_a_patient_with_two_labels_is_named():
    with pytest.raises(ValueError, match="patient 'p' carry different labels"):
        medssl.pool_by_patient(np.array([0, 1]), np.eye(2), np.array(["p", "p"]))


# --- bootstrap ---------------------------------------------------------------------------------

def case(classes):
    """Labels and scores with ties: two classes, five, or three labels an image."""
    rng = np.random.default_rng(5)
    if classes == "several":
        return rng.integers(0, 2, (50, 3)), rng.integers(1, 20, (50, 3)) / 20
    labels = rng.integers(0, classes, 50)
    scores = rng.integers(1, 6, (50, classes)) + 2.0 * np.eye(classes)[labels]
    return labels, scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 5, "several"])
def test_bootstrap_equals_scikit_learn_draw_by_draw(classes):
    labels, scores = case(classes)
    weights = medssl._resampling(np.arange(50), 40, 0)
    found = {m: medssl._weighted_score(m, labels, scores, weights, 0.4) for m in medssl.SCORES}
    for d, draw in enumerate(weights.T):
        index = np.repeat(np.arange(50), draw.astype(int))
        said = medssl.score(labels[index], scores[index], threshold=0.4)
        values = {m: None if np.isnan(found[m][d]) else found[m][d] for m in medssl.SCORES}
        assert values == {m: v if v is None else pytest.approx(v, abs=1e-12)
                          for m, v in said.items()}


def test_a_draw_without_a_class_is_undefined_and_left_out_of_the_interval():
    labels, scores = LABELS[:4], draw_scores(1, 0)[:4]
    weights = medssl._resampling(np.arange(4), 200, 0)
    assert np.isnan(medssl._weighted_score("AUC", labels, scores, weights)).any()
    assert np.isfinite(medssl.bootstrap_interval(labels, scores)).all()


def test_bootstrap_interval_holds_the_score_and_follows_its_seed():
    scores = draw_scores(0.5, 1)
    one, two = (medssl.bootstrap_interval(LABELS, scores, n_draws=100, seed=3) for _ in "ab")
    assert one == two
    assert one[0] < auc(scores) < one[1]


def test_images_without_a_patient_are_drawn_one_by_one_whatever_the_patients_are_called():
    assert len(set(medssl._units(4, np.array(["", "image 0", "image 0", ""])))) == 3


def test_an_interval_without_a_defined_draw_is_undefined():
    """Eleven images of eleven classes: a draw has all of them once in seven thousand."""
    scores = np.random.default_rng(0).dirichlet(np.ones(11), 11)
    assert medssl.bootstrap_interval(np.arange(11), scores, n_draws=100) is None


def test_images_of_one_patient_are_drawn_together():
    weights = medssl._resampling(medssl._units(4, np.array(["p", "", "p", ""])), 50, 0)
    assert (weights[0] == weights[2]).all() and (weights[0] != weights[1]).any()


# --- tables ------------------------------------------------------------------------------------

def test_load_runs_lists_finished_and_unfinished(tmp_path):
    write_run(tmp_path, "random", 0)
    write_run(tmp_path, "BYOL", 0, done=False)
    runs = medssl.load_runs(tmp_path).set_index("method")
    assert runs["status"].to_dict() == {"random": "done", "BYOL": "unfinished"}
    assert runs.loc["random", "AUC"] == auc(draw_scores(1, [0, 6]))


def test_a_rate_chosen_on_validation_stands_beside_the_one_that_was_asked_for(tmp_path):
    for seed, chosen in enumerate([0.1, 0.2]):
        path = write_run(tmp_path, "random", seed, lr=0.1) / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lr": chosen}))
    runs = medssl.load_runs(tmp_path)
    assert list(runs["lr"]) == [0.1, 0.1] and list(runs["chosen_lr"]) == [0.1, 0.2]
    assert medssl.compare_methods(runs)["n"].item() == 2


def test_a_control_beside_stand_ins_is_part_of_the_demo(tmp_path):
    write_run(tmp_path / "demo", "random", stamp="")
    write_run(tmp_path / "demo", "BYOL")
    write_run(tmp_path / "real", "random", stamp="")
    runs = medssl.load_runs(tmp_path)
    assert list(runs.loc[runs["method"] == "random", "stamp"]) == ["DEMO", ""]


def test_load_runs_says_when_there_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="notebook 04, or make workbook"):
        medssl.load_runs(tmp_path)


def test_comparison_gives_n_mean_sd_values_and_paired_differences(tmp_path):
    runs = write_study(tmp_path, {"random": 0.2, "BYOL": 0.6})
    own, other = ([auc(draw_scores(s, [i, seed])) for seed in range(3)]
                  for i, s in ((1, 0.6), (0, 0.2)))
    row = medssl.compare_methods(runs).set_index("method").loc["BYOL"]
    assert (row["n"], row["n_pairs"], row["n_test"]) == (3, 3, 60)
    assert row["values"] == pytest.approx(own)
    assert row["mean"] == pytest.approx(np.mean(own))
    assert row["sd"] == pytest.approx(np.std(own, ddof=1))
    assert row["difference"] == pytest.approx(np.mean(own) - np.mean(other))
    assert row["difference_sd"] == pytest.approx(np.std(np.subtract(own, other), ddof=1))


def test_on_this_test_set_the_comparison_is_the_paired_t_test(tmp_path):
    from scipy import stats

    runs = write_study(tmp_path, {"random": 0.2, "BYOL": 0.6}, seeds=5)
    row = medssl.compare_methods(runs, estimand="new seed on this test set").set_index(
        "method").loc["BYOL"]
    own, other = ([auc(draw_scores(s, [i, seed])) for seed in range(5)]
                  for i, s in ((1, 0.6), (0, 0.2)))
    test = stats.ttest_rel(own, other)
    assert row["p"] == pytest.approx(test.pvalue)
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(
        tuple(test.confidence_interval()))


def test_a_new_test_set_adds_the_variance_that_seeds_share(tmp_path):
    """One model run under five seeds: no spread between seeds, so DeLong's interval is left."""
    scores = draw_scores(0.5, 0)
    for seed in range(5):
        write_run(tmp_path, "random", seed, scores)
    row = medssl.compare_methods(medssl.load_runs(tmp_path), n_draws=4000).iloc[0]
    p, n = scores[LABELS == 1, 1], scores[LABELS == 0, 1]
    wins = p[:, None] > n[None]
    delong = np.sqrt(wins.mean(1).var(ddof=1) / len(p) + wins.mean(0).var(ddof=1) / len(n))
    assert row["sd"] == pytest.approx(0)
    assert row["high"] - row["mean"] == pytest.approx(2 * delong, rel=0.06)


def test_p_values_are_corrected_by_holm_over_the_whole_table(tmp_path):
    strengths = {"random": 0.2, "BYOL": 0.5, "SwAV": 0.3, "MoCo": 1.0}
    write_study(tmp_path, strengths)
    table = medssl.compare_methods(write_study(tmp_path, strengths, label_fraction=0.5))
    p = table["p"].dropna()
    assert len(p) == 6
    assert table.loc[p.index, "p_holm"].tolist() == multipletests(p, method="holm")[1].tolist()


def test_p_value_and_interval_agree(tmp_path):
    table = medssl.compare_methods(write_study(tmp_path, {"random": 0.2, "BYOL": 0.5}), level=0.9)
    row = table.iloc[1]
    again = medssl.compare_methods(medssl.load_runs(tmp_path), level=1 - row["p"]).iloc[1]
    assert again["difference_low"] == pytest.approx(0, abs=1e-6)


def test_a_seed_without_its_control_is_counted_but_not_paired(tmp_path):
    write_run(tmp_path, "random", 0)
    for seed in (0, 1):
        write_run(tmp_path, "BYOL", seed)
    row = medssl.compare_methods(medssl.load_runs(tmp_path)).set_index("method").loc["BYOL"]
    assert (row["n"], row["n_pairs"]) == (2, 1)


def test_one_seed_has_a_mean_but_no_interval_and_no_p(tmp_path):
    table = medssl.compare_methods(write_study(tmp_path, {"random": 0.2, "BYOL": 2}, seeds=1))
    row = table.iloc[1]
    assert row["difference"] > 0
    assert row[["sd", "low", "p", "p_holm", "difference_low", "detectable"]].isna().all()
    assert "nothing can be said" in medssl.describe_comparison(table)


def test_an_undefined_score_stays_undefined(tmp_path):
    zeros = np.zeros(60, int)
    for method in ("random", "BYOL"):
        for seed in range(2):
            write_run(tmp_path, method, seed, labels=zeros)
    table = medssl.compare_methods(medssl.load_runs(tmp_path))
    assert table[["mean", "low", "difference", "p"]].isna().all(axis=None)
    assert "nothing can be said" in medssl.describe_comparison(table)


def test_a_test_set_of_one_patient_says_nothing_of_new_ones(tmp_path):
    for method in ("random", "BYOL"):
        for seed in range(3):
            write_run(tmp_path, method, seed, groups=np.full(60, "p"))
    runs = medssl.load_runs(tmp_path)
    table = medssl.compare_methods(runs)
    assert table["mean"].notna().all() and table[["low", "p"]].isna().all(axis=None)
    assert "That takes two seeds shared with the control, several test images" in (
        medssl.describe_comparison(table))
    here = medssl.compare_methods(runs, estimand="new seed on this test set").iloc[1]
    assert here["difference_low"] < here["difference"] < here["difference_high"]


@pytest.mark.parametrize("metric, defined", [("AUC", False), ("F1", False), ("ACC", True)])
def test_a_single_image_of_a_class_says_nothing_of_new_ones(tmp_path, metric, defined):
    for seed in range(3):
        write_run(tmp_path, seed=seed, labels=(np.arange(60) == 7).astype(int))
    row = medssl.compare_methods(medssl.load_runs(tmp_path), metric).iloc[0]
    assert (row["n_test"], row["n_rarest"]) == (60, 1)
    assert np.isfinite(row["mean"]) and np.isfinite(row["low"]) == defined


def test_draws_that_are_all_undefined_do_not_pass_for_a_test_set_without_variance():
    x = np.full((3, 51), np.nan)
    x[:, 0] = 0.7, 0.8, 0.9
    found = medssl._infer(x, 20, 0.95, 1)
    assert found["mean"] == pytest.approx(0.8) and np.isnan([found["low"], found["p"]]).all()


def test_the_rarest_class_is_counted_by_patient_and_in_both_values_of_a_label():
    classes = np.array([0, 0, 1, 1, 1, 1])
    assert medssl._rarest(classes, np.array([0, 1, 2, 2, 2, 2]), 2) == 1
    several = np.array([[1, 0], [1, 0], [1, 1], [0, 1]])
    assert medssl._rarest(several, np.arange(4), 2) == 1


def test_one_kind_of_runs_that_lacks_a_setting_is_kept_apart_not_dropped(tmp_path):
    """As runs of an older version do."""
    write_run(tmp_path)
    write_run(tmp_path, cuda_graph=True)
    table = medssl.compare_methods(medssl.load_runs(tmp_path), by=["cuda_graph"])
    assert list(table["cuda_graph"]) == ["True", "not recorded"]


def test_a_level_in_percent_is_refused(tmp_path):
    with pytest.raises(ValueError, match="such as 0.95, not 95"):
        medssl.compare_methods(write_study(tmp_path, {"random": 1}), level=95)


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 cut"])
def test_predictions_that_are_damaged_or_gone_are_named(tmp_path, content):
    path = write_run(tmp_path) / "predictions.npz"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"random_0.predictions\.npz is damaged .*Delete"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_predictions_with_a_damaged_header_are_named(tmp_path):
    path = write_run(tmp_path) / "predictions.npz"
    with zipfile.ZipFile(path) as whole:
        bodies = {name: whole.read(name) for name in whole.namelist()}
    bodies["scores.npy"] = bodies["scores.npy"].replace(b"(60, 2)", b"(60, 2 ", 1)
    with zipfile.ZipFile(path, "w") as damaged:
        for name, body in bodies.items():
            damaged.writestr(name, body)
    with pytest.raises(ValueError, match=r"predictions\.npz is damaged .*Delete"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_predictions_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    write_run(tmp_path)
    runs = medssl.load_runs(tmp_path)
    monkeypatch.setattr(medssl.np, "load", lambda *a, **k: (_ for _ in ()).throw(
        PermissionError("not yours")))
    with pytest.raises(PermissionError, match="not yours"):
        medssl.compare_methods(runs)


def test_a_validation_patient_with_two_labels_stops_only_scores_that_need_a_threshold(tmp_path):
    labels, groups = np.arange(60) // 4 % 2, np.array([f"p{i // 4}" for i in range(60)])
    path = write_run(tmp_path, labels=labels, groups=groups) / "predictions.npz"
    with np.load(path) as file:
        np.savez(path, **{**file, "val_labels": LABELS})
    runs = medssl.load_runs(tmp_path)
    assert len(medssl.compare_methods(runs, per="patient")) == 1
    with pytest.raises(ValueError, match="carry different labels"):
        medssl.compare_methods(runs, "sensitivity", per="patient")


def test_patients_are_compared_by_their_mean_probability(tmp_path):
    groups = np.array([f"p{i // 4}" for i in range(60)])
    labels = np.arange(60) // 4 % 2
    for seed in range(2):
        write_run(tmp_path, "random", seed, draw_scores(0.2, seed, labels), labels=labels,
                  groups=groups)
    row = medssl.compare_methods(medssl.load_runs(tmp_path), per="patient").iloc[0]
    pooled = medssl.pool_by_patient(labels, draw_scores(0.2, 0, labels), groups)
    assert row["n_test"] == 15
    assert row["values"][0] == pytest.approx(auc(pooled[1], pooled[0]))


def test_images_of_one_patient_are_no_independent_test_images(tmp_path):
    groups = np.array([f"p{i // 4}" for i in range(60)])
    for seed in range(2):
        write_run(tmp_path / "known", "random", seed, groups=groups)
        write_run(tmp_path / "unknown", "random", seed)
    n = [medssl.compare_methods(medssl.load_runs(tmp_path / name))["n_test"].item()
         for name in ("known", "unknown")]
    assert n == [15, 60]


def test_comparison_by_patient_needs_patients(tmp_path):
    write_run(tmp_path)
    with pytest.raises(ValueError, match="Compare per image"):
        medssl.compare_methods(medssl.load_runs(tmp_path), per="patient")


# --- loss with fewer labels --------------------------------------------------------------------

@pytest.fixture
def scarce(tmp_path):
    """SparK keeps its score at a tenth of the labels, BYOL and random lose theirs."""
    write_study(tmp_path, {"random": 1.6, "BYOL": 1.6, "SparK": 1.6}, seeds=5)
    return write_study(tmp_path, {"random": 0.1, "BYOL": 0.1, "SparK": 1.5}, seeds=5,
                       label_fraction=0.1)


def test_loss_is_what_the_same_seed_had_with_all_labels_minus_what_it_has_now(scarce):
    table = medssl.compare_methods(scarce, loss=True, control="SparK").set_index("method")
    full, tenth = (auc(draw_scores(s, [1, 0])) for s in (1.6, 0.1))
    assert table.loc["BYOL", "values"][0] == pytest.approx(full - tenth)
    assert list(table["label_fraction"].unique()) == [0.1]


def test_summary_says_who_loses_least(scarce):
    text = medssl.describe_comparison(medssl.compare_methods(scarce, loss=True, control="SparK"))
    assert "BYOL loses more than SparK" in text
    assert "that SparK loses least is shown" in text
    text = medssl.describe_comparison(medssl.compare_methods(scarce, loss=True, control="BYOL"))
    assert "that BYOL loses least is not shown" in text


@pytest.mark.parametrize("method", ["", "MoCo", "SwAV"])
def test_that_a_method_loses_least_is_not_shown_while_another_has_no_loss(scarce, tmp_path, method):
    """Not run at all, not with all labels, or none but the favourite itself."""
    if method:
        write_run(tmp_path, method, label_fraction=0.1, done=method == "MoCo")
        runs = medssl.load_runs(tmp_path)
    else:
        runs = scarce[scarce["method"] == "SparK"]
    text = medssl.describe_comparison(medssl.compare_methods(runs, loss=True, control="SparK"))
    assert "loses least is shown" not in text


def test_loss_needs_runs_with_all_labels(tmp_path):
    runs = write_study(tmp_path, {"random": 1}, label_fraction=0.5)
    with pytest.raises(ValueError, match="label_fraction 1"):
        medssl.compare_methods(runs, loss=True)


# --- in words ----------------------------------------------------------------------------------

def test_summary_names_a_planted_winner_and_the_estimand(tmp_path):
    runs = write_study(tmp_path, {"random": 0.1, "BYOL": 0.1, "SparK": 2.5}, seeds=5)
    text = medssl.describe_comparison(medssl.compare_methods(runs))
    assert text.startswith(
        "DEMO AUC, scored per image, held against random; 95% intervals for a new seed and new "
        "test set; p after Holm's correction for 2 comparisons.")
    assert "SparK is better than random" in text
    assert "no difference shown between random and BYOL." in text


@pytest.mark.parametrize("detectable, said", [
    ((0.04, 0.07), "This study would show a difference of 0.07 four times in five."),
    ((0.04, 3.0), "This study is too small to show any difference reliably for SparK."),
    ((np.inf, 3.0), "This study is too small to show any difference reliably."),
])
def test_summary_names_the_comparisons_that_can_show_nothing(detectable, said, tmp_path):
    table = medssl.compare_methods(write_study(tmp_path, dict.fromkeys(
        ("random", "BYOL", "SparK"), 0.2)))
    table.loc[table["method"] != "random", "detectable"] = detectable
    assert said in medssl.describe_comparison(table)


def test_summary_says_when_the_detectable_difference_is_more_than_can_be_gained(tmp_path):
    table = medssl.compare_methods(write_study(tmp_path, {"random": 1, "BYOL": 1}))
    table["detectable"], table.loc[0, "mean"] = 0.5, 0.9
    assert "difference of 0.50 four times in five, but random can be beaten by 0.10 at most." in (
        medssl.describe_comparison(table))


def test_summary_names_the_methods_that_have_no_run_to_compare(tmp_path):
    write_study(tmp_path, {"random": 1, "BYOL": 1})
    write_run(tmp_path, "SparK", done=False)
    text = medssl.describe_comparison(medssl.compare_methods(medssl.load_runs(tmp_path)))
    assert "1 of the labels: not compared, for lack of finished runs: SparK." in text


def test_summary_knows_that_less_is_better_for_brier(tmp_path):
    runs = write_study(tmp_path, {"random": 0.1, "SparK": 2.5}, seeds=5)
    table = medssl.compare_methods(runs, "Brier")
    assert table.iloc[1]["difference"] < 0
    assert "SparK is better than random" in medssl.describe_comparison(table)


# --- small simulations of whole studies (bench/simulate_studies.py is the full one) ------------

@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parent.parent / "bench" / "simulate_studies.py"
    spec = importlib.util.spec_from_file_location("simulate_studies", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shares(bench):
    """Small for speed: 200 studies of 3 seeds and 118 test images, 1.5 points of error."""
    return bench.simulate(200, n_seeds=3, n_test=118, n_draws=100)


def test_intervals_hold_the_truth_as_often_as_they_say(shares):
    covered = shares[[c for c in shares.index if c.startswith(("mean", "difference"))]]
    assert len(covered) == 4 and covered.between(91, 99).all(), covered


def test_equal_methods_raise_few_alarms(shares):
    assert shares["alarm"] <= 6 and shares["any"] <= 6, shares


def test_a_rare_class_raises_no_more_alarms():
    """Two methods with one true AUC, ten seeds, 3 ill among 60: counted as 60 images that speak
    for a new test set they would raise 11 %. Small for speed: 300 studies."""
    rng, labels = np.random.default_rng(0), np.arange(60) < 3
    alarms = []
    for draw in range(300):
        images = rng.normal(size=(2, 60)) * 0.8 + rng.normal(size=60) * 0.5
        scores = images[:, None] + 0.3 * rng.normal(size=(2, 10, 60)) + 1.2 * labels
        weights = medssl._resampling(np.arange(60), 100, draw)
        x = np.array([[medssl._weighted_auc(labels, s, weights) for s in m] for m in scores])
        size = medssl._rarest(labels.astype(int), np.arange(60), 2)
        alarms.append(medssl._infer(x[1] - x[0], size, 0.95, 1)["p"] < 0.05)
    assert np.mean(alarms) <= 0.06


def test_a_bootstrap_of_the_seeds_alone_would_promise_too_much(shares):
    assert shares["percentile"] < 85, shares


def test_a_planted_difference_is_found_with_seeds_and_images_enough(bench):
    found = bench.simulate(20, n_seeds=10, n_test=624, seed_sd=0.01, n_draws=100)
    assert found["power, Holm"] >= 80, found


# --- what must not be mixed --------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    ({"stamp": ""}, "never compared with real"),
    ({"stamp": "SHORT"}, "never compared with real"),
    ({"test_fingerprint": "other"}, "differ in test_fingerprint"),
    ({"image_size": 32}, "differ in image_size"),
    ({"recipe": "linear"}, "differ in recipe"),
    ({"epochs": 9}, "differ in epochs"),
    ({"batch_size": 9}, "differ in batch_size"),
    ({"subset_fingerprint": "other"}, "different labelled images"),
    ({"environment": {"precision": "bf16"}}, "differ in used_precision.*set it for all"),
    ({"stamp": None}, "never compared with real"),
])
def test_what_must_not_be_mixed_is_refused(tmp_path, change, words):
    write_run(tmp_path, "random")
    write_run(tmp_path, "BYOL", **change)
    with pytest.raises(ValueError, match=words):
        medssl.compare_methods(medssl.load_runs(tmp_path))


@pytest.mark.parametrize("change, words", [
    ({"groups": np.array(["p"] * 60)}, "other groups"), ({"labels": 1 - LABELS}, "other labels"),
])
def test_runs_that_disagree_about_their_test_images_are_refused(tmp_path, change, words):
    """Patients are no part of the test set's fingerprint."""
    write_run(tmp_path, "random")
    write_run(tmp_path, "BYOL", **change)
    with pytest.raises(ValueError, match=f"BYOL_0 and random_0 .* {words}|random_0 .* {words}"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


@pytest.mark.parametrize("change", [{"lr": 1.0}, {"weights_fingerprint": "other"}])
def test_one_method_with_two_rates_or_two_files_is_refused(tmp_path, change):
    write_run(tmp_path, "BYOL", 0)
    write_run(tmp_path, "BYOL", 1, **change)
    with pytest.raises(ValueError, match=f"BYOL differ in {next(iter(change))}"):
        medssl.compare_methods(medssl.load_runs(tmp_path), control="BYOL")


def test_a_rate_chosen_for_each_method_is_no_mixture(tmp_path):
    write_run(tmp_path, "random", lr=0.1)
    write_run(tmp_path, "BYOL", lr=0.2)
    assert len(medssl.compare_methods(medssl.load_runs(tmp_path))) == 2


def test_recipes_stand_side_by_side_when_asked_for(tmp_path):
    for recipe in ("demo", "linear"):
        write_run(tmp_path, recipe=recipe)
    table = medssl.compare_methods(medssl.load_runs(tmp_path), by=["recipe"])
    assert list(table["recipe"]) == ["demo", "linear"]


def test_precisions_stand_side_by_side_when_asked_for(tmp_path):
    for precision in ("bf16", "fp32"):
        write_run(tmp_path, environment={"precision": precision})
    table = medssl.compare_methods(medssl.load_runs(tmp_path), by=["used_precision"])
    assert list(table["used_precision"]) == ["bf16", "fp32"]


def test_learning_rates_of_a_grid_stand_side_by_side_when_asked_for(tmp_path):
    """Notebook 04 names the learning rate as a setting to vary."""
    for lr in (0.1, 0.2):
        for method in ("random", "BYOL"):
            write_run(tmp_path, method, lr=lr)
    with pytest.raises(ValueError, match=r"differ in lr.*by=\['lr'\]"):
        medssl.compare_methods(medssl.load_runs(tmp_path))
    table = medssl.compare_methods(medssl.load_runs(tmp_path), by=["lr"])
    assert list(zip(table["lr"], table["method"])) == [
        (0.1, "random"), (0.1, "BYOL"), (0.2, "random"), (0.2, "BYOL")]


def test_demo_and_real_are_not_mixed_even_when_asked_for(tmp_path):
    write_run(tmp_path)
    with pytest.raises(ValueError, match="by 'stamp' is not known"):
        medssl.compare_methods(medssl.load_runs(tmp_path), by=["stamp"])


def test_a_method_run_twice_with_different_settings_is_refused(tmp_path):
    write_run(tmp_path, "random")
    write_run(tmp_path, "random", weights_fingerprint="other")
    with pytest.raises(ValueError, match="random was run twice"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_a_missing_control_is_named(tmp_path):
    write_run(tmp_path, "BYOL")
    with pytest.raises(ValueError, match="No run of the control 'random'"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


def test_a_study_without_a_finished_run_is_refused(tmp_path):
    write_run(tmp_path, done=False)
    with pytest.raises(ValueError, match="None of these runs is finished"):
        medssl.compare_methods(medssl.load_runs(tmp_path))


# --- figure ------------------------------------------------------------------------------------

def test_figure_of_label_fractions_states_stamp_seeds_interval_and_test_size(tmp_path):
    write_study(tmp_path, {"random": 1, "BYOL": 1})
    runs = write_study(tmp_path, {"random": 1, "BYOL": 1}, label_fraction=0.25)
    names = run_cells("05_compare_results", "import medssl_utils", "def seeds(", "def draw_curves(",
                      device="cpu")
    figure = names["draw_curves"](medssl.compare_methods(runs))
    axis = figure.axes[0]
    title = axis.get_title()
    assert title.startswith("DEMO")
    for words in ("3 seeds", "95% interval (Student's t)", "new test set", "60 test images"):
        assert words in title
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["random", "BYOL"]
    assert axis.get_lines()[0].get_color() == medssl.METHOD_COLORS["random"]


@pytest.mark.parametrize("known, unit", [
    (60, "patients"), (30, "patients or images"), (0, "images"),
])
def test_comparison_names_what_its_intervals_are_over(known, unit, tmp_path):
    groups = np.array([f"patient {i // 2}" if i < known else "" for i in range(60)])
    write_run(tmp_path, "random", groups=groups)
    assert medssl.compare_methods(medssl.load_runs(tmp_path))["unit"].item() == unit


# --- the whole of notebook 05 ------------------------------------------------------------------

def write_toy_study(folder, strengths, seeds=3, labels=LABELS, names=("ill", "well"), **changes):
    """Runs that notebook 05 can read; returns the folder."""
    for i, (method, strength) in enumerate(strengths.items()):
        for seed in range(seeds):
            path = write_run(folder, method, seed, draw_scores(strength, [i, seed], labels),
                             labels=labels, **{"class_names": names, "stamp": "", **changes})
            (path / "history.csv").write_text("epoch\n0\n")
    return folder


def read_05(folder, **parameters):
    return run_cells("05_compare_results", study_dir=str(folder), **parameters)


def title_of(figure):
    return (figure.get_suptitle() or figure.axes[0].get_title()).replace("\n", " ")


def test_05_names_who_is_worse_and_counts_the_seeds_that_are_missing(tmp_path, capsys):
    write_toy_study(tmp_path, {"random": 2.5, "BYOL": 0.1, "SparK": 2.5}, seeds=5)
    write_toy_study(tmp_path, {"random": 2.5, "BYOL": 0.1}, seeds=5, label_fraction=0.5)
    read_05(tmp_path)
    said = capsys.readouterr().out
    assert "No run of the control 'SparK' for ('toy', 0.5)." in said  # its loss; the rest goes on
    found = said.split("- 25 finished runs, ")[1]
    assert found.startswith("0 to 5 seeds in each cell.")
    assert "0 of 3 comparisons show a method better than random.\n" in found
    assert "worse than random: BYOL (toy, 0.5), BYOL (toy, 1)." in found
    assert "No difference is shown" not in found


def test_05_says_that_nothing_could_be_tested_with_one_seed(tmp_path, capsys):
    figures = read_05(write_toy_study(tmp_path, {"random": 1, "BYOL": 1}, seeds=1))["figures"]
    found = capsys.readouterr().out
    assert "comparisons show" not in found and "Nothing could be tested" in found
    for name in ("curves_toy", "differences"):
        assert "1 seed, " in title_of(figures[name])
        assert "no interval can be given" in title_of(figures[name])


def test_05_draws_what_is_kept_apart_in_figures_of_its_own(tmp_path):
    for recipe in ("linear", "recommended"):
        write_toy_study(tmp_path, {"random": 1, "BYOL": 1}, recipe=recipe)
    names = read_05(tmp_path, by=["recipe"])
    for recipe in ("linear", "recommended"):
        assert title_of(names["figures"][f"curves_toy_{recipe}"]).startswith(f"toy, {recipe}:")
    for name in ("calibration", "classes"):
        assert title_of(names["figures"][name]).startswith("toy, linear, 1 of the labels")
    assert {method: len(runs) for method, runs in names["loaded"].items()} == {
        "random": 3, "BYOL": 3}
    names["view"]("toy", "AUC", "random", ["random", "BYOL"], [1.0])
    assert len(names["displayed"][-1].axes[0].containers) == 2  # one for each method


def test_05_says_what_is_counted_and_marked_in_the_figure_of_differences(tmp_path):
    write_toy_study(tmp_path, {"random": 0.1, "BYOL": 0.2, "SparK": 2.5}, seeds=5)
    patients = np.array([f"p{i // 4}_{i % 2}" for i in range(60)])
    write_toy_study(tmp_path, {"random": 1, "BYOL": 1}, seeds=5, dataset="other",
                    groups=patients, test_fingerprint="other")
    figure = read_05(tmp_path)["figures"]["differences"]
    assert title_of(figure) == (
        "5 seeds, 30 test patients of other, 60 test images of toy 95% intervals (Student's t), "
        "each by itself, for a new seed and new test set filled: shown after Holm's correction "
        "for 3 comparisons")
    marks = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == "white" for line in marks] == [True, True, False]
    low, high = figure.axes[0].get_xlim()
    assert low == -high and figure.axes[0].get_ylim() == (2.5, -0.5)


def test_05_shows_no_recall_of_a_class_without_test_images(tmp_path):
    labels = np.zeros(60, int)
    figure = read_05(write_toy_study(tmp_path, {"random": 1, "BYOL": 1}, labels=labels),
                     metric="ACC")["figures"]["classes"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["ill (60)", "well (0)"]
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert np.isnan(heights[1::2]).all() and not np.isnan(heights[::2]).any()


def test_05_refuses_a_study_of_the_control_alone(tmp_path):
    with pytest.raises(ValueError, match="Only random has finished runs here"):
        read_05(write_toy_study(tmp_path, {"random": 1}))


PUBLISHED = "dataset,metric,label_fraction,value,source\n"


@pytest.mark.parametrize("text, words", [
    ("dataset,value\ntoy,0.9\n", r"lacks the columns \['metric', 'label_fraction', 'source'\]"),
    (PUBLISHED + "toy,AUC,1,97.5,A 2020\n", "between 0 and 1, as 0.975"),
])
def test_05_refuses_published_values_that_it_cannot_place(tmp_path, text, words):
    file = tmp_path / "published.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_05(write_toy_study(tmp_path / "runs", {"random": 1, "BYOL": 1}), published=str(file))


def test_05_draws_published_values_as_such_and_counts_them(tmp_path, capsys):
    file = tmp_path / "published.csv"
    file.write_text(PUBLISHED + "toy,AUC,0.5,0.8,A 2020\ntoy,AUC,1,0.9,A 2020\n"
                    "toy,ACC,1,0.7,A 2020\nelsewhere,AUC,1,0.7,A 2020\n")
    figure = read_05(write_toy_study(tmp_path / "runs", {"random": 1, "BYOL": 1}),
                     published=str(file))["figures"]["curves_toy"]
    assert "2 published values of AUC for this data stand beside." in capsys.readouterr().out
    line = next(x for x in figure.axes[0].get_lines() if x.get_label() == "A 2020 (published)")
    assert list(line.get_xdata()) == [0.5, 1] and list(line.get_ydata()) == [0.8, 0.9]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0.5", "1"]


@pytest.mark.parametrize("per, number", [("image", 2), ("patient", 0)])
def test_05_puts_values_published_per_image_beside_no_other(tmp_path, per, number, capsys):
    patients = np.array([f"p{i // 4}_{i % 2}" for i in range(60)])
    write_toy_study(tmp_path, {"random": 1, "BYOL": 1}, dataset="covid_ct", groups=patients)
    figure = read_05(tmp_path, per=per)["figures"]["curves_covid_ct"]
    assert f"{number} published values of AUC" in capsys.readouterr().out
    assert sum("(published)" in t.get_text() for t in figure.legends[0].get_texts()) == number


def test_a_folder_without_runs_is_named_with_the_studies_beside_it(tmp_path):
    for study in ("mine", "yours"):
        (tmp_path / study / "run").mkdir(parents=True)
        (tmp_path / study / "run" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="No runs in .*Studies beside it: mine, yours"):
        medssl.load_runs(tmp_path / "theirs")
    with pytest.raises(FileNotFoundError, match="theirs. Set the folder of a study"):
        medssl.load_runs(tmp_path / "nothing" / "theirs")
