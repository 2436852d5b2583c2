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
import importlib.util
import io
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
        return {**small("model.projection_head.", SWAV_HEAD),
                **small("model.", ["prototypes.weight"])}
    if method == "MoCo":
        head = ("fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")
        queues = {"queue": torch.ones(4, 8), "queue_ptr": torch.tensor([0]),
                  "val_queue": torch.ones(4, 8), "val_queue_ptr": torch.tensor([0])}
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
            text_flag = 0 if title.isascii() else 0x800  # the name is UTF-8
            head = [lie.get("flags", text_flag), lie.get("method", 0), 0, 0x21,
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
        installed = title != "omegaconf to os" or importlib.util.find_spec("omegaconf") is not None
        add("L1", title, hostile(payload), says, runs=installed)
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
            lambda folder, payload=payload: _raw(payload(folder))[:-1]), says, runs=True)
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


def _add_odd_names() -> None:
    """Names that would play tricks on the terminal that prints the error."""
    odd = {"terminal codes": "posix\x1b[2K\rgood", "a line break": "posix\n\nAll is well.\n",
           "half a character": "posix\ud800", "reversed text": "posix\u202egood"}
    for title, word in odd.items():
        push = b"X" + struct.pack("<I", len(data := word.encode("utf-8", "surrogatepass"))) + data
        add("L1", f"name with {title}", hostile(
            lambda folder, push=push: push + text("system") + b"\x93"), r"posix")
        add("L8", f"key with {title}", repickled(lambda body, push=push: body.replace(
            text("encoder_k.bn1.bias"), push, 1), "MoCo"), r"posix", method="MoCo")
        if title != "half a character":
            add("L8", f"record with {title}", archived(lambda word=word: [
                *base("SparK"), (word, b""), (word, b"")]), r"posix")


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
_add_odd_names()
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
    absent = r"no (such )?file|not exist|not found"
    add("L3", "no file", lambda folder: folder / "model.ckpt", absent)
    add("L3", "dangling link", _dangling, absent + r"|link")
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
    add("L5", "two tensors exchanged", edited(swap("data/1", "data/2")), r"data/[12]\b")
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
    add("L5", "bit in a local header", edited(_local_header("data/12")),
        r"data/12|record|header|damaged")
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

# =============================================================================
# L6 to L8: bombs, and descriptions that lie
# =============================================================================


