"""Helpers that the workbook's notebooks share: one file, to be read from top to bottom.

Sections, in reading order:
    Checkpoints   download, open safely, match to a ResNet50, report the keys, export
    Data          the prepared file, MedMNIST by name, label subsets, checks before training
    Training      recipes, the step, the loop, the run folder
    Evaluation    scores with their definitions, the interval of one run
    Results       finished runs as one table, methods compared, the comparison in words
    Study         a grid of settings run here or on a cluster
    Figures       plots that return the matplotlib figure
    Demo          stand-in checkpoints and phantom slices, so that nothing needs a download

Docstrings name types and shapes; signatures stay short.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import threading
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torchvision
from filelock import FileLock, Timeout
from torch import nn
from torch.nn import functional as F

__version__ = "0.2.0"

# =============================================================================
# Shared tools
# =============================================================================


def check_choice(value, options, what):
    """Raise ValueError, naming the options, unless `value` is one of them."""
    if value not in options:
        raise ValueError(f"{what} {value!r} is not known. Choose one of: {_few(options, 30)}.")


@contextlib.contextmanager
def _atomic(path):
    """Yield a new file (binary) that is renamed to `path` on success, and deleted on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path, timeout=-1):
    """Hold a lock beside `path`; filelock.Timeout if it stays taken for `timeout` seconds.

    Raises:
        OSError: the file system knows no locks; names the folder and the way out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise  # filelock.Timeout too, whose errno is None
        raise OSError(
            f"The file system of {path.parent} has no file locks, so two processes could write "
            "one file. Choose a folder on a local disk (runs_dir, data_dir or checkpoints_dir)."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _write_json(path, value):
    """Write JSON atomically; a NaN is an error, since no result may be one."""
    with _atomic(path) as file:
        file.write(json.dumps(value, indent=1, allow_nan=False).encode())


def _save_tensors(tensors, path, metadata=None):
    """Write a dictionary of tensors as safetensors, atomically."""
    from safetensors.torch import save

    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with _atomic(path) as file:
        file.write(save(tensors, metadata))


def _sha256(*chunks):
    """SHA-256 in hexadecimal digits over texts and bytes, one after another."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk.encode() if isinstance(chunk, str) else chunk)
    return digest.hexdigest()


def _few(names, most=5):
    """Join the first names of a list for a message, and count the rest."""
    names = [str(name)[:200] for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def describe_environment():
    """Return one line of versions and device for the top of a notebook or an issue."""
    device = "no CUDA GPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return (
        f"medssl {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, {device}, {torch.get_num_threads()} thread(s)"
    )


# =============================================================================
# Checkpoints
# =============================================================================


class CheckpointError(ValueError):
    """A checkpoint that could not be fetched, opened, or matched; says what to do next."""


# How each method's pre-training code names its tensors (read from the authors' own code): what
# stands before a backbone key, the published file's first,
PREFIXES = {
    "BYOL": ("online_network.encoder.",),
    "SwAV": ("model.", ""),  # SwAV's own code: no prefix
    "MoCo": ("encoder_q.",),
    "SparK": ("", "sparse_encoder.sp_cnn."),  # the second: of a pre-training that goes on
}
# and a part of a key that no other method's file has. SimSiam has BYOL's prefix, but no target;
# SparK's keys are any ResNet50's: what stands around them tells.
EVIDENCE = {"BYOL": "target_network.", "SwAV": "prototypes.", "MoCo": "encoder_k."}
EVIDENCE |= {"SparK": "is_pretrain"}
METHODS = tuple(PREFIXES)
CONTROLS = ("random", "ImageNet")
GROUPS = {  # start of a key beside the backbone -> what it is; the first that fits
    "online_network.": "projector and predictor of the online network",
    "target_network.encoder.": "momentum (target) encoder",
    "target_network.": "projector and predictor of the target network",
    "model.projection_head.": "projection head for the online clustering",
    "model.prototypes.": "prototypes (cluster centres)",
    "encoder_q.fc.": "contrastive head: every fc.* is dropped",
    "encoder_k.": "momentum (key) encoder",
    "queue": "queue of negative keys, and the position in it",
    "val_queue": "the same for validation",
    "fc.": "classifier: every fc.* is dropped",
}


@dataclass(frozen=True)
class Checkpoint:
    """What is known of one file. Yours: CHECKPOINTS["mine"] = Checkpoint(path="mine.pth")."""

    filename: str = ""  # the name it is kept under
    url: str = ""  # where it is fetched
    layout: str = ""  # one of METHODS; "": any ResNet50
    mean: tuple = ()  # of the pre-training images in [0, 1]; (): not known
    std: tuple = ()
    path: str = ""  # of your own file
    wrapper: str = ""  # key of its dictionary of tensors, where the usual ones don't find it
    prefix: str = ""  # what stands before its backbone keys; "" finds it


LIDC = {"mean": (0.1806,) * 3, "std": (0.1907,) * 3}  # LIDC-IDRI slices, min-max to 8 bit
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CHECKPOINTS = {}
for _method, _filename, _drive_id, _intensities in (
    # Wolf et al. 2023, doi:10.1038/s41598-023-46433-0
    ("BYOL", "byol_resnet50.ckpt", "1eBZYl1rXkKJxz42Wu75uzb1kLg8FTv1H", LIDC),
    ("SwAV", "swav_resnet50.ckpt", "11OWRzifq_BXrcFMZ13H0HwS4UGcaiAn_", LIDC),
    ("MoCo", "moco_v2_resnet50.ckpt", "1hUr_6XdYxjB66ZYEGTqE7b8I88IN9a1l", LIDC),
    ("SparK", "spark_resnet50.pth", "1kYFS67jH9s8kAmhNyf5wlRj_Gh9vTK_H", IMAGENET),
    # Wolf et al. 2024, Comput Biol Med 183:109242: SwAV on all images of a set, and on a less
    # redundant part of it. The intensities of its PET-CT images are not known.
    ("SwAV-PETCT", "SwAV-PETCT.ckpt", "12APs6cLRc9techxEK-ABeIfvkO8Yj1hI", {}),
    ("SwAV-PETCT-reduced", "SwAV-PETCT-reduced.ckpt", "1fXz7fKgYsqlknlnx78tmtOy_QAMOoX8Y", {}),
    ("SwAV-LIDC", "SwAV-LIDC.ckpt", "1IOAFPFjQiQfCbGSunaTeNzrCCEFKqJR9", LIDC),
    ("SwAV-LIDC-reduced", "SwAV-LIDC-reduced.ckpt", "1cFK4cMv30TGWiiu9L1pO5b-DTu2x_m3w", LIDC),
):
    CHECKPOINTS[_method] = Checkpoint(
        _filename,
        f"https://drive.google.com/uc?export=download&id={_drive_id}",
        _method.split("-")[0],  # the layout of SwAV-LIDC is SwAV's
        **_intensities,
    )


# Download ---------------------------------------------------------------------

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
DOWNLOAD_TIMEOUT = 60.0  # seconds of silence that end one of four attempts


def download_checkpoint(method, folder="checkpoints"):
    """Return the path of the published file of `method` in `folder`; fetch it if it is not there.

    Only a whole, checked file gets its name; a cut transfer is taken up by the next call. Two calls
    at once wait for each other. Silence ends it after some four minutes.

    Raises:
        CheckpointError: the file could not be had; says why, and how to get it by hand.
    """
    import gdown

    check_choice(method, CHECKPOINTS, "method")
    url = CHECKPOINTS[method].url
    target = Path(folder).expanduser() / CHECKPOINTS[method].filename
    transfer = target.with_name(f".{target.name}.download") / target.name
    options = {"use_cookies": False, "timeout": DOWNLOAD_TIMEOUT, "retries": 3}
    try:
        with _locked(target):
            if target.is_file():
                try:
                    _check_file(target, target.parent)
                    return target
                except CheckpointError as problem:
                    os.replace(target, f"{target}.bad")
                    warnings.warn(f"{target}: {problem}; set aside as .bad", stacklevel=2)
            transfer.parent.mkdir(exist_ok=True)
            transfer.unlink(missing_ok=True)  # what an earlier call fetched, and refused
            gdown.download(url, str(transfer), resume=True, **options)
            _check_file(transfer, target.parent)
            os.replace(transfer, target)
            transfer.parent.rmdir()
        return target
    except Exception as error:  # gdown fails in many ways on a page that it doesn't know
        raise CheckpointError(
            f"{method}: {url} could not be fetched: {error}\nDrive may have sent a web page (a "
            "login, a quota, no such file). By hand: open that address in a browser, save the file "
            f"as {target}, and run this again."
        ) from error


def _check_file(path, folder):
    """Return a checkpoint's SHA-256 after a look at its bytes alone; nothing is built from it.

    A zip archive, as torch.save writes it, is held against the CRC of each record, and any file
    against the SHA-256 of its first good load in `folder`/checksums.json.
    """
    with open(path, "rb") as file:
        start = file.read(64)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if re.match(rb"\W*<", start):
        raise CheckpointError("it is a web page, perhaps one that asks to log in or to wait")
    if start.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                _check_records(archive, path.stat().st_size)
        except Exception as error:  # a damaged archive fails in many ways
            raise CheckpointError(f"its zip archive is truncated or damaged: {error}") from error
    elif not start.startswith(LEGACY_START):  # that of PyTorch before 1.6 has no CRC
        raise CheckpointError(f"it is not a checkpoint: it begins with {start!r}")
    listing = folder / "checksums.json"
    if listing.exists() and json.loads(listing.read_text()).get(path.name, sha256) != sha256:
        raise CheckpointError(
            f"its SHA-256 is {sha256}, not that of its first load. If the authors replaced the "
            f"file, delete its entry in {listing}"
        )
    return sha256


def _check_records(archive, size):
    """Raise BadZipFile unless each record of an open archive is whole, and read by its own name."""
    sizes = {record.filename: record.file_size for record in archive.infolist()}
    if len(sizes) < len(archive.infolist()) or sum(sizes.values()) > size:
        raise zipfile.BadZipFile("a record is there twice, or compressed")
    damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"CRC of the record {damaged}")
    for name in sizes:
        root, folder, key = name.rpartition("/data/")
        text = f"{chr(len(key))}\0\0\0{key}".encode()  # a record's name, as the pickle has it
        if folder and text not in archive.read(f"{root}/data.pkl"):
            raise zipfile.BadZipFile(f"no tensor is read from the record {name}")


# Open -------------------------------------------------------------------------

# A checkpoint is a pickle, which can run code when it is opened. PyTorch's `weights_only` loader
# builds tensors and plain values alone. Other names that training code is known to leave beside
# the weights are replaced by an empty class; a file with any further name is refused.
HARMLESS = re.compile(
    r"(pytorch_lightning|lightning\w*|pl_bolts|omegaconf|torchmetrics|typing|datetime)(\.\w+)+"
    r"|torch\.(optim|nn)(\.\w+)+|torch\.torch_version\.TorchVersion|argparse\.Namespace"
    r"|collections\.[A-Zd]\w+|functools\.partial|copyreg\._reconstructor"
    r"|pathlib\.(_local\.)?\w*Path"
    r"|builtins\.(bool|int|float|str|bytes|list|tuple|dict|frozenset|slice|range|object|Ellipsis)"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtypes\.\w+|dtype|ndarray|\w+\d+|\w+_)"
)
WRAPPERS = ("state_dict", "module", "model", "model_state_dict", "checkpoint")
STAND_IN_MARK = "medssl_stand_in"  # a key of a stand-in's wrapper that no published file has


