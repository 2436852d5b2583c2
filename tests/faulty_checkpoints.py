"""Bad and odd checkpoint files, with what must happen to each (rows L1 to L16 of the faults).

`CASES` lists them. A case builds its file into a folder of its own and says what a reader must
do with it: refuse it with a message that says the right thing, or load exactly the 318 tensors
of `weights()`. Nothing here knows how a checkpoint is read. The harmful files only try to create
a marker in their own folder, or to leave another trace that `side_effect` looks for.

Sections: the good files; zip archives by hand; L1 and L2 (code); L3 (other files); L4 and L5
(damage); L6 to L8 (lies); L9 to L13 (wrong contents); L14 to L16 (odd, but right).
"""

from __future__ import annotations

import argparse
import bz2
import collections
import contextlib
import datetime
import decimal
import functools
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file

METHODS = ("BYOL", "SwAV", "MoCo", "SparK")
PREFIX = {"BYOL": "online_network.encoder.", "SwAV": "model.", "MoCo": "encoder_q.", "SparK": ""}
FLAG = "CHECKPOINT_FAULT"  # a name that harmful files put into other places than the marker

Build = Callable[[Path], Path]


@dataclass(frozen=True)
class Case:
    """One file, and what must happen to it.

    Attributes:
        row: row of the table of faults.
        name: short name, unique within the row.
        method: the method that the file is asked for as.
        build: writes the file into an empty folder, returns its path.
        must: "refused", "loads", or "either" (where both are safe; wrong weights never are).
        says: regular expression that a refusal must match (case is ignored).
        twin: writes the good version of the same file, which must load.
        expected: the 318 tensors that must come out, bit for bit.
        allow_extra: what the user explicitly allows when the file is loaded.
        twin_allow_extra: the same for the twin.
        runs: True if an unprotected reader would run code from this file.
        reports: regular expression that the report of a load must match.
        trusted: True if the folder must hold a verified load of the twin before this file
            takes its place (the recorded checksum).
    """

    row: str
    name: str
    method: str
    build: Build
    must: str = "refused"
    says: str = ""
    twin: Build | None = None
    expected: Callable[[], dict[str, torch.Tensor]] = field(default=lambda: weights())
    allow_extra: tuple[str, ...] = ()
    twin_allow_extra: tuple[str, ...] = ()
    runs: bool = False
    reports: str = ""
    trusted: bool = False

    @property
    def id(self) -> str:
        return f"{self.row} {self.name}"

    def good(self, folder: Path) -> Path:
        """Write the twin: its own builder, or the whole file of the same method."""
        return self.twin(folder) if self.twin else good_file(self.method)(folder)


CASES: list[Case] = []


def add(row: str, name: str, build: Build, says: str = "", *, method: str = "SparK", **options):
    """Append a case; see `Case` for the options."""
    CASES.append(Case(row, name, method, build, says=says, **options))


def case(row: str, name: str, says: str = "", **options) -> Callable[[Build], Build]:
    """Decorator: register a function that writes one file."""
    def register(build: Build) -> Build:
        add(row, name, build, says, **options)
        return build
    return register


def marker(folder: Path) -> Path:
    """The file that code from a checkpoint in `folder` would create."""
    return folder / "EXECUTED"


def side_effect(folder: Path) -> str:
    """Name a trace that code from a checkpoint left behind, or return ""."""
    traces = {
        "the marker file": marker(folder).exists(),
        "os.environ": FLAG in os.environ,
        "sys.modules": FLAG in sys.modules,
        "sys.path": FLAG in sys.path,
        "torch.nn.Module": hasattr(torch.nn.Module, FLAG),
        "argparse.Namespace": hasattr(argparse.Namespace, FLAG),
        "torch's list of safe names": os.system in torch.serialization.get_safe_globals(),
    }
    return next((name for name, found in traces.items() if found), "")


# =============================================================================
# The good files
# =============================================================================


@functools.lru_cache(maxsize=4)
def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A full ResNet50 backbone (318 tensors), random, with BatchNorm away from its start."""
    return filled(torchvision.models.resnet50, seed)


def filled(architecture: Callable, seed: int = 0, **options) -> dict[str, torch.Tensor]:
    """State dict of a network without its `fc`, filled with random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = architecture(weights=None, **options).state_dict()
    return {key: _values(key, tensor, generator) for key, tensor in shapes.items()
            if not key.startswith("fc.")}