def deflated_zeros(megabytes: int) -> bytes:
    """A deflate stream of many zeros, made of one block that is repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * megabytes + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def bomb(record: str, megabytes: int, declared: int | None = None) -> Build:
    """Builder: `record` is a small deflate stream that unpacks to `megabytes`."""
    size = min(megabytes << 20, 0xFFFFFFF0) if declared is None else declared

    def build(folder: Path) -> Path:
        data = deflated_zeros(megabytes)
        records = [(n, d) for n, d in base("SparK") if n != record] + [(record, data)]
        lies = {record: {"method": 8, "size": size, "packed": len(data)}}
        return write_zip(folder / "model.ckpt", records, **lies)
    return build


def setting(opcodes: bytes) -> Build:
    """Builder: a good file with these opcodes as one of its settings."""
    return hostile(lambda folder: opcodes, "among the settings")


def _deflated_honestly(folder: Path) -> Path:
    """The user unpacked the archive and packed it again, compressed."""
    with zipfile.ZipFile(folder / "model.ckpt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for title, data in base("SparK"):
            file.writestr("archive/" + title, bytes(data))
    return folder / "model.ckpt"


def _many_records(folder: Path) -> Path:
    extra = [(f"data/{i}", b"") for i in range(1000, 61000)]
    return write_zip(folder / "model.ckpt", [*base("SparK"), *extra])


def _long_directory(folder: Path) -> Path:
    """The directory lists 1.5 million records: 83 MB to read, and many times that to hold."""
    title, count = b"archive/x", 1_500_000
    head = 0, 0, 0, 0x21, 0, 0, 0, len(title)
    local = struct.pack(LOCAL, b"PK\3\4", 20, *head, 0) + title
    listed = struct.pack(CENTRAL, b"PK\1\2", 45, 20, *head, 0, 0, 0, 0, 0, 0) + title
    start, size = len(local), len(listed) * count
    (folder / "model.ckpt").write_bytes(b"".join([
        local, listed * count,
        struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start),
        struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1),
        struct.pack(END, b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)]))
    return folder / "model.ckpt"


def _overlapping(folder: Path) -> Path:
    """Every record shows the same 9 MB: a small file that unpacks to gigabytes."""
    big = memoryview(bytes(9 << 20))
    names = [f"data/{i}" for i in range(1, 318)]
    lies = {n: {"offset": 0, "size": len(big), "packed": len(big)} for n in names}
    others = [record for record in base("SparK") if not record[0].startswith("data/")]
    return write_zip(folder / "model.ckpt", [
        ("data/0", big), *((n, b"") for n in names), *others], **lies)


def _huge_size(body: bytes) -> bytes:
    """Give conv1 a size whose product alone would take minutes."""
    huge = b"\x8a\xfa" + b"\x7f" * 250  # an integer of 2,000 bits
    size = b"(" + huge + PUT + GET * 99_999 + b"t"
    stride = b"(" + ONE * 100_000 + b"t"
    return body.replace(b"(K@K\3K\7K\7t", size, 1).replace(b"(K\x93K1K\7K\1t", stride, 1)


def _names(count: int) -> bytes:
    return items(*(name("pytorch_lightning.callbacks", f"Callback{i}") for i in range(count)))


PUT, GET = b"r\x00\x00\x10\x00", b"j\x00\x00\x10\x00"  # a memo place that is not in use
CONV, NORM = "conv1.weight", "layer1.0.bn1.weight"
LIE = r"conv1\.weight|data/|storage|stride|offset|shape|size|beyond|outside|elements"
DOUBLING = b"]" + PUT + b"0" + (b"](" + GET + GET + b"e" + PUT + b"0") * 60 + GET
COPIES = (name("collections", "OrderedDict") + PUT + b"0}("
          + b"".join(text(f"key{i}") + ONE for i in range(20_000)) + b"u\x85"
          + PUT.replace(b"\x10", b"\x11") + b"0](" + (
              GET + GET.replace(b"\x10", b"\x11") + b"R") * 100_000 + b"e")
TERABYTE = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
SIZE = r"size|large|memory|bytes|bomb|compress|deflate"
BOUNDED = {"must": "either"}  # inert values may stay; the limit on memory and time is the test


def _add_bombs() -> None:
    add("L6", "tensor of 16 GB", bomb("data/0", 16384), SIZE)
    add("L6", "tensor of 3 GB", bomb("data/0", 3000), SIZE)
    add("L6", "tensor of 3 GB that claims 37632 B", bomb("data/0", 3000, 37632), SIZE + "|data/0")
    add("L6", "pickle of 3 GB", bomb("data.pkl", 3000), SIZE)
    add("L6", "pickle of 3 GB that claims 20 kB", bomb("data.pkl", 3000, 20000), SIZE + "|data.pkl")
    add("L6", "unread record of 3 GB", bomb("notes", 3000), SIZE + "|notes")
    add("L6", "version of 3 GB", bomb("version", 3000), SIZE + "|version")
    add("L6", "compressed, honest", _deflated_honestly, SIZE, must="either")
    add("L6", "60,000 empty records", _many_records, must="either", says=r"records|entries|many")
    add("L6", "directory of 1.5 million records", _long_directory, r"records|directory")
    add("L6", "overlapping records", _overlapping, r"overlap|data/|record|size")
    for title, opcodes in {
        "memo index of 4 billion": text("x") + b"r\xff\xff\xff\xff",
        "text of 1 TB": b"\x8d" + struct.pack("<Q", 1 << 40) + b"x",
        "bytes of 1 TB": b"\x8e" + struct.pack("<Q", 1 << 40) + b"x",
        "bytearray of 1 TB": b"\x96" + struct.pack("<Q", 1 << 40) + b"x",
        "frame of 1 TB": b"\x95" + struct.pack("<Q", 1 << 40) + NONE,
        "integer of 2 GB": b"\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x",
        "200,000 nested lists": b"]" * 200_000 + b"a" * 199_999,
        "200,000 nested tuples": b")" + b"\x85" * 200_000,
        "lists that double 60 times": DOUBLING,
        "bytearray(1 TB)": call(name("builtins", "bytearray"), TERABYTE),
        "bytes(1 TB)": call(name("builtins", "bytes"), TERABYTE),
        "list(range(1 T))": call(name("builtins", "list"),
                                 call(name("builtins", "range"), TERABYTE)),
        "Counter(range(1 T))": call(name("collections", "Counter"),
                                    call(name("builtins", "range"), TERABYTE)),
        "torch.FloatStorage(1 T)": call(name("torch", "FloatStorage"), TERABYTE),
        "a dictionary copied 100,000 times": COPIES,
        "dtype of 1 GB": call(name("numpy", "dtype"), text("V1073741824"), FALSE, b"\x88"),
        "100,000 stand-ins": items(*[name("argparse", "Namespace") + b")\x81"] * 100_000),
    }.items():
        add("L6", title, setting(opcodes), r"pickle|size|memory|nest|opcode|damaged|truncat|torch|"
            r"builtins|deep|large", **BOUNDED)
    add("L6", "name of 1 MB", setting(name("x" * (1 << 20), "y")), r"name|x{50}")
    add("L6", "key of 500,000 dots", changed("MoCo", lambda tensors: tensors.update(
        {"x." * 500_000 + "weight": torch.ones(1)})), r"x\.", method="MoCo")
    add("L6", "200,000 keys in a known group", saved(lambda: wrapped("MoCo", {
        **prefixed(PREFIX["MoCo"], weights()), **auxiliary("MoCo"),
        **{f"encoder_k.x{i}": 0 for i in range(200_000)}})), r"MB|bytes|keys|encoder_k",
        method="MoCo", must="either")
    add("L6", "size of 100,000 huge numbers", repickled(_huge_size), LIE + r"|dimension")
    add("L6", "4 MB of empty dictionaries", setting(b"](" + b"}" * 4_000_000 + b"e"),
        SIZE + r"|pickle", must="either")
    add("L6", "legacy file with a pickle of 60 MB", _file(lambda folder: legacy_stream(
        b"](" + b"}" * 60_000_000 + b"e")), SIZE + r"|pickle", twin=LEGACY)
    add("L6", "more names than a file needs", setting(_names(300)), r"200|names")


def lying(key: str, **lie) -> Build:
    """Builder: the tensor `key` is described with this size, stride, offset, kind or length."""
    def value(tensor: torch.Tensor) -> Call:
        storage = Storage(lie.get("data", tensor), lie.get("kind", torch.FloatStorage),
                          lie.get("length"), lie.get("record"), lie.get("location", "cpu"))
        return tensor_call(storage, lie.get("size", tuple(tensor.shape)),
                           lie.get("stride", tensor.stride()), lie.get("offset", 0))
    return rebuilt(key, value)


def _flat_file(folder: Path) -> Path:
    """All tensors are views of two long storages: unusual, and right."""
    flat = {dtype: torch.cat([t.reshape(-1) for t in weights().values() if t.dtype == dtype])
            for dtype in (torch.float32, torch.int64)}
    used = dict.fromkeys(flat, 0)
    views = {}
    for key, tensor in weights().items():
        start = used[tensor.dtype]
        used[tensor.dtype] += tensor.numel()
        views[key] = flat[tensor.dtype][start:start + tensor.numel()].view(tensor.shape)
    torch.save(checkpoint("SparK", views), folder / "model.ckpt")
    return folder / "model.ckpt"


def _transposed_file(folder: Path) -> Path:
    views = {k: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 4 else t
             for k, t in weights().items()}
    torch.save(checkpoint("SparK", views), folder / "model.ckpt")
    return folder / "model.ckpt"


def without_record(record: str) -> Build:
    return archived(lambda: [(n, d) for n, d in base("SparK") if n != record])


def with_record(record: str, data: bytes) -> Build:
    """Builder: the record's bytes replaced, with an honest checksum."""
    return archived(lambda: [(n, data if n == record else d) for n, d in base("SparK")])