class _Inert(list):
    """Stands for a foreign object: takes all arguments and keeps none."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _open_checkpoint(path, wrapper):
    """Return a checkpoint's innermost dictionary, and the items of all dictionaries on the way.

    Tensors and plain values are built; nothing of the file runs.
    """
    names = []
    with contextlib.suppress(Exception):  # of a file that is refused below
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    inert = []
    for name in names:
        if name.endswith("AttributeDict"):
            inert.append((OrderedDict, name))  # the loader fills no other class of dictionary
        elif HARMLESS.fullmatch(name):
            inert.append((_Inert, name))
    try:
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        reason = str(error)
        foreign = re.search(r"GLOBAL (\S+)", reason)
        if foreign:
            reason = f"it holds {foreign[1]}, which could run code. Of a module, save state_dict()"
        elif "weights_only" in reason:  # the advice to switch the protection off
            reason = "its pickle is damaged, or does what no weight file's does"
        raise CheckpointError(reason) from error
    items = {}
    while isinstance(content, dict):
        content = {ascii(key).strip("'"): value for key, value in content.items()}
        items |= content
        inner = [key for key in (wrapper, *WRAPPERS) if isinstance(content.get(key), dict)]
        if not inner:
            return content, items
        content = content[inner[0]]
    raise CheckpointError(f"it holds a {type(content).__name__}, no dictionary of tensors")


# Match ------------------------------------------------------------------------

BACKBONE_KEY = re.compile(r"((?:.+?\.)??)((?:conv1|bn1|layer[1-4]\.\d+)\..+)", re.DOTALL)


def _recognise(entries, items, own_prefix):
    """Find a file's backbone: its method by evidence, else "ResNet50"; its prefix; its tensors.

    The user's `own_prefix` decides, else EVIDENCE, else the largest backbone.
    """
    backbones = {}
    for key, value in entries.items():
        match = BACKBONE_KEY.fullmatch(key)
        if match:
            backbones.setdefault(match[1], {})[match[2]] = value
    if not backbones:
        raise CheckpointError(f"0 of 318 backbone tensors; its keys are {_few(entries)}")
    method = "ResNet50"
    prefix = own_prefix or max(backbones, key=lambda start: len(backbones[start]))
    for name, evidence in EVIDENCE.items():
        evident = any(evidence in key for key in items)
        for start in backbones:
            bare = start.removeprefix("module.")  # of DistributedDataParallel
            if evident and bare in PREFIXES[name] and not own_prefix:
                if method != "ResNet50":
                    raise CheckpointError(f"it holds the keys of two methods, {method} and {name}")
                method, prefix = name, start
    return method, prefix, backbones.get(prefix, {})


def _check_backbone(own, notes):
    """Return the 318 tensors of a ResNet50: right names, shapes, dtypes, numbers of their own."""
    places = Counter(value.data_ptr() for value in own.values() if torch.is_tensor(value))
    with torch.device("meta"):  # names, shapes and types, without memory
        layout = _new_resnet50().state_dict()
    missing = [name for name in layout if name not in own]
    foreign = [name for name in own if name not in layout]
    if missing == [name for name in layout if name.endswith("num_batches_tracked")]:
        own = own | {name: torch.tensor(0) for name in missing}
        missing = []
        notes.append("53 num_batches_tracked were absent (PyTorch < 0.4.1): set to 0")
    if missing or foreign:
        wrong = f"{len(missing)} of 318 backbone tensors missing ({_few(missing, 1)})"
        raise CheckpointError(f"{wrong}, {len(foreign)} that no ResNet50 has ({_few(foreign, 1)})")
    tensors = {}
    for name, blank in layout.items():
        tensor = own[name]
        kind = (getattr(tensor, "shape", type(tensor)), getattr(tensor, "dtype", None))
        if kind != (blank.shape, blank.dtype):
            raise CheckpointError(f"{name} is {kind}, not {(blank.shape, blank.dtype)}")
        tensor = torch.detach(tensor).resolve_neg()  # without attributes that a file may have set
        dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        if not dense or not whole or places[tensor.data_ptr()] > 1:
            raise CheckpointError(f"{name} has no numbers of its own (stride or storage)")
        low, high = torch.aminmax(tensor)
        zero = tensor.dim() == 4 and low == high == 0
        negative = low < 0 and name.endswith("running_var")
        if zero or negative or not math.isfinite(high - low):
            raise CheckpointError(f"{name} has numbers from {low:g} to {high:g}: not trained")
        tensors[name] = tensor
    return tensors


# Report -----------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class KeyReport:
    """What was taken from a checkpoint, what was left, and why that is right."""

    method: str  # a name of CHECKPOINTS or CONTROLS; "ResNet50": nothing told the method
    weights: str  # "published", "stand-in", "file" (a path was given), "random" or "ImageNet"
    path: str = ""  # name of the file; "" for the control random
    sha256: str = ""  # of that file; after an export, of the checkpoint
    unexpected_keys: tuple = ()  # of the file, no part of a ResNet50: left out
    fingerprint: str = ""  # SHA-256 over names, types, shapes and numbers of the loaded tensors
    mean: tuple = ()  # to normalise images in [0, 1] with; (): the data's are used
    std: tuple = ()
    notes: tuple = ()  # further things to know, one sentence each
    stand_in: str = ""  # "planted" or "random" for a stand-in
    demo: bool = False  # a stand-in, or loaded beside stand-ins: its results are a demo's
    loaded = expected = 318  # backbone tensors; anything else is an error
    missing_keys = ("fc.weight", "fc.bias")  # of a ResNet50; never taken from a checkpoint

    @property
    def name(self):
        """The method, with "(planted)" or "(random)" for a stand-in."""
        return f"{self.method} ({self.stand_in})" if self.stand_in else self.method

    @property
    def groups(self):
        """How many unexpected keys there are of each kind: start of the key -> number."""
        counts = Counter()
        for key in self.unexpected_keys:
            starts = [start for start in GROUPS if f".{start}" in f".{key}"]
            counts[starts[0] if starts else key.split(".")[0]] += 1
        return dict(counts)

    @property
    def verdict(self):
        """One or two sentences: what was loaded, and whether the rest is what is expected."""
        n = len(self.unexpected_keys)
        text = f"{self.loaded} of {self.expected} backbone tensors loaded, {n} other keys left out"
        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown:
            text += f", without knowing what they are: {_few(unknown)}"
        if self.stand_in:
            text += f". STAND-IN ({self.stand_in}): it tells nothing about {self.method}"
        return text + "."

    def __repr__(self):
        lines = [f"{self.name}: {self.weights} {self.path}", self.verdict]
        lines.append(f"Missing: {_few(self.missing_keys)}. Left out:")
        for group, count in self.groups.items():
            lines.append(f"{count:6}  {group:24} {GROUPS.get(group, 'not known')}")
        lines += [f"Note: {note}." for note in self.notes]
        lines.append(f"SHA-256 {self.sha256 or 'of no file'}, fingerprint {self.fingerprint[:16]}")
        return "\n".join(lines)


# Load -------------------------------------------------------------------------

# How a file is had that is not there; the Demo section adds how stand-ins are written.
SOURCES = {"published": download_checkpoint}


def load_backbone(method=None, path=None, *, weights="stand-in", folder="checkpoints", seed=0):
    """Return a ResNet50 backbone with a method's weights, and the report of its keys.

    Args:
        method: a name of CHECKPOINTS or CONTROLS; None recognises the method of the file at `path`.
        path: a checkpoint, or what `export_backbone` wrote; else `weights` decides.
        weights: "stand-in" (written on demand, tells nothing) or "published" (fetched on demand).
        folder: where checkpoints are kept.
        seed: of the control `random`, and of stand-ins that are drawn at random.
    Returns:
        model: torchvision ResNet50 with `fc` replaced by Identity, eval mode, on the CPU;
            (N, 3, H, W) images to (N, 2048) features.
        report: the `KeyReport`.
    Raises:
        CheckpointError: anything but 318 right tensors of the method that was asked for.
    """
    check_choice(weights, SOURCES, "weights")
    if path is None:
        check_choice(method, (*CHECKPOINTS, *CONTROLS), "method")
    elif method is not None:  # a control is not loaded from a path
        check_choice(method, CHECKPOINTS, "method")
    demo = path is None and weights == "stand-in"
    if method == "random":
        tensors = _new_resnet50(seed).state_dict()
        report = KeyReport(method, method, notes=(f"torchvision's initialisation, seed {seed}",))
    else:
        origin = "file"
        if path is None:
            path, origin = _locate(method, weights, Path(folder).expanduser())
        path = Path(path).expanduser()
        try:
            if path.suffix == ".safetensors":
                tensors, report = _load_exported(method, path)
            else:
                tensors, report = _load_checkpoint(method, path, origin)
        except Exception as error:  # a damaged file fails in many ways
            text = ascii(str(error))[1:-1]  # it may quote the file: no terminal shall obey it
            raise CheckpointError(f"{path}: {text}.") from error
        if origin == "stand-in" and report.stand_in == "random":
            # drawn as the control is: one fixed network would not tell how much is chance
            tensors = _new_resnet50(int(_sha256(f"{method} {seed}")[:8], 16)).state_dict()
            report = replace(report, notes=(f"its numbers were drawn anew for seed {seed}",))
    with torch.device("meta"):
        model = _new_resnet50()
    model.load_state_dict(tensors, strict=True, assign=True)
    demo = demo or report.demo or bool(report.stand_in)
    fingerprint = report.fingerprint or _fingerprint(tensors)  # an export's is known
    return model.eval(), replace(report, fingerprint=fingerprint, demo=demo)


def _locate(method, weights, folder):
    """Return the file of a method, written or fetched where it is absent; and where it is from."""
    if method == "ImageNet":
        source = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
        source.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return Path(torch.hub.get_dir(), "checkpoints", Path(source.url).name), method
    entry = CHECKPOINTS[method]
    if entry.path:
        return entry.path, "file"
    if weights == "stand-in":
        folder = folder / weights
    path = folder / entry.filename
    if not path.is_file():
        path = SOURCES[weights](method, folder)
    return path, weights


def _new_resnet50(seed=0):
    """Draw torchvision's ResNet50 without `fc`; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = torchvision.models.resnet50()
    model.fc = nn.Identity()
    return model


def _load_checkpoint(method, path, origin):
    """Open, match and check a checkpoint as its authors saved it."""
    sha256 = _check_file(path, path.parent)
    entry = CHECKPOINTS.get(method, Checkpoint(**IMAGENET))
    entries, items = _open_checkpoint(path, entry.wrapper)
    evident, prefix, own = _recognise(entries, items, entry.prefix)
    taken = {prefix + name for name in own}
    rest = tuple(key for key in entries if key not in taken)
    notes = []
    if method is None:
        method = evident
        entry = CHECKPOINTS.get(method, Checkpoint())
    prefixes = PREFIXES.get(entry.layout)
    if prefixes and evident != entry.layout:
        if (entry.layout, evident, prefix) != ("SparK", "ResNet50", ""):
            raise CheckpointError(
                f"it holds no {method} backbone (318 tensors under {prefixes[0]!r}), but a "
                f"{evident} one under {prefix!r}: ask for that, or add an entry to CHECKPOINTS"
            )
        notes.append("nothing but the request says that this ResNet50 is SparK's")
    tensors = _check_backbone(own, notes)
    if prefixes and prefix != prefixes[0]:
        notes.append(f"its backbone stands under {prefix!r}: it is not the published file")
    stand_in = str(items.get(STAND_IN_MARK, ""))
    if origin in SOURCES and (origin == "stand-in") != bool(stand_in):
        raise CheckpointError(f"it is not what weights={origin!r} asks for: move it away")
    if stand_in:
        entry = Checkpoint()  # published intensities are not its own
    elif not entry.mean:
        notes.append("its pre-training intensities are not known: the data set's are used")
    elif origin == "file" and not entry.path:
        notes.append(f"mean and std are assumed to be those of the published {method} file")
    listing = path.with_name("checksums.json")
    recorded = json.loads(listing.read_text()) if listing.exists() else {}
    if origin == "published" and path.name not in recorded and os.access(path.parent, os.W_OK):
        _write_json(listing, recorded | {path.name: sha256})  # trust on first use
    report = KeyReport(method, origin, path.name, sha256, rest, stand_in=stand_in)
    return tensors, replace(report, mean=entry.mean, std=entry.std, notes=tuple(notes))


