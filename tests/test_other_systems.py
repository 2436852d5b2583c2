"""What Windows refuses and Linux allows, refused here too: a stand-in for a machine with Windows.

There a file that is open or mapped can be neither replaced nor deleted, and only a handle that may
write can be flushed to the disk.
"""

import errno
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import medssl_utils as medssl

fcntl = pytest.importorskip("fcntl", reason="on Windows the system itself refuses")


def held(path) -> bool:
    """Whether this process has the file open or mapped."""
    process, path = psutil.Process(), os.path.realpath(path)
    return path in {f.path for f in (*process.open_files(), *process.memory_maps())}


@pytest.fixture
def like_windows(monkeypatch):
    """Refuse what Windows refuses."""
    def guard(name, count):
        allowed = getattr(os, name)

        def guarded(*paths, **options):
            if taken := [str(path) for path in paths[:count] if held(path)]:
                raise PermissionError(errno.EACCES, f"[as Windows] in use, no {name}", taken[0])
            return allowed(*paths, **options)

        monkeypatch.setattr(os, name, guarded)

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "[as Windows] fsync of a handle that may only read")

    for name, count in (("replace", 2), ("rename", 2), ("unlink", 1), ("remove", 1)):
        guard(name, count)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_the_stand_in_refuses_what_windows_refuses(like_windows, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(9999))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    (tmp_path / "b.npy").write_bytes(b"new")
    with pytest.raises(PermissionError, match="as Windows"):
        os.replace(tmp_path / "b.npy", tmp_path / "a.npy")
    assert mapped.sum() == 0
    with open(tmp_path / "b.npy", "rb") as file, pytest.raises(OSError, match="may only read"):
        os.fsync(file.fileno())


def test_a_checkpoint_is_written_converted_changed_and_exported(like_windows, tmp_path):
    for _ in range(2):  # the second time over the first, as notebooks 01 and 02 do when run again
        path = medssl.write_demo_checkpoint("SparK", tmp_path / "stand-in")
        model, report = medssl.load_backbone("SparK", folder=tmp_path)
        medssl.export_backbone(model, tmp_path / "spark.safetensors", report)
        exported, _ = medssl.load_backbone("SparK", tmp_path / "spark.safetensors")
        assert torch.equal(exported.conv1.weight, model.conv1.weight)
        del exported
    copied = medssl.download_checkpoint("SparK", tmp_path / "fetched", from_file=path)
    assert copied.read_bytes() == path.read_bytes()


def test_a_read_only_file_is_taken_as_a_checkpoint(like_windows, stand_ins, tmp_path):
    mine = tmp_path / "mine.pth"
    mine.write_bytes((stand_ins / "stand-in" / "spark_resnet50.pth").read_bytes())
    mine.chmod(0o444)
    copied = medssl.download_checkpoint("SparK", tmp_path / "folder", from_file=mine)
    assert copied.stat().st_mode & 0o200  # so that it can be set aside or fetched again later


def test_a_folder_is_read_with_an_unreadable_file_in_it_and_read_again(like_windows, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "mine" / ("ill", "well")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    for _ in range(2):
        data = medssl.load_data(tmp_path / "mine", image_size=16, data_dir=tmp_path / "data",
                                options=medssl.ReadOptions(on_error="skip"))
        assert sum(map(len, (data.train, data.val, data.test))) == 39


def test_a_run_is_trained_and_found_again(like_windows, stand_ins, few_phantoms, tmp_path):
    config = medssl.FineTuneConfig.named("demo", epochs=1, image_size=32)  # small for speed
    for found in (False, True):
        run = medssl.fine_tune(*medssl.load_backbone("SparK", folder=stand_ins), few_phantoms,
                               config, runs_dir=tmp_path, device="cpu", progress="none")
        assert run.found == found