def _add_lies() -> None:
    few = torch.ones(64)
    for title, lie in {
        "larger than its storage": {"data": few},
        "offset behind the end": {"offset": 10_000},
        "offset of 2^60": {"offset": 1 << 60},
        "negative offset": {"offset": -4},
        "negative stride": {"stride": (-147, 49, 7, 1)},
        "stride of 2^40": {"stride": (1 << 40, 49, 7, 1)},
        "stride with 3 entries": {"stride": (49, 7, 1)},
        "storage claims more than the record": {"data": few, "length": 9408},
        "storage claims less than the record": {"length": 64},
        "storage claims 2^60": {"length": 1 << 60},
        "storage claims a negative length": {"length": -1},
        "size that overflows": {"size": (1 << 32, 1 << 32), "stride": (1, 1)},
        "negative size": {"size": (-64, 3, 7, 7)},
        "size is a text": {"size": ("64", 3, 7, 7)},
        "size is fractional": {"size": (64.5, 3, 7, 7)},
        "transposed shape": {"size": (3, 64, 7, 7), "stride": (3136, 49, 7, 1)},
    }.items():
        add("L7", title, lying(CONV, **lie), LIE + r"|record")
    for title, record in {"outside the folder": "../data.pkl", "absolute": "/etc/passwd",
                          "that is the pickle": "../../archive/data.pkl"}.items():
        add("L7", f"record {title}", lying(CONV, record=record), LIE + "|record", must="either")
    add("L7", "1 TB by stride 0", lying("bn1.weight", size=(1 << 38,), stride=(0,)),
        LIE + r"|bn1")
    add("L7", "constant by stride 0", lying("bn1.weight", stride=(0,)), LIE, must="either",
        expected=lambda: {**weights(), "bn1.weight": weights()["bn1.weight"][:1].repeat(64)})
    add("L7", "record is missing", without_record("data/150"), r"data/150\b|150")
    add("L7", "record cut, honest checksum", with_record("data/150", b"\0" * 100),
        r"data/150\b|150")
    add("L7", "record too long, honest checksum", with_record("data/150", bytes(20 << 20)),
        r"data/150\b|150")
    add("L7", "tensor of a tensor", rebuilt(CONV, lambda tensor: Call(
        torch._utils._rebuild_tensor_v2, 7, 0, (64, 3, 7, 7), (147, 49, 7, 1), False, {})),
        LIE + r"|int|pickle|_rebuild")
    add("L7", "meta tensor", rebuilt(CONV, lambda tensor: Call(
        torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (64, 3, 7, 7),
        (147, 49, 7, 1), False)), LIE + r"|meta|_rebuild")
    add("L7", "all in two storages", _flat_file, must="loads")
    add("L7", "transposed in memory", _transposed_file, must="loads")

    duplicate = r"twice|duplicate|more than once|two records|repeated"
    add("L8", "key twice", repickled(_key_twice("module")), r"conv1|twice|duplicate|more than once")
    add("L8", "state_dict twice", repickled(_key_twice("MoCo"), "MoCo"),
        r"conv1|twice|duplicate|more than once", method="MoCo")
    for record in ("data/5", "data/0", "version"):
        add("L8", f"record {record} twice", archived(lambda record=record: [
            *base("SparK"), (record, b"3\n" if record == "version" else bytes(8))]), duplicate)
    add("L8", "byte order big, bytes little", with_record("byteorder", b"big"),
        r"byte ?order|endian")
    add("L8", "byte order big, bytes big", _big_endian, r"byte ?order|endian", must="either")
    add("L8", "byte order unknown", with_record("byteorder", b"middle"), r"byte ?order|endian")
    add("L8", "int32 over float32 bytes", lying(CONV, kind=torch.IntStorage),
        r"conv1\.weight.*(int32|dtype|type)|(int32|dtype|type).*conv1\.weight|IntStorage|int32")
    add("L8", "float64 over float32 bytes", lying(CONV, kind=torch.DoubleStorage, length=4704),
        LIE + r"|float64|Double")
    add("L8", "bytes for a storage type", lying(CONV, kind=bytes), LIE + r"|bytes|type")
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool,
                  torch.complex64):
        kind = str(dtype).removeprefix("torch.")
        add("L8", f"all {kind}", saved(lambda dtype=dtype: checkpoint("SparK", {
            key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in weights().items()})), kind)
        add("L8", f"one {kind}", changed("SparK", lambda tensors, dtype=dtype: tensors.update(
            {CONV: tensors[CONV].to(dtype)})), rf"conv1\.weight.*{kind}|{kind}.*conv1\.weight")
    for kind, convert in {
        "sparse": lambda t: t.to_sparse(), "sparse CSR": lambda t: t.view(64, -1).to_sparse_csr(),
        "quantized": lambda t: torch.quantize_per_tensor(t, 0.01, 0, torch.qint8),
        "text": lambda t: "weights", "None": lambda t: None, "list": lambda t: t.tolist(),
        "NumPy array": lambda t: t.numpy(), "scalar": lambda t: 0.5,
        "nested dictionary": lambda t: {"weight": t},
        "negative view": lambda t: torch._neg_view(t), "meta": lambda t: t.to("meta"),
    }.items():
        words = {"sparse CSR": "sparse", "NumPy array": "NumPy|_reconstruct|ndarray|array",
                 "nested dictionary": "dict", "scalar": "float", "text": r"\bstr\b|text",
                 "quantized": "quant|qint8", "negative view": "negative"}.get(kind, kind)
        add("L8", kind, changed("SparK", lambda tensors, convert=convert: tensors.update(
            {CONV: convert(tensors[CONV])})), rf"conv1\.weight|{words}",
            must="either" if kind == "negative view" else "refused",
            expected=(lambda: {**weights(), CONV: -weights()[CONV]})
            if kind == "negative view" else weights)


