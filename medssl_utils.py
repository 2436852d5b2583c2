"""Helpers that the workbook's notebooks share: one file, to be read from top to bottom.

Sections, in reading order:
    Checkpoints   download, open safely, match to a ResNet50, report the keys, convert
    Data          data sets by name, label subsets, checks before anything is trained
    Training      recipes, the loop, the run folder
    Evaluation    scores with their definitions
    Results       finished runs as one table, methods compared
    Study         a grid of settings: its cost, its runs, on one machine or a cluster
    Figures       plots that return the matplotlib figure
    Demo          stand-in checkpoints and phantom slices, so that nothing needs a download
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import queue
import random
import re
import shutil
import struct
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor,
)
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests
import torch
import torchvision
import urllib3
from filelock import FileLock, Timeout
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

__all__ = [
    "check_choice",
    # Checkpoints
    "CHECKPOINTS", "METHODS", "CONTROLS", "CheckpointError", "KeyReport",
    "download_checkpoint", "load_state_dict", "load_backbone", "export_backbone",
    # Data
    "DATASETS", "Split", "DataSplits", "load_data", "ReadOptions", "Folder", "read_folder",
    "label_subset", "check_splits",
    # Training
    "FineTuneConfig", "Preprocessing", "Run", "TrainingError", "fine_tune", "load_run",
    "train_one_epoch", "evaluate", "predict", "add_head", "preprocessing_for",
    "describe_environment",
    # Evaluation
    "score", "choose_threshold", "pool_by_patient", "bootstrap_interval",
    # Results
    "load_runs", "compare_methods", "describe_comparison",
    # Study
    "plan_study", "run_study",
    # Figures
    "with_alt", "plot_images", "plot_history", "plot_confusion",
    # Demo
    "write_demo_checkpoint", "demo_data",
]


def check_choice(value: str, options: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `options`; else raise ValueError with the nearest name."""
    options = list(options)
    if value in options:
        return value
    near = difflib.get_close_matches(str(value).lower(), [o.lower() for o in options], n=1)
    hint = next((f" Did you mean {o!r}?" for o in options if near and o.lower() == near[0]), "")
    raise ValueError(f"{what} {value!r} is not known.{hint} Choose one of: {', '.join(options)}.")


def _path(typed: str | Path) -> Path:
    """Return the path that a user typed; `~` is the home folder."""
    return Path(os.path.expanduser(typed))


@contextlib.contextmanager
def _atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    name.touch(exist_ok=False)  # with the permissions that any new file gets here
    try:
        yield name
        with open(name, "rb+") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        name.unlink(missing_ok=True)


def _digest(path: str | Path, kind: str = "sha256") -> str:
    """SHA-256 (or what `kind` names) of a file in hexadecimal digits, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


# =============================================================================
# Checkpoints
# =============================================================================


class CheckpointError(ValueError):
    """A checkpoint that could not be fetched, opened, or matched; says what to do next."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of one published checkpoint (Wolf et al. 2023, authors' README and code)."""

    method: str  # the name it is selected by
    drive_id: str  # Google Drive's id of the file
    filename: str  # the name it is kept under
    wrapper: str  # key of the outer dictionary that holds the tensors
    prefix: str  # what stands before each backbone key ("" for none)
    groups: Mapping[str, str]  # auxiliary key prefix -> what it is; all of them are left out
    unexpected: tuple[int, ...]  # how many keys stand beside the backbone, for each kind of head
    readme_unexpected: str  # which they are, in the words of that README
    mean: tuple[float, ...]  # intensity statistics of the pre-training input, in [0, 1]
    std: tuple[float, ...]
    other_prefix: str | None = None  # of the backbone in a second file of the authors' code

    @property
    def url(self) -> str:
        """The download link of the authors' README."""
        return f"https://drive.google.com/uc?export=download&id={self.drive_id}"


LIDC_MEAN, LIDC_STD = (0.1806,) * 3, (0.1907,) * 3
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CHECKPOINTS: dict[str, Checkpoint] = {
    "BYOL": Checkpoint(
        "BYOL", "1eBZYl1rXkKJxz42Wu75uzb1kLg8FTv1H", "byol_resnet50.ckpt", "state_dict",
        "online_network.encoder.", {
            "online_network.projector.": "projector of the online network",
            "online_network.predictor.": "predictor of the online network",
            "target_network.encoder.": "momentum (target) encoder",
            "target_network.projector.": "projector of the target network",
            "target_network.predictor.": "predictor of the target network",
        },
        (350,), "online_network.projector and target_network.encoder layers", LIDC_MEAN, LIDC_STD,
    ),
    "SwAV": Checkpoint(
        "SwAV", "11OWRzifq_BXrcFMZ13H0HwS4UGcaiAn_", "swav_resnet50.ckpt", "state_dict",
        "model.", {
            "model.projection_head.": "projection head for the online clustering",
            "model.prototypes.": "prototypes (cluster centres)",
        },
        (10,), "projection_head layers", LIDC_MEAN, LIDC_STD,
    ),
    "MoCo": Checkpoint(
        "MoCo", "1hUr_6XdYxjB66ZYEGTqE7b8I88IN9a1l", "moco_v2_resnet50.ckpt", "state_dict",
        "encoder_q.", {
            "encoder_q.fc.": "contrastive head of the query encoder",
            "encoder_k.": "momentum (key) encoder",
            "queue": "queue of negative keys",
            "queue_ptr": "position in the queue",
            "val_queue": "queue of negative keys for validation",
            "val_queue_ptr": "position in the validation queue",
        },
        (330, 326, 322), "encoder_k layers", LIDC_MEAN, LIDC_STD,  # MLP, linear or no head
    ),
    "SparK": Checkpoint(
        "SparK", "1kYFS67jH9s8kAmhNyf5wlRj_Gh9vTK_H", "spark_resnet50.pth", "module",
        "", {  # none in the published file; these are in `..._still_pretraining.pth`
            "imn_m": "ImageNet mean", "imn_s": "ImageNet standard deviation",
            "norm_black": "normalised black image", "dense_decoder.": "decoder",
            "densify_norms.": "densifying norms", "densify_projs.": "densifying projections",
            "mask_tokens.": "mask tokens", "config": "settings of the pre-training",
        },
        (0,), "none", IMAGENET_MEAN, IMAGENET_STD, other_prefix="sparse_encoder.sp_cnn.",
    ),
}
METHODS = tuple(CHECKPOINTS)
CONTROLS = ("random", "ImageNet")
STAND_IN_MARK = "medssl_stand_in"  # a key of a stand-in's wrapper that no published file has


# Download ---------------------------------------------------------------------


def download_checkpoint(
    method: str, folder: str | Path = "checkpoints", *, url: str | None = None,
    sha256: str | None = None, from_file: str | Path | None = None, timeout: float = 60.0,
    retries: int = 3, quiet: bool = False,
) -> Path:
    """Return the published file of `method` in `folder`; fetch it if it is not there.

    Only a whole, checked file gets its name. An interrupted transfer stays beside it as `.part`,
    and the next call takes it up again. Two calls at once wait for each other.

    Args:
        method: one of METHODS.
        folder: made if missing; holds the file and `checksums.json`.
        url: a mirror to fetch from instead of Google Drive.
        sha256: expected checksum; default: the one in `checksums.json`. Where neither exists,
            the file must be one that PyTorch wrote, each record matching its CRC.
        from_file: a file that you already have: copied, nothing is fetched.
        timeout: seconds of silence that end an attempt.
        retries: further attempts after silence, a lost connection or a busy server (429, 5xx);
            each goes on where the last one ended.
        quiet: no progress bar.

    Raises:
        CheckpointError: the file could not be had; says why, and how to get it by hand.
    """
    checkpoint = CHECKPOINTS[check_choice(method, METHODS, "method")]
    target = _path(folder) / checkpoint.filename
    try:
        recorded = _checksums(target.parent).get(target.name)
        expected = {"sha256": _hex(sha256)} if sha256 else recorded
        if from_file is not None:
            if problem := _file_problem(from_file := _path(from_file), expected):
                raise CheckpointError(f"{from_file}: {problem}.")
            expected = expected or {"sha256": _digest(from_file)}
        if not _file_problem(target, expected):  # before the lock: the folder may be read-only
            return target
        if target.parent.is_file():
            raise CheckpointError(f"{target.parent} is a file; a folder is needed there.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            problem = _file_problem(target, expected)  # again: another process may have been first
            if problem and target.exists():
                warnings.warn(_set_aside(target, problem) + "; it is replaced.", stacklevel=2)
            if problem and from_file is not None:
                with _atomic(target) as copied:
                    shutil.copyfile(from_file, copied)  # not its permissions: it may be read-only
                    if problem := _file_problem(copied, expected):
                        raise CheckpointError(f"The copy of {from_file} is not whole: {problem}.")
            elif problem:
                _transfer(url or checkpoint.url, target, expected, timeout, retries, quiet)
        return target
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"{method}: {_quoted(error)}\nBy hand: open {checkpoint.url} in a browser, save the "
            f"file as {target} and run this again, or pass from_file= with the file that you have."
        ) from error


def _quoted(error: Exception) -> str:
    """An error's words; they may quote a server or a file, and no terminal shall obey those."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))


def _hex(sha256: Any) -> str:
    """Return a SHA-256 as hashlib writes it (some tools use capitals); ValueError if it is none."""
    if not re.fullmatch("[0-9a-fA-F]{64}", str(sha256)):
        raise ValueError(f"sha256 {sha256!r} is none: 64 hexadecimal digits are expected")
    return sha256.lower()


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what `folder`/checksums.json records: file name -> SHA-256, size, and what else the
    user accepted in it (`allow_extra`)."""
    listing = folder / "checksums.json"
    try:
        return {name: {"sha256": _hex(entry["sha256"]), "size": int(entry["size"]),
                       "allow_extra": _extras(entry.get("allow_extra", ()))}
                for name, entry in json.loads(listing.read_bytes()).items()}  # with a BOM, too
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError,
            ValueError) as error:
        raise CheckpointError(
            f"{listing} is not a list of checksums ({error}): restore it or delete it.") from error


def _record_checksum(
    path: Path, sha256: str, allow_extra: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Add a file to checksums.json beside it unless it is listed; return the entry that holds.
    A folder that cannot be written to only gives a warning: its files can still be used."""
    listing = path.with_name("checksums.json")
    entry = {"sha256": sha256, "size": path.stat().st_size, "allow_extra": allow_extra}
    try:
        with FileLock(path.with_name(".checksums.json.lock")), _atomic(listing) as temporary:
            entries = {path.name: entry} | _checksums(path.parent)
            temporary.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
            entry = entries[path.name]
    except OSError as error:
        warnings.warn(f"The checksum of {path} could not be recorded ({error}): a later change "
                      "of the file will go unnoticed.", stacklevel=2)
    return entry


def _file_problem(path: Path, expected: Mapping[str, Any] | None) -> str | None:
    """Say what is wrong with a file, or None. It is held against {"sha256": ...} or {"md5": ...};
    else it must be one that PyTorch wrote, each record matching its CRC (none before 1.6)."""
    if not path.exists():
        return "there is no such file"
    kind = _what(_beginning(path))
    if kind not in ("zip", "legacy"):
        return f"it is {kind}"
    if expected:
        name = "sha256" if "sha256" in expected else "md5"
        if (found := _digest(path, name)) != expected[name]:
            replaced = "; if the authors replaced the file, delete its entry in checksums.json"
            return (f"its {name} is {found}, expected {expected[name]}"
                    f"{replaced * ('size' in expected)}")
    elif kind == "zip":
        try:
            _read_records(path, _zip_records(path)[1])
        except CheckpointError as error:
            return str(error)
    return None


def _set_aside(path: Path, problem: str) -> str:
    """Rename a wrong file to <final name>.bad; return the words that say so, and why."""
    bad = path.with_name(path.name.removesuffix(".part") + ".bad")
    os.replace(path, bad)
    return f"{path}: {problem}; set aside as {bad}"


# gdown reads Drive's page about large files; the transfer is our own: gdown's joins parts of two
# files, takes a cut file of unknown length for whole, and does not name a 404 or retry a 503.


def _transfer(
    url: str, target: Path, expected: Mapping[str, Any] | None, timeout: float, retries: int,
    quiet: bool,
) -> None:
    """Fetch `url` under a temporary name, attempt by attempt; check it; give it its name."""
    part = target.with_name(target.name + ".part")
    for attempt in itertools.count(1):
        try:
            _fetch(url, part, timeout, quiet)
            break
        except CheckpointError:
            raise
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            passing = isinstance(error, (  # not of address or disk
                requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError,
                requests.exceptions.ChunkedEncodingError))
            if passing and attempt <= retries:
                time.sleep(min(0.25 * 2**attempt, 30))
                continue
            kept = f" What arrived is kept in {part}; the next call goes on from there."
            tried = f" It gave up after {attempt} attempts." if passing else ""
            raise CheckpointError(f"{url} cannot be fetched into {part}: {error}.{tried}"
                                  f"{kept * part.exists()}") from error
    part.with_suffix(".origin").unlink(missing_ok=True)
    if problem := _file_problem(part, expected):
        raise CheckpointError(f"{_set_aside(part, problem)}. It came from {url}.")
    os.replace(part, target)


def _fetch(url: str, part: Path, timeout: float, quiet: bool) -> None:
    """Append to `part` what is missing of the file at `url`."""
    note = part.with_suffix(".origin")  # which remote file it is a part of
    known, have = {}, 0
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none, or damaged
        told = json.loads(note.read_text())
        known = {name: told[name] for name in ("url", "size", "validator")}
        have = part.stat().st_size if known["url"] == url and known["validator"] else 0
    if have and have == known["size"]:  # killed between the last byte and the rename
        return
    with _request(url, have, known, timeout) as response:
        start, origin = _origin(response, url)
        chunk = response.raw.read1(1 << 20)
        if start == 0 and _what(chunk).startswith("a web page"):
            raise CheckpointError(f"{url} sent a web page, not the file.")  # the part is kept
        same = response.ok and all(origin[name] in (None, known[name]) for name in known)
        if start not in (0, have) or have and not same:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError(
                f"{url} changed on the way: byte {have} of {known} was asked for, byte {start} of "
                f"{origin} came")
        needed, free = (origin["size"] or 0) - start, shutil.disk_usage(part.parent).free
        if needed > free:
            raise CheckpointError(f"{part.parent} has {free:,} bytes free; {needed:,} are needed.")
        if start == 0:  # also where the server ignores the range
            part.unlink(missing_ok=True)
            with _atomic(note) as temporary:
                temporary.write_text(json.dumps(origin))
        with open(part, "ab") as file, tqdm(total=origin["size"], initial=start, desc=part.stem,
                                            unit="B", unit_scale=True, disable=quiet) as bar:
            while chunk:
                file.write(chunk)
                bar.update(len(chunk))
                chunk = response.raw.read1(1 << 20)
    if origin["size"] not in (None, part.stat().st_size):
        raise requests.ConnectionError(f"{url} ended before its {origin['size']:,} bytes")


def _request(url: str, have: int, known: Mapping[str, Any], timeout: float) -> requests.Response:
    """Ask for `url` from byte `have` on, through Drive's page about large files if it comes."""
    from gdown.download import get_url_from_gdrive_confirmation
    from gdown.parse_url import is_google_drive_url

    session = requests.Session()  # a range is asked for even from 0: Drive then tells the length
    session.headers.update({"Accept-Encoding": "identity", "Range": f"bytes={have}-"})
    if have:
        session.headers["If-Range"] = known["validator"]
    response = session.get(url, stream=True, timeout=timeout)
    is_page = response.headers.get("Content-Type", "").startswith("text/html")
    if response.status_code in (200, 206) and is_page and is_google_drive_url(url):
        page = response.text
        try:
            confirmed = get_url_from_gdrive_confirmation(page)
        except Exception as error:  # a page that gdown doesn't know can break it in any way
            raise CheckpointError(f"{url} sent a web page, not the file: {error}") from error
        response = session.get(confirmed, stream=True, timeout=timeout)
    answer = f"{url} answered with status {response.status_code} ({response.reason})"
    if response.status_code in (408, 429, 500, 502, 503, 504):
        raise requests.ConnectionError(answer)
    if response.status_code not in ((200, 203, 206, 416) if have else (200, 203, 206)):
        raise CheckpointError(f"{answer}.")
    return response


def _origin(response: requests.Response, url: str) -> tuple[int, dict[str, Any]]:
    """Return the first byte that is sent, and what tells the remote file from a changed one."""
    fields, start = response.headers, 0
    size = fields.get("Content-Length", "")
    if response.status_code in (206, 416):  # "bytes 5-9/10": the whole file's size is behind the /
        words = fields.get("Content-Range", "")
        start = int(re.match(r"(?:bytes (\d{1,18})-)?", words)[1] or -1)
        size = words.rpartition("/")[2]
    return start, {"url": url, "size": int(size) if re.fullmatch(r"\d{1,18}", size) else None,
                   "validator": fields.get("ETag") or fields.get("Last-Modified")}


# Read -------------------------------------------------------------------------

# A checkpoint is a pickle that says where each tensor's bytes lie. Unpickling can run code, so
# `_PickleReader` looks no name up and calls nothing: it gives names, shapes and places. The match
# with a ResNet50 is made on those, and only then are bytes read, each with its checksum.

_DTYPES = {f"torch.{kind}Storage": dtype for kind, dtype in {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}.items()}
_PARAMETER = "torch._utils._rebuild_parameter"
_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_HARMLESS = re.compile(  # what training code leaves beside the weights; none is ever looked up
    r"""(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|pl_bolts|omegaconf
        |torchmetrics|typing|datetime|torch\.optim|torch\.nn) (\.\w+)+
    | argparse\.Namespace | functools\.partial | _codecs\.encode | copy_?reg\._reconstructor
    | pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path
    | collections\.(OrderedDict|defaultdict|Counter|deque)
    | (builtins|__builtin__)\.(bool|int|long|float|complex|str|unicode|bytes|bytearray|list
        |tuple|dict|set|frozenset|slice|range|xrange|object|type|NoneType|Ellipsis)
    | numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|bool_?|str_|bytes_
        |u?int\d+|float\d+|dtypes\.\w+)
    | torch\.(Size|device|dtype|torch_version\.TorchVersion|bool|u?int\d+|b?float\d+)
    """, re.VERBOSE)
_OPCODES = (  # that Python's reader may act on: data, the memo, and names, of which it asks us
    "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "SETITEM SETITEMS ADDITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL INST "
    "STACK_GLOBAL BINPERSID").split()
MAX_PICKLE_BYTES = 4 << 20  # ten times what a published file needs
MAX_NAMES = 200


class _Name(str):
    """`module.name` as a pickle gives it: text, never the object that it names."""


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in a file; nothing of it has been read yet (units: elements)."""

    record: str
    dtype: torch.dtype
    length: int  # of the record
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError unless it fills a stretch of its record, each element once."""
        numbers = (self.offset, *self.shape, *self.stride)
        if not (isinstance(self.dtype, torch.dtype) and len(self.shape) == len(self.stride) <= 16
                and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)):
            raise ValueError(f"a tensor of {self.record} has no valid type or shape")
        what = f"a tensor of {self.record} with shape {self.shape}, strides {self.stride}"
        if self.offset + math.prod(self.shape) > self.length:
            raise ValueError(f"{what} and offset {self.offset} reaches out of its {self.length}")
        dense = 1  # the next stride, in whatever order the dimensions lie in memory
        for step, length in sorted((s, n) for s, n in zip(self.stride, self.shape) if n > 1):
            if step != dense:
                raise ValueError(f"{what} leaves gaps or overlaps itself")
            dense *= length

    def view(self, data: np.ndarray) -> torch.Tensor:
        """Return this tensor as a view of its record's bytes (uint8, 1-D)."""
        return torch.from_numpy(data).view(self.dtype).as_strided(
            self.shape, self.stride, self.offset)


class _Dict(dict):
    """A dict of a pickle, or what stands in for any other object: empty, whatever is put in."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep a value under a text key, once; no weight has another kind of key."""
        if isinstance(key, str):
            if key in self:  # Python would silently keep the last one
                raise ValueError(f"the key {key[:80]!r} comes twice")
            super().__setitem__(key, value)

    def append(self, *items: Any) -> None:
        """Take no items: it stands in for a list, a set or another object that does."""

    extend = add = append


class _PickleReader(pickle._Unpickler):
    """Turns a pickle into plain data: dicts with text keys, lists, tuples, numbers, `_Stored`.

    It is Python's own reader, but a name is only its text and a call makes nothing: a name that
    has a place in a weight file, or is among `allow_extra`, stands for an empty dict, whatever it
    is called with; any other is refused. `root` + a storage's key names its record.
    """

    def __init__(self, file: io.BytesIO, allow_extra: Sequence[str] = (), root: str = ""):
        super().__init__(file, encoding="latin-1")
        self.allowed, self.root = {*allow_extra, *_DTYPES, *_TENSOR, _PARAMETER}, root
        self.allow_extra = tuple(allow_extra)
        self.names: dict[_Name, bool] = {}  # name -> accepted
        self.sizes: dict[str, int] = {}  # record -> bytes, as declared

    def load(self) -> Any:
        """Return the data of the next pickle; a refused name, wherever it stands, is an error."""
        self.memo, result, problem = {}, None, None
        try:
            result = super().load()
        except Exception as error:  # a broken pickle can do anything to the stack below
            problem = f"its pickle is damaged ({str(error)[:200]})"
        if refused := tuple(str(name) for name, accepted in self.names.items() if not accepted):
            problem = (f"it asks for {_few(refused)}, which has no place in a weight file: opened "
                       "the usual way, it could run code. Nothing was run. If you trust its "
                       f"origin, {_accepting((*self.allow_extra, *refused))}: empty placeholders "
                       "are then taken instead")
        if problem:
            raise CheckpointError(problem)
        return result

    def find_class(self, module: str, name: str) -> _Name:
        """Note a name, and whether it has a place in a weight file; return it as text."""
        full = _Name(f"{module}.{name}")
        if len(full) > 500 or len(self.names) >= MAX_NAMES and full not in self.names:
            raise ValueError(f"more than {MAX_NAMES} names, or one too long: {full[:80]}")
        # no dots: `module` then names a real module, and `name` something that it defines
        self.names[full] = full in self.allowed or (
            "." not in name and bool(_HARMLESS.fullmatch(full)))
        return full

    def persistent_load(self, reference: Sequence[Any]) -> tuple[str, torch.dtype, int]:
        """Return (record, dtype, elements) of a storage that the pickle refers to."""
        kind, name, key, _, numel, *view = reference
        # types first: to hash or compare what the file nested could take for ever
        if (type(kind), type(name), type(key), type(numel)) != (str, _Name, str, int) or (
                kind != "storage" or any(view) or not 0 <= numel < 1 << 48):
            raise ValueError("a reference to something that is no storage, or a view of another")
        dtype, record = _DTYPES[name], self.root + key
        if self.sizes.setdefault(record, numel * dtype.itemsize) != numel * dtype.itemsize:
            raise ValueError(f"{record} is declared with two sizes")
        return record, dtype, numel

    def _call(self) -> None:
        """Push what `name(*arguments)` stands for: a tensor, a dict, or an empty placeholder."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name):
            raise ValueError("a call of something that is no name")
        if name in _TENSOR:
            if any(arguments[6:]):
                raise ValueError("a negative view or conjugate of a tensor")
            storage, offset, shape, stride = arguments[:4]
            self.append(_Stored(*storage, offset, tuple(shape), tuple(stride)))
        elif name == _PARAMETER or arguments and isinstance(arguments[0], dict):
            self.append(arguments[0])  # not a copy: a small pickle could ask for a million of them
        else:
            self.append(_Dict())

    def _refuse(self) -> None:
        raise ValueError("an opcode that has no place in a weight file")

    dispatch = dict.fromkeys(range(256), _refuse) | {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _OPCODES)} | {
        pickle.REDUCE[0]: _call, pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # the state of an object never made
        pickle.EMPTY_DICT[0]: lambda self: self.append(_Dict()),
        pickle.EMPTY_SET[0]: lambda self: self.append(_Dict()),
        pickle.FROZENSET[0]: pickle._Unpickler.load_tuple}


def _few(names: Iterable[str], most: int = 8) -> str:
    """Join some names for an error message."""
    names = [str(name)[:100] for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


def _accepting(extras: tuple[str, ...]) -> str:
    """Say how a user accepts what is refused."""
    return (f"pass allow_extra={extras!r} (notebook 02 has that parameter; what is accepted in a "
            "published file is kept in checksums.json and holds for every later load)")


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Let the errors raised within begin with the file's path."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: {_quoted(error).rstrip('.')}.") from None


_Place = tuple[int, int, int | None]  # first byte, bytes, CRC-32 (None in the legacy format)
# what a file holds, where its records lie, the names that its pickle asks for
_Opened = tuple[Any, dict[str, _Place], Iterable[str]]


def load_state_dict(
    path: str | Path, *, allow_extra: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Read all tensors under a checkpoint's wrapper; no code from the file ever runs.

    Args:
        path: a file that `torch.save` wrote, of any origin.
        allow_extra: pickled `module.name`s to take as empty placeholders, as an error named them.
    Returns:
        name -> tensor on the CPU, in the file's order.
    Raises:
        CheckpointError: it isn't a checkpoint, is damaged, or asks for names of no weight file.
    """
    with _about(path := _path(path)):
        top, records, _ = _open_checkpoint(path, _extras(allow_extra))
        entries, _ = _unwrap(top)
        stored = {name: entry for name, entry in entries.items() if isinstance(entry, _Stored)}
        return _read_tensors(path, records, stored)


def _extras(allow_extra: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple; a lone text is one name, not one for each letter."""
    extras = (allow_extra,) if isinstance(allow_extra, str) else tuple(allow_extra)
    if not all(isinstance(extra, str) for extra in extras):
        raise ValueError(f"allow_extra={allow_extra!r}: names are expected, each a text")
    return extras


def _open_checkpoint(path: Path, allow_extra: Sequence[str]) -> _Opened:
    """Check a file's structure; return what it holds, with tensors unread."""
    if not path.is_file():
        raise CheckpointError("it is a folder, not a file" if path.is_dir() else
                              "it is a pipe or device, not a file" if path.exists() else
                              "no such file: notebook 01 shows how to get the checkpoints")
    kind = _what(_beginning(path))
    if kind not in ("zip", "legacy"):
        raise CheckpointError(f"it is {kind}, not a checkpoint that torch.save wrote")
    return (_open_zip if kind == "zip" else _open_legacy)(path, allow_extra)


_KINDS = {  # how a file begins -> what it is; the first that matches
    rb"PK\x03\x04": "zip",
    rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.": "legacy",
    rb".{6}\0\0\{": "a safetensors file (load_backbone takes what export_backbone wrote, under a "
                   "name that ends in .safetensors)",
    rb"\Z": "empty (0 bytes)",
    rb"(\xef\xbb\xbf)?\s*<": "a web page (HTML or XML), perhaps one that asks to log in or to wait",
    rb"(\xef\xbb\xbf)?\s*[{[]": "JSON text",
    rb"PK": "an empty zip archive",
    rb"\x1f\x8b": "a gzip archive (unpack it first)",
    rb".{257}ustar": "a tar archive (unpack it first)",
    rb"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file)",
}


def _beginning(path: Path, size: int = MAX_PICKLE_BYTES) -> bytes:
    """Return a file's first bytes, by default enough for any pickle."""
    with open(path, "rb") as file:
        return file.read(size)


def _what(start: bytes) -> str:
    """Say by its first bytes what a file is: "zip", "legacy", or words for anything else."""
    for beginning, words in _KINDS.items():
        if re.match(beginning, start, re.DOTALL):
            return words
    reader = _PickleReader(io.BytesIO(start))
    with contextlib.suppress(CheckpointError):
        reader.load()
    if names := [name for name in reader.names if re.fullmatch(r"[\w.]+", name)]:
        return f"a bare pickle that asks for {_few(names)} (nothing was run)"
    return f"of no known kind (its first bytes are {start[:8]!r})"


def _open_zip(path: Path, allow_extra: Sequence[str]) -> _Opened:
    """Open what torch.save writes since PyTorch 1.6: a pickle and uncompressed records."""
    root, records = _zip_records(path)
    places = {name: records.get(root + name, (0, 0, 0)) for name in ("data.pkl", "byteorder")}
    if (largest := max(size for _, size, _ in places.values())) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"its pickle has {largest:,} bytes, more than any weight file's")
    small = _read_records(path, places, keep=places)
    if (order := small["byteorder"].tobytes()) not in (b"", b"little"):
        raise CheckpointError(f"its byte order is {order[:20]!r}; only little-endian can be read")
    reader = _PickleReader(io.BytesIO(small["data.pkl"]), allow_extra, f"{root}data/")
    top = reader.load()
    found = {name: size for name, (_, size, _) in records.items() if name.startswith(reader.root)}
    for name in reader.sizes | found:
        if found.get(name) != reader.sizes.get(name):
            raise CheckpointError("its records aren't those that its pickle declares: bytes of "
                                  f"{name}: {found.get(name)}, declared {reader.sizes.get(name)}")
    return top, records, reader.names


