"""Mutate a good checkpoint at random: each must be refused, or give the same weights bit for bit.

python -m tests.robustness.mutate --count 3000 --seed 0
"""

import argparse
import io
import random
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

import medssl_utils as medssl

with torch.device("meta"):  # at most three numbers a side: a file has 90 kB
    LAYOUT = {
        name: tensor.new_empty([min(side, 3) for side in tensor.shape])
        for name, tensor in medssl._new_resnet50().state_dict().items()
    }


class TinyResNet50(torch.nn.Module):
    """Has the 318 names of a ResNet50, and small shapes."""

    def __init__(self, seed=0):
        super().__init__()
        self.state = LAYOUT

    def state_dict(self):
        return self.state

    def load_state_dict(self, state, **_):
        self.state = state


def weights() -> dict[str, torch.Tensor]:
    """Numbers for each tensor, no two tensors alike."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.rand(blank.shape, generator=generator) + 0.5).mul(1000).to(blank.dtype)
        for name, blank in LAYOUT.items()
    }


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip a bit, or cut, drop, double or blank a piece."""
    at = chance.randrange(len(data))
    length = chance.choice([1, 4, 64, 1000, 20_000])
    kind = chance.choice(["flip", "flip", "cut", "drop", "double", "blank"])
    piece, rest = data[at : at + length], data[at + length :]
    if kind == "flip":
        piece = bytes([piece[0] ^ 1 << chance.randrange(8)]) + piece[1:]
    ends = {"flip": piece + rest, "cut": b"", "drop": rest, "double": piece + piece + rest}
    return data[:at] + ends.get(kind, bytes(len(piece)) + rest)


def mutate_pickle(data: bytes, chance: random.Random) -> bytes:
    """Change the pickle and write the archive anew, so that every checksum is honest."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(file, "w") as target:
        for record in source.namelist():
            content = source.read(record)
            if record.endswith("/data.pkl"):
                for _ in range(chance.choice([1, 1, 2])):
                    content = mutate_bytes(content, chance)
            target.writestr(record, content)
    return file.getvalue()


def outcome(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Return "refused", "the same weights", or what must never be, in capitals."""
    try:
        loaded = medssl.load_backbone("MoCo", path)[0].state_dict()
    except medssl.CheckpointError as error:
        return "ADVICE" if "weights_only" in str(error) else "refused"
    same = all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    return "the same weights" if same else "WRONG WEIGHTS"


def run(count: int, seed: int) -> Counter:
    """Try `count` mutations, bytes and pickles in turn; return how often each outcome came."""
    warnings.simplefilter("ignore")
    tensors, results = weights(), Counter()
    state = {f"encoder_q.{name}": tensor for name, tensor in tensors.items()}
    file = io.BytesIO()
    torch.save({"state_dict": state | {"encoder_k.conv1.weight": torch.ones(1)}}, file)
    good = file.getvalue()
    patch = mock.patch.object(medssl, "_new_resnet50", TinyResNet50)
    with tempfile.TemporaryDirectory() as folder, patch:
        path = Path(folder) / "model.ckpt"
        path.write_bytes(good)
        assert outcome(path, tensors) == "the same weights"
        for number in range(seed, seed + count):
            mutate = mutate_pickle if number % 2 else mutate_bytes
            path.write_bytes(mutate(good, random.Random(number)))
            result = outcome(path, tensors)
            results[result] += 1
            if result.isupper():
                print(f"seed {number}: {result}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    for result, number in run(**vars(parser.parse_args())).most_common():
        print(f"{number:6} {result}")