def _key_twice(layout: str) -> Callable[[bytes], bytes]:
    """Rename a later tensor of the pickle, so that the first name appears a second time."""
    first, other = ((f"encoder_q.{CONV}", "encoder_q.layer1.0.conv2.weight") if layout == "MoCo"
                    else (CONV, "layer1.0.conv2.weight"))
    return lambda body: body.replace(text(other), text(first), 1)


def _big_endian(folder: Path) -> Path:
    records = []
    for title, data in base("SparK"):
        if title.startswith("data/"):
            wide = "<i8" if len(data) == 8 else "<f4"
            data = np.frombuffer(data, wide).astype(wide.replace("<", ">")).tobytes()
        records.append((title, b"big" if title == "byteorder" else data))
    return write_zip(folder / "model.ckpt", records)


_add_bombs()
_add_lies()

# =============================================================================
# L9 to L13: whole files with the wrong content
# =============================================================================


def one_value(key: str, value: float, where: int = 5) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        full = next(k for k in tensors if k.endswith(key))
        tensors[full] = tensors[full].clone()
        tensors[full].view(-1)[where] = value
    return change


def all_values(ends: str, value: float) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        for key in [k for k in tensors if k.endswith(ends)]:
            tensors[key] = torch.full_like(tensors[key], value)
    return change


