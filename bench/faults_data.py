"""What happens at each fault of image folders (X1 to X7): ours, and others beside it.

    make faults                              after downloads and checkpoint files
    python bench/faults_data.py              these alone, about two minutes
    python bench/faults_data.py --rows X5    some rows

Every case is a small folder of classes, read whole in a process of its own with a limit on memory
and time. Survived means: each picture is what the file shows (for deep grey values: a linear
function of them, nothing clipped), or an error before the first picture that says what is wrong.
The others are asked the same, with their defaults: torchvision's ImageFolder for images, and for
DICOM plain pydicom, `dcmread(path).pixel_array` stretched to 0..255. A dash: not their business.
Patients and duplicates in two splits (X8) and missing classes (X9) are tests of `check_splits` and
`label_subset` in tests/test_data.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import faults  # noqa: E402
import numpy as np  # noqa: E402
import pydicom  # noqa: E402
from fuzz_data import dicom_bytes  # noqa: E402
from PIL import Image  # noqa: E402
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.uid import JPEGLSLossless  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

import medssl_utils as medssl  # noqa: E402

SIDE, SPENT = 16, 400  # pixels a side; MB that a bomb may cost before it is refused
Pictures = dict[str, np.ndarray]  # path below the folder -> (SIDE, SIDE) or (SIDE, SIDE, 3)
GREY = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)
DEEP = GREY.astype(np.uint16) * 16 + 500


@dataclass(frozen=True)
class Case:
    """One fault: what lies in the folder, and what must come of it.

    Attributes:
        build: writes into the folder, where good files are already, those in FINE.
        right: path -> the picture that must come, or a judge that returns what is wrong with it.
        says: what an error must say, where one is allowed; "" where it is not.
        window: the option that ours is asked with.
        dicom: whether it is plain pydicom's business rather than ImageFolder's.
    """

    row: str
    name: str
    build: Callable[[Path], None]
    right: dict[str, np.ndarray | Callable[[np.ndarray], str]]
    says: str = ""
    window: str = ""
    dicom: bool = False


# =============================================================================
# Readers: each returns all pictures of the folder, or raises
# =============================================================================


def read_ours(folder: Path, window: str, data_dir: Path) -> Pictures:
    found = medssl.read_folder(folder, medssl.ReadOptions(window=window), image_size=SIDE,
                               data_dir=data_dir)
    return dict(zip(found.table["id"].str.partition("#")[0], found.images))


def read_image_folder(folder: Path, window: str, data_dir: Path) -> Pictures:
    images = ImageFolder(folder)
    pictures = {}
    for i, (path, _) in enumerate(images.samples):
        name = Path(path).relative_to(folder).as_posix()
        if name in pictures:
            raise RuntimeError(f"{name} comes twice")
        pictures[name] = np.asarray(images[i][0])
        real = Path(path).resolve()
        if any(Path(p).resolve() == real for p, _ in images.samples[:i]):
            raise RuntimeError(f"one file comes twice, as {name} too")
    return pictures


def read_pydicom(folder: Path, window: str, data_dir: Path) -> Pictures:
    pictures = {}
    for path in sorted(folder.rglob("*.dcm")):
        values = pydicom.dcmread(path).pixel_array.astype(float)
        stretched = (values - values.min()) / (np.ptp(values) or 1) * 255
        pictures[path.relative_to(folder).as_posix()] = stretched.astype(np.uint8)
    return pictures


READERS = {"ours": read_ours, "ImageFolder": read_image_folder, "plain pydicom": read_pydicom}


def outcome(reader: Callable, case: Case, folder: Path, data_dir: Path) -> faults.Outcome:
    """Read and judge; the text is what is wrong, "" if nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):
            pictures = reader(folder, case.window, data_dir)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        told = bool(case.says) and bool(re.search(case.says, text, re.I))
        return faults.Outcome("refused", "" if told else f"error: {text}", text)
    if case.says and not case.right:
        return faults.Outcome("read", "ACCEPTED")
    return faults.Outcome("read", wrong_pictures(case, pictures))


