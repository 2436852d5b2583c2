"""Data sets by name, label subsets, and the checks that come before training."""

import dataclasses
import io
import random
import shutil
import zipfile
from pathlib import Path

import medmnist
import numpy as np
import pytest
from drive_server import DriveServer
from PIL import Image

import medssl_utils as m

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
real_covid_ct = pytest.mark.skipif(not (SHARED / "covid_ct").is_dir(),
                                   reason="the real COVID-CT images are not here")
real_pneumonia = pytest.mark.skipif(not (SHARED / "pneumoniamnist").is_dir(),
                                    reason="the real PneumoniaMNIST file is not here")


@pytest.fixture(scope="module")
def phantoms() -> m.DataSplits:
    return m.demo_data(0, n_train=48, n_val=16, n_test=16, image_size=32)  # small for speed


# Names -----------------------------------------------------------------------


def test_every_2d_set_of_the_catalogue_is_known_in_every_size():
    flags = [flag for flag, info in medmnist.INFO.items() if "3d" not in flag]
    assert sorted(m.MEDMNIST) == sorted(flags)
    for flag in flags:
        sizes = [key.removeprefix("url") for key in medmnist.INFO[flag] if key.startswith("url")]
        assert all(flag + size in m.DATASETS for size in sizes)


@pytest.mark.parametrize("wrong, hint", [("organsmnst", "Did you mean 'organsmnist'"),
                                         ("Phantom", "Did you mean 'phantom'"),
                                         ("organsmnist_32", "_64, _128 or _224")])
def test_a_misspelt_name_gets_a_hint(wrong, hint):
    with pytest.raises(ValueError, match=hint):
        m.load_data(wrong)


def test_no_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="dataset '' is not known"):
        m.load_data("")


@pytest.mark.parametrize("option, value", [("split", "mine"), ("dtype", "float64"),
                                           ("image_size", 0)])
def test_a_wrong_option_is_named(option, value):
    with pytest.raises(ValueError, match=str(value)):
        m.load_data("phantom", **{option: value})


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        m.load_data(tmp_path / "nowhere")


def test_a_folder_of_unknown_layout_is_an_error(tmp_path):
    (tmp_path / "scans").mkdir()
    with pytest.raises(ValueError, match="layout .* is not known.*scans"):
        m.load_data(tmp_path)


# MedMNIST --------------------------------------------------------------------


def medmnist_bytes(labels=1, channels=0, counts=(20, 10, 10), label_count=2) -> bytes:
    """Return a file in MedMNIST's layout, tiny for speed."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in zip(m.SPLITS, counts, strict=True):
        shape = (n, 28, 28, channels) if channels else (n, 28, 28)
        arrays[f"{part}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, label_count, (n, labels), dtype=np.uint8)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.fixture
def catalogue(monkeypatch):
    """Return a function that puts another URL or MD5 into the catalogue's entry of a name."""
    def change(name, **entries):
        monkeypatch.setitem(medmnist.INFO, name, medmnist.INFO[name] | entries)
    return change


def md5(body: bytes) -> str:
    return m.hashlib.md5(body).hexdigest()


def test_a_missing_file_is_downloaded_and_checked(tmp_path, catalogue):
    body = medmnist_bytes()
    with DriveServer(body) as server:
        catalogue("pneumoniamnist", url=server.url, MD5=md5(body))
        data = m.load_data("pneumoniamnist", data_dir=tmp_path)
    assert (tmp_path / "pneumoniamnist.npz").read_bytes() == body
    assert data.train.images.shape == (20, 28, 28)
    assert data.class_names == ("normal", "pneumonia")


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_download_with_a_passing_fault_succeeds(tmp_path, catalogue, fault):
    body = medmnist_bytes()
    with DriveServer(body, fault=fault) as server:
        catalogue("pneumoniamnist", url=server.url, MD5=md5(body))
        m.load_data("pneumoniamnist", data_dir=tmp_path)
    assert (tmp_path / "pneumoniamnist.npz").read_bytes() == body


