"""The phantom slices: balanced, repeatable, without leaks, not given away by brightness alone."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import medssl_utils as m


@pytest.fixture(scope="module")
def phantoms() -> m.DataSplits:
    return m.demo_data(0)


def test_sizes_shapes_and_types(phantoms):
    for name, n in (("train", 240), ("val", 48), ("test", 120)):
        part = getattr(phantoms, name)
        assert part.images.shape == (n, 48, 48)
        assert part.images.dtype == np.uint8
        assert part.labels.shape == part.ids.shape == part.groups.shape == (n,)
        assert part.labels.dtype == np.int64


def test_is_a_demo(phantoms):
    assert phantoms.demo is True


def test_classes_are_balanced(phantoms):
    for name in m.SPLITS:
        assert np.ptp(np.bincount(getattr(phantoms, name).labels)) == 0


def test_same_seed_gives_the_same_bytes():
    small = {"n_train": 8, "n_val": 4, "n_test": 4}
    assert m.demo_data(0, **small).fingerprint == m.demo_data(0, **small).fingerprint


def test_another_seed_gives_other_images():
    small = {"n_train": 8, "n_val": 4, "n_test": 4}
    assert m.demo_data(1, **small).fingerprint != m.demo_data(0, **small).fingerprint


def test_fewer_images_are_the_first_of_more(phantoms):
    few = m.demo_data(0, n_train=8, n_val=4, n_test=4)
    assert np.array_equal(few.train.images, phantoms.train.images[:8])


def test_ids_are_unique_and_patients_stay_in_one_split(phantoms):
    report = m.check_splits(phantoms)
    assert report.errors == []
    assert "patients" not in report.tables


def test_a_patient_has_several_slices_of_one_label(phantoms):
    for group in np.unique(phantoms.train.groups)[:10]:
        labels = phantoms.train.labels[phantoms.train.groups == group]
        assert len(labels) > 1
        assert len(set(labels)) == 1


def test_mean_and_std_are_those_of_the_training_images(phantoms):
    pixels = phantoms.train.images / 255
    assert phantoms.mean == pytest.approx([pixels.mean()] * 3)
    assert phantoms.std == pytest.approx([pixels.std()] * 3)


def test_brightness_alone_does_not_give_the_class_away(phantoms):
    images = np.concatenate([getattr(phantoms, name).images for name in m.SPLITS])
    labels = np.concatenate([getattr(phantoms, name).labels for name in m.SPLITS])
    flat = images.reshape(len(images), -1).astype(float)
    assert 0.3 < roc_auc_score(labels, flat.mean(1)) < 0.7
    for values in (flat.std(1), *np.percentile(flat, (10, 25, 50, 75, 90), axis=1)):
        assert 0.15 < roc_auc_score(labels, values) < 0.85


def test_illness_changes_the_lungs_and_nothing_else():
    body = m._phantom_patient(np.random.default_rng(5))
    clear, ill = (m._phantom_slice(body, 0, sick, np.random.default_rng(6), 48).astype(int)
                  for sick in (False, True))
    changed = np.abs(ill - clear) > 2
    assert changed.any()
    assert not changed[:6].any() and not changed[-6:].any()  # air above, table below
    assert not changed[:, :3].any() and not changed[:, -3:].any()  # skin


@pytest.mark.parametrize("size", [32, 96])
def test_any_image_size(size):
    data = m.demo_data(3, n_train=4, n_val=2, n_test=2, image_size=size)
    assert data.train.images.shape == (4, size, size)


def test_load_data_passes_seed_and_size_on():
    data = m.load_data("phantom", image_size=32, seed=3)
    assert data.train.images.shape == (240, 32, 32)
    assert "seed=3" in data.source
