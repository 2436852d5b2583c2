"""The faults of downloading (rows D1 to D13), asked of our download and of gdown alone.

Each case says "" if the tool survived it, or what went wrong. The server that plays Google Drive
is in drive_server.py; a case that ends in an error must also heal: the next call, without the
fault, must return the right file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gdown
import torch
from drive_server import DriveServer, redirect_drive

import medssl_utils as medssl

METHOD = "BYOL"
KNOWN = medssl.CHECKPOINTS[METHOD]
TOOLS = ("ours", "gdown alone")
SILENCE = 1.0  # seconds without a byte after which a tool is to give up


def checkpoint_bytes(seed: int, values: int) -> bytes:
    """A small file in the format of torch.save."""
    file = io.BytesIO()
    torch.save({"state_dict": {"w": torch.randn(
        values, generator=torch.Generator().manual_seed(seed))}}, file)
    return file.getvalue()


@functools.cache
def bodies() -> tuple[bytes, bytes]:
    """The file on Drive, and another one of another size."""
    return checkpoint_bytes(0, 1_000_000), checkpoint_bytes(1, 800_000)


def sha256() -> str:
    return hashlib.sha256(bodies()[0]).hexdigest()


def fetch(tool: str, folder: Path, known: str | None = None) -> bytes:
    """Let `tool` download the file into `folder`; return its bytes."""
    path = folder / KNOWN.filename
    if tool == "ours":
        got = medssl.download_checkpoint(
            METHOD, folder, sha256=known, timeout=SILENCE, retries=2, quiet=True)
    else:  # with the options that serve it best
        folder.mkdir(parents=True, exist_ok=True)
        options = {"quiet": True, "use_cookies": False, "timeout": SILENCE, "retries": 2}
        if known:
            got = gdown.cached_download(KNOWN.url, str(path), hash=f"sha256:{known}", **options)
        else:
            got = gdown.download(KNOWN.url, str(path), resume=True, **options)
    if Path(got) != path:
        raise AssertionError(f"the file is {got}, not {path}")
    return path.read_bytes()


@contextlib.contextmanager
def drive(fault: str | None = None) -> Iterator[DriveServer]:
    """Google Drive with this fault."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    good, other = bodies()
    with DriveServer(good, fault, other) as server, redirect_drive(server):
        yield server


@dataclass(frozen=True)
class Case:
    row: str
    name: str
    check: Callable[[str, Path], str]

    def run(self, tool: str, folder: Path) -> tuple[str, str]:
        """Return (what went wrong or "", what happened where all was right)."""
        try:
            wrong = self.check(tool, folder)
        except Exception as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return wrong, "right"


CASES: list[Case] = []


def case(row: str, name: str) -> Callable:
    def register(check: Callable[[str, Path], str]) -> Callable[[str, Path], str]:
        CASES.append(Case(row, name, check))
        return check
    return register


def refused(tool: str, folder: Path, says: str, known: str | None = None) -> str:
    """A call must fail with words that match `says` and leave nothing under the final name."""
    try:
        fetch(tool, folder, known)
    except Exception as error:
        if (folder / KNOWN.filename).exists():
            return "failed, and left a file under the final name"
        if not re.search(says, str(error), re.I | re.S):
            return f"says only: {type(error).__name__}: {' '.join(str(error).split())}"
        return ""
    return "ACCEPTED"


def heals(tool: str, folder: Path, server: DriveServer, known: str | None = None) -> str:
    """Without the fault, the next call must return the right file."""
    server.fault = None
    return right(fetch(tool, folder, known))


def right(body: bytes) -> str:
    return "" if body == bodies()[0] else "WRONG FILE"


def fails_then_heals(fault: str, says: str, tool: str, folder: Path,
                     known: str | None = None) -> str:
    with drive(fault) as server:
        return (refused(tool, folder, says, known) or storm(server)
                or heals(tool, folder, server, known))


def storm(server: DriveServer) -> str:
    return f"{len(server.requests)} requests" if len(server.requests) > 12 else ""


PAGE = r"(?=.*web page)(?=.*drive\.google\.com)"
for _fault in ("quota", "quota_as_file", "login"):
    case("D1", _fault)(functools.partial(fails_then_heals, _fault, PAGE))
for _fault in ("403", "404"):
    case("D2", _fault)(functools.partial(
        fails_then_heals, _fault, rf"(?=.*{_fault})(?=.*drive\.google\.com)"))


@case("D3", "503 twice")
def busy(tool: str, folder: Path) -> str:
    with drive("503"):
        return right(fetch(tool, folder))


@case("D3", "503 for ever")
def busy_for_ever(tool: str, folder: Path) -> str:
    return fails_then_heals("503_always", r"503", tool, folder)


def cut(fault: str, tool: str, folder: Path) -> str:
    """One cut: right at once, or an error, and the next call is right."""
    with drive(fault) as server:
        try:
            return right(fetch(tool, folder))
        except Exception:
            if (folder / KNOWN.filename).exists():
                return "failed, and left a file under the final name"
            return heals(tool, folder, server)


case("D4", "cut, length known")(functools.partial(cut, "cut"))
case("D5", "cut, length unknown")(functools.partial(cut, "cut_unknown"))
case("D9", "range ignored")(functools.partial(cut, "no_range"))
case("D9", "another range sent")(functools.partial(cut, "wrong_range"))


@case("D4", "cut every time, then resumed")
def cut_always(tool: str, folder: Path) -> str:
    with drive("cut_always") as server:
        problem = refused(tool, folder, r"connection|incomplete|cut|ended|short|lost|missing|read")
        asked = len(server.requests)
        problem = problem or heals(tool, folder, server)
        resumed = any(range_ for _, range_ in server.requests[asked:])
    return problem or ("" if resumed else "began again from the start")


