"""What several test files share."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import medssl_utils as medssl  # noqa: E402

torch.set_num_threads(1)  # two threads collapse where a neighbour is busy


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    """A checkpoints folder in which the four stand-ins lie; not to be written to by a test."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for method in medssl.METHODS:
        medssl.write_demo_checkpoint(method, folder / "stand-in")
    return folder
