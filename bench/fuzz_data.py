"""Thousands of seeded mutations of image, DICOM and NIfTI files: read, or refused by name.

    python bench/fuzz_data.py                         6,000 mutations, a few minutes
    python bench/fuzz_data.py --count 600 --seed 7    another, shorter draw

Good files of 24 x 24 pixels (PNG, JPEG, TIFF and BMP in several modes, DICOM plain, RLE, with
frames and with a palette, NIfTI plain and packed) are damaged: bits, bytes, holes, cuts, headers
with extreme numbers, PNG chunks with a repaired CRC, DICOM tags with values that lie. Folders of
fifty are read by `read_folder` in a process of their own with a limit on memory and time. A
failure is a process that dies or hangs, a file that is neither read nor named, and a PNG that is
read as other pixels although its CRC says so. The other formats carry no checksum over their
pixels: what is then read is counted, not judged.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import torch
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import fuzz_load  # noqa: E402

import medssl_utils as medssl  # noqa: E402

BATCH, SECONDS = 50, 60.0  # files a process reads, and what it may take for them
MEMORY = 1 << 30  # bytes that a process may claim beyond what it began with
SIZE = 24

Mutation = Callable[[bytearray, np.random.Generator], None]


# =============================================================================
# Good files
# =============================================================================


def dicom_bytes(pixels: np.ndarray, compress: bool = False, **tags) -> bytes:
    """A DICOM file of grey pixels (H, W), or of frames (N, H, W)."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=["one"])
    ds.PatientID, ds.Modality = "P1", "CT"
    ds.set_pixel_data(pixels, "MONOCHROME2", 8 * pixels.dtype.itemsize)
    for name, value in tags.items():
        setattr(ds, name, value)
    if compress:
        ds.compress(RLELossless, generate_instance_uid=False)
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def palette_bytes(pixels: np.ndarray) -> bytes:
    """A DICOM file whose colours come from a palette of 256 entries."""
    tables = {}
    for name in ("Red", "Green", "Blue"):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = (
            np.arange(256, dtype=np.uint16) * 257).tobytes()
    return dicom_bytes(pixels, PhotometricInterpretation="PALETTE COLOR", **tables)


def good_files(seed: int = 0) -> dict[str, bytes]:
    """Name -> bytes of each good file."""
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(rng.integers(0, 9, (SIZE, SIZE, 3)), 0).astype(np.uint8)
    deep = smooth[..., 0].astype(np.uint16) * 100
    exif = Image.Exif()
    exif[274] = 6

    def saved(image: Image.Image, kind: str, **options) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    colour, grey = Image.fromarray(smooth), Image.fromarray(smooth[..., 0])
    files = {
        "grey.png": saved(grey, "PNG"), "deep.png": saved(Image.fromarray(deep), "PNG"),
        "alpha.png": saved(colour.convert("RGBA"), "PNG"),
        "palette.png": saved(colour.quantize(16), "PNG", transparency=0),
        "bit.png": saved(grey.convert("1"), "PNG"),
        "colour.jpg": saved(colour, "JPEG", exif=exif), "grey.jpg": saved(grey, "JPEG"),
        "cmyk.jpg": saved(colour.convert("CMYK"), "JPEG"),
        "steps.jpg": saved(colour, "JPEG", progressive=True),
        "plain.tif": saved(colour, "TIFF"), "deep.tif": saved(Image.fromarray(deep), "TIFF"),
        "packed.tif": saved(colour, "TIFF", compression="tiff_lzw"),
        "pages.tif": saved(grey, "TIFF", save_all=True, append_images=[grey, grey]),
        "colour.bmp": saved(colour, "BMP"), "palette.bmp": saved(colour.quantize(16), "BMP"),
        "plain.dcm": dicom_bytes(deep, RescaleSlope=1, RescaleIntercept=-1024),
        "rle.dcm": dicom_bytes(deep, compress=True), "palette.dcm": palette_bytes(smooth[..., 0]),
        "frames.dcm": dicom_bytes(np.stack([smooth[..., 0]] * 5)),
    }
    volume = nibabel.Nifti1Image(np.stack([deep] * 5, 2).astype(np.int16), np.diag([1, 1, 2, 1]))
    files["volume.nii"] = volume.to_bytes()
    files["packed.nii.gz"] = zlib_gzip(files["volume.nii"])
    return files