def _values(key: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.tensor(4321)
    noise = torch.empty(tensor.shape).normal_(generator=generator)
    if key.endswith("running_var"):
        return noise.abs_().add_(0.5)
    return noise.mul_(0.02) if tensor.dim() > 1 else noise.mul_(0.1).add_("weight" in key)


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def small(prefix: str, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """Auxiliary tensors: right names and dtypes, one element each."""
    return {prefix + key: torch.tensor(7) if key.endswith("tracked") else torch.full((1,), 0.25)
            for key in keys}


BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BYOL_HEAD = ("model.0.weight", *(f"model.1.{key}" for key in BATCH_NORM),
             "model.3.weight", "model.3.bias")
SWAV_HEAD = ("0.weight", "0.bias", *(f"1.{key}" for key in BATCH_NORM), "3.weight", "3.bias")


def auxiliary(method: str) -> dict[str, torch.Tensor]:
    """What a method's file holds beside the backbone."""
    if method == "BYOL":
        heads = [small(f"{network}_network.{head}.", BYOL_HEAD)
                 for network in ("online", "target") for head in ("projector", "predictor")]
        return {**heads[0], **heads[1], **small("target_network.encoder.", list(weights())),
                **heads[2], **heads[3]}
    if method == "SwAV":
        return {**small("model.projection_head.", SWAV_HEAD), **small("model.", ["prototypes.weight"])}
    if method == "MoCo":
        head = ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")
        queues = {key: torch.zeros(1, dtype=torch.int64) if key.endswith("ptr") else torch.ones(4, 8)
                  for key in ("queue", "queue_ptr", "val_queue", "val_queue_ptr")}
        return {**queues, **small("encoder_q.", head),
                **small("encoder_k.", (*weights(), *head))}
    return {}


def wrapped(method: str, tensors: dict[str, torch.Tensor], **changes) -> dict:
    """The outer dictionary as the method's pre-training code saves it."""
    tensors = collections.OrderedDict(tensors)
    if method == "SparK":
        return {"arch": "resnet50", "module": tensors, "is_pretrain": True, **changes}
    return {"epoch": 799, "global_step": 40000, "pytorch-lightning_version": "1.6.5",
            "state_dict": tensors, "loops": {}, "callbacks": {}, "optimizer_states": [],
            "lr_schedulers": [], "hparams_name": "kwargs",
            "hyper_parameters": {"learning_rate": 0.3, "batch_size": 128}, **changes}


def checkpoint(method: str, backbone: dict[str, torch.Tensor] | None = None, **changes) -> dict:
    """A whole checkpoint of `method` around `backbone` (default: `weights()`)."""
    backbone = weights() if backbone is None else backbone
    tensors = {**prefixed(PREFIX[method], backbone), **auxiliary(method)}
    return wrapped(method, tensors, **changes)


def saved(content: object, name: str = "model.ckpt", **options) -> Build:
    """Builder: `content` (or what it returns when called) as torch.save writes it."""
    def build(folder: Path) -> Path:
        torch.save(content() if callable(content) else content, folder / name, **options)
        return folder / name
    return build


@functools.lru_cache
def good_file(method: str) -> Build:
    """Builder of the whole, right file of `method`."""
    return saved(lambda: checkpoint(method))


def changed(method: str, change: Callable[[dict], object]) -> Build:
    """Builder: the checkpoint of `method` after `change` was applied to its tensors."""
    def content() -> dict:
        outer = checkpoint(method)
        change(outer["module" if method == "SparK" else "state_dict"])
        return outer
    return saved(content)


# =============================================================================
# Zip archives by hand: every field can lie
# =============================================================================


@dataclass(frozen=True)
class Storage:
    """A storage as the pickle names it, which may lie about kind, length, place and device."""

    tensor: torch.Tensor
    kind: type = torch.FloatStorage
    length: int | None = None
    key: str | None = None
    location: str = "cpu"


class Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Callable, *args: object):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class _Pickler(pickle.Pickler):
    """Pickles as torch.save does, but keeps the storages beside the pickle."""

    kinds = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.records: dict[str, memoryview] = {}

    def persistent_id(self, obj: object) -> tuple | None:
        if isinstance(obj, torch.storage.TypedStorage):
            tensor = torch.empty(0, dtype=obj.dtype).set_(obj)
            obj = Storage(tensor, self.kinds[obj.dtype])
        if not isinstance(obj, Storage):
            return None
        key = obj.key or str(len(self.records))
        self.records[f"data/{key}"] = memoryview(obj.tensor.reshape(-1).numpy()).cast("B")
        length = obj.tensor.numel() if obj.length is None else obj.length
        return "storage", obj.kind, key, obj.location, length


Records = list[tuple[str, bytes | memoryview]]


def parts(content: object) -> Records:
    """The records of the archive that torch.save would write for `content`."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    return [("data.pkl", file.getvalue()), ("byteorder", b"little"),
            *pickler.records.items(), ("version", b"3\n")]


LOCAL, CENTRAL, END = "<4s5H3L2H", "<4s6H3L5H2L", "<4s4H2LH"


def write_zip(path: Path, records: Records, top: str = "archive/", **lies: dict) -> Path:
    """Write an uncompressed zip; `lies` maps a record name to header fields that are forced.

    Fields: method, flags, crc, packed, size (both headers), and offset (central directory).
    """
    directory = []
    with open(path, "wb") as file:
        for name, data in records:
            lie, title = lies.get(name, {}), (top + name).encode()
            head = [lie.get("flags", 0), lie.get("method", 0), 0, 0x21,
                    lie.get("crc", zlib.crc32(data)), lie.get("packed", len(data)),
                    lie.get("size", len(data)), len(title)]
            offset = lie.get("offset", file.tell())
            pad = -(file.tell() + 30 + len(title) + 4) % 64
            file.write(struct.pack(LOCAL, b"PK\3\4", 20, *head, pad + 4) + title)
            file.write(struct.pack("<2sH", b"FB", pad) + b"Z" * pad)
            file.write(data)
            directory.append(
                struct.pack(CENTRAL, b"PK\1\2", 20, 20, *head, 0, 0, 0, 0, 0, offset) + title)
        start = file.tell()
        file.write(b"".join(directory))
        file.write(struct.pack(END, b"PK\5\6", 0, 0, len(records), len(records),
                               file.tell() - start, start, 0))
    return path


@functools.lru_cache(maxsize=2)
def base(method: str) -> Records:
    """The records of a good file, with a text "PAYLOAD" among the settings to be replaced."""
    name = "note" if method == "SparK" else "hparams_name"
    return parts(checkpoint(method, **{name: "PAYLOAD"}))


def archived(records: Callable[[], Records], **lies: dict) -> Build:
    """Builder: an archive of `records()`, with header fields forced by `lies`."""
    return lambda folder: write_zip(folder / "model.ckpt", records(), **lies)


def repickled(change: Callable[[bytes], bytes], method: str = "SparK") -> Build:
    """Builder: the good archive with `change` applied to the bytes of its pickle."""
    return archived(lambda: [("data.pkl", change(base(method)[0][1])), *base(method)[1:]])


def rebuilt(key: str, value: Callable[[torch.Tensor], object], method: str = "SparK") -> Build:
    """Builder: the good archive with the tensor `key` replaced by `value(tensor)`."""
    def records() -> Records:
        tensors = {**weights(), key: value(weights()[key])}
        return parts(checkpoint(method, tensors))
    return archived(records)


def tensor_call(storage: Storage, size, stride, offset=0) -> Call:
    """A tensor as the pickle describes it: any size, stride and offset over any storage."""
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False,
                collections.OrderedDict())


# =============================================================================
# L1, L2: code in the pickle. Opcodes by hand, so that no import is needed to write them.
# =============================================================================


def text(value: str | Path) -> bytes:
    data = str(value).encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    """Push an importable object by the GLOBAL opcode."""
    return f"c{module}\n{attribute}\n".encode()


def stacked(module: str, attribute: str) -> bytes:
    """The same by STACK_GLOBAL, which also walks dotted attributes (protocol 4)."""
    return text(module) + text(attribute) + b"\x93"


def args(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def call(function: bytes, *values: bytes) -> bytes:
    return function + args(*values) + b"R"


def items(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + b"e"


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


NONE, FALSE, ONE = b"N", b"\x89", b"K\x01"
SYSTEM, EXEC = name("posix", "system"), name("builtins", "exec")


def touch(folder: Path) -> bytes:
    return text(f"touch '{marker(folder)}'")


def code(folder: Path) -> bytes:
    return text(f"open({str(marker(folder))!r}, 'w').close()")


def target(folder: Path) -> bytes:
    return text(marker(folder))


def inner(folder: Path, filename: str, content: bytes) -> bytes:
    """Write a second file that the first one tries to open; push its path."""
    (folder / filename).write_bytes(content)
    return text(folder / filename)


def script(folder: Path) -> bytes:
    return inner(folder, "hubconf.py", f"open({str(marker(folder))!r}, 'w').close()".encode())


def hidden(folder: Path) -> bytes:
    """A whole pickle with code, as bytes inside the pickle (protocol 3 opcode)."""
    data = b"\x80\x04" + call(SYSTEM, touch(folder)) + b"."
    return b"C" + bytes([len(data)]) + data if len(data) < 256 else b"B" + struct.pack(
        "<I", len(data)) + data


def lambda_call(function: bytes, *values: bytes, **keywords: bytes) -> bytes:
    """Call with keywords: a functools.partial that is given them by its __setstate__."""
    partial = call(name("functools", "partial"), name("builtins", "print"))
    state = args(function, args(*values), mapping(**keywords), NONE)
    return call(partial + state + b"b")


def imported(module: str) -> bytes:
    return call(name("importlib", "import_module"), text(module))


def method_of(attribute: str, value: bytes, *values: bytes) -> bytes:
    return call(call(name("operator", "methodcaller"), text(attribute), *values), value)


# name -> (the name that a refusal must show, opcodes that push one object)
Payload = Callable[[Path], bytes]
PAYLOADS: dict[str, tuple[str, Payload]] = {
    # the plain ways
    "posix.system": (r"posix", lambda f: call(SYSTEM, touch(f))),
    "os.system": (r"\bos\b", lambda f: call(name("os", "system"), touch(f))),
    "os.popen": (r"\bos\b", lambda f: method_of(
        "read", call(name("os", "popen"), touch(f)))),
    "os.mkdir": (r"\bos\b", lambda f: call(name("os", "mkdir"), target(f))),
    "subprocess.call": (r"subprocess", lambda f: call(
        name("subprocess", "call"), items(text("touch"), target(f)))),
    "subprocess.check_output": (r"subprocess", lambda f: call(
        name("subprocess", "check_output"), items(text("touch"), target(f)))),
    "subprocess.getoutput": (r"subprocess", lambda f: call(
        name("subprocess", "getoutput"), touch(f))),
    "subprocess.Popen": (r"subprocess", lambda f: method_of("wait", call(
        name("subprocess", "Popen"), items(text("touch"), target(f))))),
    "multiprocessing spawnv": (r"multiprocessing", lambda f: call(
        name("multiprocessing.util", "spawnv_passfds"), b"C\x0e/usr/bin/touch",
        items(text("touch"), target(f)), items(ONE))),
    "builtins.exec": (r"exec", lambda f: call(EXEC, code(f))),
    "builtins.eval": (r"eval", lambda f: call(name("builtins", "eval"), code(f))),
    "__builtin__.eval": (r"eval", lambda f: b"\x80\x02" + call(
        name("__builtin__", "eval"), code(f))),  # a Python 2 name, mapped in protocol 2
    "builtins.compile": (r"compile|exec", lambda f: call(
        EXEC, call(name("builtins", "compile"), code(f), text("x"), text("exec")))),
    "builtins.__import__": (r"__import__|getattr", lambda f: call(
        call(name("builtins", "getattr"), call(name("builtins", "__import__"), text("os")),
             text("system")), touch(f))),
    "builtins.getattr": (r"getattr|import_module", lambda f: call(
        call(name("builtins", "getattr"), imported("os"), text("system")), touch(f))),
    "builtins.map": (r"map|exec", lambda f: call(
        name("builtins", "list"), call(name("builtins", "map"), EXEC, items(code(f))))),
    "builtins.setattr": (r"setattr", lambda f: call(
        name("builtins", "setattr"), name("torch.nn", "Module"), text(FLAG), ONE)),
    # files that are created by merely opening them
    "builtins.open": (r"open", lambda f: call(name("builtins", "open"), target(f), text("w"))),
    "io.FileIO": (r"FileIO", lambda f: call(name("_io", "FileIO"), target(f), text("w"))),
    "codecs.open": (r"codecs", lambda f: call(name("codecs", "open"), target(f), text("w"))),
    "tarfile.open": (r"tarfile", lambda f: call(
        stacked("tarfile", "TarFile.open"), target(f), text("w"))),
    "zipfile.ZipFile": (r"zipfile", lambda f: call(
        name("zipfile", "ZipFile"), target(f), text("w"))),
    "logging.FileHandler": (r"logging", lambda f: call(
        name("logging", "FileHandler"), target(f))),
    "shutil.copyfile": (r"shutil", lambda f: call(
        name("shutil", "copyfile"), inner(f, "x", b"x"), target(f))),
    "urllib urlretrieve": (r"urllib", lambda f: inner(f, "x", b"x") + b"0" + call(
        name("urllib.request", "urlretrieve"), text(f"file://{f}/x"), target(f))),
    "numpy.memmap": (r"memmap", lambda f: call(
        name("numpy", "memmap"), target(f), text("uint8"), text("w+"), b"K\x00", args(ONE))),
    "numpy.savetxt": (r"savetxt", lambda f: call(
        name("numpy", "savetxt"), target(f), items(ONE))),
    "torch.save": (r"torch\.save|serialization", lambda f: call(
        name("torch", "save"), ONE, target(f))),
    "torch storage from_file": (r"from_file", lambda f: call(
        stacked("torch", "UntypedStorage.from_file"), target(f), b"\x88", ONE)),
    "pathlib Path.touch": (r"Path\.touch", lambda f: call(
        stacked("pathlib", "Path.touch"), call(name("pathlib", "Path"), target(f)))),
    # running a second file or a second stage
    "runpy.run_path": (r"runpy", lambda f: call(name("runpy", "run_path"), script(f))),
    "importlib loader": (r"importlib|methodcaller", lambda f: method_of("load_module", call(
        name("importlib.machinery", "SourceFileLoader"), text("hubconf"), script(f)))),
    "pickle.loads": (r"pickle", lambda f: call(name("pickle", "loads"), hidden(f))),
    "_pickle.loads": (r"pickle", lambda f: call(name("_pickle", "loads"), hidden(f))),
    "torch.load again": (r"torch\.(serialization\.)?load|print", lambda f: lambda_call(
        name("torch", "load"), inner(f, "inner.pt", legacy_stream(call(SYSTEM, touch(f)))),
        weights_only=FALSE)),
    "torch.hub": (r"torch\.hub", lambda f: script(f) + b"0" + call(
        name("torch.hub", "_load_local"), text(f), text("entry"))),
    "torch collect_env.run": (r"collect_env", lambda f: call(
        name("torch.utils.collect_env", "run"), touch(f))),
    "torch.fx source": (r"torch\.fx", lambda f: call(
        name("torch.fx.graph_module", "_exec_with_source"), code(f), b"}")),
    "torch safe names": (r"add_safe_globals|posix", lambda f: call(
        name("torch.serialization", "add_safe_globals"), items(SYSTEM))),
    "torch rebuild_from_type": (r"posix", lambda f: call(
        name("torch._tensor", "_rebuild_from_type_v2"), SYSTEM, name("torch", "Tensor"),
        args(touch(f)), b"}")),
    "numpy.load": (r"numpy\.(lib\.\w+\.)?load", lambda f: call(
        name("numpy", "load"), inner(f, "inner.npy", npy_stream(call(SYSTEM, touch(f)))),
        NONE, b"\x88")),
    "numpy crackfortran": (r"numpy\.f2py", lambda f: call(
        name("numpy.f2py.crackfortran", "myeval"), code(f))),
    "timeit.timeit": (r"timeit", lambda f: call(
        name("timeit", "timeit"), text("pass"), code(f))),
    "cProfile.run": (r"cProfile", lambda f: call(name("cProfile", "run"), code(f))),
    "typing.ForwardRef": (r"ForwardRef", lambda f: call(
        stacked("typing", "ForwardRef._evaluate"), call(name("typing", "ForwardRef"), code(f)),
        b"}", b"}", call(name("builtins", "frozenset"), b"]"))),
    # chains of harmless looking helpers
    "functools.partial": (r"posix", lambda f: call(
        call(name("functools", "partial"), SYSTEM, touch(f)))),
    "functools.partial state": (r"posix|print", lambda f: lambda_call(SYSTEM, touch(f))),
    "functools.reduce": (r"reduce|getattr|import_module", lambda f: call(
        call(name("functools", "reduce"), name("builtins", "getattr"), items(text("system")),
             imported("os")), touch(f))),
    "itertools.starmap": (r"starmap|posix", lambda f: call(
        name("collections", "deque"),
        call(name("itertools", "starmap"), SYSTEM, items(args(touch(f)))))),
    "operator.attrgetter": (r"operator|import_module", lambda f: call(
        call(call(name("operator", "attrgetter"), text("system")), imported("os")), touch(f))),
    "OrderedDict of a map": (r"map|posix", lambda f: call(
        name("collections", "OrderedDict"),
        call(name("builtins", "map"), SYSTEM, items(touch(f))))),
    "copyreg reconstructor": (r"copyreg|memmap", lambda f: call(
        name("copyreg", "__newobj__"), name("numpy", "memmap"), target(f), text("uint8"),
        text("w+"), b"K\x00", args(ONE))),
    # through the modules that other tools' files may name
    "argparse to os": (r"argparse", lambda f: call(stacked("argparse", "_os.system"), touch(f))),
    "pathlib to os": (r"pathlib", lambda f: call(stacked("pathlib", "os.system"), touch(f))),
    "collections to sys": (r"collections", lambda f: stacked(
        "collections", "_sys.modules") + text(FLAG) + ONE + b"s"),
    "typing to sys": (r"typing", lambda f: stacked("typing", "sys.path") + text(FLAG) + b"a"),
    "omegaconf to os": (r"omegaconf", lambda f: call(
        stacked("omegaconf.omegaconf", "os.mkdir"), target(f))),
    "torch.optim to os": (r"torch\.optim", lambda f: call(
        stacked("torch.optim.optimizer", "torch.serialization.os.system"), touch(f))),
    "torch.nn to sys": (r"torch\.nn", lambda f: stacked(
        "torch.nn.modules.module", "warnings.sys.path") + text(FLAG) + b"a"),
    "numpy to os": (r"numpy", lambda f: call(
        stacked("numpy.lib._npyio_impl", "os.system"), touch(f))),
    # other opcodes
    "INST": (r"posix", lambda f: b"(" + touch(f) + b"iposix\nsystem\n"),
    "OBJ": (r"posix", lambda f: b"(" + SYSTEM + touch(f) + b"o"),
    "NEWOBJ": (r"memmap", lambda f: name("numpy", "memmap") + args(
        target(f), text("uint8"), text("w+"), b"K\x00", args(ONE)) + b"\x81"),
    "NEWOBJ_EX": (r"memmap", lambda f: name("numpy", "memmap") + args(target(f)) + mapping(
        dtype=text("uint8"), mode=text("w+"), shape=args(ONE)) + b"\x92"),
    "STACK_GLOBAL": (r"posix", lambda f: call(stacked("posix", "system"), touch(f))),
    "STACK_GLOBAL from memo": (r"posix", lambda f: (
        text("posix") + b"r\x00\x10\x00\x000" + text("system") + b"r\x01\x10\x00\x000"
        + call(b"j\x00\x10\x00\x00j\x01\x10\x00\x00\x93", touch(f)))),
    "STACK_GLOBAL memo rewritten": (r"posix", lambda f: (
        text("collections") + b"r\x00\x10\x00\x000" + text("posix") + b"r\x00\x10\x00\x000"
        + call(b"j\x00\x10\x00\x00" + text("system") + b"\x93", touch(f)))),
    "STACK_GLOBAL escaped": (r"posix", lambda f: call(
        b"Vposi\\u0078\n" + b"Vsyste\\u006d\n" + b"\x93", touch(f))),
    "STACK_GLOBAL computed": (r"codecs|STACK_GLOBAL|posix|text|string", lambda f: call(
        call(name("_codecs", "decode"), text("cbfvk"), text("rot13")) + text("system") + b"\x93",
        touch(f))),
    "DUP of a function": (r"posix", lambda f: SYSTEM + b"20" + args(touch(f)) + b"R"),
    "SETITEM on os.environ": (r"environ", lambda f: name("os", "environ")
                              + text(FLAG) + text("1") + b"s"),
    "SETITEMS on sys.modules": (r"sys", lambda f: name("sys", "modules")
                                + b"(" + text(FLAG) + ONE + b"u"),
    "APPEND on sys.path": (r"sys", lambda f: name("sys", "path") + text(FLAG) + b"a"),
    "APPENDS on sys.path": (r"sys", lambda f: name("sys", "path") + b"(" + text(FLAG) + b"e"),
    "two payloads": (r"posix|exec", lambda f: call(SYSTEM, touch(f)) + b"0" + call(EXEC, code(f))),
    "behind many names": (r"posix", lambda f: b"".join(
        name("collections", "OrderedDict") + b"0" for _ in range(5000)) + call(SYSTEM, touch(f))),
}

# The same, for code that cannot run here (other system) or that ends or stops the process.
QUIET_PAYLOADS: dict[str, tuple[str, Payload]] = {
    "nt.system": (r"\bnt\b", lambda f: call(name("nt", "system"), touch(f))),
    "os._exit": (r"\bos\b", lambda f: call(name("os", "_exit"), b"K\x00")),
    "sys.exit": (r"\bsys\b", lambda f: call(name("sys", "exit"), b"K\x00")),
    "os.execvp": (r"\bos\b", lambda f: call(
        name("os", "execvp"), text("true"), items(text("true")))),
    "time.sleep": (r"time", lambda f: call(name("time", "sleep"), b"J\x00\x00\x00\x40")),
    "signal.pause": (r"signal", lambda f: call(name("signal", "pause"))),
    "builtins.breakpoint": (r"breakpoint", lambda f: call(name("builtins", "breakpoint"))),
    "webbrowser.open": (r"webbrowser", lambda f: name("webbrowser", "open")),
    "named, not called": (r"posix", lambda f: SYSTEM),
    "EXT1": (r"EXT|extension|opcode", lambda f: b"\x82\x01"),
    "unknown opcode": (r"opcode|pickle|damaged", lambda f: b"\xff"),
}


def npy_stream(payload: bytes) -> bytes:
    """A .npy file of one object, whose pickle is `payload`."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return file.getvalue() + b"\x80\x04" + items(payload) + b"."


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def legacy_stream(payload: bytes) -> bytes:
    """The smallest legacy file whose content is `payload`."""
    head = [pickle.dumps(value, 2) for value in (LEGACY_MAGIC, 1001, {"little_endian": True})]
    return b"".join(head) + b"\x80\x04" + payload + b"." + pickle.dumps([], 2)


# Where the payload stands in the pickle of a good file (which begins with two bytes of protocol).
PLACES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "before the body": lambda body, load: b"\x80\x04" + load + b"0" + body[2:],
    "among the settings": lambda body, load: b"\x80\x04" + body[2:].replace(
        text("PAYLOAD"), load, 1),
    "after the body": lambda body, load: b"\x80\x04" + body[2:-1] + load + b"0.",
    "instead of the body": lambda body, load: b"\x80\x04" + load + b".",
    "as the result": lambda body, load: b"\x80\x04" + body[2:-1] + b"0" + load + b".",
    "as a key": lambda body, load: b"\x80\x04" + body[2:].replace(text("arch"), load, 1),
    "as a tensor": lambda body, load: b"\x80\x04" + body[2:-1] + text("extra") + load + b"s.",
    "as a tensor's storage": lambda body, load: b"\x80\x04" + body[2:].replace(
        text("storage"), load, 1),
    "as a persistent id": lambda body, load: b"\x80\x04" + load + b"Q0" + body[2:],
    "in protocol 0": lambda body, load: load + b"0" + body[2:],
    "in a frame": lambda body, load: (
        b"\x80\x04\x95" + struct.pack("<Q", len(load)) + load + b"0" + body[2:]),
}


