"""Recipes, the step, the run folder, resuming and linear evaluation, on a small ResNet."""

import dataclasses
import errno
import functools
import hashlib
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import filelock
import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

import medssl_utils as medssl
from medssl_utils import FineTuneConfig, TrainingError, fine_tune

torch.manual_seed(0)
BACKBONE = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])  # small
BACKBONE.fc = nn.Identity()
FACTS = {"method": "random", "name": "random", "weights": "random", "stand_in": "", "demo": True}
FACTS |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
REPORT = SimpleNamespace(**FACTS, fingerprint=medssl._fingerprint(BACKBONE.state_dict()))
DATA = medssl.demo_data(n_train=24, n_val=12, n_test=16)  # few for speed
QUICK = FineTuneConfig.named("demo", epochs=3, batch_size=8)
LINEAR = FineTuneConfig.named("linear", "phantom")


def run_quickly(folder, config=QUICK, data=DATA, report=REPORT, **options):
    options = {"on_epoch": len, "device": "cpu", "runs_dir": folder, **options}
    return fine_tune(BACKBONE, report, data, config, **options)


@pytest.fixture
def run(tmp_path):
    return functools.partial(run_quickly, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_quickly(tmp_path_factory.mktemp("whole"))


def weights(run):
    return load_file(run.folder / "best.safetensors")


def same_bits(one, other):
    """Whether two dictionaries hold the same tensors."""
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def start_training(config, data=DATA):
    """Return what `train_one_epoch` takes, but for epoch and seed."""
    model = medssl.add_head(BACKBONE, 2, 0).to(memory_format=torch.channels_last)
    images, labels = torch.as_tensor(data.train.images), torch.as_tensor(data.train.labels)
    preprocessing = medssl.preprocessing_for(config, data, REPORT)
    return model, images, labels, medssl.make_optimizer(model, config), config, preprocessing


def test_paper_recipe_has_the_phases_of_the_authors_notebooks():
    config, model = FineTuneConfig.named("paper"), torchvision.models.resnet50(num_classes=2)
    phases = []
    for epoch in (0, 9, 10, 11, 69):
        rates = medssl.set_phase(model, config, epoch)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        phases.append((count, model.training, *rates))
    first, whole = 53_120 + 2 * 2049, 23_508_032 + 2 * 2049  # BatchNorm's and the head's, or all
    assert phases[:3] == [(n, True, 1e-4, 1e-4) for n in (first, first, whole)]
    assert phases[3:] == [(whole, True, pytest.approx(2e-5), pytest.approx(2e-5))] * 2


def cosine(epoch, step):
    passed = epoch * 3 + step  # of 12 steps, the first is the warm-up
    factor = 1.0 if passed == 0 else 0.5 * (1 + math.cos(math.pi * (passed - 1) / 11))
    return [0.0 if epoch < 2 else 1e-4 * factor, 1e-3 * factor]


CHANGES = {"epochs": 4, "freeze_epochs": 2, "batch_size": 8, "augment": "none"}
CHANGES |= {"precision": "fp32", "normalise": "dataset"}
LOOPS = {  # the recipe, its optimizer, rates of backbone and head, whether a part trains
    "paper": (
        FineTuneConfig.named("paper", "phantom", epochs=3, freeze_epochs=1, batch_size=8),
        functools.partial(torch.optim.Adam, weight_decay=5e-4, fused=True),
        lambda epoch, step: [2e-5, 2e-5] if epoch == 2 else [1e-4, 1e-4],
        lambda epoch, name: epoch >= 1 or "bn" in name or "downsample.1" in name or "fc" in name,
    ),
    "recommended": (
        FineTuneConfig.named("recommended", "phantom", **CHANGES),
        functools.partial(torch.optim.AdamW, weight_decay=1e-4, fused=True),
        cosine,
        lambda epoch, name: epoch >= 2 or "fc" in name,
    ),
}


@pytest.mark.parametrize("recipe", LOOPS)
def test_a_recipe_gives_the_weights_of_a_plain_loop_across_its_boundaries(recipe):
    config, optimizer, rates, trains = LOOPS[recipe]
    work = start_training(config)
    plain = medssl.add_head(BACKBONE, 2, 0).to(memory_format=torch.channels_last)
    adam = optimizer([{"params": list(plain.parameters())[:-2]}, {"params": plain.fc.parameters()}])
    x = torch.as_tensor(DATA.train.images)[:, None].repeat(1, 3, 1, 1) / 255
    x = (x - DATA.mean[0]) / DATA.std[0]
    labels = torch.as_tensor(DATA.train.labels)
    for epoch in range(config.epochs):
        medssl.train_one_epoch(*work, epoch=epoch, seed=5)
        plain.train(trains(epoch, "bn1.weight"))
        for name, parameter in plain.named_parameters():
            parameter.requires_grad = trains(epoch, name)
        digest = hashlib.sha256(repr((5, epoch)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(len(labels), generator=generator)
        draws = torch.rand(len(labels), 6, generator=generator)
        for step, index in enumerate(order.split(config.batch_size)):
            for group, rate in zip(adam.param_groups, rates(epoch, step), strict=True):
                group["lr"] = rate
            batch = x[index]
            if config.augment == "flip_ud":
                flip = draws[index, 0] < 0.5
                batch[flip] = batch[flip].flip(2)
            adam.zero_grad()
            batch = batch.contiguous(memory_format=torch.channels_last)
            F.cross_entropy(plain(batch), labels[index]).backward()
            adam.step()
    assert same_bits(work[0].state_dict(), plain.state_dict())


def test_zero_and_numbers_of_other_types_leave_a_recipe_as_it_is():
    changed = FineTuneConfig(lr=np.float64(1), epochs=np.int64(3))
    assert changed == FineTuneConfig(lr=1, epochs=3)
    changed = FineTuneConfig.named("paper", epochs=0, image_size=0)
    assert changed == FineTuneConfig.named("paper", "covid_ct")
    organ = FineTuneConfig.named("paper", "organsmnist")
    assert (organ.augment, organ.subset_rule) == ("none", "first")


def test_fewer_epochs_or_pixels_than_the_recipes_stamp_a_run_short():
    real = dataclasses.replace(DATA, demo=False)
    report = SimpleNamespace(**{**FACTS, "demo": False}, fingerprint="0")
    for change, stamp in (({}, ""), ({"epochs": 49}, "SHORT"), ({"image_size": 32}, "SHORT")):
        settings, _ = medssl.plan_run(report, real, FineTuneConfig(**change))
        assert settings["stamp"] == stamp


def test_normalisation_is_by_channel_and_enlarging_28_to_224_repeats_each_pixel_8_by_8():
    images = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    small = medssl.preprocessing_for(FineTuneConfig(image_size=28), DATA, REPORT)(images)
    large = medssl.preprocessing_for(FineTuneConfig(image_size=224), DATA, REPORT)(images)
    assert torch.allclose(small[:, 2], (images[..., 2] / 255 - 0.3) / 0.6)
    assert torch.equal(large, small.repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert medssl.preprocessing_for(QUICK, DATA, REPORT).mean == DATA.mean


def test_augmentation_follows_its_random_numbers():
    x = torch.rand(2, 3, 10, 10)
    draws = torch.tensor([[0.4, 0.5, 0.5, 0.5, 0.5, 0.5], [0.6, 0.5, 0.5, 0.5, 1.0, 0.5]])
    flipped = medssl.augment_batch(x, "flip_ud", draws)
    assert torch.equal(flipped, torch.stack([x[0].flip(1), x[1]]))
    moved = medssl.augment_batch(x, "affine", draws)  # the second by a tenth of the side
    assert torch.allclose(moved[0], x[0], atol=1e-5)
    assert torch.allclose(moved[1, ..., :-1], x[1, ..., 1:], atol=1e-5)


def test_a_head_follows_its_seed_and_leaves_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, other = (medssl.add_head(BACKBONE, 2, 7).fc.weight for _ in range(2))
    assert torch.equal(one, other) and torch.equal(torch.rand(1), expected)


def test_an_output_that_is_not_finite_has_no_score():
    network = medssl.add_head(BACKBONE, 2, 0)
    network.fc.bias.data[0] = math.nan
    prepare = medssl.preprocessing_for(QUICK, DATA, REPORT)
    with pytest.raises(TrainingError, match="diverged"):
        medssl.evaluate(network, DATA.val, prepare)


def test_a_last_batch_of_one_joins_its_neighbour():
    nine = dataclasses.replace(DATA, train=DATA.train.take(np.arange(9)))
    _, batches = medssl.train_one_epoch(*start_training(QUICK, nine), epoch=0, seed=0)
    assert [len(batch) for batch in batches] == [9]


def test_run_folder_holds_what_the_design_names(run):
    finished = run(label_fraction=0.5, seed=4)
    names = {path.name for path in finished.folder.iterdir()} - {".run.lock"}
    files = {"config.json", "history.csv", "predictions.npz", "metrics.json", "best.safetensors"}
    assert names == files and finished.stamp == "DEMO" and finished.config["n_train"] == 12
    assert re.fullmatch(r"phantom_random_demo_f0.5_s4_[0-9a-f]{8}", finished.folder.name)
    assert set(finished.metrics) >= {*medssl.SCORES, "loss", "val", "best_epoch", "seconds"}
    predictions = finished.predictions
    assert list(predictions["ids"]) == list(DATA.test.ids)
    assert predictions["val_scores"].shape == (12, 2)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(run, whole):
    assert same_bits(weights(run()), weights(whole))
    assert not same_bits(weights(run(seed=1)), weights(whole))


def test_best_epoch_is_the_best_on_validation():
    rows = [(0.8, 0.9, 0.5), (None, 0.9, 0.1), (0.9, 0.8, 0.3), (0.9, 0.8, 0.4)]
    history = [{"val_AUC": a, "val_ACC": b, "val_loss": c} for a, b, c in rows]
    assert medssl._best_epoch(history, "AUC") == 2 and medssl._best_epoch(history, "ACC") == 0
    undefined = [{**row, "val_AUC": None} for row in history]
    assert medssl._best_epoch(undefined, "AUC") == 1  # the loss decides


REFUSED = {
    "label_fraction 0": {"label_fraction": 0},
    "label_fraction is '0.5'; give a number": {"label_fraction": "0.5"},
    "labels_per_class": {"labels_per_class": 1000},
    "seed is '1'; give a number": {"seed": "1"},
    "of another model": {"report": SimpleNamespace(**FACTS, fingerprint="0")},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_work_is_refused_and_nothing_is_written(run, tmp_path, words):
    with pytest.raises(ValueError, match=words):
        run(**REFUSED[words])
    assert not list(tmp_path.iterdir())


OUT_OF_MEMORY = torch.OutOfMemoryError("Tried to allocate 20 MiB")
STOPS = {
    "Epoch 0.*train-patient.*lr": lambda x, *_: x * math.nan,
    r"batch_size \(8\) or image_size \(32\)": mock.Mock(side_effect=OUT_OF_MEMORY),
}


@pytest.mark.parametrize("words", STOPS)
def test_what_stops_training_says_what_to_do(run, monkeypatch, tmp_path, words):
    monkeypatch.setattr(medssl, "augment_batch", STOPS[words])
    with pytest.raises(TrainingError, match=words):
        run()
    assert not list(tmp_path.rglob("metrics.json"))


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault", [FULL, KeyboardInterrupt()])
def test_a_broken_save_keeps_the_older_file(fault, run, whole, monkeypatch, tmp_path):
    def broken(state, file):
        file.write(b"half a file")
        raise fault

    told = (TrainingError, KeyboardInterrupt)
    with monkeypatch.context() as patch, pytest.raises(told, match="make room|^$"):
        patch.setattr(medssl, "RESUME_SECONDS", 0.0)
        run(on_epoch=lambda history: patch.setattr(torch, "save", broken))
    (resume,) = tmp_path.glob("study/*/last.pt")
    assert len(torch.load(resume, weights_only=True)["history"]) == 1
    assert same_bits(weights(run()), weights(whole))


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import torch, test_training as t
torch.set_num_threads(1)
t.medssl.RESUME_SECONDS = 0.0
def die(state=None, file=None):
    if file:
        file.write(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)
def after_epoch(history):
    if len(history) == 2:
        torch.save = die
        t.medssl.evaluate = t.medssl.evaluate if sys.argv[4] == "in save" else lambda *_: die()
t.run_quickly(sys.argv[3], on_epoch=after_epoch)
"""


@pytest.mark.parametrize("moment", ["in an epoch", "in save"])
def test_killed_and_run_again_gives_the_same_bits(run, whole, tmp_path, moment):
    here = Path(__file__).parent
    arguments = [str(here), str(here.parent), str(tmp_path), moment]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert ended.returncode == -signal.SIGKILL and not list(tmp_path.rglob("metrics.json"))
    assert list(tmp_path.rglob("last.pt"))
    assert list(tmp_path.rglob("*.tmp")) == [] or moment == "in save"
    finished = run()
    assert same_bits(weights(finished), weights(whole))
    assert finished.history["val_loss"].equals(whole.history["val_loss"])
    assert not list(tmp_path.rglob("last.pt")) and not list(tmp_path.rglob("*.tmp"))


def test_two_processes_never_write_one_folder(run):
    folder = run().folder
    (folder / "metrics.json").unlink()
    with (
        filelock.FileLock(folder / ".run.lock"),
        pytest.raises(medssl.BusyError, match="Ask again"),
    ):
        run()


def test_a_file_system_without_locks_is_named(run, monkeypatch):
    without = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(medssl.FileLock, "acquire", without)
    with pytest.raises(TrainingError, match="no file locks.*local disk"):
        run()


def test_an_unfinished_run_and_one_of_version_0_1_are_not_read(run):
    folder = run().folder
    settings = json.loads((folder / "config.json").read_text())
    del settings["version"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(TrainingError, match="version 0.1"):
        medssl.load_run(folder)
    (folder / "metrics.json").unlink()
    with pytest.raises(TrainingError, match="not finished"):
        medssl.load_run(folder)


def test_each_epoch_calls_back_or_prints_and_asking_again_loads_what_is_finished(run, capsys):
    histories = []
    finished = run(on_epoch=histories.append)
    assert run(on_epoch=histories.append).metrics == finished.metrics
    assert [len(history) for history in histories] == [1, 2, 3]
    run(seed=1, on_epoch=medssl.print_epoch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "epoch" in lines[2] and "loss" in lines[2]


def test_linear_evaluation_is_scikit_learns_logistic_regression(run):
    finished = run(LINEAR)
    preprocessing = medssl.preprocessing_for(LINEAR, DATA, REPORT)
    parts = (DATA.train, DATA.test)
    train, test = (medssl.predict(BACKBONE, part.images, preprocessing).numpy() for part in parts)
    mean, std = train.mean(0), train.std(0).clip(1e-6)
    strength = finished.history["C"][finished.metrics["best_epoch"]]
    fit = LogisticRegression(C=strength, max_iter=2000).fit((train - mean) / std, DATA.train.labels)
    expected = fit.predict_proba((test - mean) / std)
    np.testing.assert_allclose(finished.predictions["scores"], expected, atol=1e-3)
    assert same_bits(BACKBONE.state_dict(), weights(finished))


def test_features_are_computed_once_for_all_fractions_and_seeds(run, monkeypatch, tmp_path):
    first = run(LINEAR, seed=1).predictions["scores"]
    predict = mock.Mock(wraps=medssl.predict)
    monkeypatch.setattr(medssl, "predict", predict)
    medssl._features.clear()
    for seed, fraction in ((0, 0.5), (0, 1.0), (1, 1.0)):
        last = run_quickly(tmp_path / "again", LINEAR, seed=seed, label_fraction=fraction)
    images = [call.args[1] for call in predict.call_args_list]
    assert [len(batch) for batch in images if np.ndim(batch) > 2] == [24, 12, 16]
    assert np.array_equal(last.predictions["scores"], first)


@pytest.mark.parametrize("config", [LINEAR, QUICK], ids=["linear", "fine-tuned"])
def test_three_classes_are_trained_and_scored(run, config):
    parts = {}
    for name, split in DATA.parts.items():
        labels = np.arange(len(split)) // 2 % 3
        parts[name] = dataclasses.replace(split, labels=labels, patients=split.ids)
    finished = run(config, dataclasses.replace(DATA, class_names=("a", "b", "c"), **parts))
    assert finished.predictions["scores"].shape == (16, 3) and 0 <= finished.metrics["AUC"] <= 1