def test_a_download_with_another_md5_is_refused(tmp_path, catalogue):
    with DriveServer(medmnist_bytes()) as server:
        catalogue("pneumoniamnist", url=server.url, MD5="0" * 32)
        with pytest.raises(OSError, match="its md5 is .*, expected 000(.|\n)*By hand"):
            m.load_data("pneumoniamnist", data_dir=tmp_path)
    assert not (tmp_path / "pneumoniamnist.npz").exists()


def test_download_false_says_from_where_and_where_to(tmp_path):
    with pytest.raises(FileNotFoundError, match="zenodo.*organsmnist_64.npz.*save it as"):
        m.load_data("organsmnist_64", data_dir=tmp_path, download=False)


def test_a_file_that_is_there_is_taken(tmp_path, catalogue):
    body = medmnist_bytes()
    catalogue("pneumoniamnist", MD5=md5(body), url="http://127.0.0.1:1/never-asked")
    (tmp_path / "pneumoniamnist.npz").write_bytes(body)
    assert len(m.load_data("pneumoniamnist", data_dir=tmp_path).test) == 10


def test_an_unofficial_file_is_refused_unless_allowed(tmp_path):
    (tmp_path / "pneumoniamnist.npz").write_bytes(medmnist_bytes())
    with pytest.raises(ValueError, match="not the official file.*unofficial=True"):
        m.load_data("pneumoniamnist", data_dir=tmp_path)


def test_an_unofficial_file_is_noted(tmp_path):
    (tmp_path / "pneumoniamnist.npz").write_bytes(medmnist_bytes())
    notes = m.load_data("pneumoniamnist", data_dir=tmp_path, unofficial=True).notes
    assert any("not the official file" in note for note in notes)
    assert any("train: 20 images, the catalogue says 4,708" in note for note in notes)


def test_a_broken_file_is_an_error_even_if_allowed(tmp_path):
    (tmp_path / "pneumoniamnist.npz").write_bytes(medmnist_bytes()[:500])
    with pytest.raises(ValueError, match="can't be read as a MedMNIST"):
        m.load_data("pneumoniamnist", data_dir=tmp_path, unofficial=True)