def _zip_records(path: Path) -> tuple[str, dict[str, _Place]]:
    """List a zip's records after checking that each lies where the directory says; return what
    the names of a checkpoint's begin with, too."""
    records, size = {}, path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(size - 98, 0))
        end = file.read()  # of the directory: says how many records it lists, in how many bytes
        is_zip64 = end[-42:-38] == b"PK\6\7"
        length = int.from_bytes(end[-58:-50] if is_zip64 else end[-10:-6], "little")
        count = int.from_bytes(end[-12:-10], "little")
        try:
            if end[-22:-18] + end[-2:] != b"PK\5\6\0\0":
                raise ValueError("the file doesn't end where it does")
            if length > MAX_PICKLE_BYTES:
                raise ValueError(f"it lists records in {length:,} bytes, more than any weight file")
            infos = zipfile.ZipFile(file).infolist()
            if count not in (len(infos), 0xFFFF):
                raise ValueError(f"it has {len(infos)} records, its end says {count}")
            if min((info.header_offset for info in infos), default=0):  # readers differ on these
                raise ValueError("its first record isn't where the file begins")
        except Exception as error:  # zipfile raises half a dozen kinds on a damaged directory
            raise CheckpointError(
                f"its zip directory is damaged or cut off ({error}): fetch it again") from None
        if any("/code/" in i.filename or i.filename.endswith("/constants.pkl") for i in infos):
            raise CheckpointError("it is a TorchScript program, not a checkpoint")
        for info in infos:
            file.seek(max(info.header_offset, 0))  # negative where bytes before it are gone
            header = file.read(30).ljust(30, b"\0")
            name, (name_bytes, extra_bytes) = info.filename, struct.unpack("<26x2H", header)
            if (header[:4], file.read(name_bytes)) != (b"PK\x03\x04", name.encode()):
                raise CheckpointError(f"its record {name} is not where the zip directory says")
            if info.compress_type or info.flag_bits & 1 or info.file_size != info.compress_size:
                raise CheckpointError(f"its record {name} is compressed or encrypted "
                                      f"({info.file_size:,} bytes), which torch.save never does")
            if name in records:
                raise CheckpointError(f"it holds the record {name} twice")
            records[name] = (file.tell() + extra_bytes, info.file_size, info.CRC)
    if sum(length for _, length, _ in records.values()) > size:
        raise CheckpointError("its records overlap or reach beyond the end of the file")
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"it is a zip archive with {len(roots)} data.pkl instead of 1, not "
                              f"a checkpoint (unpack it first?); it holds {_few(records, 4)}")
    return roots[0], records


def _read_records(
    path: Path, records: Mapping[str, _Place], keep: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Read all `records` and check their CRC; return the bytes of those to `keep` (uint8)."""
    scratch = np.empty(1 << 20, np.uint8)
    kept = {name: np.empty(records[name][1], np.uint8) for name in keep}
    with open(path, "rb") as file:
        for name, (first, size, expected) in records.items():
            buffer, crc = kept.get(name, scratch), 0
            file.seek(first)
            for start in range(0, size, max(len(buffer), 1)):
                part = buffer[: size - start]
                if file.readinto(part) != len(part):
                    raise CheckpointError(f"its record {name} is cut off: fetch it again")
                crc = crc if expected is None else zlib.crc32(part, crc)
            if expected not in (None, crc):
                raise CheckpointError(f"its record {name} is damaged (CRC-32 {crc:08x}, "
                                      f"{expected:08x} when it was written): fetch it again")
    return kept


def _open_legacy(path: Path, allow_extra: Sequence[str]) -> _Opened:
    """Open what torch.save wrote before PyTorch 1.6: five pickles, then the storages in order."""
    head, records = io.BytesIO(_beginning(path)), {}
    reader = _PickleReader(head, allow_extra)
    _, _, system, top, keys = (reader.load() for _ in range(5))
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise CheckpointError("its byte order isn't little-endian, which alone can be read")
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)
            and sorted(keys) == sorted(reader.sizes)):
        raise CheckpointError("it is damaged: its list of storages isn't its tensors' list")
    first = head.tell()
    for key in keys:
        records[key] = (first + 8, reader.sizes[key], None)  # 8 bytes: the number of elements
        first += 8 + reader.sizes[key]
    if first != (size := path.stat().st_size):
        raise CheckpointError(f"it is cut off or damaged: {size:,} bytes, {first:,} are needed")
    return top, records, reader.names


_WRAPPERS = ("state_dict", "module", "model", "model_state_dict", "checkpoint")


def _unwrap(top: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the dictionary that holds the tensors, and the keys that lead to it."""
    path: tuple[str, ...] = ()
    while isinstance(top, dict):
        inner = [key for key in _WRAPPERS if isinstance(top.get(key), dict) and any(
            isinstance(value, (_Stored, dict)) for value in top[key].values())]
        if not inner and any(isinstance(value, _Stored) for value in top.values()):
            break
        if len(inner) != 1 or len(path) > 3:
            where = "more than one set" if len(inner) > 1 else "none"
            raise CheckpointError(f"0 of 318 backbone tensors: it has {where} under "
                                  f"{', '.join(_WRAPPERS)}; its keys are: {_few(top) or 'none'}")
        path, top = (*path, inner[0]), top[inner[0]]
    if not isinstance(top, dict):
        kind = "tensor" if isinstance(top, _Stored) else type(top).__name__
        raise CheckpointError(f"it holds no dictionary of tensors but a {kind}")
    return top, path


def _read_tensors(
    path: Path, records: Mapping[str, _Place], wanted: Mapping[str, _Stored],
) -> dict[str, torch.Tensor]:
    """Read the wanted tensors, and check the CRC of every record of the file."""
    data = _read_records(path, records, {entry.record for entry in wanted.values()})
    return {name: entry.view(data[entry.record]) for name, entry in wanted.items()}


# Match and report -------------------------------------------------------------

README_MISSING = ("fc.weight", "fc.bias")


@dataclass(frozen=True, repr=False)
class KeyReport:
    """What was taken from a checkpoint, what was left, and why that is right."""

    method: str  # BYOL, SwAV, MoCo, SparK, random or ImageNet
    weights: str  # "stand-in", "published", "file" (a path was given), "random" or "ImageNet"
    path: str = ""  # name of the file; "" for the controls
    size: int = 0  # of that file, in bytes
    sha256: str = ""  # of that file
    loaded: int = 318  # backbone tensors that were loaded
    expected: int = 318  # backbone tensors that a ResNet50 has
    changed: int = 0  # loaded tensors that differ from a fresh initialisation
    missing_keys: tuple[str, ...] = ()  # of a ResNet50, absent from the file
    unexpected_keys: tuple[str, ...] = ()  # of the file, no part of a ResNet50: left out
    groups: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # of these: (keys, what)
    fingerprint: str = ""  # SHA-256 over names, types, shapes and numbers of the loaded tensors
    allow_extra: tuple[str, ...] = ()  # what the user accepted beyond the known layout
    notes: tuple[str, ...] = ()  # further things to know, one sentence each
    beside_stand_ins: bool = False  # a control loaded with weights="stand-in": its study is a demo

    @property
    def demo(self) -> bool:
        """True for a stand-in, whose weights are random numbers, and for a control beside it."""
        return self.weights == "stand-in" or self.beside_stand_ins

    @property
    def verdict(self) -> str:
        """One sentence: what was loaded, and whether the rest is what the authors expect."""
        text = f"{self.loaded} of {self.expected} backbone tensors loaded"
        if known := CHECKPOINTS.get(self.method):
            as_told = (self.missing_keys == README_MISSING and not self.allow_extra
                       and len(self.unexpected_keys) in known.unexpected)
            text += f"; the keys left out are {'' if as_told else 'not quite '}those known of a "
            text += f"{self.method} file" + ": see the table" * (not as_told)
        stand_in = self.weights == "stand-in"
        return text + ("; STAND-IN: random weights." if stand_in else ".")

    def to_frame(self) -> pd.DataFrame:
        """Return the report as a table: keys, found, expected, meaning."""
        rows = [("backbone", f"{self.loaded} of {self.expected}", "", "ResNet50 without fc")]
        if known := CHECKPOINTS.get(self.method):
            counts = " or ".join(map(str, known.unexpected))
            rows += [("missing_keys", ", ".join(self.missing_keys) or "none",
                      ", ".join(README_MISSING), "classifier, not pre-trained"),
                     ("unexpected_keys", str(len(self.unexpected_keys)),
                      f"{counts}; README: {known.readme_unexpected}",
                      "left out, by group:" if self.groups else "nothing to leave out")]
        rows += [(group, str(count), "", words) for group, (count, words) in self.groups.items()]
        return pd.DataFrame(rows, columns=["keys", "found", "expected", "what it is"])

    def _lines(self) -> list[str]:
        """The title, then the lines that stand below the table."""
        return [" · ".join(filter(None, (self.method, self.weights, self.path))),
                *(f"Note: {note}." for note in self.notes),
                f"{self.changed} of {self.loaded} tensors differ from a fresh initialisation; "
                f"fingerprint {self.fingerprint[:16]}.", self.verdict]

    def __repr__(self) -> str:
        title, *lines = self._lines()
        return "\n".join([title, self.to_frame().set_index("keys").to_string(), *lines])

    def _repr_html_(self) -> str:
        title, *lines = map(html.escape, self._lines())
        return f"<b>{title}</b>{self.to_frame().to_html(index=False)}<p>{'<br>'.join(lines)}</p>"


def load_backbone(
    method: str | None = None, path: str | Path | None = None, *, weights: str = "stand-in",
    folder: str | Path = "checkpoints", seed: int = 0, allow_extra: Sequence[str] = (),
    cache: bool | str = True,
) -> tuple[nn.Module, KeyReport]:
    """Return a ResNet50 backbone with a method's weights, and the report of its keys.

    Args:
        method: one of METHODS or CONTROLS; None recognises the method of the file at `path`.
        path: a checkpoint, or what `export_backbone` wrote; else `weights` decides.
        weights: "stand-in" (written on demand, random numbers) or "published" (fetched on demand).
        folder: where checkpoints are kept.
        seed: of the `random` control.
        allow_extra: key groups ("group.") or pickled names that an error named and you accept;
            those of a published file are recorded with its checksum and then hold by themselves.
        cache: keep the backbone as safetensors beside the file for quick later loads of `method`.
            True trusts it while time stamps, size and ending (a zip lists its CRCs there) are
            unchanged, "verify" checks the CRC of its tensors too.
    Returns:
        model: torchvision ResNet50 with `fc` replaced by Identity, eval mode, on the CPU;
            (N, 3, H, W) images to (N, 2048) features.
        report: the `KeyReport`.
    Raises:
        CheckpointError: anything but 318 right tensors of the method that was asked for.
    """
    if method is not None:
        if Path(str(method)).suffix or Path(str(method)).name != str(method):
            raise ValueError(f"method={method!r} looks like a file: give it as path=.")
        check_choice(method, (*METHODS, *CONTROLS), "method")
    check_choice(weights, ("stand-in", "published"), "weights")
    if cache not in (True, False, "verify"):
        raise ValueError(f"cache={cache!r} is not known. Choose True, False or 'verify'.")
    if path is None and method is None:
        raise ValueError("Give a method, or the path of a file whose method is to be recognised.")
    if method in CONTROLS and path is None:
        tensors, report = _load_control(method, seed)
        report = replace(report, beside_stand_ins=weights == "stand-in")
    else:
        file = _locate(method, weights, _path(folder)) if path is None else _path(path)
        with _about(file):
            tensors, report = (
                _load_exported(method, file) if _is_exported(file) else
                _load_file(method, file, "file" if path else weights, _extras(allow_extra),
                           cache))
    model = pickle.loads(_empty_backbone())
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval(), report


_Entries = Mapping[str, Any]  # what a state_dict holds: `_Stored`, and whatever else was saved
_Loaded = tuple[dict[str, torch.Tensor], KeyReport]  # the 318 tensors, and what there is to say


def _locate(method: str, weights: str, folder: Path) -> Path:
    """Return the stand-in or published file of a method, written or fetched where it is absent."""
    name = CHECKPOINTS[method].filename
    if weights == "published":
        # one that is there is checked as it is loaded: no need to read it twice
        return folder / name if (folder / name).is_file() else download_checkpoint(method, folder)
    path = folder / "stand-in" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):  # another process may be writing it
            if not path.exists():
                write_demo_checkpoint(method, path.parent)
    return path


@functools.cache
def _empty_backbone() -> bytes:
    """torchvision's ResNet50 without `fc` and without memory, pickled: copied so most quickly."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    model.fc = nn.Identity()
    return pickle.dumps(model)


@functools.cache
def _backbone_layout() -> dict[str, torch.Tensor]:
    """The 318 entries of a ResNet50 without `fc`: name -> tensor without memory."""
    return pickle.loads(_empty_backbone()).state_dict()


def _load_control(method: str, seed: int) -> _Loaded:
    """torchvision's initialisation under `seed`, or its ImageNet weights (cached or downloaded)."""
    if method == "random":
        with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
            torch.default_generator.manual_seed(seed)
            state = torchvision.models.resnet50().state_dict()
        told = {"notes": (f"torchvision's initialisation, seed {seed}",)}
    else:
        source = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
        name = source.url.rsplit("/", 1)[-1]
        try:
            state = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"The ImageNet weights could not be had from {source.url} ({error}). Put {name} "
                f"into {torch.hub.get_dir()}/checkpoints by hand, or leave ImageNet out.") from None
        told = {"path": name, "notes": (f"torchvision {source}",),
                "groups": {"fc.": (2, "ImageNet classifier")}}
    tensors = {name: state[name] for name in _backbone_layout()}
    changed = 0 if method == "random" else _changed(tensors)
    return tensors, KeyReport(
        method, method, changed=changed, fingerprint=_fingerprint(tensors), **told)


def _load_file(
    method: str | None, path: Path, weights: str, allow_extra: tuple[str, ...], cache: bool | str,
) -> _Loaded:
    """Return the 318 tensors of a checkpoint and their report, from its cache where current."""
    recorded = _checksums(path.parent).get(path.name, {})
    allow_extra = (*dict.fromkeys((*recorded.get("allow_extra", ()), *allow_extra)),)
    cache = cache if method else False  # only the original tells its method
    cached = _load_cache(method, path, allow_extra, cache == "verify") if cache else None
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    tensors, report = cached or _load_original(method, path, allow_extra)
    if path.stat().st_mtime_ns != stamp:
        raise CheckpointError("it was replaced while it was read: try again")
    _check_origin(path, weights, report, recorded)
    if cache and cached is None:
        with contextlib.suppress(OSError):  # in a read-only folder there is no cache
            written = _save_backbone(tensors, _cache_path(path), report, _ending(path))
            os.utime(written, ns=(stamp, stamp))
    told = (f"no method was asked for: its keys are those of {report.method}",) * (method is None)
    return tensors, replace(report, weights=report.weights if report.demo else weights,
                            path=path.name, notes=(*report.notes, *told))


def _agree(asked: str | None, found: str, evident: bool = True) -> None:
    """Refuse a file of one method that was asked for as another."""
    if asked not in (None, found):
        advice = (f"{asked} is loaded without a path" if asked in CONTROLS else
                  f"ask for {found!r}, or give the {asked} file")
        doubt = "" if evident else " (another ResNet50 may have the same names)"
        raise CheckpointError(
            f"it is a {found} checkpoint, but {asked} was asked for: {advice}{doubt}")


def _check_origin(
    path: Path, weights: str, report: KeyReport, recorded: Mapping[str, Any],
) -> None:
    """Keep stand-in and published files apart; hold a file against its recorded checksum, which
    the first load of a published file that passes every check records."""
    if weights != "file" and report.demo != (weights == "stand-in"):
        raise CheckpointError(
            "it is a stand-in with random weights, not the published file: delete it and fetch "
            "that (notebook 01)" if report.demo else "it has no stand-in's mark: move it away and "
            "give its path; a stand-in will be written here")
    if weights == "published" and not recorded:
        recorded = _record_checksum(path, report.sha256, report.allow_extra)
    if recorded and recorded["sha256"] != report.sha256:
        raise CheckpointError(
            f"its SHA-256 is {report.sha256}, but at its first load it was {recorded['sha256']} "
            "(checksums.json): other bytes under the same name. Fetch it again, or delete that "
            "entry if the published file was replaced")


def _load_original(method: str | None, path: Path, allow_extra: tuple[str, ...]) -> _Loaded:
    """Open, match, read and check a checkpoint as its authors saved it."""
    with ThreadPoolExecutor(1) as pool:
        # hashing takes as long as all the rest: side by side, but for a file beyond all measure
        usual = path.is_file() and path.stat().st_size < 1 << 30
        digest = pool.submit(_digest, path) if usual else None
        top, records, names = _open_checkpoint(path, allow_extra)
        entries, wrapper = _unwrap(top)
        if ddp := all(key.startswith("module.") for key in entries):
            entries = {key.removeprefix("module."): entry for key, entry in entries.items()}
        found, prefix = _recognise(entries)
        known = CHECKPOINTS[found]
        evident = known.wrapper == "module" in wrapper or any(
            key.startswith(tuple(known.groups)) for key in entries)
        _agree(method, found, evident)
        backbone, filled = _take_backbone(entries, prefix)
        groups = _sort_rest(entries, prefix, known, allow_extra)
        accepted = tuple(extra for extra in allow_extra if extra in names or extra in groups)
        if method is None and not evident:
            raise CheckpointError("it holds a ResNet50 and nothing that tells the method: name it")
        tensors = _read_tensors(path, records, backbone) | {n: torch.tensor(0) for n in filled}
        _check_values(tensors)
        changed = _changed(tensors)
        notes = {
            "every key began with module. (DistributedDataParallel), which was removed": ddp,
            "53 num_batches_tracked were absent (PyTorch < 0.4.1): set to 0": filled,
            "legacy format (PyTorch < 1.6) without CRC: damage can go unnoticed":
                None in (crc for _, _, crc in records.values()),
            f"the backbone lay under {prefix}, not where the published file has it":
                prefix != known.prefix,
            "only the 53 convolutions differ from a fresh network: perhaps it was never trained":
                changed == 53,
            f"nothing but the prefix {prefix!r} of its keys says that this is {found}": not evident,
            f"accepted by you beyond what is known: {_few(accepted)}": accepted}
        return tensors, KeyReport(
            found, "stand-in" if STAND_IN_MARK in top else "file", path.name, path.stat().st_size,
            changed=changed, groups=groups, fingerprint=_fingerprint(tensors),
            missing_keys=tuple(
                key for key in (*_backbone_layout(), *README_MISSING) if key not in tensors),
            unexpected_keys=tuple(key for key in entries if not _is_backbone(key, prefix)),
            allow_extra=accepted, notes=tuple(note for note, true in notes.items() if true),
            sha256=digest.result() if digest else _digest(path))


def _recognise(entries: _Entries) -> tuple[str, str]:
    """Return method and prefix under which most of a ResNet50's 318 names are found."""
    counts = {(known.method, prefix): sum(prefix + name in entries for name in _backbone_layout())
              for known in CHECKPOINTS.values() for prefix in (known.prefix, known.other_prefix)
              if prefix is not None}
    best = max(counts, key=counts.get)
    if not counts[best]:
        raise CheckpointError(
            f"0 of 318 backbone tensors: none of its {len(entries)} keys is a known prefix and a "
            f"ResNet50's name; they begin with "
            f"{_few(dict.fromkeys(key.split('.')[0] for key in entries))}")
    return best


def _is_backbone(key: str, prefix: str) -> bool:
    """Say whether a key belongs to a part that a ResNet50 has."""
    name = key.removeprefix(prefix)
    return key == prefix + name and bool(re.match(r"(conv1|bn1|layer[1-4])(\.|$)", name))


def _take_backbone(entries: _Entries, prefix: str) -> tuple[dict[str, _Stored], list[str]]:
    """Return the backbone by ResNet50 name, and the counters to be filled with 0; else raise."""
    layout = _backbone_layout()
    own = {key[len(prefix):]: value for key, value in entries.items() if _is_backbone(key, prefix)}
    foreign = [name for name in own if name not in layout]
    missing = [name for name in layout if not isinstance(own.get(name), _Stored)]
    backbone = {name: own[name] for name in layout if name not in missing}
    other = [f"{name} is {entry.shape} {entry.dtype}, not {tuple(layout[name].shape)} "
             f"{layout[name].dtype}" for name, entry in backbone.items()
             if (entry.shape, entry.dtype) != (layout[name].shape, layout[name].dtype)]
    places = sorted((entry.record, str(entry.dtype), entry.offset, math.prod(entry.shape), name)
                    for name, entry in backbone.items())
    shared = [first[-1] for first, second in itertools.pairwise(places)
              if first[:2] == second[:2] and first[2] + first[3] > second[2]]
    counters = [name for name in layout if name.endswith("num_batches_tracked")]
    filled = counters if missing == counters and not set(counters) & set(own) else []
    faults = [f"{len(names)} {words} (first: {names[0]})" for names, words in (
        (foreign, "keys that a ResNet50 doesn't have"), (other, "tensors of another kind"),
        ([] if filled else missing, "of 318 tensors missing"),
        (shared, "tensors that overlap another")) if names]
    if faults:
        raise CheckpointError("its backbone isn't a whole ResNet50: " + "; ".join(faults))
    return backbone, filled


def _sort_rest(
    entries: _Entries, prefix: str, known: Checkpoint, allow_extra: tuple[str, ...],
) -> dict[str, tuple[int, str]]:
    """Sort what isn't backbone into the method's known groups: group -> (keys, words); or raise."""
    words = {name: "accepted by allow_extra" for name in allow_extra} | dict(known.groups)
    roots = {name.split(".")[0] + "." for name in (prefix, *known.groups)}
    counts, unknown = Counter(), {}
    for key in (key for key in entries if not _is_backbone(key, prefix)):
        group = next((g for g in words if key == g or g.endswith(".") and key.startswith(g)), None)
        if group is None:
            root = key.split(".")[0] + "."  # what begins as a known part does is named by more
            known_part = prefix if key.startswith(prefix) else root if root in roots else ""
            start = known_part + key.removeprefix(known_part).split(".")[0] + "."
            unknown[start if key.startswith(start) else key] = None
        counts[group] += 1
    if unknown:
        raise CheckpointError(
            f"it holds keys that a {known.method} checkpoint isn't known to have: {_few(unknown)}; "
            f"if they may be left out, {_accepting((*allow_extra, *unknown))}")
    return {group: (counts[group], words[group]) for group in words if counts[group]}


def _check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse numbers that no trained network has: NaN, Inf, zero filters, negative variances."""
    for name, tensor in tensors.items():
        array = tensor.numpy()  # torch would take the processor that hashes the file meanwhile
        low, high = float(array.min()), float(array.max())
        fault = ("NaN or Inf" if not (math.isfinite(low) and math.isfinite(high)) else
                 "nothing but zeros" if tensor.dim() == 4 and low == high == 0 else
                 f"negative values ({low:g})" if low < 0 and name.endswith(
                     ("running_var", "num_batches_tracked")) else None)
        if fault:
            raise CheckpointError(f"{name} holds {fault}: the training failed, or the file is "
                                  "damaged")


def _fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and numbers in name order, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _crc32(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 over the numbers in name order: finds damage, in half the time of a SHA-256."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().numpy().reshape(-1).view(np.uint8), crc)
    return f"{crc:08x}"


def _changed(tensors: Mapping[str, torch.Tensor]) -> int:
    """Count tensors that differ from a fresh initialisation: BatchNorm's begin as 0 or 1, and a
    convolution's are drawn anew each time."""
    return sum(tensor.dim() == 4 or bool((tensor != name.endswith(("weight", "running_var"))).any())
               for name, tensor in tensors.items())


# Convert ----------------------------------------------------------------------

EXPORT_MARK = "medssl_utils.export_backbone"


def export_backbone(model: nn.Module, path: str | Path, report: KeyReport) -> Path:
    """Write a backbone, and nothing else, as safetensors with its provenance in the metadata.

    Args:
        model: as `load_backbone` returned it.
        path: where to write (`.safetensors`); replaced at once, never half.
        report: its report; the metadata holds it whole (`report`, JSON) and in parts.
    Returns:
        The path.
    Raises:
        CheckpointError: the weights are no longer those that the report speaks of.
        ValueError: the name doesn't end in `.safetensors`, by which `load_backbone` knows it.
    """
    path, state = _path(path), model.state_dict()
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: the name of an exported backbone must end in .safetensors.")
    tensors = {name: state[name].cpu() for name in _backbone_layout() if name in state}
    if _fingerprint(tensors) != report.fingerprint:
        raise CheckpointError("The model's weights are no longer those of its report: export a "
                              "backbone as load_backbone returned it, before it is trained.")
    return _save_backbone(tensors, path, report)


