"""Folders of the user's own images: layouts, pixels, splits, and rows X1 to X7 of bad input."""

import gzip
import os
import re
import shutil
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import faults_data
import fuzz_data
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import (
    CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless,
)

import medssl_utils as m

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8)


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the folder `tmp_path`/in at 8 pixels, small for speed."""
    (tmp_path / "in").mkdir()

    def read_it(image_size=8, labelled=False, **options) -> m.Folder:
        return m.read_folder(tmp_path / "in", m.ReadOptions(**options), image_size=image_size,
                             data_dir=tmp_path / "data", labelled=labelled)
    return read_it


@pytest.fixture
def folder(tmp_path, read) -> Path:
    return tmp_path / "in"


def write_image(path: Path, seed: int = 0, size: int = 12, mode: str = "L", **options) -> None:
    """Write random pixels that are the seed's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


def write_classes(folder: Path, n: int = 6, names: tuple[str, ...] = ("ill", "well")) -> None:
    for c, name in enumerate(names):
        for i in range(n):
            write_image(folder / name / f"p{i // 2}_{i}.png", seed=100 * c + i)


def write_dicom(path: Path, pixels: np.ndarray, **tags) -> None:
    """Write a CT slice of 16 bits whose stored values are `pixels`; None removes a tag."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds = pydicom.Dataset()
    ds.file_meta, ds.SOPClassUID = meta, CTImageStorage
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns = pixels.shape[-2:]
    bits = 8 * pixels.dtype.itemsize
    values = {"Modality": "CT", "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
              "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1,
              "PixelRepresentation": int(pixels.dtype.kind == "i"), **tags}
    for name, value in values.items():
        if value is not None:
            setattr(ds, name, value)
    ds.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def stretched(values: np.ndarray) -> np.ndarray:
    """Each picture's own range to 0..255, in our own words."""
    share = (values.astype(float) - values.min()) / (np.ptp(values) or 1)
    return np.round(share * 255).astype(np.uint8)


# Layouts ---------------------------------------------------------------------


def test_class_folders_become_labels_in_alphabetical_order(folder, tmp_path):
    write_classes(folder)
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data")
    assert data.class_names == ("ill", "well")
    for part in m.SPLITS:
        split = getattr(data, part)
        assert [data.class_names[c] for c in split.labels] == [i.split("/")[0] for i in split.ids]


def test_train_val_and_test_folders_are_kept(folder, tmp_path):
    for part, n in (("Train", 4), ("validation", 2), ("test", 3)):
        write_classes(folder / part, n)
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data")
    assert [len(part) for part in data.parts.values()] == [8, 4, 6]
    assert all(i.startswith("validation/") for i in data.val.ids)
    assert not any("drawn" in note for note in data.notes)


def test_a_missing_part_is_drawn_from_train(folder, tmp_path):
    for part in ("train", "test"):
        write_classes(folder / part, 10)
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data")
    assert len(data.test) == 20 and all(i.startswith("test/") for i in data.test.ids)
    assert len(data.val) == 4 and all(i.startswith("train/") for i in data.val.ids)
    assert any(note.startswith("val drawn with seed 0") for note in data.notes)


@pytest.mark.parametrize("mark, start", [(",", ""), (";", "\ufeff"), ("\t", "")])
def test_a_csv_gives_label_split_and_patient(folder, tmp_path, mark, start):
    rows = [["Path", "Label ", "Split", "patient"]]
    for i, part in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
        write_image(folder / "all" / f"{i}.png", i)
        rows.append([f"all/{i}.png", ("NA", "sick")[i % 2], part, f"P{i}"])
    text = start + "\r\n".join(mark.join(row) for row in rows)
    (folder / "list.csv").write_text(text, "utf-8")
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data")
    assert data.class_names == ("NA", "sick")
    assert data.test.ids.tolist() == ["all/6.png", "all/7.png"]
    assert data.test.groups.tolist() == ["P6", "P7"]
    by_path = m.load_data(folder / "list.csv", image_size=8, data_dir=tmp_path / "data")
    assert by_path.fingerprint == data.fingerprint


@pytest.mark.parametrize("text, words", [
    ("path,diagnosis\na.png,ill", "columns path and label.*its columns are: path, diagnosis"),
    ("path,label\na.png,ill\nb.png,", "filled in every row; they are not in row 3"),
    ("path,label,split\na.png,ill,train\nb.png,well,", "split is '' in some rows"),
    ("path,label,split\na.png,ill,dev", "split is 'dev' in some rows"),
    ("path,label\na.png,ill\n./a.png,ill", "lists files twice"),
    ("", "columns path and label|not a CSV"),
    ("path,Path,label\na.png,a.png,ill", "has a column twice .*path, path, label. Keep one"),
    ("path,label\na.png,ill, left\nb.png,well,", "longer than its first line.*quotes"),
])
def test_a_csv_with_a_fault_is_named(folder, read, text, words):
    for name in ("a.png", "b.png"):
        write_image(folder / name)
    (folder / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=f"list.csv.*({words})"):
        read(labelled=True)


def test_a_csv_in_another_encoding_says_how_to_save_it(folder, read):
    (folder / "list.csv").write_bytes("path,label\na.png,ödem".encode("cp1252"))
    with pytest.raises(ValueError, match="list.csv is not a CSV file in UTF-8.*'CSV UTF-8'"):
        read(labelled=True)


def test_empty_rows_and_columns_of_a_spreadsheet_are_nothing(folder, read):
    write_image(folder / "a.png")
    (folder / "list.csv").write_text("path;label;;\na.png;ill;;\n;;;\n;;;\n")
    found = read(labelled=True)
    assert found.table["label"].tolist() == ["ill"]
    assert not any("Left out" in note for note in found.notes)


def test_columns_of_the_csv_that_are_not_used_are_named(folder, read):
    write_image(folder / "a.png")
    (folder / "list.csv").write_text("path,label,Fold,age\na.png,ill,test,70\n")
    assert read(labelled=True).notes[0] == (
        "Left out: 2 columns of list.csv besides path, label, split, patient (fold, age).")


@pytest.mark.parametrize("name", ["Patient ID", "patient_id", "PatientID", "patient"])
def test_a_column_of_patient_ids_is_the_patient(folder, read, name):
    write_image(folder / "a.png")
    (folder / "list.csv").write_text(f"path,label,{name}\na.png,ill,P7\n")
    assert read(labelled=True).table["patient"].tolist() == ["P7"]


def test_a_csv_written_on_windows_finds_its_files(folder, read):
    write_image(folder / "all" / "a.png")
    (folder / "list.csv").write_text("path,label\nall\\a.png,ill\n")
    assert read(labelled=True).table["path"].tolist() == ["all/a.png"]