def zlib_gzip(data: bytes) -> bytes:
    """gzip without a time stamp, so that the bytes are the seed's own."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


# =============================================================================
# Damage
# =============================================================================


def plain(change: fuzz_load.Mutation) -> Mutation:
    return lambda data, rng: change(data, {}, rng)


def extreme_number(data: bytearray, rng: np.random.Generator) -> None:
    """Put an extreme number somewhere into the first bytes, where headers are."""
    value = [0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF][rng.integers(9)]
    width = int(rng.choice([1, 2, 4]))
    place = int(rng.integers(min(len(data), 600)))
    order = ("little", "big")[rng.integers(2)]
    data[place:place + width] = (value % (1 << 8 * width)).to_bytes(width, order)


def edit_chunk(data: bytearray, rng: np.random.Generator) -> None:
    """Change a byte within a PNG chunk and repair its CRC; in other files, any byte."""
    chunks, place = [], 8
    while data.startswith(b"\x89PNG") and place + 12 <= len(data):
        length = int.from_bytes(data[place:place + 4], "big")
        chunks.append((place, length))
        place += 12 + length
    if not chunks:
        return extreme_number(data, rng)
    start, length = chunks[rng.integers(len(chunks))]
    data[start + 4 + int(rng.integers(4 + length))] = int(rng.integers(256))
    crc = zlib.crc32(data[start + 4:start + 8 + length])
    data[start + 8 + length:start + 12 + length] = crc.to_bytes(4, "big")


TAG_VALUES = {
    "Rows": (0, 1, 25, 65535), "Columns": (0, 1, 23, 65535), "BitsAllocated": (0, 1, 8, 12, 32, 64),
    "BitsStored": (0, 1, 7, 17, 255), "HighBit": (0, 31, 65535), "SamplesPerPixel": (0, 2, 3, 9),
    "PixelRepresentation": (1, 7), "NumberOfFrames": (0, 2, 99, 10**9, -5),
    "PhotometricInterpretation": ("RGB", "YBR_FULL_422", "PALETTE COLOR", "MONOCHROME1", "X", ""),
    "PlanarConfiguration": (1, 5), "RescaleSlope": (0, -1, 1e300), "RescaleIntercept": (1e300, -7),
    "PixelPaddingValue": (0, 65535), "PatientID": ("", "\x1b[31m", "P" * 64),
    "Modality": ("", "MR"), "PixelData": (b"", b"\0\0"),
}


def lying_tag(data: bytearray, rng: np.random.Generator) -> None:
    """Set or delete some DICOM tags; in other files, an extreme number."""
    try:
        ds = pydicom.dcmread(io.BytesIO(bytes(data)))
    except Exception:
        return extreme_number(data, rng)
    for name in rng.choice(list(TAG_VALUES), int(rng.integers(1, 4)), replace=False):
        values = TAG_VALUES[name]
        if rng.random() < 0.2 and name in ds:
            delattr(ds, name)
        else:
            setattr(ds, name, values[rng.integers(len(values))])
    file = io.BytesIO()
    try:
        ds.save_as(file)
    except Exception:  # pydicom itself will not write that
        return extreme_number(data, rng)
    data[:] = file.getvalue()


MUTATIONS: tuple[Mutation, ...] = (
    *map(plain, (fuzz_load.flip_bit, fuzz_load.set_bytes, fuzz_load.truncate, fuzz_load.zero_hole,
                 fuzz_load.remove_bytes, fuzz_load.repeat_bytes)),
    extreme_number, extreme_number, edit_chunk, lying_tag,
)


def write_batch(folder: Path, numbers: range, seed: int, good: dict[str, bytes]) -> None:
    """Write one mutation a number: NUMBER_KIND_NAME."""
    names = list(good)
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        name, kind = names[number % len(names)], number // len(names) % len(MUTATIONS)
        data = bytearray(good[name])
        MUTATIONS[kind](data, rng)
        (folder / f"{number:06d}_{kind}_{name}").write_bytes(data or b"\0")


# =============================================================================
# Reading
# =============================================================================


def read_batch(folder: Path, seed: int, data_dir: Path) -> dict[str, str]:
    """Read a folder of mutations; return name -> outcome."""
    options = medssl.ReadOptions(on_error="skip", slices=("middle", "all", "2")[seed % 3])
    names = sorted(p.name for p in folder.iterdir())
    try:
        found = medssl.read_folder(folder, options, image_size=SIZE, data_dir=data_dir,
                                   labelled=False)
    except ValueError as error:  # all of them broken
        return {name: "refused" if f"  {name}: " in str(error) else "NOT NAMED" for name in names}
    read = {path: i for i, path in enumerate(found.table["path"])}
    outcomes = {name: "NOT NAMED" for name in names}
    outcomes |= {row.path: "refused" if row.reason.isprintable() else "NOT PRINTABLE"
                 for row in found.broken.itertuples()}
    for name, row in read.items():
        outcomes[name] = judge(name, found.images[row])
    return outcomes


def judge(name: str, image: np.ndarray) -> str:
    """Hold what was read against the good picture; a CRC protects a PNG not made to pass it."""
    _, kind, good = name.split("_")
    if np.array_equal(image, right_pictures()[good]) or np.array_equal(
            image, np.stack([right_pictures()[good]] * 3, 2)[..., :image.shape[-1]]):
        return "read, same pixels"
    if good.endswith(".png") and MUTATIONS[int(kind)] not in (edit_chunk,):
        return "read, OTHER PIXELS in spite of a CRC"
    return "read, other pixels"


_RIGHT: dict[str, np.ndarray] = {}


def right_pictures() -> dict[str, np.ndarray]:
    """The picture of each good file, read in the same way, in colour where it is."""
    if not _RIGHT:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, data in good_files().items():
                path = Path(folder, name)
                path.write_bytes(data)
                _, pictures = medssl._read_file(path, medssl.ReadOptions(), SIZE, "uint8")
                _RIGHT[name] = pictures[0]
    return _RIGHT


def limited(folder: Path, seed: int, data_dir: Path, sender) -> None:
    """For a process of its own: limit its memory, read, send the outcomes and what it claimed."""
    import resource  # not on Windows, where the tests use the rest of this file

    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = read_batch(folder, seed, data_dir)
    sender.send((outcomes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10))


def read_apart(folder: Path, seed: int, data_dir: Path) -> tuple[dict[str, str], int]:
    """Do `limited` in a forked process; a process that dies or hangs fails all its files."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=limited, args=(folder, seed, data_dir, sender))
    process.start()
    sender.close()
    names = sorted(p.name for p in folder.iterdir())
    try:
        return receiver.recv() if receiver.poll(SECONDS) else ({n: "HUNG" for n in names}, 0)
    except EOFError:
        process.join()
        return {n: f"DIED, exit status {process.exitcode}" for n in names}, 0
    finally:
        process.kill()
        process.join()