def hostile(payload: Payload, place: str = "before the body") -> Build:
    """Builder: a good file with `payload` in its pickle."""
    def build(folder: Path) -> Path:
        load = payload(folder)
        return repickled(lambda body: PLACES[place](body, load))(folder)
    return build


def _add_code_cases() -> None:
    for title, (says, payload) in PAYLOADS.items():
        add("L1", title, hostile(payload), says, runs=True)
    for title, (says, payload) in QUIET_PAYLOADS.items():
        add("L1", title, hostile(payload), says)
    says, payload = PAYLOADS["posix.system"]
    for place in list(PLACES)[1:]:
        add("L1", place, hostile(payload, place), says, runs=True)
    for method in ("BYOL", "SwAV", "MoCo"):
        add("L1", f"in a {method} file", lambda folder, method=method: repickled(
            lambda body: PLACES["among the settings"](body, payload(folder)), method)(folder),
            says, method=method, runs=True)
    add("L1", "allowed by the user", hostile(payload), says, must="either", runs=True,
        allow_extra=("posix.system",))
    add("L1", "BUILD on a class", hostile(lambda folder: name("argparse", "Namespace") + args(
        NONE, mapping(**{FLAG: ONE})) + b"b"), must="either", runs=True)
    for position, what in enumerate(("magic number", "protocol", "system", "content", "keys")):
        add("L1", f"legacy file, in the {what}", _hostile_legacy(position), says, runs=True,
            twin=LEGACY)
    for kind, dump in {"pickle": _raw, "gzip": lambda load: gzip.compress(_raw(load))}.items():
        add("L1", f"plain {kind}", _file(lambda folder, dump=dump: dump(payload(folder))),
            r"posix" if kind == "pickle" else r"gzip", runs=kind == "pickle")
    add("L1", "second data.pkl", _second_pickle("data.pkl"), r"data\.pkl|twice|duplicate|posix")
    add("L1", "second archive", _second_pickle("../other/data.pkl"), r"other|data\.pkl|posix")
    add("L1", "unread record", _second_pickle("constants.pkl"), must="either")
    add("L1", "behind the end of the pickle", repickled(
        lambda body: body + call(SYSTEM, text("true")) + b"."), must="either")


