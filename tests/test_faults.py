"""A quick choice of the faulty files (faulty_checkpoints.py), a few of each row L1 to L16.

All of them, each in a process of its own and beside other readers: `make faults`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

faults = pytest.importorskip("faults", reason="limits on a process need Linux or macOS",
                             exc_type=ImportError)
files = faults.files

QUICK = """
L1 posix.system
L1 NEWOBJ
L1 pathlib Path.touch
L1 STACK_GLOBAL from memo
L1 SETITEM on os.environ
L1 among the settings
L1 legacy file, in the content
L1 allowed by the user
L2 posix.system, then half a pickle
L2 STACK_GLOBAL, legacy file cut
L3 Drive quota page
L3 JSON error
L3 empty
L3 gzip
L3 tar of the first PyTorch
L3 zip in a zip
L3 whole model
L3 named pipe
L3 legacy format
L4 half
L4 1 byte short
L5 bit in middle tensor
L5 hole of 4 kB
L5 bit in a recorded size
L6 tensor of 3 GB
L6 memo index of 4 billion
L6 200,000 nested lists
L6 more names than a file needs
L7 stride of 2^40
L7 record is missing
L7 all in two storages
L8 key twice
L8 record data/5 twice
L8 int32 over float32 bytes
L8 sparse
L9 nan in SwAV bn1.bias
L9 conv1.weight all zero
L9 zero-initialised residuals are right
L10 BYOL asked for as MoCo
L10 SparK asked for as SwAV
L11 ResNet18 in a MoCo file
L12 one input channel
L13 159 of 318
L13 no counters (old file)
L14 SparK, still pretraining
L14 MoCo, by DDP
L14 BYOL, from GPU memory
L15 AttributeDict
L15 callback class as a key
L15 unknown name is refused
L15 unknown key group, allowed by the user
L16 one weight changed
L16 same file again
""".strip().splitlines()

BY_ID = {case.id: case for case in files.CASES}


def test_the_cases_are_many_and_have_distinct_names():
    assert len(BY_ID) == len(files.CASES) > 400
    assert sum(case.runs for case in files.CASES) >= 45
    assert {case.row for case in files.CASES} == {f"L{i}" for i in range(1, 17)}


@pytest.mark.parametrize("name", QUICK)
def test_a_faulty_file_is_met_as_promised(name):
    case = BY_ID[name]
    with faults.built(case) as (path, folder):
        outcome = faults.attempt(faults.read_ours, case, path, case.allow_extra, folder)
    assert faults.wrong_outcome(case, outcome) == ""
    assert faults.wrong_words(case, outcome, ours=True) == ""


def test_an_accepted_twin_needs_every_bit():
    case = BY_ID["L14 SparK, whole"]
    tensors = dict(files.weights())
    assert faults.same(tensors, case.expected())
    tensors["bn1.bias"] = tensors["bn1.bias"] + 1e-7
    assert not faults.same(tensors, case.expected())


@pytest.mark.slow
def test_make_faults_prints_the_totals_and_shows_that_harmful_files_are_harmful():
    command = [sys.executable, "bench/faults.py", "--summary", "--rows", "L2", "--match", "INST"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| cases | **5 of 5** |" in done.stdout
    assert "runs the code of 4 of 4 harmful files" in done.stdout