def _add_values() -> None:
    nan, inf = float("nan"), float("inf")
    for method, key, value in (
        ("SparK", "layer2.1.conv2.weight", nan), ("MoCo", "layer4.2.conv3.weight", inf),
        ("BYOL", "layer1.0.downsample.0.weight", -inf), ("SwAV", "bn1.bias", nan),
        ("SparK", "layer3.5.bn2.running_mean", nan), ("SparK", "layer3.5.bn2.running_var", inf),
        ("SparK", "layer3.5.bn2.running_var", -0.5), ("MoCo", "bn1.running_var", -1e-3),
    ):
        add("L9", f"{value} in {method} {key}", changed(method, one_value(key, value)),
            key.replace(".", r"\."), method=method)
    for key in ("layer2.0.conv1.weight", "conv1.weight"):
        add("L9", f"{key} all zero", changed("SparK", all_values(key, 0.0)),
            key.replace(".", r"\."))
    add("L9", "everything zero", saved(lambda: checkpoint(
        "SparK", {k: torch.zeros_like(t) for k, t in weights().items()})), r"conv1\.weight")
    add("L9", "everything NaN", saved(lambda: checkpoint(
        "SparK", {k: torch.full_like(t, nan) if t.is_floating_point() else t
                  for k, t in weights().items()})), r"conv1\.weight|bn1\.weight")
    zero_init = {k: torch.zeros_like(t) if k.endswith("bn3.weight") else t
                 for k, t in weights().items()}
    add("L9", "zero-initialised residuals are right", saved(lambda: checkpoint("SparK", zero_init)),
        must="loads", expected=lambda: zero_init)
    add("L9", "NaN in an auxiliary tensor", changed("MoCo", lambda tensors: tensors.update(
        {"queue": torch.full((4, 8), nan)})), r"queue", method="MoCo", must="either")


def _add_mix_ups() -> None:
    for there in METHODS:
        for asked in METHODS:
            if there != asked:
                add("L10", f"{there} asked for as {asked}", good_file(there),
                    rf"(?=.*\b{there}\b)(?=.*\b{asked}\b)", method=asked,
                    twin=good_file(asked))
    add("L10", "BYOL and MoCo in one file", saved(lambda: wrapped("MoCo", {
        **prefixed(PREFIX["MoCo"], weights()), **auxiliary("MoCo"),
        **prefixed(PREFIX["BYOL"], weights(1)), **auxiliary("BYOL")})),
        r"BYOL|online_network", method="MoCo")


def architecture(method: str, network: Callable, **options) -> Build:
    return saved(lambda: checkpoint(method, filled(network, **options)))


def _add_architectures() -> None:
    models = torchvision.models
    for title, network, says in (
        ("ResNet18", models.resnet18, r"layer1\.0\.(conv1|conv3|downsample)"),
        ("ResNet34", models.resnet34, r"layer1\.[02]\.(conv1|conv3|downsample)"),
        ("ResNet101", models.resnet101, r"layer3\.(6|1\d|2\d)\b"),
        ("ResNet152", models.resnet152, r"layer(2\.[4-7]|3\.(6|[123]\d))\b"),
        ("wide ResNet50", models.wide_resnet50_2, r"layer1\.0\.(conv1|bn1)"),
        ("ResNeXt50", models.resnext50_32x4d, r"layer1\.0\.(conv1|bn1|conv2)"),
    ):
        for method in ("SparK", "MoCo"):
            add("L11", f"{title} in a {method} file", architecture(method, network), says,
                method=method)
    missing = r"318|conv1\.weight|layer1"
    for title, network in (
        ("DenseNet121", models.densenet121), ("EfficientNet", models.efficientnet_b0),
        ("ViT", models.vit_b_16), ("ConvNeXt", models.convnext_tiny),
        ("MobileNet", models.mobilenet_v3_small), ("ShuffleNet", models.shufflenet_v2_x1_0),
    ):
        add("L12", title, architecture("SparK", network), missing)
    for title, changes, says in (
        ("one input channel", {CONV: (64, 1, 7, 7)}, r"conv1\.weight.*\b1\b"),
        ("small-image stem", {CONV: (64, 3, 3, 3)}, r"conv1\.weight.*\b3, 3, 3"),
        ("double width", {"layer4.2.conv3.weight": (4096, 512, 1, 1)},
         r"layer4\.2\.conv3\.weight.*4096"),
        ("weight as a vector", {CONV: (9408,)}, r"conv1\.weight.*9408"),
        ("norm of another length", {NORM: (65,)}, r"layer1\.0\.bn1\.weight.*65"),
    ):
        add("L12", title, changed("SparK", lambda tensors, changes=changes: tensors.update(
            {key: torch.randn(shape) for key, shape in changes.items()})), says)
    add("L12", "squeeze and excitation", changed("SparK", lambda tensors: tensors.update(
        {"layer1.0.se.fc1.weight": torch.ones(16, 256)})), r"layer1\.0\.se")
    add("L12", "deep stem", saved(lambda: checkpoint("SparK", {
        k.replace("conv1.", "conv1.0.", 1) if k == CONV else k: t
        for k, t in weights().items()})), r"conv1")
    add("L12", "names of another library", saved(lambda: checkpoint("SparK", {
        k.replace("layer", "res").replace("bn", "norm"): t for k, t in weights().items()})),
        missing)
    add("L12", "group norm", changed("SparK", _drop(r"running_mean running_var tracked".split())),
        r"running_mean|running_var|BatchNorm")


def _drop(ends: Sequence[str]) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        for key in [k for k in tensors if k.endswith(tuple(ends))]:
            del tensors[key]
    return change


def first(count: int) -> dict[str, torch.Tensor]:
    return dict(list(weights().items())[:count])