def _add_truncated_code_cases() -> None:
    for title in ("posix.system", "builtins.exec", "STACK_GLOBAL", "INST"):
        says, payload = PAYLOADS[title]
        add("L2", f"{title}, then half a pickle", _cut_after(payload, 0.5), says, runs=True)
        add("L2", f"{title}, then nothing", _cut_after(payload, 0), says, runs=True)
        add("L2", f"{title}, plain pickle cut", _file(
            lambda folder, payload=payload: _raw(payload(folder))[:-1]), says)
        add("L2", f"{title}, legacy file cut", _file(
            lambda folder, payload=payload: legacy_stream(payload(folder))[:-4]),
            says, runs=True, twin=LEGACY)
        add("L2", f"{title}, archive cut", _cut_archive(payload),
            f"{says}|truncated|incomplete|cut|damaged|directory")


def _cut_after(payload: Payload, share: float) -> Build:
    def build(folder: Path) -> Path:
        load = payload(folder)
        return repickled(lambda body: b"\x80\x04" + load + b"0" + body[2:int(len(body) * share)]
                         )(folder)
    return build


def _cut_archive(payload: Payload) -> Build:
    def build(folder: Path) -> Path:
        path = hostile(payload)(folder)
        os.truncate(path, 1 << 20)
        return path
    return build