def fuzz(
    count: int, seed: int, folder: Path, apart: bool = True,
) -> tuple[Counter[str], list[str], int]:
    """Read `count` mutations; return outcomes, failures in words, and the most MB a batch took."""
    good, outcomes, failures, most = good_files(), Counter(), [], 0
    right_pictures()
    for batch, start in enumerate(range(0, count, BATCH)):
        place = folder / f"{batch}"
        place.mkdir()
        write_batch(place, range(start, min(start + BATCH, count)), seed, good)
        got, megabytes = (read_apart(place, batch, folder / "data") if apart
                          else (read_batch(place, batch, folder / "data"), 0))
        most = max(most, megabytes)
        outcomes.update(got.values())
        failures += [f"{name}: {what}" for name, what in got.items() if is_failure(what)]
        for path in (*place.iterdir(), *(folder / "data" / "decoded").glob("*")):
            path.unlink()
    return outcomes, failures, most


def is_failure(what: str) -> bool:
    """True for an outcome that is a failure: those are written in capitals."""
    return any(word.isupper() and len(word) > 3 for word in what.split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=6000, help="number of mutations")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        print("The limit on memory needs Linux; nothing was run.")
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, failures, most = fuzz(arguments.count, arguments.seed, Path(folder))
    print(f"pydicom {pydicom.__version__}, Pillow {Image.__version__}, nibabel "
          f"{nibabel.__version__}; {arguments.count:,} mutations, seed {arguments.seed}, "
          f"{time.perf_counter() - start:.0f} s, at most {most} MB for {BATCH} files")
    for outcome, number in outcomes.most_common():
        print(f"{number:7,}  {outcome}")
    print(*failures[:40], sep="\n")
    print(f"failures: {len(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
