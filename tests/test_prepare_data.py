"""Notebook 03: its functions and its whole run, against cases from real folders of images."""

import json
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
COVID_CT_AT_64 = "2d3b2855cc03df92475ac33cbe05df509bed141834c48ca66a8e27d91efef4d9"
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


def png(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RAMP if pixels is None else pixels).save(path, "PNG", **options)


def dicom(path, pixels, preamble=True, syntax=ExplicitVRLittleEndian, **tags):
    """Write a CT slice of 16 bits, signed if the pixels are; `tags` are set, None means empty."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Modality, data.SamplesPerPixel, data.PhotometricInterpretation = "CT", 1, "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for tag, value in tags.items():
        if isinstance(value, tuple):  # with a VR of its own
            data.add_new(tag, *value)
        else:
            setattr(data, tag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not preamble:
        del data.file_meta
    implicit = syntax == ImplicitVRLittleEndian
    data.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=preamble)


def folders(root, n=12, noise=0):
    """Write class folders a and b of n pictures each; return the root."""
    for number in range(n):
        png(root / "a" / f"x{number}.png", NOISE[2 * number + noise])
        png(root / "b" / f"y{number}.png", NOISE[2 * number + 1 + noise])
    return root


def write_list(path, rows, header="path,label", encoding="utf-8"):
    path.write_bytes("\n".join([header, *rows]).encode(encoding))
    return path


def read(path, window="", slices="middle", size=16):
    kind = FUNCTIONS["kind_of"](path) or "picture"
    return FUNCTIONS["read_file"](path, kind, window, slices, size)


def stretched(values):
    """Grey values over their own range, the stated rule for more than 8 bits."""
    values = np.asarray(values, float)
    return np.round((values - values.min()) / (values.max() - values.min()) * 255)


# Pixels -----------------------------------------------------------------------

DEEP = (RAMP.astype(np.uint16) * 200 + 500).astype("<u2")
CT = (RAMP.astype(np.int16) * 8 - 1000).astype("<i2")
RGB = np.stack([RAMP, RAMP.T, 255 - RAMP], 2)
ALPHA = np.dstack([RGB, np.where(RAMP < 128, 0, 255).astype(np.uint8)])


def palette(path):
    image = Image.fromarray(RAMP // 16 % 2, "P")
    image.putpalette([10, 20, 30, 200, 210, 220])
    image.save(path)


def turned(path):
    exif = Image.Exif()
    exif[274] = 6  # a viewer turns it by 90 degrees clockwise
    png(path, exif=exif)


def corner(value, dtype):
    pixels = (np.arange(256).reshape(16, 16) * 32 + 11600).astype(dtype)
    pixels[0, :4] = value
    return pixels


PICTURES = {
    "8 bits stay as they are": (lambda p: png(p), RAMP),
    "16 bits over their own range": (lambda p: png(p, DEEP), stretched(DEEP)),
    "1 bit": (lambda p: Image.fromarray(RAMP > 99).save(p), np.where(RAMP > 99, 255, 0)),
    "RGB": (lambda p: png(p, RGB), RGB),
    "transparent": (lambda p: png(p, ALPHA), np.where(RAMP[..., None] < 128, 0, RGB)),
    "palette": (palette, np.where((RAMP // 16 % 2)[..., None], [200, 210, 220], [10, 20, 30])),
    "one grey is": (lambda p: png(p, transparency=255), np.where(RAMP == 255, 0, RAMP)),
    "turned by EXIF": (turned, np.rot90(RAMP, -1)),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_is_read_as_a_viewer_shows_it(case, tmp_path):
    write, expected = PICTURES[case]
    write(tmp_path / "x.png")
    facts = read(tmp_path / "x.png")
    assert facts["reason"] == ""
    np.testing.assert_array_equal(facts["pictures"][0], expected)


def test_cmyk_jpeg_is_read_in_its_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    red, green, blue = read(tmp_path / "x.jpg")["pictures"][0].mean(axis=(0, 1))
    assert red > 240 and green < 15 and blue < 15


REST = np.arange(4, 256)
SCALED = np.concatenate([np.zeros(4), stretched(REST)]).reshape(16, 16)
INVERTED = np.concatenate([np.zeros(4), 255 - stretched(REST)]).reshape(16, 16)
RANGE = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1980}
IN_RANGE = np.where(np.arange(256) < 2, -1990, corner(-2000, "<i2").ravel()).reshape(16, 16)
ONE = {"PhotometricInterpretation": "MONOCHROME1"}
HIGH = RAMP.astype("<u2") * 256
IMPLICIT = {"syntax": ImplicitVRLittleEndian}
DICOMS = {
    "own range": (CT, {}, stretched(CT)),
    "rescale keeps the order": (CT, {"RescaleSlope": 2, "RescaleIntercept": -5}, stretched(CT)),
    "negative slope": (CT, {"RescaleSlope": -1, "RescaleIntercept": 0}, 255 - stretched(CT)),
    "empty rescale tags": (CT, {"RescaleSlope": None, "RescaleIntercept": None}, stretched(CT)),
    "one empty rescale tag": (CT, {"RescaleSlope": None, "RescaleIntercept": 9}, stretched(CT)),
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
}


@pytest.mark.parametrize("name", ["x.dcm", "IM0001", "1.2.840.5"])
@pytest.mark.parametrize("case", DICOMS)
def test_dicom_shows_what_a_viewer_shows(case, name, tmp_path):
    pixels, tags, expected = DICOMS[case]
    dicom(tmp_path / name, pixels, **tags)
    facts = read(tmp_path / name)
    assert facts["reason"] == ""
    np.testing.assert_allclose(facts["pictures"][0].astype(float), expected, atol=1)


def test_dicom_palette_in_the_low_or_the_high_byte(tmp_path):
    for name, factor in (("low", 1), ("high", 256), ("both", 257)):
        table = (np.arange(256, dtype="<u2") * factor).tobytes()
        tags = {"PhotometricInterpretation": "PALETTE COLOR"}
        for colour in ("Red", "Green", "Blue"):
            tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            tags[f"{colour}PaletteColorLookupTableData"] = table
        dicom(tmp_path / f"{name}.dcm", RAMP, **tags)
        pixels = read(tmp_path / f"{name}.dcm")["pictures"][0]
        np.testing.assert_array_equal(pixels, np.stack([RAMP] * 3, 2))


def test_window_in_hounsfield_units(tmp_path):
    dicom(tmp_path / "x.dcm", CT, RescaleSlope=1, RescaleIntercept=0)
    pixels = read(tmp_path / "x.dcm", "soft tissue")["pictures"][0]
    np.testing.assert_array_equal(pixels, np.round(np.clip((CT + 150.0) / 400, 0, 1) * 255))


def nifti(path, values, affine=None):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


VOLUME = np.random.default_rng(1).normal(size=(16, 16, 5))
NOT_HU = {
    "MR NIfTI": lambda p: nifti(p / "x.nii.gz", (650 + 100 * VOLUME).astype(np.int16)),
    "z scores": lambda p: nifti(p / "x.nii.gz", VOLUME),
    "0 to 1": lambda p: nifti(p / "x.nii", VOLUME - VOLUME.min()),
    "MR DICOM": lambda p: dicom(p / "x.dcm", CT, Modality="MR", RescaleIntercept=0),
    "CT without rescale": lambda p: dicom(p / "x.dcm", DEEP),
    "CT never rescaled": lambda p: dicom(p / "x.dcm", DEEP, RescaleIntercept=0, RescaleSlope=1),
    "PNG of 16 bits": lambda p: png(p / "x.png", DEEP),
    "PNG of 8 bits": lambda p: png(p / "x.png"),
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


@pytest.mark.parametrize("name", SHIPPED)
def test_pixels_of_files_shipped_with_pydicom(name):
    path = Path(pydicom.data.get_testdata_file(f"{name}.dcm", download=False))
    header = pydicom.dcmread(path)
    facts = read(path, size=header.Rows)
    assert facts["tag"] == header.PatientID
    np.testing.assert_allclose(facts["pictures"][0], stretched(header.pixel_array), atol=1)


@pytest.mark.parametrize("name", ["rtdose", "rtplan", "rtstruct", "liver_1frame", "test-SR"])
def test_dicom_objects_that_are_no_pictures_say_so(name):
    path = Path(pydicom.data.get_testdata_file(f"{name}.dcm", download=False))
    assert "NoPicture" in read(path)["reason"]


def test_a_missing_decoder_is_named():
    path = Path(pydicom.data.get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False))
    facts = read(path)
    assert facts["reason"] == "" or "pylibjpeg" in facts["reason"]


def test_pixels_of_a_volume_shipped_with_nibabel():
    path = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    if not path.is_file():
        pytest.skip("nibabel's test data are not installed")
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    middle = stretched(volume[::-1, ::-1, volume.shape[2] // 2].T)
    expected = torch.nn.functional.interpolate(
        torch.tensor(middle)[None, None], (16, 16), mode="area"
    )
    np.testing.assert_allclose(read(path)["pictures"][0], expected[0, 0], atol=1)


# What is no picture of the class ------------------------------------------------

MASK = np.where(RAMP > 120, 255, 0).astype(np.uint8)
BLOCK = np.ones((8, 8), np.uint8)


MASKS = {
    "by name": lambda f: [png(f / f"a/x{i}_mask.png", MASK) for i in range(12)],
    "numbered": lambda f: png(f / "a/x1_mask_1.png", MASK),
    "BUSI": lambda f: png(f / "a/benign (1)_mask.png", MASK),
    "segmentation": lambda f: png(f / "b/y1_segmentation.png", MASK),
    "at the start": lambda f: png(f / "a/mask-x1.png", MASK),
    "in camel case": lambda f: png(f / "a/x1Mask.png", NOISE[90]),
    "ground truth": lambda f: png(f / "a/x1_GT.png", NOISE[91]),
    "a folder in the class": lambda f: png(f / "a/masks/x1.png", NOISE[92]),
    "a folder of the lungs": lambda f: png(f / "a/lung_masks/x1.png", NOISE[93]),
    "a folder beside the classes": lambda f: png(f / "Masks/x1.png", NOISE[94]),
    "two values, the same stem": lambda f: Image.fromarray(MASK).save(f / "a/x1.bmp"),
    "two values, another letter": lambda f: png(f / "a/m1.png", MASK),
    "two values, a longer stem": lambda f: png(f / "a/x1-lesion.png", MASK),
    "few values, a map of labels": lambda f: png(f / "a/x1_2.png", RAMP // 64),
    "an empty mask": lambda f: png(f / "a/x1_b.png", MASK * 0),
    "a soft mask": lambda f: Image.fromarray(np.kron(MASK, BLOCK)).save(f / "a/x1_c.jpg"),
    "DICOM SEG": lambda f: dicom(f / "a/IM1", CT, Modality="SEG"),
    "DICOM SR": lambda f: dicom(f / "a/IM1.dcm", CT, Modality="SR"),
    "NIfTI": lambda f: nifti(f / "a/x1_seg.nii.gz", VOLUME),
}


@pytest.mark.parametrize("case", MASKS)
def test_what_is_no_picture_is_left_out_with_its_name(case, tmp_path):
    source = folders(tmp_path / "f")
    MASKS[case](source)
    data, namespace = prepare(source, tmp_path)
    assert sum(len(part) for part in data.parts.values()) == 24
    assert namespace["all_left_out"]["why"].str.contains("mask|NoPicture").any()
    assert any("Left out" in note for note in data.notes)


@pytest.mark.parametrize(
    "name", ["y1.png", "massive_1.png", "p_segal.png", "labelle3.png", "gt500 car.png", "roigt.png"]
)
def test_a_name_that_only_resembles_a_mask_stays(name):
    assert not FUNCTIONS["is_mask"](Path("tumour", name))


def test_a_class_of_masks_alone_stops(tmp_path):
    source = folders(tmp_path / "f")
    for number in range(12):
        (source / f"b/y{number}.png").unlink()
        png(source / f"b/{number}_mask.png", MASK)
    with pytest.raises(ValueError, match="b"):
        prepare(source, tmp_path)


# Ids ----------------------------------------------------------------------------


def listed(folder, patients, labels="ab", splits=None, names=None):
    """Write pictures and a list.csv of them; return its path."""
    rows = []
    for number, who in enumerate(patients):
        path = f"p/{number}.png" if names is None else names[number]
        png(folder / path, NOISE[number])
        split = "" if splits is None else splits[number]
        rows.append(f"{path},{labels[number % len(labels)]},{split},{who}")
    return write_list(folder / "list.csv", rows, "path,label,split,patient")


PLACEHOLDERS = ["NA", "nan", "None", "unknown", "ANONYMOUS", "anonymized", "0", "000", "N/A", "-"]


@pytest.mark.parametrize("who", [*PLACEHOLDERS, "PatientID", "P17"])
def test_an_id_that_is_none_counts_as_unknown(who, tmp_path):
    patients = [who if number < 24 else f"Q{number}" for number in range(40)]
    data, _ = prepare(listed(tmp_path, patients), tmp_path)
    unknown = sum((part.patients == "").sum() for part in data.parts.values())
    assert unknown == 24 and any(who in note for note in data.notes)


@pytest.mark.parametrize(
    "one, two", [("001", "1"), ("1.0", "1"), ("Pat1", "PAT1"), ("p 07", "P 7")]
)
def test_a_leak_that_spelling_hides_is_found(one, two, tmp_path):
    patients = [one, one, two, two, *[f"Q{number}" for number in range(8)]]
    splits = ["train"] * 2 + ["test"] * 2 + ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    with pytest.raises(ValueError, match=f"patient pairs in two parts: ({one}|{two})"):
        prepare(listed(tmp_path, patients, splits=splits), tmp_path)
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    "labels", [("1", "1.0"), ("Benign", "benign"), ("01", "1"), ("a", "nan"), ("a", "N/A")]
)
def test_classes_that_are_one_or_none_are_named(labels, tmp_path):
    source = listed(tmp_path, [f"Q{number}" for number in range(16)], labels)
    with pytest.raises(ValueError, match=labels[1]):
        prepare(source, tmp_path)


def test_slices_of_a_volume_without_a_patient_stay_together(tmp_path):
    for number in range(12):
        values = np.random.default_rng(number).normal(size=(16, 16, 6))
        (tmp_path / "f" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        nifti(tmp_path / "f" / "ab"[number % 2] / f"{number}.nii.gz", values)
    data, _ = prepare(tmp_path / "f", tmp_path, slices="3")
    assert sum(len(part) for part in data.parts.values()) == 36
    whose = [set(part.patients) for part in data.parts.values()]
    assert not whose[0] & whose[1] and not whose[0] & whose[2] and "" not in set.union(*whose)


# Lists --------------------------------------------------------------------------

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
    rows = []
    for number in range(24):
        name = f"{number} {NAMES[number % 8]}"
        png(tmp_path / "i" / name, NOISE[number])
        path = unicodedata.normalize(form, f"i/{name}")
        rows.append(mark.join([f'"{path}"' if ";" in path else path, "ab"[number // 12]]) + end)
    source = write_list(tmp_path / "l.csv", rows, mark.join(["Path", "label"]) + end, encoding)
    data, _ = prepare(source, tmp_path)
    assert sum(len(part) for part in data.parts.values()) == 24
    for part in data.parts.values():
        for image, name, label in zip(part.images, part.ids, part.labels, strict=True):
            number = int(name.split("/")[1].split(" ")[0])
            assert np.array_equal(image, NOISE[number]) and label == number // 12


BAD_LISTS = {
    "a file is missing": (["p/0.png,a", "p/99.png,b"], "path,label", "p/99.png"),
    "no label column": (["p/0.png,a"], "path,class", "label"),
    "an empty label": (["p/0.png,a", "p/1.png,"], "path,label", "each row"),
    "a row too long": (["p/0.png,a,b"], "path,label", "longer"),
    "twice": (["p/0.png,a", "p/../p/0.png,b"], "path,label", "twice"),
    "split in some rows": (["p/0.png,a,train", "p/1.png,b,"], "path,label,split", "split"),
    "a strange split": (["p/0.png,a,dev"], "path,label,split", "dev"),
    "a column twice": (["p/0.png,a,b"], "path,label,Label", "label"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_wrong_list_is_refused_with_the_reason(case, tmp_path):
    rows, header, words = BAD_LISTS[case]
    listed(tmp_path, ["", ""])
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        prepare(write_list(tmp_path / "bad.csv", rows, header), tmp_path)


# Folders ------------------------------------------------------------------------


def test_broken_files_are_listed_before_anything_is_written(tmp_path):
    source = folders(tmp_path / "f")
    png(source / "a/whole.png", NOISE[80])
    whole = (source / "a/whole.png").read_bytes()
    (source / "a/cut.png").write_bytes(whole[:200])
    (source / "a/flip.png").write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    (source / "b/text.dcm").write_text("no picture")
    (source / "b/page.png").write_text("<html>")
    with pytest.raises(ValueError) as error:
        prepare(source, tmp_path)
    assert all(name in str(error.value) for name in ("cut.png", "flip.png", "text.dcm", "page.png"))
    assert not (tmp_path / "x.npz").exists()
    data, namespace = prepare(source, tmp_path, on_error="skip")
    assert len(namespace["unread"]) == 4
    assert sum(len(part) for part in data.parts.values()) == 25


def test_hidden_empty_and_linked_files_are_left_out(tmp_path):
    source = folders(tmp_path / "f")
    (source / "a/.hidden.png").write_bytes(b"x")
    (source / "a/empty.png").touch()
    (source / "b/Thumbs.db").write_bytes(b"x")
    (source / "a/loop").symlink_to(source)
    (source / "a/again.png").symlink_to(source / "a/x0.png")
    (source / "a/nowhere.png").symlink_to(source / "gone.png")
    _, namespace = prepare(source, tmp_path)
    assert len(namespace["listed"]) == 24 and len(namespace["left_out"]) == 6


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    dicom(tmp_path / "x.dcm", CT, Rows=60_000, Columns=60_000)
    for name in ("x.png", "x.dcm"):
        assert "limit" in read(tmp_path / name)["reason"]


def test_given_parts_stay_and_a_missing_one_is_drawn(tmp_path):
    folders(tmp_path / "f/training", n=10)
    folders(tmp_path / "f/test", n=3, noise=40)
    data, _ = prepare(tmp_path / "f", tmp_path)
    assert len(data.test) == 6 and len(data.train) + len(data.val) == 20
    assert all(name.startswith("test/") for name in data.test.ids)
    assert set(data.val.labels) == {0, 1} == set(data.train.labels)


def test_test_images_alone_and_images_without_labels(tmp_path):
    folders(tmp_path / "f/test", n=3)
    data, _ = prepare(tmp_path / "f", tmp_path)
    assert (len(data.train), len(data.test)) == (0, 6)
    data, _ = prepare(tmp_path / "f", tmp_path, labelled=False)
    assert len(data.new) == 6 and set(data.new.labels) == {-1} and len(data.test) == 0


def test_parts_are_drawn_by_patient_seeded_and_kept_as_a_list(tmp_path):
    patients = [f"Q{number // 4}" for number in range(80)]
    labels = ["ab"[number // 4 % 2] for number in range(80)]
    source = listed(tmp_path, patients, labels)
    data, _ = prepare(source, tmp_path)
    again, _ = prepare(source, tmp_path)
    other, _ = prepare(source, tmp_path, seed=1)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    whose = [set(part.patients) for part in data.parts.values()]
    assert sum(map(len, whose)) == 20 and len(data.test) in (16, 20, 24)
    assert set(pd.read_csv(tmp_path / "x.csv")) == {"path", "label", "split", "patient"}


def test_too_few_patients_are_refused_with_their_number(tmp_path):
    patients = ["one"] * 6 + ["two"] * 6
    labels = ["a"] * 6 + ["b"] * 6
    with pytest.raises(ValueError, match="Too few patients"):
        prepare(listed(tmp_path, patients, labels), tmp_path)


# Leaks and duplicates -----------------------------------------------------------


def parts_with(folder, *extra):
    """Write train, val and test with classes a and b, 40 pictures; then further ones."""
    for number in range(40):
        part = ["train", "train", "val", "test"][number // 2 % 4]
        png(folder / part / "ab"[number % 2] / f"q{number}.png", NOISE[number])
    for path, pixels in extra:
        png(folder / path, pixels)
    return folder


def near(pixels):
    return np.clip(pixels * 0.9 + 10, 0, 255).astype(np.uint8)


def test_an_exact_copy_across_parts_and_one_with_two_labels_stop(tmp_path):
    copies = ("test/a/copy.png", NOISE[0]), ("train/b/other.png", NOISE[2])
    with pytest.raises(ValueError, match="exact pairs") as error:
        prepare(parts_with(tmp_path / "f", *copies), tmp_path)
    assert "two labels" in str(error.value) and "copy.png" in str(error.value)


def test_near_copies_are_warned_of_as_pairs(tmp_path):
    source = parts_with(tmp_path / "f", ("test/b/near.png", near(NOISE[0])))
    _, namespace = prepare(source, tmp_path)
    pair = namespace["pairs"].iloc[0]
    assert (pair["kind"], pair["where"]) == ("near", "with two labels")
    assert {pair["id"], pair["id_2"]} == {"train/a/q0.png", "test/b/near.png"}
    assert len(namespace["pairs"]) == 1


def test_saturated_pictures_are_named(tmp_path):
    white = np.where(NOISE[90] < 40, 100, 255).astype(np.uint8)
    source = folders(tmp_path / "f")
    png(source / "a/white.png", white)
    _, namespace = prepare(source, tmp_path)
    assert list(namespace["extreme"]["path"]) == ["a/white.png"]


def test_grey_and_coloured_pictures_are_stacked_as_rgb(tmp_path):
    source = folders(tmp_path / "f")
    png(source / "a/colour.png", RGB)
    data, _ = prepare(source, tmp_path)
    assert data.train.images.shape[1:] == (16, 16, 3)


def test_images_are_resized_by_area(tmp_path):
    png(tmp_path / "x.png", np.kron(RAMP, np.ones((4, 4), np.uint8)))
    np.testing.assert_array_equal(read(tmp_path / "x.png")["pictures"][0], RAMP)


# The real set and the demo ------------------------------------------------------


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
    assert data.fingerprint == COVID_CT_AT_64


def test_the_demo_shows_each_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    namespace = execute({}, CELLS, data_dir=str(tmp_path))
    once = namespace["data"]
    namespace = execute(namespace, [cell for cell in CELLS for _ in range(2)][2:])
    assert (
        namespace["data"].fingerprint == once.fingerprint and namespace["data"].notes == once.notes
    )
    reasons = " ".join(namespace["all_left_out"]["why"])
    assert "named as a mask" in reasons and "few grey values" in reasons and "Truncated" in reasons
    assert any("ANONYMOUS" in note for note in namespace["data"].notes)
    assert "near" in set(namespace["pairs"]["kind"])
    for name, sizes in {
        "demo_images": (3, 0),
        "demo_elsewhere": (1, 0),
        "demo_new": (0, 1),
    }.items():
        data = medssl.load_data(tmp_path / f"{name}.npz")
        filled = sum(len(part) > 0 for part in data.parts.values())
        assert (filled, int(len(data.new) > 0)) == sizes and data.demo