def test_a_file_that_the_csv_lists_and_is_missing_is_named(folder, read):
    (folder / "list.csv").write_text("path,label\ngone.png,ill\n")
    with pytest.raises(FileNotFoundError, match="1 of 1 files .*list.csv lists.*gone.png"):
        read(labelled=True)


def test_images_that_the_csv_does_not_list_are_counted_and_named(folder, read, tmp_path):
    for name in ("a", "b", "c/d", "c/e", "._x"):
        write_image(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "list.csv").write_text("path,label\na.png,ill\nc/d.png,well\n")
    words = "Left out: 2 images that list.csv does not list (b.png, e.png)."
    assert read(labelled=True).notes[0] == words
    (folder / "other.csv").write_text("")  # so it is given by its path
    assert m.read_folder(folder / "list.csv", data_dir=tmp_path / "data").notes[0] == words


def test_a_csv_that_lists_all_images_leaves_none_out(folder, read):
    write_image(folder / "a.png")
    (folder / "again.png").symlink_to("a.png")
    (folder / "list.csv").write_text("path,label\na.png,ill\n")
    assert not any("Left out" in note for note in read(labelled=True).notes)


def test_a_csv_is_found_under_a_name_in_capitals_and_hidden_ones_are_not_counted(folder, read):
    write_image(folder / "all" / "a.png")
    (folder / "LIST.CSV").write_text("path,label\nall/a.png,ill\n")
    (folder / "._list.csv").write_bytes(b"\0\5\x16\7 as a Mac leaves it")
    assert read(labelled=True).table["label"].tolist() == ["ill"]


def test_two_csv_files_are_one_too_many(folder, read):
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text("path,label\n")
    with pytest.raises(ValueError, match="has 2 CSV files. Give the path"):
        read(labelled=True)


@pytest.mark.parametrize("stray, words", [("loose.png", "found loose.png"),
                                          ("train/loose.png", "found other, train/loose.png"),
                                          ("test/a/0.png", "found other")])
def test_an_image_outside_the_layout_is_named(folder, read, stray, words):
    write_image(folder / "other" / "a" / "0.png")
    write_image(folder / stray)
    with pytest.raises(ValueError, match=f"layout of .* is not known: expected a folder.*{words}"):
        read(labelled=True)


def test_a_class_folder_without_an_image_is_named(folder, read):
    write_classes(folder)
    (folder / "lost").mkdir()
    (folder / "lost" / "picture.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="found lost without an image"):
        read(labelled=True)


def test_decoded_pictures_within_the_folder_are_no_class(folder, tmp_path):
    write_classes(folder)
    first, second = (m.load_data(folder, image_size=8, data_dir=folder / "data") for _ in range(2))
    assert first.class_names == second.class_names == ("ill", "well")


def test_a_folder_without_a_train_part_is_an_error(folder, tmp_path):
    write_classes(folder / "test")
    with pytest.raises(ValueError, match="has test but no train part"):
        m.load_data(folder, data_dir=tmp_path / "data")


def test_one_class_only_is_an_error(folder, tmp_path):
    write_classes(folder, names=("ill",))
    with pytest.raises(ValueError, match=r"one class only \(ill\)"):
        m.load_data(folder, data_dir=tmp_path / "data")


@pytest.mark.parametrize("one, other", [("Normal", "normal"), ("\u00d6dem", "O\u0308dem")])
def test_classes_that_differ_in_how_they_are_written_only_are_an_error(folder, tmp_path, one,
                                                                       other):
    rows = ["path,label"]
    for i in range(6):
        write_image(folder / f"{i}.png", i)
        rows.append(f"{i}.png,{(one, other, 'ill')[i % 3]}")
    (folder / "list.csv").write_text("\n".join(rows), "utf-8")
    with pytest.raises(ValueError, match="has classes that differ in capitals .*Give them one"):
        m.load_data(folder, data_dir=tmp_path / "data")


def test_folders_within_a_class_are_offered_as_patients(folder, tmp_path):
    for i in range(24):
        write_image(folder / ("ill", "well")[i % 2] / f"patient{i // 2}" / f"{i}.png", i)
    notes = m.load_data(folder, image_size=8, data_dir=tmp_path / "data").notes
    hint = next(note for note in notes if "if these are the patients" in note)
    rule = re.search("patient='(.*)'", hint)[1]
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data",
                       options=m.ReadOptions(patient=rule))
    assert {name for part in data.parts.values() for name in part.groups} == {
        f"patient{i}" for i in range(12)}
    assert "Patients: 12, with up to 2 of 24 files." in data.notes
    write_classes(folder / "plain")
    assert not any("if these" in note for note in m.load_data(
        folder / "plain", image_size=8, data_dir=tmp_path / "data").notes)


def test_a_folder_without_images_says_what_it_left_out(folder, read):
    (folder / "readme.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no PNG.* Left out: 1 .txt files"):
        read()


def test_a_folder_with_the_name_of_a_data_set_is_not_taken_for_it(tmp_path):
    write_classes(tmp_path / "phantom")
    data = m.load_data(tmp_path / "phantom", image_size=8, data_dir=tmp_path / "data")
    assert data.name == "phantom-folder" and not data.demo


@pytest.mark.parametrize("option, words", [
    ({"on_error": "ignore"}, "on_error 'ignore'"), ({"window": "lungs"}, "window 'lungs'"),
    ({"window": "40, 0"}, "width above 0"), ({"slices": "0"}, "slices is '0'"),
    ({"plane": "Axial"}, "Did you mean 'axial'"), ({"patient": "p_"}, "one group in brackets"),
    ({"patient": "(p"}, r"patient is '\(p'"),
])
def test_a_wrong_option_is_named(option, words):
    with pytest.raises(ValueError, match=words):
        m.ReadOptions(**option)


def test_pixels_of_a_type_that_is_not_offered_are_refused(folder):
    write_image(folder / "a.png")
    with pytest.raises(ValueError, match="dtype 'uint16' is not known"):
        m.read_folder(folder, dtype="uint16", labelled=False)


# Splits ----------------------------------------------------------------------