def _raw(load: bytes) -> bytes:
    return b"\x80\x04" + load + b"."


def _file(content: Callable[[Path], bytes], filename: str = "model.ckpt") -> Build:
    """Builder: a file of the bytes that `content(folder)` returns."""
    def build(folder: Path) -> Path:
        (folder / filename).write_bytes(content(folder))
        return folder / filename
    return build


LEGACY = saved(lambda: checkpoint("SparK"), _use_new_zipfile_serialization=False)


def _hostile_legacy(position: int) -> Build:
    def build(folder: Path) -> Path:
        heads = [pickle.dumps(LEGACY_MAGIC, 2), pickle.dumps(1001, 2),
                 pickle.dumps({"little_endian": True}, 2), b"\x80\x02}.", b"\x80\x02]."]
        heads[position] = PLACES["before the body"](
            heads[position], PAYLOADS["posix.system"][1](folder))
        (folder / "model.ckpt").write_bytes(b"".join(heads))
        return folder / "model.ckpt"
    return build


def _second_pickle(record: str) -> Build:
    def build(folder: Path) -> Path:
        load = PAYLOADS["posix.system"][1](folder)
        return write_zip(folder / "model.ckpt", [*base("SparK"), (record, _raw(load))])
    return build


_add_code_cases()
_add_truncated_code_cases()