def _fingerprint(tensors):
    """SHA-256 over names, types, shapes and numbers in name order, whatever file they came from."""
    chunks = []
    for name in sorted(tensors):
        tensor = tensors[name]
        chunks.append(f"{name} {tensor.dtype} {tuple(tensor.shape)};")
        chunks.append(tensor.numpy().tobytes())
    return _sha256(*chunks)


# Export -----------------------------------------------------------------------


def export_backbone(model, path, report):
    """Write a backbone, and nothing else, as safetensors with its report in the metadata.

    Args:
        model: as `load_backbone` returned it.
        path: where to write (`.safetensors`); replaced at once, never half.
        report: its report.
    Returns:
        The path. `load_backbone(path=...)` loads it, and so does plain torchvision.
    Raises:
        CheckpointError: the weights are no longer those that the report speaks of.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of an exported backbone must end in .safetensors.")
    if _fingerprint(model.state_dict()) != report.fingerprint:
        raise CheckpointError("These are not the weights of the report: export before training.")
    metadata = {"format": "pt", "medssl_report": repr(vars(report))}
    _save_tensors(model.state_dict(), path, metadata)
    return path


def _load_exported(method, path):
    """Return tensors and report of what `export_backbone` wrote, verified."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    if "medssl_report" not in metadata:
        raise CheckpointError(
            "export_backbone did not write it. A trained network (a run's best.safetensors) is "
            "opened by notebook 07; other weights: save their dictionary with torch.save"
        )
    report = KeyReport(**ast.literal_eval(metadata["medssl_report"]))
    if method not in (None, report.method):
        raise CheckpointError(f"it is a {report.method} backbone, but {method} was asked for")
    if _fingerprint(tensors) != report.fingerprint:
        raise CheckpointError("its tensors are not those that were exported (fingerprint)")
    notes = (*report.notes, f"exported from {report.path}")
    return tensors, replace(report, weights="file", path=path.name, notes=notes)


# =============================================================================
# Data
# =============================================================================

PARTS = ("train", "val", "test")
# chestmnist is left out: it has several labels an image
MEDMNIST = "path derma oct pneumonia retina breast blood tissue organa organc organs".split()


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Attributes:
        images: (N, H, W) grey or (N, H, W, 3) RGB, uint8.
        labels: (N,) int64 class indices; -1 where the class is not known.
        ids: (N,) text, unique within the data set.
        patients: (N,) text, "" where the patient is not known.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    patients: np.ndarray

    def __len__(self):
        return len(self.labels)

    def take(self, index):
        """Return the images at `index` as a new Split."""
        return Split(*[column[index] for column in vars(self).values()])

    @property
    def fingerprint(self):
        """SHA-256 of ids, patients, labels and pixels."""
        names = "\n".join([*self.ids, *self.patients])
        return _sha256(names, self.labels.tobytes(), str(self.images.shape), self.images.tobytes())


NO_IMAGES = Split(np.zeros((0, 1, 1), "u1"), np.zeros(0, int), *np.zeros((2, 0), str))


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set as the training code sees it.

    Attributes:
        train, val, test: what is trained on, chosen by, and scored; empty if the file has none.
        class_names: C names; label i is class_names[i].
        mean, std: for normalising, three numbers each, in units of [0, 1].
        source: one line: where the images are from.
        demo: True for drawn images, whose results are stamped DEMO.
        official_split: True if the parts are the publisher's and stay so, leaks included.
        new: images without labels, for prediction.
    """

    name: str
    train: Split = NO_IMAGES
    val: Split = NO_IMAGES
    test: Split = NO_IMAGES
    class_names: tuple = ()
    mean: tuple = (0.5, 0.5, 0.5)  # as MedMNIST's own examples normalise
    std: tuple = (0.5, 0.5, 0.5)
    source: str = "a file of the user's"
    demo: bool = False
    official_split: bool = False
    notes: tuple = ()
    new: Split = NO_IMAGES

    @property
    def parts(self):
        """The parts that have images, by name: train, val, test, new."""
        splits = {part: getattr(self, part) for part in (*PARTS, "new")}
        return {part: split for part, split in splits.items() if len(split)}

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 over all parts."""
        return _sha256(*[split.fingerprint for split in self.parts.values()])


# Loading and saving ----------------------------------------------------------


def load_data(dataset="phantom", *, image_size=32, data_dir="data", seed=0):
    """Load the drawn phantoms, a MedMNIST set by its name, or a prepared file by its path.

    Args:
        dataset: "phantom"; a MedMNIST name such as "organsmnist" (28 pixels) or
            "organsmnist_224"; or the path of an .npz file that notebook 03 or MedMNIST wrote.
        image_size, seed: side in pixels and seed of the phantoms; files keep their size.
        data_dir: the folder of MedMNIST's files; what is not the official one is downloaded.

    Returns:
        DataSplits.

    Raises:
        ValueError: an unknown name, or a file that is not what it should be.
        FileNotFoundError: no such file. RuntimeError: the download failed.
    """
    name = str(dataset)
    if name == "phantom":
        return demo_data(seed, image_size=image_size)
    if name.endswith(".npz"):
        return _read_prepared(Path(name).expanduser())
    flag, _, size = name.partition("_")
    flags = [f"{kind}mnist" for kind in MEDMNIST]
    check_choice(flag, ["phantom", *flags, "path/of/a/prepared.npz"], "dataset")
    check_choice(size, ["", "64", "128", "224"], "size of a MedMNIST set")
    import medmnist  # takes seconds

    path = Path(data_dir).expanduser() / f"{name}.npz"
    info = medmnist.INFO[flag]
    loader = getattr(medmnist, info["python_class"])  # it fetches, and checks the MD5
    with _locked(path):
        loader("val", root=path.parent, size=int(size or 28), download=True)
    source = f"MedMNIST {path.stem}, licence {info['license']}"
    return replace(_read_prepared(path), source=source, class_names=tuple(info["label"].values()))


def _read_prepared(path):
    """Read an .npz file in MedMNIST's layout, with or without what `save_data` adds to it."""
    import psutil

    if not path.is_file():
        raise FileNotFoundError(f"No file {path.absolute()}. Notebook 03 makes one from images.")
    facts = {"official_split": True}  # a MedMNIST file has its publisher's parts
    try:
        with zipfile.ZipFile(path) as records:
            size = sum(record.file_size for record in records.infolist())
        free = psutil.virtual_memory().available
        if size > free:
            raise MemoryError(f"it needs {size:,} bytes of memory, {free:,} are free")
        arrays = dict(np.load(path, allow_pickle=False))
        splits = {}
        for part in (*PARTS, "new"):
            if f"{part}_images" in arrays:
                splits[part] = _read_part(arrays, part)
        highest = max(split.labels.max(initial=-1) for split in splits.values())
        facts["class_names"] = tuple(str(label) for label in range(highest + 1))
        for name, array in arrays.items():
            default = getattr(DataSplits, name, None)
            if isinstance(default, (tuple, str, bool)):  # class_names, mean, std, source, ...
                facts[name] = type(default)(array.tolist())
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path} is no prepared file (see notebook 03): {error}") from error
    return DataSplits(path.stem, **splits, **facts)


def _read_part(arrays, part):
    """Return one part of a file's arrays; what a plain MedMNIST file lacks is filled in."""
    images = arrays[f"{part}_images"]  # (N, H, W) or (N, H, W, 3)
    n = len(images)
    labels = np.full(n, -1)
    if part != "new":
        labels = arrays[f"{part}_labels"]  # (N,) or (N, 1)
    ids = arrays.get(f"{part}_ids", np.array([f"{part}/{i:06d}" for i in range(n)]))
    patients = arrays.get(f"{part}_patients", np.full(n, ""))
    sizes = {n, labels.size, len(ids), len(patients)}
    right = images.ndim > 2 and images.shape[3:] in ((), (3,)) and labels.dtype.kind in "iu"
    if images.dtype != np.uint8 or not right or len(sizes) > 1:
        shapes = f"{images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}"
        raise ValueError(f"{part}_images are {shapes}, {len(ids)} ids, {len(patients)} patients")
    return Split(images, labels.reshape(n).astype(np.int64), ids, patients)


def save_data(data, path):
    """Write a prepared .npz file, whole or not at all, and return its path."""
    arrays = {"fingerprint": data.fingerprint}
    for name, value in vars(data).items():
        if not isinstance(value, Split):
            arrays[name] = value
        elif len(value):
            arrays |= {f"{name}_{column}": array for column, array in vars(value).items()}
    with _atomic(Path(path)) as file:
        np.savez(file, **arrays)
    return Path(path)


# Subsets and checks ----------------------------------------------------------


def label_subset(split, label_fraction=1.0, *, labels_per_class=None, seed=0, rule="stratified"):
    """Choose the images whose labels may be used for training.

    "stratified": patients (or images without one) stand in one random order, fixed by `seed`.
    Each class takes them from its start until it has its fraction, to the nearest image, or
    `labels_per_class`; a patient is taken whole, so the last one may bring more than that. A
    smaller subset lies within a larger one, and every class is in each.

    The authors' two rules repeat their numbers: "authors" shuffles by Python's `random` and takes
    the first n (COVID-CT; their seed was always 42), "first" takes the first n (OrganSMNIST).

    Returns:
        (n,) int64 indices, sorted.

    Raises:
        ValueError: a fraction outside (0, 1], no images, or too few of a class.
    """
    n = len(split)
    if not 0 < label_fraction <= 1 or n == 0:
        raise ValueError(f"label_fraction {label_fraction} of {n} images: expected 0 < it <= 1.")
    if rule != "stratified":
        if labels_per_class is not None:
            raise ValueError(f"The subset rule {rule!r} takes a fraction, not labels_per_class.")
        order = list(range(n))
        if rule == "authors":
            random.Random(seed).shuffle(order)
        return np.sort(order[: int(n * label_fraction)])
    names = np.where(split.patients == "", split.ids, split.patients)
    patients, patient_of = np.unique(names, return_inverse=True)  # (P,), (N,)
    place = np.random.default_rng(seed).permutation(len(patients))[patient_of]  # (N,)
    counts = pd.crosstab(place, split.labels)  # (P, C) images, patients in the random order
    before = counts.cumsum() - counts  # images of the class that earlier patients have
    wanted = before + counts / 2 <= label_fraction * counts.sum()
    if labels_per_class is not None:
        most = counts.sum().min()
        if labels_per_class not in range(1, most + 1):
            raise ValueError(f"labels_per_class {labels_per_class}: expected 1 to {most}.")
        wanted = before < labels_per_class
    wanted = (wanted | (before == 0)) & (counts > 0)  # the first patient of each class, always
    return np.flatnonzero(wanted.any(axis=1).to_numpy()[place])


@dataclass(eq=False)
class SplitReport:
    """What `check_splits` finds; prints itself.

    Attributes:
        errors: what must be mended before training.
        warnings: what a reader of the results must know.
        counts: images of each class in each part.
        pairs: a row for two images that are too alike: kind ("exact" or "patient", a patient in
            two parts), where, and part, row, id, label of one and, ending in _2, of the other.
    """

    name: str
    errors: list
    warnings: list
    counts: pd.DataFrame
    pairs: pd.DataFrame

    def raise_for_errors(self):
        """Raise ValueError with all errors, if there are any."""
        if self.errors:
            raise ValueError(f"{self.name} is not fit for training: {' '.join(self.errors)}")

    def __repr__(self):
        lines = [f"{self.name}: {len(self.errors)} errors, {len(self.warnings)} warnings"]
        lines += [f"ERROR: {error}" for error in self.errors]
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, str(self.counts)])


