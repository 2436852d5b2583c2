"""Notebook 03: its functions and its whole run, against cases from real folders of images."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

import medssl_utils as medssl

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "03_prepare_data.ipynb"
SHARED = ROOT.parent / "shared" / "data"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
for cell in CELLS:
    cell["metadata"].setdefault("tags", [])
# of version 0.1's pixels, labels and ids of COVID-CT at 64 pixels
COVID_CT_AT_64 = "75297428e9d5761376aa6634960fbfc991322fad71139fc5560c95efadee07e5"
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
NOISE = np.random.default_rng(0).integers(0, 256, (500, 16, 16)).astype(np.uint8)


def execute(namespace, cells, **parameters):
    """Run cells as a kernel would, with the parameters put after their cell; show nothing."""
    for cell in cells:
        exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"]["tags"]:
            namespace |= parameters
        namespace["display"] = lambda *things: None
    return namespace


FUNCTIONS = execute({}, [c for c in CELLS if {"imports", "reader"} & set(c["metadata"]["tags"])])


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(medssl, "plot_images", lambda images, titles, **options: None)


def prepare(source, folder, **parameters):
    """Run the whole notebook on a folder; return the data that it leaves."""
    options = {"source": str(source), "name": "x", "image_size": 16, "data_dir": str(folder)}
    namespace = execute({}, CELLS, **(options | parameters))
    return medssl.load_data(Path(folder) / "x.npz"), namespace


def save(path, pixels=RAMP, **options):
    """Write a picture in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def dicom(path, pixels, preamble=True, syntax=ExplicitVRLittleEndian, **tags):
    """Write a CT slice, signed if the pixels are; `tags` are set, None means empty."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.Modality = pydicom.uid.CTImageStorage, "CT"
    data.set_pixel_data(pixels, "MONOCHROME2", bits_stored=pixels.dtype.itemsize * 8)
    for tag, value in tags.items():
        if isinstance(value, tuple):  # with a VR of its own
            data.add_new(tag, *value)
        else:
            setattr(data, tag, value)
    if not preamble:
        del data.file_meta
    implicit = syntax == ImplicitVRLittleEndian
    data.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=preamble)


def nifti(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def folders(root, n=12, noise=0, **extra):
    """Write class folders a and b of n pictures each, and further pictures; return the root."""
    for number in range(n):
        save(root / f"a/x{number}.png", NOISE[2 * number + noise])
        save(root / f"b/y{number}.png", NOISE[2 * number + 1 + noise])
    for name, pixels in extra.items():
        save(root / name, pixels)
    return root


def listed(folder, patients, labels="ab", splits=("",)):
    """Write a picture of each patient and a list.csv of them; return its path."""
    rows = ["path,label,split,patient"]
    for number, who in enumerate(patients):
        save(folder / f"p/{number}.png", NOISE[number])
        label, split = labels[number % len(labels)], splits[number % len(splits)]
        rows.append(f"p/{number}.png,{label},{split},{who}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


def count(data):
    return sum(len(part) for part in data.parts.values())


def read(path, window="", slices="middle", size=16):
    kind = FUNCTIONS["kind_of"](path) or "picture"
    return FUNCTIONS["read_file"](path, kind, window, slices, size)


def stretched(values):
    """Grey values over their own range, the stated rule for more than 8 bits."""
    values = np.asarray(values, float)
    return np.round((values - values.min()) / (values.max() - values.min()) * 255)


DEEP = (RAMP.astype(np.uint16) * 200 + 500).astype("<u2")
CT = (RAMP.astype(np.int16) * 8 - 1000).astype("<i2")
RGB = np.stack([RAMP, RAMP.T, 255 - RAMP], 2)
ALPHA = np.dstack([RGB, np.where(RAMP < 128, 0, 255).astype(np.uint8)])


FEW = Image.fromarray(RGB).quantize(9)
CMYK = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
EXIF = Image.Exif()
EXIF[274] = 6  # a viewer turns it by 90 degrees clockwise
PICTURES = {
    "8 bits stay as they are": (save, RAMP),
    "16 bits over their own range": (lambda p: save(p, DEEP), stretched(DEEP)),
    "1 bit": (lambda p: save(p, RAMP > 99), np.where(RAMP > 99, 255, 0)),
    "RGB": (lambda p: save(p, RGB), RGB),
    "CMYK": (lambda p: CMYK.save(p, "JPEG"), np.full((16, 16, 3), [255, 0, 0])),
    "transparent": (lambda p: save(p, ALPHA), np.where(RAMP[..., None] < 128, 0, RGB)),
    "palette": (FEW.save, np.asarray(FEW.convert("RGB"))),
    "one grey is": (lambda p: save(p, transparency=255), np.where(RAMP == 255, 0, RAMP)),
    "turned by EXIF": (lambda p: save(p, exif=EXIF), np.rot90(RAMP, -1)),
    "resized by area": (lambda p: save(p, np.kron(RAMP, np.ones((4, 4), np.uint8))), RAMP),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_is_read_as_a_viewer_shows_it(case, tmp_path):
    write, expected = PICTURES[case]
    write(tmp_path / "x.png")
    facts = read(tmp_path / "x.png")
    assert facts["reason"] == ""
    np.testing.assert_array_equal(facts["pictures"][0], expected)


def corner(value, dtype):
    """A ramp of grey values with padding in its first four pixels."""
    pixels = (np.arange(256).reshape(16, 16) * 32 + 11600).astype(dtype)
    pixels[0, :4] = value
    return pixels


def palette(factor):
    """The tags of a palette that shows each value as it is, its 8 bits at one end of 16."""
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = (
            np.arange(256, dtype="<u2") * factor
        ).tobytes()
    return tags


REST = np.concatenate([np.full(4, np.nan), np.arange(252) / 251 * 255]).reshape(16, 16)
SCALED, INVERTED = np.nan_to_num(REST), np.nan_to_num(255 - REST)
RANGE = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1980}
IN_RANGE = np.where(np.arange(256) < 2, -1990, corner(-2000, "<i2").ravel()).reshape(16, 16)
ONE = {"PhotometricInterpretation": "MONOCHROME1"}
HU = {"RescaleSlope": 1, "RescaleIntercept": 0}
HIGH = RAMP.astype("<u2") * 256
IMPLICIT = {"syntax": ImplicitVRLittleEndian}
DICOMS = {
    "own range": (CT, {}, stretched(CT)),
    "rescale keeps the order": (CT, {"RescaleSlope": 2, "RescaleIntercept": -5}, stretched(CT)),
    "negative slope": (CT, {**HU, "RescaleSlope": -1}, 255 - stretched(CT)),
    "an empty slope": (CT, {"RescaleSlope": None, "RescaleIntercept": 9}, stretched(CT)),
    "empty rescale tags": (CT, dict.fromkeys(HU), stretched(CT)),
    "a window": (CT, HU, np.clip((CT + 150.0) / 400, 0, 1) * 255, "soft tissue"),
    "MONOCHROME1": (CT, ONE, 255 - stretched(CT)),
    "8 bits stay": (RAMP // 2, {}, RAMP // 2),
    "8 bits, MONOCHROME1": (RAMP, ONE, 255 - RAMP),
    "padding above": (corner(32767, "<u2"), {"PixelPaddingValue": 32767}, SCALED),
    "padding below": (corner(0, "<u2"), {"PixelPaddingValue": 0}, SCALED),
    "padding, inverted": (corner(32767, "<u2"), {"PixelPaddingValue": 32767, **ONE}, INVERTED),
    "its sign": (corner(-2000, "<i2"), {"PixelPaddingValue": ("US", 63536)}, SCALED),
    "a range of padding": (IN_RANGE, RANGE, SCALED),
    "12 bits at the high end": (HIGH, {"BitsStored": 12, "HighBit": 15}, RAMP),
    "12 of 16 bits": (HIGH // 16, {"BitsStored": 12, "HighBit": 11}, RAMP),
    "no preamble": (CT, {"preamble": False}, stretched(CT)),
    "no preamble, implicit": (CT, {"preamble": False, **IMPLICIT}, stretched(CT)),
    "implicit": (CT, IMPLICIT, stretched(CT)),
    "palette in the low byte": (RAMP, palette(1), np.dstack([RAMP] * 3)),
    "palette in the high byte": (RAMP, palette(256), np.dstack([RAMP] * 3)),
    "palette in both": (RAMP, palette(257), np.dstack([RAMP] * 3)),
}


@pytest.mark.parametrize("name", ["x.dcm", "IM0001", "1.2.840.5"])
@pytest.mark.parametrize("case", DICOMS)
def test_dicom_shows_what_a_viewer_shows(case, name, tmp_path):
    pixels, tags, expected, *window = DICOMS[case]
    dicom(tmp_path / name, pixels, **tags)
    facts = read(tmp_path / name, *window)
    assert facts["reason"] == ""
    np.testing.assert_allclose(facts["pictures"][0].astype(float), expected, atol=1)


VOLUME = np.random.default_rng(1).normal(size=(16, 16, 5))
NOT_HU = {
    "MR NIfTI": lambda p: nifti(p / "x.nii.gz", (650 + 100 * VOLUME).astype(np.int16)),
    "z scores": lambda p: nifti(p / "x.nii.gz", VOLUME),
    "0 to 1": lambda p: nifti(p / "x.nii", VOLUME - VOLUME.min()),
    "MR DICOM": lambda p: dicom(p / "x.dcm", CT, Modality="MR", RescaleIntercept=0),
    "CT without rescale": lambda p: dicom(p / "x.dcm", DEEP),
    "CT never rescaled": lambda p: dicom(p / "x.dcm", DEEP, RescaleIntercept=0, RescaleSlope=1),
    "PNG of 16 bits": lambda p: save(p / "x.png", DEEP),
    "PNG of 8 bits": lambda p: save(p / "x.png"),
}


@pytest.mark.parametrize("case", NOT_HU)
def test_hounsfield_window_on_other_values_is_refused(case, tmp_path):
    NOT_HU[case](tmp_path)
    (path,) = tmp_path.iterdir()
    assert "Hounsfield" in read(path, "lung")["reason"]
    assert read(path, "650, 600")["reason"] == ""


def test_nifti_is_turned_upright_and_cut(tmp_path):
    values = (np.arange(16 * 16 * 6).reshape(16, 16, 6) - 500).astype(np.int16)
    nifti(tmp_path / "x.nii.gz", values[::-1, :, ::-1], np.diag([-1, 1, -1, 1]))
    facts = read(tmp_path / "x.nii.gz", slices=3)
    assert facts["numbers"] == [1, 3, 5]
    np.testing.assert_array_equal(facts["pictures"][1], stretched(values[::-1, ::-1, 3].T))


SHIPPED = ["CT_small", "MR_small", "MR_small_implicit", "MR_small_bigendian", "MR_small_RLE"]
SHIPPED = dict.fromkeys(SHIPPED, "") | {"MR_small_jpeg_ls_lossless": "pylibjpeg"}  # if not there
NO_PICTURES = ["rtdose", "rtplan", "rtstruct", "liver_1frame", "test-SR"]
SHIPPED |= dict.fromkeys(NO_PICTURES, "NoPicture")


@pytest.mark.parametrize("name", SHIPPED)
def test_files_shipped_with_pydicom_are_read_right_or_refused_with_the_reason(name):
    path = Path(pydicom.data.get_testdata_file(f"{name}.dcm", download=False))
    header = pydicom.dcmread(path, force=True)
    facts = read(path, size=header.get("Rows", 16))
    if facts["reason"]:
        assert SHIPPED[name] and SHIPPED[name] in facts["reason"]
    else:
        assert name not in NO_PICTURES and facts["tag"] == header.PatientID
        np.testing.assert_allclose(facts["pictures"][0], stretched(header.pixel_array), atol=1)


def test_pixels_of_a_volume_shipped_with_nibabel():
    path = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    if not path.is_file():
        pytest.skip("nibabel's test data are not installed")
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    middle = torch.tensor(stretched(volume[::-1, ::-1, volume.shape[2] // 2].T))
    expected = torch.nn.functional.adaptive_avg_pool2d(middle[None], 16)[0]
    np.testing.assert_allclose(read(path)["pictures"][0], expected, atol=1)


MASK = np.where(RAMP > 120, 255, 0).astype(np.uint8)
NAMED = "x0_mask x1_mask_1 mask-x1 x1Mask x1_GT x1_segmentation masks/x1 lung_masks/x1".split()
MASKS = {f"a/{name}.png": NOISE[100 + number] for number, name in enumerate(NAMED)}
MASKS |= {"a/benign (1)_mask.png": MASK, "Masks/x1.png": NOISE[110]}
MASKS |= {"a/x1.bmp": MASK, "a/m1.png": MASK, "a/x1-lesion.png": MASK, "a/x1_b.png": MASK * 0}
MASKS["a/x1_2.png"] = RAMP // 64  # a map of labels
MASKS["a/x1_c.jpg"] = np.kron(MASK, np.ones((8, 8), np.uint8))  # soft at its edges
RESEMBLING = ["massive_1", "p_segal", "labelle3", "gt500 car", "roigt"]


def test_what_is_no_picture_is_left_out_with_its_name(tmp_path):
    stay = {f"b/{name}.png": NOISE[200 + number] for number, name in enumerate(RESEMBLING)}
    source = folders(tmp_path / "f", **MASKS, **stay)
    dicom(source / "a/IM1", CT, Modality="SEG")
    dicom(source / "a/IM2.dcm", CT, Modality="SR")
    nifti(source / "a/x1_seg.nii.gz", VOLUME)
    data, namespace = prepare(source, tmp_path)
    left_out = set(namespace["all_left_out"]["path"].str.removeprefix(f"{source}/"))
    assert left_out == {*MASKS, "a/IM1", "a/IM2.dcm", "a/x1_seg.nii.gz"}
    assert count(data) == 24 + len(RESEMBLING)
    assert any("named as a mask" in note for note in data.notes)


def test_a_class_of_masks_alone_stops(tmp_path):
    source = folders(tmp_path / "f", **{"c/x1_mask.png": MASK})
    with pytest.raises(ValueError, match="No picture in .*c"):
        prepare(source, tmp_path)


def test_a_mask_that_a_list_names_is_left_out(tmp_path):
    source = listed(tmp_path, [""] * 24)
    save(tmp_path / "p/x_mask.png", MASK)
    source.write_text(source.read_text() + "\np/x_mask.png,a,,")
    data, _ = prepare(source, tmp_path)
    assert count(data) == 24 and any("named as a mask" in note for note in data.notes)


PLACEHOLDERS = ["NA", "nan", "None", "unknown", "ANONYMOUS", "anonymized", "0", "000", "N/A", "-"]


@pytest.mark.parametrize("who", [*PLACEHOLDERS, "PatientID", "P17"])
def test_an_id_that_is_none_counts_as_unknown(who, tmp_path):
    patients = [who if number < 24 else f"Q{number}" for number in range(40)]
    data, _ = prepare(listed(tmp_path, patients), tmp_path)
    unknown = sum((part.patients == "").sum() for part in data.parts.values())
    assert unknown == 24 and any(who in note for note in data.notes)


SPELLINGS = [("001", "1"), ("1.0", "1"), ("Pat1", "PAT1"), ("p 07", "P 7")]


@pytest.mark.parametrize("one, two", SPELLINGS)
def test_a_leak_that_spelling_hides_is_found(one, two, tmp_path):
    patients = [one, one, two, two, *[f"Q{number}" for number in range(8)]]
    splits = ["train"] * 2 + ["test"] * 2 + ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    with pytest.raises(ValueError, match=f"patient pairs in two parts: ({one}|{two})"):
        prepare(listed(tmp_path, patients, splits=splits), tmp_path)
    assert not (tmp_path / "x.npz").exists()


def test_slices_of_a_volume_without_a_patient_stay_together(tmp_path):
    for number in range(12):
        values = np.random.default_rng(number).normal(size=(16, 16, 6))
        nifti(tmp_path / "f" / "ab"[number % 2] / f"{number}.nii.gz", values)
    data, _ = prepare(tmp_path / "f", tmp_path, slices="3")
    whose = [set(part.patients) for part in data.parts.values()]
    assert count(data) == 36 and sum(map(len, whose)) == 12 == len(set.union(*whose) - {""})


NFD = unicodedata.normalize("NFD", "Lübeck é.png")
NAMES = ["a b.png", "a#1.png", "50%25.png", "ä.png", NFD, "c;d.png", "e'f.png", "(1).png"]
LISTS = {
    "comma": (",", "utf-8", ""),
    "BOM": (",", "utf-8-sig", ""),
    "semicolon": (";", "utf-8", ""),
    "tab": ("\t", "utf-8", ""),
    "trailing commas": (",", "utf-8", ",,,"),
    "blanks": (" , ", "utf-8", "  "),
    "Windows line ends": (",", "utf-8", "\r"),
}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("case", LISTS)
def test_lists_are_read_right(case, form, tmp_path):
    mark, encoding, end = LISTS[case]
    rows = [mark.join(["Path", "label"]) + end]
    for number in range(24):
        path = f"i/{number} {NAMES[number % 8]}"
        save(tmp_path / path, NOISE[number])
        path = unicodedata.normalize(form, path)
        rows.append(mark.join([f'"{path}"' if ";" in path else path, "ab"[number // 12]]) + end)
    (tmp_path / "l.csv").write_bytes("\n".join(rows).encode(encoding))
    data, _ = prepare(tmp_path / "l.csv", tmp_path)
    assert count(data) == 24
    for part in data.parts.values():
        for image, name, label in zip(part.images, part.ids, part.labels, strict=True):
            number = int(re.search(r"\d+", name)[0])
            assert np.array_equal(image, NOISE[number]) and label == number // 12


BAD_LISTS = {
    "a file is missing": ("path,label\np/0.png,a\np/99.png,b", "p/99.png"),
    "no label column": ("path,class\np/0.png,a", "label"),
    "an empty label": ("path,label\np/0.png,a\np/1.png,", "each row"),
    "a row too long": ("path,label\np/0.png,a,b", "longer"),
    "twice": ("path,label\np/0.png,a\np/../p/0.png,b", "twice"),
    "split in some rows": ("path,label,split\np/0.png,a,train\np/1.png,b,", "split"),
    "a strange split": ("path,label,split\np/0.png,a,dev", "dev"),
    "a column twice": ("path,label,Label\np/0.png,a,b", "label"),
    "too few patients": ("path,label\np/0.png,a\np/1.png,b\np/2.png,b", "Too few patients"),
}
CLASSES = [("1", "1.0"), ("Benign", "benign"), ("01", "1"), ("a", "nan"), ("a", "N/A")]
BAD_LISTS |= {
    pair: ("path,label\np/0.png,{}\np/1.png,{}".format(*pair), pair[1]) for pair in CLASSES
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_wrong_list_is_refused_with_the_reason(case, tmp_path):
    text, words = BAD_LISTS[case]
    listed(tmp_path, [""] * 3).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        prepare(tmp_path / "list.csv", tmp_path)


def test_broken_files_are_listed_before_anything_is_written(tmp_path):
    source = folders(tmp_path / "f")
    whole = (source / "a/x0.png").read_bytes()
    broken = {"a/cut.png": whole[:200], "b/text.dcm": b"no picture", "b/page.png": b"<html>"}
    broken["a/flip.png"] = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    for name, content in broken.items():
        (source / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        prepare(source, tmp_path)
    assert all(name in str(error.value) for name in broken)
    assert not (tmp_path / "x.npz").exists()
    data, namespace = prepare(source, tmp_path, on_error="skip")
    assert len(namespace["unread"]) == 4 and count(data) == 24


def test_hidden_empty_and_linked_files_are_left_out(tmp_path):
    source = folders(tmp_path / "f")
    for name, content in {"a/.hidden.png": b"x", "a/empty.png": b"", "b/Thumbs.db": b"x"}.items():
        (source / name).write_bytes(content)
    for name, target in {"loop": ".", "again.png": "a/x0.png", "nowhere.png": "gone.png"}.items():
        (source / "a" / name).symlink_to(source / target)
    _, namespace = prepare(source, tmp_path)
    assert len(namespace["listed"]) == 24 and len(namespace["left_out"]) == 6


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    dicom(tmp_path / "x.dcm", CT, Rows=60_000, Columns=60_000)
    assert all("limit" in read(path)["reason"] for path in tmp_path.iterdir())


def test_given_parts_stay_and_a_missing_one_is_drawn(tmp_path):
    folders(tmp_path / "f/training", n=10)
    folders(tmp_path / "f/test", n=3, noise=40)
    data, _ = prepare(tmp_path / "f", tmp_path)
    assert len(data.test) == 6 and len(data.train) + len(data.val) == 20
    assert all(name.startswith("test/") for name in data.test.ids)
    assert set(data.val.labels) == {0, 1} == set(data.train.labels)


def test_test_images_alone_and_images_without_labels(tmp_path):
    source = folders(tmp_path / "f/test", n=3).parent
    data, _ = prepare(source, tmp_path)
    assert count(data) == len(data.test) == 6
    data, _ = prepare(source, tmp_path, labelled=False)
    assert (len(data.test), len(data.new)) == (0, 6) and set(data.new.labels) == {-1}


def test_parts_are_drawn_by_patient_seeded_and_kept_as_a_list(tmp_path):
    source = listed(tmp_path, [f"Q{number // 4}" for number in range(80)], "aaaabbbb")
    data, again, other = [prepare(source, tmp_path, seed=seed)[0] for seed in (0, 0, 1)]
    assert data.fingerprint == again.fingerprint != other.fingerprint
    whose = [set(part.patients) for part in data.parts.values()]
    assert sum(map(len, whose)) == 20 and len(data.test) in (16, 20, 24)
    assert set(pd.read_csv(tmp_path / "x.csv")) == {"path", "label", "split", "patient"}


def parts_with(folder, **extra):
    """Write train, val and test with classes a and b, then further pictures."""
    folders(folder / "val", 4, noise=40)
    folders(folder / "test", 4, noise=60)
    folders(folder / "train")
    return folders(folder, 0, **extra)


def test_an_exact_copy_across_parts_and_one_with_two_labels_stop(tmp_path):
    copies = {"test/a/copy.png": NOISE[0], "train/b/other.png": NOISE[2]}
    with pytest.raises(ValueError, match="exact pairs") as error:
        prepare(parts_with(tmp_path / "f", **copies), tmp_path)
    assert "two labels" in str(error.value) and "copy.png" in str(error.value)


def test_near_copies_are_warned_of_as_pairs_and_saturated_pictures_by_name(tmp_path):
    near = np.round(NOISE[0] * 0.9 + 10).astype(np.uint8)
    white = np.where(NOISE[90] < 40, 100, 255).astype(np.uint8)
    source = parts_with(tmp_path / "f", **{"test/b/near.png": near, "train/a/white.png": white})
    _, namespace = prepare(source, tmp_path)
    pairs = namespace["pairs"][["kind", "where", "id", "id_2"]].values.tolist()
    assert pairs == [["near", "with two labels", "test/b/near.png", "train/a/x0.png"]]
    assert list(namespace["extreme"]["path"]) == ["train/a/white.png"]


def test_grey_and_coloured_pictures_are_stacked_as_rgb(tmp_path):
    data, _ = prepare(folders(tmp_path / "f", **{"a/colour.png": RGB}), tmp_path)
    assert data.train.images.shape[1:] == (16, 16, 3)


def test_covid_ct_as_version_0_1_read_it(tmp_path):
    if not (SHARED / "covid_ct").is_dir():
        pytest.skip("the real COVID-CT images are not here: they may not be passed on")
    data, namespace = prepare(SHARED / "covid_ct", tmp_path, image_size=64)
    assert [len(part) for part in data.parts.values()] == [425, 118, 203]
    assert data.official_split and data.class_names == ("COVID", "NonCOVID")
    pairs = namespace["pairs"]
    twice = pairs[pairs["where"] == "with two labels"]
    names = {Path(name).name for name in [*twice["id"], *twice["id_2"]]}
    assert names == {"71%0.jpg", "71%1.jpg", "kjr-21-e24-p5-29.png", "kjr-21-e24-p5-31.png"}
    digest = hashlib.sha256()
    for part in data.parts.values():
        for column in (part.images, part.labels, "\n".join(part.ids).encode()):
            digest.update(column)
    assert digest.hexdigest() == COVID_CT_AT_64


def test_the_demo_shows_each_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    namespace = execute({}, CELLS, data_dir=str(tmp_path))
    once = namespace["data"]
    namespace = execute(namespace, [cell for cell in CELLS for _ in range(2)][2:])
    again = namespace["data"]
    assert again.fingerprint == once.fingerprint and again.notes == once.notes
    reasons = " ".join(namespace["all_left_out"]["why"])
    assert "named as a mask" in reasons and "few grey values" in reasons and "Truncated" in reasons
    assert any("ANONYMOUS" in note for note in namespace["data"].notes)
    assert "near" in set(namespace["pairs"]["kind"])
    for name, filled in {"images": "train val test", "elsewhere": "test", "new": "new"}.items():
        data = medssl.load_data(tmp_path / f"demo_{name}.npz")
        parts = [part for part in ("train", "val", "test", "new") if len(getattr(data, part))]
        assert data.demo and parts == filled.split()