def _save_backbone(
    tensors: Mapping[str, torch.Tensor], path: Path, report: KeyReport, ending: str = "",
) -> Path:
    """Write tensors and report; for a cache, also the `_ending` of the file that they are from."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    metadata = {"format": "pt", "written_by": EXPORT_MARK, "method": report.method,
                "weights": report.weights, "source": report.path, "source_sha256": report.sha256,
                "fingerprint": report.fingerprint, "crc32": _crc32(tensors), "ending": ending,
                "report": json.dumps(dataclasses.asdict(report))}
    with _atomic(path) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
        except (SafetensorError, UnicodeError) as error:  # a full disk, a name that is no UTF-8
            raise OSError(f"{path} cannot be written: {error}") from error
    return path


def _read_backbone(path: Path) -> tuple[dict[str, torch.Tensor], KeyReport, dict[str, str]]:
    """Map a file that `_save_backbone` wrote: tensors, report, metadata. Such a file is replaced
    whole, so the map can't change."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("written_by") != EXPORT_MARK:
            raise ValueError("export_backbone didn't write it")
        report = _parse_report(metadata["report"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"it is no exported backbone, or one of another version ({error}): "
                              "export it anew") from None
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in _backbone_layout().items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != layout:
        raise CheckpointError("its tensors are not those of a ResNet50 backbone")
    return tensors, report, metadata


def _parse_report(text: str) -> KeyReport:
    """Return the report that a file holds as JSON; ValueError or TypeError if it can't be ours."""
    report = KeyReport(**json.loads(text, object_hook=lambda fields: {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}))
    blank = KeyReport("", "")
    if any(type(value) is not type(getattr(blank, name)) for name, value in vars(report).items()):
        raise ValueError("its report has a field of another type")
    shown = (report.path, *report.missing_keys, *report.allow_extra, *report.notes, *(
        text for group, (_, words) in report.groups.items() for text in (group, words)))
    if not (all(isinstance(text, str) and text.isprintable() for text in shown)
            and report.method in (*METHODS, *CONTROLS) and report.loaded == report.expected == 318):
        raise ValueError("its report is not one that load_backbone makes")
    return report


def _is_exported(path: Path) -> bool:
    """Say whether a file is safetensors by its name and by how it begins."""
    return (path.suffix.lower() == ".safetensors" and path.is_file()
            and _what(_beginning(path, 1 << 10)).startswith("a safetensors"))


def _load_exported(method: str | None, path: Path) -> _Loaded:
    """Return tensors and report of an exported backbone, verified."""
    tensors, report, _ = _read_backbone(path)
    _agree(method, report.method)
    if _fingerprint(tensors) != report.fingerprint:
        raise CheckpointError("its tensors are not those it was written with (fingerprint)")
    _check_values(tensors)
    origin = f"exported from {report.path or report.method}"
    return tensors, replace(report, weights=report.weights if report.demo else "file",
                            path=path.name, notes=(*report.notes, origin))


def _cache_path(path: Path) -> Path:
    return Path(f"{path}.backbone.safetensors")


def _ending(path: Path) -> str:
    """SHA-256 of a file's size and last 256 KiB. There a zip lists the CRCs of its records: other
    weights have another ending, also under the same size and time stamp."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - (1 << 18), 0))
        return hashlib.sha256(b"%d " % size + file.read()).hexdigest()


def _load_cache(
    method: str, path: Path, allow_extra: tuple[str, ...], verify: bool,
) -> _Loaded | None:
    """Return a file's converted backbone, or None: it is then written anew from the original,
    which also knows better words for a mix-up."""
    with contextlib.suppress(CheckpointError, OSError):
        if path.stat().st_mtime_ns == _cache_path(path).stat().st_mtime_ns:  # neither was touched
            tensors, report, metadata = _read_backbone(_cache_path(path))
            if (report.method == method and {*report.allow_extra} <= {*allow_extra}
                    and metadata.get("ending") == _ending(path)
                    and not (verify and _crc32(tensors) != metadata.get("crc32"))):
                return tensors, report
    return None


# =============================================================================
# Data
# =============================================================================


SPLITS = ("train", "val", "test")
MEDMNIST = (
    "pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist",
    "breastmnist", "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist",
)
DATASETS: dict[str, str] = {
    "phantom": "CT-like slices drawn here, nothing is downloaded; results are stamped DEMO",
    "covid_ct": "COVID-CT (UCSD-AI4H), 746 CT slices, official split; fetched by the user",
    **{flag: f"MedMNIST {flag}, 28 x 28 pixels, enlarged for the network" for flag in MEDMNIST},
    **{f"{flag}_{size}": f"MedMNIST {flag}, natively {size} x {size} pixels, another file"
       for flag in MEDMNIST for size in (64, 128, 224)},
}


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set, in memory or mapped from disk.

    Attributes:
        images: (N, H, W) grey or (N, H, W, 3) RGB; uint8 0..255, or float32 in the same range.
        labels: (N,) int64 class indices; multi-label: (N, L) int64 of 0 and 1.
        ids: (N,) str, unique within the data set (file name or index).
        groups: (N,) str patient ids, "" where unknown; None if the data set has none.
        articles: (N,) str publications that the images were cut from, "" where unknown, or None.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray | None = None
    articles: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.images.shape[1:]))
        return f"Split({len(self)} images, {shape} {self.images.dtype})"

    def take(self, index: np.ndarray) -> Split:
        """Return the images at `index` as a new Split."""
        return Split(*(None if c is None else c[index] for c in vars(self).values()))

    @property
    def ids_fingerprint(self) -> str:
        """SHA-256 of the ids alone: which images these are, at whatever size."""
        return hashlib.sha256("\n".join(map(str, self.ids)).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, labels and pixels."""
        digest = hashlib.sha256(self.ids_fingerprint.encode())
        for array in (self.labels, self.images):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set as the training code sees it.

    Attributes:
        name: the name it was asked for by.
        train, val, test: disjoint `Split`s.
        class_names: C names; label i is class_names[i].
        mean, std: per-channel intensity statistics for normalising, in units of [0, 1].
        source: one line: where it came from, its licence.
        demo: True for procedural images, whose results are stamped DEMO.
        notes: facts the reader should know (excluded files, known overlaps).
        task: "binary", "multi-class", "ordinal" or "multi-label".
        published_split: True if the split is the publisher's and is kept as it is, overlaps
            included, so that results can be compared with others'.
    """

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    demo: bool = False
    notes: tuple[str, ...] = ()
    task: str = "binary"
    published_split: bool = False

    @property
    def parts(self) -> dict[str, Split]:
        """The three parts by name."""
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of train, val and test."""
        parts = "".join(part.fingerprint for part in self.parts.values())
        return hashlib.sha256(parts.encode()).hexdigest()


def load_data(
    dataset: str | Path = "phantom", *, image_size: int = 224, data_dir: str | Path = "data",
    seed: int = 0, download: bool = True, dtype: str = "uint8", split: str = "official",
    unofficial: bool = False, options: ReadOptions | None = None,
) -> DataSplits:
    """Load a data set by name, or a folder of your own images by its path.

    Images that share one size keep it ("organsmnist" stays at 28 x 28 and is enlarged by the
    training code; "organsmnist_224" is another file, natively 224 x 224). Images of many sizes
    (COVID-CT, folders) are area-resized here to `image_size`, the rule of the authors' MONAI
    `Resize`. A folder that has no test or validation part gets it from its training images:
    stratified, patients whole, by `seed`; the split is written into `data_dir`, see `notes`.

    Args:
        dataset: a name in DATASETS, the path of a folder or CSV file as `read_folder` takes it, or
            of a folder in COVID-CT's published layout.
        image_size: side in pixels of the phantoms, and of images that come in many sizes.
        data_dir: where MedMNIST's `<name>.npz` and the folder `covid_ct` are, or are put, and the
            decoded images of folders.
        seed: of the phantoms, and of a split that is drawn here.
        download: fetch a missing MedMNIST file from its publisher.
        dtype: "uint8", or "float32": resized images stay unrounded (the paper recipe), 0..255.
        split: "official", or "grouped": train, val and test are drawn anew so that no patient
            or article is in two of them.
        unofficial: accept a MedMNIST file whose MD5 isn't the official one; noted in the result.
        options: how the files of a folder are read.

    Raises:
        ValueError: unknown name or option; a file that isn't what it should be.
        FileNotFoundError: data that the user has to fetch; says from where and where to put it.
    """
    check_choice(dtype, ("uint8", "float32"), "dtype")
    check_choice(split, ("official", "grouped"), "split")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, not {image_size}.")
    name, data_dir = os.path.expanduser(str(dataset)), _path(data_dir)
    if name == "phantom":
        data = demo_data(seed, image_size=image_size)
    elif name == "covid_ct":
        data = _load_covid_ct(data_dir / "covid_ct", image_size, dtype)
    elif name in DATASETS:
        data = _load_medmnist(name, data_dir, download, unofficial)
    elif name and Path(name).exists() or "/" in name or os.sep in name:
        data = _load_folder(Path(name), image_size, dtype, options, data_dir, seed)
    else:
        named = [known for known in DATASETS if not known[-1].isdigit()]
        try:
            check_choice(name, named, "dataset")
        except ValueError as error:
            raise ValueError(f"{error} A MedMNIST name may end in _64, _128 or _224; a folder is "
                             f"given by its path, as seen from {Path.cwd()}.") from None
    return data if split == "official" else _regroup(data, seed)


# MedMNIST --------------------------------------------------------------------


def _load_medmnist(name: str, data_dir: Path, download: bool, unofficial: bool) -> DataSplits:
    """Load one file of the MedMNIST catalogue; `name` ends in the size unless that is 28."""
    from medmnist import INFO                                        # slow to import

    flag, _, size = name.partition("_")
    info, suffix = INFO[flag], f"_{size}" if size else ""
    path = data_dir / f"{name}.npz"
    notes = _fetch_medmnist(path, info[f"url{suffix}"], info[f"MD5{suffix}"], download, unofficial)
    task = {"binary-class": "binary", "ordinal-regression": "ordinal",
            "multi-label, binary-class": "multi-label"}.get(info["task"], info["task"])
    parts = _read_medmnist(path, task)
    for part, count in info["n_samples"].items():
        if len(parts[part]) != count:
            notes.append(f"{part}: {len(parts[part]):,} images, the catalogue says {count:,}.")
    return DataSplits(
        name=name, **parts, class_names=tuple(info["label"].values()),
        mean=(0.5,) * 3, std=(0.5,) * 3, task=task, notes=tuple(notes), published_split=True,
        source=f"MedMNIST {info['python_class']}, {size or 28} px, {info[f'url{suffix}']}, "
               f"licence {info['license']}",
    )


def _fetch_medmnist(path: Path, url: str, md5: str, download: bool, unofficial: bool) -> list[str]:
    """Make sure that `path` is the official file; return notes for the result."""
    by_hand = f"By hand: fetch {url}, check its MD5 ({md5}) and save it as {path}."
    if not path.exists():
        if not download:
            raise FileNotFoundError(f"{path} is missing and download is off. {by_hand}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                if not path.exists():                                # another process was first
                    _transfer(url, path, {"md5": md5}, timeout=60, retries=3, quiet=False)
        except (CheckpointError, OSError) as error:
            raise OSError(f"{path.name} could not be downloaded: {error}\n{by_hand}") from error
        return []
    problem = _file_problem(path, {"md5": md5})
    if problem and not unofficial:
        raise ValueError(
            f"{path} is not the official file: {problem}. Move it away and load again to fetch "
            f"the official one, or pass unofficial=True to use it as it is.")
    return [f"{path.name} is not the official file: {problem}; it was accepted because "
            f"unofficial=True."] if problem else []


def _read_medmnist(path: Path, task: str) -> dict[str, Split]:
    """Read the three splits of a MedMNIST `.npz`; single labels become (N,)."""
    parts = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for part in SPLITS:
                images, labels = file[f"{part}_images"], file[f"{part}_labels"].astype(np.int64)
                labels = labels if task == "multi-label" else labels.reshape(-1)
                if (images.dtype != np.uint8 or images.shape[3:] not in ((), (3,))
                        or images.ndim < 3 or len(images) != len(labels)):
                    raise ValueError(f"{part}_images are {images.dtype} of shape {images.shape}, "
                                     f"beside {len(labels)} labels")
                ids = np.array([f"{part}/{i:06d}" for i in range(len(labels))])
                parts[part] = Split(images, labels, ids)
    except Exception as error:                                       # damaged files raise anything
        raise ValueError(f"{path} can't be read as a MedMNIST file ({_reason(error, path)}). It "
                         f"must hold train_images (N, H, W) or (N, H, W, 3), uint8, train_labels "
                         f"of as many rows, and the same for val and test.") from error
    return parts


# COVID-CT --------------------------------------------------------------------

COVID_CT_CLASSES = ("COVID", "NonCOVID")      # the authors' order: COVID is label 0
COVID_CT_URL = "https://github.com/UCSD-AI4H/COVID-CT"
COVID_CT_ARTICLE = r"CT_COVID/(.+?)(?:-p\d+-|_\d|%\d|\.\w+$|$)"  # files bear its name first
COVID_CT_MEAN, COVID_CT_STD = (0.5600, 0.5596, 0.5596), (0.2905, 0.2907, 0.2908)  # authors' code


def _load_covid_ct(folder: Path, image_size: int, dtype: str) -> DataSplits:
    """Load COVID-CT from its repository's layout, as folders or as the published zip files."""
    if not (folder / "Data-split").is_dir():
        raise FileNotFoundError(
            f"COVID-CT is not in {folder}. Its licence is unclear, so it is never downloaded "
            f"for you: clone {COVID_CT_URL} and copy or link its Images-processed/ and "
            f"Data-split/ there.")
    files = {name: _covid_ct_images(folder, f"CT_{name}") for name in COVID_CT_CLASSES}
    patients, notes = _covid_ct_patients(folder)
    table = pd.concat([_covid_ct_list(folder, part, label, files[COVID_CT_CLASSES[label]])
                       for part in SPLITS for label in range(2)], ignore_index=True)
    images, broken, jpegs = np.empty((len(table), image_size, image_size, 3), dtype), [], 0
    found = _read_files(table["file"].tolist(), functools.partial(
        _read_file, options=ReadOptions(), size=image_size, dtype=dtype))
    for (fact, pictures), row in zip(found, table.itertuples()):
        broken += [f"{row.id}: {fact['reason']}"] if fact["reason"] else []
        jpegs += fact["kind"] == "JPEG" and row.id.endswith(".png")
        for picture in pictures:
            images[row.Index] = picture if picture.ndim == 3 else picture[..., None]
    if broken:
        raise ValueError(f"{len(broken)} of {len(table)} images can't be read:\n  "
                         + "\n  ".join(broken))
    pool = Split(images, table["label"].to_numpy(), table["id"].to_numpy(str),
                 np.array([patients.get(i.rpartition(".")[0], "") for i in table["id"]]),
                 table["id"].str.extract(COVID_CT_ARTICLE)[0].fillna("").to_numpy(str))
    notes += [f"{jpegs} JPEG files are named .png."] if jpegs else []
    left = sum(map(len, files.values())) - len(table)
    notes += [f"{left} images are in no split list and were left out."] if left else []
    unknown = int((pool.groups == "").sum())
    notes += [f"The patient is not known for {unknown} of {len(table)} images."] if unknown else []
    parts = {part: pool.take((table["part"] == part).to_numpy()) for part in SPLITS}
    return DataSplits(
        name="covid_ct", **parts, class_names=COVID_CT_CLASSES,
        mean=COVID_CT_MEAN, std=COVID_CT_STD, notes=tuple(notes), published_split=True,
        source=f"COVID-CT, official split, {COVID_CT_URL}; rights stay with the articles' authors",
    )


def _covid_ct_images(folder: Path, kind: str) -> dict[str, Path | zipfile.Path]:
    """Map file name to path, if need be within a zip, of the images of `kind` (CT_COVID ...)."""
    for root in (folder, folder / "Images-processed"):
        place = root / kind
        if not place.is_dir() and (packed := root / f"{kind}.zip").is_file():
            try:
                place = zipfile.Path(packed, f"{kind}/")
            except zipfile.BadZipFile as error:
                raise ValueError(f"{packed} is no whole zip file ({error}). Copy it again from "
                                 f"{COVID_CT_URL}.") from error
        if place.is_dir():
            return {p.name: p for p in place.iterdir() if p.is_file() and p.name[0] != "."}
    raise FileNotFoundError(f"{folder} has neither {kind}/ nor {kind}.zip, also not in "
                            f"Images-processed/. Copy it from {COVID_CT_URL}.")


def _covid_ct_list(
    folder: Path, part: str, label: int, files: Mapping[str, Path | zipfile.Path],
) -> pd.DataFrame:
    """Read the split list of a part and class: its images' part, label, id and file."""
    kind = COVID_CT_CLASSES[label]
    path = folder / "Data-split" / kind / f"{part}CT_{kind}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"The split list {path} is missing. Copy Data-split/ from "
                                f"{COVID_CT_URL}.")
    listed = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if missing := [name for name in listed if name not in files]:
        raise FileNotFoundError(f"{len(missing)} of {len(listed)} images named in {path} are "
                                f"missing, among them {missing[:3]}.")
    return pd.DataFrame({"part": part, "label": label, "id": [f"CT_{kind}/{n}" for n in listed],
                         "file": [files[name] for name in listed]})


def _covid_ct_patients(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Map "CT_COVID/stem" to a patient id by the meta tables that are there; return notes too."""
    tables = (("manifest.csv", "path", "patient_id", ""),
              ("COVID-CT-MetaInfo.xlsx", "File name", "Patient ID", "CT_COVID/"),
              ("NonCOVID-CT-MetaInfo.csv", "image name", "patient id", "CT_NonCOVID/"))
    patients: dict[str, str] = {}
    notes = []
    for filename, column, patient, prefix in tables:
        if not (folder / filename).is_file():
            continue
        read = pd.read_csv if filename.endswith(".csv") else pd.read_excel
        try:
            table = read(folder / filename, dtype=str)[[column, patient]].dropna()
        except Exception as error:                                   # no openpyxl, damage, ...
            notes.append(f"{filename} could not be used: {error}")
            continue
        stems = (prefix + table[column].str.strip()).str.replace(r"\.(png|jpe?g)$", "", regex=True)
        patients.update(zip(stems, table[patient].str.strip(), strict=True))
    return patients, notes if patients or notes else ["No meta table: patients are unknown."]


# Folders of images -----------------------------------------------------------

# Centre and width in Hounsfield units, as radiologists commonly set them.
WINDOWS = {"lung": (-600, 1500), "soft tissue": (50, 400), "bone": (400, 1800), "brain": (40, 80)}
PLANES = ("sagittal", "coronal", "axial")     # across the patient's axes: right, front, top
SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val",
                 "validation": "val", "test": "test", "testing": "test"}
LIST_COLUMNS = ["path", "label", "split", "patient"]
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")    # of macOS, Synology, Windows
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")    # of Pillow: no format that runs a program
FILE_KINDS = {**dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"), "image"),
              ".dcm": "DICOM", ".dicom": "DICOM", ".ima": "DICOM", ".nii": "NIfTI"}
MAX_PIXELS, MAX_FILE_PIXELS, MAX_PICTURES = 50_000_000, 500_000_000, 10_000   # the last: a file
DICOM_DEFERRED = 1 << 26      # bytes: larger elements are read after the header was checked
DICOM_TAGS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel",
              "PixelRepresentation", "PhotometricInterpretation")


@dataclass(frozen=True)
class ReadOptions:
    """How the files of a folder become pictures.

    Pictures of 8 bits a channel stay as they are; deeper colour is refused. Deeper grey values
    (16-bit PNG and TIFF, DICOM after its rescale slope and intercept, NIfTI) are scaled to 0..255
    linearly: over `window`, or by default over each picture's own range, as the checkpoints'
    pre-training slices were.

    Attributes:
        on_error: "stop" with a list of all files that can't be read, or "skip" them.
        window: "", a name in WINDOWS (Hounsfield units), or "centre, width" in the file's own
            units. What lies outside becomes black or white.
        slices: which pictures of a file that holds several (NIfTI volume, multi-frame DICOM,
            TIFF with pages): "middle", "all", or how many, evenly spaced.
        plane: one of PLANES, in which NIfTI volumes are cut.
        patient: regular expression; its first group, searched in the path, is the patient's id.
            Without it DICOM's PatientID is, or the column of a CSV file.
    """

    on_error: str = "stop"
    window: str = ""
    slices: str = "middle"
    plane: str = "axial"
    patient: str = ""

    def __post_init__(self) -> None:
        check_choice(self.on_error, ("stop", "skip"), "on_error")
        check_choice(self.plane, PLANES, "plane")
        if not re.fullmatch(r"middle|all|[1-9]\d*", str(self.slices)):
            raise ValueError(f"slices is {self.slices!r}; it must be 'middle', 'all' or a number "
                             f"above 0.")
        groups = 0
        with contextlib.suppress(re.error):
            groups = re.compile(self.patient or "()").groups
        if groups != 1:
            raise ValueError(f"patient is {self.patient!r}; it must be a regular expression with "
                             f"one group in brackets, such as 'patient(\\d+)'.")
        two = re.fullmatch(r"\s*-?\d+(\.\d+)?\s*,\s*\d+(\.\d+)?\s*", self.window)
        if not (two and self.limits[0] < self.limits[1] or self.window in ("", *WINDOWS)):
            raise ValueError(f"window {self.window!r} is not known. Choose one of: "
                             f"{', '.join(WINDOWS)}, 'centre, width' with a width above 0, or ''.")

    @property
    def limits(self) -> tuple[float, float] | None:
        """The window's ends, None for each picture's own range."""
        if not self.window:
            return None
        centre, width = WINDOWS.get(self.window) or map(float, self.window.split(","))
        return centre - width / 2, centre + width / 2


@dataclass(frozen=True, eq=False)
class Folder:
    """The pictures of a folder, decoded.

    Attributes:
        name: the folder's name.
        images: (N, S, S) grey or (N, S, S, 3) RGB, mapped from disk.
        table: N rows: id, path, label, split, patient ("" where unknown), kind, mode, width,
            height.
        broken: path and reason of each file that could not be read.
        notes: what was left out, skipped, scaled, or is odd.
        cache: the file that `images` are mapped from.
    """

    name: str
    images: np.ndarray
    table: pd.DataFrame
    broken: pd.DataFrame
    notes: tuple[str, ...]
    cache: Path

    def split(self, class_names: Sequence[str]) -> Split:
        """Return all pictures as a Split; class i is class_names[i].

        Raises:
            ValueError: a label is none of `class_names`.
        """
        if strange := sorted(set(self.table["label"]) - set(class_names)):
            raise ValueError(f"{self.name} has images of class {', '.join(map(repr, strange))}; "
                             f"expected: {', '.join(class_names)}.")
        labels = self.table["label"].map({name: i for i, name in enumerate(class_names)})
        patients = self.table["patient"].to_numpy(str)
        return Split(self.images, labels.to_numpy(np.int64, copy=True),  # or torch would warn
                     self.table["id"].to_numpy(str), patients if (patients != "").any() else None)


def read_folder(
    folder: str | Path, options: ReadOptions | None = None, *, image_size: int = 224,
    dtype: str = "uint8", data_dir: str | Path = "data", labelled: bool = True,
) -> Folder:
    """Read PNG, JPEG, TIFF, BMP, DICOM and NIfTI files, once: the next call maps the pixels.

    Layouts: a folder for each class; train, val and test with a folder for each class in them; a
    CSV file (columns path, label and, if you like, split and patient; paths start where it lies),
    given by its path or as the only CSV in the folder.

    EXIF rotation is applied; transparency, and NaN as outside of a scan, show black. Decoded
    pictures are kept in `data_dir`/decoded under the files' paths, sizes, times of change and these
    options.

    Args:
        image_size: side in pixels of the pictures, area-resized.
        labelled: False takes every image below the folder, without labels.

    Raises:
        FileNotFoundError: no such folder, or a file listed in the CSV is missing.
        ValueError: an unknown layout or dtype, no image, or files that can't be read, all of them
            named.
    """
    check_choice(dtype, ("uint8", "float32"), "dtype")
    options, folder = options or ReadOptions(), _path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}: looked for {folder.absolute()}.")
    files, left_out = _list_folder(folder, labelled)
    notes = [f"Left out: {', '.join(f'{n} {what}' for what, n in sorted(left_out.items()))}."]
    notes = notes if left_out else []
    if files.empty:
        raise ValueError(f"{folder} holds no PNG, JPEG, TIFF, BMP, DICOM or NIfTI image. "
                         + " ".join(notes))
    cache, known = _decoded(files["file"].tolist(), options, image_size, dtype, _path(data_dir))
    files = pd.concat([files, pd.DataFrame(known["facts"])], axis=1)
    broken = files.loc[files["reason"] != "", ["path", "reason"]].reset_index(drop=True)
    classes = (files["split"] + "/" + files["label"]).str.strip("/")
    lost = sorted(set(classes) - set(classes[files["reason"] == ""]))
    if len(broken) and (options.on_error == "stop" or lost):
        listed = "\n  ".join(f"{path}: {reason}" for path, reason in broken.itertuples(index=False))
        raise ValueError(f"{len(broken)} of {len(files)} files can't be read:\n  {listed}\n" + (
            f"Mend them: without them nothing is left of {_few(lost) or folder}." if lost else
            "Mend or remove them, or set on_error='skip' to go on without them."))
    if len(broken):
        notes.append(f"on_error='skip': {len(broken)} of {len(files)} files can't be read and "
                     f"were skipped: {_few(broken['path'], 5)}.")
    name = folder.resolve().stem if folder.is_file() else folder.resolve().name
    name = re.sub(r"[^\w.-]+", "-", name)
    files, about_patients = _with_patients(files[files["reason"] == ""], options, name)
    table = files.explode("numbers", ignore_index=True)
    page = "#" + table["numbers"].astype(str)
    table.insert(0, "id", table["path"] + page.where(table["count"] > 1, ""))
    images = np.memmap(cache, dtype, "c", shape=tuple(known["shape"]))   # "r" would make torch warn
    return Folder(
        name if name not in DATASETS else f"{name}-folder", images,
        table[["id", "path", "label", "split", "patient", "kind", "mode", "width", "height"]],
        broken, (*notes, *_oddities(files, options), *about_patients), cache)


def _load_folder(folder: Path, image_size: int, dtype: str, options: ReadOptions | None,
                 data_dir: Path, seed: int) -> DataSplits:
    """Load a folder by its layout; draw the parts that it does not have."""
    if (folder / "Data-split").is_dir():
        return _load_covid_ct(folder, image_size, dtype)
    found = read_folder(folder, options, image_size=image_size, dtype=dtype, data_dir=data_dir)
    names = tuple(sorted(set(found.table["label"])))
    if len(names) < 2:
        raise ValueError(f"{folder} has images of one class only ({names[0]}); at least two are "
                         f"needed. {' '.join(found.notes)}")
    plain = [unicodedata.normalize("NFC", name).casefold() for name in names]
    if alike := [name for name, key in zip(names, plain) if plain.count(key) > 1]:
        raise ValueError(f"{folder} has classes that differ in capitals or accents' encoding only: "
                         f"{', '.join(alike)}. Give them one name.")
    parts = found.table["split"].replace("", "train").to_numpy(str)
    if "train" not in parts:
        raise ValueError(f"{folder} has {' and '.join(sorted(set(parts)))} but no train part: "
                         f"nothing to learn from. To score a model on it, see read_folder.")
    pool, notes = found.split(names), list(found.notes)
    if options and options.patient and pool.groups is None:
        raise ValueError(f"{folder}: patient is {options.patient!r}, which no path matches: one of "
                         f"them is {found.table['path'].iloc[0]!r}.")
    if missing := [part for part in ("test", "val") if part not in parts]:
        _draw_parts(found.name, pool, parts, missing, names, seed)
        path = found.cache.with_name(f"{found.name}_{found.cache.stem[:8]}_seed{seed}.csv")
        with _atomic(path) as temporary:
            drawn = found.table.assign(split=parts)[["path", "label", "split", "patient"]]
            drawn.drop_duplicates().to_csv(temporary, index=False)
        by = "image: no patient is known" if pool.groups is None else "patient"
        notes.append(f"{' and '.join(missing)} drawn with seed {seed}, stratified, by {by}; kept "
                     f"as {'/'.join(path.parts[-3:])}. Copied into the folder of the images, that "
                     f"list stays in force whatever is added.")
    splits = {part: pool.take(np.flatnonzero(parts == part)) for part in SPLITS}
    mean, std = _intensity(splits["train"].images)
    return DataSplits(
        name=found.name, **splits, class_names=names, mean=mean, std=std, notes=tuple(notes),
        task="binary" if len(names) == 2 else "multi-class",
        source=f"the user's folder {found.name}; rights as the user knows them")


def _intensity(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std per channel, three of them, in units of [0, 1]."""
    pixels = images.reshape(-1, 3 if images.ndim == 4 else 1)        # a view, also of a mapped file
    pixels = pixels[::len(pixels) // 4_000_000 | 1] / np.float32(255)     # 4 million are enough
    repeat = 3 // pixels.shape[1]
    return tuple(pixels.mean(0).tolist() * repeat), tuple(pixels.std(0).tolist() * repeat)


def _list_folder(folder: Path, labelled: bool) -> tuple[pd.DataFrame, Counter[str]]:
    """List the image files: path (below the folder), file, label, split, patient; count others."""
    tables = [folder] if folder.is_file() else [
        path for path in sorted(folder.iterdir())
        if labelled and path.suffix.lower() == ".csv" and path.name[0] != "."]
    if len(tables) == 1:
        return _list_csv(tables[0], folder)
    if tables:
        raise ValueError(f"{folder} has {len(tables)} CSV files. Give the path of the one that "
                         f"lists the images.")
    left_out: Counter[str] = Counter()
    paths = list(_walk(folder, left_out, set()))
    steps = [tuple(map(_printable, path.relative_to(folder).parts)) for path in paths]
    tops = {step[0] for step in steps if len(step) > 1}
    divided = {top for top in tops if top.lower() in SPLIT_FOLDERS}
    empty = {_printable(p.name) for p in folder.iterdir() if p.is_dir() and not p.is_symlink()
             and p.name[0] != "." and p.name not in SYSTEM_FOLDERS
             and not (p / "decoded").is_dir()} - tops                # a data_dir of ours
    strange = [*sorted(tops - divided if divided else ()),
               *("/".join(step) for step in steps if len(step) < (3 if divided else 2)),
               *(f"{name} without an image" for name in sorted(empty))]
    if labelled and (strange or not paths):
        raise ValueError(
            f"The layout of {folder} is not known: expected a folder for each class, or train, val "
            f"and test with a folder for each class in them, or a CSV file with path and label; "
            f"found {_few(strange or ['nothing of the kind'])}.")
    return pd.DataFrame({
        "path": ["/".join(step) for step in steps], "file": paths,
        "label": [step[bool(divided)] if labelled else "" for step in steps],
        "split": [SPLIT_FOLDERS[step[0].lower()] if divided and labelled else "" for step in steps],
        "patient": ""}), left_out


def _walk(folder: Path, left_out: Counter[str], seen: set[str]) -> Iterator[Path]:
    """Yield the image files below `folder`, each once whatever links to it; count the others."""
    real_folder = os.path.realpath(folder)
    seen.add(real_folder)
    for path in sorted(folder.iterdir()):
        real = os.path.realpath(path) if path.is_symlink() else os.path.join(real_folder, path.name)
        met = real in seen
        seen.add(real)
        if path.is_dir():
            if met:
                left_out["folders met a second time, by a link"] += 1
            elif path.name[0] != "." and path.name not in SYSTEM_FOLDERS:
                yield from _walk(path, left_out, seen)
        elif why := _not_wanted(path) or "links to files met before" * met:
            left_out[why] += 1
        else:
            yield path


def _not_wanted(path: Path) -> str:
    """Say why a file is left out, as words that follow a number; "" if it may be an image."""
    if path.name.startswith("."):
        return "hidden files"
    if not path.is_file():                                           # or a device, a pipe
        return "links that lead nowhere" if path.is_symlink() else "things that are no file"
    if path.stat().st_size == 0:
        return "empty files"
    return "" if _kind(path) else f"{path.suffix or path.name} files"


def _kind(path: Path) -> str:
    """Return "image", "DICOM", "NIfTI" or "", by the name; DICOM by its mark too."""
    name = path.name.lower().removesuffix(".gz")
    if kind := FILE_KINDS.get(Path(name).suffix):
        return kind
    with contextlib.suppress(OSError), path.open("rb") as file:
        return "DICOM" if file.read(132)[128:] == b"DICM" and name != "dicomdir" else ""
    return ""


def _printable(text: str) -> str:
    """Return a file's name or an error as text that can be printed and stored, whatever it is."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file as text, its column names in small letters, without empty rows."""
    try:
        text = path.read_text("utf-8-sig")
        mark = next((s for s in (",", ";", "\t") if s in text.partition("\n")[0]), ",")
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, sep=mark)
        table = table.rename(columns=lambda name: name.strip().lower())
        if "patient" not in table:
            table = table.rename(columns=lambda name: re.sub("^patient[ _-]?id$", "patient", name))
    except ValueError as error:                                      # also: not UTF-8, no table
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}. Spreadsheets save one as "
                         f"'CSV UTF-8'.") from error
    if table.columns.has_duplicates:
        raise ValueError(f"{path} has a column twice (or in capitals, too): "
                         f"{', '.join(table)}. Keep one.")
    if not isinstance(table.index, pd.RangeIndex):                   # pandas shifts the columns
        raise ValueError(f"{path} has rows that are longer than its first line. A {mark!r} within "
                         f"a value needs the value in quotes.")
    table = table.apply(lambda column: column.str.strip())
    return table[(table != "").any(axis=1)]                          # spreadsheets leave empty ones


