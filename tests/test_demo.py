"""Phantoms and stand-ins: what the demo's claims rest on."""

import numpy as np
import pytest
import torch

import medssl_utils as medssl


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others():
    sizes = {"n_train": 8, "n_val": 4, "n_test": 4}
    assert medssl.demo_data(**sizes).fingerprint == medssl.demo_data(**sizes).fingerprint
    assert medssl.demo_data(**sizes).fingerprint != medssl.demo_data(1, **sizes).fingerprint


@pytest.mark.parametrize("image_size", [32, 48, 224])
def test_images_have_the_size_that_is_asked_for(image_size):
    data = medssl.demo_data(n_train=2, n_val=2, n_test=2, image_size=image_size)
    assert data.train.images.shape == (2, image_size, image_size)
    assert data.train.images.dtype == np.uint8


def test_phantoms_are_marked_and_fit_for_training(phantoms):
    assert phantoms.demo
    checks = medssl.check_splits(phantoms)
    assert checks.errors == []
    assert len(checks.pairs) == 0, "no patient, and no nearly equal picture, in two parts"


def test_classes_are_balanced_and_a_patient_has_two_slices_of_one_class(phantoms):
    for split in phantoms.parts.values():
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
        assert 0.2 < auc < 0.8, "0.5: nothing, 1: all"


def test_the_planted_two_are_one_backbone_and_the_random_two_are_drawn_anew(stand_ins):
    prints = {}
    for method in medssl.METHODS:
        for seed in (0, 1):
            _, report = medssl.load_backbone(method, folder=stand_ins, seed=seed)
            prints[method, seed] = report.fingerprint
            kind = "planted" if method in medssl.PLANTED else "random"
            assert report.name == f"{method} ({kind})"
            assert report.mean is None, "published intensities are not a stand-in's"
    assert len({prints[method, seed] for method in medssl.PLANTED for seed in (0, 1)}) == 1
    assert len(set(prints.values())) == 5


def test_planted_features_tell_new_phantoms_apart_with_few_labels(stand_ins, tmp_path):
    data = medssl.demo_data(7, n_train=48, n_val=16, n_test=80)
    config = medssl.FineTuneConfig.named("linear", "phantom")
    options = {"label_fraction": 0.5, "runs_dir": tmp_path, "on_epoch": len}
    run = medssl.fine_tune(
        *medssl.load_backbone("SparK", folder=stand_ins), data, config, **options
    )
    assert run.metrics["AUC"] > 0.9
    assert run.stamp == "DEMO"
    assert torch.get_num_threads() == 1