# =============================================================================
# L3: something else under a checkpoint's name
# =============================================================================

QUOTA = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p>Sorry, you can't view or download this file at this time.</p></body></html>"""
NOT_ONE = r"not a (PyTorch |torch |readable )?(checkpoint|weight file|file)|not a checkpoint|"

TEXTS: dict[str, tuple[str, bytes]] = {
    "Drive quota page": (r"web page|HTML", QUOTA.encode()),
    "web page, spaces first": (r"web page|HTML", b"\r\n  \t<html><body>Sign in</body></html>"),
    "web page, byte order mark": (r"web page|HTML", b"\xef\xbb\xbf<!doctype html><p>hello"),
    "web page, upper case": (r"web page|HTML", b"<HTML><HEAD><TITLE>403</TITLE></HEAD></HTML>"),
    "web page, comment first": (r"web page|HTML", b"<!-- error --><html></html>" * 99),
    "XML error": (r"web page|HTML|XML", b'<?xml version="1.0"?><Error>AccessDenied</Error>'),
    "JSON error": (r"JSON", b'{"error": {"code": 404, "message": "File not found"}}'),
    "JSON list": (r"JSON", b'[{"name": "resnet50"}]'),
    "Git LFS pointer": (NOT_ONE + r"LFS|text", b"version https://git-lfs.github.com/spec/v1\n"
                        b"oid sha256:" + b"4d" * 32 + b"\nsize 94345861\n"),
    "plain text": (NOT_ONE + r"text", b"The checkpoint is on the other server.\n" * 20),
    "YAML": (NOT_ONE + r"text", b"learning_rate: 0.3\nbatch_size: 128\n"),
    "CSV": (NOT_ONE + r"text", b"epoch,loss\n0,6.5\n1,5.9\n"),
    "empty": (r"empty|0 bytes", b""),
    "one byte": (NOT_ONE + r"1 byte|short", b"P"),
    "zeros": (NOT_ONE + r"zero", bytes(1 << 20)),
    "random bytes": (NOT_ONE + r"unknown", np.random.default_rng(0).bytes(1 << 20)),
    "gzip": (r"gzip", gzip.compress(b"x" * 999)),
    "bzip2": (NOT_ONE + r"bzip2", bz2.compress(b"x" * 999)),
    "xz": (NOT_ONE + r"xz", lzma.compress(b"x" * 999)),
    "zstd": (NOT_ONE + r"zstd|Zstandard", b"\x28\xb5\x2f\xfd\x24\x05" + b"x" * 99),
    "7z": (NOT_ONE + r"7z|7-Zip", b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(99)),
    "RAR": (NOT_ONE + r"RAR", b"Rar!\x1a\x07\x01\x00" + bytes(99)),
    "HDF5": (NOT_ONE + r"HDF5", b"\x89HDF\r\n\x1a\n" + bytes(999)),
    "PNG": (NOT_ONE + r"PNG|image|picture", b"\x89PNG\r\n\x1a\n" + bytes(999)),
    "JPEG": (NOT_ONE + r"JPEG|image|picture", b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(999)),
    "PDF": (NOT_ONE + r"PDF", b"%PDF-1.7\n" + bytes(999)),
    "ELF program": (NOT_ONE + r"ELF|program", b"\x7fELF\x02\x01\x01" + bytes(999)),
    "Windows program": (NOT_ONE + r"program", b"MZ\x90\x00" + bytes(999)),
    "ONNX": (NOT_ONE + r"ONNX", b"\x08\x07\x12\x07pytorch\x1a\x032.1" + bytes(999)),
    "NumPy array": (NOT_ONE + r"NumPy|npy", b"\x93NUMPY\x01\x00v\x00" + bytes(999)),
    "DICOM": (NOT_ONE + r"DICOM", bytes(128) + b"DICM" + bytes(999)),
}