def _list_csv(path: Path, folder: Path) -> tuple[pd.DataFrame, Counter[str]]:
    """Read a list of images: path, label and, if there, split and patient; count what it leaves
    out: other columns, and images of `folder`, which may be the list itself."""
    table = _read_table(path)
    if table.empty or not {"path", "label"} <= set(table):
        raise ValueError(f"{path} must have the columns path and label and rows; its columns are: "
                         f"{_few(table)}. If it is no list of the images, move it out of their "
                         f"folder.")
    unused = [name for name in table if name not in LIST_COLUMNS and (table[name] != "").any()]
    table = table.reindex(columns=LIST_COLUMNS, fill_value="")
    if len(blank := table.index[(table[["path", "label"]] == "").any(axis=1)]):
        raise ValueError(f"{path}: path and label must be filled in every row; they are not in row "
                         f"{_few(str(number + 2) for number in blank)}.")
    table["split"] = table["split"].str.lower().replace(SPLIT_FOLDERS)
    if strange := set(table["split"]) - ({*SPLITS} if any(table["split"]) else {""}):
        raise ValueError(f"{path}: split is {_few(map(repr, sorted(strange)))} in some rows; it "
                         f"must be train, val or test in all (or empty in all).")
    table["path"] = [name if "\\" not in name or (path.parent / name).is_file() else
                     name.replace("\\", "/") for name in table["path"]]      # written on Windows
    table["file"] = [path.parent / name for name in table["path"]]
    real = table["file"].map(os.path.realpath)
    missing = ~table["file"].map(Path.is_file)
    if real.duplicated().any():
        raise ValueError(f"{path} lists files twice: {_few(table['path'][real.duplicated()])}.")
    if missing.any():
        raise FileNotFoundError(f"{missing.sum()} of {len(table)} files that {path} lists are "
                                f"missing: {_few(table['path'][missing], 3)}.")
    around = _walk(folder, Counter(), set()) if folder.is_dir() else (
        image for place in sorted({file.parent for file in table["file"]})   # it may lie anywhere
        for image in sorted(place.iterdir()))
    listed = {*table["file"], *real}                                 # the first are quick to find
    unlisted = [image.name for image in around if image not in listed
                and not _not_wanted(image) and os.path.realpath(image) not in listed]
    return table.reset_index(drop=True), Counter({
        f"{what} ({_few(map(_printable, names), 3)})": len(names) for what, names in (
            (f"images that {path.name} does not list", unlisted),
            (f"columns of {path.name} besides {', '.join(LIST_COLUMNS)}", unused)) if names})


def _with_patients(files: pd.DataFrame, options: ReadOptions,
                   name: str) -> tuple[pd.DataFrame, list[str]]:
    """Fill in `patient`: by CSV, else the option's rule, else PatientID, else a file of several.

    Such a file is named with its folder: 001.nii of another hospital is another patient.
    """
    patient, tagged, notes = files["patient"], files["patient_id"], []
    if options.patient:
        found = files["path"].str.extract(options.patient)[0].fillna("")
        patient = patient.where(patient != "", found)
    if (tagged != "").sum() > 1 and tagged[tagged != ""].nunique() == 1:
        notes.append("All DICOM files carry the same PatientID; it is taken for none.")
        tagged = ""
    filled = (patient == "") & (tagged != "")
    if filled.any() and (patient != "").any():
        notes.append(f"{filled.sum()} files take their patient from PatientID, as list or rule "
                     f"names none: nobody may have one name here and another there.")
    patient = patient.where(patient != "", tagged)
    alone = (patient == "") & (files["count"] > 1)
    patient = patient.mask(alone, f"{name}/" + files["path"])
    if alone.any():
        notes.append(f"{alone.sum()} files of several pictures count as a patient each: name the "
                     f"patients if one has several files.")
    if len(known := patient[patient != ""].value_counts()):
        notes.append(f"Patients: {len(known)}, with up to {known.iloc[0]} of {len(files)} files.")
    if unknown := int((patient == "").sum()):
        notes.append(f"The patient is not known for {unknown} of {len(files)} files.")
        if any(label in path.split("/")[:-2] for path, label in zip(files["path"], files["label"])):
            notes.append("Some lie in folders within their class: if these are the patients, set "
                         "patient='([^/]+)/[^/]+$'.")
    return files.assign(patient=patient), notes


def _oddities(files: pd.DataFrame, options: ReadOptions) -> list[str]:
    """Say what the reader of a result should know about the files that were read."""
    kinds, modes = (", ".join(f"{name} {n}" for name, n in files[column].value_counts().items())
                    for column in ("kind", "mode"))
    rule = f"by the window {options.window!r}" if options.window else "each over its own range"
    odd = {f"hold several pictures, of which slices={options.slices!r}": files["count"] > 1,
           f"have more than 8 bits, scaled {rule}": files["deep"],
           "hold NaN, as outside of the scan: black, and no part of the range": files["outside"],
           "were turned upright by their EXIF mark": files["turned"],
           "are smaller than 32 pixels": files[["width", "height"]].min(axis=1) < 32}
    suffix = files["path"].str.lower().str.extract(r"\.(\w+)$")[0].replace("jpg", "jpeg")
    named = files.groupby(["kind", suffix]).size().items()
    return [f"{len(files)} files: {kinds}; pixels: {modes}.",
            *(f"{which.sum()} files {text}." for text, which in odd.items() if which.any()),
            *(f"{n} {kind} files are named .{end}." for (kind, end), n in named
              if kind in ("PNG", "JPEG", "BMP") and end != kind.lower())]


# Decoding: once, in parallel, into a file that is mapped from then on


def _decoded(paths: list[Path], options: ReadOptions, size: int, dtype: str,
             data_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that holds all pictures in order, their shape, and each file's facts."""
    digest = hashlib.sha256(repr(("version 4", size, dtype, options.window, options.slices,
                                  options.plane)).encode())
    for path in paths:
        info = path.stat()
        digest.update(f"{path.absolute()}\0{info.st_size}\0{info.st_mtime_ns}\n".encode(
            "utf-8", "surrogateescape"))
    cache = data_dir / "decoded" / f"{digest.hexdigest()[:16]}.pixels"
    record = cache.with_suffix(".json")
    read = functools.partial(_read_file, options=options, size=size, dtype=dtype)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_name(f".{cache.name}.lock")):
        for leftover in cache.parent.glob(f".*{cache.name}.*.tmp"):   # of a process killed here
            leftover.unlink()
        try:                                                         # the record is written last
            known = json.loads(record.read_text("utf-8"))
            pixels = math.prod(known["shape"]) * np.dtype(dtype).itemsize
            broken = [path for path, fact in zip(paths, known["facts"]) if fact["reason"]]
            whole = cache.stat().st_size == pixels
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        # What was broken is tried again: a right or a decoder may have been added.
        if not whole or not all(fact["reason"] for fact, _ in _read_files(broken, read)):
            with _atomic(cache) as temporary:
                known = (_write_pictures(temporary, _read_files(paths, read), (size, size))
                         or _write_pictures(temporary, _read_files(paths, read), (size, size, 3)))
            _write_json(record, known)
    return cache, known


def _write_pictures(path: Path, found: Iterator[_Found], shape: tuple[int, ...]) -> dict[str, Any]:
    """Write pictures as they come; return the shape of all and each file's facts.

    Grey ones become RGB if `shape` is; if it is grey, the first in colour ends all: {}.
    """
    facts = []
    with open(path, "wb") as file:
        for fact, pictures in found:
            if any(picture.ndim > len(shape) for picture in pictures):
                return {}
            facts.append(fact)
            for picture in pictures:
                if picture.ndim < len(shape):
                    picture = picture[..., None].repeat(3, axis=2)
                file.write(picture.tobytes())
    return {"shape": [sum(len(fact["numbers"]) for fact in facts), *shape], "facts": facts}


def _read_files(paths: list[Any], read: Callable[[Any], _Found]) -> Iterator[_Found]:
    """Read files in parallel, with a bar if watched; yield facts and pictures of each in order."""
    torch.set_num_threads(torch.get_num_threads())  # or a forked process fails in several threads
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings(), tqdm(
            desc="images", total=len(paths), unit="file",
            disable=not (paths and _is_watched())) as bar:
        warnings.simplefilter("ignore")                              # what matters is a reason
        for start in range(0, len(paths), 256):                      # not all in memory at once
            for found in pool.map(read, paths[start:start + 256]):
                bar.update()
                yield found


_Found = tuple[dict[str, Any], list[np.ndarray]]  # a file's facts; its pictures
_UNREAD = {"kind": "", "mode": "", "width": 0, "height": 0, "count": 1, "deep": False,
           "turned": False, "outside": False, "patient_id": "", "numbers": [], "reason": ""}


def _read_file(path: Path, options: ReadOptions, size: int, dtype: str) -> _Found:
    """Return a file's facts and its pictures, (size, size) or (size, size, 3)."""
    readers = {"DICOM": _read_dicom, "NIfTI": _read_nifti}
    numbers, pictures = [], []
    try:
        reading = readers.get(_kind(path), _read_image)(path, options)
        facts = _UNREAD | next(reading)
        _check_size(facts["width"], facts["height"], facts["count"])
        for number, picture in reading:
            if picture.dtype.kind == "f" and (outside := np.isnan(picture)).any():
                facts["outside"], picture = True, np.where(outside, 0, picture)
            numbers.append(number)
            pictures.append(_area_resize(picture, size, dtype))
    except Exception as error:                                       # damaged files raise anything
        return _UNREAD | {"reason": _reason(error, path)}, []
    return facts | {"numbers": numbers}, pictures


def _reason(error: Exception, path: Path) -> str:
    """Return one printable line for an error, without the path that stands before it."""
    text = " ".join(str(error).replace(f" {str(path)!r}", "").split()) or "no reason given"
    text = text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
    return _printable(text)[:300]


def _check_size(width: int, height: int, count: int = 1) -> None:
    """Refuse a bomb before memory is spent on it, and what has no pixel at all."""
    pixels = width * height
    if min(width, height, count) < 1:
        raise ValueError(f"{count} pictures of {width} x {height} pixels")
    if pixels > MAX_PIXELS or pixels * count > MAX_FILE_PIXELS or count > MAX_PICTURES:
        raise ValueError(f"{count:,} pictures of {width:,} x {height:,} pixels; the limit is "
                         f"{MAX_PIXELS:,} pixels a picture, {MAX_FILE_PIXELS:,} pixels and "
                         f"{MAX_PICTURES:,} pictures a file")


def _area_resize(image: np.ndarray, size: int, dtype: str) -> np.ndarray:
    """Resize (H, W) or (H, W, 3) to `size`: each new pixel is the mean of its area."""
    channels = [torch.from_numpy(image)] if image.ndim == 2 else torch.from_numpy(image).unbind(2)
    small = [F.interpolate(c[None, None].float(), (size, size), mode="area")[0, 0]
             for c in channels]                                      # one by one: less memory
    small = small[0] if image.ndim == 2 else torch.stack(small, 2)
    return (small.round().byte() if dtype == "uint8" else small).numpy()


# A reader of a format yields the facts that the file's header states, then, where these were found
# to be sane, the number of each picture and its pixels: (H, W) or (H, W, 3), 0..255.
_Reading = Iterator[dict[str, Any] | tuple[int, np.ndarray]]


def _chosen(count: int, slices: str) -> list[int]:
    """Return the numbers, from 0, of the pictures to take of `count`."""
    n = min(count, {"middle": 1, "all": count}.get(slices) or int(slices))
    return [(2 * i + 1) * count // (2 * n) for i in range(n)]


def _read_image(path: Path, options: ReadOptions) -> _Reading:
    """Read PNG, JPEG, TIFF or BMP."""
    with path.open("rb") as file:
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
        except UnidentifiedImageError:
            within_zip = not isinstance(path, Path)
            what = "something else" if within_zip else _what(_beginning(path))
            raise ValueError(f"no PNG, JPEG, TIFF or BMP image but {what}") from None
        kind = "JPEG" if image.format == "MPO" else image.format     # a JPEG with a preview
        count = image.n_frames if kind == "TIFF" else 1
        yield {"kind": kind, "mode": image.mode, "width": image.width, "height": image.height,
               "count": count, "deep": image.mode[0] in "IF",
               "turned": kind != "PNG" and image.getexif().get(274, 1) != 1}
        image.verify()                                               # the CRCs of a PNG
        image = Image.open(file, formats=IMAGE_FORMATS)
        for number in _chosen(count, options.slices):
            image.seek(number)
            _check_size(*image.size)                                 # a page has its own
            deep, tags = image.mode[0] in "IF", image.tag_v2 if kind == "TIFF" else {}
            bits = max(tags.get(258, [16 if ";16B" in str(image.tile) else 8]))
            if bits > 8 and not deep:                                # Pillow would keep eight
                raise ValueError(f"colour, or grey with transparency, of {bits} bits a channel: "
                                 f"save it with 8 bits, or as grey alone")
            seen = ImageOps.exif_transpose(image)
            values = _scaled(np.asarray(seen), options, False) if deep else _as_seen(seen)
            yield number, 255 - values if deep and tags.get(262) == 0 else values    # 0 is white


def _as_seen(image: Image.Image) -> np.ndarray:
    """Return 8 bits a channel as a viewer shows them on black, (H, W) or (H, W, 3)."""
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert(mode))


def _scaled(values: np.ndarray, options: ReadOptions, hounsfield: bool) -> np.ndarray:
    """Scale grey values to float32 0..255 by the rule of `options`; NaN, which is no part of the
    picture, stays NaN."""
    if options.window in WINDOWS and not hounsfield:
        raise ValueError(f"its grey values are not known to be Hounsfield units, in which the "
                         f"window {options.window!r} is given: set window to '' or to "
                         f"'centre, width' in its own units")
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if not high - low < 1e30:                                        # also NaN alone, and infinity
        raise ValueError(f"its grey values go from {low:g} to {high:g}")
    low, high = options.limits or (low, high)
    shares = (values.astype(np.float32) - low) / max(high - low, 1e-30)
    return np.clip(shares, 0, 1) * np.float32(255)


def _read_dicom(path: Path, options: ReadOptions) -> _Reading:
    """Read DICOM: rescaled, windowed, MONOCHROME1 inverted, palettes applied."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError
    from pydicom.filereader import read_file_meta_info
    from pydicom.pixels import apply_color_lut, pixel_array
    from pydicom.tag import Tag

    try:
        syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    except InvalidDicomError:
        raise ValueError(f"no DICOM file but {_what(_beginning(path))}") from None
    if syntax and syntax.is_deflated:                                # of unlimited size
        raise ValueError("a deflated DICOM file; convert it first, such as by dcmconv +te")
    header = dcmread(path, defer_size=DICOM_DEFERRED)
    missing = [f"{name} {Tag(name)}" for name in DICOM_TAGS if header.get(name) is None]
    missing += [] if syntax else ["TransferSyntaxUID (0002,0010)"]
    if missing:
        raise ValueError(f"no picture can be made: it lacks the tag {', '.join(missing)}")
    photometric, count = header.PhotometricInterpretation, int(header.get("NumberOfFrames") or 1)
    yield {"kind": "DICOM", "mode": _printable(f"{photometric} {header.BitsStored} bit"),
           "width": int(header.Columns), "height": int(header.Rows), "count": count,
           "deep": header.BitsStored > 8,
           "patient_id": _printable(str(header.get("PatientID") or ""))}
    for number in _chosen(count, options.slices):
        try:
            raw = pixel_array(header, index=number)
        except RuntimeError as error:                                # no decoder, or none that can
            raise ValueError(f"{_decoder_needed(syntax)}{error}") from error
        if photometric == "PALETTE COLOR":
            raw = apply_color_lut(raw, header)
            raw = raw if raw.dtype == np.uint8 else (raw // 257).astype(np.uint8)
        if raw.ndim == 3 and raw.dtype != np.uint8:
            raise ValueError(f"a colour picture of {header.BitsStored} bits a channel")
        yield number, raw if raw.ndim == 3 else _dicom_grey(raw, header, number, options)


def _dicom_grey(raw: np.ndarray, header: Any, number: int, options: ReadOptions) -> np.ndarray:
    """Return stored grey values (H, W) as 0..255, bright where the viewer shows it bright."""
    from pydicom.pixels import apply_modality_lut

    groups = [*header.get("SharedFunctionalGroupsSequence", ()),     # enhanced: of all frames,
              *header.get("PerFrameFunctionalGroupsSequence", ())[number:number + 1]]    # of one
    rescale = next((group.PixelValueTransformationSequence[0] for group in groups
                    if "PixelValueTransformationSequence" in group), header)
    values = apply_modality_lut(raw, rescale)
    if raw.dtype != np.uint8 or header.BitsStored != 8 or not np.array_equal(raw, values):
        outside = header.get("PixelPaddingValue")                    # no part of the picture
        if outside is not None and 0 < np.sum(raw == outside) < raw.size:
            values = np.where(raw == outside, values[raw != outside].min(), values)
        values = _scaled(values, options, header.get("Modality") == "CT"
                         and "RescaleIntercept" in rescale)
    return 255 - values if header.PhotometricInterpretation == "MONOCHROME1" else values


def _decoder_needed(syntax: Any) -> str:
    """Name the packages that may decode what is not decoded here, "" if all are there."""
    from pydicom.pixels import get_decoder

    decoder = get_decoder(syntax)
    needed = " ".join(re.findall(r"pylibjpeg-\w+", " ".join(decoder.missing_dependencies)))
    which = ("another decoder, unless the file is damaged" if decoder.is_available
             else "a decoder that is not installed")
    return (f"its transfer syntax, {syntax.name}, needs {which}: pip install pylibjpeg {needed}. "
            if needed else "")


def _read_nifti(path: Path, options: ReadOptions) -> _Reading:
    """Read a NIfTI volume, cut as it is seen from the patient's feet, front or left."""
    import nibabel

    volume = nibabel.load(path)
    turns = nibabel.io_orientation(volume.affine)                    # (3, 2): patient's axis, sign
    if len(volume.shape) < 3 or math.prod(volume.shape[3:]) != 1 or np.isnan(turns).any():
        raise ValueError(f"its shape is {volume.shape}, expected one volume of three dimensions, "
                         f"each with a direction of its own")
    if volume.get_data_dtype().kind not in "iuf":
        raise ValueError(f"its values are {volume.get_data_dtype()}, expected one number a voxel")
    plane = PLANES.index(options.plane)
    sides = [volume.shape[axis] for axis in turns[:, 0].argsort()]   # to the right, front, top
    count = sides.pop(plane)
    yield {"kind": "NIfTI", "mode": str(volume.get_data_dtype()), "width": sides[0],
           "height": sides[1], "count": count, "deep": True}
    whole = volume.dataobj.get_unscaled().reshape(volume.shape[:3])  # without a fourth axis of 1
    whole = nibabel.apply_orientation(whole, turns)                  # a view
    for number in _chosen(count, options.slices):
        values = whole.take(number, plane) * volume.dataobj.slope + volume.dataobj.inter
        yield number, _scaled(values[::-1, ::-1].T, options, True)   # right on the left, top up


# Splits and subsets ----------------------------------------------------------


def _regroup(data: DataSplits, seed: int) -> DataSplits:
    """Split all images anew: stratified, no patient and no article in two splits.

    About a quarter becomes the test set and a fifth of the rest the validation set.
    """
    if data.train.groups is None or data.task == "multi-label":
        raise ValueError(f"{data.name} can't be split by group: "
                         f"{'multi-label' if data.train.groups is not None else 'no patient ids'}"
                         f". Use split='official'.")
    columns = zip(*(vars(part).values() for part in data.parts.values()))
    pool = Split(*(None if c[0] is None else np.concatenate(c) for c in columns))
    parts = np.full(len(pool), "train")
    _draw_parts(data.name, pool, parts, ("test", "val"), data.class_names, seed)
    return dataclasses.replace(
        data, **{name: pool.take(np.flatnonzero(parts == name)) for name in SPLITS},
        published_split=False, source=f"{data.source}; grouped split, seed {seed}",
        notes=(*data.notes, f"Split anew by patient and article with seed {seed}: not "
                            f"comparable with results on the published split."))


def _draw_parts(name: str, pool: Split, parts: np.ndarray, missing: Sequence[str],
                class_names: Sequence[str], seed: int) -> None:
    """Draw the missing of `parts` (N,) from train: a quarter as test, a fifth of the rest as val.

    Both only about so: stratified by class, and what belongs together stays in one part. Of the
    folds that scikit-learn makes (fewer, where need be), that one is taken which leaves every class
    to the others, has every class itself, and is nearest to its share of each.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    units, shares = _split_units(pool), {"test": 4, "val": 5}
    for left, part in zip(range(len(missing), 0, -1), missing):
        index = np.flatnonzero(parts == "train")
        labels, together = pool.labels[index], units[index]
        counts = pd.Series(together).groupby(labels).nunique()
        if counts.min() <= left:
            raise ValueError(f"{name}: class {class_names[counts.idxmin()]} has {counts.min()} "
                             f"patients (or images without one), {left + 1} are needed to draw "
                             f"{part}. Add images, or name the parts yourself; if they are more "
                             f"patients, name these by patient= or in a CSV.")
        alone = len(np.unique(together)) == len(together)            # the quicker one will do
        kfold = StratifiedKFold if alone else StratifiedGroupKFold
        share = np.bincount(labels) / shares[part]                   # of each class

        def faults(pair: tuple[np.ndarray, np.ndarray]) -> tuple[int, int, float]:
            others, fold = pair
            units_left = pd.Series(together[others]).groupby(labels[others]).nunique()
            given = np.bincount(labels[fold], minlength=len(share))
            return (len(counts) - (units_left >= left).sum(), len(counts) - (given > 0).sum(),
                    np.abs(given - share).sum())

        folds = []
        for n in range(min(shares[part], counts.max()), 1, -1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")                      # a class in too few folds
                folds += kfold(n, shuffle=True, random_state=seed).split(
                    index, labels, None if alone else together)
            best = min(folds, key=faults)
            if faults(best)[:2] == (0, 0):
                break
        parts[index[best[1]]] = part


def _split_units(part: Split) -> np.ndarray:
    """Return (N,) ids of what must stay together: the article if known, else patient, else image.

    No patient of COVID-CT is in two articles, so an article holds its patients whole.
    """
    units = part.ids
    for column in (part.groups, part.articles):
        units = units if column is None else np.where(column == "", units, column)
    return units


def label_subset(
    labels: np.ndarray, fraction: float, *, seed: int = 0, groups: np.ndarray | None = None,
    min_per_class: int = 1, rule: str = "stratified",
) -> np.ndarray:
    """Choose the images whose labels may be used for training.

    "stratified" is our rule: for one seed the subset of a smaller fraction lies within that of
    a larger one, every class keeps its share and at least `min_per_class` images, and a
    patient is in or out as a whole. The authors' two rules are there to repeat their
    numbers: "authors" shuffles by Python's `random` and takes the first n (COVID-CT;
    their seed was always 42, whatever they set), "first" takes the first n unshuffled
    (OrganSMNIST). Neither looks at classes or patients.

    Args:
        labels: (N,) class indices, or (N, L) of 0 and 1.
        fraction: share of the images, in (0, 1]; exact only up to whole images and patients.
        groups: (N,) patient ids, "" where unknown; None to choose image by image.

    Returns:
        (n,) int64 indices, sorted.

    Raises:
        ValueError: `fraction` outside (0, 1], or so small that nothing is left.
    """
    check_choice(rule, ("stratified", "authors", "first"), "subset rule")
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction is {fraction}; it must be above 0 and at most 1 "
                         f"(0.1 for a tenth of the labels).")
    if rule == "stratified":
        chosen = _stratified_subset(np.asarray(labels), fraction, seed, groups, min_per_class)
    else:
        order = list(range(len(labels)))
        if rule == "authors":
            random.Random(seed).shuffle(order)
        chosen = np.sort(np.array(order[:int(len(order) * fraction)], np.int64))
    if len(chosen) == 0:
        raise ValueError(f"label_fraction {fraction} of {len(labels)} images leaves none.")
    return chosen


def _stratified_subset(labels: np.ndarray, fraction: float, seed: int,
                       groups: np.ndarray | None, min_per_class: int) -> np.ndarray:
    """Take, in each stratum of units, the seeded prefix whose size is nearest to its share.

    A unit is a patient (or an image without one); its stratum is its rarest class. The few
    units that give every class its minimum come first, for all fractions alike: with that, the
    subsets are nested.
    """
    member = _class_members(labels)                                  # (N, C) bool
    names = np.array([f"image {i}" for i in range(len(labels))])
    if groups is not None:
        groups = np.asarray(groups, str)
        names = np.where(groups == "", names, np.char.add("patient ", groups))
    _, unit = np.unique(names, return_inverse=True)                  # (N,) unit of each image
    sizes = np.bincount(unit)                                        # (U,)
    counts = np.stack([np.bincount(unit, column) for column in member.T], 1)     # (U, C)
    rarity = np.where(counts > 0, member.sum(0), len(labels) + 1)
    stratum = rarity.argmin(1)                                       # (U,)
    order = np.random.default_rng(seed).permutation(len(sizes))
    core, have = np.zeros(len(sizes), bool), np.zeros(member.shape[1])
    for u in order:
        if (have >= min_per_class).all():
            break
        core[u] = ((have < min_per_class) & (counts[u] > 0)).any()
        have += counts[u] * core[u]
    chosen = core.copy()
    for c in np.unique(stratum):
        line = order[stratum[order] == c]
        line = np.concatenate([line[core[line]], line[~core[line]]])
        reached = np.concatenate([[0], sizes[line].cumsum()])
        nearest = np.abs(reached - fraction * reached[-1]).argmin()
        chosen[line[:nearest]] = True
    return np.flatnonzero(chosen[unit]).astype(np.int64)


def _class_members(labels: np.ndarray) -> np.ndarray:
    """Return (N, C) bool: which classes an image belongs to; "no finding" is a class too."""
    if labels.ndim == 1:
        return labels[:, None] == np.unique(labels)[None]
    member = np.concatenate([labels > 0, labels.sum(1, keepdims=True) == 0], 1)
    return member[:, member.any(0)]


# Checks before anything is trained -------------------------------------------


@dataclass(eq=False)
class SplitReport:
    """What `check_splits` found; prints in a terminal, shows tables and pictures in a notebook.

    Attributes:
        name: the data set.
        errors: what must be mended before training.
        warnings: what a reader of the results must know; recorded with them.
        tables: "classes", "intensity", and where there are any "duplicates", "patients" and
            "articles".
        pictures: (caption, image) of the first duplicate pairs; both look the same.
    """

    name: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    pictures: list[tuple[str, np.ndarray]] = field(default_factory=list)

    def raise_for_errors(self) -> None:
        """Raise ValueError with all errors, if there are any."""
        if self.errors:
            raise ValueError("\n  ".join([f"{self.name} is not fit for training:", *self.errors])
                             + "\nAll cases are in the tables of check_splits. Mend the images, "
                             "their folders or their list, and load again.")

    def _lines(self) -> list[str]:
        verdict = "NOT fit" if self.errors else "fit"
        return [f"{self.name} is {verdict} for training: {len(self.errors)} errors, "
                f"{len(self.warnings)} warnings", *(f"ERROR: {e}" for e in self.errors),
                *(f"Warning: {w}" for w in self.warnings)]

    def __str__(self) -> str:
        tables = [f"\n{title} ({len(table)} rows)\n{table.head(12).to_string(na_rep='')}"
                  for title, table in self.tables.items()]
        return "\n".join(self._lines() + tables)

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(line)}</p>" for line in self._lines()]
        parts += [f"<p>{title} ({len(table)} rows)</p>{table.head(12).to_html(na_rep='')}"
                  for title, table in self.tables.items()]
        for caption, image in self.pictures:
            file = io.BytesIO()
            pixels = np.clip(np.nan_to_num(image), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((96, 96)).save(file, "PNG")
            code = base64.b64encode(file.getvalue()).decode()
            parts.append(f"<img src='data:image/png;base64,{code}'> {html.escape(caption)}<br>")
        return "".join(parts)


def check_splits(
    data: DataSplits, *, method: str | None = None, fractions: Sequence[float] = (),
    seed: int = 0, min_per_class: int = 1,
) -> SplitReport:
    """Look for what would make a result wrong: leaks, contradictions, gaps, odd intensities.

    The same picture or patient in two splits, and the same picture in two classes, are errors;
    in a published split, which is kept for comparability, they are warnings.

    Args:
        method: the checkpoint whose pre-training intensities the images are held against.
        fractions, seed, min_per_class: label subsets to count, chosen as `label_subset` does.
    """
    if method:
        check_choice(method, (*METHODS, *CONTROLS), "method")
    report = SplitReport(data.name)
    leaks: list[str] = []
    images = _list_images(data)
    columns = {name: part.labels for name, part in data.parts.items()}
    for fraction in fractions:
        index = label_subset(data.train.labels, fraction, seed=seed, groups=data.train.groups,
                             min_per_class=min_per_class)
        columns[f"train at {fraction:g}"] = data.train.labels[index]
    _check_classes(report, data, columns)
    _check_intensity(report, data, method)
    _check_duplicates(report, data, images, leaks)
    for kind in ("patients", "articles"):
        known = images[images[kind] != ""]
        shared = pd.crosstab(known[kind], known["split"]).reindex(columns=SPLITS, fill_value=0)
        shared = shared[(shared > 0).sum(axis=1) > 1]
        if len(shared):
            report.tables[kind] = shared
            text = f"{len(shared)} {kind} in more than one split: {_few(shared.index, 5)}."
            (leaks if kind == "patients" else report.warnings).append(text)
    if unknown := int((images["patients"] == "").sum()):
        report.warnings.append(f"Patients are not known for {unknown} of {len(images)} images: one "
                               f"may be in several splits, unseen.")
    if data.published_split:
        report.warnings += [f"{leak} The published split is kept as it is." for leak in leaks]
    else:
        report.errors += leaks
    return report


def _check_classes(
    report: SplitReport, data: DataSplits, columns: Mapping[str, np.ndarray],
) -> None:
    """Count images per class in every column of labels; find classes without any."""
    names = pd.Index(data.class_names, name="class")
    table = pd.DataFrame(index=names)
    for column, labels in columns.items():
        top = 1 if data.task == "multi-label" else len(names) - 1
        if labels.size and (labels.min() < 0 or labels.max() > top):
            report.errors.append(f"{column} has labels {labels.min()} to {labels.max()}, expected "
                                 f"0 to {top} ({', '.join(names)}).")
            continue
        counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=top + 1)
        table[column] = counts
        absent = ", ".join(names[table[column] == 0])
        if absent and (column.startswith("train") or (table[column] > 0).sum() < 2):
            report.errors.append(f"{column} has no image of {absent}: nothing to learn or score.")
        elif absent:
            report.warnings.append(f"{column} has no image of {absent}: its scores are undefined.")
    report.tables["classes"] = table


def _check_intensity(report: SplitReport, data: DataSplits, method: str | None) -> None:
    """Hold pixel values against 0..255 and against the checkpoint's pre-training input."""
    rows = {}
    if not all(map(len, data.parts.values())):
        return                                                       # _check_classes said so
    for name, part in data.parts.items():
        step = part.images.size // 4_000_000 | 1                     # 4 million pixels are enough
        sample = part.images.reshape(-1)[::step] / 255
        low, high = float(part.images.min()), float(part.images.max())
        rows[name] = {"mean": sample.mean(), "std": sample.std(), "min": low / 255,
                      "max": high / 255}
        flat = part.images.reshape(len(part), -1)
        plain = part.ids[flat.min(1) == flat.max(1)]
        if not (low >= 0 and high <= 255):
            report.errors.append(f"{name} has pixels from {low} to {high}, expected 0 to 255.")
        elif low == high:
            report.errors.append(f"{name} has one grey value only, {low:g}: nothing to see. Look "
                                 f"at the files, or set another window.")
        elif high - low < 50:
            report.warnings.append(f"{name} has pixels from {low:g} to {high:g} only, of 0 to 255: "
                                   f"scaled twice, or too wide a window?")
        if len(plain):
            report.warnings.append(f"{len(plain)} images of {name} have one grey value only: "
                                   f"{', '.join(plain[:3])}.")
    mean, std = rows["train"]["mean"], rows["train"]["std"]
    stated = {"data set statistics": (data.mean, data.std)}
    if method in CHECKPOINTS:
        stated[f"pre-training of {method}"] = CHECKPOINTS[method].mean, CHECKPOINTS[method].std
    for whose, statistics in stated.items() if std > 0 else ():      # 0: an error, said above
        centre, spread = np.mean(statistics[0]), np.mean(statistics[1])
        rows[whose] = {"mean": centre, "std": spread}
        rows[f"train, normalised with {whose}"] = {"mean": (mean - centre) / spread,
                                                 "std": std / spread}
        if abs(mean - centre) > spread:
            report.warnings.append(f"train has a mean intensity of {mean:.2f}, {whose} has "
                                   f"{centre:.2f} +- {spread:.2f}.")
    report.tables["intensity"] = pd.DataFrame(rows).T.round(3) + 0.0        # no -0.000


