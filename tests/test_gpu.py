"""What is promised of a GPU, on a GPU: `make test-gpu` runs it.

`make test-gpu DEVICE=mps` asks another device, `DEVICE=cpu` shows that the tests themselves work.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

import medssl_utils as medssl

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("DEVICE", "cuda")
PRECISIONS = ("fp32", "tf32", "bf16")


@pytest.fixture(scope="module")
def data() -> medssl.DataSplits:
    return medssl.demo_data(n_train=52, n_val=24, n_test=48, image_size=64)


@pytest.fixture(scope="module")
def backbone():
    return medssl.load_backbone("random", seed=0)


def run(backbone, data, folder, device=DEVICE, **changes) -> medssl.Run:
    config = medssl.FineTuneConfig.named("demo", **{
        "epochs": 3, "image_size": 64, "augment": ("flip_lr", "affine"), **changes})
    return medssl.fine_tune(*backbone, data, config, runs_dir=folder, device=device,
                            progress="none")


def weights(run: medssl.Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file
    return load_file(run.folder / "best.safetensors")


def same(run: medssl.Run, other: medssl.Run) -> bool:
    return np.array_equal(run.predictions["scores"], other.predictions["scores"]) and all(
        torch.equal(a, b) for a, b in zip(weights(run).values(), weights(other).values()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_seed_gives_the_same_bits(backbone, data, tmp_path, precision):
    assert same(run(backbone, data, tmp_path / "once", precision=precision),
                run(backbone, data, tmp_path / "again", precision=precision))


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA has graphs")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_recorded_step_gives_the_bits_of_a_plain_one(backbone, data, tmp_path, precision):
    """Recorded in the second epoch, replayed with the rates and the images of each step."""
    settings = {"precision": precision, "batch_size": 8, "epochs": 4}
    assert same(run(backbone, data, tmp_path, **settings),
                run(backbone, data, tmp_path, cuda_graph=True, **settings))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_a_second_gpu_of_the_process_records_its_own_steps(backbone, data, tmp_path):
    settings = {"batch_size": 8, "epochs": 4, "cuda_graph": True}
    run(backbone, data, tmp_path / "first", "cuda:0", **settings)
    second = run(backbone, data, tmp_path / "second", "cuda:1", **settings)
    assert same(second, run(backbone, data, tmp_path / "plain", "cuda:1",
                            **{**settings, "cuda_graph": False}))


def test_a_compiled_step_learns_as_a_plain_one_does(backbone, tmp_path):
    """Test AUC above .85 and within .08; with a graph too where there are graphs."""
    data, auc = medssl.demo_data(), []
    for change in {}, {"compile": True}, {"compile": True, "cuda_graph": DEVICE == "cuda"}:
        config = medssl.FineTuneConfig.named("demo", **change)
        auc.append(medssl.fine_tune(*backbone, data, config, runs_dir=tmp_path, device=DEVICE,
                                    progress="none").metrics["AUC"])
    assert min(auc) > 0.85 and max(auc) - min(auc) < 0.08, auc


@pytest.mark.parametrize("graph", [False] + [True] * (DEVICE == "cuda"))
def test_an_interrupted_run_goes_on_to_the_same_bits(
        backbone, data, tmp_path, monkeypatch, graph):
    """A recorded one records its steps again, later than in the run that nothing interrupted."""
    settings, epoch = {"epochs": 5, "cuda_graph": graph}, medssl.train_one_epoch
    whole = run(backbone, data, tmp_path / "whole", **settings)

    def interrupted(*args, **options):
        if options["epoch"] == 2:
            raise KeyboardInterrupt
        return epoch(*args, **options)

    monkeypatch.setattr(medssl, "RESUME_SECONDS", 0.0)
    monkeypatch.setattr(medssl, "train_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(backbone, data, tmp_path / "broken", **settings)
    assert list(tmp_path.glob("broken/*/*/last.pt"))
    monkeypatch.setattr(medssl, "train_one_epoch", epoch)
    assert same(run(backbone, data, tmp_path / "broken", **settings), whole)


@pytest.mark.skipif(DEVICE != "cuda", reason="asks CUDA for its memory")
@pytest.mark.parametrize("graph", [False, True])
def test_an_interrupted_run_gives_its_memory_back_though_its_error_is_kept(
        backbone, data, tmp_path, monkeypatch, graph):
    """As a notebook keeps it. The network and its gradients may stay; what a step of 32 images of
    224 pixels needs is ten times as much."""
    def reserved() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def interrupted(*args, **options):
        peak.append(torch.cuda.memory_reserved())
        raise KeyboardInterrupt

    peak, before = [], reserved()
    monkeypatch.setattr(medssl, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        run(backbone, medssl.demo_data(n_train=160, n_val=24, n_test=24, image_size=224), tmp_path,
            image_size=224, batch_size=32, precision="fp32", cuda_graph=graph)
    assert kept.value.__traceback__ is not None
    assert reserved() - before < (peak[0] - before) / 2


def test_every_precision_learns_the_phantoms_as_well(backbone, tmp_path):
    """Test AUC above .85 and within .08 of each other; the test itself is scored in fp32."""
    data, auc = medssl.demo_data(), {}
    for precision in PRECISIONS:
        config = medssl.FineTuneConfig.named("demo", precision=precision)
        auc[precision] = medssl.fine_tune(*backbone, data, config, runs_dir=tmp_path,
                                          device=DEVICE, progress="none").metrics["AUC"]
    assert min(auc.values()) > 0.85 and max(auc.values()) - min(auc.values()) < 0.08, auc


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA says when a step waits")
@pytest.mark.parametrize("graph", [False, True])
def test_no_step_waits_for_the_gpu(backbone, data, graph):
    """Between two steps nothing may ask the GPU for an answer: that would raise an error."""
    config = medssl.FineTuneConfig(batch_size=8, image_size=64, freeze_epochs=0, cuda_graph=graph)
    net = medssl.add_head(backbone[0], 2, 0).to(DEVICE, memory_format=torch.channels_last)
    images, labels = (torch.as_tensor(part).to(DEVICE)
                      for part in (data.train.images, data.train.labels))
    steps = -(-len(labels) // 8)
    seen = []

    def watch(n: int) -> None:
        seen.append(n)
        torch.cuda.set_sync_debug_mode("default" if len(seen) == steps else "error")

    prep = medssl.preprocessing_for(dataclasses.replace(config, normalise="dataset"), data, "random")
    optimizer, kept = medssl.make_optimizer(net, config), {}
    for epoch in range(4 * graph):  # until steps of both sizes are recorded
        medssl.train_one_epoch(net, images, labels, optimizer, config, prep, epoch=epoch, seed=0,
                               kept=kept)
    try:
        medssl.train_one_epoch(net, images, labels, optimizer, config, prep, epoch=4, seed=0,
                               tick=watch, kept=kept)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == steps