@case("D6", "silence in the middle")
def stalled(tool: str, folder: Path) -> str:
    with drive("stall") as server:
        start = time.monotonic()
        problem = refused(tool, folder, r"second|time.?out|timed out|silen|stall")
        if time.monotonic() - start > 30:
            return "took longer than 30 s to give up"
        kept = any(path.stat().st_size > 1000 for path in folder.iterdir())
        return problem or ("" if kept else "the partial file is gone") or heals(
            tool, folder, server)


@case("D6", "silence from the start")
def silent(tool: str, folder: Path) -> str:
    return fails_then_heals("stall_headers", r"second|time.?out|timed out|silen", tool, folder)


@case("D7", "one bit wrong, checksum known")
def flipped(tool: str, folder: Path) -> str:
    with drive("flip") as server:
        problem = refused(tool, folder, rf"(?=.*sha-?256)(?=.*expected)(?=.*{sha256()})", sha256())
        bad = [path for path in folder.iterdir() if path.name.endswith(".bad")]
        problem = problem or ("" if bad else "the bad file was not set aside")
        return problem or heals(tool, folder, server, sha256())


@case("D7", "one bit wrong, no checksum known")
def flipped_unknown(tool: str, folder: Path) -> str:
    return fails_then_heals("flip", r"damaged|CRC|checksum|corrupt", tool, folder)


@case("D8", "a bad file is already there")
def stale(tool: str, folder: Path) -> str:
    body = bytearray(bodies()[0])
    body[len(body) // 2] ^= 1
    (folder / KNOWN.filename).write_bytes(body)
    with drive():
        return right(fetch(tool, folder, sha256()))


@case("D8", "a web page is already there")
def stale_page(tool: str, folder: Path) -> str:
    (folder / KNOWN.filename).write_bytes(b"<!DOCTYPE html><html>quota</html>")
    with drive():
        return right(fetch(tool, folder))


@case("D8", "half a file is already there")
def stale_half(tool: str, folder: Path) -> str:
    (folder / KNOWN.filename).write_bytes(bodies()[0][:300_000])
    with drive():
        return right(fetch(tool, folder))


def changes(fault: str, tool: str, folder: Path) -> str:
    """The file is replaced during the transfer: the old or the new one, or an error; no mixture."""
    path = folder / KNOWN.filename
    for _ in range(2):
        with drive(fault), contextlib.suppress(Exception):  # the content is what is judged
            fetch(tool, folder)
        if path.exists() and path.read_bytes() not in bodies():
            return "A MIXTURE of two files"
    with drive() as server:
        server.body = bodies()[1]
        if fetch(tool, folder) not in bodies():
            return "A MIXTURE of two files"
    return ""


case("D10", "the remote file changes")(functools.partial(changes, "changed"))
case("D10", "it changes, the server does not tell")(functools.partial(changes, "changed_unnoticed"))


@case("D10", "it changed since the last load")
def changed_since(tool: str, folder: Path) -> str:
    entry = {"sha256": sha256(), "size": len(bodies()[0])}
    (folder / "checksums.json").write_text(json.dumps({KNOWN.filename: entry}))
    with drive() as server:
        server.body = bodies()[1]
        return refused(tool, folder, r"sha-?256|expected|checksum",
                       None if tool == "ours" else sha256())


def _fetch_in_process(tool: str, folder: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=fetch, args=(tool, folder))
    process.start()
    return process


@case("D11", "killed in the middle")
def killed(tool: str, folder: Path) -> str:
    with drive("slow") as server:
        process = _fetch_in_process(tool, folder)
        server.half_sent.wait(20)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (folder / KNOWN.filename).exists():
            return "half a file under the final name"
        return heals(tool, folder, server)


@case("D12", "two at once")
def twice(tool: str, folder: Path) -> str:
    with drive("slow"):
        both = [_fetch_in_process(tool, folder) for _ in range(2)]
        for process in both:
            process.join()
    if [process.exitcode for process in both] != [0, 0]:
        return f"exit statuses {[process.exitcode for process in both]}"
    return right((folder / KNOWN.filename).read_bytes())


@case("D13", "no room")
def no_room(tool: str, folder: Path) -> str:
    """A limit on the size of files stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with drive() as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        problem = refused(tool, folder, rf"full|large|space|room|{re.escape(str(folder))}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return problem or heals(tool, folder, server)


@case("D13", "a folder that cannot be made")
def no_folder(tool: str, folder: Path) -> str:
    with drive():
        return refused(tool, Path("/proc/checkpoints"), r"/proc/checkpoints")


@case("D13", "a file where the folder should be")
def file_for_folder(tool: str, folder: Path) -> str:
    (folder / "checkpoints").write_text("notes")
    with drive():
        problem = refused(tool, folder / "checkpoints", r"checkpoints.*(file|folder|director)")
    return problem or ("" if (folder / "checkpoints").read_text() == "notes" else "notes are lost")


@case("D13", "a folder where the file should be")
def folder_for_file(tool: str, folder: Path) -> str:
    (folder / KNOWN.filename).mkdir()
    with drive(), contextlib.suppress(IsADirectoryError):
        try:
            fetch(tool, folder)
        except Exception as error:
            says = re.search(r"folder|director", str(error), re.I)
            return "" if says else f"says only: {' '.join(str(error).split())}"
    return "ACCEPTED"


@case("D13", "spaces and umlauts in the path")
def odd_path(tool: str, folder: Path) -> str:
    with drive():
        return right(fetch(tool, folder / "Gewichte für CT (1)" / "数据"))