def wrong_pictures(case: Case, pictures: Pictures) -> str:
    """Say what is wrong with what was read, "" if it is right."""
    if missing := sorted(set(case.right) - set(pictures)):
        return f"without a word: {', '.join(missing)} is missing"
    if extra := sorted(set(pictures) - set(case.right) - FINE):
        return f"junk was read: {', '.join(extra)}"
    for name, right in case.right.items():
        if wrong := right(pictures[name]) if callable(right) else differs(pictures[name], right):
            return f"{name}: {wrong}"
    return ""


def differs(picture: np.ndarray, right: np.ndarray) -> str:
    """Compare within 3 of 255, grey with colour where needed."""
    picture, right = (np.stack([p] * 3, -1) if p.ndim == 2 else p for p in (picture, right))
    if picture.shape != right.shape:
        return f"shape {picture.shape}"
    gap = np.abs(picture.astype(int) - right.astype(int)).max()
    return "" if gap <= 3 else f"OTHER PIXELS, off by up to {gap}"


def linear(values: np.ndarray) -> Callable[[np.ndarray], str]:
    """A judge: the picture must be a rising linear function of `values` that nothing clips."""
    def judge(picture: np.ndarray) -> str:
        grey = picture if picture.ndim == 2 else picture.reshape(*picture.shape[:2], -1)[..., 0]
        if grey.shape != values.shape:
            return f"shape {picture.shape}"
        if np.ptp(grey) == 0:
            return "CLIPPED to one grey value"
        likeness = np.corrcoef(grey.ravel(), values.ravel())[0, 1]
        return "" if likeness > 0.999 else f"CLIPPED or bent: correlation {likeness:.2f}"
    return judge


# =============================================================================
# Cases
# =============================================================================


def save(name: str, image: Image.Image, **options) -> Callable[[Path], None]:
    return lambda folder: image.save(folder / "a" / name, **options)


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "a" / name).write_bytes(data) and None


def without(tag: str) -> bytes:
    """A DICOM file that lacks a tag."""
    ds = pydicom.dcmread(io.BytesIO(dicom_bytes(DEEP)))
    delattr(ds, tag)
    file = io.BytesIO()
    ds.save_as(file)
    return file.getvalue()


def broken_among_good(folder: Path) -> None:
    for i in range(20):
        Image.fromarray(GREY + np.uint8(i)).save(folder / "b" / f"{i:02d}.png")
    whole = (folder / "b" / "00.png").read_bytes()
    (folder / "b" / "cut.png").write_bytes(whole[:60])
    (folder / "b" / "page.png").write_text("<html>Log in</html>")
    (folder / "b" / "zero.jpg").write_bytes(b"\xff\xd8" + bytes(99))


