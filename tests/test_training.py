"""Recipes, the step, the run folder, resuming and linear evaluation, on a small ResNet."""

import dataclasses
import errno
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import medssl_utils as medssl
from medssl_utils import FineTuneConfig, TrainingError, fine_tune

QUICK = FineTuneConfig.named("demo", epochs=3, batch_size=8)


def small_backbone(seed=0):
    """Return a ResNet of four blocks, small for speed, and a report of it."""
    torch.manual_seed(seed)
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
    model.fc = nn.Identity()
    report = SimpleNamespace(
        **{"method": "random", "name": "random", "weights": "random", "stand_in": ""},
        **{"demo": True, "mean": None, "std": None},
        fingerprint=medssl._fingerprint(model.state_dict()),
    )
    return model.eval(), report


def small_data():
    """Phantoms, few for speed."""
    return medssl.demo_data(n_train=24, n_val=12, n_test=16)


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture
def run(backbone, data, tmp_path):
    """Run quickly in this test's folder."""

    def run(config=QUICK, folder=tmp_path, **options):
        options = {"progress": "none", "device": "cpu", "runs_dir": folder, **options}
        return fine_tune(*backbone, data, config, **options)

    return run


def weights(run):
    return load_file(run.folder / "best.safetensors")


def same_bits(one, other):
    other = weights(other)
    return all(torch.equal(tensor, other[name]) for name, tensor in weights(one).items())


def start_training(backbone, data, config, seed=0):
    """Return what `train_one_epoch` takes, but for epoch and seed."""
    model = medssl.add_head(backbone[0], 2, seed).to(memory_format=torch.channels_last)
    images, labels = torch.as_tensor(data.train.images), torch.as_tensor(data.train.labels)
    preprocessing = medssl.preprocessing_for(config, data, backbone[1])
    return model, images, labels, medssl.make_optimizer(model, config), config, preprocessing


# Recipes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "epoch, trainable, lr",
    [(0, "head+bn", 1e-4), (9, "head+bn", 1e-4), (10, "all", 1e-4), (11, "all", 2e-5)],
)
def test_paper_recipe_has_the_phases_of_the_authors_notebooks(epoch, trainable, lr):
    phase = medssl.phase_of(FineTuneConfig.named("paper"), epoch)
    assert dataclasses.astuple(phase) == (trainable, pytest.approx(lr), pytest.approx(lr))


def test_paper_recipe_trains_53120_batchnorm_parameters_and_the_head_while_frozen():
    model = torchvision.models.resnet50()
    model.fc = nn.Linear(2048, 2)
    medssl.set_phase(model, "head+bn")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 53_120 + 2 * 2049
    medssl.set_phase(model, "all")
    assert all(p.requires_grad for p in model.parameters())


