"""Thousands of seeded mutations of a good checkpoint: none may load as other weights.

    python bench/fuzz_load.py                         5,000 mutations, a few minutes
    python bench/fuzz_load.py --count 200 --seed 7    another, shorter draw

The file is a MoCo checkpoint as torch.save writes it, in a network whose 318 tensors have
ResNet50's names and at most 3 x 3 x 3 x 3 numbers, so that one load takes milliseconds; everything
between the file and the tensors is the real code. A mutation is refused with CheckpointError, or
gives the good file's tensors bit for bit (it met nothing that matters, as a time stamp). Anything
else is a failure: other weights, another error, a load of more than 5 seconds.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import medssl_utils as medssl  # noqa: E402

SECONDS = 5.0  # a load may take

Places = dict[str, tuple[int, int]]  # record -> (first byte, length)
Mutation = Callable[[bytearray, Places, np.random.Generator], object]


def small_layout() -> dict[str, torch.Tensor]:
    """ResNet50's 318 names and types with every dimension cut to 3, without memory."""
    return {name: torch.empty([min(n, 3) for n in tensor.shape], dtype=tensor.dtype, device="meta")
            for name, tensor in medssl._backbone_layout().items()}


def write_good(path: Path, layout: dict[str, torch.Tensor]) -> None:
    """Write a whole MoCo checkpoint around a backbone of that layout."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for prefix in ("encoder_q.", "encoder_k."):
        for name, blank in layout.items():
            state[prefix + name] = torch.randint(1, 99, blank.shape, generator=generator).to(
                blank.dtype)
    state |= {"queue": torch.ones(2, 2), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"epoch": 1, "state_dict": state, "hyper_parameters": {"lr": 0.1}}, path)


def places_of(path: Path) -> Places:
    """Find where each record's bytes lie."""
    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<2H", file.read(4))
            found[info.filename] = (info.header_offset + 30 + name + extra, info.file_size)
    return found


def flip_bit(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def flip_directory_bit(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    start = data.rindex(b"PK\1\2", 0, data.index(b"PK\1\2") + 4)
    data[rng.integers(start, len(data))] ^= 1 << int(rng.integers(8))


def set_bytes(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    for position in rng.integers(len(data), size=rng.integers(1, 9)):
        data[position] = rng.integers(256)


def truncate(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    del data[rng.integers(len(data)):]


def zero_hole(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    start, length = rng.integers(len(data)), rng.integers(1, 4096)
    data[start:start + length] = bytes(len(data[start:start + length]))


def remove_bytes(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    start = rng.integers(len(data))
    del data[start:start + rng.integers(1, 512)]


def repeat_bytes(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    start, length = rng.integers(len(data)), rng.integers(1, 512)
    data[start:start] = data[start:start + length]


def swap_records(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    records = [record for record in places.values() if record[1] > 8]
    (a, size), (b, other) = (records[i] for i in rng.choice(len(records), 2, replace=False))
    size = min(size, other)
    data[a:a + size], data[b:b + size] = data[b:b + size], data[a:a + size]


def edit_pickle(data: bytearray, places: Places, rng: np.random.Generator) -> None:
    """Change one byte of the pickle and repair its CRC: nothing but the pickle's sense is left."""
    record = next(name for name in places if name.endswith("data.pkl"))
    start, length = places[record]
    old = zlib.crc32(data[start:start + length])
    position = start + rng.integers(length)
    data[position] = (data[position] + rng.integers(1, 256)) % 256 if rng.random() < 0.5 else (
        data[start + rng.integers(length)])
    new = zlib.crc32(data[start:start + length])
    data[:] = data.replace(struct.pack("<I", old), struct.pack("<I", new))


MUTATIONS: tuple[Mutation, ...] = (
    flip_bit, flip_directory_bit, set_bytes, truncate, zero_hole, remove_bytes, repeat_bytes,
    swap_records, edit_pickle, edit_pickle,
)


def fuzz(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Load `count` mutations; return how often each outcome came, and the failures in words."""
    layout, outcomes, failures = small_layout(), Counter(), []
    good_path, path = folder / "good.ckpt", folder / "mutated.ckpt"
    write_good(good_path, layout)
    good, places = good_path.read_bytes(), places_of(good_path)
    rng = np.random.default_rng(seed)
    with mock.patch.object(medssl, "_backbone_layout", lambda: layout):
        right = medssl._load_original("MoCo", good_path, ())[1].fingerprint
        for number in range(count):
            mutate = MUTATIONS[number % len(MUTATIONS)]
            data = bytearray(good)
            mutate(data, places, rng)
            path.write_bytes(data)
            start = time.perf_counter()
            try:
                same = medssl._load_original("MoCo", path, ())[1].fingerprint == right
                outcome = "loaded, same weights" if same else "OTHER WEIGHTS"
            except medssl.CheckpointError:
                outcome = "refused"
            except BaseException as error:
                outcome = f"ANOTHER ERROR: {error!r}"[:200]
            if time.perf_counter() - start > SECONDS:
                outcome = "SLOW"
            outcomes[outcome] += 1
            if outcome not in ("refused", "loaded, same weights"):
                failures.append(f"{number} {mutate.__name__}: {outcome}")
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="number of mutations")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, failures = fuzz(arguments.count, arguments.seed, Path(folder))
    print(f"torch {torch.__version__}; {arguments.count:,} mutations, seed {arguments.seed}, "
          f"{time.perf_counter() - start:.0f} s")
    for outcome, count in outcomes.most_common():
        print(f"{count:7,}  {outcome}")
    print(*failures[:20], sep="\n")
    print(f"silently wrong weights: {outcomes['OTHER WEIGHTS']}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