def check_splits(data):
    """Look for what would make a result wrong: leaks, contradictions, gaps.

    A patient or a picture in two parts, and a picture with two labels, are errors; in an official
    split, which stays as it is, they are warnings. (Notebook 03 looks for near-duplicates, too.)

    Returns:
        SplitReport.
    """
    parts = data.parts
    errors, warnings_, frames = [], [], []
    if list(parts) not in (["test"], ["new"]) and set(PARTS) - set(parts):
        errors.append(f"It has images for {_few(parts)} only, of {_few(PARTS)}.")
    for part, split in parts.items():
        digests = [hash(image.tobytes()) for image in split.images]
        columns = {"part": part, "row": range(len(split)), "exact": digests}
        columns |= {"id": split.ids, "label": split.labels, "patient": split.patients}
        frames.append(pd.DataFrame(columns))
    images = pd.concat(frames, ignore_index=True)
    labelled = images[images.part != "new"]
    classes = range(len(data.class_names))
    if not labelled.label.isin(classes).all():
        errors.append(f"It has labels outside 0 to {len(classes) - 1}.")
    counts = pd.crosstab(labelled.label, labelled.part).reindex(classes, fill_value=0)
    counts.index = pd.Index(data.class_names, name="class")
    for part in counts:
        absent = counts.index[counts[part] == 0]
        problems = errors if part == "train" else warnings_
        if len(absent):
            problems.append(f"{part} has no image of {_few(absent)}.")
    twice = images.id[images.id.duplicated()]
    if len(twice):
        errors.append(f"Ids occur twice: {_few(twice)}.")
    pairs = _find_pairs(images)
    for (kind, where), rows in pairs.groupby(["kind", "where"], sort=False):
        names = rows.id + " = " + rows.id_2
        if kind == "patient":
            names = rows.patient
        mild = where == "in one part" or data.official_split
        problems = warnings_ if mild else errors
        problems.append(f"{len(rows)} {kind} pairs {where}: {_few(names)}.")
    return SplitReport(data.name, errors, warnings_, counts, pairs)


def _find_pairs(images):
    """Put each image beside the first one with the same pixels, or patient (in another part)."""
    patients = images[images.patient != ""].drop_duplicates(["part", "patient"])
    tables = []
    for kind, rows in {"exact": images, "patient": patients}.items():
        pairs = rows.merge(rows.drop_duplicates(kind), on=kind, suffixes=("", "_2"))
        tables.append(pairs[pairs.id != pairs.id_2].assign(kind=kind))
    pairs = pd.concat(tables, ignore_index=True)
    two_labels = (pairs.label != pairs.label_2) & (pairs.kind == "exact")
    two_parts = pairs.part != pairs.part_2
    places = ["with two labels", "in two parts"]
    pairs["where"] = np.select([two_labels, two_parts], places, "in one part")
    return pairs.sort_values("where", ascending=False, ignore_index=True)


# =============================================================================
# Training
# =============================================================================

# What the authors' notebooks really do; OrganSMNIST differs, see `FineTuneConfig.named`
PAPER = {"epochs": 70, "batch_size": 64, "lr": 1e-4, "backbone_lr": 1e-4, "weight_decay": 5e-4}
PAPER |= {"optimizer": "Adam", "freeze_epochs": 10, "warmup": 0.0, "schedule": "authors"}
PAPER |= {"augment": "flip_ud", "select_by": "ACC", "normalise": "dataset"}
PAPER |= {"subset_rule": "authors", "precision": "fp32"}
# features once, then a logistic regression on them: no step trains the network
LINEAR = {"epochs": 1, "freeze_epochs": 1, "augment": "none", "precision": "fp32"}
# learns the phantoms on a CPU in seconds
DEMO = {"image_size": 32, "epochs": 5, "batch_size": 16, "backbone_lr": 1e-3, "freeze_epochs": 0}
DEMO |= {"augment": "none", "normalise": "dataset", "precision": "fp32"}
# each is `FineTuneConfig()` with these changes
RECIPES = {"recommended": {}, "paper": PAPER, "linear": LINEAR, "demo": DEMO}

OPTIONS = {
    "recipe": RECIPES,
    "optimizer": ("AdamW", "Adam"),
    "schedule": ("cosine", "authors"),
    "augment": ("affine", "flip_ud", "none"),
    "select_by": ("AUC", "ACC"),
    "normalise": ("checkpoint", "dataset"),
    "subset_rule": ("stratified", "authors", "first"),
    "precision": ("auto", "fp32", "bf16"),
}
KEPT_NETWORKS = 8  # whose features a process keeps for further linear evaluations
RESUME_SECONDS = 60.0  # a run writes its resume file at most this often


class TrainingError(Exception):
    """Training could not go on; says where it stopped and what to do next."""


class BusyError(TrainingError):
    """Another process is writing this run."""


def _typed(name, value, default):
    """Return a number in the type of its default, so that 1, 1.0 and NumPy's 1 name one run.

    Raises:
        ValueError: another type, such as "1e-4" as text, or a number below 0.
    """
    kind = type(default)
    number = isinstance(value, (int, float, np.number)) and 0 <= value < math.inf
    if not number or value != kind(value):
        raise ValueError(f"{name} is {value!r}; give a number from 0 up, such as {default}.")
    return kind(value)


@dataclass(frozen=True)
class FineTuneConfig:
    """How a backbone is fine-tuned. `FineTuneConfig()` is the recipe that we recommend.

    The comment beside each default says why: literature, convention, or measured. None was tuned
    on the published weights.

    Attributes:
        recipe: one of RECIPES; the others come from `FineTuneConfig.named`.
        image_size: side of the square that the network sees, in pixels.
        epochs: passes over the labelled images.
        batch_size: images per step.
        lr, backbone_lr: peak learning rates of the head and of the backbone.
        weight_decay: coefficient; decoupled in AdamW, a part of the gradient (L2) in Adam.
        freeze_epochs: epochs in which only the head trains and BatchNorm keeps its statistics.
        warmup: share of the steps over which the rate rises linearly, in [0, 1].
        schedule: "cosine" to zero, or "authors", see `phase_of`.
        augment: see `augment_batch`.
        select_by: validation score that picks the best epoch.
        normalise: whose mean and std are used, the checkpoint's or the data set's.
        subset_rule: see `label_subset`.
        precision: "fp32", "bf16", or "auto" (bf16 where the device computes in it).
    """

    recipe: str = "recommended"
    image_size: int = 224  # convention: the authors' size, and that of the ImageNet weights
    epochs: int = 50  # literature: ~700 steps for 425 images; BiT takes 500 (Kolesnikov 2020)
    batch_size: int = 32  # literature: 2 to 32 generalise best (Masters and Luschi 2018)
    lr: float = 1e-3  # literature: Adam's default (Kingma and Ba 2015)
    backbone_lr: float = 1e-4  # literature: pre-trained layers move less (Howard and Ruder 2018)
    weight_decay: float = 1e-4  # convention: ResNet's (He et al. 2016); with AdamW next to none
    optimizer: str = "AdamW"  # literature: decay apart from the gradient (Loshchilov, Hutter 2019)
    freeze_epochs: int = 5  # literature: a random head would spoil features (Kumar et al. 2022)
    warmup: float = 0.1  # literature: Adam's first steps are too large (Ma and Yarats 2021)
    schedule: str = "cosine"  # literature: Loshchilov and Hutter 2017
    augment: str = "affine"  # literature: usual for CT (Chlap et al. 2021)
    select_by: str = "AUC"  # literature: finer than accuracy on few images (Ling et al. 2003)
    normalise: str = "checkpoint"  # convention: preprocessing belongs to weights (torchvision)
    subset_rule: str = "stratified"  # measured: class shares vary half as much on COVID-CT
    precision: str = "auto"  # literature: bf16 trains a ResNet50 as fp32 does (Kalamkar 2019)

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in OPTIONS:
                check_choice(value, OPTIONS[name], name)
            else:
                value = _typed(name, value, getattr(FineTuneConfig, name))
                object.__setattr__(self, name, value)
        if self.batch_size < 2 or 0 in (self.epochs, self.image_size, self.lr):
            raise ValueError(f"batch_size takes 2 or more, epochs, image_size and lr no 0: {self}.")

    @classmethod
    def named(cls, recipe, dataset="", **changes):
        """Return a recipe with `changes`; 0 epochs or pixels mean the recipe's own."""
        check_choice(recipe, RECIPES, "recipe")
        settings = {"recipe": recipe, **RECIPES[recipe]}
        if recipe == "paper" and dataset.startswith("organ"):
            settings |= {"augment": "none", "subset_rule": "first"}
        if dataset == "phantom":
            settings["image_size"] = 32  # what phantoms are drawn at
        for name, value in changes.items():
            if value or name not in ("epochs", "image_size"):
                settings[name] = value
        return cls(**settings)


def pick_device(device="auto"):
    """Return the torch.device called `device`; "auto" takes a GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(1, device=device)  # where it is missing, PyTorch's error says so
    return torch.device(device)


def pick_precision(config, device):
    """Return the precision that `config` means on `device`: "fp32" or "bf16"."""
    if config.precision != "auto":
        return config.precision
    # an older card, such as Colab's T4, only emulates bfloat16: slower than float32
    real = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if real else "fp32"


@contextlib.contextmanager
def _numerics(device, precision):
    """Compute in bfloat16 or in exact float32, by kernels that give the same bits again."""
    low = precision == "bf16"
    kernels = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=low)
    with kernels, torch.autocast(device.type, torch.bfloat16, enabled=low):
        yield


# One batch -------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """What happens to raw images before the network: expand, normalise, resize, in this order.

    The order and the `area` resize are those of the authors' notebooks (MONAI `Resize`).
    """

    mean: tuple  # three numbers, in units of [0, 1]
    std: tuple
    image_size: int  # pixels

    def __call__(self, images):
        """Turn (N, H, W) or (N, H, W, 3), 0..255, into float32 (N, 3, S, S)."""
        x = images.float().div(255)
        if x.ndim == 3:
            x = x.unsqueeze(3).expand(-1, -1, -1, 3)  # (N, H, W, 3)
        # by numbers: tensors would have to be copied to a GPU, and each step would wait for it
        channels = [(x[..., c] - self.mean[c]) / self.std[c] for c in range(3)]
        x = torch.stack(channels, 1)  # (N, 3, H, W)
        size = (self.image_size, self.image_size)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="area")
        return x.contiguous(memory_format=torch.channels_last)


def preprocessing_for(config, data, report):
    """Return the preprocessing with the checkpoint's or the data set's statistics.

    A network without statistics of its own, such as `random`, takes the data set's.
    """
    if config.normalise == "checkpoint" and report.mean:
        return Preprocessing(report.mean, report.std, config.image_size)
    return Preprocessing(data.mean, data.std, config.image_size)


def augment_batch(x, augment, draws):
    """Return a batch (N, 3, S, S) augmented.

    Args:
        augment: "flip_ud" flips upside down with p = 0.5; "affine" turns by up to 10 degrees,
            scales by up to 10 % and shifts by up to 10 % of the side; "none".
        draws: (N, 6) uniform random numbers in [0, 1): the flip, one that is not used, then
            angle, scale, and shift along x and y.
    """
    if augment == "flip_ud":
        flip = draws[:, 0].view(-1, 1, 1, 1) < 0.5
        return torch.where(flip, x.flip(2), x)
    if augment == "none":
        return x
    ranges = draws[:, 2:] * 2 - 1  # (N, 4) in [-1, 1)
    angle = ranges[:, 0] * math.radians(10)
    scale = 1 + ranges[:, 1] * 0.1
    shift = ranges[:, 2:] * 0.2  # the side is 2 long: a tenth of it
    cos = torch.cos(angle) * scale
    sin = torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1)
    grid = F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def add_head(model, n_classes, seed):
    """Return a copy of the backbone with a new `Linear(2048, n_classes)`, initialised by `seed`."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.manual_seed(seed)
        model.fc = nn.Linear(2048, n_classes)
    return model


