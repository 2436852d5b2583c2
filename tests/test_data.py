"""The Data section: the prepared file, MedMNIST by name, label subsets, checks before training."""

import hashlib
import random
import re
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from medssl_utils import DataSplits, Split, check_splits, label_subset, load_data, save_data

PIXELS = np.random.default_rng(0).integers(0, 256, (2400, 8, 8)).astype(np.uint8)


def split(labels, patients=None, first=0):
    """Make a part of noise with these labels, its images numbered from `first`."""
    n = len(labels)
    ids = np.array([f"i{first + number}" for number in range(n)])
    patients = np.full(n, "") if patients is None else np.array(patients, str)
    return Split(PIXELS[first : first + n].copy(), np.array(labels, np.int64), ids, patients)


@pytest.fixture
def data():
    parts = [split([0, 1] * 20), split([0, 1] * 10, first=100), split([0, 1] * 10, first=200)]
    return DataSplits("d", *parts, class_names=("a", "b"), source="noise", notes=("x",))


def test_a_saved_file_is_loaded_as_it_was(data, tmp_path):
    data = replace(data, demo=True, mean=(0.1, 0.2, 0.3), test=split([1, 0], ["p", ""], 300))
    loaded = load_data(save_data(data, tmp_path / "d.npz"))
    assert loaded.fingerprint == data.fingerprint
    for name in ("name", "class_names", "mean", "std", "source", "demo", "official_split", "notes"):
        assert getattr(loaded, name) == getattr(data, name)
    assert list(loaded.test.patients) == ["p", ""]


def arrays(**changes):
    parts = {"train": 4, "val": 2, "test": 2}
    values = {f"{part}_images": PIXELS[:n] for part, n in parts.items()}
    values |= {f"{part}_labels": np.array([[0], [1]] * (n // 2)) for part, n in parts.items()}
    return {key: value for key, value in (values | changes).items() if value is not None}


def test_a_plain_medmnist_file_keeps_its_publishers_parts(tmp_path):
    np.savez(tmp_path / "m.npz", **arrays())
    data = load_data(tmp_path / "m.npz")
    assert data.official_split and data.class_names == ("0", "1") and data.mean == (0.5,) * 3
    assert data.train.labels.shape == (4,) and data.val.ids[1] == "val/000001"


BAD = {
    "float images": {"train_images": PIXELS[:4] / 255},
    "no labels": {"val_labels": None},
    "a label too few": {"test_labels": np.array([0])},
    "several labels": {"test_labels": np.array([[0, 1], [1, 0]])},
    "labels as floats": {"test_labels": np.array([0.0, np.nan])},
    "four channels": {"train_images": np.zeros((4, 8, 8, 4), np.uint8)},
    "pickled": {"train_labels": np.array([0, 1, 0, {}], object)},
    "an id too few": {"train_ids": np.array(["x"])},
    "other keys": {f"{part}_images": None for part in ("train", "val", "test")},
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_none_is_refused_with_its_name(case, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays(**BAD[case]))
    with pytest.raises(ValueError, match="bad.npz is no prepared file"):
        load_data(tmp_path / "bad.npz")


def test_a_damaged_file_is_refused(data, tmp_path):
    path = save_data(data, tmp_path / "d.npz")
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="is no prepared file"):
        load_data(path)
    whole[2000] ^= 1  # a bit of a pixel
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="CRC"):
        load_data(path)


def test_a_missing_file_and_a_misspelt_name_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="Notebook 03"):
        load_data(tmp_path / "none.npz")
    names = {"organsmnits": "organsmnist", "organsmnist_22": "224", "some/folder": "prepared.npz"}
    for name, words in names.items():
        with pytest.raises(ValueError, match=words):
            load_data(name)


def test_a_file_larger_than_the_memory_is_refused_with_its_size(data, tmp_path, monkeypatch):
    path = save_data(data, tmp_path / "d.npz")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ValueError, match="bytes of memory"):
        load_data(path)


@pytest.fixture
def medmnist_entry(tmp_path, monkeypatch):
    """The entry in medmnist's catalogue of a small file that is served as PneumoniaMNIST."""
    import medmnist

    path = tmp_path / "served.npz"
    np.savez(path, **arrays())
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        entry = dict(medmnist.INFO["pneumoniamnist"])
        entry["url"] = f"http://127.0.0.1:{server.server_port}/served.npz"
        entry["MD5"] = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(medmnist.INFO, "pneumoniamnist", entry)
        yield entry
        server.shutdown()


def test_medmnist_is_fetched_by_name(medmnist_entry, tmp_path):
    data = load_data("pneumoniamnist", data_dir=tmp_path / "new")
    assert data.class_names == ("normal", "pneumonia") and data.official_split
    assert "CC BY 4.0" in data.source and (tmp_path / "new/pneumoniamnist.npz").is_file()


