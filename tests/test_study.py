"""Studies: a grid becomes run folders, whatever dies, fails or happens at once."""

import functools
import gc
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import (
    BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor,
)
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import tiny_study
from tiny_study import TINY, notes

import medssl_utils as medssl

HERE = Path(__file__).resolve().parent
GRID = {"method": ["random", "SparK"], "label_fraction": [0.5, 1.0], "seed": [0, 1]}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    tiny_study.install(monkeypatch.setattr)
    monkeypatch.setattr(medssl, "_run_cell", tiny_study.run_cell)
    monkeypatch.setattr(medssl, "_time_steps", tiny_study.time_steps)


@pytest.fixture
def log(tmp_path):
    """Where the toys find their markers and leave their notes."""
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def study(log, grid=GRID, progress="none", executor=None, workers=0, **settings):
    """Run a tiny study."""
    settings = {k: v for k, v in TINY.items() if k not in (grid or ())} | settings
    return medssl.run_study(grid, executor=executor, workers=workers, progress=progress,
                            runs_dir=log.parent / "runs", data_dir=log, **settings)


def plan(log, grid=GRID, **settings):
    return medssl.plan_study(grid, runs_dir=log.parent / "runs", data_dir=log, **TINY | settings)


def mark(log, kind, method, seed):
    (log / f"{kind}_{method}_s{seed}").touch()


def times_done(log) -> set[int]:
    """How often an epoch of a cell was brought to its end, over all of them."""
    return set(Counter(notes(log, "epochs")).values())


# --- a grid becomes run folders ----------------------------------------------------------------


def test_every_combination_is_run_once(log):
    table = study(log)
    assert list(table["status"]) == ["done"] * 8 and list(table["error"]) == [""] * 8
    assert len(notes(log, "epochs")) == 8 * 2 and times_done(log) == {1}
    assert all((folder / "metrics.json").exists() for folder in table["folder"])
    assert len(medssl.load_runs(log.parent / "runs")) == 8


def test_whole_seeds_come_first(log):
    assert list(plan(log)["seed"]) == [0] * 4 + [1] * 4


def test_what_is_done_is_not_done_again(log):
    first = study(log)
    before = [(folder / "metrics.json").stat().st_mtime_ns for folder in first["folder"]]
    again = study(log, {**GRID, "seed": [0, 1, 2]})
    assert [(f / "metrics.json").stat().st_mtime_ns for f in first["folder"]] == before
    assert len(again) == 12 and times_done(log) == {1}


def test_data_are_loaded_once_for_all_cells(log):
    study(log)
    assert notes(log, "loaded") == [f"{os.getpid()} toy"]


def test_data_are_hashed_and_checked_once_for_all_cells(log, monkeypatch):
    """Half a second for COVID-CT, where a run on a GPU takes five."""
    calls, check, whole = [], medssl.check_splits, medssl.Split.fingerprint
    monkeypatch.setattr(medssl, "check_splits", lambda data: calls.append("check") or check(data))
    monkeypatch.setattr(medssl.Split, "fingerprint", property(
        lambda split: calls.append("hash") or whole.fget(split)))
    table = study(log)
    assert sorted(calls) == ["check"] + ["hash"] * 4  # train, val, and test for itself, too
    alone = medssl.fine_tune(*tiny_study.load_backbone("SparK"), tiny_study.make_toy(),
                             medssl.FineTuneConfig.named("demo", **{
                                 k: v for k, v in TINY.items() if k != "dataset"}),
                             progress="none", runs_dir=log.parent / "alone", study="study")
    assert alone.folder.name in {folder.name for folder in table["folder"]}
    assert sorted(calls) == ["check"] * 2 + ["hash"] * 8


def test_the_plan_says_that_data_are_not_fit_for_training(log, monkeypatch):
    def spoilt(*args, **options):
        data = tiny_study.load_data(*args, **options)
        data.test.images[0] = data.train.images[0]
        return data

    monkeypatch.setattr(medssl, "load_data", spoilt)
    assert "toy is not fit for training" in plan(log, {"seed": [0]})["error"][0]


