"""Files that run code, lie or are damaged: none runs, none passes for another (L1 to L8, L15)."""

import argparse
import collections
import functools
import pathlib
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

import medssl_utils as medssl
from tests.robustness import mutate

WEIGHTS = mutate.weights()
FIRST = WEIGHTS["conv1.weight"].numpy().tobytes()


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """A ResNet50 of at most three numbers a side, for speed."""
    monkeypatch.setattr(medssl, "_new_resnet50", mutate.TinyResNet50)


@pytest.fixture
def good(tmp_path) -> pathlib.Path:
    """A plain SparK file, with a text among its settings that payloads take the place of."""
    path = tmp_path / "good.pth"
    torch.save({"note": "PAYLOAD", "module": WEIGHTS, "is_pretrain": True}, path)
    return path


def text(value: str) -> bytes:
    """Push a text onto the stack of a pickle."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(name: str, *values: bytes) -> bytes:
    """Look up `module attribute` and call it."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(values) + b"tR"


def with_payload(good: pathlib.Path, payload: bytes, path: pathlib.Path) -> pathlib.Path:
    """Write the good archive with `payload` among its settings, every checksum honest."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.namelist():
            data = source.read(record)
            if record.endswith("/data.pkl"):
                data = data.replace(text("PAYLOAD"), payload)
            target.writestr(record, data)
    return path


PAYLOADS = {  # what the error names -> the call, which makes the file m
    "posix.system": lambda m: call("posix system", text(f"touch '{m}'")),
    r"\bexec\b": lambda m: call("builtins exec", text(f"open({str(m)!r}, 'w')")),
    r"\beval\b": lambda m: call("__builtin__ eval", text(f"open({str(m)!r}, 'w')")),
    "_io.FileIO": lambda m: call("_io FileIO", text(str(m)), text("w")),
    "numpy.memmap": lambda m: call("numpy memmap", text(str(m)), text("uint8"), text("w+")),
    "torch.save": lambda m: call("torch save", b"K\x01", text(str(m))),
    "runpy.run_path": lambda m: call("runpy run_path", text(str(m))),
    "pathlib.Path.touch": lambda m: call("pathlib Path.touch", call("pathlib Path", text(str(m)))),
    "damaged": lambda m: b"(" + text(str(m)) + b"iposix\nmkdir\n",  # PyTorch reads no opcode INST
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_code_in_a_pickle_is_named_and_does_not_run(name, good, tmp_path):
    marker = tmp_path / "marker"
    path = with_payload(good, PAYLOADS[name](marker), tmp_path / "model.pth")
    with pytest.raises(medssl.CheckpointError, match=name) as caught:
        medssl.load_backbone("SparK", path)
    assert not marker.exists() and "weights_only" not in str(caught.value)
    if name == "posix.system":  # the test can fail
        torch.load(path, weights_only=False)
        assert marker.exists()


AttributeDict = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning"})
LEFTOVERS = {
    "Namespace": argparse.Namespace(lr=0.3, gpus=[0, 1]),
    "path": pathlib.PurePosixPath("data/lidc"),
    "NumPy scalars": [np.float64(0.25), np.int64(3), np.bool_(True), np.dtype("float32")],
    "partial": functools.partial(torch.optim.Adam, lr=0.1),
    "collections": [collections.defaultdict(list), collections.Counter("abca")],
    "deque": collections.deque([1], 5),
    "builtins": [{1, 2}, frozenset([3]), 1 + 2j, b"raw", slice(1, 2), range(3), int],
    "layer": {"class": torch.nn.ReLU, "layer": torch.nn.Linear(4, 2)},
    "callback class as a key": {torch.nn.ReLU: {"best_model_score": torch.tensor(0.5)}},
    "torch values": [torch.Size([1, 2]), torch.float16, torch.device("cpu")],
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_harmless_leftovers_of_training_code_load(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", sys.modules[__name__])
    content = {"module": AttributeDict(WEIGHTS), "hyper_parameters": LEFTOVERS[name]}
    torch.save(content, tmp_path / "model.pth")
    monkeypatch.delitem(sys.modules, "pytorch_lightning")  # as where it is not installed
    model, _ = medssl.load_backbone("SparK", tmp_path / "model.pth")
    assert torch.equal(model.state_dict()["conv1.weight"], WEIGHTS["conv1.weight"])


def record_twice(good: pathlib.Path) -> bytes:
    with zipfile.ZipFile(good, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[-1], b"3\n")
    return good.read_bytes()


DAMAGE = {
    "a web page": (lambda good: b"\n <!DOCTYPE html><p>Quota exceeded", "web page"),
    "nothing": (lambda good: b"", "not a checkpoint"),
    "a text": (lambda good: b"The checkpoint is on the other server.", "not a checkpoint"),
    "half of it": (lambda good: good.read_bytes()[:50_000], "damaged"),
    "one byte short": (lambda good: good.read_bytes()[:-1], "damaged"),
    "other bytes": (lambda good: good.read_bytes().replace(FIRST, FIRST[::-1]), r"CRC .*data/0"),
    "a record twice": (record_twice, "twice"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_words(name, good, tmp_path):
    build, words = DAMAGE[name]
    (tmp_path / "model.pth").write_bytes(build(good))
    with pytest.raises(medssl.CheckpointError, match=words):
        medssl.load_backbone("SparK", tmp_path / "model.pth")


WITH_ATTRIBUTE = torch.ones(1).expand(3)
WITH_ATTRIBUTE.stride = collections.OrderedDict  # would answer in the place of the method
TRICKS = {
    "stride of zero": {"bn1.weight": torch.ones(1).expand(3)},
    "overlapping stride": {"bn1.weight": torch.ones(9).as_strided((3,), (2,))},
    "shared storage": {"layer1.0.bn1.weight": WEIGHTS["bn1.weight"]},
    "no storage": {"conv1.weight": WEIGHTS["conv1.weight"].to("meta")},
    "sparse": {"conv1.weight": WEIGHTS["conv1.weight"].to_sparse()},
    "its own stride()": {"bn1.weight": WITH_ATTRIBUTE},
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_tensor_without_numbers_of_its_own_is_refused(name, tmp_path):
    torch.save({"module": WEIGHTS | TRICKS[name]}, tmp_path / "model.pth")
    with pytest.raises(medssl.CheckpointError):
        medssl.load_backbone("SparK", tmp_path / "model.pth")


def test_seeded_mutations_are_refused_or_give_the_same_bits():
    results = mutate.run(60, seed=0)
    assert set(results) == {"refused", "the same weights"}
    assert results["refused"] > 30