def test_a_file_damaged_within_its_pixels_is_an_error_even_if_allowed(tmp_path):
    with np.load(io.BytesIO(medmnist_bytes())) as file:
        np.savez_compressed(tmp_path / "pneumoniamnist.npz", **file)
    damaged = bytearray((tmp_path / "pneumoniamnist.npz").read_bytes())
    damaged[150:200] = bytes(50)
    (tmp_path / "pneumoniamnist.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match="can't be read as a MedMNIST"):
        m.load_data("pneumoniamnist", data_dir=tmp_path, unofficial=True)


@pytest.mark.parametrize("old, new", [
    (b"(20, 28, 28)", b"(20, 28, 28"), (b"(20, 28, 28)", b"(20, 28, '8)"),
    (b"(20, 28, 28)", b"(9999999999, 999999999)"), (b"\x93NUMPY", b"\x00NUMPY"),
    (b"|u1", b"|O8"), (b"|u1", b"<f1"), (b"|u1", b"|i1"), (b"(20, 28, 28)", b"(10, 28, 28)"),
    (b"(20, 28, 28)", b"(20, 784)"), (b"(20, 28, 28)", b"(20, 2, 14, 28)"),
], ids=str)
def test_a_damaged_header_within_the_file_is_an_error_even_if_allowed(tmp_path, old, new):
    with zipfile.ZipFile(io.BytesIO(medmnist_bytes())) as whole, zipfile.ZipFile(
            tmp_path / "pneumoniamnist.npz", "w") as damaged:
        for name in whole.namelist():
            body = whole.read(name)
            if name == "train_images.npy":  # its header has 128 bytes, spaces and \\n at the end
                body = body[:127].replace(old, new).rstrip().ljust(127) + body[127:]
            damaged.writestr(name, body)
    with pytest.raises(ValueError, match="pneumoniamnist.npz can't be read as a MedMNIST.*hold"):
        m.load_data("pneumoniamnist", data_dir=tmp_path, unofficial=True)


@pytest.mark.parametrize("place, value", [(6, 255), (8, 32), (10, 99)])  # version, flags, method
def test_a_zip_header_that_lies_is_an_error_even_if_allowed(tmp_path, place, value):
    body = bytearray(medmnist_bytes())
    body[body.index(b"PK\1\2") + place] = value
    (tmp_path / "pneumoniamnist.npz").write_bytes(body)
    with pytest.raises(ValueError, match="pneumoniamnist.npz can't be read as a MedMNIST"):
        m.load_data("pneumoniamnist", data_dir=tmp_path, unofficial=True)


@pytest.mark.parametrize("name, task, labels, channels, shape", [
    ("breastmnist", "binary", 1, 0, (20,)), ("bloodmnist", "multi-class", 1, 3, (20,)),
    ("retinamnist", "ordinal", 1, 3, (20,)), ("chestmnist", "multi-label", 14, 0, (20, 14))])
def test_the_task_comes_from_the_catalogue(tmp_path, name, task, labels, channels, shape):
    (tmp_path / f"{name}.npz").write_bytes(medmnist_bytes(labels, channels))
    data = m.load_data(name, data_dir=tmp_path, unofficial=True)
    assert data.task == task
    assert data.train.labels.shape == shape
    assert len(data.class_names) == len(medmnist.INFO[name]["label"])


def test_native_224_is_another_file_than_28_enlarged(tmp_path):
    for name in ("organsmnist", "organsmnist_224"):
        with pytest.raises(FileNotFoundError, match=f"{name}.npz"):
            m.load_data(name, data_dir=tmp_path, download=False)


@real_pneumonia
def test_real_pneumoniamnist(tmp_path):
    shutil.copy(SHARED / "pneumoniamnist" / "pneumoniamnist_rebuilt.npz",
                tmp_path / "pneumoniamnist.npz")
    data = m.load_data("pneumoniamnist", data_dir=tmp_path, unofficial=True)
    assert [len(part) for part in data.parts.values()] == [4708, 524, 624]
    report = m.check_splits(data, method="SparK", fractions=(0.01, 0.1))
    assert report.errors == []
    assert any("8 images of val are pixel for pixel in train" in w for w in report.warnings)


# COVID-CT --------------------------------------------------------------------


def write_image(path, seed, mode="RGB", kind="PNG", size=(40, 30)):
    """Write a random image; `seed` makes its pixels its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    pixels[..., 3] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, kind)


@pytest.fixture
def covid_ct(tmp_path) -> Path:
    """Write a tiny folder in COVID-CT's layout, with its quirks."""
    root, seed = tmp_path / "covid_ct", 0
    counts = {"train": 4, "val": 2, "test": 2}
    for kind, end in (("COVID", "\n"), ("NonCOVID", "\r\n")):
        for part, n in counts.items():
            names = []
            for i in range(n):
                seed += 1
                names.append(f"2020.03.{seed:02d}.1-p{i}-7%{i}.png" if kind == "COVID"
                             else f"{seed}.png")
                write_image(root / f"CT_{kind}" / names[-1], seed, mode=("L", "RGB", "RGBA")[i % 3],
                            kind="JPEG" if (kind, part, i) == ("NonCOVID", "train", 0) else "PNG",
                            size=(20 + 10 * i, 30))
            split = root / "Data-split" / kind / f"{part}CT_{kind}.txt"
            split.parent.mkdir(parents=True, exist_ok=True)
            split.write_bytes((end.join(names) + end).encode())
    return root


def test_covid_ct_is_read_in_the_authors_order(covid_ct):
    data = m.load_data("covid_ct", data_dir=covid_ct.parent, image_size=16)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4  # COVID is label 0
    assert data.class_names == ("COVID", "NonCOVID")
    assert data.test.images.shape == (4, 16, 16, 3)
    assert data.train.ids[0] == "CT_COVID/2020.03.01.1-p0-7%0.png"
    assert "1 JPEG files are named .png." in data.notes


def test_covid_ct_by_the_path_of_its_folder(covid_ct):
    data = m.load_data(covid_ct, image_size=16)
    assert data.fingerprint == m.load_data("covid_ct", data_dir=covid_ct.parent,
                                           image_size=16).fingerprint


def test_covid_ct_from_the_published_zip_files(covid_ct):
    plain = m.load_data(covid_ct, image_size=16)
    for kind in ("CT_COVID", "CT_NonCOVID"):
        (covid_ct / "Images-processed").mkdir(exist_ok=True)
        with zipfile.ZipFile(covid_ct / "Images-processed" / f"{kind}.zip", "w") as file:
            for path in (covid_ct / kind).iterdir():
                file.write(path, f"{kind}/{path.name}")
            file.writestr(f"__MACOSX/{kind}/._1.png", b"not an image")
        shutil.rmtree(covid_ct / kind)
    assert m.load_data(covid_ct, image_size=16).fingerprint == plain.fingerprint


def test_an_unreadable_image_within_a_zip_file_is_named(covid_ct):
    with zipfile.ZipFile(covid_ct / "CT_COVID.zip", "w") as file:
        for path in (covid_ct / "CT_COVID").iterdir():
            file.writestr(f"CT_COVID/{path.name}", b"\x89PNG broken")
    shutil.rmtree(covid_ct / "CT_COVID")
    with pytest.raises(ValueError, match="8 of 16 images(.|\n)*p0-7%0.png: no PNG, JPEG, TIFF"):
        m.load_data(covid_ct, image_size=16)


def test_a_damaged_zip_file_is_named(covid_ct):
    shutil.rmtree(covid_ct / "CT_COVID")
    (covid_ct / "CT_COVID.zip").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="CT_COVID.zip is no whole zip file.*Copy it again"):
        m.load_data(covid_ct, image_size=16)