def test_data_that_changed_between_two_studies_are_noticed(log, monkeypatch):
    old = study(log, {"seed": [0]})

    def changed(*args, **options):
        data = tiny_study.load_data(*args, **options)
        data.train.images[0, 0, 0] += 1
        return data

    monkeypatch.setattr(medssl, "load_data", changed)
    assert list(study(log, {"seed": [0]})["folder"]) != list(old["folder"])


def test_weights_are_kept_on_request_only(log):
    without, kept = study(log, {"seed": [0]}), study(log, {"seed": [1]}, keep_best=True)
    assert not (without["folder"][0] / "best.safetensors").exists()
    assert (kept["folder"][0] / "best.safetensors").exists()


def test_label_subsets_are_kept_on_request(log):
    study(log, GRID)
    folder = log.parent / "runs" / "study" / "subsets"
    assert not folder.exists()
    table = study(log, GRID, keep_subsets=True)  # of runs that were done before, too
    kept = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert sorted((k["label_fraction"], k["seed"], k["n"]) for k in kept) == [
        (0.5, 0, 12), (0.5, 1, 12), (1.0, 0, 24), (1.0, 1, 24)]
    used = {medssl.load_run(run).config["subset_fingerprint"] for run in table["folder"]}
    assert {k["ids_sha256"] for k in kept} == used
    assert {hashlib.sha256("\n".join(k["ids"]).encode()).hexdigest() for k in kept} == used
    assert len(medssl.load_runs(folder.parent)) == 8


def test_a_field_of_the_recipe_can_be_varied(log):
    table = study(log, {"lr": [1e-3, 1e-2]})
    assert [medssl.load_run(f).config["lr"] for f in table["folder"]] == [1e-3, 1e-2]


def test_however_a_value_is_written_it_names_one_run(log):
    same = study(log, {"label_fraction": [1, 1.0, np.float64(1)], "seed": np.arange(2)})
    assert list(same["status"]) == ["done"] * 2
    assert list(study(log, {"seed": (0, 1)})["folder"]) == list(same["folder"])
    assert len(notes(log, "epochs")) == 2 * 2


def test_an_earlier_study_s_images_do_not_stay_in_memory(log, monkeypatch):
    loaded = []

    def remembered(*args, **options):
        data = tiny_study.load_data(*args, **options)
        loaded.append(weakref.ref(data))
        return data

    monkeypatch.setattr(medssl, "load_data", remembered)
    for _ in range(3):
        study(log, {"seed": [0]})
    gc.collect()
    assert [data() is None for data in loaded] == [True, True, False]


# --- the plan ----------------------------------------------------------------------------------


def test_the_plan_tells_done_from_unfinished_from_to_do(log):
    done, begun = study(log, {"seed": [0, 1]})["folder"]
    (begun / "metrics.json").unlink()
    table = plan(log, {"seed": [0, 1, 2]})
    assert list(table["status"]) == ["done", "unfinished", "to do"]
    assert table["seconds"][0] == 0 and table["seconds"][1] == table["seconds"][2] > 0
    assert list(table["folder"]) == [done, begun, None]
    assert table.attrs["summary"].startswith("Runs: 3 in all, 1 done, 1 unfinished, 1 to do.")


def test_the_plan_says_where_its_rate_comes_from(log):
    assert "rate of timed steps" in plan(log).attrs["summary"]
    study(log, {"seed": [0]})
    assert "rate of 1 finished" in plan(log, {"seed": [0, 1]}).attrs["summary"]


def test_the_seconds_follow_the_size_of_the_subset(log):
    table = plan(log, {"label_fraction": [0.25, 1.0]}, epochs=50)
    assert list(table["n_train"]) == [6, 24]
    assert table["seconds"][1] > 2 * table["seconds"][0]


def test_features_of_a_linear_evaluation_are_counted_once_for_all_fractions_and_seeds(log):
    grid = {"method": ["SparK", "BYOL"], "label_fraction": [0.25, 1.0], "seed": [0, 1, 2]}
    table = plan(log, grid, recipe="linear")
    assert table.groupby("method")["images"].sum().between(24 + 12 + 16, 24 + 12 + 16 + 6).all()