def plain_loop(model, data, config, optimizer, rates, trains):
    """The recipe again without the engine: images prepared beforehand, the loop in order."""
    x = torch.as_tensor(data.train.images)[:, None].repeat(1, 3, 1, 1) / 255
    x = (x - data.mean[0]) / data.std[0]
    labels = torch.as_tensor(data.train.labels)
    for epoch in range(config.epochs):
        model.train(trains(epoch, "bn1.weight"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trains(epoch, name)
        digest = medssl.hashlib.sha256(repr((5, epoch)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(len(labels), generator=generator)
        draws = torch.rand(len(labels), 6, generator=generator)
        for step, index in enumerate(order.split(config.batch_size)):
            for group, rate in zip(optimizer.param_groups, rates(epoch, step), strict=True):
                group["lr"] = float(np.float32(rate))
            batch = x[index]
            if "flip_ud" in config.augment:
                flip = draws[index, 0] < 0.5
                batch[flip] = batch[flip].flip(2)
            optimizer.zero_grad()
            batch = batch.contiguous(memory_format=torch.channels_last)
            F.cross_entropy(model(batch), labels[index]).backward()
            optimizer.step()


def check_against_plain_loop(backbone, data, config, make, rates, trains):
    work = start_training(backbone, data, config)
    for epoch in range(config.epochs):
        medssl.train_one_epoch(*work, epoch=epoch, seed=5)
    plain = medssl.add_head(backbone[0], 2, 0).to(memory_format=torch.channels_last)
    head = list(plain.fc.parameters())
    others = [p for name, p in plain.named_parameters() if not name.startswith("fc.")]
    plain_loop(plain, data, config, make([{"params": others}, {"params": head}]), rates, trains)
    for (name, ours), theirs in zip(
        work[0].state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_paper_recipe_gives_the_weights_of_a_plain_loop_across_its_boundaries(backbone, data):
    config = FineTuneConfig.named("paper", "phantom", epochs=3, freeze_epochs=1, batch_size=8)
    check_against_plain_loop(
        backbone,
        data,
        config,
        lambda groups: torch.optim.Adam(groups, weight_decay=5e-4, fused=True),
        lambda epoch, step: [2e-5, 2e-5] if epoch == 2 else [1e-4, 1e-4],
        lambda epoch, name: epoch >= 1 or "bn" in name or "downsample.1" in name or "fc" in name,
    )


def test_recommended_recipe_gives_the_weights_of_a_plain_loop(backbone, data):
    changes = {"epochs": 4, "freeze_epochs": 2, "batch_size": 8, "augment": ()}
    changes |= {"precision": "fp32", "normalise": "dataset"}
    config = FineTuneConfig.named("recommended", "phantom", **changes)

    def rates(epoch, step):
        passed = epoch * 3 + step  # of 12 steps, the first is the warm-up
        factor = 1.0 if passed == 0 else 0.5 * (1 + math.cos(math.pi * (passed - 1) / 11))
        return [0.0 if epoch < 2 else 1e-4 * factor, 1e-3 * factor]

    check_against_plain_loop(
        backbone,
        data,
        config,
        lambda groups: torch.optim.AdamW(groups, weight_decay=1e-4, fused=True),
        rates,
        lambda epoch, name: epoch >= 2 or "fc" in name,
    )


def test_each_default_of_the_recommended_recipe_says_why():
    for field in dataclasses.fields(FineTuneConfig)[1:]:
        pattern = rf"    {field.name}: .* = .*  # (literature|convention|measured)"
        assert re.search(pattern, inspect.getsource(FineTuneConfig)), field.name


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lr": "1e-4"}, "lr is '1e-4'; give a float"),
        ({"lr": 0}, "lr is 0.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"epochs": 2.5}, "epochs is 2.5; give a int"),
        ({"batch_size": 1}, "batch_size is 1; it must be at least 2"),
        ({"augment": ["flip"]}, "Did you mean 'flip_lr'|Did you mean 'flip_ud'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"recipe": "linear"}, "leave augment empty"),
    ],
)
def test_a_bad_setting_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        FineTuneConfig(**change)


def test_numbers_of_other_types_name_the_same_recipe():
    changes = {"lr": np.float64(1), "epochs": np.int64(3), "augment": ["flip_ud"]}
    assert FineTuneConfig(**changes) == FineTuneConfig(lr=1, epochs=3, augment=("flip_ud",))


def test_zero_and_none_leave_a_setting_to_the_recipe():
    changed = FineTuneConfig.named("paper", epochs=0, image_size=0, lr=None)
    assert changed == FineTuneConfig.named("paper", "covid_ct")
    assert changed.epochs == 70 and FineTuneConfig.named("paper", "phantom").image_size == 32
    organ = FineTuneConfig.named("paper", "organsmnist")
    assert (organ.augment, organ.subset_rule) == ((), "first")


@pytest.mark.parametrize("change, short", [({}, False), ({"epochs": 49}, True), ({"lr": 1}, False)])
def test_fewer_epochs_make_a_run_short(change, short):
    assert FineTuneConfig(**change).short == short


# One batch -------------------------------------------------------------------


def test_enlarging_28_to_224_repeats_each_pixel_8_by_8():
    images = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    x = medssl.Preprocessing((0.5,) * 3, (0.5,) * 3, 224)(images)
    once = medssl.Preprocessing((0.5,) * 3, (0.5,) * 3, 28)(images)
    assert torch.equal(x, once.repeat_interleave(8, 2).repeat_interleave(8, 3))


def test_colour_images_keep_their_channels():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    x = medssl.Preprocessing((0.1, 0.2, 0.3), (1, 2, 4), 8)(images)
    assert torch.allclose(x[:, 2], (images[..., 2] / 255 - 0.3) / 4)


def test_normalisation_is_the_checkpoints_or_the_data_sets(data):
    report = SimpleNamespace(mean=(0.1,) * 3, std=(0.2,) * 3)
    own = FineTuneConfig(normalise="checkpoint")
    assert medssl.preprocessing_for(own, data, report).mean == (0.1,) * 3
    assert medssl.preprocessing_for(QUICK, data, report).mean == data.mean


def test_augmentation_follows_its_random_numbers():
    x = torch.rand(2, 3, 8, 8)
    draws = torch.tensor([[0.4, 0.6, 0.5, 0.5, 0.5, 0.5], [0.6, 0.4, 0.5, 0.5, 0.5, 0.5]])
    flipped = medssl.augment_batch(x, ("flip_ud", "flip_lr"), draws)
    assert torch.equal(flipped, torch.stack([x[0].flip(1), x[1].flip(2)]))
    assert torch.allclose(medssl.augment_batch(x, ("affine",), draws), x, atol=1e-6)
    draws[:, 4] = 1  # shifted by a tenth of the side, to the left
    shifted = medssl.augment_batch(torch.rand(2, 3, 10, 10), (), draws)
    assert torch.allclose(
        medssl.augment_batch(shifted, ("affine",), draws)[..., :-1], shifted[..., 1:], atol=1e-5
    )


def test_a_head_follows_its_seed_and_leaves_random_numbers_alone(backbone):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, other = (medssl.add_head(backbone[0], 2, 7).fc.weight for _ in range(2))
    assert torch.equal(one, other) and torch.equal(torch.rand(1), expected)
    assert isinstance(backbone[0].fc, nn.Identity)


def test_a_last_batch_of_one_joins_its_neighbour(backbone, data):
    nine = dataclasses.replace(data, train=data.train.take(np.arange(9)))
    _, batches = medssl.train_one_epoch(*start_training(backbone, nine, QUICK), epoch=0, seed=0)
    assert [len(batch) for batch in batches] == [9]


# Runs ------------------------------------------------------------------------


def test_run_folder_holds_what_the_design_names(run, data):
    finished = run(label_fraction=0.5, seed=4)
    names = {path.name for path in finished.folder.iterdir()} - {".lock"}
    files = {"config.json", "history.csv", "predictions.npz", "metrics.json", "best.safetensors"}
    assert names == files
    assert re.fullmatch(r"phantom_random_demo_f0.5_s4_[0-9a-f]{8}", finished.folder.name)
    assert finished.config["n_train"] == 12 and finished.stamp == "DEMO"
    assert set(finished.metrics) >= {*medssl.SCORES, "loss", "n_test", "val", "best_epoch"}
    assert list(finished.predictions["ids"]) == list(data.test.ids)
    assert finished.predictions["val_scores"].shape == (12, 2)
    assert (
        medssl.score(data.test.labels, finished.predictions["scores"])["AUC"]
        == (finished.metrics["AUC"])
    )


def test_asking_again_loads_the_finished_run(run):
    first, again = run(), run()
    assert not first.loaded and again.loaded and again.metrics == first.metrics


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(run, tmp_path):
    one = run(folder=tmp_path / "one")
    assert same_bits(one, run(folder=tmp_path / "two"))
    assert not same_bits(one, run(seed=1))


def test_the_backbone_handed_in_is_not_changed(run, backbone):
    run()
    assert medssl._fingerprint(backbone[0].state_dict()) == backbone[1].fingerprint


def test_a_setting_that_changes_the_result_changes_the_folder(run):
    folders = {run(dataclasses.replace(QUICK, epochs=1, lr=lr)).folder for lr in (1e-3, 2e-3)}
    assert len(folders) == 2


def test_labels_per_class_train_on_so_many_and_name_the_run(run):
    finished = run(dataclasses.replace(QUICK, epochs=1), labels_per_class=4)
    assert "_k4_" in finished.folder.name and finished.config["n_train"] == 8


@pytest.mark.parametrize(
    "select_by, best", [("AUC", 2), ("ACC", 0), ("loss", 1)], ids=["AUC", "ACC", "loss"]
)
def test_best_epoch_is_the_best_on_validation(select_by, best):
    rows = [(0.8, 0.9, 0.5), (None, 0.9, 0.1), (0.9, 0.8, 0.3), (0.9, 0.8, 0.4)]
    history = [{"val_AUC": a, "val_ACC": b, "val_loss": c} for a, b, c in rows]
    assert medssl._best_epoch(history, select_by) == best


@pytest.mark.parametrize(
    "change, words",
    [
        ({"label_fraction": 0}, "label_fraction"),
        ({"label_fraction": 2}, "label_fraction"),
        ({"label_fraction": "0.5"}, "label_fraction is '0.5'; give a float"),
        ({"labels_per_class": 1000}, "labels_per_class"),
        ({"seed": "1"}, "seed is '1'; give a int"),
        ({"device": "gpu"}, "device 'gpu' can't be used"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(run, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        run(**change)
    assert not list(tmp_path.iterdir())


def test_a_report_of_another_model_is_refused(backbone, data, tmp_path):
    with pytest.raises(ValueError, match="of another model"):
        fine_tune(small_backbone(1)[0], backbone[1], data, QUICK, runs_dir=tmp_path)


def test_a_loss_that_is_not_finite_names_epoch_and_images(run, monkeypatch, tmp_path):
    def spoil(x, names, draws):
        return x * float("nan")

    monkeypatch.setattr(medssl, "augment_batch", spoil)
    with pytest.raises(medssl.NotFiniteError, match="Epoch 0.*train-patient.*lower lr"):
        run()
    assert not list(tmp_path.rglob("metrics.json"))


def test_out_of_memory_says_what_to_lower(run, monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(medssl, "augment_batch", hungry)
    with pytest.raises(TrainingError, match=r"Lower batch_size \(8\) or image_size \(32\)"):
        run()


def interrupt_at(monkeypatch, number):
    """Let the run save after each epoch, and stop it by Ctrl-C when epoch `number` begins."""
    train = medssl.train_one_epoch

    def interrupted(*work, epoch, seed):
        if epoch == number:
            raise KeyboardInterrupt
        return train(*work, epoch=epoch, seed=seed)

    monkeypatch.setattr(medssl, "RESUME_SECONDS", 0.0)
    monkeypatch.setattr(medssl, "train_one_epoch", interrupted)


def test_an_interrupted_run_goes_on_to_the_same_bits(run, monkeypatch, tmp_path):
    whole = run(folder=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        run()
    resumed = run()
    assert same_bits(resumed, whole)
    assert resumed.history["val_loss"].equals(whole.history["val_loss"])


def test_a_full_disk_keeps_the_older_resume_file(run, monkeypatch, tmp_path):
    whole = run(folder=tmp_path / "whole")
    saves = []

    def save(state, file):
        saves.append(state)
        file.write(b"half")
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.seek(0)
        torch_save(state, file)

    torch_save = torch.save
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(medssl, "RESUME_SECONDS", 0.0)
        patch.setattr(torch, "save", save)
        run()
    (resume,) = tmp_path.glob("study/*/last.pt")
    assert len(torch.load(resume, weights_only=True)["history"]) == 1
    assert same_bits(run(), whole)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch, test_training as t
t.medssl.RESUME_SECONDS = 0.0
torch.set_num_threads(1)
calls = []
moment, count = sys.argv[1], int(sys.argv[2])
def die_at(function, name):
    def dying(*args, **options):
        calls.append(name)
        if name == moment and calls.count(name) == count:
            if name == "save":
                args[1].write(b"half a file")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return dying
t.medssl.train_one_epoch = die_at(t.medssl.train_one_epoch, "epoch")
torch.save = die_at(torch.save, "save")
t.fine_tune(*t.small_backbone(), t.small_data(), t.QUICK, runs_dir=sys.argv[3], device="cpu")
"""


def run_in_process(folder, moment="never", count=0):
    here = Path(__file__).parent
    script = KILLED.format(tests=str(here), root=str(here.parent))
    command = [sys.executable, "-c", script, moment, str(count), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("moment, count", [("epoch", 1), ("epoch", 3), ("save", 2)])
def test_killed_and_run_again_gives_the_bits_of_an_unbroken_run(run, tmp_path, moment, count):
    assert run_in_process(tmp_path, moment, count).returncode == -signal.SIGKILL
    assert not list(tmp_path.rglob("metrics.json"))
    assert same_bits(run(), run(folder=tmp_path / "whole"))
    assert not list(tmp_path.rglob("last.pt")) and not list(tmp_path.rglob("*.tmp"))


def test_two_processes_never_write_one_folder(run):
    folder = run().folder
    (folder / "metrics.json").unlink()
    with filelock.FileLock(folder / ".lock"), pytest.raises(medssl.BusyError, match="Ask again"):
        run()


def test_a_file_system_without_locks_is_named(run, monkeypatch):
    def acquire(self, *_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(medssl.FileLock, "acquire", acquire)
    with pytest.raises(OSError, match="no file locks.*local disk"):
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


def test_each_epoch_prints_a_line_and_calls_back_with_the_history(run, capsys):
    histories = []
    run(progress="auto", on_epoch=histories.append)
    assert [len(history) for history in histories] == [1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("epoch 2, train_loss ")


# Linear evaluation -----------------------------------------------------------

LINEAR = FineTuneConfig.named("linear", "phantom")


def test_linear_evaluation_is_scikit_learns_logistic_regression(run, backbone, data):
    from sklearn.linear_model import LogisticRegression

    finished = run(LINEAR)
    features = []
    preprocessing = medssl.preprocessing_for(LINEAR, data, backbone[1])
    for split in (data.train, data.test):
        features.append(medssl.predict(backbone[0], split.images, preprocessing).numpy())
    mean, std = features[0].mean(0), features[0].std(0).clip(1e-6)
    strength = finished.history["C"][finished.metrics["best_epoch"]]
    fit = LogisticRegression(C=strength, max_iter=2000)
    fit.fit((features[0] - mean) / std, data.train.labels)
    expected = fit.predict_proba((features[1] - mean) / std)
    np.testing.assert_allclose(finished.predictions["scores"], expected, atol=1e-3)


def test_linear_evaluation_leaves_the_backbone_as_it_was(run, backbone):
    trained = weights(run(LINEAR))
    for name, tensor in backbone[0].state_dict().items():
        assert torch.equal(trained[name], tensor), name


def test_features_are_computed_once_for_all_fractions_and_seeds(run, monkeypatch, tmp_path):
    whole = run(LINEAR, seed=1).predictions["scores"]
    images = []
    predict = medssl.predict

    def counting(model, inputs, *args, **options):
        images.append(np.ndim(inputs) > 2)
        return predict(model, inputs, *args, **options)

    monkeypatch.setattr(medssl, "predict", counting)
    medssl._features.clear()
    for seed, fraction in ((0, 0.5), (0, 1.0), (1, 1.0)):
        last = run(LINEAR, tmp_path / "again", seed=seed, label_fraction=fraction)
    assert sum(images) == 3  # train, val and test, once
    assert np.array_equal(last.predictions["scores"], whole)


@pytest.mark.parametrize("config", [LINEAR, QUICK], ids=["linear", "fine-tuned"])
def test_three_classes_are_trained_and_scored(backbone, data, tmp_path, config):
    parts = {}
    for name, split in data.parts.items():
        labels = np.arange(len(split)) // 2 % 3
        parts[name] = dataclasses.replace(split, labels=labels, patients=split.ids)
    three = dataclasses.replace(data, class_names=("a", "b", "c"), **parts)
    finished = fine_tune(*backbone, three, config, runs_dir=tmp_path, device="cpu")
    assert finished.predictions["scores"].shape == (16, 3)
    assert isinstance(finished.history, pd.DataFrame) and 0 <= finished.metrics["AUC"] <= 1
