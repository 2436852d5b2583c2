"""Phantoms and stand-ins: what the demo's claims rest on."""

import itertools

import numpy as np
import pytest

import medssl_utils as medssl

PHANTOMS = medssl.demo_data(n_train=80, n_val=40, n_test=80)  # few for speed


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others():
    sizes = {"n_train": 8, "n_val": 4, "n_test": 4}
    assert medssl.demo_data(**sizes).fingerprint == medssl.demo_data(**sizes).fingerprint
    assert medssl.demo_data(**sizes).fingerprint != medssl.demo_data(1, **sizes).fingerprint


@pytest.mark.parametrize("size", [32, 48, 224])
def test_images_have_the_size_that_is_asked_for(size):
    images = medssl.demo_data(n_train=2, n_val=2, n_test=2, image_size=size).train.images
    assert images.shape == (2, size, size) and images.dtype == np.uint8


def test_phantoms_are_marked_and_fit_for_training():
    checks = medssl.check_splits(PHANTOMS)
    assert PHANTOMS.demo and checks.errors == []
    assert len(checks.pairs) == 0, "no patient, and no picture, in two parts"


def test_classes_are_balanced_and_a_patient_has_two_slices_of_one_class():
    for split in PHANTOMS.parts.values():
        assert np.bincount(split.labels).tolist() == [len(split) // 2] * 2
        for patient in np.unique(split.patients):
            labels = split.labels[split.patients == patient]
            assert len(labels) == 2 and labels[0] == labels[1]


def test_brightness_says_little_of_the_class():
    train = medssl.demo_data().train
    pixels = train.images.reshape(len(train), -1)
    for sign in (pixels.mean(1), *np.percentile(pixels, range(5, 100, 5), axis=1)):
        above = np.subtract.outer(sign[train.labels == 1], sign[train.labels == 0])
        auc = (above > 0).mean() + (above == 0).mean() / 2
        assert 0.15 < auc < 0.85, "0.5: nothing, 1: all"


def test_the_planted_two_are_one_backbone_and_the_random_two_are_drawn_anew(stand_ins):
    prints = {"planted": set(), "random": set()}
    for method, seed in itertools.product(medssl.METHODS, (0, 1, 0)):
        _, report = medssl.load_backbone(method, folder=stand_ins, seed=seed)
        kind = "planted" if method in medssl.PLANTED else "random"
        prints[kind].add(report.fingerprint)
        assert report.name == f"{method} ({kind})" and report.demo
        assert not report.mean, "published intensities are not a stand-in's"
    assert len(prints["planted"]) == 1 and len(prints["random"]) == 4


def test_planted_features_tell_new_phantoms_apart_with_few_labels(stand_ins, tmp_path):
    data = medssl.demo_data(7, n_train=48, n_val=16, n_test=80)
    config = medssl.FineTuneConfig.named("linear", "phantom")
    planted = medssl.load_backbone("SparK", folder=stand_ins)
    options = {"label_fraction": 0.5, "runs_dir": tmp_path, "on_epoch": len}
    run = medssl.fine_tune(*planted, data, config, **options)
    assert run.metrics["AUC"] > 0.9 and run.stamp == "DEMO"
