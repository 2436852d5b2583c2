"""The judge of `make faults`, and the faulty files that test_load.py leaves to it (row L16)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

faults = pytest.importorskip("faults", reason="limits on a process need Linux or macOS",
                             exc_type=ImportError)
files = faults.files

BY_ID = {case.id: case for case in files.CASES}
REPLACED = ["L16 one weight changed", "L16 legacy file, one bit", "L16 same file again"]


def test_the_cases_are_many_cover_every_row_and_have_distinct_names():
    assert len(BY_ID) == len(files.CASES) > 450
    assert sum(case.runs for case in files.CASES) >= 100
    assert {case.row for case in files.CASES} == {f"L{i}" for i in range(1, 17)}


@pytest.mark.parametrize("name", REPLACED)
def test_a_file_in_the_place_of_a_recorded_one_is_met_as_promised(name):
    case = BY_ID[name]
    with faults.built(case) as (path, folder):
        outcome = faults.attempt(faults.read_ours, case, path, (), folder)
    assert faults.wrong_outcome(case, outcome) == ""
    assert faults.wrong_words(case, outcome, ours=True) == ""


def test_right_means_every_bit():
    tensors = dict(files.weights())
    assert faults.same(tensors, files.weights())
    tensors["bn1.bias"] = torch.nextafter(tensors["bn1.bias"], torch.tensor(9.0))
    assert not faults.same(tensors, files.weights())


REFUSAL = "model.ckpt asks for posix.system, which has no place in a weight file"


@pytest.mark.parametrize(("outcome", "wrong"), [
    ({"what": "loaded", "right": True}, "ACCEPTED"),
    ({"what": "loaded", "right": False}, "ACCEPTED"),
    ({"what": "refused", "text": REFUSAL, "effect": "the marker file"}, "CODE RAN"),
    ({"what": "hung"}, "hung"),
    ({"what": "died"}, "died"),
    ({"what": "refused", "text": REFUSAL}, ""),
])
def test_what_happened_to_a_harmful_file_is_judged(outcome, wrong):
    found = faults.wrong_outcome(BY_ID["L1 posix.system"], faults.Outcome(**outcome))
    assert found.startswith(wrong) and bool(found) == bool(wrong)


@pytest.mark.parametrize(("text", "kind", "wrong"), [
    (REFUSAL, "CheckpointError", ""),
    (REFUSAL, "KeyError", "by accident"),
    ("the file is bad", "CheckpointError", "says only"),
    (REFUSAL + "; set weights_only=False", "CheckpointError", "advises"),
    (REFUSAL + "\x1b[2K", "CheckpointError", "a terminal may obey"),
])
def test_the_words_of_a_refusal_are_judged(text, kind, wrong):
    outcome = faults.Outcome("refused", text, kind)
    found = faults.wrong_words(BY_ID["L1 posix.system"], outcome, ours=True)
    assert wrong in found and bool(found) == bool(wrong)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits on memory need Linux")
@pytest.mark.parametrize(("work", "what"), [
    (lambda: time.sleep(60), "hung"),
    (lambda: os._exit(3), "died"),
    (lambda: faults.Outcome("memory" if _refuses(4 << 30) else "no limit"), "memory"),
])
def test_a_case_is_held_by_its_process(work, what):
    assert faults.isolated(work, seconds=3).what == what


def _refuses(size: int) -> bool:
    try:
        bytearray(size)
    except MemoryError:
        return True
    return False


@pytest.mark.slow
def test_make_faults_prints_the_totals_and_shows_that_harmful_files_are_harmful():
    command = [sys.executable, "bench/faults.py", "--summary", "--rows", "L2", "--match", "INST"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| cases | **5 of 5** |" in done.stdout
    assert "runs the code of 4 of 4 harmful files" in done.stdout