# One epoch -------------------------------------------------------------------


def set_phase(model, config, epoch):
    """Freeze and unfreeze a ResNet for `epoch` (from 0); return the rates of head and backbone.

    Frozen, the recommended recipe trains the head alone, and BatchNorm keeps its statistics.

    The authors meant to train the head alone for 10 epochs, then the backbone at a tenth of the
    rate. But their callback acts on an optimizer that owns every parameter already, so BatchNorm
    trains from the start, epoch 10 has the full rate, and all later ones a fifth of it.
    """
    authors = config.schedule == "authors"
    frozen = epoch < config.freeze_epochs
    model.train(authors or not frozen)
    model.requires_grad_(not frozen)
    model.fc.requires_grad_(True)
    for module in model.modules():
        if authors and isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
    if authors and epoch > config.freeze_epochs:
        return config.lr / 5, config.backbone_lr / 5
    return config.lr, config.backbone_lr


def lr_factor(config, step, steps):
    """Return the factor of warm-up and schedule at `step` of `steps`, in [0, 1]."""
    if config.schedule == "authors":
        return 1.0
    rise = max(1, round(config.warmup * steps))
    if step < rise:
        return (step + 1) / rise
    passed = (step - rise) / max(1, steps - rise)
    return 0.5 * (1 + math.cos(math.pi * passed))


def make_optimizer(model, config):
    """Return the optimizer over two groups, backbone and head; each step sets their rates."""
    backbone = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    parameters = [{"params": backbone}, {"params": model.fc.parameters()}]
    build = getattr(torch.optim, config.optimizer)
    return build(parameters, weight_decay=config.weight_decay, fused=True)


