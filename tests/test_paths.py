"""A path that begins with `~` means the home folder, wherever a user types one."""

import re
from pathlib import Path

import numpy as np
import pytest
from notebook_cells import ROOT, read_cells
from PIL import Image

import medssl_utils as m

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder; the current folder is another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    for name in ("HOME", "USERPROFILE"):  # the second on Windows
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert not list((tmp_path / "work").iterdir())  # no folder that is called ~


@pytest.fixture
def images(home) -> Path:
    """A folder of images in the home folder, with a list of them beside it."""
    rows = ["path,label"]
    for i in range(12):
        path = home / "in" / ("ill", "well")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32), np.uint8)).save(path)
        rows.append(f"{path.relative_to(home).as_posix()},{path.parent.name}")
    (home / "list.csv").write_text("\n".join(rows))
    return home / "in"


@pytest.mark.parametrize("typed", ["~/in", "~/list.csv"])
def test_folders_of_images_lists_and_decoded_pictures(images, home, typed):
    data = m.load_data(typed, image_size=8, data_dir="~/data")
    assert sum(map(len, data.parts.values())) == 12
    assert (home / "data" / "decoded").is_dir()
    assert len(m.read_folder(typed, image_size=8, data_dir="~/data").table) == 12


def test_data_sets_by_name(home):
    with pytest.raises(FileNotFoundError, match=re.escape(str(home / "data" / "covid_ct"))):
        m.load_data("covid_ct", data_dir="~/data")


def test_checkpoints(home):
    path = m.write_demo_checkpoint("SparK", "~/checkpoints/stand-in")
    assert path == home / "checkpoints" / "stand-in" / path.name
    assert len(m.load_state_dict(f"~/checkpoints/stand-in/{path.name}")) == 318
    model, report = m.load_backbone("SparK", f"~/checkpoints/stand-in/{path.name}")
    by_method = m.load_backbone("SparK", folder="~/checkpoints")[1]
    assert by_method.fingerprint == report.fingerprint
    assert m.export_backbone(model, "~/out.safetensors", report) == home / "out.safetensors"
    copied = m.download_checkpoint("SparK", "~/mine",
                                   from_file=f"~/checkpoints/stand-in/{path.name}")
    assert copied == home / "mine" / path.name and copied.is_file()


def test_run_folders(images, home):
    data = m.load_data(images, image_size=32, data_dir="~/data")
    config = m.FineTuneConfig.named("demo", epochs=1, image_size=32)  # small for speed
    run = m.fine_tune(*m.load_backbone("random"), data, config, runs_dir="~/runs", progress="none")
    assert run.folder.is_relative_to(home / "runs")
    assert m.load_run(f"~/runs/study/{run.folder.name}").metrics == run.metrics
    assert m.load_runs("~/runs")["folder"].tolist() == [run.folder]


def test_a_studys_folders(images, home):
    cell, = m._cells({"dataset": ["~/in"]}, {"runs_dir": "~/runs", "data_dir": "~/data"})
    assert [cell[name] for name in ("dataset", "runs_dir", "data_dir")] == [
        str(home / name) for name in ("in", "runs", "data")]


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_folders_that_a_notebook_looks_into_itself(stem):
    lines = "\n".join(read_cells(stem)).splitlines()
    made = [line for line in lines if re.search(r"\bPath\(\w+_dir\b", line)]
    helped = r"expanduser\(\)|medssl\.|from_file|exported"  # the module takes them as typed
    assert [line for line in made if not re.search(helped, line)
            and "expanduser()" not in lines[lines.index(line) + 1]] == []