def _list_images(data: DataSplits) -> pd.DataFrame:
    """Return a row for each image of all parts: where it is, whose, a digest of its pixels."""
    deepest = max(part.images.ndim for part in data.parts.values())

    def digest(image: np.ndarray) -> str:
        if image.ndim + 1 < deepest:                                 # grey beside a part in colour
            image = image[..., None].repeat(3, axis=2)
        return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()

    return pd.concat([pd.DataFrame({
        "split": name, "row": range(len(part)), "id": part.ids,
        "label": [" ".join(map(str, np.atleast_1d(label))) for label in part.labels],
        "patients": "" if part.groups is None else part.groups,
        "articles": "" if part.articles is None else part.articles,
        "digest": list(map(digest, part.images)),
    }) for name, part in data.parts.items()])


def _check_duplicates(report: SplitReport, data: DataSplits, images: pd.DataFrame,
                      leaks: list[str]) -> None:
    """Find images that are equal pixel for pixel, one row a pair; and ids that occur twice."""
    pairs = images.drop_duplicates("digest").merge(images, on="digest", suffixes=("", "_2"))
    pairs = pairs[(pairs.split != pairs.split_2) | (pairs.row != pairs.row_2)]
    plain = [np.ptp(data.parts[p.split].images[p.row]) == 0 for p in pairs.itertuples()]
    pairs = pairs[~np.array(plain, bool)]                            # _check_intensity said so
    torn, crossing = pairs.label != pairs.label_2, pairs.split != pairs.split_2
    for (one, two), some in pairs[crossing].groupby(["split", "split_2"]):
        leaks.append(f"{len(some)} images of {two} are pixel for pixel in {one} too, among them "
                     f"{some.id_2.iloc[0]} = {some.id.iloc[0]}.")
    if torn.any():
        some = pairs[torn].iloc[0]
        leaks.append(f"{torn.sum()} pairs of identical images have different labels, among them "
                     f"{some.id} ({some.label}) = {some.id_2} ({some.label_2}).")
    if within := int((~torn & ~crossing).sum()):
        report.warnings.append(f"{within} pairs of identical images within a split.")
    worst = pairs.assign(mild=~torn & ~crossing).sort_values("mild", kind="stable").head(4)
    report.pictures = [(f"{p.split} {p.id} ({p.label}) = {p.split_2} {p.id_2} ({p.label_2})",
                        data.parts[p.split].images[p.row]) for p in worst.itertuples()]
    if len(pairs):
        report.tables["duplicates"] = pairs[["split", "id", "label", "split_2", "id_2", "label_2"]]
    twice = images["id"][images["id"].duplicated()].unique()
    if len(twice):
        report.errors.append(f"{len(twice)} ids occur twice, among them {', '.join(twice[:3])}.")


# =============================================================================
# Training
# =============================================================================

RECIPES = ("recommended", "paper", "linear", "demo")
RESUME_SECONDS = 60.0  # a run writes its resume file at most this often
FEATURE_BYTES = 2e9    # kept in memory for further linear evaluations; an image has 8 kB
# as CUDA, MPS, the processor and cuBLAS say it; "illegal memory access" is something else
OUT_OF_MEMORY = "out of memory|not enough memory|allocate memory|ALLOC_FAILED"