def train_one_epoch(model, images, labels, optimizer, config, preprocessing, *, epoch, seed):
    """Train once over the images (N, H, W) and labels (N,), which are on the model's device.

    Returns:
        The loss of each step, and the indices of its images.
    """
    device = labels.device
    lr, backbone_lr = set_phase(model, config, epoch)

    # order and augmentation follow from seed and epoch: no random state has to be saved
    generator = torch.Generator().manual_seed(int(_sha256(repr((seed, epoch)))[:14], 16))
    order = torch.randperm(len(labels), generator=generator).to(device)
    draws = torch.rand(len(labels), 6, generator=generator).to(device)
    batches = list(order.split(config.batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:  # BatchNorm can't normalise by one image
        batches[-2:] = [torch.cat(batches[-2:])]

    losses = torch.zeros(len(batches), device=device)
    for step, index in enumerate(batches):
        factor = lr_factor(config, epoch * len(batches) + step, config.epochs * len(batches))
        optimizer.param_groups[0]["lr"] = backbone_lr * factor
        optimizer.param_groups[1]["lr"] = lr * factor
        x = preprocessing(images[index])  # (B, 3, S, S)
        x = augment_batch(x, config.augment, draws[index])
        optimizer.zero_grad()
        with _numerics(device, pick_precision(config, device)):
            loss = F.cross_entropy(model(x), labels[index])
            loss.backward()
        optimizer.step()
        losses[step] = loss.detach()  # stays on the device, so the next step need not wait
    return losses.cpu(), batches


@torch.inference_mode()
def predict(model, images, preprocessing, precision="fp32"):
    """Run the model in evaluation mode over raw images (N, H, W) or (N, H, W, 3), in large batches.

    Returns:
        float32 on the CPU: logits (N, C), or features (N, 2048) of a backbone without a head.
    """
    device = next(model.parameters()).device
    model.eval()
    rows = []
    with _numerics(device, precision):
        for batch in torch.as_tensor(images).split(256):
            x = preprocessing(batch.to(device))
            rows.append(model(x).float())
    return torch.cat(rows).cpu()


def evaluate(model, split, preprocessing, precision="fp32"):
    """Return the scores (see `score`) with the mean loss, and the probabilities (N, C).

    Raises:
        TrainingError: an output of the network is not finite, so it has no score.
    """
    logits = predict(model, split.images, preprocessing, precision)
    loss = F.cross_entropy(logits, torch.as_tensor(split.labels)).item()
    if not math.isfinite(loss):
        raise TrainingError("The network's output is not finite: it diverged. Lower lr.")
    probabilities = logits.softmax(1).numpy()
    return {"loss": loss, **score(split.labels, probabilities)}, probabilities


# The run folder --------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Run:
    """One finished fine-tuning, as it lies in its folder.

    Attributes:
        config: everything that decides the result (config.json).
        metrics: test scores, best epoch, time (metrics.json).
        history: one row per epoch: loss, rates, validation scores, seconds.
        predictions: test ids, patients, labels (N,) and scores (N, C); `val_ids`, … of validation.
    """

    folder: Path
    config: dict
    metrics: dict
    history: pd.DataFrame
    predictions: dict

    @property
    def stamp(self):
        """DEMO, SHORT, or nothing for a real, full run."""
        return self.config["stamp"]

    @property
    def name(self):
        """The method as tables and figures show it, such as "SparK (planted)"."""
        return self.config["name"]


def load_run(folder):
    """Read a finished run from its folder; TrainingError if it is not finished, or of v0.1."""
    folder = Path(folder)
    if not (folder / "metrics.json").exists():
        raise TrainingError(f"{folder} has no metrics.json: the run is not finished.")
    config = json.loads((folder / "config.json").read_text())
    if "version" not in config:
        raise TrainingError(f"{folder} is of version 0.1, whose files differ: run it again.")
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = dict(np.load(folder / "predictions.npz", allow_pickle=False))
    return Run(folder, config, metrics, pd.read_csv(folder / "history.csv"), predictions)


def plan_run(report, data, config, *, label_fraction=1.0, labels_per_class=None, seed=0):
    """Return all that decides a run's result, ready for JSON, and the images that it trains on.

    Args: as of `fine_tune`.

    Returns:
        dict of settings; indices (n,) of the labelled subset of data.train.
    """
    recipe = FineTuneConfig.named(config.recipe)
    short = config.epochs < recipe.epochs or config.image_size < recipe.image_size
    kind = "SHORT" if short else ""
    if report.demo or data.demo or config.recipe == "demo":
        kind = "DEMO"
    amount = {"label_fraction": _typed("label_fraction", label_fraction, 1.0)}
    amount |= {"labels_per_class": labels_per_class, "seed": _typed("seed", seed, 0)}
    subset = label_subset(data.train, rule=config.subset_rule, **amount)
    settings = {"version": "0.2", "stamp": kind, **amount, **vars(config)}
    for name in ("method", "name", "stand_in", "weights"):
        settings[name] = getattr(report, name)
    settings |= vars(preprocessing_for(config, data, report))
    settings |= {"dataset": data.name, "class_names": data.class_names, "n_train": len(subset)}
    settings |= {
        "weights_fingerprint": report.fingerprint,
        "weights_redrawn": "random" in (report.method, report.stand_in),
        "dataset_fingerprint": data.fingerprint,
        "test_fingerprint": data.test.fingerprint,
        "subset_fingerprint": _sha256("\n".join(data.train.ids[subset])),
    }
    return settings, subset


def run_name(settings):
    """Return the name of a run's folder: what a reader looks for, and 8 hex digits of all."""
    amount = f"f{settings['label_fraction']:g}"
    if settings["labels_per_class"]:
        amount = f"k{settings['labels_per_class']}"
    digest = _sha256(json.dumps(settings, sort_keys=True))[:8]
    name = "{dataset}_{method}_{recipe}_{0}_s{seed}_{1}".format(amount, digest, **settings)
    return re.sub(r"[^\w.-]", "-", name)


@contextlib.contextmanager
def _sole_writer(folder, config):
    """Hold the folder's lock; say what to do if it is taken, or memory or disk are full."""
    try:
        with _locked(folder / "run", timeout=0):
            yield
    except Timeout:
        raise BusyError(f"Another process is writing {folder}. Ask again later.") from None
    except (OSError, MemoryError, RuntimeError) as error:
        raise TrainingError(
            f"{folder.name} stopped ({error}). What was saved is intact. If memory is short, lower "
            f"batch_size ({config.batch_size}) or image_size ({config.image_size}); if the disk is "
            "full, make room. Then run again."
        ) from error


# The whole run ---------------------------------------------------------------


def print_epoch(history):
    """Print the last row of a history."""
    row = history.iloc[-1].astype(float)
    scores = f"loss {row.val_loss:.4f}, AUC {row.val_AUC:.4f}, ACC {row.val_ACC:.4f}"
    print(f"epoch {row.epoch:.0f}: validation {scores}", flush=True)


def _best_epoch(history, select_by):
    """Return the first epoch that is best on validation.

    The loss breaks ties of the AUC, and decides where that is undefined.
    """
    keys = [(row["val_AUC"] or 0, -row["val_loss"]) for row in history]
    if select_by == "ACC":
        keys = [row["val_ACC"] for row in history]
    return keys.index(max(keys))


def _train(net, train, val, config, preprocessing, seed, resume, on_epoch):
    """Fine-tune `net`, from the resume file if there is one; load the best epoch's weights into it.

    Returns:
        The history, a row per epoch.
    """
    device = next(net.parameters()).device
    precision = pick_precision(config, device)
    images = torch.as_tensor(train.images).to(device)
    labels = torch.as_tensor(train.labels).to(device)
    optimizer = make_optimizer(net, config)
    history, best = [], {}
    if resume.exists():
        state = torch.load(resume, map_location=device, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        history, best = state["history"], state["best"]
    saved = time.monotonic()
    for epoch in range(len(history), config.epochs):
        losses, batches = train_one_epoch(
            net, images, labels, optimizer, config, preprocessing, epoch=epoch, seed=seed
        )
        for step in (~losses.isfinite()).nonzero().flatten():
            names = _few(train.ids[batches[step].cpu()])
            raise TrainingError(f"Epoch {epoch}: loss not finite on {names}. Look, or lower lr.")
        scores, _ = evaluate(net, val, preprocessing, precision)
        row = {f"val_{name}": value for name, value in scores.items()}
        history.append({"epoch": epoch, "train_loss": losses.mean().item(), **row})
        if _best_epoch(history, config.select_by) == epoch:
            best = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        if time.monotonic() - saved > RESUME_SECONDS:
            state = {"history": history, "best": best, "net": net.state_dict()}
            state["optimizer"] = optimizer.state_dict()
            with _atomic(resume) as file:
                torch.save(state, file)
            saved = time.monotonic()
        on_epoch(pd.DataFrame(history))
    net.load_state_dict(best)
    return history


_features = {}  # of the networks that were evaluated last in this process


def _with_features(net, data, preprocessing, *key):
    """Return the data with the backbone's features (N, 2048) for images, computed once a process.

    Always of all images in the same batches, so that kept features have the bits of new ones.
    """
    key = (*key, data.fingerprint, preprocessing)
    parts = _features.pop(key, {})
    if not parts:
        head = net.fc
        net.fc = nn.Identity()
        for name, split in data.parts.items():
            features = predict(net, split.images, preprocessing)
            parts[name] = replace(split, images=features.numpy())
        net.fc = head
    _features[key] = parts  # the newest last
    if len(_features) > KEPT_NETWORKS:
        del _features[next(iter(_features))]
    return replace(data, **parts)


def _fit_linear(head, train, val, config, on_epoch):
    """Put a logistic regression on features (N, 2048) into `head`; validation picks its strength.

    The protocol is that of Kornblith et al. 2019 (Do Better ImageNet Models Transfer Better?):
    features in evaluation mode, L-BFGS, the regularisation picked on validation data.

    Returns:
        The history, a row per inverse strength C of the L2 penalty.
    """
    from sklearn.linear_model import LogisticRegression

    mean = train.images.mean(0, dtype=float)
    std = train.images.std(0, dtype=float).clip(1e-6)
    x = (train.images - mean) / std
    history, fits = [], []
    for epoch, strength in enumerate(np.logspace(-5, 1, 7)):
        fit = LogisticRegression(C=strength, max_iter=2000).fit(x, train.labels)
        weight, bias = fit.coef_, fit.intercept_
        if len(weight) == 1:  # two classes: the log-odds of the second
            weight = np.concatenate([0 * weight, weight])
            bias = np.concatenate([0 * bias, bias])
        weight = weight / std  # undo the scaling: (C, 2048)
        bias = bias - weight @ mean
        fits.append({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        head.load_state_dict(fits[-1])
        scores, _ = evaluate(head, val, nn.Identity())
        row = {f"val_{name}": value for name, value in scores.items()}
        history.append({"epoch": epoch, "C": strength, **row})
    on_epoch(pd.DataFrame(history))
    head.load_state_dict(fits[_best_epoch(history, config.select_by)])
    return history


def fine_tune(
    model,
    report,
    data,
    config,
    *,
    study="study",
    runs_dir="runs",
    device="auto",
    on_epoch=print_epoch,
    keep_best=True,
    **amount,
):
    """Fine-tune a backbone on a labelled subset, test it once, and write the run folder.

    A finished run with the same settings is loaded instead; an interrupted one is resumed.

    Args:
        model, report: from `load_backbone`; the model is copied, not changed.
        data: from `load_data`.
        config: the recipe, such as `FineTuneConfig()`.
        study: name of the folder under `runs_dir` that keeps runs to be compared.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        on_epoch: called with the history so far (DataFrame) after each epoch.
        keep_best: keep the best epoch's weights as best.safetensors.
        amount: label_fraction in (0, 1], or labels_per_class instead; and seed, which decides
            subset, head, order and augmentation, alike for every method.

    Returns:
        The `Run`.

    Raises:
        ValueError: settings that cannot work; nothing has been written.
        TrainingError: the loss was not finite, memory or disk is full, another process writes.
    """
    where = pick_device(device)
    checks = check_splits(data)
    checks.raise_for_errors()
    if _fingerprint(model.state_dict()) != report.fingerprint:
        raise ValueError("The report is of another model. Load both with `load_backbone`.")
    settings, subset = plan_run(report, data, config, **amount)
    preprocessing = preprocessing_for(config, data, report)
    folder = Path(runs_dir).expanduser() / study / run_name(settings)

    with _sole_writer(folder, config):
        if (folder / "metrics.json").exists():
            return load_run(folder)
        for leftover in folder.glob(".*.tmp"):  # of a process killed while writing
            leftover.unlink()
        began = time.perf_counter()
        settings |= {"environment": f"torch {torch.__version__} on {where}"}
        settings |= {"used_precision": pick_precision(config, where), "warnings": checks.warnings}
        _write_json(folder / "config.json", settings)

        net = add_head(model, len(data.class_names), settings["seed"])
        net = net.to(where, memory_format=torch.channels_last)
        if config.recipe == "linear":
            inputs = _with_features(net, data, preprocessing, where, report.fingerprint)
            tested, prepare = net.fc, nn.Identity()
            history = _fit_linear(tested, inputs.train.take(subset), inputs.val, config, on_epoch)
        else:
            inputs, tested, prepare = data, net, preprocessing
            train, last = data.train.take(subset), folder / "last.pt"
            history = _train(
                net, train, data.val, config, prepare, settings["seed"], last, on_epoch
            )

        metrics, test_scores = evaluate(tested, inputs.test, prepare)
        metrics["val"], val_scores = evaluate(tested, inputs.val, prepare)
        metrics["best_epoch"] = _best_epoch(history, config.select_by)
        predictions = {"scores": test_scores, "val_scores": val_scores}
        for column in ("ids", "patients", "labels"):
            predictions[column] = getattr(data.test, column)
            predictions[f"val_{column}"] = getattr(data.val, column)
        with _atomic(folder / "predictions.npz") as file:
            np.savez_compressed(file, **predictions)
        pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
        if keep_best:
            _save_tensors(net.state_dict(), folder / "best.safetensors")
        metrics["seconds"] = time.perf_counter() - began
        _write_json(folder / "metrics.json", metrics)  # last: it alone means done
        (folder / "last.pt").unlink(missing_ok=True)
    return load_run(folder)


# =============================================================================
# Evaluation
# =============================================================================

SCORES = ("AUC", "ACC", "balanced ACC", "F1", "F1 paper", "Brier")
ECE_BINS = 15  # as Guo et al. 2017
TAIL = 0.025  # on either side of an interval, so it is one of 95 %
FEW_UNITS = 30  # below it a share is not reported by US health statistics (Parker et al. 2017)


def score(labels, scores):
    """Score probabilities against labels; equal to scikit-learn where that has the score.

    Args:
        labels: (N,) class indices.
        scores: (N, C) probabilities; the largest one is the answer.

    Returns:
        A value in [0, 1] for each of SCORES and for ECE, or None where it is undefined.
        AUC: area under the ROC curve; macro mean of one-vs-rest with more than two classes.
        ACC: share of right answers. balanced ACC: mean recall over the classes.
        F1: mean over the classes that occur. "F1 paper": as in the authors' notebooks, of class 1
        with two classes (NonCOVID in COVID-CT), micro (which is ACC) with more.
        Brier: mean squared distance from the truth, halved (Brier 1950; 0 is best).
        ECE: expected calibration error (Guo et al. 2017; 0 is best): the largest probability
        against the share of right answers in 15 bins of equal width, weighted by their images.
        The fewer the images, the more of it is chance, so methods are not compared by it.
    """
    values = {}
    for metric in SCORES:
        value = _influence(labels, scores, metric)[0]
        values[metric] = None if np.isnan(value) else float(value)
    confidence = scores.max(1)
    bins = np.ceil(confidence * ECE_BINS).astype(int)
    gaps = np.bincount(bins, (scores.argmax(1) == labels) - confidence)
    values["ECE"] = float(abs(gaps).sum() / len(labels))
    return values


def score_interval(labels, scores, metric="AUC", *, patients=""):
    """Return the 95 % interval (low, high) of one trained model's score over new test images.

    It lies in [0, 1], and knows nothing of the spread between seeds. The images of one of the
    `patients` (N,) count as one unit; "" is an unknown one. None where the score or its variance
    is undefined: a class with one test image has none.
    """
    value, moves, size = _measure(labels, scores, patients, metric)
    if np.isnan(value) or size < 2:
        return None
    return _share_interval(value, moves[None], size)


@np.errstate(invalid="ignore")  # 0 / 0 is NaN: a score that needs a class without images
def _influence(labels, scores, metric):
    """Return a score T and by how much each image moves it, (N,); NaN where T is undefined.

    Every score but the AUC is a mean of ratios T = A / B of sums over images, and image i moves
    such a ratio by (a_i - T * b_i) / B (infinitesimal jackknife, Jaeckel 1972).
    """
    scores = scores.astype(float)
    classes = np.arange(scores.shape[1])
    if len(classes) == 2 and metric in ("AUC", "F1 paper"):
        classes = classes[1:]  # of two classes, these speak of the second alone
    truth = labels[:, None] == classes  # (N, C)
    if metric == "AUC":
        return _auc(truth, scores[:, classes])

    answers = scores.argmax(1)[:, None] == classes
    hits = truth & answers
    a, b = 2 * hits, truth.astype(int) + answers  # F1 of each class
    if metric == "F1":
        present = b.any(0)
        a, b = a[:, present], b[:, present]
    elif metric == "balanced ACC":
        a, b = hits, truth
    elif len(classes) > 1:
        a = hits.any(1)  # ACC, and F1 over all classes at once, which is the same
        if metric == "Brier":
            a = ((scores - truth) ** 2).sum(1) / 2
        a = a[:, None]
        b = np.ones_like(a)
    ratios = a.sum(0) / b.sum(0)
    moves = (a - ratios * b) / b.sum(0)
    return ratios.mean(), moves.mean(1)


def _auc(truth, scores):
    """Return the mean area under K ROC curves and by how much each image moves it, (N,).

    An area is the mean over positives of the share of negatives that they outrank, a tie counting
    half; these shares, and those of the negatives, are DeLong's (1988) placements.

    Args:
        truth, scores: (N, K), whether an image is positive, and how much so it looks.
    """
    from scipy.stats import rankdata

    positives = truth.sum(0)
    negatives = len(truth) - positives
    ranks = rankdata(scores, axis=0)  # ties share their mean rank
    # less the rank among its own kind, a rank counts the images of the other kind below
    above = ranks - rankdata(np.where(truth, scores, np.inf), axis=0)
    below = ranks - rankdata(np.where(truth, np.inf, scores), axis=0)
    placements = np.where(truth, above / negatives, 1 - below / positives)
    areas = (placements * truth).sum(0) / positives
    moves = (placements - areas) / np.where(truth, positives, negatives)
    return areas.mean(), moves.mean(1)


def _measure(labels, scores, patients, metric):
    """Return a score, by how much each test unit moves it (U,), and how many units count.

    A unit is a patient where known, else an image. A mean over images knows as much as all
    units, any other score as those of the rarest class.
    """
    check_choice(metric, SCORES, "metric")
    units = pd.Series(patients, range(len(labels)), dtype=object)
    units = units.where(units != "", units.index.to_numpy())  # pandas 2.2 takes no Index
    value, moves = _influence(labels, scores, metric)
    moves = np.bincount(units.factorize()[0], moves)
    size = units.groupby(labels).nunique().min()
    if metric in ("ACC", "Brier"):
        size = len(moves)
    return value, moves, size


def _spread(values, moves, size):
    """Return the standard error of a mean over n runs, and the margins around it by their tail.

    The variance has two parts: of the seeds, sd^2 / n, and what the runs share because they met
    the same test images, their mean covariance (Obuchowski and Rockette 1995). The quantile is
    the mean of Student's for both, weighted by variance (Cochran and Cox 1957).

    Args:
        values: (n,) scores or differences of scores; of a single run, one number will do.
        moves: (n, U) by how much each patient or image moves them (patients: Obuchowski 1997).
        size: how many of the units count, see `_measure`.
    """
    from scipy.special import stdtrit

    n, n_units = moves.shape
    covariance = moves @ moves.T * n_units / (n_units - 1)  # (n, n)
    alone = covariance.trace()
    parts, degrees = [alone], [size - 1]  # a single run knows no other seeds
    if n > 1:
        shared = (covariance.sum() - alone) / (n * (n - 1))
        parts = [values.var(ddof=1) / n, max(0.0, shared)]
        degrees = [n - 1, size - 1]
    error = np.sqrt(sum(parts))

    def margin(tail):
        return -np.dot(parts, stdtrit(degrees, tail)) / error  # the mean quantile times the error

    return error, margin


def _share_interval(values, moves, size):
    """Return Clopper and Pearson's interval of a mean score in [0, 1].

    It is that of a share of n units with the same error (Korn and Graubard 1998). With less than
    FEW_UNITS that count an error is easily too small, so n is at most the number of all units.
    Where nothing varies, as at exactly 1, n is the number of units that count.
    """
    from scipy.special import betaincinv, ndtri

    value = values.mean()
    error, margin = _spread(values, moves, size)
    n, low, high = size, 0.0, 1.0
    if error > 0:
        n = value * (1 - value) * (ndtri(TAIL) / margin(TAIL)) ** 2
        if size < FEW_UNITS:
            n = min(n, moves.shape[1])
    if value > 0:
        low = betaincinv(value * n, (1 - value) * n + 1, TAIL)
    if value < 1:
        high = betaincinv(value * n + 1, (1 - value) * n, 1 - TAIL)
    return float(low), float(high)


def _difference_interval(values, moves, size):
    """Return the interval of a mean difference of scores, within [-1, 1], and its p value."""
    from scipy.optimize import brentq

    mean = values.mean()
    error, margin = _spread(values, moves, size)
    if error == 0:
        return np.nan, np.nan, 1.0 if mean == 0 else np.nan
    p = 1e-12  # the smallest one that is told
    if margin(p / 2) > abs(mean):
        p = brentq(lambda tails: margin(tails / 2) - abs(mean), p, 1)
    width = margin(TAIL)
    return max(mean - width, -1.0), min(mean + width, 1.0), p


# =============================================================================
# Results
# =============================================================================

MIN_SEEDS = 3  # for an interval over new seeds
MEANS = ("values", "n", "mean", "sd", "low", "high")
GAINS = ("differences", "n_pairs", "difference", "difference_sd")
GAINS += ("difference_low", "difference_high", "p")
# What may differ between the methods of a comparison, or the runs; other settings must agree
OF_A_METHOD = ("lr", "backbone_lr", "weights_fingerprint", "mean", "std")
MAY_DIFFER = ("method", "name", "stand_in", "weights", "weights_redrawn", "seed", "labels")
MAY_DIFFER += ("label_fraction", "labels_per_class", "n_train", "subset_fingerprint")
MAY_DIFFER += ("environment", "warnings", "folder", *OF_A_METHOD)


def load_runs(*folders):
    """Read all finished runs below the folders of one or several studies, a row a run.

    Returns:
        What was asked for, `labels` (their amount in words), the test scores (None where
        undefined), those on validation images (`val`), and the folder.

    Raises:
        FileNotFoundError: no finished run lies there.
        ValueError: one is damaged, or of version 0.1.
    """
    paths = {path.resolve() for folder in folders for path in Path(folder).rglob("metrics.json")}
    rows = []
    for path in sorted(paths):
        try:
            run = load_run(path.parent)
        except Exception as error:  # damaged files raise anything
            raise ValueError(
                f"{path.parent.name} can't be read ({error}): delete that folder and run it again."
            ) from error
        row = {**run.metrics, **run.config, "folder": run.folder, "run": run}
        row["labels"] = f"{100 * row['label_fraction']:g} %"
        if row["labels_per_class"]:
            row["labels"] = f"{row['labels_per_class']} per class"
        rows.append(row)
    if not rows:
        places = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(f"No finished run in {places}: run a study (notebook 05).")
    return pd.DataFrame(rows)


def _check_alike(settings, by):
    """Raise ValueError if the runs cannot stand in one comparison, naming what differs."""
    if settings.stamp.nunique() > 1:
        raise ValueError("These runs mix DEMO, SHORT or real ones: keep each in its own study.")
    settings.loc[settings.weights_redrawn, "weights_fingerprint"] = "of the seed"
    settings = settings.astype(str)
    cell = ["dataset", "labels", "seed"]
    for keys, columns in (
        (["dataset"], settings.columns.difference(MAY_DIFFER)),
        (["dataset", "method"], OF_A_METHOD),
        (cell, ["subset_fingerprint"]),
        ([*cell, "method"], ["folder"]),
    ):
        for key, group in settings.groupby([*keys, *by]):
            for column in columns:
                values = group[column].unique()
                if len(values) > 1:
                    raise ValueError(
                        f"Runs of {', '.join(key)} differ in {column}: {_few(values)}. Compare "
                        f"like with like: choose among them, or keep them apart, by=[{column!r}]."
                    )


def _subtract(runs, rule, keys):
    """Subtract the runs of a rule from all others with the same keys."""
    partners = runs.query(rule)
    pairs = runs.drop(partners.index).merge(partners, on=keys, suffixes=("", "_partner"))
    if pairs.empty:
        raise ValueError(f"No two runs have the same {', '.join(keys)}, one of them with {rule}.")
    for column in ("value", "moves"):
        pairs[column] -= pairs[f"{column}_partner"]
    pairs["weights_fingerprint"] += pairs.weights_fingerprint_partner
    return pairs[runs.columns]


def _summarise(runs, names, interval):
    """Return values, number, mean, sd and interval over what was drawn; NaN where undefined."""
    runs = runs.drop_duplicates(["draw", "weights_fingerprint", "subset_fingerprint"])
    values = runs.value
    size = runs["size"].min()
    mean = values.mean(skipna=False)
    ends = [np.nan] * 3
    if len(runs) >= MIN_SEEDS and size > 1 and not np.isnan(mean):
        ends = interval(values, np.stack(runs.moves), size)
    numbers = [tuple(values), len(runs), mean, values.std(), *ends]
    return pd.Series(numbers[: len(names)], names)


def compare_methods(runs, metric="AUC", *, control="random", loss=False, per="image", by=()):
    """Hold every method against a control, over new seeds and new test images of the same kind.

    Differences are taken seed by seed: the same seed means the same labelled images and the same
    test images, so what varies alike cancels. Nothing is said of another pool of training images
    or of pre-training anew. A linear evaluation of one network on the same labelled images is the
    same for every seed and counts once.

    Args:
        runs: from `load_runs`; unfinished runs are left out.
        control: the method to subtract.
        loss: compare what is lost from 100 % of the labels to each smaller amount, not the score.
        per: "image", or "patient": probabilities averaged over each known patient's images.
        by: settings to keep apart that would else have to agree, such as ["recipe"].

    Returns:
        A row per dataset, `by`, amount of labels and method: n_train labelled images, n_test
        patients (images where unknown); n seeds, their values, mean, sd, [low, high]; n_pairs,
        difference to the control with its sd, interval and p, and p_holm over all differences of
        this table (Holm 1979). NaN is undefined; an interval takes three seeds and two units of
        each class (see `_measure`).
        `.attrs` has what was asked for, `describe_comparison` puts the table into words.

    Raises:
        ValueError: runs that must not be mixed, or an unknown metric, control or setting.
    """
    check_choice(per, ("image", "patient"), "per")
    done = runs.reset_index(drop=True)
    _check_alike(done.drop(columns=["run", *done.run[0].metrics]), by)
    results = []
    for run in done.run:
        labels, scores, patients = itemgetter("labels", "scores", "patients")(run.predictions)
        if per == "patient":  # the mean over each known patient's images of one label
            mean = pd.DataFrame(scores).groupby([patients, labels]).mean().drop("", errors="ignore")
            if mean.empty:
                raise ValueError("No patient is known: compare per image.")
            patients, labels = np.array(mean.index.to_list(), dtype=object).T
            scores = mean.to_numpy()
        results.append(_measure(labels.astype(int), scores, patients, metric))
    done[["value", "moves", "size"]] = pd.DataFrame(results)
    done["n_test"] = done.moves.map(len)
    done["draw"] = done.seed.where(done.recipe != "linear")
    interval = _share_interval
    if loss:
        interval = _difference_interval
        done = _subtract(done, "labels == '100 %'", ["dataset", *by, "method", "seed"])
        if metric != "Brier":  # an error: more of it is a loss
            done[["value", "moves"]] *= -1
    cell = ["dataset", *by, "labels"]
    keys = [*cell, "method"]
    groups = done.groupby(keys, dropna=False)
    pairs = _subtract(done, f"method == {control!r}", [*cell, "seed"]).groupby(keys, dropna=False)
    table = groups[["name", "n_train", "n_test"]].first()
    table = table.join(groups.apply(_summarise, MEANS, interval))
    table = table.join(pairs.apply(_summarise, GAINS, _difference_interval))
    table = table.reset_index().sort_values(["dataset", *by, "n_train"], ignore_index=True)
    p = table.p.dropna().sort_values()
    table["p_holm"] = (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1)
    table.attrs = {"metric": metric, "control": control, "loss": loss, "per": per, "by": by}
    table.attrs |= {"stamp": done.stamp[0]}
    return table


def describe_comparison(table):
    """Say in plain words what a table of `compare_methods` shows, and what it does not show."""
    facts = table.attrs
    control = facts["control"]
    subject = f"test {facts['metric']}"
    if facts["loss"]:
        subject = f"loss of {subject} from 100 % of the labels to fewer"
    lines = [f"{facts['stamp']} {subject}, method minus {control}:".lstrip()]
    others = table.query("method != @control")
    for _, row in others.iterrows():
        where = ", ".join(row[["dataset", *facts["by"], "labels"]].astype(str))
        where = where.replace(" %", " % of the labels")
        gain = f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
        answer = f"no difference from {control} shown"
        if np.isnan(row.difference_low):
            gain = f"{row.difference:+.3f}"
            answer = f"no interval, for want of {MIN_SEEDS} seeds, images or unequal scores"
        elif row.p_holm < 0.05:
            answer = f"higher than {control}" if row.difference > 0 else f"lower than {control}"
        lines.append(f"- {where}: {row['name']} {answer}: {gain}")
    lines.append(
        f"Brackets: 95 % intervals for new seeds and new test images, each by itself. Higher or "
        f"lower: p < 0.05 after Holm's correction for {others['p'].count()} comparisons. What is "
        "not shown may still be there, as large as its interval allows. Of Brier, less is better."
    )
    if facts["stamp"] == "DEMO":
        lines.append(f"A demo's numbers tell nothing about {', '.join(METHODS)}.")
    return "\n".join(lines)


# =============================================================================
# Study
# =============================================================================

# What a study sets beside the fields of FineTuneConfig: for loading, for the labels, for the run
LOADING = {"method": "random", "weights": "stand-in", "dataset": "phantom", "recipe": "recommended"}
LOADING |= {"data_dir": "data", "checkpoints_dir": "checkpoints"}
LABELS = {"label_fraction": 1.0, "labels_per_class": None, "seed": 0}
RUN = {"study": "study", "runs_dir": "runs", "device": "auto", "keep_best": False}
NETWORK = itemgetter("seed", "method")  # cells with the same ones share a network
BUSY_SECONDS = 2.0  # between two looks at a run that another process is writing
_one_at_a_time = threading.Lock()  # two runs at once in a process would share its random state


@functools.lru_cache(maxsize=2)  # neighbouring cells share data and network
def _load_once(load, moment, **options):
    """Call `load` with the options; `moment` tells a study from one on older files."""
    return load(**options)


def _study_cells(grid, fixed):
    """Return a dictionary a run: its settings, whether it is done, and in how many seconds.

    Raises:
        ValueError: a setting of the wrong type, or data or labels that are not to be had.
    """
    defaults = LOADING | LABELS | RUN
    for name, values in grid.items():
        if not isinstance(values, (list, tuple, range)):
            raise ValueError(f"{name} is {values!r}; a grid takes a list: [{values!r}].")
    cells, moment = [], time.time_ns()
    for values in itertools.product(*grid.values()):
        cell = defaults | dict(**fixed, **dict(zip(grid, values, strict=True)))
        changes = {name: cell[name] for name in cell if name not in defaults}  # of the recipe
        check_choice(cell["method"], (*CHECKPOINTS, *CONTROLS), "method")
        check_choice(cell["weights"], SOURCES, "weights")
        for name in ("label_fraction", "seed"):
            cell[name] = _typed(name, cell[name], LABELS[name])
        config = FineTuneConfig.named(cell["recipe"], cell["dataset"], **changes)
        cell |= {"config": config, "status": "to do", "seconds": math.nan, "error": ""}
        cell["data"] = {"image_size": config.image_size, "moment": moment}
        cell["data"] |= {name: cell[name] for name in ("dataset", "data_dir")}
        cell["backbone"] = {"folder": cell["checkpoints_dir"], "moment": moment}
        cell["backbone"] |= {name: cell[name] for name in ("method", "weights", "seed")}
        cells.append(cell)
    cells.sort(key=NETWORK)
    for cell in cells:
        labels = {name: cell[name] for name in LABELS}
        data = _load_once(load_data, **cell["data"])
        label_subset(data.train, **labels, rule=cell["config"].subset_rule)
        study = Path(cell["runs_dir"], cell["study"]).expanduser()
        if study.exists():
            _, report = _load_once(load_backbone, **cell["backbone"])
            settings, _ = plan_run(report, data, cell["config"], **labels)
            metrics = study / run_name(settings) / "metrics.json"
            if metrics.exists():
                cell["status"] = "done"
                cell["seconds"] = json.loads(metrics.read_text())["seconds"]
    return cells


def _study_table(cells, grid):
    """Return a row a cell, and in `attrs["summary"]` how many are left."""
    table = pd.DataFrame(cells, columns=[*grid, "status", "seconds", "error"])
    left = int((table["status"] != "done").sum())
    summary = f"{len(table)} runs: {len(table) - left} done, {left} left"
    minutes = table["seconds"].mean() * left / 60
    if minutes > 0:  # nan while none is done
        summary += f", about {minutes:.1f} minutes one after another"
    table.attrs["summary"] = summary
    return table


def plan_study(grid, **fixed):
    """Say what `run_study` with these arguments would do; no run is written.

    Returns:
        A table, a row a run: the grid's settings, status ("done" or "to do") and, if done, its
        seconds. `attrs["summary"]` counts them, with the time left at the mean rate.

    Raises:
        ValueError: a setting, method or data set that is not known, or of the wrong type.
    """
    cells = _study_cells(grid, fixed)
    return _study_table(cells, grid)


def _run_cells(cells, here, checkpoints):
    """Run cells in this process; return what went wrong with each, "" for nothing."""
    os.chdir(here)  # a worker may have started elsewhere
    CHECKPOINTS.update(checkpoints)  # with the user's own
    waiting = list(cells)
    for cell in waiting:
        options = {name: cell[name] for name in (*LABELS, *RUN)}
        try:
            with _one_at_a_time:
                data = _load_once(load_data, **cell["data"])
                backbone = _load_once(load_backbone, **cell["backbone"])
                fine_tune(*backbone, data, cell["config"], on_epoch=len, **options)
        except BusyError:  # another process is at it: look again when the others are done
            waiting.append(cell)
            time.sleep(BUSY_SECONDS)
        except Exception as error:  # listed; it stops nothing
            cell["error"] = f"{type(error).__name__}: {error}"
    return [cell["error"] for cell in cells]


def _work_off(jobs, pool):
    """Run lists of cells; yield each with a list of its errors, or with why its worker died."""
    options = (os.getcwd(), dict(CHECKPOINTS))
    futures = {}
    for job in jobs:
        if pool is None:
            yield job, _run_cells(job, *options)
        else:
            futures[pool.submit(_run_cells, job, *options)] = job
    for future in as_completed(futures):
        yield futures[future], future.exception() or future.result()


def run_study(grid, *, executor=None, workers=0, **fixed):
    """Run every combination of a grid of settings that isn't done yet.

    Whole seeds come first: half a study is one of fewer seeds. Interrupted runs are resumed; what
    fails is listed and stops nothing. A worker takes the cells of a seed and a method at a time,
    so that the features of a network are computed once.

    Args:
        grid: setting -> values, such as {"method": METHODS, "seed": [0, 1, 2]}: names in LOADING,
            LABELS and RUN, and fields of FineTuneConfig.
        executor: of processes that see the same folders, such as a Dask client's
            `get_executor(pure=False)` with one thread a worker.
        workers: so many local processes instead; 0 or 1: this one. All use the GPU that
            CUDA_VISIBLE_DEVICES names; with several GPUs, start a study on each.
        fixed: settings that all runs share.

    Returns:
        The table of `plan_study`, with the status as it is now and the error of what failed.
    """
    from joblib.externals.loky import get_reusable_executor
    from tqdm.auto import tqdm

    cells = _study_cells(grid, fixed)
    print(_study_table(cells, grid).attrs["summary"])
    left = [cell for cell in cells if cell["status"] != "done"]
    jobs = [list(job) for _, job in itertools.groupby(left, NETWORK)]
    alone = []
    pool = executor
    try:
        while jobs or alone:
            batch = jobs or [alone.pop()]
            if executor is None and workers > 1:
                pool = get_reusable_executor(workers)
            killed = []
            for job, errors in tqdm(_work_off(batch, pool), total=len(batch)):
                if isinstance(errors, Exception):
                    if len(batch) + len(job) > 2:
                        killed.append(job)
                        continue
                    errors = [f"It ended its worker while it ran alone: {errors}"]
                for cell, error in zip(job, errors, strict=True):
                    cell["status"] = "failed" if error else "done"
                    cell["error"] = error
            # a dead worker takes the others along; those that ran come first, one is to blame
            killed.sort(key=batch.index)
            suspects = workers or len(killed)
            alone += [[cell] for job in killed[:suspects] for cell in job]
            jobs = killed[suspects:]
    finally:
        if pool is not executor:
            pool.shutdown(kill_workers=True)
    return _study_table(cells, grid)


# =============================================================================
# Figures
# =============================================================================

# Okabe and Ito's palette, told apart with every common kind of colour blindness
METHOD_COLORS = {"random": "#606060", "ImageNet": "#000000"}
METHOD_COLORS |= {"BYOL": "#0072B2", "SwAV": "#E69F00", "MoCo": "#009E73", "SparK": "#D55E00"}
METHOD_COLORS |= {"SwAV-PETCT": "#56B4E9", "SwAV-PETCT-reduced": "#CC79A7"}
METHOD_COLORS |= {"SwAV-LIDC": "#882255", "SwAV-LIDC-reduced": "#999933"}


def plot_images(images, titles, *, columns=6, title=""):
    """Return a figure of images (N, H, W) or (N, H, W, 3), 0..255, in a grid, a title over each."""
    from matplotlib import pyplot as plt

    rows = math.ceil(len(images) / columns)
    figure = plt.figure(figsize=(1.6 * columns, 1.8 * rows + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for place, image in enumerate(images):
        axis = figure.add_subplot(rows, columns, place + 1)
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_title(titles[place], fontsize=8)
        axis.axis("off")
    plt.close(figure)  # a notebook shows the figure that a cell ends with, once
    return figure


# =============================================================================
# Demo
# =============================================================================

PLANTED = ("BYOL", "SparK")  # stand-ins that share one trained backbone; the others' are random
_HEAD = "0.weight 1.weight 1.bias 1.running_mean 1.running_var 1.num_batches_tracked".split()
_HEAD += ["3.weight", "3.bias"]
_MLP = ("0.weight", "0.bias", "2.weight", "2.bias")
_QUEUES = ("queue", "queue_ptr", "val_queue", "val_queue_ptr")
_ENCODER = ()  # the backbone's own names
BESIDE = {  # layout -> what stands beside its backbone
    "BYOL": {
        "online_network.projector.model.": _HEAD,
        "online_network.predictor.model.": _HEAD,
        "target_network.encoder.": _ENCODER,
        "target_network.projector.model.": _HEAD,
        "target_network.predictor.model.": _HEAD,
    },
    "SwAV": {"model.projection_head.": ["0.bias", *_HEAD], "model.prototypes.": ["weight"]},
    "MoCo": {"encoder_q.fc.": _MLP, "encoder_k.": _ENCODER, "encoder_k.fc.": _MLP, "": _QUEUES},
    "SparK": {},
}


def write_demo_checkpoint(method, folder):
    """Write a stand-in in the layout of a method's file, unless it is there; return its path.

    Names, dtypes, wrapper keys and backbone shapes are those that the authors' code writes; other
    tensors have one element. A mark in the wrapper keeps it from passing as published. MoCo's has
    the MLP head, on which the authors' snippet runs.
    """
    path = Path(folder).expanduser() / CHECKPOINTS[method].filename
    with _locked(path):
        if path.exists():
            return path
        if method in PLANTED:
            backbone = _planted_state(path.parent)
        else:
            backbone = _new_resnet50().state_dict()
        layout = CHECKPOINTS[method].layout
        prefix = PREFIXES[layout][0]
        state = OrderedDict((prefix + name, tensor) for name, tensor in backbone.items())
        for start, names in BESIDE[layout].items():
            for name in names or backbone:
                counter = name.endswith(("num_batches_tracked", "ptr"))
                state[start + name] = torch.zeros(1, dtype=torch.long if counter else torch.float)
        wrapper = {"pytorch-lightning_version": "1.6.5", "epoch": 1, "state_dict": state}
        if layout == "SparK":
            wrapper = {"arch": "resnet50", "module": state, "is_pretrain": True}
        wrapper[STAND_IN_MARK] = "planted" if method in PLANTED else "random"
        with _atomic(path) as file:
            torch.save(wrapper, file)
    return path


SOURCES["stand-in"] = write_demo_checkpoint


def _planted_state(folder):
    """Return the planted backbone: trained on 600 other phantoms, once a folder."""
    from safetensors.torch import load_file

    start = load_backbone("random", seed=600)  # no control of a study starts there
    config = FineTuneConfig.named("demo", epochs=3)
    data = demo_data(600, n_train=600)
    with _locked(folder / "planted"):
        run = fine_tune(*start, data, config, runs_dir=folder, on_epoch=len, seed=600)
    state = load_file(run.folder / "best.safetensors")
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def demo_data(seed=0, *, n_train=240, n_val=48, n_test=120, image_size=32):
    """Draw CT-like axial chest slices; class 1 has hazy patches in the lungs.

    A patient has two slices and stays in one part; classes are balanced. Brightness hints at the
    class (AUC of the mean .54 to .57, of the best percentile .81 to .84); to score above that, a
    network has to see the patches.

    Args:
        seed: the same seed, sizes and `image_size` give the same bytes.

    Returns:
        DataSplits with demo=True, uint8 images (N, image_size, image_size).
    """
    parts = {}
    for part, n in zip(PARTS, (n_train, n_val, n_test), strict=True):
        patients = [f"{part}-patient{i // 2:03d}" for i in range(n)]
        ids = [f"{patients[i]}-slice{i % 2}" for i in range(n)]
        images = [_draw_slice([seed, *patients[i].encode()], i, image_size) for i in range(n)]
        labels = np.arange(n) // 2 % 2
        parts[part] = Split(np.stack(images), labels, np.array(ids), np.array(patients))
    source = f"CT-like slices drawn by demo_data(seed={seed}): no real patient, no licence"
    classes = ("clear lungs", "opacities")
    return DataSplits("phantom", **parts, class_names=classes, source=source, demo=True)


def _oval(x, y, width, height):
    """Return an ellipse as a mask with an edge of a pixel; lengths in half the image's side."""
    inside = 1 - np.hypot(x / width, y / height)
    return (inside * width * y.shape[-1] / 2 + 0.5).clip(0, 1)


def _draw_slice(patient, i, size):
    """Draw image `i` of a part, (size, size) uint8; `patient` is the seed of both its slices."""
    body = np.random.default_rng(patient)
    grain = np.random.default_rng([*patient, i])
    axis = np.linspace(-1, 1, size)
    x, y = np.meshgrid(axis, axis)
    width, height = body.uniform([0.75, 0.55], [0.95, 0.75])
    lungs = _oval(abs(x) - 0.5 * width, y, 0.36 * width, 0.75 * height)

    # vessels as bright as the patches, and many, so that brightness says little
    right, down = body.uniform(-0.75, 0.75, (2, body.integers(20, 90), 1, 1))
    vessels = 100 * _oval(x - right, y - down, 0.03, 0.03).max(0)
    right, down = body.uniform(-0.6, 0.6, (2, 8, 1, 1))
    haze = 125 * lungs * _oval(x - right, y - down, 0.2, 0.2).max(0)
    haze *= grain.uniform(0.2, 1.8, (size, size))
    if i // 2 % 2 == 0:  # clear lungs: half of that brightness, but evenly
        haze = 0.5 * haze.sum() / lungs.sum()
    inside = (60 + vessels + haze).clip(0, 155)
    image = 155 * _oval(x, y, width, height) * (1 - lungs) + inside * lungs
    image = body.uniform(0.85, 1.15) * image + grain.normal(0, 5, (size, size))
    return image.clip(0, 255).astype(np.uint8)