def test_a_drawn_split_is_stratified_and_keeps_patients_whole(folder, tmp_path):
    write_classes(folder, 24)
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data",
                       options=m.ReadOptions(patient=r"(\w+/p\d+)_"))
    groups = [set(getattr(data, part).groups) for part in m.SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 24
    assert [np.bincount(getattr(data, p).labels).tolist() for p in m.SPLITS] == [
        [14, 14], [4, 4], [6, 6]]


def test_a_patient_rule_that_matches_nothing_is_an_error(folder, tmp_path):
    write_classes(folder)
    with pytest.raises(ValueError, match=r"patient is '\(subject.*no path matches.*'ill/p0_0.png'"):
        m.load_data(folder, image_size=8, data_dir=tmp_path / "data",
                    options=m.ReadOptions(patient=r"(subject\d+)"))


def test_the_same_seed_draws_the_same_split_another_seed_another(folder, tmp_path):
    write_classes(folder, 12)
    first, same, other = (m.load_data(folder, image_size=8, data_dir=tmp_path / "data", seed=seed)
                          for seed in (3, 3, 4))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert set(first.train.ids) != set(other.train.ids)


def test_the_drawn_split_is_saved_and_holds_when_copied_into_the_folder(folder, tmp_path):
    write_classes(folder, 12)
    drawn = m.load_data(folder, image_size=8, data_dir=tmp_path / "data", seed=3)
    saved, = (tmp_path / "data" / "decoded").glob("in_*_seed3.csv")
    shutil.copy(saved, folder)
    write_image(folder / "ill" / "added_later.png", 999)
    again = m.load_data(folder, image_size=8, data_dir=tmp_path / "data", seed=7)
    for part in m.SPLITS:
        assert getattr(again, part).fingerprint == getattr(drawn, part).fingerprint


def test_too_few_patients_to_draw_a_split_are_named(folder, tmp_path):
    write_classes(folder, 4)
    with pytest.raises(ValueError, match="class ill has 2 patients.*3 are needed to draw test.*"
                                         "name these by patient="):
        m.load_data(folder, data_dir=tmp_path / "data", options=m.ReadOptions(patient=r"(p\d)_"))


def test_three_patients_a_class_are_enough(folder, tmp_path):
    write_classes(folder, 3)
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data")
    assert [sorted(getattr(data, part).labels) for part in m.SPLITS] == [[0, 1]] * 3


def draw(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return the part of each image of a pool, drawn by class and patient."""
    pool = m.Split(np.zeros((len(labels), 1, 1), np.uint8), labels,
                   np.arange(len(labels)).astype(str), groups)
    parts = np.full(len(labels), "train")
    m._draw_parts("pool", pool, parts, ("test", "val"), "abcd", seed)
    return parts


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_three_patients_does_not_shrink_the_others_training_part(seed):
    labels = np.repeat([0, 1, 2], (200, 200, 6))
    parts = draw(labels, (np.arange(406) // 2).astype(str), seed)
    counts = [np.bincount(labels[parts == part]).tolist() for part in m.SPLITS]
    assert [row[2] for row in counts] == [2, 2, 2]
    assert 110 <= min(counts[0][:2]) and max(counts[0][:2]) <= 130  # of 200, three fifths


def test_patients_of_unequal_size_give_parts_with_every_class_and_about_their_share():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sizes = np.maximum(1, rng.lognormal(1.5, 1.2, 40).astype(int))
        groups = np.repeat(np.arange(40), sizes)
        labels = np.repeat(np.arange(40) % 10 % 3, sizes)
        labels = np.where(rng.random(len(labels)) < 0.02, (labels + 1) % 3, labels)  # some have two
        parts = draw(labels, groups.astype(str), seed)
        assert all(len(set(parts[groups == person])) == 1 for person in range(40))
        for part, share in zip(m.SPLITS, (0.6, 0.15, 0.25)):
            assert len(set(labels[parts == part])) == 3
            assert abs((parts == part).mean() - share) < 0.13


@pytest.mark.parametrize("seed", [207, 932, 1123, 1156])  # of 1,500: a greedy test part fails here
def test_the_test_part_leaves_a_patient_of_each_class_to_train_and_to_val(seed):
    rng = np.random.default_rng(seed)
    n_patients, n_classes = rng.integers(8, 60), rng.integers(2, 5)
    sizes = np.maximum(1, rng.lognormal(1.5, 1, n_patients).astype(int))
    labels = rng.choice(n_classes, n_patients, p=rng.dirichlet([2] * n_classes))
    groups, labels = (np.repeat(a, sizes) for a in (np.arange(n_patients).astype(str), labels))
    several = np.repeat(rng.random(n_patients) < 0.1, sizes)  # patients with several labels
    labels = np.where(several, rng.integers(0, n_classes, len(labels)), labels)
    if rng.random() < 0.3:
        groups = np.where(rng.random(len(groups)) < 0.2, "", groups)
    labels = np.unique(labels, return_inverse=True)[1]
    parts = draw(labels, groups, seed)
    assert all(set(labels[parts == part]) == set(labels) for part in m.SPLITS)


def test_drawn_parts_hold_the_pictures_of_their_ids(folder, tmp_path):
    write_classes(folder, 12)
    data = m.load_data(folder, image_size=12, data_dir=tmp_path / "data")
    for split in (data.train, data.val, data.test):
        for image, name in zip(split.images, split.ids, strict=True):
            assert np.array_equal(image, np.asarray(Image.open(folder / name)))


def test_a_folder_can_be_checked_split_anew_and_trained_on(folder, tmp_path):
    for part in ("train", "val", "test"):
        for c, name in enumerate(("dark", "light")):
            for i in range(4):
                grey = np.random.default_rng([c, i, len(part)]).integers(0, 99, (32, 32)) + 99 * c
                path = folder / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(grey.astype(np.uint8)).save(path)
    data = m.load_data(folder, image_size=32, data_dir=tmp_path / "data",
                       options=m.ReadOptions(patient="(.*)"))
    m.check_splits(data).raise_for_errors()
    assert len(m._regroup(data, 0).train) > 0
    backbone, report = m.load_backbone("random", seed=0)
    run = m.fine_tune(backbone, report, data, m.FineTuneConfig.named(
        "demo", epochs=1, image_size=32), runs_dir=tmp_path / "runs", progress="none")
    assert run.predictions["scores"].shape == (8, 2)


def test_mean_and_std_are_those_of_the_training_images(folder, tmp_path):
    write_classes(folder, 12)
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data")
    assert data.mean == pytest.approx((data.train.images.mean() / 255,) * 3, rel=1e-5)
    assert data.std == pytest.approx((data.train.images.std() / 255,) * 3, rel=1e-5)


# The cache -------------------------------------------------------------------


def test_a_second_call_decodes_nothing(folder, read, monkeypatch):
    write_classes(folder)
    first = read()
    monkeypatch.setattr(m, "_read_file", lambda *_, **__: pytest.fail("a file was opened"))
    second = read()
    assert np.array_equal(first.images, second.images)
    assert isinstance(second.images, np.memmap)
    assert second.table.equals(first.table)


@pytest.mark.parametrize("change", ["pixels", "added", "removed", "option", "size"])
def test_whatever_changes_the_pixels_decodes_anew(folder, read, change):
    write_dicom(folder / "a.dcm", RAMP.astype(np.int16), RescaleSlope=1, RescaleIntercept=0)
    write_image(folder / "b.png", 1)
    before = read()
    if change == "pixels":
        write_image(folder / "b.png", 2)
    elif change == "added":
        write_image(folder / "c.png", 3)
    elif change == "removed":
        (folder / "b.png").unlink()
    after = read(image_size=6 if change == "size" else 8,
                 window="0, 500" if change == "option" else "")
    assert after.cache != before.cache
    assert not np.array_equal(after.images, before.images)


@pytest.mark.parametrize("damage", ["cut", "record", "half"])
def test_a_damaged_cache_is_made_again(folder, read, damage):
    write_classes(folder)
    first = read()
    right, cache = np.array(first.images), first.cache
    if damage == "cut":
        cache.write_bytes(cache.read_bytes()[:-9])
    elif damage == "record":
        cache.with_suffix(".json").write_text("{")
    else:
        cache.with_suffix(".json").unlink()
    assert np.array_equal(read().images, right)


def test_what_a_killed_process_left_is_cleared_away(folder, read):
    write_classes(folder)
    left = read().cache.with_name(f".{read().cache.name}.0123456789ab.tmp")
    left.write_text("half a file")
    read()
    assert not left.exists()


def test_a_full_disk_is_an_error_and_leaves_nothing(folder, read, tmp_path, monkeypatch):
    write_classes(folder)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(m.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        read()
    assert [p.name for p in (tmp_path / "data" / "decoded").iterdir()
            if not p.name.endswith(".lock")] == []


def test_two_at_once_give_the_same_pictures(folder, read):
    write_classes(folder, 20)
    with m.ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: read(), range(2))
    assert one.cache == two.cache and np.array_equal(one.images, two.images)


def test_many_files_come_in_the_order_of_the_table(folder, read):
    for i in range(300):  # more than are held in memory at once
        Image.new("L", (1, 1), i % 251).save(folder / f"{i:03d}.png")
    found = read()
    assert found.table["path"].tolist() == [f"{i:03d}.png" for i in range(300)]
    assert found.images[:, 0, 0].tolist() == [i % 251 for i in range(300)]


# X1: 16 bits -----------------------------------------------------------------


DEEP = (np.arange(64).reshape(8, 8) * 60 + 200).astype(np.uint16)


@pytest.mark.parametrize("end", ["png", "tif"])
def test_x1_16_bits_are_scaled_over_their_own_range_and_noted(folder, read, end):
    Image.fromarray(DEEP).save(folder / f"a.{end}")
    found = read()
    assert np.array_equal(found.images[0], stretched(DEEP))
    assert "1 files have more than 8 bits, scaled each over its own range." in found.notes


def test_x1_a_window_in_own_units_is_applied(folder, read):
    Image.fromarray(DEEP).save(folder / "a.png")
    expected = np.clip((DEEP.astype(float) - 1000) / 2000, 0, 1) * 255
    assert np.array_equal(read(window="2000, 2000").images[0], np.round(expected))


def test_x1_a_window_in_hounsfield_units_is_refused_for_a_png(folder, read):
    Image.fromarray(DEEP).save(folder / "a.png")
    with pytest.raises(ValueError, match="a.png: its grey values are not known to be Hounsfield"):
        read(window="lung")


@pytest.mark.parametrize("slope, intercept", [(1, -1024), (2.5, -900)])
def test_x1_dicom_is_rescaled_before_the_window(folder, read, slope, intercept):
    write_dicom(folder / "a.dcm", DEEP, RescaleSlope=slope, RescaleIntercept=intercept)
    hounsfield = DEEP.astype(float) * slope + intercept
    expected = np.clip((hounsfield + 1350) / 1500, 0, 1) * 255
    assert np.abs(read(window="lung").images[0] - expected).max() <= 0.51


@pytest.mark.parametrize("sequence", ["SharedFunctionalGroupsSequence",
                                      "PerFrameFunctionalGroupsSequence"])
def test_x1_an_enhanced_dicom_is_rescaled_as_each_frame_says(folder, read, sequence):
    groups = []
    for slope in (1, 2):
        rescale, group = pydicom.Dataset(), pydicom.Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept = slope, -1000
        group.PixelValueTransformationSequence = [rescale]
        groups.append(group)
    shared = sequence.startswith("Shared")
    write_dicom(folder / "a.dcm", np.stack([DEEP, DEEP]), NumberOfFrames=2,
                **{sequence: groups[:1] if shared else groups})
    for image, slope in zip(read(window="lung", slices="all").images, (1, 1 if shared else 2)):
        expected = np.clip((DEEP.astype(float) * slope - 1000 + 1350) / 1500, 0, 1) * 255
        assert np.abs(image - expected).max() <= 0.51


def test_x1_dicom_without_rescale_has_no_hounsfield_units(folder, read):
    write_dicom(folder / "a.dcm", DEEP)
    with pytest.raises(ValueError, match="not known to be Hounsfield"):
        read(window="lung")
    assert np.array_equal(read().images[0], stretched(DEEP))


def test_x1_mr_has_no_hounsfield_units(folder, read):
    write_dicom(folder / "a.dcm", DEEP, Modality="MR", RescaleSlope=1, RescaleIntercept=0)
    with pytest.raises(ValueError, match="not known to be Hounsfield"):
        read(window="brain")


def test_x1_negative_values_are_not_clipped(folder, read):
    values = DEEP.astype(np.int16) - 3000
    write_dicom(folder / "a.dcm", values)
    assert np.array_equal(read().images[0], stretched(values))


def test_x1_padding_outside_the_scan_does_not_stretch_the_range(folder, read):
    values = DEEP.astype(np.int16)
    values[0, 0] = -2000
    write_dicom(folder / "a.dcm", values, PixelPaddingValue=-2000)
    image, inside = read().images[0], DEEP[DEEP != DEEP[0, 0]]
    assert image[0, 0] == 0
    assert np.array_equal(image[DEEP != DEEP[0, 0]], stretched(inside))


def test_x1_8_bit_pictures_stay_as_they_are(folder, read):
    Image.fromarray(RAMP).save(folder / "a.png")
    write_dicom(folder / "b.dcm", RAMP)
    for image in read().images:
        assert np.array_equal(image, RAMP)


def test_x1_floats_that_are_not_finite_are_refused(folder, read):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "a.tif")
    with pytest.raises(ValueError, match="a.tif: its grey values go from nan"):
        read()


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG of any header: Pillow writes no 16 bits in colour, and no size that lies."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I4s", len(body), name) + body
        data += struct.pack(">I", zlib.crc32(name + body))
    return data


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_x1_a_png_of_16_bits_in_colour_is_refused_not_cut_to_8(folder, read, channels):
    pixels = np.stack([DEEP] * channels, 2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    (folder / "a.png").write_bytes(png(8, 8, 16, {2: 4, 3: 2, 4: 6}[channels], rows))
    with pytest.raises(ValueError, match="a.png: colour, or grey with transparency, of 16 bits"):
        read()


@pytest.mark.parametrize("planes", [1, 2])  # channels together, or one after the other
def test_x1_a_tiff_of_16_bits_in_colour_is_refused_not_cut_to_8(folder, read, planes):
    pixels = np.stack([DEEP] * 3, 2)
    pixels = pixels if planes == 1 else pixels.transpose(2, 0, 1)
    size, strips = pixels.nbytes, 1 if planes == 1 else 3
    starts, lengths = [8 + i * size // strips for i in range(strips)], [size // strips] * strips
    lists = [np.array([16] * 3, "<u2"), np.array(starts, "<u4"), np.array(lengths, "<u4")]
    at = 8 + size + np.cumsum([0, *(values.nbytes for values in lists)])
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, at[0]), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, strips, at[1] if strips > 1 else 8), (277, 3, 1, 3), (278, 3, 1, 8),
            (279, 4, strips, at[2] if strips > 1 else size), (284, 3, 1, planes)]
    (folder / "a.tif").write_bytes(b"".join([
        b"II*\0", int(at[3]).to_bytes(4, "little"), pixels.astype("<u2").tobytes(),
        *(values.tobytes() for values in lists), len(tags).to_bytes(2, "little"),
        *(struct.pack("<HHII", *map(int, tag)) for tag in tags), bytes(4)]))
    with pytest.raises(ValueError, match="a.tif: colour, or grey with transparency, of 16 bits"):
        read()


def test_x1_a_tiff_of_16_bits_whose_0_is_white_is_inverted_as_viewers_do(folder, read):
    Image.fromarray(DEEP).save(folder / "a.tif", tiffinfo={262: 0})  # Pillow does it for 8 bits
    assert np.abs(read().images[0] - (255.0 - stretched(DEEP))).max() <= 1


# X2, X3, X4: broken, junk, links ---------------------------------------------


def break_files(folder: Path) -> None:
    """Leave three broken files among twelve good ones."""
    write_classes(folder)
    good = (folder / "ill" / "p0_0.png").read_bytes()
    (folder / "ill" / "cut.png").write_bytes(good[:len(good) // 2])
    (folder / "ill" / "page.png").write_text("<html>Please log in</html>")
    (folder / "well" / "flat.dcm").write_bytes(b"\0" * 200)


def test_x2_one_report_names_every_broken_file_and_why(folder, read):
    break_files(folder)
    with pytest.raises(ValueError, match="3 of 15 files can't be read") as caught:
        read(labelled=True)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:4]] == [
        "ill/cut.png", "ill/page.png", "well/flat.dcm"]
    assert "a web page" in lines[2] and "no DICOM file" in lines[3]
    assert "on_error='skip'" in lines[4]


def test_x2_skipped_files_are_recorded_and_the_rest_is_right(folder, tmp_path):
    break_files(folder)
    data = m.load_data(folder, image_size=12, data_dir=tmp_path / "data",
                       options=m.ReadOptions(on_error="skip"))
    assert sum(map(len, data.parts.values())) == 12
    assert any(n.startswith("on_error='skip': 3 of 15 files can't be read") and "ill/cut.png" in n
               for n in data.notes)
    for split in (data.train, data.val, data.test):
        for image, name in zip(split.images, split.ids, strict=True):
            assert np.array_equal(image, np.asarray(Image.open(folder / name)))


def test_x2_nothing_but_broken_files_is_an_error_even_if_skipped(folder, read):
    (folder / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="1 of 1 files can't be read"):
        read(on_error="skip")


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_x2_a_class_or_part_that_skipping_would_lose_is_an_error(folder, read, parts):
    for part in parts:
        write_classes(folder / part, 3, ("a", "b", "c"))
    for path in (folder / parts[-1] / "c").iterdir():
        path.write_text("no image")
    with pytest.raises(ValueError, match=f"nothing is left of {Path(parts[-1], 'c').as_posix()}."):
        read(labelled=True, on_error="skip")


def test_x2_a_flipped_bit_in_a_png_is_noticed(folder, read):
    write_image(folder / "a.png", size=64)
    data = bytearray((folder / "a.png").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="a.png: .*(checksum|broken)"):
        read()


def test_x3_junk_is_left_out_with_a_count(folder, read):
    write_classes(folder)
    for name in ("._p0_0.png", "Thumbs.db", ".DS_Store", "notes.txt", "more.txt", "empty.png"):
        (folder / "ill" / name).write_bytes(b"" if name.startswith("empty") else b"junk")
    (folder / "__MACOSX" / "ill").mkdir(parents=True)
    (folder / "__MACOSX" / "ill" / "p0_0.png").write_text("junk")
    write_image(folder / "ill" / "@eaDir" / "p0_0.png" / "SYNOFILE_THUMB_M.png")
    found = read(labelled=True)
    assert len(found.table) == 12
    assert found.notes[0] == "Left out: 1 .db files, 2 .txt files, 1 empty files, 2 hidden files."


def test_x4_loops_and_dangling_links_end_and_each_file_is_read_once(folder, read):
    write_classes(folder)
    (folder / "ill" / "loop").symlink_to(folder)
    (folder / "well" / "here").symlink_to(".")
    (folder / "well" / "gone.png").symlink_to("nowhere.png")
    (folder / "well" / "zz_again.png").symlink_to(folder / "ill" / "p0_0.png")
    found = read(labelled=True)
    assert sorted(found.table["path"]) == sorted(
        f"{c}/p{i // 2}_{i}.png" for c in ("ill", "well") for i in range(6))
    assert found.notes[0] == ("Left out: 2 folders met a second time, by a link, 1 links that lead "
                              "nowhere, 1 links to files met before.")


def test_x4_a_folder_of_links_is_read_through(folder, read, tmp_path):
    write_classes(tmp_path / "elsewhere")
    for name in ("ill", "well"):
        (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    assert len(read(labelled=True).table) == 12


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_x4_a_pipe_with_an_image_name_does_not_hang(folder, read):
    write_image(folder / "a.png")
    os.mkfifo(folder / "b.png")
    assert read().notes[0] == "Left out: 1 things that are no file."


def test_x4_a_name_that_is_no_utf_8_is_read(folder, read):
    write_image(folder / "a.png")
    try:
        os.rename(folder / "a.png", os.fsencode(folder) + b"/\xff\x1b[31m.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert read().table["id"].tolist() == [r"\xff\x1b[31m.png"]


# X5: what a viewer shows -----------------------------------------------------


def rgba(alpha: int) -> Image.Image:
    pixels = np.full((8, 8, 4), (200, 100, 50, alpha), np.uint8)
    return Image.fromarray(pixels, "RGBA")


@pytest.mark.parametrize("mode, expected", [
    ("RGBA", (100, 50, 25)), ("LA", (62, 62, 62)), ("P", (200, 100, 50)), ("1", (255, 255, 255)),
    ("CMYK", (200, 100, 50)), ("YCbCr", (200, 100, 50)), ("RGB", (200, 100, 50)),
])
def test_x5_every_mode_shows_what_a_viewer_shows(folder, read, mode, expected):
    image = rgba(128) if mode in ("RGBA", "LA") else rgba(255).convert("RGB")
    if mode == "1":
        image = Image.new("1", (8, 8), 1)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(folder / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png"))
    write_image(folder / "colour.png", mode="RGB")  # so that all become RGB
    assert np.abs(read().images[0].astype(int) - expected).max() <= 2


def test_x5_a_transparent_palette_colour_is_black(folder, read):
    image = rgba(255).convert("RGB").quantize(4)
    image.save(folder / "a.png", transparency=image.getpixel((0, 0)))
    assert read().images.max() == 0


@pytest.mark.parametrize("kind", ["jpg", "tif", "png"])
@pytest.mark.parametrize("mark, turn", [(3, 2), (6, 3), (8, 1)])
def test_x5_exif_rotation_is_applied(folder, read, kind, mark, turn):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4, :4] = 255
    exif = Image.Exif()
    exif[274] = mark
    options = {"quality": 100} if kind == "jpg" else {}
    Image.fromarray(pixels).save(folder / f"a.{kind}", exif=exif, **options)
    assert np.abs(read().images[0].astype(int) - np.rot90(pixels, turn)).max() < 10


def test_x5_a_1_by_1_picture_is_read_and_reported(folder, read):
    Image.new("L", (1, 1), 77).save(folder / "a.png")
    found = read()
    assert (found.images == 77).all()
    assert "1 files are smaller than 32 pixels." in found.notes


def test_x5_grey_files_stay_grey_and_mixed_ones_become_rgb(folder, read):
    write_image(folder / "a.png", 1, size=8)
    assert read().images.shape == (1, 8, 8)
    write_image(folder / "b.png", 2, mode="RGB")
    images = read().images
    assert images.shape == (2, 8, 8, 3)
    assert np.array_equal(images[0], np.asarray(Image.open(folder / "a.png").convert("RGB")))


def test_x5_a_page_in_colour_makes_the_grey_one_before_it_rgb(folder, read):
    pages = [Image.fromarray(RAMP), Image.new("RGB", (8, 8), (200, 100, 50))]
    pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
    first, second = read(slices="all").images
    assert np.array_equal(first, np.stack([RAMP] * 3, 2))
    assert (second == (200, 100, 50)).all()


def test_x5_odd_names_and_modes_are_reported(folder, read):
    write_image(folder / "a.png", 1, format="JPEG")
    write_image(folder / "b.png", 2, mode="RGB")
    notes = read().notes
    assert "2 files: JPEG 1, PNG 1; pixels: L 1, RGB 1." in notes
    assert "1 JPEG files are named .png." in notes


# X6: bombs -------------------------------------------------------------------


@pytest.mark.parametrize("side", [7_072, 12_000, 60_000])
def test_x6_a_png_above_the_limit_is_refused_before_it_is_decoded(folder, read, side):
    (folder / "bomb.png").write_bytes(png(side, side, 8, 0, b"\0" * 1000))  # next to no pixels
    with pytest.raises(ValueError, match="bomb.png: .*(limit is 50,000,000 pixels|bomb)"):
        read()


def test_x6_a_dicom_above_the_limit_is_refused(folder, read):
    write_dicom(folder / "a.dcm", RAMP)
    ds = pydicom.dcmread(folder / "a.dcm")
    for tags in ({"Rows": 65535, "Columns": 65535}, {"NumberOfFrames": "20000"}):
        for name, value in tags.items():
            setattr(ds, name, value)
        ds.save_as(folder / "a.dcm")
        with pytest.raises(ValueError, match="a.dcm: .*the limit is"):
            read()
        ds = pydicom.dcmread(folder / "a.dcm")
        ds.Rows = ds.Columns = 8


def test_x6_a_deflated_dicom_is_refused(folder, read):
    write_dicom(folder / "a.dcm", RAMP)
    ds = pydicom.dcmread(folder / "a.dcm")
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(folder / "a.dcm")
    with pytest.raises(ValueError, match="a deflated DICOM file; convert it first"):
        read()


def test_x6_a_nifti_header_that_lies_is_refused(folder, read):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), folder / "a.nii")
    data = bytearray((folder / "a.nii").read_bytes())
    data[42:48] = np.array([30000] * 3, "<i2").tobytes()
    (folder / "a.nii.gz").write_bytes(gzip.compress(bytes(data)))
    (folder / "a.nii").unlink()
    with pytest.raises(ValueError, match="a.nii.gz: .*the limit is"):
        read()


# X7: DICOM, NIfTI ------------------------------------------------------------


def test_x7_monochrome1_is_inverted(folder, read):
    write_dicom(folder / "a.dcm", DEEP, PhotometricInterpretation="MONOCHROME1")
    write_dicom(folder / "b.dcm", RAMP, PhotometricInterpretation="MONOCHROME1")
    first, second = read().images
    assert np.abs(first - (255.0 - stretched(DEEP))).max() <= 1
    assert np.array_equal(second, 255 - RAMP)


FRAMES = np.stack([np.full((8, 8), 10 * i, np.uint8) for i in range(9)])


@pytest.mark.parametrize("slices, expected", [("middle", [4]), ("all", [*range(9)]),
                                              ("3", [1, 4, 7]), ("99", [*range(9)])])
@pytest.mark.parametrize("kind", ["dcm", "tif"])
def test_x7_of_several_frames_the_stated_ones_are_taken(folder, read, kind, slices, expected):
    if kind == "dcm":
        write_dicom(folder / "a.dcm", FRAMES, NumberOfFrames=9)
    else:
        pages = [Image.fromarray(frame) for frame in FRAMES]
        pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
    found = read(slices=slices)
    assert (found.images[:, 0, 0] / 10).tolist() == expected
    assert found.table["id"].tolist() == [f"a.{kind}#{i}" for i in expected]
    assert f"1 files hold several pictures, of which slices={slices!r}." in found.notes


def test_x7_pictures_of_one_file_stay_together(folder, tmp_path):
    for name in ("ill", "well"):
        for i in range(6):
            frames = np.random.default_rng([len(name), i]).integers(0, 255, (4, 8, 8))
            write_dicom(folder / name / f"{i}.dcm", frames.astype(np.uint8), NumberOfFrames=4)
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data",
                       options=m.ReadOptions(slices="all"))
    files = [{i.split("#")[0] for i in getattr(data, part).ids} for part in m.SPLITS]
    assert sum(map(len, files)) == len(set.union(*files)) == 12
    assert m.check_splits(data).errors == []


def test_x7_patientid_is_the_group(folder, tmp_path):
    for i in range(24):
        write_dicom(folder / ("ill", "well")[i % 2] / f"{i}.dcm", DEEP + np.uint16(3 * i) ** 2,
                    PatientID=f"MR{i // 4}-{i % 2}")
    data = m.load_data(folder, image_size=8, data_dir=tmp_path / "data")
    groups = [set(getattr(data, part).groups) for part in m.SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 12


def test_x7_patients_named_by_the_list_and_by_patientid_are_noted(folder, read):
    for i in range(3):
        write_dicom(folder / f"{i}.dcm", DEEP + np.uint16(i), PatientID=f"00{i}")
    (folder / "list.csv").write_text("path,label,patient\n0.dcm,ill,P0\n1.dcm,ill,\n2.dcm,ill,\n")
    found, note = read(labelled=True), "2 files take their patient from PatientID, as list or rule"
    assert found.table["patient"].tolist() == ["P0", "001", "002"]
    assert any(line.startswith(note) for line in found.notes)
    (folder / "list.csv").write_text("path,label\n0.dcm,ill\n1.dcm,ill\n2.dcm,ill\n")
    assert not any("take their patient" in line for line in read(labelled=True).notes)


def test_x7_one_patientid_for_all_is_no_patient(folder, read):
    for i in range(3):
        write_dicom(folder / f"{i}.dcm", DEEP, PatientID="ANON")
    found = read()
    assert set(found.table["patient"]) == {""}
    assert "All DICOM files carry the same PatientID; it is taken for none." in found.notes


@pytest.mark.parametrize("tag, number", [("Columns", "(0028,0011)"), ("BitsAllocated",
                                                                      "(0028,0100)")])
def test_x7_a_missing_tag_is_named_with_the_file(folder, read, tag, number):
    write_dicom(folder / "a.dcm", RAMP)
    ds = pydicom.dcmread(folder / "a.dcm")
    delattr(ds, tag)
    ds.save_as(folder / "a.dcm")
    with pytest.raises(ValueError, match=f"a.dcm: .*lacks the tag {tag} {re.escape(number)}"):
        read()


def test_x7_a_file_without_pixels_is_named(folder, read):
    write_dicom(folder / "a.dcm", RAMP)
    ds = pydicom.dcmread(folder / "a.dcm")
    del ds.PixelData
    ds.save_as(folder / "a.dcm")
    with pytest.raises(ValueError, match="a.dcm: .*[Pp]ixel ?[Dd]ata"):
        read()


def test_x7_a_missing_decoder_names_syntax_and_package_and_heals(folder, read):
    shutil.copy(get_testdata_file("MR_small_jp2klossless.dcm", download=False), folder)
    with faults_data.no_decoder(JPEG2000Lossless), pytest.raises(
            ValueError, match="lossless.dcm: its transfer syntax, JPEG 2000 .*"
                              "pip install pylibjpeg pylibjpeg-libjpeg"):
        read()
    assert read().images.max() > 0  # the decoder is there now


@pytest.mark.skipif(find_spec("libjpeg") is not None, reason="the decoder is installed")
def test_x7_a_decoder_that_cannot_names_one_that_may(folder, read):
    shutil.copy(get_testdata_file("JPGExtended.dcm", download=False), folder)  # of 12 bits
    with pytest.raises(ValueError, match="JPEG Extended .*, needs another decoder.*: pip install "
                                         "pylibjpeg pylibjpeg-libjpeg"):
        read()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_x2_a_file_that_may_be_read_now_is_read(folder, read):
    write_image(folder / "a.png")
    (folder / "a.png").chmod(0)
    with pytest.raises(ValueError, match="a.png: .*[Pp]ermission"):
        read()
    (folder / "a.png").chmod(0o600)
    assert len(read().table) == 1


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm",
                                  "MR_small_implicit.dcm", "MR_small_bigendian.dcm"])
def test_x7_a_compressed_file_gives_the_pixels_of_the_plain_one(folder, read, name):
    for i, source in enumerate(("MR_small.dcm", name)):
        shutil.copy(get_testdata_file(source, download=False), folder / f"{i}.dcm")
    plain, other = read(image_size=64).images
    assert np.array_equal(plain, other) and plain.max() == 255


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm"])
def test_x7_pixels_that_are_read_after_the_header_are_the_same(folder, read, name, monkeypatch):
    shutil.copy(get_testdata_file(name, download=False), folder / "a.dcm")
    at_once = np.array(read(image_size=64).images)
    monkeypatch.setattr(m, "DICOM_DEFERRED", 100)  # bytes, as if the file were large
    anew = read(image_size=64, slices="all").images  # another option, so nothing is mapped
    assert np.array_equal(anew, at_once)


def test_x7_a_palette_becomes_its_colours(folder, read):
    path = get_testdata_file("examples_palette.dcm", download=False)
    shutil.copy(path, folder / "a.dcm")
    ds = pydicom.dcmread(path)
    right = pydicom.pixels.apply_color_lut(ds.pixel_array, ds) // 257
    image = read(image_size=400).images[0]
    assert image.shape == (400, 400, 3)
    assert np.abs(image.mean((0, 1)) - right.mean((0, 1))).max() < 1


def test_x7_dicom_without_a_suffix_is_found_and_its_index_left_out(folder, read):
    write_dicom(folder / "IM000001", DEEP)
    shutil.copy(folder / "IM000001", folder / "DICOMDIR")
    found = read()
    assert found.table["path"].tolist() == ["IM000001"]
    assert found.notes[0] == "Left out: 1 DICOMDIR files."


# Axes of the volume -> where right (R), front (A) and top (S) lie.
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRP", "ALI"])
@pytest.mark.parametrize("plane, lit", [("axial", "AR"), ("coronal", "SR"), ("sagittal", "SA")])
@pytest.mark.parametrize("end", ["nii", "nii.gz"])
def test_nifti_is_cut_in_the_stated_plane_whatever_its_axes(folder, read, codes, plane, lit, end):
    volume = np.zeros((8, 8, 8), np.int16)  # patient's axes: right, front, top
    volume[4:] += 1
    volume[:, 4:] += 2
    volume[:, :, 4:] += 4
    ras = nibabel.Nifti1Image(volume, np.eye(4))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(np.eye(4)), nibabel.orientations.axcodes2ornt(codes))
    nibabel.save(ras.as_reoriented(turn), folder / f"a.{end}")
    value = {"R": 1, "A": 2, "S": 4}
    image = read(plane=plane).images[0]
    up, left = (value[letter] for letter in lit)  # top half and left half are brighter by these
    expected = np.zeros((8, 8))
    expected[:4] += up
    expected[:, :4] += left
    assert np.array_equal(image, stretched(expected))


def test_nifti_slices_are_rescaled_windowed_and_numbered_from_below(folder, read):
    values = np.stack([np.full((4, 4), 100 * k) for k in range(6)], 2).astype(np.int16)
    values[0, 0] = -1000
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(2, -50)
    nibabel.save(image, folder / "a.nii.gz")
    found = read(slices="all", window="450, 1000")
    assert found.table["id"].tolist() == [f"a.nii.gz#{k}" for k in range(6)]
    expected = [round((200 * k - 50 + 50) / 1000 * 255) for k in range(6)]
    assert found.images[:, 0, 0].tolist() == expected


def test_a_nifti_volume_is_its_own_patient(folder, read):
    for name in ("a", "b"):
        nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((4, 4, 4)), np.eye(4)),
                     folder / f"{name}.nii")
    found = read(slices="2")
    assert found.table["patient"].tolist() == ["in/a.nii"] * 2 + ["in/b.nii"] * 2
    assert ("2 files of several pictures count as a patient each: name the patients if one has "
            "several files.") in found.notes
    assert not any("a patient each" in note for note in read(patient=r"([ab])\.nii").notes)


def test_volumes_of_the_same_name_in_two_folders_are_two_patients(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        volume = nibabel.Nifti1Image(np.zeros((4, 4, 4)), np.eye(4))
        nibabel.save(volume, tmp_path / place / "1.nii")
    here, there = (m.read_folder(tmp_path / place, image_size=8, data_dir=tmp_path / "data",
                                 labelled=False).table["patient"] for place in ("here", "there"))
    assert not set(here) & set(there)


def test_a_nifti_volume_with_a_fourth_axis_of_length_1_is_a_volume(folder, read):
    values = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(values[..., None], np.eye(4)), folder / "b.nii.gz")
    found = read(slices="all")
    assert len(found.images) == 8 and np.array_equal(found.images[:4], found.images[4:])


@pytest.mark.parametrize("window", ["", "0, 400"])
def test_nifti_nan_outside_of_the_scan_is_black_and_noted(folder, read, window):
    values = (np.arange(512, dtype=np.float32).reshape(8, 8, 8) - 200)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "whole.nii")
    values[0] = np.nan  # the patient's left, which is on the right of the picture
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "cut.nii")
    found = read(window=window)
    cut, whole = found.images
    assert (cut[:, 7] == 0).all()
    inside = values[1:, :, 4]
    low, high = (-200, 200) if window else (inside.min(), inside.max())
    expected = np.clip((inside - low) / (high - low), 0, 1) * 255
    assert np.abs(cut[::-1, 6::-1].T - expected).max() <= 0.51
    assert not window or np.array_equal(cut[:, :7], whole[:, :7])
    assert ("1 files hold NaN, as outside of the scan: black, and no part of the range."
            in found.notes)


def test_a_nifti_slice_of_nan_alone_is_refused(folder, read):
    values = np.zeros((4, 4, 4), np.float32)
    values[:, :, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "a.nii")
    assert len(read().table) == 1
    with pytest.raises(ValueError, match="a.nii: its grey values go from nan to nan"):
        read(slices="all")


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 2)])
def test_nifti_that_is_no_volume_is_refused(folder, read, shape):
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), folder / "a.nii")
    with pytest.raises(ValueError, match="a.nii: its shape is .*expected one volume"):
        read()


# Damage of every kind --------------------------------------------------------


def test_a_seeded_hundred_of_damaged_files_are_read_or_refused_by_name(tmp_path):
    outcomes, failures, _ = fuzz_data.fuzz(100, seed=11, folder=tmp_path, apart=False)
    assert failures == []
    assert sum(outcomes.values()) == 100 and outcomes["refused"] > 20
    assert outcomes["read, same pixels"] > 5


@pytest.mark.parametrize("case", faults_data.CASES, ids=lambda case: f"{case.row} {case.name}")
def test_make_faults_finds_ours_to_survive(case):
    result = faults_data.run(case, tools=["ours"], apart=False)  # a fork of a busy process fails
    assert result.survived["ours"], result.words


@pytest.mark.parametrize("frames", [0, -5])
def test_a_number_of_frames_that_lies_low_shifts_no_other_picture(folder, read, frames):
    Image.fromarray(RAMP).save(folder / "a.png")
    write_dicom(folder / "b.dcm", RAMP, NumberOfFrames=frames)
    Image.fromarray(255 - RAMP).save(folder / "c.png")
    found = read(on_error="skip", slices="all")
    assert np.array_equal(found.images[0], RAMP) and np.array_equal(found.images[-1], 255 - RAMP)
    assert len(found.images) == len(found.table)


# Real images -----------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "covid_ct").is_dir(), reason="the real images are not here")
def test_real_covid_ct_as_a_plain_folder_of_classes(folder, tmp_path):
    for name in ("CT_COVID", "CT_NonCOVID"):
        (folder / name).symlink_to(SHARED / "covid_ct" / name)
    data = m.load_data(folder, image_size=32, data_dir=tmp_path / "data")  # small for speed
    counts = [np.bincount(getattr(data, part).labels) for part in m.SPLITS]
    assert np.sum(counts, 0).tolist() == [349, 397]
    assert data.train.images.shape[1:] == (32, 32, 3)
    assert "746 files: PNG 510, JPEG 236; pixels: RGB 528, RGBA 174, L 44." in data.notes
    assert "34 JPEG files are named .png." in data.notes
    assert m.check_splits(data).tables["classes"].to_numpy().min() >= 50