@dataclass(frozen=True)
class FineTuneConfig:
    """How a backbone is fine-tuned. `FineTuneConfig()` is the recipe that we recommend.

    The comment beside each of its defaults says why: literature, convention, or measured here
    (by the script in bench/ that it names). None was tuned on the published weights.

    Attributes:
        recipe: one of RECIPES; the others come from `FineTuneConfig.named`.
        image_size: side of the square that the network sees, in pixels.
        epochs: passes over the labelled images.
        batch_size: images per step.
        lr: peak learning rate of the head.
        backbone_lr: peak learning rate of the backbone.
        weight_decay: coefficient; decoupled (AdamW) unless `l2` puts it into the gradient (Adam).
        freeze_epochs: epochs in which only the head trains and BatchNorm keeps its statistics.
        warmup: share of the steps over which the rate rises linearly, in [0, 1].
        schedule: "cosine" to zero, "constant", or "authors" (see `paper`).
        augment: names among "flip_ud", "flip_lr" (p = 0.5) and "affine" (turned by up to 10
            degrees, scaled by up to 10 %, shifted by up to 10 % of the side).
        select_by: validation score that picks the best epoch: "ACC", "AUC" or "loss".
        normalise: "dataset" or "checkpoint": whose mean and std are used.
        subset_rule: "stratified", "authors" or "first", see `label_subset`.
        precision: "fp32", "tf32", "bf16", or "auto" (bf16 where the device computes in it).
        class_weights: weigh each class in the loss by the inverse of its share of the images.
        accumulate: parts that a batch is cut into to save memory. BatchNorm then sees the parts,
            so this is another experiment than a whole batch.
        lr_candidates: peak rates of the head to try, the backbone's in proportion; validation
            picks one. None by default. A fair race between methods gives each the same list.
        compile: run the training pass of whole batches through `torch.compile`; rounding changes.
        cuda_graph: record the training step once as a CUDA graph and replay it, so that the CPU
            has next to nothing to do; the computation stays the same. Needs a CUDA GPU.
    """

    recipe: str = "recommended"
    image_size: int = 224  # convention: the authors' size, and that of the ImageNet weights
    epochs: int = 50  # literature: ~700 steps for 425 images; BiT takes 500 (Kolesnikov 2020)
    batch_size: int = 32  # literature: 2 to 32 generalise best (Masters and Luschi 2018)
    lr: float = 1e-3  # literature: Adam's default (Kingma and Ba 2015)
    backbone_lr: float = 1e-4  # literature: pre-trained layers move less (Howard and Ruder 2018)
    weight_decay: float = 1e-4  # convention: ResNet's (He et al. 2016); with AdamW next to none
    l2: bool = False  # literature: decay apart from the gradient (Loshchilov and Hutter 2019)
    freeze_epochs: int = 5  # literature: a random head would spoil features (Kumar et al. 2022)
    warmup: float = 0.1  # literature: Adam's first steps are too large (Ma and Yarats 2021)
    schedule: str = "cosine"  # literature: Loshchilov and Hutter 2017
    augment: tuple[str, ...] = ("affine",)  # literature: usual for CT (Chlap et al. 2021)
    select_by: str = "AUC"  # literature: finer than accuracy on few images (Ling et al. 2003)
    normalise: str = "checkpoint"  # convention: preprocessing belongs to weights (torchvision)
    subset_rule: str = "stratified"  # measured: class shares vary half as much (real_images.py)
    precision: str = "auto"  # literature: bf16 trains a ResNet50 as fp32 does (Kalamkar 2019)
    class_weights: bool = False  # convention: off; AUC does not depend on the class shares
    accumulate: int = 1  # convention: off; BatchNorm would see parts of a batch
    lr_candidates: tuple[float, ...] = ()  # convention: off; it multiplies the cost
    compile: bool = False  # measured: 0 to 3 % on a CPU, and a minute to begin (step.py)
    cuda_graph: bool = False  # convention: off until it was measured on a GPU (step.py)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if type(value := getattr(self, f.name)) is not type(f.default):
                object.__setattr__(self, f.name, _plain(f.name, value))
        check_choice(self.recipe, RECIPES, "recipe")
        check_choice(self.schedule, ("cosine", "constant", "authors"), "schedule")
        check_choice(self.select_by, ("ACC", "AUC", "loss"), "select_by")
        check_choice(self.normalise, ("dataset", "checkpoint"), "normalise")
        check_choice(self.subset_rule, ("stratified", "authors", "first"), "subset_rule")
        check_choice(self.precision, ("auto", "fp32", "tf32", "bf16"), "precision")
        for name in self.augment:
            check_choice(name, ("flip_ud", "flip_lr", "affine"), "augment")
        for name in ("image_size", "epochs", "batch_size", "lr", "accumulate", "lr_candidates"):
            if not np.all(np.asarray(getattr(self, name)) > 0):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        for name, most in (("backbone_lr", math.inf), ("weight_decay", math.inf),
                           ("freeze_epochs", math.inf), ("warmup", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [0, {most}], not {getattr(self, name)}.")
        unused = [name for name in ("augment", "class_weights", "lr_candidates")
                  if self.recipe == "linear" and getattr(self, name)]
        if unused:
            raise ValueError(f"recipe 'linear' fits a logistic regression on fixed features, "
                             f"without {' or '.join(unused)}. Leave that out, or take another.")

    @classmethod
    def named(cls, recipe: str, dataset: str = "", **changes: Any) -> FineTuneConfig:
        """Return the recipe called `recipe`, with `changes` to single fields."""
        check_choice(recipe, RECIPES, "recipe")
        build = {"recommended": cls, "linear": cls.linear, "demo": cls.demo}
        config = cls.paper(dataset) if recipe == "paper" else build[recipe]()
        return dataclasses.replace(config, **changes)

    @classmethod
    def paper(cls, task: str = "covid_ct") -> FineTuneConfig:
        """Return what the authors' notebooks really do, faults included.

        Adam with L2 5e-4, batch 64, 70 epochs, fp32, best epoch by validation accuracy. Their
        freezing callback acts on an optimizer that already owns every parameter, so epochs 0-9
        train the head and all BatchNorm parameters at 1e-4, epoch 10 everything at 1e-4 and
        epochs 11-69 everything at 2e-5.

        Args:
            task: data set name; OrganSMNIST has no augmentation, all others the flip of COVID-CT.
        """
        organ = task.startswith("organ")
        return cls(
            recipe="paper", epochs=70, batch_size=64, lr=1e-4, backbone_lr=1e-4,
            weight_decay=5e-4, l2=True, freeze_epochs=10, warmup=0.0, schedule="authors",
            augment=() if organ else ("flip_ud",), select_by="ACC", normalise="dataset",
            subset_rule="first" if organ else "authors", precision="fp32",
        )

    @classmethod
    def linear(cls) -> FineTuneConfig:
        """Return linear evaluation: features once, then a logistic regression on them."""
        return cls(recipe="linear", augment=(), freeze_epochs=50, precision="fp32")

    @classmethod
    def demo(cls) -> FineTuneConfig:
        """Return a recipe that learns the phantoms from scratch on a CPU in seconds."""
        return cls(
            recipe="demo", image_size=48, epochs=5, batch_size=16, lr=1e-3, backbone_lr=1e-3,
            freeze_epochs=0, warmup=0.1, augment=(), normalise="dataset",
        )

    @property
    def eval_batch_size(self) -> int:
        """Images at once where nothing is trained: many, but fewer where a step must be small."""
        return min(256, 16 * self.batch_size)

    @property
    def short(self) -> bool:
        """True if this is shorter or smaller than the recipe that it names."""
        full = FineTuneConfig.named(self.recipe)
        return self.epochs < full.epochs or self.image_size < full.image_size


@dataclass(frozen=True)
class Preprocessing:
    """What happens to raw images before the network: expand, normalise, resize, in this order.

    The order and the `area` resize are those of the authors' notebooks (MONAI `Resize`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Turn (N, H, W) or (N, H, W, 3), 0..255, into float32 (N, 3, S, S)."""
        x = images.float().div(255)
        channels = [x] * 3 if x.ndim == 3 else x.unbind(3)
        # numbers, not tensors: nothing is copied to a GPU, so no step waits for it
        statistics = zip(channels, self.mean, self.std, strict=True)
        x = torch.stack([(c - m) / s for c, m, s in statistics], 1)      # (N, 3, H, W)
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="area")
        return x.contiguous(memory_format=torch.channels_last)


def augment_batch(x: torch.Tensor, names: Sequence[str], draws: torch.Tensor) -> torch.Tensor:
    """Return a batch (N, 3, S, S) augmented by `names`, as FineTuneConfig lists them.

    Args:
        draws: (N, 6) uniform random numbers in [0, 1) on the batch's device: whether to flip
            upside down and left to right, then angle, scale, and shift along x and y.
    """
    for column, (name, axis) in enumerate((("flip_ud", 2), ("flip_lr", 3))):
        if name in names:
            x = torch.where(draws[:, column].view(-1, 1, 1, 1) < 0.5, x.flip(axis), x)
    if "affine" in names:
        ranges = draws[:, 2:] * 2 - 1                                    # (N, 4) in [-1, 1)
        angle, scale = ranges[:, 0] * math.radians(10), 1 + ranges[:, 1] * 0.1
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        shift = ranges[:, 2:] * 0.2  # the side is 2 long: a tenth of it
        theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return x


@dataclass(frozen=True)
class Phase:
    """What trains in one epoch, and at which rate before warm-up and schedule.

    Attributes:
        trainable: "head", "head+bn" (BatchNorm's affine parameters too) or "all".
        lr, backbone_lr: rates of the head and of the backbone.
        batchnorm_moves: whether BatchNorm normalises by the batch and updates its statistics.
    """

    trainable: str
    lr: float
    backbone_lr: float
    batchnorm_moves: bool


def phase_of(config: FineTuneConfig, epoch: int) -> Phase:
    """Return the phase of `epoch` (from 0)."""
    if config.schedule == "authors":
        if epoch < config.freeze_epochs:
            return Phase("head+bn", config.lr, config.lr, True)
        rate = config.lr if epoch == config.freeze_epochs else config.lr / 5
        return Phase("all", rate, rate, True)
    if epoch < config.freeze_epochs:
        return Phase("head", config.lr, 0.0, False)
    return Phase("all", config.lr, config.backbone_lr, True)


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Freeze and unfreeze the parameters of a ResNet, and switch its BatchNorm layers."""
    model.train(phase.batchnorm_moves)
    model.requires_grad_(phase.trainable == "all")
    for module in model.modules():
        if module is model.fc or phase.trainable == "head+bn" and isinstance(
                module, nn.BatchNorm2d):
            module.requires_grad_(True)


def lr_factor(config: FineTuneConfig, step: int, steps: int) -> float:
    """Return the factor of warm-up and schedule at `step` of `steps`, in [0, 1]."""
    if config.schedule != "cosine":
        return 1.0
    rise = max(1, round(config.warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(model: nn.Module, config: FineTuneConfig) -> torch.optim.Optimizer:
    """Return Adam or AdamW with two groups: the backbone's parameters, then the head's."""
    backbone = [p for n, p in model.named_parameters() if not n.startswith("fc.")]
    kind = torch.optim.Adam if config.l2 else torch.optim.AdamW
    groups = [{"params": backbone, "lr": config.backbone_lr},
              {"params": model.fc.parameters(), "lr": config.lr}]
    return kind(groups, weight_decay=config.weight_decay, fused=True)


def _rng(*numbers: int) -> torch.Generator:
    """Return a CPU generator for this seed and epoch: nothing random has to be saved."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _batches(n: int, size: int, rng: torch.Generator) -> list[torch.Tensor]:
    """Return shuffled index batches; a last batch of one joins its neighbour (BatchNorm)."""
    batches = list(torch.randperm(n, generator=rng).split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _precision(config: FineTuneConfig, device: torch.device) -> str:
    """Return the precision that `config` means on `device`."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        # an older card, such as Colab's T4, has bfloat16 only emulated: slower than float32;
        # PyTorch's own is_bf16_supported speaks of the current device, which may be another
        real = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if real else "fp32"
    features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "fp32"


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    """Compute a forward pass in bfloat16 where that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def _numerics(precision: str) -> Iterator[None]:
    """Set repeatable kernels and the float32 mode of a GPU for a block, backward passes too."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    modes = matmul, cudnn.conv, cudnn.rnn
    before = cudnn.deterministic, cudnn.benchmark, [mode.fp32_precision for mode in modes]

    def set_all(deterministic: bool, benchmark: bool, precisions: Sequence[str]) -> None:
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        # the older switches, too: PyTorch raises an error where one that is asked contradicts
        matmul.allow_tf32, cudnn.allow_tf32 = (which == "tf32" for which in precisions[:2])
        for mode, wanted in zip(modes, precisions, strict=True):
            mode.fp32_precision = wanted

    set_all(True, False, ["ieee" if precision == "fp32" else "tf32"] * 3)
    try:
        yield
    finally:
        set_all(*before)


def _loss(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of (N, C) logits; binary, per label, where labels are (N, L) of 0 and 1."""
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.float(), weight)
    return F.cross_entropy(logits, labels, weight)


def _class_weights(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Return (C,) weights inverse to the class counts, 1 on average over the images.

    This is scikit-learn's "balanced". With several labels an image, a label weighs by how rare
    it is among the labels.
    """
    counts = labels.sum(0) if labels.ndim == 2 else labels.bincount(minlength=n_classes)
    return counts.sum() / (n_classes * counts.clamp_min(1).float())


class Progress:
    """Shows a run: a bar and, in a notebook, a live curve; or a line an epoch; or nothing.

    Args:
        how: "bar", "log", "none", or "auto": a bar where somebody is watching, else lines.
        total: images to train on, over all epochs.
        title: of bar and curve.
    """

    def __init__(self, how: str, total: int, title: str) -> None:
        check_choice(how, ("auto", "bar", "log", "none"), "progress")
        self.how = ("bar" if _is_watched() else "log") if how == "auto" else how
        self.bar = tqdm(total=total, desc=title, unit="img", disable=self.how != "bar")
        self.title, self.curve = title, None

    def epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Show the epoch that ended, the last row of `history`."""
        row = history[-1]
        names = ("C", "train_loss", "val_loss", "val_AUC", "val_ACC")
        facts = {k: f"{row[k]:.3g}" for k in names if row.get(k) is not None}
        if self.how == "log":
            text = ", ".join(f"{k} {v}" for k, v in facts.items())
            print(f"epoch {row['epoch']:>3}: {text} ({row['seconds']:.1f} s)", flush=True)
        elif self.how == "bar":
            self.bar.set_postfix({"epoch": row["epoch"], **facts})
            if _kernel() is None:
                return
            figure = _draw_history(pd.DataFrame(history), self.title)
            if self.curve is None:
                from IPython.display import display

                self.curve = display(figure, display_id=True)
            else:
                self.curve.update(figure)


def _kernel() -> Any:
    """Return the Jupyter kernel that this runs in, or None."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None)


def _is_watched() -> bool:
    """Say whether a person is at the other end: a terminal, or a notebook that can ask them."""
    kernel = _kernel()  # papermill and nbval run it with questions off
    return sys.stdout.isatty() if kernel is None else bool(getattr(kernel, "_allow_stdin", False))


class TrainingError(RuntimeError):
    """Training could not go on; says where it stopped and what to do next."""


class BusyError(TrainingError):
    """Another process is writing this run."""


class NotFiniteError(TrainingError):
    """A loss or an output of the network is not a number, or infinite."""


def _compiled(model: nn.Module) -> nn.Module:
    """Return the model with its passes through `torch.compile`."""
    # a process that works off a study may meet more shapes than 8; then `fullgraph` is an error
    torch._dynamo.config.recompile_limit = 256
    # kernels picked without timing them: another pick in another process would round differently
    return torch.compile(model, dynamic=False, fullgraph=True, options={"deterministic": True})


class _Step:
    """A training step on batches of one size in one phase; compiled or recorded if asked for.

    Recording follows PyTorch's notes on CUDA graphs: three steps on a side stream come first.
    These are steps of the training like all others, so nothing has to be undone.
    """

    def __init__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor,
        optimizer: torch.optim.Optimizer, config: FineTuneConfig, preprocessing: Preprocessing,
        *, compiled: bool,
    ) -> None:
        self.model = _compiled(model) if compiled else model
        self.images, self.labels, self.optimizer = images, labels, optimizer
        self.config, self.preprocessing = config, preprocessing
        self.weight = (_class_weights(labels, model.fc.out_features)
                       if config.class_weights else None)
        self.device, self.precision = labels.device, _precision(config, labels.device)
        self.graph, self.side, self.warm_ups = None, None, 0

    def __call__(self, *given: Any) -> torch.Tensor:
        """Train on the images `index` (B,), with random numbers (B, 6) and the two rates.
        Return the loss, which stays on the device."""
        if not self.config.cuda_graph:
            return self._take(*given)
        with torch.cuda.device(self.device):
            if self.warm_ups < 3:
                return self._warm_up(*given)
            if self.graph is None:
                self.given, self.graph = [x.clone() for x in given], torch.cuda.CUDAGraph()
                # records, computes nothing; PyTorch's own stream may be another GPU's
                with torch.cuda.graph(self.graph, stream=self.side):
                    self.loss = self._take(*self.given)
            for recorded, new in zip(self.given, given, strict=True):
                recorded.copy_(new)
            self.graph.replay()
        return self.loss

    def _warm_up(self, *given: torch.Tensor) -> torch.Tensor:
        """Take the step on a side stream."""
        self.warm_ups += 1
        self.side, here = self.side or torch.cuda.Stream(), torch.cuda.current_stream()
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            loss = self._take(*given)
        here.wait_stream(self.side)
        return loss

    def _weigh(self, index: torch.Tensor) -> Any:
        """Return what the loss of these images was divided by, their number or their weights."""
        if self.weight is None or self.labels.ndim == 2:
            return len(index)
        return self.weight[self.labels[index]].sum()

    def _take(self, index: torch.Tensor, draws: torch.Tensor, rates: Any) -> torch.Tensor:
        """Forward, backward, optimizer."""
        # no part of a single image: BatchNorm could not normalise by it
        parts = max(1, min(self.config.accumulate, len(index) // 2))
        loss = torch.zeros((), device=self.device)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group.update(lr=rate, capturable=self.graph is not None)
        self.optimizer.zero_grad()
        for some, drawn in zip(index.tensor_split(parts), draws.tensor_split(parts), strict=True):
            x = self.preprocessing(self.images[some])
            x = augment_batch(x, self.config.augment, drawn)             # (B, 3, S, S)
            with _autocast(self.precision, self.device):
                part = _loss(self.model(x), self.labels[some], self.weight)
            part = part * (self._weigh(some) / self._weigh(index))
            part.backward()
            loss += part.detach()
        self.optimizer.step()
        return loss


def train_one_epoch(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer: torch.optim.Optimizer,
    config: FineTuneConfig, preprocessing: Preprocessing, *, epoch: int, seed: int,
    tick: Callable[[int], Any] = lambda images: None, kept: dict[tuple, _Step] | None = None,
) -> tuple[float, int | None, torch.Tensor]:
    """Train once over the images; every random choice follows from `seed` and `epoch`.

    Args:
        images: (N, H, W) or (N, H, W, 3) on the device of the model.
        labels: (N,) int64, same device.
        tick: called with the number of images after each step, for a progress bar.
        kept: the same dict for all epochs on these objects, so that a step is compiled or
            recorded once for all of them.

    Returns:
        The mean loss, the first step whose loss was not finite (None if all were), and the
        indices (B,) of the images of that step.
    """
    phase = phase_of(config, epoch)
    set_phase(model, phase)
    rng, device = _rng(seed, epoch), labels.device
    batches = _batches(len(labels), config.batch_size, rng)
    # all that the steps need goes to the device before the first, so that none waits for it
    order = torch.cat(batches).to(device).split([len(batch) for batch in batches])
    draws = torch.rand(len(labels), 6, generator=rng).to(device)
    losses = torch.zeros(len(batches), device=device)
    first, steps = epoch * len(batches), config.epochs * len(batches)
    factors = [lr_factor(config, first + step, steps) for step in range(len(batches))]
    rates = np.float32([(phase.backbone_lr * f, phase.lr * f) for f in factors])
    # a graph would repeat numbers, so it reads them from memory, as float32
    rates = torch.tensor(rates, device=device) if config.cuda_graph else rates.tolist()
    kept = {} if kept is None else kept
    for passed in [key for key in kept if key[0] != phase.trainable]:
        del kept[passed]  # a recorded step holds the memory of a whole pass
    with _numerics(_precision(config, device)):
        for step, index in enumerate(order):
            key = phase.trainable, len(index)
            if key not in kept:
                kept[key] = _Step(model, images, labels, optimizer, config, preprocessing,
                                  compiled=config.compile and len(index) == config.batch_size)
            losses[step] = kept[key](index, draws[index], rates[step])  # read once an epoch
            tick(len(index))
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    return losses.mean().item(), bad[0] if bad else None, batches[bad[0] if bad else 0]


@torch.inference_mode()
def predict(
    model: nn.Module, images: np.ndarray | torch.Tensor, preprocessing: Preprocessing, *,
    batch_size: int = 256, precision: str = "fp32",
) -> torch.Tensor:
    """Run the model in evaluation mode over raw images, in large batches.

    Args:
        images: (N, H, W) or (N, H, W, 3), 0..255.

    Returns:
        What the model returns, float32 on the CPU: logits (N, C), or features (N, 2048) of a
        backbone without a head.
    """
    device = next(model.parameters()).device
    model.eval()
    rows = []
    with _numerics(precision), _autocast(precision, device):
        for batch in torch.as_tensor(images).split(batch_size):
            rows.append(model(preprocessing(batch.to(device))).float())
    return torch.cat(rows).cpu()


def evaluate(
    model: nn.Module, split: Split, preprocessing: Preprocessing, **options: Any,
) -> tuple[float, dict[str, float | None], np.ndarray]:
    """Return the mean loss, the scores (see `score`) and the (N, C) probabilities.

    Raises:
        NotFiniteError: an output is not finite, so it has no score.
    """
    logits = predict(model, split.images, preprocessing, **options)
    if len(broken := split.ids[~torch.isfinite(logits).all(1).numpy()]):
        raise NotFiniteError(f"The network's output is not finite for {len(broken)} of "
                             f"{len(split)} images held out: {_few(broken)}.")
    loss = _loss(logits, torch.as_tensor(split.labels)).item()
    scores = (logits.sigmoid() if split.labels.ndim == 2 else logits.softmax(1)).numpy()
    return loss, score(split.labels, scores), scores


@dataclass(frozen=True)
class Run:
    """One finished fine-tuning, as it lies in its folder.

    Attributes:
        folder: where it lies.
        config: everything that was asked for (config.json).
        metrics: test scores, best epoch, time (metrics.json).
        history: one row per epoch: losses, validation scores, rates, seconds.
        predictions: test ids (N,), groups (N,), labels (N,), scores (N, C), and the same of val.
        found: True if it was there already and this call trained nothing.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: pd.DataFrame
    predictions: dict[str, np.ndarray]
    found: bool = False

    @property
    def stamp(self) -> str:
        """"DEMO", "SHORT" or "" (a real, full run)."""
        return self.config["stamp"]


def _settings(
    report: KeyReport, data: DataSplits, config: FineTuneConfig, subset: np.ndarray,
    label_fraction: float, seed: int, fingerprints: tuple[str, str, str] | None = None,
) -> dict[str, Any]:
    """Return everything that decides a run's result, JSON-ready; `fingerprints` (of data, test
    part and subset) save time where they are known already."""
    of_data, of_test, of_subset = fingerprints or (
        data.fingerprint, data.test.fingerprint, data.train.take(subset).ids_fingerprint)
    demo = report.demo or data.demo or config.recipe == "demo"
    return {
        "dataset": data.name, "dataset_fingerprint": of_data, "test_fingerprint": of_test,
        "class_names": list(data.class_names), "method": report.method, "weights": report.weights,
        "weights_fingerprint": report.fingerprint, "allow_extra": list(report.allow_extra),
        "label_fraction": label_fraction, "seed": seed, "n_train": len(subset),
        "subset_fingerprint": of_subset, **dataclasses.asdict(config),
        "augment": list(config.augment), "lr_candidates": list(config.lr_candidates),
        "stamp": "DEMO" if demo else "SHORT" if config.short else "",
    }


def run_name(settings: Mapping[str, Any]) -> str:
    """Return the folder name: what a reader looks for, then 8 hex digits of all settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return (f"{settings['dataset']}_{settings['method']}_{settings['recipe']}"
            f"_f{settings['label_fraction']:g}_s{settings['seed']}_{digest}")


def load_run(folder: str | Path) -> Run:
    """Read a finished run from its folder.

    Raises:
        FileNotFoundError: the folder has no metrics.json, so the run is not finished.
    """
    folder = _path(folder)
    if not (folder / "metrics.json").exists():
        raise FileNotFoundError(
            f"{folder.name} has no metrics.json: the run is not finished. Run it again.")
    config, metrics = (_read_json(folder / f"{name}.json") for name in ("config", "metrics"))
    return Run(folder, config, metrics, pd.read_csv(folder / "history.csv"),
               _read_predictions(folder))


def add_head(model: nn.Module, n_classes: int, seed: int) -> nn.Module:
    """Return a copy of the backbone with a new `Linear(2048, n_classes)`, initialised by `seed`."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.default_generator.manual_seed(seed)
        model.fc = nn.Linear(2048, n_classes)
    return model


def _validated(evaluated: tuple, began: float) -> dict[str, Any]:
    """Return the end of a row of history: what `evaluate` says of validation, and the seconds."""
    loss, scores, _ = evaluated
    return {"val_loss": loss, **{f"val_{k}": scores[k] for k in ("ACC", "AUC", "F1")},
            "seconds": time.perf_counter() - began}


def _best_row(config: FineTuneConfig, history: Sequence[Mapping[str, Any]]) -> int:
    """Return the first of the rows that are best on validation; the loss breaks ties of the AUC."""
    keys = [{"loss": (-row["val_loss"],), "ACC": (row["val_ACC"],),
             "AUC": (row["val_AUC"], -row["val_loss"])}[config.select_by] for row in history]
    return keys.index(max(keys))


def _save_resume(path: Path, **state: Any) -> None:
    """Write the resume file; an older one stays intact until the new one is whole."""
    try:
        with _atomic(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        kept = "The one before it is intact" if path.exists() else "There was none before it"
        raise TrainingError(f"The resume file of {path.parent.name} could not be written "
                            f"({error}). {kept}: make room and run again.") from error


def _read_resume(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what `_save_resume` wrote; TrainingError if it is damaged. A disk or a GPU that fails
    raises its own error: the file may be whole, and nobody shall delete it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file can break the reader in any way
        raise TrainingError(f"The resume file {path} is damaged ({type(error).__name__}: {error}). "
                            "Delete it and run again: this run then starts anew.") from error
    return {**state, "best": {k: v.to(device) for k, v in state["best"].items()}}


def _train(
    model: nn.Module, train: Split, val: Split, config: FineTuneConfig, prep: Preprocessing,
    seed: int, folder: Path, shown: Progress, resume: str = "last.pt", save_at: int = 0,
) -> list[dict[str, Any]]:
    """Fine-tune in place, from the resume file if there is one; load the best epoch's weights.
    Return a row per epoch.

    Args:
        resume: name of the resume file, written at most every RESUME_SECONDS ...
        save_at: ... and after this many epochs (0: never).
    """
    device = next(model.parameters()).device
    images, labels, held_out = (torch.as_tensor(array).to(device)
                                for array in (train.images, train.labels, val.images))
    val = replace(val, images=held_out)
    optimizer, history, best, kept = make_optimizer(model, config), [], {}, {}
    if (folder / resume).exists():
        state = _read_resume(folder / resume, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, best = state["history"], state["best"]
        shown.bar.update(len(history) * len(labels))
    saved = time.monotonic()
    for epoch in range(len(history), config.epochs):
        began = time.perf_counter()
        loss, bad, batch = train_one_epoch(
            model, images, labels, optimizer, config, prep, epoch=epoch, seed=seed,
            tick=shown.bar.update, kept=kept)
        of_backbone, of_head = (float(f"{group['lr']:.6g}") for group in optimizer.param_groups)
        try:
            if bad is not None:
                raise NotFiniteError(f"The loss is not finite at step {bad}, on images "
                                     f"{', '.join(train.ids[batch.numpy()])}.")
            validation = evaluate(model, val, prep, precision=_precision(config, device),
                                  batch_size=config.eval_batch_size)
        except NotFiniteError as error:
            if best:
                _save_weights(folder / "best.safetensors", best)
            raise NotFiniteError(
                f"Epoch {epoch}: {error} The best weights of earlier epochs, if any, are kept in "
                f"{folder.name}. Check these images, or lower lr (now {config.lr:g}).") from None
        history.append({"epoch": epoch, "train_loss": loss, "lr": of_head,
                        "backbone_lr": of_backbone, **_validated(validation, began)})
        shown.epoch(history)
        if _best_row(config, history) == epoch:
            best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if time.monotonic() - saved > RESUME_SECONDS or epoch + 1 == save_at:
            _save_resume(folder / resume, history=history, best=best, model=model.state_dict(),
                         optimizer=optimizer.state_dict())
            saved = time.monotonic()
    model.load_state_dict(best)
    return history


def _race(
    model: nn.Module, train: Split, val: Split, config: FineTuneConfig, prep: Preprocessing,
    seed: int, folder: Path, shown: Progress,
) -> list[dict[str, Any]]:
    """Train once with each of `config.lr_candidates` and load the best into `model`.

    Validation alone decides. The history holds every epoch of every rate, but for those at which
    training broke down: they have lost, unless all of them did.
    """
    start, history, broken = copy.deepcopy(model.state_dict()), [], None
    for rate in config.lr_candidates:
        model.load_state_dict(start)
        tried = replace(config, lr=rate, backbone_lr=config.backbone_lr * rate / config.lr,
                        lr_candidates=())
        try:
            rows = _train(model, train, val, tried, prep, seed, folder, shown, f"last_{rate:g}.pt",
                          save_at=config.epochs)
        except NotFiniteError as error:
            broken = str(error)  # the error itself would keep the memory of this try
            continue
        history += [{"lr_candidate": rate, **row} for row in rows]
        if _best_row(config, history) >= len(history) - len(rows):
            best = copy.deepcopy(model.state_dict())
    if not history:
        raise NotFiniteError(broken)
    model.load_state_dict(best)
    return history


_kept_features: dict[tuple, DataSplits] = {}  # in this process, the newest last


def _features(
    net: nn.Module, data: DataSplits, prep: Preprocessing, batch_size: int, *key: Any,
) -> DataSplits:
    """Return the data with features (N, 2048) for images: once for all fractions and seeds.

    Always of all images and in the same batches, so that kept features have the bits of new ones.
    They are found again by `prep`, `batch_size` and `key`: device, fingerprints of data and net.
    """
    key = prep, batch_size, *key
    found = _kept_features.pop(key, None)
    if found is None:
        head, net.fc = net.fc, nn.Identity()
        found = replace(data, **{name: replace(part, images=predict(
            net, part.images, prep, batch_size=batch_size).numpy())
            for name, part in data.parts.items()})
        net.fc = head
    _kept_features[key] = found
    sizes = [8192 * sum(len(getattr(d, name)) for name in SPLITS) for d in _kept_features.values()]
    while len(sizes) > 1 and sum(sizes) > FEATURE_BYTES:
        del _kept_features[next(iter(_kept_features))], sizes[0]
    return found


def _fit_linear(
    head: nn.Linear, train: Split, val: Split, config: FineTuneConfig, shown: Progress,
) -> list[dict[str, Any]]:
    """Put a logistic regression on features (n, 2048) into `head`; L2 strength by validation.

    The protocol is that of Kornblith et al. 2019 (Do Better ImageNet Models Transfer Better?):
    features in evaluation mode, L-BFGS, the regularisation picked on validation data.
    """
    x = train.images
    mean, std = x.mean(0, dtype=float), x.std(0, dtype=float).clip(1e-6)
    history, fits = [], []
    for row, strength in enumerate(np.logspace(-5, 1, 7)):
        began = time.perf_counter()
        weight, bias = _logistic((x - mean) / std, train.labels, strength, head.out_features)
        weight = weight / std                                  # undo the scaling: (C, 2048)
        fits.append({"weight": torch.tensor(weight), "bias": torch.tensor(bias - weight @ mean)})
        head.load_state_dict(fits[-1])
        validation = evaluate(head, val, nn.Identity())
        history.append({"epoch": row, "C": strength, **_validated(validation, began)})
        shown.epoch(history)
    head.load_state_dict(fits[_best_row(config, history)])
    return history


def _logistic(
    x: np.ndarray, labels: np.ndarray, strength: float, n_classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's weight (C, D) and bias (C,) for softmax, or a sigmoid per label."""
    from sklearn.linear_model import LogisticRegression

    several = labels.ndim == 2
    fits = [LogisticRegression(C=strength, max_iter=2000).fit(x, column)
            for column in (labels.T if several else [labels])]
    coef = np.concatenate([np.column_stack([fit.intercept_, fit.coef_]) for fit in fits])
    if len(coef) == 1 and not several:  # the log-odds of the second of two classes
        coef = np.vstack([0 * coef, coef])
    rows = np.zeros((n_classes, 1 + x.shape[1]))
    rows[:, 0] = -1e4  # a class without a training image has a bias that never wins
    rows[np.arange(n_classes) if several else fits[0].classes_] = coef
    return rows[:, 1:], rows[:, 0]


def pick_device(device: str = "auto") -> torch.device:
    """Return the device called `device`, if it is here; "auto" takes a GPU if there is one."""
    mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    here = ["auto", *["cuda", *gpus] * bool(gpus), *["mps"] * mps, "cpu"]
    if device not in here:
        raise ValueError(f"device {device!r} is not here. Choose one of: {', '.join(here)}.")
    return torch.device(device)


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two processes never write one run."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise BusyError(f"Another process is writing {folder.name} right now. "
                        "Wait for it, then ask again: the finished run will be loaded.") from None


def describe_environment(device: str = "auto") -> str:
    """Return one line of versions and device for the top of a notebook."""
    facts = _environment(pick_device(device))
    return (f"Python {platform.python_version()}, torch {facts['torch']}, torchvision "
            f"{facts['torchvision']}, device {facts['device']}, {facts['threads']} thread(s)")


def _environment(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware, for the record; they do not name the run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "numpy": np.__version__}


def _peak_memory(device: torch.device) -> float | None:
    """Return GB: the most that a run held on a GPU; elsewhere this process's peak, None unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _check_trainable(config: FineTuneConfig, data: DataSplits) -> None:
    """Refuse what would fail or mislead later, before anything is written."""
    for name in SPLITS:
        if len(getattr(data, name)) == 0:
            raise ValueError(f"{data.name} has no {name} images. Training needs all three parts.")
    labels, classes = data.val.labels, np.arange(len(data.class_names))
    present = np.isin(classes, labels) if labels.ndim == 1 else labels.any(0) & ~labels.all(0)
    if config.select_by == "AUC" and not present.all():
        names = ", ".join(np.array(data.class_names)[~present])
        raise ValueError(f"{data.name}: validation has no image of {names}, or no other image, so "
                         "its AUC is undefined and cannot pick the best epoch. "
                         'Set select_by="loss", or split again.')


def preprocessing_for(config: FineTuneConfig, data: DataSplits, method: str) -> Preprocessing:
    """Return this method's preprocessing, normalised as the checkpoint or the data set asks.

    `random` has no statistics of its own and takes the data set's.
    """
    mean, std = data.mean, data.std
    if config.normalise == "checkpoint" and method in CHECKPOINTS:
        mean, std = CHECKPOINTS[method].mean, CHECKPOINTS[method].std
    elif config.normalise == "checkpoint" and method == "ImageNet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return Preprocessing(tuple(mean), tuple(std), config.image_size)


def fine_tune(
    model: nn.Module, report: KeyReport, data: DataSplits,
    config: FineTuneConfig | None = None, *, label_fraction: float = 1.0, seed: int = 0,
    study: str = "study", runs_dir: str | Path = "runs", device: str = "auto",
    progress: str = "auto", keep_best: bool = True, known: tuple | None = None,
) -> Run:
    """Fine-tune a backbone on a labelled subset, test it once, and write the run folder.

    A finished run with the same settings is loaded instead; an interrupted one is resumed.

    Args:
        model, report: from `load_backbone`; the model is copied, not changed.
        data: from `load_data`.
        config: the recipe; `FineTuneConfig()` if None.
        label_fraction: share of the training labels to use, in (0, 1].
        seed: decides subset, head, order and augmentation, alike for every method.
        study: name of the folder under `runs_dir` that keeps runs to be compared.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        progress: "auto", "bar", "log" or "none", see `Progress`.
        keep_best: keep the best epoch's weights as best.safetensors.
        known: what a study knows already of data that it alone holds, see `_known`.

    Raises:
        ValueError: settings that cannot work; nothing has been written.
        TrainingError: the loss was not finite, or another process writes this run.
    """
    config, where = config or FineTuneConfig(), pick_device(device)
    label_fraction, seed = _plain("label_fraction", label_fraction), _plain("seed", seed)
    if config.cuda_graph and where.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA GPU, and this run is on {where}. "
                         "Set cuda_graph=False.")
    _check_trainable(config, data)
    subset, fingerprints, checks = known or (label_subset(
        data.train.labels, label_fraction, seed=seed, groups=data.train.groups,
        rule=config.subset_rule), None, check_splits(data))
    checks.raise_for_errors()
    settings = _settings(report, data, config, subset, label_fraction, seed, fingerprints)
    folder = _path(runs_dir) / study / run_name(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with _sole_writer(folder), _explained(folder, config):
        if (folder / "metrics.json").exists():
            return dataclasses.replace(load_run(folder), found=True)
        for leftover in folder.glob(".*.tmp"):  # of a process killed while writing
            leftover.unlink()
        _write_json(folder / "config.json", {
            **settings, "warnings": list(checks.warnings),
            "environment": {**_environment(where), "precision": _precision(config, where)}})
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        began = time.perf_counter()
        net = add_head(model, len(data.class_names), seed)
        net = net.to(where, memory_format=torch.channels_last)
        prep, linear = preprocessing_for(config, data, report.method), config.recipe == "linear"
        passes = 1 if linear else config.epochs * max(1, len(config.lr_candidates))
        shown = Progress(progress, passes * len(subset), f"{report.method} on {data.name}")
        with contextlib.closing(shown.bar):
            if linear:  # of all that follows, only the head
                seen = _features(net, data, prep, config.eval_batch_size, where,
                                 settings["dataset_fingerprint"],
                                 _fingerprint({k: v.cpu() for k, v in model.state_dict().items()}))
                shown.bar.update(len(subset))
                last, look = net.fc, nn.Identity()
                history = _fit_linear(last, seen.train.take(subset), seen.val, config, shown)
            else:
                last, seen, look = net, data, prep
                history = (_race if config.lr_candidates else _train)(
                    net, data.train.take(subset), data.val, config, prep, seed, folder, shown)
        trained, best = time.perf_counter(), _best_row(config, history)
        # of a run that was interrupted, the epochs before that count too
        spent = max(trained - began, sum(row["seconds"] for row in history))
        results = {part: evaluate(last, getattr(seen, part), look,
                                  batch_size=config.eval_batch_size) for part in ("val", "test")}
        if keep_best:
            _save_weights(folder / "best.safetensors", net.state_dict())
        else:
            (folder / "best.safetensors").unlink(missing_ok=True)  # of a try that broke down
        pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
        _write_predictions(folder / "predictions.npz", data, results)
        threshold = choose_threshold(data.val.labels, results["val"][2])
        _write_json(folder / "metrics.json", {
            **score(data.test.labels, results["test"][2], threshold=threshold),
            "threshold": threshold, "loss": results["test"][0], "n_test": len(data.test),
            "lr": history[best].get("lr_candidate", config.lr), "lr_not_finite": sorted(
                {*config.lr_candidates} - {row.get("lr_candidate") for row in history}),
            "val": results["val"][1],
            "best_epoch": best, "train_seconds": spent,
            "seconds": spent + time.perf_counter() - trained, "memory_gb": _peak_memory(where),
            "mean": prep.mean, "std": prep.std,
        })
        for resume in folder.glob("last*.pt"):
            resume.unlink()
    return load_run(folder)


@contextlib.contextmanager
def _explained(folder: Path, config: FineTuneConfig) -> Iterator[None]:
    """Say what is kept when a run is interrupted, and what to lower when memory runs out.

    A notebook keeps its last error, and with it the variables of every call that it went through:
    they are cleared, so that the memory of the device is free for the next try.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        traceback.clear_frames(error.__traceback__)
        kept = "goes on from its last saved epoch" if any(folder.glob("last*.pt")) else \
            "starts again (nothing was saved in its first minute)"
        print(f"\nInterrupted. Ask for the same run again and {folder.name} {kept}.", flush=True)
        raise
    except (MemoryError, RuntimeError) as error:
        said = f"{error} {error.__context__}"  # a recording that failed hides why
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, said):
            raise
        for one in filter(None, (error, error.__context__)):
            traceback.clear_frames(one.__traceback__)
        raise TrainingError(
            f"Out of memory with batch_size {config.batch_size} at {config.image_size} pixels. "
            "Lower batch_size or image_size, or set accumulate=2: two half batches a step, which "
            "is another experiment, because BatchNorm sees half batches.") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically; a NaN would be an error, since no score is ever NaN."""
    with _atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _save_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state_dict as safetensors, atomically."""
    from safetensors.torch import save_file

    with _atomic(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)


def _write_predictions(path: Path, data: DataSplits, results: Mapping[str, tuple]) -> None:
    """Write ids, groups, labels and (N, C) scores of test and val, atomically."""
    arrays = {}
    for part, prefix in (("test", ""), ("val", "val_")):
        split = getattr(data, part)
        groups = np.full(len(split), "") if split.groups is None else split.groups
        arrays |= {f"{prefix}ids": split.ids.astype(str), f"{prefix}groups": groups.astype(str),
                   f"{prefix}labels": split.labels, f"{prefix}scores": results[part][2]}
    with _atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


# =============================================================================
# Evaluation
# =============================================================================


SCORES = ("ACC", "balanced ACC", "AUC", "F1", "F1 paper", "sensitivity", "specificity", "Brier")


def score(
    labels: np.ndarray, scores: np.ndarray, *, threshold: float | None = None,
) -> dict[str, float | None]:
    """Score probabilities against labels with scikit-learn; None means undefined.

    Args:
        labels: (N,) class indices, or (N, L) of 0 and 1 for several labels an image.
        scores: (N, C) probabilities; the largest is the prediction (0.5 with several labels).
        threshold: of sensitivity and specificity, see `choose_threshold`; two classes only.

    Returns:
        ACC: share of right answers (with several labels: over all of them, as in MedMNIST).
        balanced ACC: mean recall over the classes.
        AUC: area under the ROC curve; one-vs-rest macro mean with more than two classes.
        F1: macro mean. "F1 paper": as in the authors' notebooks, class 1 with two classes,
        micro (which is ACC) with more.
        sensitivity, specificity: recall of class 1 and of class 0, class 1 being said from
        `threshold` on. In COVID-CT class 1 is NonCOVID.
        Brier: mean squared distance from the truth, halved (Brier 1950; 0 is best, 1 worst).
        An AUC without both kinds of labels, or a mean over such, is None.
    """
    from sklearn import metrics

    labels, scores = np.asarray(labels), np.asarray(scores)
    several = labels.ndim == 2
    truth = labels if several else labels[:, None] == np.arange(scores.shape[1])     # (N, C)
    present = [len(np.unique(column)) == 2 for column in truth.T]
    options = {"average": "macro"} if several else {"multi_class": "ovr"}
    predicted = (scores > 0.5).astype(int) if several else scores.argmax(1)
    two = scores.shape[1] == 2 and not several
    f1 = {name: float(metrics.f1_score(labels, predicted, average=average, zero_division=0.0))
          for name, average in (("F1", "macro"), ("F1 paper", "binary" if two else "micro"))}
    recalls = [None, None]
    if two and threshold is not None and all(present):
        recalls = metrics.recall_score(labels, scores[:, 1] >= threshold, average=None).tolist()
    distance = ((scores.astype(float) - truth) ** 2).sum(1).mean()
    return {
        "ACC": float((labels == predicted).mean()),
        "balanced ACC": None if several or not all(present) else float(
            metrics.balanced_accuracy_score(labels, predicted)),
        "AUC": float(metrics.roc_auc_score(labels, scores[:, 1] if two else scores, **options))
        if all(present) else None,
        **f1, "sensitivity": recalls[1], "specificity": recalls[0],
        "Brier": float(distance / (scores.shape[1] if several else 2)),
    }


def choose_threshold(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Return the probability of class 1 that separates *validation* images best.

    Best is the largest sensitivity + specificity (Youden 1950). None where there are not two
    classes, or only one of them is present.
    """
    from sklearn.metrics import roc_curve

    if labels.ndim == 2 or scores.shape[1] != 2 or len(np.unique(labels)) != 2:
        return None
    false_alarms, sensitivity, thresholds = roc_curve(labels, scores[:, 1])
    return float(thresholds[1:][(sensitivity - false_alarms)[1:].argmax()])  # the first is inf


def pool_by_patient(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Average the probabilities of each patient's images; images of unknown patients are left out.

    Args:
        labels: (N,) class indices, or (N, L) of 0 and 1.
        scores: (N, C) probabilities.
        groups: (N,) patient ids, "" where unknown.

    Returns:
        Labels (P,) or (P, L) and mean probabilities (P, C) of the P known patients.

    Raises:
        ValueError: a patient's images carry different labels, so the patient has none.
    """
    known = groups != ""
    truth, chances = (pd.DataFrame(a[known]).groupby(groups[known]) for a in (labels, scores))
    mixed = truth.nunique().max(axis=1)
    if (mixed > 1).any():
        raise ValueError(f"Images of patient {mixed.idxmax()!r} carry different labels: "
                         "score by image, or label the patients first.")
    return truth.first().to_numpy().reshape(-1, *labels.shape[1:]), chances.mean().to_numpy()


def bootstrap_interval(
    labels: np.ndarray, scores: np.ndarray, metric: str = "AUC", *,
    threshold: float | None = None, groups: np.ndarray | None = None, level: float = 0.95,
    n_draws: int = 1000, seed: int = 0,
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of one run's score over new test images.

    It speaks of drawing other test images for this one trained model; it knows nothing of the
    spread between seeds. Draws in which the score is undefined are left out.

    Args:
        labels, scores, threshold: as in `score`.
        metric: one of SCORES.
        groups: (N,) patient ids, "" where unknown: a patient's images are drawn together.
        level: coverage aimed at, in (0, 1).

    Returns:
        Lower and upper end, or None where the score is undefined, for these images or in all draws.
    """
    check_choice(metric, SCORES, "metric")
    weights = _resampling(_units(len(labels), groups), n_draws, seed)
    values = _weighted_score(metric, labels, scores, weights, threshold)
    if np.isnan(values[0]) or np.isnan(values[1:]).all():
        return None
    low, high = np.nanquantile(values[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _units(n: int, groups: np.ndarray | None) -> np.ndarray:
    """Return (N,) int: what is drawn as a whole, the patient where known, else the image."""
    if groups is None:
        return np.arange(n)
    patients = np.unique(groups, return_inverse=True)[1]
    units = np.where(groups == "", n + np.arange(n), patients)
    return np.unique(units, return_inverse=True)[1]


def _resampling(units: np.ndarray, n_draws: int, seed: int) -> np.ndarray:
    """Return (N, 1 + n_draws) float32: how often each image is drawn; once in column 0."""
    rng, n = np.random.default_rng(seed), units.max() + 1
    draws = (np.bincount(rng.integers(n, size=n), minlength=n)[units] for _ in range(n_draws))
    return np.stack([np.ones(len(units)), *draws], axis=1, dtype=np.float32)


def _weighted_score(
    metric: str, labels: np.ndarray, scores: np.ndarray, weights: np.ndarray,
    threshold: float | None = None,
) -> np.ndarray:
    """Return (D,) values of `score(...)[metric]`, image i counted weights[i, d] times; or NaN.

    Args:
        weights: (N, D) whole numbers as float32; their sums stay exact up to 16 million.
    """
    several, classes = labels.ndim == 2, scores.shape[1]
    truth = labels > 0 if several else labels[:, None] == np.arange(classes)         # (N, C)
    if metric == "AUC":
        columns = (1,) if classes == 2 and not several else range(classes)
        return np.mean([_weighted_auc(truth[:, c], scores[:, c], weights) for c in columns], 0)
    if metric == "Brier":
        distance = ((scores.astype(float) - truth) ** 2).sum(1) / (classes if several else 2)
        return distance @ weights / weights.sum(0, dtype=float)
    answer = scores.argmax(1)
    if metric in ("sensitivity", "specificity"):
        if threshold is None or several or classes != 2:
            return np.full(weights.shape[1], np.nan)
        answer = scores[:, 1] >= threshold
    said = scores > 0.5 if several else answer[:, None] == np.arange(classes)        # (N, C)
    hit, true, claimed, same = ((m.T.astype(np.float32) @ weights).astype(float) for m in (
        truth & said, truth, said, truth == said))                                   # (C, D)
    with np.errstate(invalid="ignore"):                    # 0 / 0 is NaN: a class without images
        recall = np.where((true == 0).any(0) | several, np.nan, hit / true)
        f1, micro = 2 * hit / (true + claimed), 2 * hit.sum(0) / (true + claimed).sum(0)
    one = f1[1] if classes == 2 and not several else micro
    return {
        "ACC": same.mean(0) / weights.sum(0) if several else hit.sum(0) / true.sum(0),
        "balanced ACC": recall.mean(0), "sensitivity": recall[-1], "specificity": recall[0],
        "F1": np.nan_to_num(f1).mean(0) if several else np.nanmean(f1, 0),
        "F1 paper": np.nan_to_num(one),
    }[metric]  # F1 as in scikit-learn: over the classes that occur, over all labels


def _weighted_auc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (D,) areas under the ROC curve: sorted once, then counted under each weighting.

    The area is the chance that a positive outranks a negative, a tie counting half (Mann and
    Whitney 1947): for each positive, the weight of the negatives below it and half of its ties.
    """
    order = np.argsort(scores)
    positive, scores = positive[order], scores[order]
    negatives, positives = weights[order[~positive]], weights[order[positive]]
    below = F.pad(torch.from_numpy(negatives).cumsum(0), (0, 0, 1, 0)).numpy()  # NumPy's is slow
    left, right = (np.searchsorted(scores[~positive], scores[positive], side)
                   for side in ("left", "right"))
    wins = (positives * (below[left] + below[right])).sum(0, dtype=float) / 2
    pairs = positives.sum(0, dtype=float) * below[-1]
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


# =============================================================================
# Results
# =============================================================================

ESTIMANDS = ("new seed and new test set", "new seed on this test set")
RATES = ("lr", "backbone_lr")  # may be chosen for each method
MUST_AGREE = ("test_fingerprint", "dataset_fingerprint", "used_precision", *(
    f.name for f in dataclasses.fields(FineTuneConfig) if f.name not in RATES))
RESULT_COLUMNS = (
    "dataset", "method", "label_fraction", "seed", "stamp", "weights", "n_train", *MUST_AGREE,
    *RATES, "weights_fingerprint", "subset_fingerprint",
)


@contextlib.contextmanager
def _of_a_run(path: Path) -> Iterator[None]:
    """Say which file of a run folder is not whole, and what to do."""
    try:
        yield
    except Exception as error:                                       # damaged files raise anything
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError):
            raise                                                    # the file itself may be whole
        raise ValueError(f"{path} is damaged ({error}). Delete the folder {path.parent.name} and "
                         "run the study again: this run is done anew.") from None


def _read_json(path: Path) -> dict[str, Any]:
    """Read a file of a run folder; ValueError if it is not whole."""
    with _of_a_run(path):
        return json.loads(path.read_text())


def _read_predictions(folder: Path) -> dict[str, np.ndarray]:
    """Read the predictions of a run folder; ValueError if they are not whole."""
    path = folder / "predictions.npz"
    with _of_a_run(path), open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def load_runs(folder: str | Path) -> pd.DataFrame:
    """Read every run folder below `folder` into one table, a row a run.

    Returns:
        What was asked for (dataset, method, recipe, label_fraction, seed, stamp, ...), the test
        scores (None where undefined), `status` ("done", or "unfinished" for a folder without
        metrics.json) and `folder`. In a study with demo runs the controls are part of the demo.

    Raises:
        FileNotFoundError: no run lies below `folder`.
        ValueError: a run's file is damaged.
    """
    rows, folder = [], _path(folder)
    for path in sorted(folder.rglob("config.json")):
        config = _read_json(path)
        config["used_precision"] = config.get("environment", {}).get("precision")  # of "auto"
        row = {k: str(v) if isinstance(v := config.get(k), list) else v for k in RESULT_COLUMNS}
        done = path.with_name("metrics.json")
        if done.exists():
            metrics = _read_json(done)
            metrics["chosen_lr"] = metrics.pop("lr", None)  # beside the one that was asked for
            row |= {k: v for k, v in metrics.items() if not isinstance(v, (dict, list))}
        rows.append({**row, "status": "done" if done.exists() else "unfinished",
                     "folder": path.parent})
    if not rows:
        there = sorted({path.parts[-3] for path in folder.parent.glob("*/*/config.json")})
        raise FileNotFoundError(
            f"No runs in {folder}. {f'Studies beside it: {_few(there)}. ' if there else ''}Set the "
            "folder of a study that has been run, or run one (notebook 04, or make workbook).")
    table = pd.DataFrame(rows)
    study = table["folder"].map(lambda path: path.parent)
    of_demo = study.isin(study[table["stamp"] == "DEMO"]) & table["method"].isin(CONTROLS)
    return table.assign(stamp=table["stamp"].mask(of_demo, "DEMO"))


def compare_methods(
    runs: pd.DataFrame, metric: str = "AUC", *, control: str = "random", loss: bool = False,
    estimand: str = ESTIMANDS[0], per: str = "image", by: Sequence[str] = (),
    level: float = 0.95, n_draws: int = 500, seed: int = 0,
) -> pd.DataFrame:
    """Hold every method against a control, with intervals that say what they are about.

    Differences are taken seed by seed: the same seed means the same labelled images and the same
    test images, so what varies alike cancels. Seeds are treated as the readers of a multi-reader
    study (Obuchowski and Rockette 1995): the variance of a mean over n seeds is sd^2 / n, plus,
    for a new test set, the covariance that seeds share because they met the same test images,
    which is bootstrapped over patients or images. Quantiles are Student's, of both parts weighted
    by their variance (Cochran and Cox 1957); bench/simulate_studies.py shows the coverage. A test
    set knows as much as its rarest class, except for ACC and Brier: with less than ten of a class,
    expect a method's own interval (not a difference's) to cover some percent less than it says.
    Neither estimand speaks of another pool of training images or of pre-training anew.

    Args:
        runs: from `load_runs`; unfinished runs are left out.
        metric: one of SCORES (of Brier, less is better).
        control: the method to subtract.
        loss: compare what is lost from all labels to each smaller fraction, not the score itself.
        estimand: one of ESTIMANDS, what an interval covers and a p value tests. A seed stands for
            the choice of labelled images, the head and the order of training.
        per: "image", or "patient": probabilities averaged, see `pool_by_patient`.
        by: columns to keep apart that would else have to agree, such as "recipe".
        level: of the intervals, in (0, 1).
        n_draws, seed: of the bootstrap.

    Returns:
        A row per dataset, `by`, label_fraction and method: n_test (patients where known, else
        images: see unit), n_rarest (how many of them have the rarest class), n seeds, mean, sd,
        [low, high], values; n_pairs, difference to the control, its sd and interval, p, p_holm
        (Holm 1979, over all differences of this table), and detectable: the difference that would
        have been shown with a chance of 80 % at Holm's strictest level. NaN is undefined; one seed
        has no spread. What was asked for is in `.attrs`; `describe_comparison` puts the table into
        words.

    Raises:
        ValueError: runs that must not be mixed, or an unknown metric, control or column.
    """
    from statsmodels.stats.multitest import multipletests

    done = runs[runs["status"] == "done"]
    for value, options, what in ((metric, SCORES, "metric"), (estimand, ESTIMANDS, "estimand"),
                                 (per, ("image", "patient"), "per")):
        check_choice(value, options, what)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, such as 0.95, not {level}.")
    _refuse_mixing(done, by)
    for column in by:  # groups with a NaN for a name would be dropped
        if done[column].isna().any():
            done = done.assign(**{column: done[column].map(str, na_action="ignore").fillna(
                "not recorded")})
    cell = ["dataset", *by, "label_fraction", "n_test", "n_rarest", "unit"]
    draws = _draw_scores(done, [*cell, "method", "seed"], metric, per, n_draws, seed)
    if loss:
        draws = _losses(draws) * (-1 if metric == "Brier" else 1)
    size = "n_test" if metric in ("ACC", "Brier") else "n_rarest"
    table = _tabulate(draws, cell, control, size * (estimand == ESTIMANDS[0]), level)
    if not loss:
        table[["low", "high"]] = table[["low", "high"]].clip(0, 1)
    if (tested := table["p"].notna()).any():
        table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    table.attrs = {"metric": metric, "control": control, "loss": loss, "estimand": estimand,
                   "per": per, "by": list(by), "level": level, "stamp": done["stamp"].iloc[0],
                   "methods": runs.groupby("dataset")["method"].agg(set).map(sorted).to_dict()}
    return table


def _draw_scores(
    done: pd.DataFrame, index: list[str], metric: str, per: str, n_draws: int, seed: int,
) -> pd.DataFrame:
    """Return a row a run: its score in column 0, then under each draw of the test images."""
    values, tests, facts = {}, {}, {}
    for row, run in done.iterrows():
        found = _read_predictions(run["folder"])

        def part(prefix: str) -> list[np.ndarray | None]:
            arrays = [found[f"{prefix}{name}"] for name in ("labels", "scores", "groups")]
            return arrays if per == "image" else [*pool_by_patient(*arrays), None]

        labels, scores, groups = part("")
        if len(labels) == 0:
            raise ValueError(f"No patient of {run['dataset']} is known. Compare per image.")
        threshold = None
        if metric in ("sensitivity", "specificity"):
            threshold = choose_threshold(*part("val_")[:2])
        key = run["test_fingerprint"]
        if key not in tests:
            units = _units(len(labels), groups)
            tests[key] = run["folder"].name, found, _resampling(units, n_draws, seed)
            known = per == "patient" or groups != ""
            unit = "patients" if np.all(known) else (
                "patients or images" if known.any() else "images")
            facts[key] = units.max() + 1, _rarest(labels, units, scores.shape[1]), unit
        name, first, weights = tests[key]
        for what in ("ids", "labels", "groups"):
            if not np.array_equal(found[what], first[what]):
                raise ValueError(f"{run['folder'].name} and {name} have the same test images but "
                                 f"other {what}. Run both with the same list of images.")
        values[row] = _weighted_score(metric, labels, scores, weights, threshold)
    facts = pd.DataFrame.from_dict(facts, "index", columns=["n_test", "n_rarest", "unit"])
    levels = done.assign(**{c: done["test_fingerprint"].map(facts[c]) for c in facts})[index]
    return pd.DataFrame(np.stack(list(values.values())), pd.MultiIndex.from_frame(levels))


def _rarest(labels: np.ndarray, units: np.ndarray, classes: int) -> int:
    """Return how many patients or images have the rarest class, or the rarer value of a label."""
    truth = labels > 0 if labels.ndim == 2 else labels[:, None] == np.arange(classes)
    return min(len(np.unique(units[side])) for column in truth.T for side in (column, ~column)
               if side.any())


def _tabulate(
    draws: pd.DataFrame, cell: list[str], control: str, size: str, level: float,
) -> pd.DataFrame:
    """Return a row per cell and method: its own mean, and its paired difference to the control.
    `size` is the level that counts test units, "" if the test set is this one."""
    family = len(draws.groupby([*cell, "method"])) - len(draws.groupby(cell))
    rows = []
    for key, part in draws.groupby(cell):
        facts = dict(zip(cell, key))
        seeds = {m: p.droplevel([*cell, "method"]) for m, p in part.groupby("method")}
        if control not in seeds:
            raise ValueError(f"No run of the control {control!r} for {key[:-3]}. "
                             f"Run it, or choose a control among: {', '.join(seeds)}.")
        for method, x in seeds.items():
            pairs = x.sub(seeds[control]).dropna(how="all")[:None if method != control else 0]
            own, other = (_infer(a.to_numpy(), facts.get(size), level, family) for a in (x, pairs))
            rows.append({
                **facts, "method": method, "n": len(x), "mean": own["mean"],
                "sd": own["sd"], "low": own["low"], "high": own["high"], "values": tuple(x[0]),
                "n_pairs": len(pairs), "difference": other["mean"], "difference_sd": other["sd"],
                "difference_low": other["low"], "difference_high": other["high"],
                "p": other["p"], "p_holm": np.nan, "detectable": other["detectable"]})
    rank = {name: i for i, name in enumerate(METHOD_COLORS)}
    return pd.DataFrame(rows).sort_values(
        [*cell, "method"], ignore_index=True,
        key=lambda column: column.map(rank) if column.name == "method" else column)


def _losses(draws: pd.DataFrame) -> pd.DataFrame:
    """Subtract every run from the run of the same method and seed that had all labels."""
    fraction = draws.index.get_level_values("label_fraction")
    full, rest = draws[fraction == 1].droplevel("label_fraction"), draws[fraction < 1]
    if full.empty or rest.empty:
        raise ValueError("A loss needs runs with all labels (label_fraction 1) and with fewer; "
                         f"found the fractions {sorted(set(fraction))}.")
    partner = rest.index.droplevel("label_fraction")
    rest, partner = rest[partner.isin(full.index)], partner[partner.isin(full.index)]
    return full.loc[partner].to_numpy() - rest


def _infer(x: np.ndarray, size: int | None, level: float, family: int) -> dict[str, float]:
    """Estimate a mean over seeds from (n, 1 + D) values and draws; see `compare_methods`.

    Args:
        size: how many patients or images speak for a new test set; None for this test set.
        family: comparisons that Holm's correction counts.
    """
    from scipy import optimize, special

    found = dict.fromkeys(("mean", "sd", "low", "high", "p", "detectable"), np.nan)
    n, values, draws = len(x), x[:, 0], x[:, 1:]
    if n == 0 or np.isnan(values).any():
        return found
    found["mean"] = values.mean()
    draws = draws[:, ~np.isnan(draws).any(0)]
    if n == 1 or size is not None and (size == 1 or draws.shape[1] < 2):
        return found
    parts = np.array([values.var(ddof=1) / n, 0.0])
    if size is not None:
        cov = np.cov(draws)                                                          # (n, n)
        parts[1] = max(0.0, (cov.sum() - cov.trace()) / (n * (n - 1)))
    error = math.sqrt(parts.sum())

    def quantile(tail: float) -> float:
        return -(parts @ special.stdtrit([n - 1, (size or 2) - 1], tail)) / parts.sum()

    found |= {"sd": values.std(ddof=1), "p": np.nan if found["mean"] else 1.0}
    if error > 0:
        half, t = quantile((1 - level) / 2) * error, abs(found["mean"]) / error
        certain = quantile(5e-13) < t
        found |= {
            "low": found["mean"] - half, "high": found["mean"] + half,
            "p": 1e-12 if certain else optimize.brentq(lambda p: quantile(p / 2) - t, 1e-12, 1),
            "detectable": (quantile((1 - level) / 2 / max(family, 1)) + quantile(0.2)) * error}
    return found


def _refuse_mixing(done: pd.DataFrame, by: Sequence[str]) -> None:
    """Raise ValueError if the runs cannot stand in one comparison, naming what differs."""
    if done.empty:
        raise ValueError("None of these runs is finished, so there is nothing to compare.")
    stamps = done["stamp"].fillna("not stamped").unique()
    if len(stamps) > 1:
        raise ValueError(f"These runs mix {sorted(s or 'real' for s in stamps)}: "
                         "demo or shortened runs are never compared with real ones. "
                         "Keep each kind in a study of its own.")
    for column in by:
        check_choice(column, (*MUST_AGREE, *RATES), "by")
    apart = ["dataset", *by]
    trained = done[done["method"] != "random"]  # whose weights are drawn anew with each seed
    for table, keys, columns in ((done, apart, [c for c in MUST_AGREE if c not in by]),
                                 (done, [*apart, "method"], [c for c in RATES if c not in by]),
                                 (trained, [*apart, "method"], ["weights_fingerprint"])):
        for key, group in table.groupby(keys, dropna=False):
            for column in columns:
                if len(found := group[column].unique()) > 1:
                    way = f", or keep them apart with by=[{column!r}]" * (
                        column in (*MUST_AGREE, *RATES))
                    if column == "used_precision":
                        way += " (precision='auto' depends on the device: set it for all)"
                    raise ValueError(f"Runs of {', '.join(map(str, key))} differ in {column}: "
                                     f"{sorted(map(str, found))}. Compare like with like{way}.")
    for key, group in done.groupby([*apart, "label_fraction", "seed"]):
        if group["subset_fingerprint"].nunique() > 1:
            raise ValueError(f"Runs of {key} were trained on different labelled images.")
        twice = group[group["method"].duplicated()]["method"]
        if len(twice):
            raise ValueError(f"{twice.iloc[0]} was run twice for {key} with different settings: "
                             f"{', '.join(p.name for p in group['folder'])}. Keep one.")


def describe_comparison(table: pd.DataFrame) -> str:
    """Say in plain words what a table of `compare_methods` shows, and what it does not show."""
    facts = table.attrs
    metric, control, alpha = facts["metric"], facts["control"], 1 - facts["level"]
    count = table["p"].count()
    what = f"loss of {metric} with fewer labels" if facts["loss"] else metric
    lines = [f"{facts['stamp']} {what}, scored per {facts['per']}, held against {control}; "
             f"{facts['level']:.0%} intervals for a {facts['estimand']}; p after Holm's correction "
             f"for {count} comparison{'' if count == 1 else 's'}.".lstrip()]
    for key, whole in table.groupby(["dataset", *facts["by"], "label_fraction"], sort=False):
        part = whole[whole["method"] != control]
        where = f"{', '.join(map(str, key[:-1]))}, {key[-1]:g} of the labels:"
        shown = part[part["p_holm"] < alpha]
        for row in shown.itertuples():
            better = "better" if (row.difference > 0) != (metric == "Brier") else "worse"
            verb = "loses more" if row.difference > 0 else "loses less"
            lines.append(f"{where} {row.method} {verb if facts['loss'] else f'is {better}'} than "
                         f"{control}, {row.difference:+.3f} [{row.difference_low:+.3f}, "
                         f"{row.difference_high:+.3f}], p = {row.p_holm:.2g}, {row.n_pairs} seeds.")
        unclear = part[part["p_holm"] >= alpha]
        if len(unclear):
            size = unclear["detectable"].max()
            hopeless = unclear.loc[~(unclear["detectable"] < 1), "method"]
            mean = whole.set_index("method")["mean"][control]
            room = 1 if facts["loss"] else mean if metric == "Brier" else 1 - mean
            power = "is too small to show any difference reliably"
            if size < 1:
                power = f"would show a difference of {size:.2f} four times in five"
                if size > room:
                    power += f", but {control} can be beaten by {room:.2f} at most"
            elif len(hopeless) < len(unclear):
                power += f" for {', '.join(hopeless)}"
            lines.append(f"{where} no difference shown between {control} and "
                         f"{', '.join(unclear['method'])}. This study {power}.")
        undefined = part[part["p_holm"].isna()]["method"]
        if len(undefined):
            lines.append(f"{where} {', '.join(undefined)}: nothing can be said. That takes two "
                         "seeds shared with the control, several test images of each class, and "
                         "scores that are defined and not all the same.")
        absent = [m for m in facts["methods"][key[0]] if m not in set(whole["method"])]
        if absent:
            lines.append(f"{where} not compared, for lack of finished runs: {', '.join(absent)}.")
        if facts["loss"] and len(part) and whole["mean"].notna().all():
            least = whole.loc[whole["mean"].idxmin(), "method"]
            proven = (least == control and (part["difference"] > 0).all()
                      and len(shown) == len(part) and not absent)
            lines.append(f"{where} {least} has the smallest mean loss, {whole['mean'].min():+.3f}; "
                         f"that {control} loses least is {'' if proven else 'not '}shown.")
    return "\n".join(lines)


# =============================================================================
# Study
# =============================================================================

# A cell of a study is a dict of these and of FineTuneConfig's fields; these are the defaults.
ASKED: dict[str, Any] = {"method": "SparK", "weights": "stand-in", "dataset": "phantom",
                         "recipe": "demo", "label_fraction": 1.0, "seed": 0}
WHERE: dict[str, Any] = {"study": "study", "runs_dir": "runs", "data_dir": "data",
                         "checkpoints_dir": "checkpoints", "device": "auto", "notebook": "",
                         "unofficial": False, "keep_best": False, "keep_subsets": False}
PATHS = ("runs_dir", "data_dir", "checkpoints_dir", "notebook")
WEIGHT_BYTES = 94.4e6  # of a ResNet50; a resume file holds four times as much
BUSY_SECONDS = 2.0     # between two looks at runs that another process is writing
ATTEMPTS = 3           # a cell is given up when its worker has died so often
_one_at_a_time = threading.Lock()


def _call(fn: Callable, /, *args: Any, **options: Any) -> Future:
    """Call `fn` now, in this process; the future holds its result or its error."""
    future = Future()
    try:
        future.set_result(fn(*args, **options))
    except Exception as error:
        future.set_exception(error)
    return future


def _plain(name: str, value: Any) -> Any:
    """Return a setting's value in its default's type: 1, 1.0 and NumPy's 1 then name one run."""
    defaults = {f.name: f.default for f in dataclasses.fields(FineTuneConfig)} | ASKED | WHERE
    default = defaults[check_choice(name, defaults, "Setting")]
    if isinstance(default, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and value and (name in PATHS or name == "dataset" and (
            value not in DATASETS and _path(value).exists())):
        return str(_path(value).resolve())  # workers and notebooks start in other folders
    try:
        plain = type(default)(value)
    except (TypeError, ValueError):
        plain = None
    if plain is None or isinstance(default, tuple) or plain != value:
        raise ValueError(f"{name} is {value!r}; give one {type(default).__name__}, such as "
                         f"{default!r}. Several values belong in the grid of a study.")
    return plain


def _values(name: str, values: Any) -> list[Any]:
    """Return the values that a grid gives a setting, each once."""
    several = isinstance(values, Iterable) and not isinstance(values, (str, Mapping))
    plain = list(dict.fromkeys(_plain(name, value) for value in (values if several else ())))
    if not plain:
        raise ValueError(f"The grid's {name} is {values!r}; give a list, such as [{values!r}].")
    return plain


def _cells(grid: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a study's cells, whole seeds first: half a study is then one of fewer seeds."""
    if not isinstance(grid, Mapping):
        raise ValueError(f'The grid is {grid!r}; give a dict of lists, such as {{"seed": [0, 1]}}.')
    if twice := grid.keys() & fixed.keys():
        raise ValueError(f"{', '.join(sorted(twice))}: set in the grid and apart from it. "
                         "Keep one of both.")
    common = {name: _plain(name, value) for name, value in (ASKED | WHERE | fixed).items()}
    grid = {name: _values(name, values) for name, values in grid.items()}
    for memory in (_once, _known):  # of an earlier study; in workers the token keeps studies apart
        memory.cache_clear()
    common["token"] = time.time_ns()
    cells = [common | dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    return sorted(cells, key=lambda cell: (str(cell["dataset"]), cell["recipe"], cell["seed"]))


@functools.lru_cache(maxsize=8)
def _once(token: int, load: Callable, name: str, **options: Any) -> Future:
    """Load something once for all cells of a study in this process; an error is kept as well."""
    return _call(load, name, **options)


def _cell_data(cell: Mapping[str, Any]) -> tuple[FineTuneConfig, DataSplits]:
    """Return recipe and data set of a cell."""
    fields = {f.name for f in dataclasses.fields(FineTuneConfig)} - {"recipe"}
    config = FineTuneConfig.named(cell["recipe"], cell["dataset"],
                                  **{name: cell[name] for name in fields & cell.keys()})
    return config, _once(
        cell["token"], load_data, cell["dataset"], image_size=config.image_size,
        data_dir=cell["data_dir"], unofficial=cell["unofficial"],
        dtype="float32" if config.recipe == "paper" else "uint8").result()


def _cell_backbone(cell: Mapping[str, Any]) -> tuple[nn.Module, KeyReport]:
    """Return backbone and report of a cell; only the control `random` depends on the seed."""
    return _once(cell["token"], load_backbone, cell["method"], weights=cell["weights"],
                 folder=cell["checkpoints_dir"],
                 seed=cell["seed"] if cell["method"] == "random" else 0).result()


@functools.lru_cache(maxsize=64)
def _known(
    data: DataSplits, *asked: Any,
) -> tuple[np.ndarray, tuple[str, str, str], SplitReport]:
    """Return a label subset, the fingerprints of data, test part and subset, and the report on the
    splits. They are kept: only a study holds these data, so that nobody changes them."""
    if not asked:
        return np.arange(0), (data.fingerprint, data.test.fingerprint, ""), check_splits(data)
    fraction, seed, rule = asked
    subset = label_subset(data.train.labels, fraction, seed=seed, groups=data.train.groups,
                          rule=rule)
    _, (*of_data, _), checks = _known(data)
    return subset, (*of_data, data.train.take(subset).ids_fingerprint), checks


def _cell_folder(cell: Mapping[str, Any]) -> Path:
    """Return the run folder of a cell; its name follows from weights and data, which are read."""
    config, data = _cell_data(cell)
    asked = cell["label_fraction"], cell["seed"]
    subset, fingerprints, _ = _known(data, *asked, config.subset_rule)
    settings = _settings(_cell_backbone(cell)[1], data, config, subset, *asked, fingerprints)
    return Path(cell["runs_dir"], cell["study"], run_name(settings))


def _keep_subset(cell: Mapping[str, Any]) -> None:
    """Write the ids of a cell's label subset beside the runs of its study, once, so that others can
    train on the same images."""
    config, data = _cell_data(cell)
    fraction, seed, rule = cell["label_fraction"], cell["seed"], config.subset_rule
    subset, (*_, fingerprint), _ = _known(data, fraction, seed, rule)
    name = f"{data.name}_f{fraction:g}_s{seed}_{fingerprint[:8]}.json"
    if not (path := Path(cell["runs_dir"], cell["study"], "subsets", name)).exists():
        _write_json(path, {
            "dataset": data.name, "label_fraction": fraction, "seed": seed, "rule": rule,
            "n": len(subset), "ids_sha256": fingerprint, "ids": data.train.ids[subset].tolist()})


def _look(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a cell: what is asked for, how far its run folder is, how much work it is."""
    roots = {Path(cell["runs_dir"], cell["study"]) for cell in cells}
    begun = {path.name.rpartition("_")[0] for r in roots if r.is_dir() for path in r.iterdir()}
    rows, seen = [], set()
    for cell in cells:
        row = {name: value for name, value in cell.items() if name not in (*WHERE, "token")}
        row |= {"status": "to do", "error": "", "folder": None, "n_train": 0, "images": 0,
                "seconds": 0.0, "gigabytes": 0.0}
        try:
            check_choice(cell["method"], (*METHODS, *CONTROLS), "method")
            config, data = _cell_data(cell)
            subset, _, checks = _known(data, cell["label_fraction"], cell["seed"],
                                       config.subset_rule)
            row["n_train"] = len(subset)
            checks.raise_for_errors()
            if run_name({**cell, "dataset": data.name}).rpartition("_")[0] in begun:
                row["folder"] = _cell_folder(cell)  # for others no weights need to be read
                files = [(row["folder"] / f).exists() for f in ("metrics.json", "config.json")]
                row["status"] = "unfinished" if files[1] else "to do"
                if files[0]:
                    _read_json(row["folder"] / "metrics.json")
                    row["status"] = "done"
            sharing = str({**cell, "label_fraction": 0, "done": row["status"] == "done",
                           "seed": cell["method"] == "random" and cell["seed"]})
            row["images"] = _work(config, data, row["n_train"], sharing in seen)
            seen.add(sharing)
        except Exception as error:  # the other cells can run
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows


def _work(config: FineTuneConfig, data: DataSplits, n_train: int, again: bool) -> int:
    """Return the work of a run, in training images; a forward pass is a third of a step. In
    "linear" it is the step, and features are computed by the first of the runs that share them."""
    train, val, test = (len(getattr(data, name)) for name in SPLITS)
    if config.recipe == "linear":
        return 1 if again else train + val + test
    epochs = config.epochs * max(1, len(config.lr_candidates))
    return math.ceil(epochs * (n_train + val / 3) + (val + test) / 3)


def _time_steps(cell: Mapping[str, Any], steps: int = 1) -> float:
    """Return the median seconds per image of a few passes of `steps`, the first left out."""
    config, data = _cell_data(cell)
    device, times, kept = pick_device(cell["device"]), [], {}
    net = add_head(load_backbone("random")[0], len(data.class_names), 0)
    net = net.to(device, memory_format=torch.channels_last)
    images, labels = (torch.as_tensor(a[:steps * config.batch_size]).to(device)
                      for a in (data.train.images, data.train.labels))
    optimizer, prep = make_optimizer(net, config), preprocessing_for(config, data, "random")
    while len(times) < 2 or sum(times) < 0.3:
        began = time.perf_counter()
        train_one_epoch(net, images, labels, optimizer, config, prep, seed=0,
                        epoch=config.epochs - 1, kept=kept)
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:])) / len(labels)


def _rate(
    done: Sequence[Mapping[str, Any]], cell: Mapping[str, Any], executor: Executor | None,
) -> tuple[float, str]:
    """Return seconds per image, of finished runs or timed, and which of both."""
    spent = [_read_json(row["folder"] / "metrics.json")["seconds"] for row in done]
    if done:
        return sum(spent) / sum(row["images"] for row in done), f"rate of {len(done)} finished"
    # with several GPUs in a process that ends: this one would hold on to the first of them
    worker = _workers(executor, 0, {cell["device"]})[0]
    try:
        submit = worker["pool"].submit if worker["pool"] else _call
        return submit(_time_steps, cell).result(), "rate of timed steps"
    except Exception as error:  # the cell will fail likewise, and be listed
        return math.nan, f"no rate, {type(error).__name__}: {error}"
    finally:
        torch.cuda.empty_cache()  # workers that share one GPU with this process need it
        if "new" in worker:
            worker["line"].close()
            worker["pool"].shutdown()


def plan_study(
    grid: Mapping[str, Sequence[Any]] | list[dict[str, Any]], *, executor: Executor | None = None,
    **fixed: Any,
) -> pd.DataFrame:
    """Say what `run_study` with these arguments would do, and what that costs.

    Returns:
        A row a cell, in the order of running: what is asked for, `status` ("done", "unfinished",
        "to do"), `error` (why it can't run), `folder` (where begun), `n_train` and `images` (the
        work, in training images), `seconds` and `gigabytes` (left to spend), all about.
        `attrs["summary"]` says it in two lines, with the source of the rate, and then why
        some can't run (the first five reasons).
    """
    cells = grid if isinstance(grid, list) else _cells(grid, fixed)
    rows, rates, most = _look(cells), {}, 0  # most: resume files of a run, one of them twice
    for cell, row in zip(cells, rows):
        if row["status"] != "done" and not row["error"]:
            most = max(most, 1 + len(cell.get("lr_candidates") or (1,)))
            kind = cell["recipe"], cell.get("image_size")  # for which one rate holds
            if kind not in rates:
                rates[kind] = _rate([r for c, r in zip(cells, rows) if r["status"] == "done" and (
                    c["recipe"], c.get("image_size")) == kind][:50], cell, executor)
            row["seconds"] = rates[kind][0] * row["images"]  # besides weights it keeps about 1 MB
            row["gigabytes"] = (1e6 + WEIGHT_BYTES * cell["keep_best"]) / 1e9
    plan = pd.DataFrame(rows)
    states = plan["status"].mask(plan["error"] != "", "can't run").value_counts(sort=False)
    seconds, size = plan["seconds"].sum(skipna=False), plan["gigabytes"].sum()
    hours = "unknown time" if math.isnan(seconds) else timedelta(seconds=round(seconds))
    sources = ", ".join(sorted({source for _, source in rates.values()}))
    plan.attrs["summary"] = ", ".join([f"Runs: {len(rows)} in all", *(
        f"{n} {state}" for state, n in states.items())]) + (
        f".\nLeft: {hours} one after another ({sources}); {size:.2g} GB to keep, up to "
        f"{4 * most * WEIGHT_BYTES / 1e9:.1f} GB more for each run at work."
        if rates else ". Nothing is left to run.")
    if (reasons := plan["error"][plan["error"] != ""].unique()).size:
        plan.attrs["summary"] += "\nCan't run: " + "\nCan't run: ".join(reasons[:5])
    return plan


def run_notebook(
    notebook: str | Path, output: str | Path, parameters: Mapping[str, Any],
) -> Path:
    """Execute a notebook with papermill, in its own folder, and return the executed copy. A
    parameter that it does not have is a ValueError (papermill would only warn)."""
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        check_choice(name, known, f"Parameter of {Path(notebook).name}")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    quiet = ["--IPKernelApp.log_level=ERROR"]  # or it warns at each start that it isn't encrypted
    papermill.execute_notebook(
        str(notebook), str(output), dict(parameters), progress_bar=False, extra_arguments=quiet,
        cwd=str(Path(notebook).parent), kernel_name="python3")
    return Path(output)


def _run_in_notebook(cell: Mapping[str, Any]) -> None:
    """Run a cell by papermill; the executed notebook lies in the run folder, failed or not."""
    folder = _cell_folder(cell)
    folder.mkdir(parents=True, exist_ok=True)
    with _sole_writer(folder):  # where another process writes, not even a kernel is started
        if (folder / "metrics.json").exists():
            return
    run_notebook(cell["notebook"], folder / "notebook.ipynb",
                 {name: v for name, v in cell.items() if name not in (
                     "notebook", "keep_subsets", "token")})
    load_run(folder)  # raises if the run isn't done, whatever the notebook says


def _run_cell(cell: Mapping[str, Any], moment: int = 0) -> str | None:
    """Run one cell in this process; return "", why it failed, or None: another process is at it.
    `moment` makes each call another one, for executors that remember results, as Dask's does."""
    if not _one_at_a_time.acquire(blocking=False):
        return ("Two runs at once in one process would share random state. Give every worker a "
                "process of its own and one thread (Dask: threads_per_worker=1).")
    names = "label_fraction", "seed", "study", "runs_dir", "device", "keep_best"
    try:
        if cell["notebook"]:
            _run_in_notebook(cell)
        else:
            config, data = _cell_data(cell)
            known = _known(data, cell["label_fraction"], cell["seed"], config.subset_rule)
            fine_tune(*_cell_backbone(cell), data, config, progress="none", known=known,
                      **{name: cell[name] for name in names})
    except Exception as error:  # one bad cell never stops the rest
        kind = getattr(error, "ename", type(error).__name__)  # papermill names the notebook's own
        return None if kind == "BusyError" else f"{kind}: {getattr(error, 'evalue', error)}"
    finally:
        _one_at_a_time.release()
    return ""


def _check_workers(executor: Any, workers: Any) -> None:
    """Refuse what would hang, mix random states or fail later."""
    if isinstance(executor, ThreadPoolExecutor):
        raise ValueError("Threads share random state. Give an executor of processes.")
    if executor is not None and not hasattr(executor, "submit"):
        raise ValueError(f"The executor is {executor!r}; give one of concurrent.futures, or a Dask "
                         "client's get_executor(pure=False).")
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ValueError("A forked process hangs once PyTorch has computed in this one. Give "
                         'ProcessPoolExecutor(n, multiprocessing.get_context("spawn")), or '
                         "workers=n.")
    if executor is not None and workers:
        raise ValueError(f"An executor and workers={workers}: give one of both.")
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers is {workers!r}; give a number of processes, or 0 for one on "
                         "each GPU.")


def _start_worker(threads: int, study: connection.Connection) -> None:
    """Prepare a local worker: its share of the cores, also for kernels that it starts, and an end
    as soon as the study has stopped or was killed and nothing holds the line any more."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threading.Thread(target=lambda: connection.wait([study]) and os._exit(1), daemon=True).start()


def _workers(executor: Executor | None, n: int, devices: set[str]) -> list[dict[str, Any]]:
    """Return what runs one cell at a time: a pool (None: this process), its device, what makes a
    new one, and the line that holds it. A local pool is of one process: if that dies, it is known
    on which cell. `devices` are those that the cells ask for; two names leave the choice open."""
    gpus = torch.cuda.device_count() if devices & {"auto", "cuda"} else 0
    n = n or max(1, gpus)
    if executor is not None or n == 1:  # of a given one, so many cells are handed over at a time
        return [{"pool": executor, "device": ""}] * (1024 if executor else 1)
    context = multiprocessing.get_context("spawn")
    end, line = context.Pipe(duplex=False)
    new = functools.partial(ProcessPoolExecutor, 1, context, _start_worker,
                            (max(1, torch.get_num_threads() // n), end))
    return [{"pool": new(), "device": f"cuda:{k % gpus}" if gpus else "", "new": new, "line": line}
            for k in range(n)]


def _work_off(
    cells: Sequence[Mapping[str, Any]], free: list[dict[str, Any]],
) -> Iterator[tuple[int, str]]:
    """Run every cell on a free worker; yield its index with "" or why it failed, as they end."""
    own = [worker for worker in free if "new" in worker]
    waiting, busy, deaths = deque(range(len(cells))), [], Counter()
    running, ended = {}, queue.SimpleQueue()
    try:
        while waiting or busy or running:
            if not waiting and not running:  # another process is at all that is left
                time.sleep(BUSY_SECONDS)
                waiting, busy = deque(busy), []
            while waiting and free:
                i, worker = waiting.popleft(), free.pop()
                here = {"device": worker["device"]} if (
                    worker["device"] and cells[i]["device"] in ("auto", "cuda")) else {}
                submit = worker["pool"].submit if worker["pool"] else _call
                try:
                    future = submit(_run_cell, {**cells[i], **here}, time.time_ns())
                except BrokenExecutor as error:  # its process died while nothing was to do
                    future = Future()
                    future.set_exception(error)
                running[future] = i, worker
                future.add_done_callback(ended.put)
            while ended.empty():  # on Windows nothing interrupts `get` while it waits
                time.sleep(0.02)
            i, worker = running.pop(future := ended.get())
            try:
                error = future.result()
            except BrokenExecutor:
                if "new" not in worker:
                    raise BrokenExecutor(
                        "A worker of the given executor died and broke it. Call run_study again "
                        "with a new executor, or with workers=n, which replaces those that die.")
                worker["pool"], deaths[i] = worker["new"](), deaths[i] + 1
                error = None if deaths[i] < ATTEMPTS else (
                    f"The worker died {ATTEMPTS} times on this cell: killed, out of memory, or "
                    'started by a script that lacks `if __name__ == "__main__":`?')
            except Exception as problem:  # of the executor, such as Dask's KilledWorker
                error = f"{type(problem).__name__}: {problem}"
            free.append(worker)
            if error is None:
                busy.append(i)
            else:
                yield i, error
    finally:
        for future in running:
            future.cancel()
        for worker in own:  # interrupted, the study leaves no process behind that trains on
            if running:
                worker["line"].close()
            worker["pool"].shutdown(wait=not running, cancel_futures=True)


def run_study(
    grid: Mapping[str, Sequence[Any]], *, executor: Executor | None = None, workers: int = 0,
    progress: str = "auto", **fixed: Any,
) -> pd.DataFrame:
    """Run every combination of a grid of settings that isn't done yet.

    What it will cost is printed first (see `plan_study`). Interrupted runs are resumed; runs that
    another process is at are looked at again at the end; what fails is listed and stops nothing.

    Args:
        grid: setting -> values, such as {"method": METHODS, "seed": [0, 1, 2]}. Settings are the
            names in ASKED and WHERE and the fields of `FineTuneConfig`.
        executor: of processes, not forked, that see the same folders and run one call at a time,
            such as Dask's `client.get_executor(pure=False)` with one thread a worker.
        workers: local processes instead; 0: one for each GPU, on a CPU the cells run in this one.
        progress: "bar", "log" (a line a run), "none", or "auto": a bar where somebody watches.
        fixed: settings that all cells share. With `notebook` (notebooks/03_fine_tune.ipynb)
            papermill runs each cell, and its run folder keeps the executed notebook. With
            `keep_subsets` the ids of each label subset are written into the study's `subsets`.

    Returns:
        The table of `plan_study`, with `status` as the run folders have it now and `error`.

    Raises:
        ValueError: an unknown setting, one of another type or given twice, a grid without
            lists, an executor of threads or of forked processes.
        BrokenExecutor: a worker of the given executor died and took the others along.
    """
    _check_workers(executor, workers)
    cells = _cells(grid, fixed)
    plan = plan_study(cells, executor=executor)
    print(plan.attrs["summary"], flush=True)
    for cell, error in zip(cells, plan["error"]):
        if cell["keep_subsets"] and not error:
            _keep_subset(cell)
    left = plan.index[(plan["status"] != "done") & (plan["error"] == "")]
    work, errors, began, spent = plan["images"], plan["error"].tolist(), time.monotonic(), 0
    shown = Progress(progress, int(work[left].sum()), "study")
    todo = [cells[i] for i in left]
    free = _workers(executor, workers, {cell["device"] for cell in todo})
    # both are closed however this ends: a notebook would keep them with the error, workers and all
    with contextlib.closing(shown.bar), contextlib.closing(_work_off(todo, free)) as ended:
        for n, (k, error) in enumerate(ended, start=1):
            errors[left[k]] = error
            spent += work[left[k]]
            shown.bar.update(int(work[left[k]]))
            shown.bar.set_postfix(runs=f"{n}/{len(left)}", failed=sum(map(bool, errors)))
            if shown.how == "log":
                rest = (time.monotonic() - began) * (work[left].sum() / spent - 1)
                what = " ".join(str(todo[k][name]) for name in grid)
                print(f"{n} of {len(left)}, about {timedelta(seconds=round(rest))} left: {what}: "
                      f"{error or 'done'}", flush=True)
    rows = _look(cells)
    for row, error, cell in zip(rows, errors, cells):
        row["error"] = error or row["error"] or ("" if row["status"] == "done" else (
            f"It was run, but {cell['runs_dir']} has no result of it. Workers must see the same "
            "runs_dir, data_dir and checkpoints_dir as the process that runs the study."))
    return pd.DataFrame(rows)


# =============================================================================
# Figures
# =============================================================================

# Okabe and Ito's palette, told apart with every common kind of colour blindness. A lighter grey
# would look like MoCo's green to the green-blind.
METHOD_COLORS = {
    "random": "#606060", "ImageNet": "#000000", "BYOL": "#0072B2", "SwAV": "#E69F00",
    "MoCo": "#009E73", "SparK": "#D55E00",
}


def with_alt(figure: Figure, alt: str) -> Figure:
    """Return a closed figure that carries words for a reader who cannot see it.

    Where it is displayed they become the PNG's `alt` metadata, which `make html` turns into alt
    text, and the plain-text output. JupyterLab 4.6 and most of nbconvert's templates leave images
    without: what a figure says must also stand in a sentence beside it.
    """
    plt.close(figure)
    figure._repr_mimebundle_ = lambda **_: ({"text/plain": alt}, {"image/png": {"alt": alt}})
    return figure


def plot_images(
    images: np.ndarray, titles: Sequence[str], *, columns: int = 6, title: str = "",
) -> Figure:
    """Show images (N, H, W) or (N, H, W, 3), 0..255, in a grid with a title over each."""
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows + 0.3),
                                squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, text in zip(axes.flat, images, titles):
        axis.imshow(np.asarray(image).astype(np.uint8), cmap="gray", vmin=0, vmax=255)
        lines = (textwrap.fill(line, 28) for line in text.splitlines())  # no wider than the image
        axis.set_title("\n".join(lines), fontsize=8)
    figure.suptitle(title, fontsize=10)
    texts = "; ".join(" ".join(text.split()) for text in titles)
    return with_alt(figure, f"{len(images)} images. {title and title + ': '}{texts}.")


def plot_history(run: Run) -> Figure:
    """Draw a run's losses and validation scores over its epochs, the chosen epoch marked."""
    rows = run.history
    if "lr_candidate" in rows:
        rows = rows[rows["lr_candidate"] == run.metrics["lr"]]
    return _draw_history(rows, _title(run), run.metrics["best_epoch"])


def _title(run: Run) -> str:
    """Name a run in a figure."""
    return f"{run.stamp}: {run.config['method']} on {run.config['dataset']}".lstrip(": ")


def _draw_history(rows: pd.DataFrame, title: str, chosen: int | None = None) -> Figure:
    """Draw losses and scores; `rows` of a linear evaluation go over C instead of epochs."""
    x, unit = ("C", "inverse L2 strength C") if "C" in rows else ("epoch", "epoch")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name, label, style in (("train_loss", "training", "--"), ("val_loss", "validation", "-")):
        if name in rows:
            left.plot(rows[x], rows[name], style, marker="o", ms=3, label=label, color="#0072B2")
    for name, color in (("val_AUC", "#D55E00"), ("val_ACC", "#009E73")):
        right.plot(rows[x], rows[name].astype(float), marker="o", ms=3, color=color,
                   label=f"validation {name[4:]}")
    for axis, text in ((left, "cross-entropy"), (right, "score")):
        if chosen is not None:
            axis.axvline(rows[x][chosen], color="0.6", lw=1, label="chosen")
        axis.set(xlabel=unit, ylabel=text, xscale="log" if x == "C" else "linear")
        if x == "epoch":
            axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.legend(fontsize=8)
    right.set_ylim(0, 1.02)
    figure.suptitle(title, fontsize=10)
    ends = {name: rows[name].astype(float).iloc[[0, -1]] for name in (
        "train_loss", "val_loss", "val_AUC", "val_ACC") if name in rows}
    said = ", ".join(f"{name} from {a:.3g} to {b:.3g}" for name, (a, b) in ends.items())
    return with_alt(figure, f"Curves of {title} over {len(rows)} values of {x}: {said}"
                    + ("." if chosen is None else f"; chosen: {x} {rows[x][chosen]:g}."))


def plot_confusion(run: Run) -> Figure:
    """Draw the test set's confusion matrix with counts; rows are the true classes."""
    from sklearn.metrics import ConfusionMatrixDisplay

    names, labels = run.config["class_names"], run.predictions["labels"]
    if labels.ndim == 2:
        raise ValueError("With several labels an image, no class is taken for another: there is "
                         "no confusion matrix. Score each label by itself (notebook 03).")
    side = 2.2 + 0.45 * len(names)
    figure, axis = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    drawn = ConfusionMatrixDisplay.from_predictions(
        labels, run.predictions["scores"].argmax(1), labels=range(len(names)),
        display_labels=names, cmap="Blues", colorbar=False, ax=axis, xticks_rotation="vertical")
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(f"{_title(run)}\n{len(labels)} test images", fontsize=10)
    said = ", ".join(f"{count} {names[true]} called {names[called]}" for (true, called), count
                     in np.ndenumerate(drawn.confusion_matrix) if count)
    return with_alt(figure, f"Confusion matrix of {len(labels)} test images: {said}.")


# =============================================================================
# Demo
# =============================================================================

def write_demo_checkpoint(method: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Write a stand-in: a checkpoint with random weights in the layout of a method's file.

    Names, dtypes, wrapper keys and backbone shapes are those that the authors' code writes;
    auxiliary tensors are small. A mark in the wrapper keeps it from passing as published. MoCo's
    has the MLP head, on which the authors' README snippet runs.

    Args:
        method: BYOL, SwAV, MoCo or SparK.
        folder: where to write; the file gets the published one's name.
        seed: of the random numbers, which differ between methods anyway.

    Returns:
        The path.
    """
    check_choice(method, METHODS, "method")
    number = len(METHODS) * seed + METHODS.index(method)
    backbone = _demo_backbone(torch.Generator().manual_seed(number))
    second = {name: torch.zeros((1,) * tensor.dim(), dtype=tensor.dtype)
              for name, tensor in backbone.items()}
    with torch.random.fork_rng(devices=[]):  # layers of the heads draw; the caller's state stays
        torch.default_generator.manual_seed(number)
        parts = _demo_parts(method, backbone, second)
    state = OrderedDict((prefix + name, tensor)
                        for prefix, part in parts for name, tensor in part.items())
    wrapper = _demo_wrapper(method, state)
    wrapper[STAND_IN_MARK] = f"random weights, seed {seed}, in the layout of a {method} checkpoint"
    path = _path(folder) / CHECKPOINTS[method].filename
    with _atomic(path) as temporary, open(temporary, "wb") as file:
        torch.save(wrapper, file)  # not to a path, whose name would go into the file
    return path


def _demo_backbone(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """318 random tensors: He's initialisation, BatchNorm moved so that nothing is fresh."""
    state = {}
    for name, blank in _backbone_layout().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        elif blank.dim() == 4:
            fan_out = blank[:, 0].numel()
            state[name] = torch.randn(blank.shape, generator=generator) * math.sqrt(2 / fan_out)
        else:
            centre = float(name.endswith(("weight", "running_var")))
            state[name] = centre + 0.05 * torch.rand(blank.shape, generator=generator)
    return state


def _demo_parts(
    method: str, backbone: dict[str, torch.Tensor], second: dict[str, torch.Tensor],
) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """What stands in a method's state_dict, in order: (prefix, tensors)."""
    mlp = nn.Sequential(nn.Linear(2, 2, bias=method == "SwAV"), nn.BatchNorm1d(2), nn.ReLU(),
                        nn.Linear(2, 2)).state_dict()
    if method == "BYOL":
        return [part for network, encoder in (("online", backbone), ("target", second))
                for part in ((f"{network}_network.encoder.", encoder),
                             (f"{network}_network.projector.model.", mlp),
                             (f"{network}_network.predictor.model.", mlp))]
    if method == "SwAV":
        return [("model.", backbone), ("model.projection_head.", mlp),
                ("model.prototypes.", {"weight": torch.zeros(2, 2)})]
    if method == "MoCo":
        head = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).state_dict()
        queue = {"queue": torch.zeros(2, 2), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
        return [("", queue), ("val_", queue), ("encoder_q.", backbone), ("encoder_q.fc.", head),
                ("encoder_k.", second), ("encoder_k.fc.", head)]
    return [("", backbone)]


def _demo_wrapper(method: str, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The dictionary around a state_dict, as Lightning 1.6 and SparK's code write it."""
    if method == "SparK":
        return {"arch": "resnet50", "module": state, "is_pretrain": True}
    mixed = {"NativeMixedPrecisionPlugin": {}} if method == "SwAV" else {}
    return {"epoch": 1, "global_step": 1, "pytorch-lightning_version": "1.6.5",
            "state_dict": state, "loops": {}, "callbacks": {}, "optimizer_states": [],
            "lr_schedulers": [], **mixed, "hparams_name": "kwargs", "hyper_parameters": {}}


def demo_data(
    seed: int = 0, *, n_train: int = 240, n_val: int = 48, n_test: int = 120, image_size: int = 48,
) -> DataSplits:
    """Draw CT-like axial chest slices; class 1 has hazy patches under the pleura.

    Each patient has two neighbouring slices and stays in one split; classes are balanced. Window
    level, lung density, body shape, vessels and noise vary from patient to patient. Brightness
    hints at the class (AUC of the mean about .63, of the best percentile .78); to score above
    that, a network has to see the patches.

    Args:
        seed: the same seed, sizes and `image_size` give the same bytes.
        n_train, n_val, n_test: images per split.
        image_size: side in pixels.

    Returns:
        DataSplits with demo=True, uint8 images (N, image_size, image_size), patients as groups.
    """
    parts = {name: _phantom_split(seed, name, n, image_size)
             for name, n in zip(SPLITS, (n_train, n_val, n_test))}
    pixels = parts["train"].images / 255
    return DataSplits(
        name="phantom", **parts, class_names=("clear lungs", "opacities"),
        mean=(float(pixels.mean()),) * 3, std=(float(pixels.std()),) * 3, demo=True,
        source=f"CT-like slices drawn by demo_data(seed={seed}): no real patient, no licence",
    )


def _phantom_split(seed: int, name: str, n: int, size: int) -> Split:
    """Draw `n` slices, two of each patient."""
    images, labels, ids, groups = np.zeros((n, size, size), np.uint8), [], [], []
    for i in range(n):
        patient, slice_ = divmod(i, 2)
        if slice_ == 0:
            rng = np.random.default_rng([seed, SPLITS.index(name), patient])
            body = _phantom_patient(rng)
        images[i] = _phantom_slice(body, slice_, patient % 2 == 1, rng, size)
        labels.append(patient % 2)
        groups.append(f"{name}-patient{patient:03d}")
        ids.append(f"{groups[-1]}-slice{slice_}")
    return Split(images, np.array(labels, np.int64), np.array(ids), np.array(groups))


def _phantom_patient(rng: np.random.Generator) -> dict[str, Any]:
    """Choose what a patient's slices share; lengths in units of half the image's side."""
    first = rng.integers(2)                                          # patches: each lung in turn
    patches = [((-1, 1)[(first + i) % 2], rng.uniform(-1.2, 1.7), rng.uniform(0.5, 0.9),
                rng.uniform(0.17, 0.23)) for i in range(rng.integers(3, 5))]
    return {
        "patches": patches, "opacity": rng.uniform(120, 160),
        "width": rng.uniform(0.74, 0.95), "height": rng.uniform(0.54, 0.76),
        "fat": rng.uniform(0.03, 0.15), "level": rng.uniform(0.90, 1.10),
        "z": rng.uniform(-0.6, 0.6), "air": rng.uniform(0.82, 1.06),
        "heart": rng.uniform(0.20, 0.40), "lung": rng.uniform(35, 80),
        "tissue": rng.uniform(140, 170), "bone": rng.uniform(225, 255),
        "noise": rng.uniform(3, 6.5),
    }


def _phantom_slice(body: Mapping[str, Any], number: int, ill: bool, rng: np.random.Generator,
                   size: int) -> np.ndarray:
    """Draw one slice, (size, size) uint8: the chest, what fills the lungs, what a scanner adds."""
    from scipy.ndimage import gaussian_filter

    def noise(grain: float) -> np.ndarray:  # sd 1; the grain as share of the side
        smooth = gaussian_filter(rng.standard_normal((size, size), np.float32), grain * size)
        return smooth / smooth.std()

    fine = [Image.new("F", (4 * size, 4 * size), grey) for grey in (4, 0, body["lung"], 0)]
    chest, lungs, inside, patches = (ImageDraw.Draw(image) for image in fine)
    _draw_chest(chest, lungs, body, body["z"] + 0.12 * number, rng, size)
    _draw_vessels(inside, body["tissue"], rng, size)
    for side, angle, depth, radius in body["patches"]:               # under the pleura
        x = side * (0.50 + 0.33 * depth * math.cos(angle)) * (body["width"] - body["fat"])
        y, radius = 0.62 * body["height"] * depth * math.sin(angle), radius * (1 + 0.12 * number)
        patches.ellipse(_box(size, x, y, 1.1 * radius, 0.9 * radius), body["opacity"])
    chest, lungs, inside, patches = (np.asarray(image.reduce(4)) for image in fine)
    haze = gaussian_filter(patches, 0.015 * size)
    haze *= (1 + 0.2 * noise(0.05) + 0.55 * noise(0.012)).clip(0, 2)
    inside = inside + (haze if ill else 0.3 * (haze * lungs).sum() / lungs.sum())  # as a veil
    image = chest * (1 - lungs) + inside.clip(0, 1.02 * body["tissue"]) * lungs
    image = gaussian_filter(image, 0.007 * size) + body["noise"] * noise(0.5 / size)
    return (image * body["level"] + rng.normal(0, 2)).clip(0, 255).astype(np.uint8)


def _box(size: int, x: float, y: float, rx: float, ry: float) -> list[float]:
    """Return the box of an oval, in pixels of a drawing four times as fine as the image."""
    return [2 * size * (1 + v) for v in (x - rx, y - ry, x + rx, y + ry)]


def _draw_chest(chest: ImageDraw.ImageDraw, lungs: ImageDraw.ImageDraw, body: Mapping[str, Any],
                z: float, rng: np.random.Generator, size: int) -> None:
    """Draw a chest without its lungs, from outside in, and the mask of the lungs."""
    w, h, tissue, bone = (body[name] for name in ("width", "height", "tissue", "bone"))
    chest.arc(_box(size, 0, h + 1.25, 2.2, 1.2), 180, 360, 64, size // 12)           # the table
    chest.ellipse(_box(size, 0, 0, w, h), 0.78 * tissue)             # skin and fat
    w, h = w - body["fat"], h - 0.8 * body["fat"]
    chest.ellipse(_box(size, 0, 0, w, h), tissue)                    # muscle
    for middle in [*np.linspace(-65, 65, 6), *np.linspace(115, 245, 6)] + rng.normal(0, 5, 12):
        reach = rng.uniform(4, 9)                                    # ribs, in degrees
        chest.arc(_box(size, 0, 0, 0.955 * w, 0.925 * h), middle - reach, middle + reach, bone,
                  size // 9)
    chest.ellipse(_box(size, 0, -0.9 * h, 0.1, 0.03), 0.9 * bone)    # sternum
    chest.ellipse(_box(size, 0, 0.62 * h, 0.115, 0.1), 0.88 * bone)  # vertebra
    chest.ellipse(_box(size, 0, 0.62 * h + 0.09, 0.22, 0.03), 0.92 * bone)
    chest.ellipse(_box(size, 0, 0.62 * h + 0.15, 0.025, 0.07), 0.95 * bone)
    chest.ellipse(_box(size, 0, 0.62 * h + 0.095, 0.038, 0.034), 150)
    chest.ellipse(_box(size, 0.11, 0.42 * h, 0.06, 0.06), 1.06 * tissue)             # aorta
    for x in [0] if z < -0.25 else [-0.07, 0.07] if z < 0.1 else []:  # trachea or main bronchi
        chest.ellipse(_box(size, x, -0.02, 0.045, 0.05), 12)
    for side in (-1, 1):
        lungs.ellipse(_box(size, side * 0.5 * w, 0, 0.385 * w * body["air"],
                           0.79 * h * body["air"]), 1)
    heart = body["heart"] * np.clip(0.75 + 0.5 * z, 0.45, 1.05)
    lungs.ellipse(_box(size, 0.1, -0.22 * h, 1.1 * heart, 0.9 * heart), 0)
    lungs.ellipse(_box(size, 0, -0.05, 0.15, 0.35), 0)               # mediastinum
    lungs.ellipse(_box(size, 0, 0.65 * h, 0.17, 0.17), 0)            # spine


def _draw_vessels(draw: ImageDraw.ImageDraw, tissue: float, rng: np.random.Generator,
                  size: int) -> None:
    """Draw vessels that fork on their way outwards, and round ones that are cut across."""
    def branch(x: float, y: float, angle: float, length: float, width: float, grey: float) -> None:
        ends = x, y, x + length * math.cos(angle), y + length * math.sin(angle)
        if width > 0.015:
            for fork in (-0.45, 0.45):
                branch(*ends[2:], angle + fork + rng.normal(0, 0.15),
                       length * rng.uniform(0.4, 0.7), 0.6 * width, 0.75 * grey)
        draw.line([2 * size * (1 + v) for v in ends], grey, round(2 * size * width))

    for outwards in (0, math.pi):
        for angle in outwards + np.linspace(-1.25, 1.25, 6) + rng.normal(0, 0.15, 6):
            branch(0.2 * math.cos(outwards), 0, angle, rng.uniform(0.22, 0.4), 0.038,
                   tissue * rng.uniform(0.6, 0.95))
        for _ in range(rng.integers(3, 7)):
            x, radius = rng.uniform(0.25, 0.7) * math.cos(outwards), rng.uniform(0.02, 0.04)
            draw.ellipse(_box(size, x, rng.uniform(-0.4, 0.4), radius, radius),
                         tissue * rng.uniform(0.5, 0.9))