def test_features_that_a_finished_run_computed_are_not_charged_to_those_that_are_left(log):
    """The first run of a linear evaluation costs more than all others together."""
    grid = {"seed": [0, 1, 2, 3]}
    before = plan(log, grid, recipe="linear", epochs=50)
    assert list(before["images"]) == [24 + 12 + 16, 1, 1, 1]
    study(log, {"seed": [0]}, recipe="linear", epochs=50)
    after = plan(log, grid, recipe="linear", epochs=50)
    assert list(after["images"]) == [24 + 12 + 16, 24 + 12 + 16, 1, 1]  # a new call, once more


def test_resume_files_of_several_learning_rates_are_in_the_gigabytes(log):
    assert "up to 0.8 GB more" in plan(log).attrs["summary"]
    summary = plan(log, lr_candidates=(1e-4, 1e-3, 1e-2)).attrs["summary"]
    assert "up to 1.5 GB more for each run" in summary  # a file a rate, and one being renewed


def test_the_plan_names_a_share_of_labels_that_cannot_be(log):
    table = plan(log, {"label_fraction": [0.01, 1.5]})
    assert table["error"][0] == "" and table["n_train"][0] > 0  # an image of each class at least
    assert "label_fraction is 1.5; it must be above 0 and at most 1" in table["error"][1]


def test_a_summary_says_once_and_in_full_why_runs_cannot(log):
    summary = plan(log, {"method": ["Spark2"], "seed": [0, 1]}).attrs["summary"]
    assert summary.startswith("Runs: 2 in all, 2 can't run.")
    assert summary.count("\nCan't run: ValueError: method 'Spark2' is not known.") == 1
    assert summary.endswith("SparK, random, ImageNet.")