@pytest.mark.parametrize("change, words", [({"MD5": "0"}, "corrupted"), ({"url": "x"}, "URL|url")])
def test_a_failed_download_says_why_and_what_to_do(change, words, medmnist_entry, tmp_path):
    medmnist_entry |= change
    with pytest.raises(RuntimeError, match="manually") as error:
        load_data("pneumoniamnist", data_dir=tmp_path)
    assert re.search(words, str(error.value.__context__))


def test_subsets_are_nested_with_every_class_and_whole_patients():
    rng = np.random.default_rng(5)
    for seed in range(150):
        labels = rng.integers(0, rng.integers(2, 5), rng.integers(30, 120))
        patients = [f"p{number}" for number in rng.integers(0, 60, len(labels))]
        patients = np.where(rng.random(len(labels)) < rng.choice([0.0, 0.3, 1.0]), "", patients)
        part, smaller = split(labels, patients), set()
        for fraction in (0.01, 0.1, 0.3, 0.7, 1.0):
            index = label_subset(part, fraction, seed=seed)
            assert smaller <= set(index) and np.all(np.diff(index) > 0)
            assert set(part.labels[index]) == set(part.labels)
            rest = np.setdiff1d(np.arange(len(part)), index)
            assert set(part.patients[index]) & set(part.patients[rest]) <= {""}
            smaller = set(index)
        assert len(smaller) == len(part)


def test_a_subset_keeps_the_share_of_each_class():
    part = split([0] * 400 + [1] * 100)
    assert list(np.bincount(part.labels[label_subset(part, 0.1, seed=3)])) == [40, 10]
    assert not np.array_equal(label_subset(part, 0.1, seed=3), label_subset(part, 0.1, seed=4))


def test_k_labels_per_class_are_nested_and_exact_without_patients():
    part = split([0] * 50 + [1] * 20 + [2] * 30)
    smaller = set()
    for k in (1, 5, 10, 20):
        index = label_subset(part, labels_per_class=k, seed=1)
        assert list(np.bincount(part.labels[index])) == [k, k, k] and smaller <= set(index)
        smaller = set(index)
    whole = split([0, 1] * 30, np.repeat([f"p{number}" for number in range(10)], 6))
    index = label_subset(whole, labels_per_class=4)  # the last patient overshoots
    assert list(np.bincount(whole.labels[index])) == [6, 6] and len(set(whole.patients[index])) == 2
    for wrong in ({"labels_per_class": 21}, {"label_fraction": -1}, {"label_fraction": np.nan}):
        with pytest.raises(ValueError, match="1 to 20|label_fraction (-1|nan)"):
            label_subset(part, **wrong)


def test_the_authors_rules():
    part = split([0, 1] * 50)
    order = list(range(100))
    random.Random(42).shuffle(order)
    assert list(label_subset(part, 0.25, seed=42, rule="authors")) == sorted(order[:25])
    assert list(label_subset(part, 0.259, rule="first")) == list(range(25))


WRONG = {
    "copy": ("test", "images", 4, PIXELS[2], "exact pairs in two parts: i204 = i2"),
    "two labels": ("train", "images", 5, PIXELS[2], "exact pairs with two labels: i5 = i2"),
    "label too high": ("val", "labels", 0, 2, "labels outside 0 to 1"),
    "no label": ("val", "labels", 0, -1, "labels outside 0 to 1"),
    "same id": ("val", "ids", 0, "i3", "Ids occur twice: i3"),
    "class absent": ("train", "labels", slice(None), 0, "train has no image of b"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_a_result_wrong_is_an_error(case, data):
    part, column, row, value, words = WRONG[case]
    getattr(data.parts[part], column)[row] = value
    report = check_splits(data)
    assert words in repr(report)
    with pytest.raises(ValueError, match=words):
        report.raise_for_errors()


def test_a_shared_patient_is_an_error_and_kept_in_an_official_split(data):
    data = replace(data, train=split([0, 1], ["P", "Q"]), val=split([0, 1], ["", "P"], 100))
    assert "1 patient pairs in two parts: P" in check_splits(data).errors[0]
    official = check_splits(replace(data, official_split=True))
    assert not official.errors and "patient pairs" in official.warnings[0]


def test_files_for_training_need_three_parts_and_others_do_not(data, tmp_path):
    assert "train, val only" in check_splits(replace(data, test=split([]))).errors[0]
    for parts in ({"test": data.test, "class_names": ("a", "b")}, {"new": split([-1] * 9)}):
        saved = DataSplits("d", **parts)
        loaded = load_data(save_data(saved, tmp_path / "d.npz"))
        assert not check_splits(loaded).errors and len(loaded.train) == 0
        assert loaded.fingerprint == saved.fingerprint