def flip(folder: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(
        folder / "a" / "x.png")
    data = bytearray((folder / "a" / "x.png").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "a" / "x.png").write_bytes(data)


def junk(folder: Path) -> None:
    for name in ("._good.png", "Thumbs.db", ".DS_Store", "notes.txt"):
        (folder / "a" / name).write_bytes(b"\0\5\x16\7junk")
    (folder / "a" / "empty.png").write_bytes(b"")


def bomb(folder: Path) -> None:
    """20,000 x 20,000 pixels in 50 kB: whole, and right down to its CRCs."""
    rows = zlib.compress(bytes(20_000 * 2_501), 9)
    chunks = [(b"IHDR", (20_000).to_bytes(4, "big") * 2 + b"\1\0\0\0\0"), (b"IDAT", rows),
              (b"IEND", b"")]
    with open(folder / "a" / "bomb.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in chunks:
            crc = zlib.crc32(name + body).to_bytes(4, "big")
            file.write(len(body).to_bytes(4, "big") + name + body + crc)


def medium_bomb(folder: Path) -> None:
    """9,400 x 9,400: below the size at which Pillow warns."""
    Image.new("1", (9_400, 9_400)).save(folder / "a" / "bomb.png")


COLOUR = np.stack([GREY, GREY[::-1], GREY.T], -1)
HALF = np.dstack([COLOUR, np.full_like(GREY, 128)])
EXIF = Image.Exif()
EXIF[274] = 6
RGB = Image.fromarray(COLOUR)
NEGATIVE = DEEP.astype(np.int16) - 2000
CT = {"RescaleSlope": 2, "RescaleIntercept": -1624}
LUNG = np.clip((DEEP * 2.0 - 1624 + 1350) / 1500, 0, 1) * 255
FINE = {"a/good.png", "b/good.png", "b/good.dcm"}
GOOD = {"a/good.png": GREY, "b/good.png": 255 - GREY}

CASES = [
    Case("X1", "16-bit PNG", save("x.png", Image.fromarray(DEEP)), {"a/x.png": linear(DEEP)}),
    Case("X1", "16-bit TIFF", save("x.tif", Image.fromarray(DEEP)), {"a/x.tif": linear(DEEP)}),
    Case("X1", "float TIFF", save("x.tif", Image.fromarray(DEEP / np.float32(7) - 300)),
         {"a/x.tif": linear(DEEP)}),
    Case("X1", "DICOM, 16 bits, no rescale", put("x.dcm", dicom_bytes(DEEP)),
         {"a/x.dcm": linear(DEEP)}, dicom=True),
    Case("X1", "DICOM, negative values", put("x.dcm", dicom_bytes(
        NEGATIVE, PixelRepresentation=1)), {"a/x.dcm": linear(NEGATIVE)}, dicom=True),
    Case("X1", "DICOM with rescale, lung window asked for", put("x.dcm", dicom_bytes(DEEP, **CT)),
         {"a/x.dcm": LUNG}, window="lung", dicom=True),
    Case("X1", "DICOM without rescale, lung window asked for", put("x.dcm", dicom_bytes(DEEP)), {},
         "Hounsfield", window="lung", dicom=True),
    Case("X2", "3 broken files among 21", broken_among_good, {},
         r"(?=.*cut\.png)(?=.*page\.png)(?=.*zero\.jpg)"),
    Case("X2", "one bit of a PNG flipped", flip, {}, r"x\.png"),
    Case("X3", "._x.png, Thumbs.db, text, an empty file", junk, GOOD),
    Case("X4", "a link to the folder above", lambda f: (f / "a" / "up").symlink_to(f), GOOD),
    Case("X4", "three links to the folder above", lambda f: [
        (f / "a" / f"up{i}").symlink_to(f) for i in range(3)] and None, GOOD),
    Case("X4", "a dangling link", lambda f: (f / "a" / "x.png").symlink_to("nowhere.png"), GOOD),
    Case("X4", "a second link to a file", lambda f: (f / "a" / "x.png").symlink_to("good.png"),
         GOOD),
    Case("X5", "half transparent", save("x.png", Image.fromarray(HALF)),
         {"a/x.png": (COLOUR * (128 / 255)).round()}),
    Case("X5", "transparent palette colour", save("x.png", Image.new("P", (SIDE, SIDE), 1),
                                                  transparency=1),
         {"a/x.png": np.zeros((SIDE, SIDE))}),
    Case("X5", "CMYK TIFF", save("x.tif", RGB.convert("CMYK")), {"a/x.tif": COLOUR}),
    Case("X5", "1 bit", save("x.png", Image.fromarray(GREY > 99)), {"a/x.png": (GREY > 99) * 255}),
    Case("X5", "EXIF rotation", save("x.jpg", Image.fromarray(GREY), exif=EXIF, quality=100),
         {"a/x.jpg": np.rot90(GREY, 3)}),
    Case("X5", "a JPEG named .png", save("x.png", Image.fromarray(GREY), format="JPEG",
                                         quality=100), {"a/x.png": GREY}),
    Case("X6", "20,000 x 20,000 pixels in 50 kB", bomb, {}, r"bomb\.png.*limit|limit.*bomb"),
    Case("X6", "9,400 x 9,400 pixels in 11 kB", medium_bomb, {}, r"bomb\.png.*limit"),
    Case("X7", "MONOCHROME1", put("x.dcm", dicom_bytes(
        DEEP, PhotometricInterpretation="MONOCHROME1")), {"a/x.dcm": linear(-DEEP.astype(float))},
         dicom=True),
    Case("X7", "five frames", put("x.dcm", dicom_bytes(np.stack([GREY] * 5))), {"a/x.dcm": GREY},
         dicom=True),
    Case("X7", "a missing tag", put("x.dcm", without("BitsStored")), {},
         r"x\.dcm.*BitsStored \(0028,0101\)", dicom=True),
    Case("X7", "no pixels", put("x.dcm", without("PixelData")), {}, r"x\.dcm.*pixel ?data",
         dicom=True),
    Case("X7", "compressed, no decoder installed", lambda folder: shutil.copy(get_testdata_file(
        "MR_small_jpeg_ls_lossless.dcm", download=False), folder / "a" / "x.dcm") and None, {},
         r"x\.dcm.*JPEG-LS.*pip install pylibjpeg", dicom=True),
    Case("X7", "RLE compressed", put("x.dcm", dicom_bytes(DEEP, compress=True)),
         {"a/x.dcm": linear(DEEP)}, dicom=True),
]


@contextlib.contextmanager
def no_decoder(uid: str) -> Iterator[None]:
    """Hide the decoders of a transfer syntax, as on a machine without them."""
    decoder = pydicom.pixels.get_decoder(uid)
    needs = {"pylibjpeg": ("pylibjpeg>=2.0", "pylibjpeg-libjpeg>=2.1")}
    with mock.patch.object(decoder, "_available", {}), \
            mock.patch.object(decoder, "_unavailable", needs):
        yield


def run(case: Case, tools: Iterable[str] = READERS, apart: bool = True) -> faults.Result:
    """One case under each of `tools` whose business it is, in processes of their own or here."""
    result = faults.Result(case.row, case.name)
    hidden = partial(no_decoder, JPEGLSLossless) if "no decoder" in case.name else nullcontext
    for tool in tools:
        if tool != "ours" and (tool == "plain pydicom") != case.dicom:
            continue
        folder = Path(tempfile.mkdtemp(prefix="fault-"))
        try:
            for name in "ab":
                (folder / "in" / name).mkdir(parents=True)
            if case.dicom:
                (folder / "in" / "b" / "good.dcm").write_bytes(dicom_bytes(GREY))
            else:
                Image.fromarray(GREY).save(folder / "in" / "a" / "good.png")
                Image.fromarray(255 - GREY).save(folder / "in" / "b" / "good.png")
            case.build(folder / "in")
            with hidden():
                work = partial(outcome, READERS[tool], case, folder / "in", folder / "data")
                got = faults.isolated(work) if apart else work()
        finally:
            shutil.rmtree(folder)
        result.survived[tool], result.words[tool] = verdict(case, got, f"{folder}/in/")
    return result


def verdict(case: Case, got: faults.Outcome, root: str) -> tuple[bool, str]:
    """Return whether the case was survived, and what happened in a few words."""
    wrong = got.text if got.what in ("read", "refused") else f"{got.what} ({got.text})"
    if case.row == "X6" and got.megabytes > SPENT:
        wrong = f"spent {got.megabytes} MB"
    right = f"refused: {got.kind}" if got.what == "refused" else "right"
    return not wrong, (wrong or right).replace(root, "")


def table(results: list[faults.Result]) -> str:
    """Cases survived, for each row and tool, as a markdown table."""
    lines = [f"| row | {' | '.join(READERS)} |", "|---" * (len(READERS) + 1) + "|"]
    for row in [*sorted({r.row for r in results}), "cases"]:
        cells = []
        for tool in READERS:
            of_row = [r for r in results if row in (r.row, "cases") and tool in r.survived]
            cells.append(f"{sum(r.survived[tool] for r in of_row)} of {len(of_row)}"
                         if of_row else "–")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[], help="such as X1 X6; default: all")
    options = parser.parse_args(arguments)
    if not Path("/proc/self/statm").exists():
        print("The limits on memory need Linux; nothing was run.")
        return 0
    results = []
    for case in CASES:
        if not options.rows or case.row in options.rows:
            results.append(run(case))
            faults.show(results[-1])
    print(f"\n{table(results)}\n")
    return 1 if any(not r.survived["ours"] for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