def test_a_damaged_result_is_named_and_stops_no_other_run(log):
    damaged, = study(log, {"seed": [0]})["folder"]
    text = (damaged / "metrics.json").read_text()
    (damaged / "metrics.json").write_text(text[:len(text) // 2])
    table = study(log, {"seed": [0, 1]})
    assert list(table["status"]) == ["unfinished", "done"]
    assert "metrics.json is damaged" in table["error"][0] and damaged.name in table["error"][0]
    with pytest.raises(ValueError, match=f"Delete the folder {damaged.name}"):
        medssl.load_runs(log.parent / "runs")


def test_kept_weights_are_in_the_gigabytes(log):
    lean, rich = plan(log)["gigabytes"].sum(), plan(log, keep_best=True)["gigabytes"].sum()
    assert rich - lean == pytest.approx(8 * 0.0944)


def test_planning_writes_nothing(log):
    plan(log)
    assert not (log.parent / "runs").exists()


def test_running_prints_the_plan_first_and_then_a_line_a_run(log, capsys):
    study(log, {"seed": [0, 1]}, progress="log")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Runs: 2 in all, 2 to do." and lines[1].startswith("Left: 0:00:0")
    assert lines[2].startswith("1 of 2, about") and lines[2].endswith("left: 0: done")


def test_one_bar_shows_what_is_left(log, capsys):
    study(log, {"seed": [0, 1]}, progress="bar")
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last and "runs=2/2" in last and "failed=0" in last


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("grid, settings, words", [
    ({"sead": [0]}, {}, "Setting 'sead' is not known. Did you mean 'seed'"),
    ({"seed": [0]}, {"epoch": 3}, "Did you mean 'epochs'"),
    ({"method": "SparK"}, {}, "The grid's method is 'SparK'; give a list"),
    ({"seed": []}, {}, "The grid's seed is"),
    ({"seed": [0, "1"]}, {}, "seed is '1'; give one int, such as 0"),
    ({"method": ["random"]}, {"seed": [0, 1]}, "Several values belong in the grid"),
    ({"seed": [0]}, {"study": 2024}, "study is 2024; give one str, such as 'study'"),
    (None, {}, "The grid is None; give a dict of lists"),
    ({"seed": [0]}, {"workers": -1}, "workers is -1; give a number of processes"),
    ({"seed": [0]}, {"executor": "cluster"}, "The executor is 'cluster'; give one of"),
    ({"seed": [0]}, {"executor": Executor(), "workers": 4}, "An executor and workers=4: give one"),
])
def test_a_grid_that_cannot_be_meant_is_refused(log, grid, settings, words):
    with pytest.raises(ValueError, match=words):
        study(log, grid, **settings)


def test_threads_are_refused(log):
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="Threads share"):
        study(log, executor=pool)


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="no forked processes here")
def test_forked_processes_are_refused(log):
    """They hang for ever once PyTorch has computed in the parent."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool, pytest.raises(
            ValueError, match='get_context."spawn".'):
        study(log, executor=pool)


def test_two_runs_at_once_in_one_process_are_refused(log):
    with medssl._one_at_a_time:
        table = study(log, {"seed": [0]})
    assert table["status"][0] == "to do" and "threads_per_worker=1" in table["error"][0]


# --- what fails is listed and stops nothing ----------------------------------------------------


def test_a_bad_cell_is_listed_with_its_reason(log):
    mark(log, "fail", "SparK", 1)
    table = study(log, {"method": ["Spark2", "SparK"], "seed": [0, 1]})
    assert list(table["status"]) == ["to do", "done", "to do", "unfinished"]
    assert "Did you mean 'SparK'" in table["error"][0]
    assert table["error"][3] == "TrainingError: the loss went up the wall"


def test_a_data_set_that_is_not_there_is_asked_for_once(log):
    table = study(log, {"dataset": ["nowhere", "toy"], "seed": [0, 1]})
    assert list(table["status"]) == ["to do", "to do", "done", "done"]
    assert table["error"][1] == "FileNotFoundError: no data set nowhere here"
    assert notes(log, "loaded") == [f"{os.getpid()} {name}" for name in ("nowhere", "toy")]


def test_a_setting_in_the_grid_and_apart_from_it_is_refused(log):
    with pytest.raises(ValueError, match="seed: set in the grid and apart"):
        plan(log, {"seed": [0]}, seed=1)


def test_what_failed_is_done_by_the_next_call(log):
    mark(log, "fail", "SparK", 0)
    assert list(study(log, {"seed": [0, 1]})["status"]) == ["unfinished", "done"]
    assert list(study(log, {"seed": [0, 1]})["status"]) == ["done", "done"]
    assert times_done(log) == {1}


def test_a_run_of_another_process_is_looked_at_again_at_the_end(log, monkeypatch):
    order = []

    def busy_once(cell, moment):
        order.append(cell["seed"])
        return None if order == [0] else tiny_study.run_cell(cell)

    monkeypatch.setattr(medssl, "_run_cell", busy_once)
    assert list(study(log, {"seed": [0, 1]})["status"]) == ["done", "done"]
    assert order == [0, 1, 0]


# --- processes that die ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_local_worker_is_replaced_and_its_run_resumed(log):
    """T8 on one machine: the run goes on where its worker died, the others are not disturbed."""
    mark(log, "kill", "SparK", 0)
    table = study(log, workers=2)
    assert list(table["status"]) == ["done"] * 8 and list(table["error"]) == [""] * 8
    assert len(notes(log, "epochs")) == 8 * 2 and times_done(log) == {1}


@pytest.mark.slow
def test_a_cell_that_kills_its_workers_is_given_up(log, monkeypatch):
    monkeypatch.setattr(medssl, "ATTEMPTS", 2)
    mark(log, "kill", "SparK", "0!")
    table = study(log, {"seed": [0]}, workers=2)
    assert list(table["status"]) == ["unfinished"]
    assert table["error"][0] == (
        "The worker died 2 times on this cell: killed, out of memory, or started by a script that "
        'lacks `if __name__ == "__main__":`?')


@pytest.mark.slow
def test_each_gpu_gets_a_worker_of_its_own(log, monkeypatch):
    """Two GPUs are only said to be there: who is given which is seen, not that CUDA takes it."""
    monkeypatch.setattr(medssl.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(medssl, "_run_cell", tiny_study.run_cell_on_cpu)
    assert list(study(log)["status"]) == ["done"] * 8
    given = {tuple(line.split()) for line in notes(log, "devices")}  # (process, device)
    assert len(given) == 2 and {device for _, device in given} == {"cuda:0", "cuda:1"}
    assert str(os.getpid()) not in dict(given)


@pytest.mark.slow
def test_with_several_gpus_the_steps_of_a_plan_are_timed_in_a_process_that_ends(log, monkeypatch):
    """This one would keep a part of the first GPU while a worker trains there."""
    monkeypatch.setattr(medssl.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(medssl, "_time_steps", tiny_study.time_steps_and_say_where)
    assert plan(log, {"seed": [0]})["seconds"][0] > 0
    where, = notes(log, "timed")
    assert int(where) != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(int(where), 0)


def test_timed_steps_leave_the_memory_of_a_gpu_to_the_workers(log, monkeypatch):
    emptied = []
    monkeypatch.setattr(medssl.torch.cuda, "empty_cache", lambda: emptied.append(1))
    plan(log, {"seed": [0]})
    assert emptied


def test_a_study_stopped_between_two_runs_leaves_no_worker(log, monkeypatch):
    """The error is kept, as a notebook does, and with it whatever the study had begun."""
    ended = []

    def work_off(cells, free):
        try:
            yield 0, ""
        finally:
            ended.append("workers")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(medssl, "_work_off", work_off)
    monkeypatch.setattr(medssl.tqdm, "set_postfix", stop)
    monkeypatch.setattr(medssl.tqdm, "close", lambda bar: ended.append("bar"))
    with pytest.raises(KeyboardInterrupt) as kept:
        study(log, {"seed": [0, 1]})
    assert ended == ["workers", "bar"] and kept.value.__traceback__ is not None


def test_more_workers_than_gpus_share_them(monkeypatch):
    monkeypatch.setattr(medssl.torch.cuda, "device_count", lambda: 2)
    workers = medssl._workers(None, 3, {"auto"})
    assert [w["device"] for w in workers] == ["cuda:0", "cuda:1", "cuda:0"]


def test_a_device_that_was_asked_for_is_kept(monkeypatch):
    given = []
    monkeypatch.setattr(medssl, "_run_cell", lambda cell, _: given.append(cell["device"]) or "")
    list(medssl._work_off([{"device": "cuda:7"}, {"device": "auto"}],
                          [{"pool": None, "device": "cuda:0"}]))
    assert given == ["cuda:7", "cuda:0"]


@pytest.mark.parametrize("asked, given", [
    ("auto", ["cuda:0", "cuda:1"]), ("cuda", ["cuda:0", "cuda:1"]), ("cuda:1", [""]), ("cpu", [""]),
])
def test_one_worker_a_gpu_unless_another_device_was_asked_for(monkeypatch, asked, given):
    """Else "cuda" would put all of them on the first GPU."""
    monkeypatch.setattr(medssl.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(medssl, "_run_cell", lambda cell, _: ran.append(cell["device"]) or "")
    ran, workers = [], medssl._workers(None, 0, {asked})
    assert [worker["device"] for worker in workers] == given
    here = [{"pool": None, "device": worker["device"]} for worker in workers]
    list(medssl._work_off([{"device": asked}], here))
    assert ran == [given[-1] or asked]


def test_a_cluster_without_gpus_does_not_pass_for_one(monkeypatch):
    """Of a given executor nothing is known: "cuda" stays, and a worker without one refuses."""
    monkeypatch.setattr(medssl, "_run_cell", lambda cell, _: cell["device"])
    worker = {"pool": Remembering(), "device": ""}
    assert list(medssl._work_off([{"device": "cuda"}], [worker])) == [(0, "cuda")]


def test_a_result_that_lies_elsewhere_is_not_called_done(log, monkeypatch):
    """Workers of another machine wrote into a folder of their own."""
    monkeypatch.setattr(medssl, "_run_cell", lambda cell, _: "")
    table = study(log, {"seed": [0]})
    assert table["status"][0] == "to do" and "must see the same runs_dir" in table["error"][0]


@pytest.mark.slow
def test_a_worker_has_its_share_of_the_cores_and_so_have_its_kernels():
    threads = max(1, medssl.torch.get_num_threads() // 2)
    worker, _ = medssl._workers(None, 2, {"auto"})
    with worker["pool"] as pool:
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == str(threads)


@pytest.mark.slow
def test_a_worker_that_dies_while_idle_is_replaced(log):
    workers = medssl._workers(None, 2, {"cpu"})[:1]
    os.kill(workers[0]["pool"].submit(os.getpid).result(), signal.SIGKILL)
    with pytest.raises(BrokenExecutor):
        while workers[0]["pool"].submit(os.getpid).result():
            time.sleep(0.01)
    cells = medssl._cells({"seed": [0]}, {**TINY, "runs_dir": log.parent / "runs", "data_dir": log})
    assert list(medssl._work_off(cells, workers)) == [(0, "")]


STUDY_TO_STOP = """
import sys
sys.path[:0] = [{here!r}, {root!r}]
import medssl_utils as medssl, tiny_study, test_study
if __name__ == "__main__":
    tiny_study.install()
    medssl._run_cell = tiny_study.run_cell
    test_study.study(medssl.Path(sys.argv[1]), {{"seed": [0]}}, workers=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no signal of this kind there")
def test_an_interrupted_study_leaves_no_worker_that_trains_on(log):
    """Also where the signal reaches the study's process alone, not its workers."""
    mark(log, "hang", "SparK", 0)
    script = log.parent / "study.py"
    script.write_text(STUDY_TO_STOP.format(here=str(HERE), root=str(HERE.parent)))
    with subprocess.Popen([sys.executable, script, log], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as run:
        while (log / "hang_SparK_s0").exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        out, errors = run.communicate(timeout=60)  # the pipes end with the last who holds them
    assert errors.count("KeyboardInterrupt") == 1 and "1 to do" in out
    assert list(study(log, {"seed": [0]})["status"]) == ["done"]
    assert len(notes(log, "epochs")) == 2 and times_done(log) == {1}


@pytest.mark.slow
def test_workers_end_with_the_study_that_was_killed():
    """Else they would hold their memory, of a GPU too, until somebody finds them."""
    script = (f"import sys, os; sys.path.insert(0, {str(HERE.parent)!r})\n"
              "import medssl_utils as medssl\n"
              "if __name__ == '__main__':\n"
              "    first, second = medssl._workers(None, 2, {'auto'})\n"
              "    print(*[w['pool'].submit(os.getpid).result() for w in (first, second)])\n"
              "    os.kill(os.getpid(), 9)\n")
    # the pipe ends with the last process that holds it
    done = subprocess.run([sys.executable, "-c", script], text=True, timeout=60,
                          stdout=subprocess.PIPE)
    assert done.returncode == -9


@pytest.mark.slow
def test_a_given_pool_that_breaks_says_what_to_do_and_loses_nothing(log):
    mark(log, "kill", "SparK", 1)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for _ in range(2):  # the second finds it broken already
            with pytest.raises(BrokenExecutor, match="Call run_study again with a new executor"):
                study(log, {"seed": [0, 1]}, executor=pool)
    assert list(plan(log, {"seed": [0, 1]})["status"]) == ["done", "unfinished"]
    study(log, {"seed": [0, 1]})
    assert len(notes(log, "epochs")) == 2 * 2 and times_done(log) == {1}


@pytest.mark.slow
def test_a_cluster_does_the_runs_of_a_killed_worker_elsewhere(log):
    """T8 on a real cluster: separate worker processes that speak TCP; one is killed."""
    from dask.distributed import Client, LocalCluster

    mark(log, "kill", "SparK", 0)
    with LocalCluster(n_workers=2, threads_per_worker=1, protocol="tcp://", processes=True,
                      dashboard_address=None) as cluster, Client(cluster) as client:
        workers = client.run(os.getpid)
        assert len(set(workers.values()) - {os.getpid()}) == 2
        assert all(address.startswith("tcp://") for address in workers)
        table = study(log, executor=client.get_executor(pure=False))
        assert set(client.run(os.getpid).values()) != set(workers.values())  # one was killed
    assert list(table["status"]) == ["done"] * 8
    assert len(notes(log, "epochs")) == 8 * 2 and times_done(log) == {1}


SECOND = """
import sys
sys.path[:0] = [{here!r}, {root!r}]
import medssl_utils as medssl, tiny_study, test_study
tiny_study.install()
medssl._run_cell = tiny_study.run_cell
print("ready", flush=True)
sys.stdin.readline()
table = test_study.study(medssl.Path(sys.argv[1]), test_study.SIXTEEN)
assert list(table["status"]) == ["done"] * 16, table
"""
SIXTEEN = {**GRID, "seed": [0, 1, 2, 3]}


@pytest.mark.slow
def test_two_studies_at_once_do_nothing_twice_and_lose_no_row(log):
    """T4: sixteen runs, written by two studies in two processes that start together."""
    script = SECOND.format(here=str(HERE), root=str(HERE.parent))
    other = subprocess.Popen([sys.executable, "-c", script, str(log)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("go\n")
    other.stdin.flush()
    table = study(log, SIXTEEN)
    assert other.wait() == 0
    assert list(table["status"]) == ["done"] * 16
    assert len(notes(log, "epochs")) == 16 * 2 and times_done(log) == {1}
    runs = medssl.load_runs(log.parent / "runs")
    assert len(runs) == 16 and set(runs["status"]) == {"done"}


# --- papermill ---------------------------------------------------------------------------------

# A stand-in for notebook 03 with its parameters.
CELL = """
import os, sys
sys.path[:0] = [{here!r}, {root!r}]
import medssl_utils as medssl, tiny_study
cell = dict(method=method, weights=weights, dataset=dataset, recipe=recipe, data_dir=data_dir,
            label_fraction=label_fraction, seed=seed, study=study, runs_dir=runs_dir, device=device,
            checkpoints_dir=checkpoints_dir, unofficial=unofficial, keep_best=keep_best,
            image_size=image_size, epochs=epochs, batch_size=batch_size, token=0, notebook="")
tiny_study.RUNNING.update(cell)
tiny_study.install()
"""
CELL_THAT_TRAINS = """
config, data = medssl._cell_data(cell)
medssl.fine_tune(*medssl._cell_backbone(cell), data, config, label_fraction=label_fraction,
                 seed=seed, study=study, runs_dir=runs_dir, keep_best=keep_best)
"""


@pytest.fixture
def notebook(tmp_path):
    names = {*medssl.ASKED, *medssl.WHERE, "image_size", "epochs", "batch_size"}
    names -= {"notebook", "keep_subsets"}
    parameters = nbformat.v4.new_code_cell("\n".join(f"{n} = None" for n in names))
    parameters.metadata["tags"] = ["parameters"]
    code = [CELL.format(here=str(HERE), root=str(HERE.parent)), CELL_THAT_TRAINS]
    cells = [parameters, *map(nbformat.v4.new_code_cell, code)]
    made = nbformat.v4.new_notebook(cells=cells, metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    nbformat.write(made, tmp_path / "03_tiny.ipynb")
    return tmp_path / "03_tiny.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("what, kind", [
    ("kill", "DeadKernelError"), ("interrupt", "KeyboardInterrupt"), ("hang", "CellTimeoutError"),
])
def test_a_stopped_kernel_leaves_an_unfinished_run_that_the_next_call_ends(
        log, notebook, monkeypatch, what, kind):
    """T5, with a real kernel that is stopped in its second epoch, by papermill where it hangs."""
    mark(log, what, "SparK", 0)
    with monkeypatch.context() as patch:
        patch.setattr(papermill, "execute_notebook", functools.partial(
            papermill.execute_notebook,
            timeout_func=lambda cell: 10 if cell.source == CELL_THAT_TRAINS else None))
        table = study(log, {"seed": [0]}, notebook=notebook)
    assert list(table["status"]) == ["unfinished"]
    assert table["error"][0].startswith(kind)
    assert list(medssl.load_runs(log.parent / "runs")["status"]) == ["unfinished"]
    again = study(log, {"seed": [0]}, notebook=notebook)
    assert list(again["status"]) == ["done"] and list(again["error"]) == [""]
    assert len(notes(log, "epochs")) == 2 and times_done(log) == {1}
    assert (again["folder"][0] / "notebook.ipynb").exists()


def test_only_the_run_folder_says_that_a_notebook_is_done(log, notebook, monkeypatch):
    """T5: the notebook ended well and yet left no result."""
    monkeypatch.setattr(papermill, "execute_notebook", lambda *args, **options: None)
    table = study(log, {"seed": [0]}, notebook=notebook)
    assert list(table["status"]) == ["to do"]
    assert table["error"][0].startswith("FileNotFoundError")


def test_a_run_that_another_process_writes_starts_no_kernel(log, notebook):
    cell, = medssl._cells({"seed": [0]}, {**TINY, "runs_dir": log.parent / "runs", "data_dir": log,
                                          "notebook": notebook})
    folder = medssl._cell_folder(cell)
    folder.mkdir(parents=True)
    with medssl._sole_writer(folder):
        assert medssl._run_cell(cell) is None
    assert not (folder / "notebook.ipynb").exists()


def test_a_parameter_that_the_notebook_lacks_is_named(log, notebook):
    table = study(log, {"lr": [0.1]}, notebook=notebook)
    assert "Parameter of 03_tiny.ipynb 'lr' is not known" in table["error"][0]


def test_a_folder_is_named_as_seen_from_here_and_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "phantom"):  # a data set's name is no folder, even where there is one
        (tmp_path / name).mkdir()
    cells = medssl._cells({"dataset": ["mine", "phantom", "not there"]}, {})
    assert [cell["dataset"] for cell in cells] == [str(tmp_path / "mine"), "not there", "phantom"]
    cell, = medssl._cells({"runs_dir": ["mine"], "dataset": ["mine"]}, {"data_dir": "here"})
    assert [cell[n] for n in ("runs_dir", "dataset", "data_dir", "checkpoints_dir")] == [
        str(tmp_path / n) for n in ("mine", "mine", "here", "checkpoints")]


class Remembering(Executor):
    """Answers the same call with the result of the first one, as Dask's executor does."""

    def __init__(self):
        self.results = {}

    def submit(self, fn, *args):
        future, key = Future(), repr(args)
        if key not in self.results:
            self.results[key] = fn(*args)
        future.set_result(self.results[key])
        return future


class Later(Executor):
    """Answers from a thread, some time after it was asked."""

    def submit(self, fn, *args):
        future = Future()
        threading.Timer(0.2, lambda: future.set_result("")).start()
        return future


def test_a_study_can_be_interrupted_while_it_waits_on_windows_too(monkeypatch):
    """There the stop button of a notebook does not reach a thread that waits for a lock."""
    class Windows(queue.SimpleQueue):
        def get(self):
            assert not self.empty(), "waits for a lock, deaf to the stop button"
            return super().get()

    monkeypatch.setattr(medssl.queue, "SimpleQueue", Windows)
    worker = {"pool": Later(), "device": ""}
    assert list(medssl._work_off([{"device": "cpu"}] * 2, [worker])) == [(0, ""), (1, "")]


def test_a_run_that_was_busy_is_asked_for_anew_of_an_executor_that_remembers(monkeypatch):
    answers = iter([None, None, ""])  # twice another process is at it
    monkeypatch.setattr(medssl, "_run_cell", lambda *_: next(answers))
    monkeypatch.setattr(medssl.time, "sleep", lambda _: calls.append(1) or len(calls) < 9 or 1 / 0)
    calls = []
    worker = {"pool": Remembering(), "device": "cpu"}
    assert list(medssl._work_off([{"device": "cpu"}], [worker])) == [(0, "")]


# --- bench/study.py ----------------------------------------------------------------------------


def test_the_bench_measures_the_cpu_one_gpu_and_all_of_them(monkeypatch):
    import study as bench

    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bench, "measure_rate", lambda devices: devices)
    assert bench.measure_rates() == {
        "the CPU": ["cpu"], "one GPU": ["cuda:0"],
        "each of 2 GPUs at once": ["cuda:0", "cuda:1"]}


@pytest.mark.slow
def test_the_bench_times_a_device_in_a_process_of_its_own():
    import study as bench

    assert bench.measure_rate(["cpu"], image_size=16) > 0  # small for speed
