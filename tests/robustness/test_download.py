"""Downloads through gdown from a server that plays Google Drive (faults D1 to D13)."""

import hashlib
import importlib
import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import medssl_utils as medssl
from tests.robustness.drive import PAGES, Drive

NAME, URL = medssl.CHECKPOINTS["BYOL"].filename, medssl.CHECKPOINTS["BYOL"].url
FAULTS = [*PAGES, "silence", "cut always", "flip", "changed"]
FILES = []
for size in (300_000.0, 200_000.0):
    file = io.BytesIO()
    torch.save({"state_dict": {"w": torch.arange(size)}}, file)
    FILES.append(file.getvalue())
BODY, OTHER = FILES
WRONG = [b"<html>Sign in</html>", BODY[:-30], BODY[:900] + b"x" + BODY[901:]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Give up after a second of silence, and don't wait between attempts."""
    monkeypatch.setattr(medssl, "DOWNLOAD_TIMEOUT", 1.0)
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def fetch(folder: Path) -> bytes:
    return medssl.download_checkpoint("BYOL", folder).read_bytes()


def start_fetching(folder: Path, fault: str) -> multiprocessing.Process:
    """Fetch in a process of its own, which waits long for a silent server."""

    def work():
        medssl.DOWNLOAD_TIMEOUT = 30.0
        with Drive(BODY, fault):
            fetch(folder)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_file_is_fetched_once_through_drives_pages(tmp_path):
    with Drive(BODY) as drive:
        assert fetch(tmp_path) == fetch(tmp_path) == BODY
    assert [path for path, _ in drive.requests] == ["/uc", "/download", "/download"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [NAME]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_the_way_by_hand_and_the_next_call_heals_it(fault, tmp_path):
    folder = tmp_path / "Prüfung 1" / "checkpoints"
    with Drive(BODY, fault) as drive:
        with pytest.raises(medssl.CheckpointError) as caught:
            fetch(folder)
        for part in ("BYOL", URL, "web page", "By hand", str(folder / NAME)):
            assert part in str(caught.value)
        assert not (folder / NAME).exists()
        drive.fault = ""
        assert fetch(folder) == BODY


def test_a_cut_transfer_goes_on_where_it_ended(tmp_path):
    with Drive(BODY, "cut") as drive:
        assert fetch(tmp_path) == BODY
    assert drive.requests[-1][1].startswith("bytes=5"), "not from the beginning"


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_in_its_place_is_set_aside_and_fetched_anew(wrong, tmp_path):
    (tmp_path / NAME).write_bytes(wrong)
    with Drive(BODY), pytest.warns(UserWarning, match="set aside"):
        assert fetch(tmp_path) == BODY
    assert (tmp_path / f"{NAME}.bad").read_bytes() == wrong


def test_a_recorded_checksum_is_held_against_what_lies_there_and_what_comes(tmp_path):
    recorded = {NAME: hashlib.sha256(BODY).hexdigest()}
    (tmp_path / "checksums.json").write_text(json.dumps(recorded))
    (tmp_path / NAME).write_bytes(OTHER)
    with Drive(BODY), pytest.warns(UserWarning, match="SHA-256"):
        assert fetch(tmp_path) == BODY
    (tmp_path / NAME).unlink()
    with Drive(OTHER), pytest.raises(medssl.CheckpointError, match="SHA-256"):
        fetch(tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path):
    process = start_fetching(tmp_path, "silence")
    while not any(path.stat().st_size for path in tmp_path.glob(f".{NAME}.download/*.part")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / NAME).exists()
    with Drive(BODY):
        assert fetch(tmp_path) == BODY


def test_two_at_once_wait_for_each_other(tmp_path):
    processes = [start_fetching(tmp_path, "") for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module("gdown.download"), "_write_response", full)
    with Drive(BODY), pytest.raises(medssl.CheckpointError, match="No space left"):
        fetch(tmp_path)
    assert not (tmp_path / NAME).exists()
