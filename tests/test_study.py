"""Studies: what is planned, what is run where, and what a dying worker leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import medssl_utils as medssl

run_cells = medssl._run_cells  # as it is; some tests put another one in its place


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A prepared file of 48 phantoms, few and small for speed."""
    data = medssl.demo_data(n_train=24, n_val=8, n_test=16, image_size=16)
    return medssl.save_data(data, tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture
def settings(prepared, stand_ins, tmp_path) -> dict:
    options = {"dataset": str(prepared), "recipe": "linear", "image_size": 16}
    return {**options, "runs_dir": str(tmp_path / "runs"), "checkpoints_dir": str(stand_ins)}


def finished(settings):
    return sorted(path.parent for path in Path(settings["runs_dir"]).glob("*/*/metrics.json"))


GRID = {"method": ["random"], "label_fraction": [0.5, 1.0], "seed": [0, 1]}
WRONG = [
    ({"method": ["BYOLL"]}, {}, "method 'BYOLL'"),
    ({"methods": ["BYOL"]}, {}, "argument 'methods'"),
    ({}, {"weights": "publshed"}, "weights 'publshed'"),
    ({}, {"lr": "1e-4"}, "lr is '1e-4'; give a number"),
    ({}, {"weight_decay": float("nan")}, "weight_decay is nan"),
    ({}, {"epochs": 2.5}, "epochs is 2.5; give a number from 0 up, such as 50"),
    ({}, {"augment": "affin"}, "affine, flip_ud, none"),
    ({}, {"batch_size": 1}, "batch_size takes 2 or more"),
    ({"labels_per_class": [2]}, {"recipe": "paper"}, "'authors' takes a fraction"),
    ({"label_fraction": [0.5, 0]}, {}, "label_fraction 0"),
    ({"label_fraction": [2]}, {}, "label_fraction 2"),
    ({"label_fraction": ["0.5"]}, {}, "label_fraction is '0.5'"),
    ({"seed": ["0"]}, {}, "seed is '0'"),
    ({"seed": 3}, {}, r"a grid takes a list: \[3\]"),
    ({"seed": [0]}, {"seed": 0}, "multiple values for keyword argument 'seed'"),
    ({"labels_per_class": [1000]}, {}, "labels_per_class 1000"),
    ({}, {"dataset": "organmnist"}, "dataset 'organmnist'"),
    ({}, {"dataset": "missing.npz"}, "No file .*missing.npz"),
]


@pytest.mark.parametrize("grid, fixed, message", WRONG)
def test_a_wrong_setting_is_named_before_anything_is_written(grid, fixed, message, settings):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        medssl.run_study(grid, **{**settings, **fixed})
    assert not Path(settings["runs_dir"]).exists()


def test_a_plan_writes_nothing_and_says_what_is_done_and_how_long_the_rest_takes(settings):
    assert medssl.plan_study(GRID, **settings).attrs["summary"] == "4 runs: 0 done, 4 left"
    assert not Path(settings["runs_dir"]).exists()
    medssl.run_study({**GRID, "seed": [0]}, **settings)
    table = medssl.plan_study(GRID, **settings)
    assert table.groupby("seed")["status"].unique().tolist() == [["done"], ["to do"]]
    assert table.attrs["summary"].startswith("4 runs: 2 done, 2 left, about 0.")


def test_a_study_leaves_what_fine_tune_leaves_and_is_not_run_again(settings, prepared, monkeypatch):
    medssl.run_study(GRID, **settings)
    monkeypatch.setattr(medssl, "_fit_linear", None)  # what is done is loaded
    config = medssl.FineTuneConfig.named("linear", image_size=16)
    options = {"label_fraction": 0.5, "seed": 1, "runs_dir": settings["runs_dir"]}
    start = (*medssl.load_backbone("random", seed=1), medssl.load_data(prepared), config)
    assert medssl.fine_tune(*start, on_epoch=len, **options).folder in finished(settings)
    monkeypatch.setattr(medssl, "fine_tune", None)
    assert medssl.run_study(GRID, **settings)["status"].eq("done").all()


def test_whole_seeds_come_first(settings, monkeypatch):
    monkeypatch.setattr(medssl, "fine_tune", mock.Mock())
    medssl.run_study(GRID, **settings)
    assert [call.kwargs["seed"] for call in medssl.fine_tune.call_args_list] == [0, 0, 1, 1]


def test_a_study_over_k_labels_of_each_class(settings):
    medssl.run_study({"labels_per_class": [2, 4]}, **settings)
    configs = [json.loads((run / "config.json").read_text()) for run in finished(settings)]
    assert [config["n_train"] for config in configs] == [4, 8]
    assert ["_k2_" in run.name for run in finished(settings)] == [True, False]


def test_what_fails_is_listed_and_stops_nothing(settings, monkeypatch):
    monkeypatch.setitem(medssl.CHECKPOINTS, "gone", medssl.Checkpoint(path="gone.pth"))
    table = medssl.run_study({"method": ["gone", "random"]}, **settings)
    assert table["status"].tolist() == ["failed", "done"]
    assert "gone.pth" in table["error"][0]


def test_a_changed_data_file_is_read_again(settings, tmp_path):
    settings["dataset"] = str(tmp_path / "changing.npz")
    for seed in (0, 1):
        data = medssl.demo_data(seed, n_train=8, n_val=8, n_test=8, image_size=16)
        medssl.save_data(data, settings["dataset"])
        medssl.run_study({"method": ["random"]}, **settings)
    assert len(finished(settings)) == 2


def killed_once(cells, *options):
    """Run cells; the first time that seed 1 is at hand, die half-way in the fraction 1.0."""
    flag = Path(cells[0]["runs_dir"], "killed")
    if cells[0]["seed"] == 1 and not flag.exists():
        run_cells(cells[:1], *options)
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return run_cells(cells, *options)


def always_killed(cells, *options):
    """Run cells, and die on one of them."""
    for cell in cells:
        if (cell["seed"], cell["label_fraction"]) == (0, 1.0):
            os.kill(os.getpid(), signal.SIGKILL)
    return run_cells(cells, *options)


def test_a_killed_worker_loses_no_run(settings, monkeypatch):
    monkeypatch.setattr(medssl, "_run_cells", killed_once)
    table = medssl.run_study({**GRID, "seed": [0, 1, 2]}, workers=2, **settings)
    assert Path(settings["runs_dir"], "killed").exists()
    assert table["status"].eq("done").all()
    assert len(finished(settings)) == 6


def test_a_run_that_always_kills_is_named_and_the_others_are_done(settings, monkeypatch):
    monkeypatch.setattr(medssl, "_run_cells", always_killed)
    table = medssl.run_study({**GRID, "seed": [0, 1, 2]}, workers=2, **settings)
    failed = table[table["status"] != "done"]
    assert failed[["label_fraction", "seed"]].values.tolist() == [[1.0, 0.0]]
    assert failed["error"].str.contains("ended its worker").all()
    assert len(finished(settings)) == 5


def test_a_checkpoint_of_ones_own_travels_to_the_workers(settings, tmp_path, monkeypatch):
    torch.save(medssl.load_backbone("random")[0].state_dict(), tmp_path / "mine.pth")
    entry = medssl.Checkpoint(path=str(tmp_path / "mine.pth"))
    monkeypatch.setitem(medssl.CHECKPOINTS, "mine", entry)
    table = medssl.run_study({"method": ["mine"]}, workers=2, **settings)
    assert table["status"].tolist() == ["done"], table["error"][0]


def test_two_studies_at_once_do_no_run_twice(settings):
    arguments = json.dumps({"grid": {**GRID, "seed": [0, 1, 2]}, **settings})
    command = [sys.executable, "-c", "from test_study import counted_study as c; c()", arguments]
    options = {"cwd": Path(__file__).parent, "stdout": subprocess.PIPE, "text": True}
    studies = [subprocess.Popen(command, **options) for _ in range(2)]
    trained = [int(study.communicate()[0].split()[-1]) for study in studies]
    assert sum(trained) == len(finished(settings)) == 6


def counted_study():
    """Run a study (the settings are the last argument) and print how many runs were trained."""
    medssl._fit_linear = mock.Mock(wraps=medssl._fit_linear)
    medssl.run_study(**json.loads(sys.argv[-1]))
    print(medssl._fit_linear.call_count)


def test_a_study_on_a_dask_cluster(settings):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(protocol="tcp", **options) as cluster:
        with distributed.Client(cluster) as client:
            executor = client.get_executor(pure=False)
            table = medssl.run_study(GRID, executor=executor, **settings)
            assert table["status"].eq("done").all(), table["error"].max()
    assert len(finished(settings)) == 4