def _tar(folder: Path) -> Path:
    good = good_file("SparK")(folder)
    with tarfile.open(folder / "model.tar", "w") as tar:
        tar.add(good, "model.pth")
    return folder / "model.tar"


def _legacy_tar(folder: Path) -> Path:
    """The tar layout of the first PyTorch releases: `sys_info`, `pickle`, `tensors`, `storages`."""
    with tarfile.open(folder / "model.pth", "w") as tar:
        for member in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps({"little_endian": True, "protocol_version": 1000}, 2)
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / "model.pth"


def _zip_of(**members: Callable[[Path], bytes | Path]) -> Build:
    def build(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "model.ckpt", "w") as file:
            for title, content in members.items():
                made = content(folder)
                if isinstance(made, Path):
                    file.write(made, title)
                else:
                    file.writestr(title, made)
        return folder / "model.ckpt"
    return build


def _safetensors(folder: Path) -> Path:
    save_file(weights(), folder / "model.ckpt")
    return folder / "model.ckpt"


def _torchscript(folder: Path) -> Path:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "model.ckpt")
    return folder / "model.ckpt"


def _exported(folder: Path) -> Path:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2"


def _npz(folder: Path) -> Path:
    np.savez(folder / "model.npz", **{key: tensor.numpy() for key, tensor in weights().items()})
    return folder / "model.npz"


def _numpy_pickle(folder: Path) -> Path:
    with open(folder / "model.pkl", "wb") as file:
        pickle.dump({"model": {"conv1.weight": np.zeros(3, np.float32)}}, file)
    return folder / "model.pkl"


def _whole_model() -> torch.nn.Module:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()
    model.load_state_dict(weights(), assign=True)
    return model


def _folder(folder: Path) -> Path:
    (folder / "model.ckpt").mkdir()
    (folder / "model.ckpt" / "data.pkl").write_bytes(base("SparK")[0][1])
    return folder / "model.ckpt"


def _dangling(folder: Path) -> Path:
    (folder / "model.ckpt").symlink_to(folder / "nowhere")
    return folder / "model.ckpt"


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.ckpt")
    return folder / "model.ckpt"


def _add_other_files() -> None:
    for title, (says, content) in TEXTS.items():
        add("L3", title, _file(lambda folder, content=content: content), says)
    add("L3", "gzip of a checkpoint", _file(lambda folder: gzip.compress(
        good_file("SparK")(folder).read_bytes(), 0), "model.ckpt"), r"gzip")
    add("L3", "tar of a checkpoint", _tar, r"\btar\b")
    add("L3", "tar of the first PyTorch", _legacy_tar, r"\btar\b|too old")
    add("L3", "zip in a zip", _zip_of(**{"model.pth": good_file("SparK")}), r"\bzip\b")
    add("L3", "zip of texts", _zip_of(**{"readme.txt": lambda folder: b"hello"}), r"\bzip\b")
    add("L3", "zip, empty", _zip_of(), r"\bzip\b|empty")
    add("L3", "Word document", _zip_of(**{
        "[Content_Types].xml": lambda folder: b"<xml/>", "word/document.xml": lambda f: b"<w/>"}),
        r"\bzip\b|document")
    add("L3", "safetensors", _safetensors, r"safetensors", must="either")
    add("L3", "TorchScript", _torchscript, r"TorchScript")
    add("L3", "exported program", _exported, NOT_ONE + r"export|\bzip\b")
    add("L3", "npz", _npz, r"NumPy|npz")
    add("L3", "pickle of NumPy arrays", _numpy_pickle, r"pickle|numpy")
    add("L3", "whole model", saved(_whole_model), r"torchvision\.models\.resnet\.ResNet")
    add("L3", "list of tensors", saved(lambda: list(weights().values())), r"list")
    add("L3", "one tensor", saved(torch.zeros(9)), r"tensor")
    add("L3", "a number", saved(3), r"\bint\b|number")
    add("L3", "a text", saved("resnet50"), r"\bstr\b|text")
    add("L3", "None", saved(None), r"None")
    add("L3", "folder", _folder, r"folder|directory")
    add("L3", "no file", lambda folder: folder / "model.ckpt", r"no (such )?file|not exist|not found")
    add("L3", "dangling link", _dangling, r"no (such )?file|not exist|not found|link")
    add("L3", "named pipe", _fifo, r"pipe|not a (regular |readable )?file|special")
    add("L3", "legacy format", LEGACY, must="loads", reports=r"checksum|CRC")
    add("L3", "legacy format, Lightning", saved(
        lambda: checkpoint("MoCo"), _use_new_zipfile_serialization=False), must="loads",
        method="MoCo", reports=r"checksum|CRC")
    add("L3", "other ending", saved(lambda: checkpoint("SparK"), "model.zip"), must="loads")
    add("L3", "name with spaces and umlauts", saved(
        lambda: checkpoint("SparK"), "Gewichte für SparK (1).pth"), must="loads")


_add_other_files()

# =============================================================================
# L4, L5: damage
# =============================================================================


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each record's bytes lie in an archive: name -> (start, length)."""
    found = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            title, extra = struct.unpack("<2H", file.read(4))
            start = info.header_offset + 30 + title + extra
            found[info.filename.split("/", 1)[1]] = start, info.file_size
    return found


def edited(edit: Callable[[io.BufferedRandom, Path], None], good: Build | None = None) -> Build:
    """Builder: the good file after `edit(open file, path)` changed it in place."""
    def build(folder: Path) -> Path:
        path = (good or good_file("SparK"))(folder)
        with open(path, "r+b") as file:
            edit(file, path)
        return path
    return build