def test_images_are_resized_by_area():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    resized = m._area_resize(image, 2, "float32")
    assert resized[0, 0, 0] == image[:2, :3, 0].mean()
    assert m._area_resize(image, 2, "uint8").dtype == np.uint8


def test_float32_images_are_unrounded(covid_ct):
    exact = m.load_data(covid_ct, image_size=16, dtype="float32").train.images
    rounded = m.load_data(covid_ct, image_size=16).train.images
    assert exact.dtype == np.float32
    assert (exact % 1 != 0).any()
    assert np.abs(exact - rounded).max() <= 0.5


def test_no_covid_ct_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="github.com/UCSD-AI4H/COVID-CT"):
        m.load_data("covid_ct", data_dir=tmp_path)


def test_a_listed_image_that_is_missing_is_named(covid_ct):
    (covid_ct / "CT_NonCOVID" / "16.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images .*16.png"):
        m.load_data(covid_ct, image_size=16)


def test_every_unreadable_image_is_named(covid_ct):
    for name in ("9.png", "10.png"):
        (covid_ct / "CT_NonCOVID" / name).write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match="2 of 16 images can't be read(.|\n)*9.png(.|\n)*10.png"):
        m.load_data(covid_ct, image_size=16)


def test_an_image_in_no_list_is_counted(covid_ct):
    write_image(covid_ct / "CT_COVID" / "extra.png", 99)
    notes = m.load_data(covid_ct, image_size=16).notes
    assert any(note.startswith("1 images are in no split list") for note in notes)


def test_patients_come_from_the_repositorys_meta_tables(covid_ct):
    (covid_ct / "NonCOVID-CT-MetaInfo.csv").write_text("image name,patient id\n9.jpg,medpix_3\n")
    data = m.load_data(covid_ct, image_size=16)
    assert data.train.groups.tolist() == [""] * 4 + ["medpix_3", "", "", ""]
    assert "The patient is not known for 15 of 16 images." in data.notes


def test_a_meta_table_that_cannot_be_used_is_noted(covid_ct):
    (covid_ct / "NonCOVID-CT-MetaInfo.csv").write_text("picture,person\n9.jpg,medpix_3\n")
    notes = m.load_data(covid_ct, image_size=16).notes
    assert any(note.startswith("NonCOVID-CT-MetaInfo.csv could not be used") for note in notes)


