"""What the test files share: one thread, no network, stand-ins made once."""

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
torch.set_num_threads(1)  # two threads collapse where a neighbour is busy


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Let this process connect to itself alone: no test may need the internet."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test asked for {address[0]}; tests need no network")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    """The checkpoints folder of all processes; `load_backbone` writes in it, a test may not."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each process has a folder of its own in there
    folder = folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def workbook(stand_ins, tmp_path_factory) -> Path:
    """A copy of the notebooks in a folder of their own, where runs/ and data/ grow beside them."""
    folder = tmp_path_factory.mktemp("workbook")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / "checkpoints").symlink_to(stand_ins)
    return folder