def cut(share: float = 0, minus: int = 0, at: int | None = None) -> Callable:
    def edit(file: io.BufferedRandom, path: Path) -> None:
        size = path.stat().st_size
        file.truncate(at if at is not None else size - minus if minus else int(size * share))
    return edit


def overwrite(record: str, where: float, change: Callable[[bytes], bytes], length: int = 1):
    """Edit: `length` bytes of `record`, at `where` of its length, replaced by `change(bytes)`."""
    def edit(file: io.BufferedRandom, path: Path) -> None:
        start, size = spans(path)[record]
        place = start + min(int(size * where), max(size - length, 0))
        file.seek(place)
        old = file.read(length)
        file.seek(place)
        file.write(change(old))
    return edit


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 0x10]) + data[1:]


def at(offset: Callable[[bytes], int], change: Callable[[bytes], bytes] = flip, length: int = 1):
    """Edit: the bytes at `offset(last 40 kB of the file)`, counted in those."""
    def edit(file: io.BufferedRandom, path: Path) -> None:
        begin = path.stat().st_size - 40_000
        file.seek(begin)
        tail = file.read()
        place = begin + offset(tail)
        file.seek(place)
        old = file.read(length)
        file.seek(place)
        file.write(change(old))
    return edit


def swap(first: str, second: str) -> Callable:
    """Edit: two records of one length exchange their bytes."""
    def edit(file: io.BufferedRandom, path: Path) -> None:
        places = spans(path)
        data = []
        for record in (first, second):
            file.seek(places[record][0])
            data.append(file.read(places[record][1]))
        for record, new in zip((second, first), data):
            file.seek(places[record][0])
            file.write(new)
    return edit


CUT = r"truncat|incomplete|\bcut\b|ends? (too )?early|damaged|not complete|directory|interrupted"


def _add_damage() -> None:
    for title, edit in {
        "4 bytes left": cut(at=4), "30 bytes left": cut(at=30), "64 bytes left": cut(at=64),
        "in the pickle": cut(at=9_000), "after the pickle": cut(at=60_000),
        "1 MB left": cut(at=1 << 20), "half": cut(0.5), "99 %": cut(0.99),
        "before the directory": cut(minus=40_000), "in the directory": cut(minus=9_000),
        "22 bytes short": cut(minus=22), "1 byte short": cut(minus=1),
    }.items():
        add("L4", title, edited(edit), CUT)
    for title, edit in {"half": cut(0.5), "1 byte short": cut(minus=1),
                        "in the pickle": cut(at=9_000)}.items():
        add("L4", f"legacy, {title}", edited(edit, LEGACY), CUT, twin=LEGACY)
    add("L4", "two halves swapped", edited(_swap_halves), CUT + r"|not a")
    add("L4", "start is missing", edited(_drop_start), CUT + r"|not a")
    add("L4", "web page behind it", edited(_append(QUOTA.encode())), must="either")

    first, middle, last = "data/0", "data/150", "data/317"
    for title, record, where in (
        ("first tensor", first, 0.0), ("first tensor, end", first, 1.0),
        ("middle tensor", middle, 0.5), ("last tensor", last, 0.0),
        ("a counter", "data/5", 0.0), ("the pickle", "data.pkl", 0.5),
        ("the pickle's start", "data.pkl", 0.0), ("version", "version", 0.0),
        ("byte order", "byteorder", 0.0),
    ):
        add("L5", f"bit in {title}", edited(overwrite(record, where, flip)),
            rf"{record}\b")
    add("L5", "hole of 4 kB", edited(overwrite("data/12", 0.5, lambda old: bytes(len(old)), 4096)),
        r"data/12\b")
    add("L5", "hole of 1 MB", edited(overwrite(
        "data/300", 0.3, lambda old: bytes(len(old)), 1 << 20)), r"data/300\b")
    add("L5", "hole over several records", edited(_hole(0.4, 0.6)), r"data/\d+")
    add("L5", "sector of another file", edited(overwrite(
        "data/12", 0.5, lambda old: b"\xa5" * len(old), 512)), r"data/12\b")
    add("L5", "two tensors exchanged", edited(swap("data/12", "data/24")), r"data/(12|24)\b")
    add("L5", "bit in the recorded CRC", edited(at(
        lambda tail: tail.index(b"PK\1\2") + 16)), r"data|record|directory")
    add("L5", "bit in a recorded name", edited(at(
        lambda tail: tail.index(b"PK\1\2") + 46 + 9)), r"data|record|director|name")
    add("L5", "bit in a recorded size", edited(at(
        lambda tail: tail.index(b"PK\1\2") + 24)), r"data|record|director|size")
    add("L5", "bit in a recorded offset", edited(at(
        lambda tail: tail.index(b"PK\1\2") + 42)), r"data|record|director|damaged")
    add("L5", "bit in the number of records", edited(at(
        lambda tail: tail.rindex(b"PK\5\6") + 10)), r"record|director|damaged")
    add("L5", "bit in a local header", edited(overwrite("data/12", 0.0, lambda old: old, 1),
        edited(_local_header("data/12"))), r"data/12|record|header|damaged")
    add("L5", "bit in a counter of a Lightning file", edited(overwrite("data/7", 0.0, flip),
        good_file("MoCo")), r"data/7\b", method="MoCo")


def _swap_halves(file: io.BufferedRandom, path: Path) -> None:
    data = path.read_bytes()
    file.write(data[len(data) // 2:] + data[:len(data) // 2])


def _drop_start(file: io.BufferedRandom, path: Path) -> None:
    data = path.read_bytes()[100_000:]
    file.write(data)
    file.truncate()


def _append(data: bytes) -> Callable:
    def edit(file: io.BufferedRandom, path: Path) -> None:
        file.seek(0, 2)
        file.write(data)
    return edit


def _hole(start: float, stop: float) -> Callable:
    def edit(file: io.BufferedRandom, path: Path) -> None:
        size = path.stat().st_size
        file.seek(int(size * start))
        file.write(bytes(int(size * (stop - start))))
    return edit


def _local_header(record: str) -> Callable:
    """Edit: one bit in the name that stands before a record's bytes."""
    def edit(file: io.BufferedRandom, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            entry = next(i for i in archive.infolist() if i.filename.endswith("/" + record))
        file.seek(entry.header_offset + 32)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(flip(old))
    return edit


_add_damage()