def test_a_damaged_meta_table_is_noted(covid_ct):
    (covid_ct / "COVID-CT-MetaInfo.xlsx").write_bytes(b"PK\3\4 and nothing more")
    notes = m.load_data(covid_ct, image_size=16).notes
    assert any(note.startswith("COVID-CT-MetaInfo.xlsx could not be used") for note in notes)


def test_without_meta_tables_the_patients_are_unknown(covid_ct):
    data = m.load_data(covid_ct, image_size=16)
    assert "No meta table: patients are unknown." in data.notes


@pytest.fixture(scope="module")
def real_images() -> m.DataSplits:
    return m.load_data(SHARED / "covid_ct", image_size=32)  # small for speed


@real_covid_ct
def test_real_covid_ct_official_split(real_images):
    counts = {name: np.bincount(getattr(real_images, name).labels).tolist() for name in m.SPLITS}
    assert counts == {"train": [191, 234], "val": [60, 58], "test": [98, 105]}
    assert "34 JPEG files are named .png." in real_images.notes
    assert "The patient is not known for 83 of 746 images." in real_images.notes


@real_covid_ct
def test_real_covid_ct_three_articles_cross_and_no_patient(real_images):
    report = m.check_splits(real_images)
    table = report.tables["articles"]
    assert table.loc["2020.03.12.20034686"].tolist() == [4, 0, 2]
    assert table.loc["2020.03.13.20035212"].tolist() == [3, 9, 0]
    assert table.loc["2020.03.22.20040782"].tolist() == [0, 9, 5]
    assert len(table) == 3
    assert "patients" not in report.tables
    assert report.errors == []


@real_covid_ct
def test_real_covid_ct_grouped_split_has_no_overlap():
    data = m.load_data(SHARED / "covid_ct", image_size=32, split="grouped", seed=1)
    report = m.check_splits(data)
    assert sum(map(len, data.parts.values())) == 746
    assert not data.published_split
    assert not {"articles", "patients", "duplicates"} & set(report.tables)
    assert report.tables["classes"].to_numpy().min() > 40


def test_a_grouped_split_needs_groups(tmp_path):
    (tmp_path / "breastmnist.npz").write_bytes(medmnist_bytes())
    with pytest.raises(ValueError, match="no patient ids.*split='official'"):
        m.load_data("breastmnist", data_dir=tmp_path, unofficial=True, split="grouped")


# Label subsets ---------------------------------------------------------------


LABELS = np.repeat([0, 1, 2], (300, 90, 10))
FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, 2, float("nan")])
def test_a_fraction_outside_0_to_1_is_named(fraction):
    with pytest.raises(ValueError, match=f"label_fraction is {fraction}"):
        m.label_subset(LABELS, fraction)


def test_all_labels_are_all_images():
    assert m.label_subset(LABELS, 1.0).tolist() == list(range(400))


def test_indices_are_sorted_int64_and_unique():
    index = m.label_subset(LABELS, 0.3, seed=4)
    assert index.dtype == np.int64
    assert np.all(np.diff(index) > 0)


def test_classes_keep_their_share():
    counts = np.bincount(LABELS[m.label_subset(LABELS, 0.5)])
    assert counts.tolist() == [150, 45, 5]


@pytest.mark.parametrize("minimum", [1, 3])
def test_every_class_has_its_minimum(minimum):
    for fraction in FRACTIONS:
        counts = np.bincount(LABELS[m.label_subset(LABELS, fraction, min_per_class=minimum)])
        assert counts.min() >= minimum