def _add_incomplete() -> None:
    for method in METHODS:
        add("L13", f"{method} without a backbone", saved(
            lambda method=method: checkpoint(method, {})), r"318", method=method)
    add("L13", "empty dictionary", saved({}), r"318|empty|no tensor|nothing")
    add("L13", "wrapper without weights", saved({"epoch": 3, "optimizer_states": []}),
        r"318|no tensor|state_dict|nothing")
    for count in (1, 159, 317):
        add("L13", f"{count} of 318", saved(lambda count=count: checkpoint("MoCo", first(count))),
            rf"(\b{318 - count}\b.*318|\b{count}\b.*318)", method="MoCo")
    add("L13", "one tensor missing", changed("SparK", _drop(["layer4.2.bn3.running_var"])),
        r"(\b1\b.*318|317.*318).*layer4\.2\.bn3\.running_var|"
        r"layer4\.2\.bn3\.running_var.*(\b1\b.*318|317.*318)")
    add("L13", "no BatchNorm statistics", changed("SparK", _drop(["running_mean", "running_var"])),
        r"106.*318|212.*318")
    add("L13", "no fourth stage", saved(lambda: checkpoint("SparK", {
        k: t for k, t in weights().items() if not k.startswith("layer4")})), r"\d+.*318")
    add("L13", "only the head", saved(lambda: checkpoint("SparK", {
        "fc.weight": torch.ones(9, 2048), "fc.bias": torch.ones(9)})), r"318")
    add("L13", "no counters (old file)", changed("SparK", _drop(["num_batches_tracked"])),
        must="loads", reports=r"num_batches_tracked",
        expected=lambda: {k: torch.tensor(0) if k.endswith("tracked") else t
                          for k, t in weights().items()})
    add("L13", "some counters missing", changed("SparK", _drop(["bn2.num_batches_tracked"])),
        r"num_batches_tracked", must="either",
        expected=lambda: {k: torch.tensor(0) if k.endswith("bn2.num_batches_tracked") else t
                          for k, t in weights().items()})


_add_values()
_add_mix_ups()
_add_architectures()
_add_incomplete()

# =============================================================================
# L14 to L16: odd files that are right, and a right looking one that is not
# =============================================================================


def relabelled(method: str, rename: Callable[[str], str]) -> Build:
    """Builder: every tensor of the method's file under another name."""
    def content() -> dict:
        outer = checkpoint(method)
        inside = "module" if method == "SparK" else "state_dict"
        outer[inside] = {rename(key): tensor for key, tensor in outer[inside].items()}
        return outer
    return saved(content)


def _still_pretraining() -> dict:
    """SparK's second file: the same backbone deeper inside, decoder and settings beside it."""
    tensors = prefixed("sparse_encoder.sp_cnn.", weights())
    extra = ["imn_m", "imn_s", "norm_black", "dense_decoder.dec.0.up_sample.weight",
             "dense_decoder.dec.0.conv.1.running_var", "dense_decoder.proj.weight",
             "densify_norms.0.weight", "densify_projs.0.weight", "mask_tokens.0"]
    settings = {"mask_ratio": 0.6, "densify_norm_str": "bn", "sbn": False, "hierarchy": 4,
                "sparse_encoder.input_size": 224, "dense_decoder.width": 768}
    return {"args": "Namespace()", "arch": "resnet50", "epoch": 799, "performance_desc": "0.3",
            "module": {**tensors, **small("", extra), "config": settings},
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "is_pretrain": True}


def _on_gpu(method: str) -> Build:
    """Builder: the storages say that they lived on a GPU, as those of the published files do."""
    return repickled(lambda body: body.replace(text("cpu"), text("cuda:0"), 1), method)


def _add_odd_right() -> None:
    for method in METHODS:
        right = {"method": method, "must": "loads"}
        add("L14", f"{method}, whole", good_file(method), **right)
        add("L14", f"{method}, from GPU memory", _on_gpu(method), **right)
        add("L14", f"{method}, by DDP", relabelled(method, lambda key: "module." + key), **right)
        inside = "module" if method == "SparK" else "state_dict"
        add("L14", f"{method}, nested once more", saved(
            lambda method=method, inside=inside: {inside: checkpoint(method)}), **right)
        add("L14", f"{method}, before PyTorch 2.1", archived(lambda method=method: [
            r for r in base(method) if r[0] != "byteorder"]), **right)
        add("L14", f"{method}, shuffled", saved(lambda method=method: checkpoint(
            method, dict(sorted(weights().items(), key=lambda pair: pair[0][::-1])))), **right)
    add("L14", "SparK, still pretraining", saved(_still_pretraining, "r50_still_pretraining.pth"),
        must="loads")
    add("L14", "SparK, still pretraining, by DDP", saved(lambda: {
        **_still_pretraining(), "module": prefixed("module.", _still_pretraining()["module"])}),
        must="loads")
    add("L14", "MoCo with a linear head", changed("MoCo", _linear_head), method="MoCo",
        must="loads")
    add("L14", "MoCo without a head", changed("MoCo", _drop(
        ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"])), method="MoCo", must="loads")
    add("L14", "SwAV, mixed precision", saved(lambda: checkpoint(
        "SwAV", native_amp_scaling_state={"scale": 65536.0, "_growth_tracker": 3})),
        method="SwAV", must="loads")
    add("L14", "BYOL with optimizer state", saved(lambda: checkpoint("BYOL", optimizer_states=[{
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5)}},
        "param_groups": [{"lr": 0.3, "params": [0]}]}])), method="BYOL", must="loads")
    add("L14", "MoCo, wrapper removed", saved(lambda: checkpoint("MoCo")["state_dict"]),
        method="MoCo", must="loads")
    add("L14", "parameters instead of tensors", saved(lambda: checkpoint("SparK", {
        k: torch.nn.Parameter(t) if t.is_floating_point() else t for k, t in weights().items()})),
        must="loads")
    add("L14", "by a symbolic link", _linked, must="loads")


