"""Notebook 03 on real images, and on settings that cannot work; papermill runs it."""

from pathlib import Path

import papermill
import pytest

import medssl_utils as medssl

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "03_fine_tune.ipynb"
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real images are not here")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def run_03(tmp_path, checkpoints, **parameters):
    """Execute notebook 03 with these parameters; return its one run."""
    out = tmp_path / "03.ipynb"
    medssl.run_notebook(NOTEBOOK, out, {
        "runs_dir": str(tmp_path / "runs"), "checkpoints_dir": str(checkpoints), "device": "cpu",
        **parameters})
    return medssl.load_run(next((tmp_path / "runs").rglob("metrics.json")).parent)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "SparK"])
def test_covid_ct_ends_with_scores_for_all_203_test_images(tmp_path, checkpoints, method):
    run = run_03(tmp_path, checkpoints, method=method, dataset="covid_ct", data_dir=str(SHARED),
                 recipe="recommended", epochs=2, image_size=32)
    assert run.config["n_train"] == 425 and len(run.predictions["val_labels"]) == 118
    assert run.predictions["scores"].shape == (203, 2)
    assert (run.predictions["labels"] == 0).sum() == 98  # COVID is label 0, as in the paper
    assert run.stamp == "DEMO"  # the stand-ins make it one, the random control included
    assert 0 <= run.metrics["AUC"] <= 1


@needs_shared
@pytest.mark.slow
def test_pneumoniamnist_ends_with_scores_for_all_624_test_images(tmp_path, checkpoints):
    data = tmp_path / "data"
    data.mkdir()
    (data / "pneumoniamnist.npz").symlink_to(
        SHARED / "pneumoniamnist" / "pneumoniamnist_rebuilt.npz")
    run = run_03(tmp_path, checkpoints, method="random", dataset="pneumoniamnist",
                 data_dir=str(data), unofficial=True, recipe="recommended", epochs=2,
                 image_size=32, label_fraction=0.1)
    assert len(run.predictions["labels"]) == 624
    assert 460 <= run.config["n_train"] <= 480


@needs_shared
@pytest.mark.slow
def test_every_recipe_runs_on_covid_ct_and_none_of_it_is_a_full_run(tmp_path):
    """Small for speed: a tenth of the labels at 32 pixels, across the recipe's last boundary."""
    stamps = {}
    for recipe in medssl.RECIPES:
        epochs = 12 if recipe == "paper" else 2
        config = medssl.FineTuneConfig.named(recipe, "covid_ct", image_size=32, epochs=epochs)
        data = medssl.load_data("covid_ct", image_size=32, data_dir=SHARED,
                                dtype="float32" if recipe == "paper" else "uint8")
        run = medssl.fine_tune(*medssl.load_backbone("random", weights="published"), data, config,
                               label_fraction=0.1, runs_dir=tmp_path, device="cpu",
                               progress="none", keep_best=False)
        assert run.predictions["scores"].shape == (203, 2) and 0 <= run.metrics["AUC"] <= 1
        stamps[recipe] = run.stamp
        if recipe == "paper":
            assert list(run.history["lr"])[9:] == [1e-4, 1e-4, 2e-5]
    assert stamps == {"recommended": "SHORT", "paper": "SHORT", "linear": "SHORT", "demo": "DEMO"}


@pytest.mark.parametrize("parameters, words", [
    ({"method": "BYOLL"}, "Did you mean 'BYOL'"),
    ({"dataset": "organmnist"}, "organ.mnist"),
    ({"dataset": "covid_ct", "data_dir": "no_such_folder"}, "COVID-CT is not in"),
    ({"label_fraction": 2.0}, "label_fraction is 2.0"),
    ({"recipe": "papr"}, "Did you mean 'paper'"),
])
def test_notebook_names_a_bad_setting_and_leaves_no_run(tmp_path, checkpoints, parameters, words):
    with pytest.raises(papermill.PapermillExecutionError, match=words):
        run_03(tmp_path, checkpoints, **{"method": "random", **parameters})
    assert not (tmp_path / "runs").exists()


def test_misspelt_parameter_is_an_error_and_nothing_is_executed(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="'metod' is not known. Did you mean 'method'"):
        run_03(tmp_path, checkpoints, metod="BYOL")
    assert not (tmp_path / "03.ipynb").exists()


def test_a_truncated_checkpoint_stops_the_notebook_before_any_run(tmp_path, stand_ins):
    folder = tmp_path / "checkpoints"
    (folder / "stand-in").mkdir(parents=True)
    name = medssl.CHECKPOINTS["SparK"].filename
    whole = next(Path(stand_ins).rglob(name)).read_bytes()
    (folder / "stand-in" / name).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(papermill.PapermillExecutionError, match="CheckpointError"):
        run_03(tmp_path, folder, method="SparK")
    assert not (tmp_path / "runs").exists()


def test_a_file_of_another_method_stops_the_notebook_and_names_both(tmp_path, stand_ins):
    folder = tmp_path / "checkpoints"
    (folder / "stand-in").mkdir(parents=True)
    wrong = next(Path(stand_ins).rglob(medssl.CHECKPOINTS["BYOL"].filename))
    (folder / "stand-in" / medssl.CHECKPOINTS["SwAV"].filename).symlink_to(wrong)
    with pytest.raises(papermill.PapermillExecutionError, match="(?s)BYOL.*SwAV|SwAV.*BYOL"):
        run_03(tmp_path, folder, method="SwAV")
    assert not (tmp_path / "runs").exists()
