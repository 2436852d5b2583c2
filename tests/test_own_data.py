"""Notebook 07 on a folder of the user's own, run by papermill; how it runs as committed is tested
with the other notebooks."""

from pathlib import Path

import nbformat
import numpy as np
import onnxruntime
import papermill
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import medssl_utils as medssl

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "07_use_your_own_data.ipynb"
SMALL = {"method": "random", "epochs": 1, "image_size": 32, "patient": r"(p\d+)", "device": "cpu"}


def write_folder(folder: Path, seed: int, n: int, first: int = 0) -> None:
    """Write phantoms as PNG into a folder for each class; patients are numbered from `first`."""
    part = medssl.demo_data(seed, n_train=n, n_val=4, n_test=4, image_size=32).train
    for i, (image, label) in enumerate(zip(part.images, part.labels)):
        path = folder / part_name(label) / f"p{first + i // 2}_{i % 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def part_name(label: int) -> str:
    return ("clear", "hazy")[label]


def run_07(place: Path, **parameters) -> str:
    """Execute the notebook within `place`; return all that it printed and showed as text."""
    out = place / "07.ipynb"
    medssl.run_notebook(NOTEBOOK, out, {
        "folder": str(place / "mine"), **{f"{name}_dir": str(place / name) for name in (
            "runs", "data", "checkpoints")}, **SMALL, **parameters})
    cells = nbformat.read(out, as_version=4).cells
    outputs = [o for c in cells for o in c.get("outputs", [])]
    return "\n".join(o.get("text", "") or o.data.get("text/plain", "") for o in outputs)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A place where the notebook has run on a folder, with new files and images from elsewhere."""
    place = tmp_path_factory.mktemp("own")
    write_folder(place / "mine", seed=1, n=64)
    write_folder(place / "elsewhere", seed=2, n=16, first=500)
    (place / "new").mkdir()
    for i in range(3):
        Image.fromarray(np.full((40, 40), 60 * i, np.uint8)).save(place / "new" / f"{i}.png")
    (place / "new" / "broken.png").write_text("<html>not an image</html>")
    (place / "said.txt").write_text(run_07(place, new_folder=str(place / "new"),
                                           external_folder=str(place / "elsewhere")))
    return place


@pytest.fixture
def folder(place) -> Path:
    """The folder of the one run."""
    return next((place / "runs").rglob("metrics.json")).parent


@pytest.fixture
def said(place) -> str:
    return (place / "said.txt").read_text()


def test_the_run_scored_every_test_image_of_whole_patients(folder):
    run = medssl.load_run(folder)
    assert len(run.predictions["labels"]) == 16
    assert all(np.unique(run.predictions["groups"], return_counts=True)[1] == 2)
    assert run.stamp == "DEMO"


def test_an_unreadable_new_file_is_named_and_the_rest_predicted(folder, said):
    assert "NOT PREDICTED: broken.png: no PNG" in said
    table = pd.read_csv(folder / "new_files.csv")
    assert table["id"].tolist() == ["0.png", "1.png", "2.png"]
    assert table[["clear", "hazy"]].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert table["stamp"].tolist() == ["DEMO"] * 3


def test_scores_elsewhere_and_per_patient_come_with_intervals(said):
    assert "Elsewhere, over 8 patients: AUC" in said
    assert "8 patients" in said and "16 images" in said


def test_the_exported_files_answer_as_the_model_does(place, folder):
    x = torch.rand(5, 3, 32, 32)
    program = torch.export.load(folder / "exported" / "model.pt2").module()
    session = onnxruntime.InferenceSession(folder / "exported" / "model.onnx")
    with torch.inference_mode():
        one = program(x).numpy()
    other, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(one - other).max() < 1e-4
    assert one.sum(1) == pytest.approx(1, abs=1e-5)


def test_the_exported_weights_are_those_of_the_best_epoch_and_say_how_to_use_them(folder):
    with safe_open(folder / "exported" / "weights.safetensors", "pt") as exported, \
            safe_open(folder / "best.safetensors", "pt") as best:
        assert exported.metadata()["classes"] == "clear; hazy"
        assert {"size", "mean", "std", "stamp"} <= set(exported.metadata())
        assert all(torch.equal(exported.get_tensor(k), best.get_tensor(k)) for k in best.keys())


def test_the_model_card_says_what_it_was_trained_on_and_must_not_be_used_for(folder):
    card = (folder / "exported" / "MODEL_CARD.md").read_text("utf-8")
    for words in ("DEMO: this model must not be used for anything", "clear, hazy", "95 %",
                  "Must not be used** to diagnose or treat anyone", "64 files: PNG 64",
                  "drawn with seed 0", "8 patients", "Start: random, random weights",
                  "1 epochs at 32 pixels"):
        assert words in card


@pytest.mark.slow
def test_the_model_card_of_a_linear_evaluation_tells_of_no_epochs(tmp_path):
    write_folder(tmp_path / "mine", seed=1, n=32)
    run_07(tmp_path, recipe="linear")
    card = next((tmp_path / "runs").rglob("MODEL_CARD.md")).read_text("utf-8")
    assert "Recipe linear: a head alone at 32 pixels" in card


@pytest.mark.slow
def test_a_broken_training_file_stops_before_any_run(tmp_path):
    write_folder(tmp_path / "mine", seed=1, n=16)
    (tmp_path / "mine" / "hazy" / "p99_0.png").write_bytes(b"\x89PNG cut")
    with pytest.raises(papermill.PapermillExecutionError, match="hazy/p99_0.png: "):
        run_07(tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_patient_of_the_training_images_elsewhere_is_an_error(place):
    with pytest.raises(papermill.PapermillExecutionError, match="patients in more than one split"):
        run_07(place, external_folder=str(place / "mine"))


@pytest.mark.slow
def test_a_class_absent_from_the_test_part_is_undefined_to_the_end(tmp_path):
    rows = ["path,label,split"]
    for i in range(30):
        part, c = ("train", "train", "train", "val", "test")[i % 5], i // 5 % 3
        path = tmp_path / "mine" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(pixels).save(path)
        rows.append(f"{i}.png,{'abc'[c % 2 if part == 'test' else c]},{part}")
    (tmp_path / "mine" / "list.csv").write_text("\n".join(rows))
    said = run_07(tmp_path, patient="", window="")
    assert "The parts are those that the folder names." in said
    assert "untrained: AUC undefined, ACC 0." in said
    assert "AUC went from undefined to undefined per image" in said