def _linear_head(tensors: dict) -> None:
    _drop(["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"])(tensors)
    for encoder in ("encoder_q", "encoder_k"):
        tensors[f"{encoder}.fc.weight"] = torch.ones(128, 2048)
        tensors[f"{encoder}.fc.bias"] = torch.ones(128)


def _linked(folder: Path) -> Path:
    (folder / "link.ckpt").symlink_to(good_file("SparK")(folder))
    return folder / "link.ckpt"


@contextlib.contextmanager
def importable(*classes: type) -> Iterator[None]:
    """Let pickle find classes of packages that are not installed."""
    fakes = {}
    for kind in classes:
        parts = kind.__module__.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            fakes.setdefault(package, types.ModuleType(package))
        setattr(fakes[kind.__module__], kind.__name__, kind)
    before = {package: sys.modules.get(package) for package in fakes}
    sys.modules.update(fakes)
    try:
        yield
    finally:
        for package, real in before.items():
            sys.modules[package] = real
            if real is None:
                del sys.modules[package]


def foreign(path: str, *bases: type, **body) -> type:
    """A class that pickles under the dotted name `path`."""
    module, title = path.rsplit(".", 1)
    kind = types.new_class(title, bases, exec_body=lambda space: space.update(body))
    kind.__module__, kind.__qualname__ = module, title
    return kind


AttributeDict = foreign("pytorch_lightning.utilities.parsing.AttributeDict", dict)
ModelCheckpoint = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
LightningCosine = foreign("pl_bolts.optimizers.lr_scheduler.LinearWarmupCosineAnnealingLR")
Accuracy = foreign("torchmetrics.classification.accuracy.Accuracy")
Settings = foreign("mylab.settings.Settings")
FOREIGN = (AttributeDict, ModelCheckpoint, LightningCosine, Accuracy, Settings)


def with_state(kind: type, **state) -> object:
    thing = kind()
    thing.__dict__.update(state)
    return thing


def carrying(value: Callable[[], object], method: str = "MoCo", key: str = "hyper_parameters",
             extra: Sequence[type] = ()) -> Build:
    """Builder: a good file with `value()` among what the training code saved beside it."""
    def build(folder: Path) -> Path:
        with importable(*FOREIGN, *extra):
            return saved(checkpoint(method, **{key: value()}))(folder)
    return build


def _enum() -> object:
    import enum

    kind = enum.Enum("TrainerFn", {"FITTING": "fit"}, module="pytorch_lightning.trainer.states")
    # By value, as all Pythons but 3.11.0 to 3.11.3 do; those ask for getattr, which is refused.
    kind.__reduce_ex__ = lambda member, protocol: (kind, (member.value,))
    with importable(kind):
        return kind, kind.FITTING


def _enum_file(folder: Path) -> Path:
    kind, member = _enum()
    return carrying(lambda: {"stage": member}, extra=(kind,))(folder)


def _omegaconf() -> object:
    from omegaconf import OmegaConf

    return OmegaConf.create({"model": {"depth": 50, "lr": "${optim.lr}"}, "optim": {"lr": 0.1},
                             "devices": [0, 1]})


BENIGN: dict[str, Callable[[], object]] = {
    "AttributeDict": lambda: AttributeDict(lr=0.3, nested=AttributeDict(a=1)),
    "Namespace": lambda: argparse.Namespace(lr=0.3, gpus=[0, 1]),
    "path": lambda: {"data": pathlib.PurePosixPath("data/lidc"), "here": pathlib.Path("x")},
    "Windows path": lambda: {"data": pathlib.PureWindowsPath("C:/data")},
    "NumPy scalars": lambda: {"loss": np.float64(0.25), "step": np.int64(3), "ok": np.bool_(True),
                              "half": np.float32(0.5)},
    "NumPy dtype": lambda: {"dtype": np.dtype("float32"), "kind": np.float32},
    "partial of an optimizer": lambda: {"optimizer": functools.partial(torch.optim.Adam, lr=0.1)},
    "collections": lambda: {"a": collections.defaultdict(list, x=[1]),
                            "b": collections.Counter("abca"), "c": collections.deque([1], 5)},
    "plain builtin values": lambda: {"a": {1, 2}, "b": frozenset([3]), "c": 1 + 2j, "d": b"raw",
                                     "e": slice(1, 2), "f": range(3), "g": bytearray(b"x"),
                                     "h": int, "i": ...},
    "date and time": lambda: {"at": datetime.datetime(2023, 11, 1, 12),
                              "took": datetime.timedelta(hours=3)},
    "layer class": lambda: {"activation": torch.nn.ReLU},
    "whole layer": lambda: {"head": torch.nn.Linear(4, 2)},
    "torch values": lambda: {"size": torch.Size([1, 2]), "dtype": torch.float16,
                             "device": torch.device("cpu")},
    "torchmetrics object": lambda: {"metric": with_state(Accuracy, correct=torch.tensor(3))},
    "bolts scheduler": lambda: {"scheduler": with_state(LightningCosine, last_epoch=3)},
}


