"""The phantom slices: balanced, repeatable, without leaks, and not given away by their brightness."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import medssl_utils as m


@pytest.fixture(scope="module")
def phantoms() -> m.DataSplits:
    return m.demo_data(0)


def test_sizes_shapes_and_types(phantoms):
    for name, n in (("train", 240), ("val", 80), ("test", 160)):
        part = getattr(phantoms, name)
        assert part.images.shape == (n, 64, 64)
        assert part.images.dtype == np.uint8
        assert part.labels.shape == part.ids.shape == part.groups.shape == (n,)
        assert part.labels.dtype == np.int64


def test_is_a_demo(phantoms):
    assert phantoms.demo
    assert phantoms.describe()["demo"] is True


def test_classes_are_balanced(phantoms):
    for name in m.SPLITS:
        assert np.ptp(np.bincount(getattr(phantoms, name).labels)) == 0


def test_same_seed_gives_the_same_bytes(phantoms):
    assert m.demo_data(0).fingerprint == phantoms.fingerprint


def test_another_seed_gives_other_images(phantoms):
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


@pytest.mark.parametrize("seed", [0, 1])
def test_brightness_does_not_give_the_class_away(seed):
    data = m.demo_data(seed)
    images = np.concatenate([data.train.images, data.val.images, data.test.images])
    labels = np.concatenate([data.train.labels, data.val.labels, data.test.labels])
    flat = images.reshape(len(images), -1).astype(float)
    statistics = [flat.mean(1), flat.std(1), *np.percentile(flat, (25, 50, 75, 90), axis=1)]
    for values in statistics:
        auc = roc_auc_score(labels, values)
        assert 0.35 < auc < 0.65


def test_the_lesion_can_be_seen():
    """Class 1 differs from class 0 inside the lungs by texture, at one patient's anatomy."""
    data = m.demo_data(0, n_train=80, n_val=4, n_test=4)
    blurred = np.array([[row[16:48, half].std() for half in (slice(6, 26), slice(38, 58))]
                        for row in data.train.images.astype(float)]).max(1)
    assert roc_auc_score(data.train.labels, blurred) > 0.5


@pytest.mark.parametrize("size", [32, 96])
def test_any_image_size(size):
    data = m.load_data("phantom", image_size=size, seed=3)
    assert data.train.images.shape == (240, size, size)