def test_same_seed_same_subset_other_seed_another():
    first = m.label_subset(LABELS, 0.1, seed=1)
    assert np.array_equal(first, m.label_subset(LABELS, 0.1, seed=1))
    assert not np.array_equal(first, m.label_subset(LABELS, 0.1, seed=2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("by_patient", [False, True])
def test_smaller_subsets_lie_within_larger_ones(seed, by_patient):
    groups = np.random.default_rng(seed).integers(0, 60, 400).astype(str) if by_patient else None
    sets = [set(m.label_subset(LABELS, f, seed=seed, groups=groups, min_per_class=2).tolist())
            for f in FRACTIONS]
    assert all(small <= large for small, large in zip(sets, sets[1:]))


def test_a_patient_is_in_or_out_as_a_whole():
    groups = np.repeat(np.arange(100), 4).astype(str)
    chosen = m.label_subset(LABELS, 0.2, groups=groups)
    assert len(chosen) == 80
    assert not set(groups[chosen]) & set(np.delete(groups, chosen))


def test_patients_may_come_as_a_list_or_as_numbers():
    groups = np.repeat(np.arange(100), 4)
    chosen = m.label_subset(LABELS, 0.2, groups=groups.astype(str))
    assert np.array_equal(chosen, m.label_subset(LABELS, 0.2, groups=groups))
    assert np.array_equal(chosen, m.label_subset(LABELS, 0.2, groups=groups.tolist()))


def test_images_of_unknown_patients_are_chosen_one_by_one():
    groups = np.where(np.arange(400) < 40, "one patient", "")
    assert np.bincount(LABELS[m.label_subset(LABELS, 0.5, groups=groups)]).tolist() in (
        [150, 45, 5], [130, 45, 5], [170, 45, 5])
    assert len(m.label_subset(LABELS, 0.1, groups=np.full(400, ""))) == 40


def test_multi_label_subsets_hold_every_label():
    labels = (np.random.default_rng(0).random((500, 6)) < [0.3, 0.2, 0.1, 0.1, 0.02, 0.01])
    chosen = m.label_subset(labels.astype(int), 0.05, min_per_class=2)
    assert labels[chosen].sum(0).min() >= 2
    assert 20 <= len(chosen) <= 45


def test_the_authors_rule_is_pythons_shuffle():
    order = list(range(400))
    random.Random(42).shuffle(order)
    assert m.label_subset(LABELS, 0.1, seed=42, rule="authors").tolist() == sorted(order[:40])


def test_the_first_rule_ignores_the_seed():
    assert m.label_subset(LABELS, 0.1, seed=3, rule="first").tolist() == list(range(40))


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="subset rule 'random' is not known"):
        m.label_subset(LABELS, 0.1, rule="random")


def test_the_ids_fingerprint_does_not_depend_on_the_image_size(covid_ct):
    small, large = (m.load_data(covid_ct, image_size=size) for size in (8, 16))
    assert small.train.ids_fingerprint == large.train.ids_fingerprint
    assert small.fingerprint != large.fingerprint


# Checks ----------------------------------------------------------------------


def plant(data: m.DataSplits, part: str, **columns) -> m.DataSplits:
    """Return `data` with some columns of one split replaced."""
    return dataclasses.replace(data, **{part: dataclasses.replace(getattr(data, part), **columns)})


def with_first_image(part: m.Split, image: np.ndarray) -> np.ndarray:
    return np.concatenate([image[None], part.images[1:]])


def test_clean_data_has_no_findings(phantoms):
    report = m.check_splits(phantoms)
    assert (report.errors, report.warnings) == ([], [])
    report.raise_for_errors()


def test_a_picture_in_train_and_test_is_an_error(phantoms):
    planted = plant(phantoms, "test",
                    images=with_first_image(phantoms.test, phantoms.train.images[4]))
    report = m.check_splits(planted)
    row = report.tables["duplicates"].iloc[0]
    assert (row.id, row.id_2) == (phantoms.train.ids[4], phantoms.test.ids[0])
    with pytest.raises(ValueError, match="1 images of test are pixel for pixel in train"
                                         "(.|\n)*tables of check_splits. Mend the images"):
        report.raise_for_errors()


def test_a_grey_picture_is_known_again_among_pictures_in_colour(phantoms):
    images = with_first_image(phantoms.test, phantoms.train.images[4])
    planted = plant(phantoms, "test", images=np.stack([images] * 3, 3))
    assert any("1 images of test are pixel for pixel in train" in error
               for error in m.check_splits(planted).errors)


def test_a_picture_in_two_classes_is_an_error(phantoms):
    i = int(np.flatnonzero(phantoms.train.labels == 1)[0])  # label 1; image 0 has label 0
    images = phantoms.train.images.copy()
    images[i] = images[0]
    report = m.check_splits(plant(phantoms, "train", images=images))
    assert any("different labels" in error for error in report.errors)


def test_a_picture_twice_in_one_split_is_a_warning(phantoms):
    images = phantoms.train.images.copy()
    images[1] = images[0]  # the same patient and label
    report = m.check_splits(plant(phantoms, "train", images=images))
    assert report.errors == []
    assert report.warnings == ["1 pairs of identical images within a split."]


def test_empty_pictures_are_no_copies_of_each_other(phantoms):
    empty = np.full((32, 32), 7, np.uint8)
    planted = phantoms
    for name, part in phantoms.parts.items():
        images = part.images.copy()
        images[[0, np.flatnonzero(part.labels == 1)[0]]] = empty  # in each class, in each split
        planted = plant(planted, name, images=images)
    report = m.check_splits(planted)
    assert report.errors == [] and "duplicates" not in report.tables
    assert sum("2 images of" in w and "one grey value only" in w for w in report.warnings) == 3


def test_a_patient_in_two_splits_is_an_error(phantoms):
    groups = phantoms.val.groups.astype("U40")
    groups[0] = phantoms.train.groups[0]
    report = m.check_splits(plant(phantoms, "val", groups=groups))
    assert report.tables["patients"].index.tolist() == [phantoms.train.groups[0]]
    assert any("1 patients in more than one split" in error for error in report.errors)


def test_a_leak_in_a_published_split_is_a_warning(phantoms):
    planted = plant(phantoms, "test",
                    images=with_first_image(phantoms.test, phantoms.train.images[4]))
    report = m.check_splits(dataclasses.replace(planted, published_split=True))
    assert report.errors == []
    assert any("published split is kept" in warning for warning in report.warnings)


def test_unknown_patients_are_a_warning(phantoms):
    bare = dataclasses.replace(phantoms, **{
        name: dataclasses.replace(getattr(phantoms, name), groups=None) for name in m.SPLITS})
    assert any("Patients are not known for 80 of 80 images" in w
               for w in m.check_splits(bare).warnings)


def test_some_unknown_patients_are_a_warning(covid_ct):
    (covid_ct / "NonCOVID-CT-MetaInfo.csv").write_text("image name,patient id\n9.jpg,medpix_3\n")
    data = m.load_data(covid_ct, image_size=16)
    assert any("Patients are not known for 15 of 16 images" in w
               for w in m.check_splits(data).warnings)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_split_of_one_class_is_an_error(phantoms, part):
    labels = np.zeros_like(getattr(phantoms, part).labels)
    report = m.check_splits(plant(phantoms, part, labels=labels))
    assert any(e.startswith(f"{part} has no image of opacities") for e in report.errors)


def test_a_class_absent_from_the_test_set_is_a_warning(phantoms):
    three = dataclasses.replace(phantoms, class_names=("a", "b", "c"), task="multi-class")
    labels = phantoms.train.labels.copy()
    labels[:2] = 2
    report = m.check_splits(plant(three, "train", labels=labels))
    assert report.errors == []
    assert any(w.startswith("test has no image of c: its scores") for w in report.warnings)


def test_a_label_without_a_name_is_an_error(phantoms):
    report = m.check_splits(plant(phantoms, "val", labels=phantoms.val.labels + 1))
    assert any("val has labels 1 to 2, expected 0 to 1" in e for e in report.errors)


def test_counts_are_given_per_fraction(phantoms):
    table = m.check_splits(phantoms, fractions=(0.25, 0.5)).tables["classes"]
    assert table["train at 0.25"].tolist() == [6, 6]
    assert table["train at 0.5"].tolist() == [12, 12]


def test_multi_label_counts_are_positives(phantoms):
    labels = np.stack([phantoms.train.labels, np.ones(48, np.int64)], 1)
    data = dataclasses.replace(phantoms, task="multi-label")
    for part in m.SPLITS:
        data = plant(data, part, labels=labels[:len(getattr(data, part))])
    assert m.check_splits(data).tables["classes"]["train"].tolist() == [24, 48]


@pytest.mark.parametrize("part", m.SPLITS)
def test_a_part_without_images_is_an_error(phantoms, part):
    bare = dataclasses.replace(phantoms, **{part: getattr(phantoms, part).take(slice(0))})
    report = m.check_splits(bare)
    assert f"{part} has no image of clear lungs, opacities: nothing to learn" in report.errors[0]


def test_a_misspelt_method_is_named(phantoms):
    with pytest.raises(ValueError, match="Did you mean 'BYOL'"):
        m.check_splits(phantoms, method="byol")


def test_patients_that_are_numbers_can_be_named(phantoms):
    data = dataclasses.replace(phantoms, **{
        name: dataclasses.replace(part, groups=np.arange(len(part)))
        for name, part in phantoms.parts.items()})
    assert any(error.startswith("16 patients in more than one split: 0, 1, 2, 3, 4 and 11 more")
               for error in m.check_splits(data).errors)


def test_ids_that_occur_twice_are_an_error(phantoms):
    ids = phantoms.val.ids.copy()
    ids[0] = ids[1]
    report = m.check_splits(plant(phantoms, "val", ids=ids))
    assert any("1 ids occur twice" in error for error in report.errors)


def test_intensities_are_held_against_pre_training(phantoms):
    bright = plant(phantoms, "train", images=255 - phantoms.train.images // 4)
    report = m.check_splits(bright, method="BYOL")
    assert report.tables["intensity"].loc["pre-training of BYOL", "mean"] == pytest.approx(0.181)
    assert any("pre-training of BYOL has 0.18 +- 0.19" in w
               for w in report.warnings)


def test_images_scaled_to_0_1_are_noticed(phantoms):
    images = (phantoms.test.images > 127).astype(np.uint8)
    report = m.check_splits(plant(phantoms, "test", images=images))
    assert any("test has pixels from 0 to 1 only" in w for w in report.warnings)


def test_pictures_that_a_wide_window_flattened_are_noticed(phantoms):
    report = m.check_splits(plant(phantoms, "test", images=phantoms.test.images // 8 + 100))
    assert any("test has pixels from 100 to 1" in w and "too wide a window" in w
               for w in report.warnings)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, 255])
def test_a_part_of_one_grey_value_is_an_error(phantoms, value):
    data = dataclasses.replace(phantoms, mean=(0.0,) * 3, std=(0.0,) * 3)  # as a folder has them
    for name, part in phantoms.parts.items():
        data = plant(data, name, images=np.full_like(part.images, value))
    report = m.check_splits(data, method="SparK")
    assert [error.split(":")[0] for error in report.errors] == [
        f"{part} has one grey value only, {value}" for part in m.SPLITS]


def test_pixels_that_are_not_finite_are_an_error(phantoms):
    images = phantoms.val.images.astype(np.float32)
    images[3, 0, 0] = np.nan
    report = m.check_splits(plant(phantoms, "val", images=images))
    assert any(e.startswith("val has pixels from nan") for e in report.errors)


def test_an_empty_image_is_named(phantoms):
    images = with_first_image(phantoms.val, np.full((32, 32), 7, np.uint8))
    report = m.check_splits(plant(phantoms, "val", images=images))
    assert any(str(phantoms.val.ids[0]) in w for w in report.warnings)


def test_the_report_prints_and_shows_pictures(phantoms):
    planted = plant(phantoms, "test",
                    images=with_first_image(phantoms.test, phantoms.train.images[4]))
    report = m.check_splits(planted)
    assert "phantom is NOT fit for training: 1 errors" in str(report)
    assert report._repr_html_().count("<img src='data:image/png;base64,") == 1


def test_an_id_cannot_inject_html(phantoms):
    ids = phantoms.test.ids.astype("U80")
    ids[0] = "<script>"
    planted = plant(phantoms, "test", ids=ids,
                    images=with_first_image(phantoms.test, phantoms.train.images[4]))
    assert "<script>" not in m.check_splits(planted)._repr_html_()