def _add_extras() -> None:
    for title, value in BENIGN.items():
        add("L15", title, carrying(value), method="MoCo", must="loads")
    add("L15", "callback class as a key", carrying(
        lambda: {ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}}, key="callbacks"),
        method="MoCo", must="loads")
    add("L15", "callback class as a key, BYOL", carrying(
        lambda: {ModelCheckpoint: {"monitor": "loss"}}, "BYOL", "callbacks"), method="BYOL",
        must="loads")
    add("L15", "Namespace in a SwAV file", carrying(BENIGN["Namespace"], "SwAV"), method="SwAV",
        must="loads")
    add("L15", "Namespace in a SparK file", carrying(BENIGN["Namespace"], "SparK", "args"),
        must="loads")
    add("L15", "enum", _enum_file, method="MoCo", must="loads")
    if importlib.util.find_spec("omegaconf"):  # the real thing, where it is installed
        add("L15", "OmegaConf", carrying(_omegaconf), method="MoCo", must="loads")
    add("L15", "NumPy array", carrying(lambda: {"scores": np.arange(3.0)}), r"numpy",
        method="MoCo", must="either")
    add("L15", "legacy format with a Namespace", saved(
        lambda: checkpoint("MoCo", hyper_parameters=argparse.Namespace(lr=0.1)),
        _use_new_zipfile_serialization=False), method="MoCo", must="loads")
    add("L15", "AttributeDict around the weights", _attribute_weights, method="MoCo", must="loads")

    unknown = carrying(lambda: with_state(Settings, lr=0.1))
    add("L15", "unknown name is refused", unknown,
        r"allow_extra=\(?.*mylab\.settings\.Settings", method="MoCo", twin=unknown,
        twin_allow_extra=("mylab.settings.Settings",))
    add("L15", "unknown name, allowed by the user", unknown, method="MoCo", must="loads",
        allow_extra=("mylab.settings.Settings",))
    decimals = carrying(lambda: {"lr": decimal.Decimal("0.1")})
    add("L15", "installed but unknown name", decimals, r"allow_extra=\(?.*decimal\.Decimal",
        method="MoCo", twin=decimals, twin_allow_extra=("decimal.Decimal",))
    probe = changed("MoCo", lambda tensors: tensors.update(
        {"linear_probe.weight": torch.ones(3, 4), "linear_probe.bias": torch.ones(3)}))
    add("L15", "unknown key group is refused", probe, r"allow_extra=\(?.*linear_probe",
        method="MoCo", twin=probe, twin_allow_extra=("linear_probe.",))
    add("L15", "unknown key group, allowed by the user", probe, method="MoCo", must="loads",
        allow_extra=("linear_probe.",), reports="linear_probe")


def _attribute_weights(folder: Path) -> Path:
    """A whole file whose dictionaries are all of a foreign class."""
    with importable(*FOREIGN):
        content = checkpoint("MoCo")
        content["state_dict"] = AttributeDict(content["state_dict"])
        return saved(AttributeDict(content))(folder)


def _add_replaced() -> None:
    for method in METHODS:
        add("L16", f"{method} with other weights", saved(
            lambda method=method: checkpoint(method, weights(1))), r"sha-?256", method=method,
            trusted=True)
    add("L16", "one weight changed", changed("SparK", one_value(CONV, 0.125)), r"sha-?256",
        trusted=True)
    add("L16", "two layers exchanged", changed("SparK", _exchange), r"sha-?256", trusted=True)
    add("L16", "legacy file, one bit", edited(_flip_in_the_middle, LEGACY), r"sha-?256",
        trusted=True, twin=LEGACY)
    add("L16", "same file again", good_file("SparK"), must="loads", trusted=True)


def _exchange(tensors: dict) -> None:
    a, b = "layer3.1.conv2.weight", "layer3.2.conv2.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _flip_in_the_middle(file: io.BufferedRandom, path: Path) -> None:
    file.seek(path.stat().st_size // 2)
    old = file.read(1)
    file.seek(-1, 1)
    file.write(bytes([old[0] ^ 1]))


_add_odd_right()
_add_extras()
_add_replaced()
