"""What is promised of a GPU, on a GPU: `make test-gpu` (DEVICE=cpu shows that the tests work)."""

import os

import pytest
import torch
from safetensors.torch import load_file

import medssl_utils as medssl

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("DEVICE", "cuda")
PRECISIONS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def start():
    return *medssl.load_backbone("random"), medssl.demo_data()


def run(start, folder, precision, **changes):
    config = medssl.FineTuneConfig.named("demo", precision=precision, **changes)
    return medssl.fine_tune(*start, config, runs_dir=folder, device=DEVICE)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_seed_gives_the_same_bits(start, tmp_path, precision):
    changes = {"augment": "affine", "epochs": 2}
    one, two = (run(start, tmp_path / name, precision, **changes) for name in ("one", "two"))
    weights, again = (load_file(each.folder / "best.safetensors") for each in (one, two))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_every_precision_learns_the_phantoms_as_well(start, tmp_path):
    scores = [run(start, tmp_path, precision).metrics["AUC"] for precision in PRECISIONS]
    assert min(scores) > 0.85 and max(scores) - min(scores) < 0.08, scores


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA says when a step waits")
def test_no_step_waits_for_the_gpu(start, monkeypatch):
    backbone, report, data = start
    config = medssl.FineTuneConfig.named("demo", augment="affine")
    model = medssl.add_head(backbone, 2, 0).to("cuda", memory_format=torch.channels_last)
    images, labels = (torch.as_tensor(x).cuda() for x in (data.train.images, data.train.labels))
    preprocessing = medssl.preprocessing_for(config, data, report)
    work = (model, images, labels, medssl.make_optimizer(model, config), config, preprocessing)
    augment, steps = medssl.augment_batch, []

    def watch(*args):
        steps.append(args)  # between the first and the last, a question to the GPU is an error
        torch.cuda.set_sync_debug_mode("error" if len(steps) < 15 else "default")
        return augment(*args)

    monkeypatch.setattr(medssl, "augment_batch", watch)
    medssl.train_one_epoch(*work, epoch=0, seed=0)
    assert len(steps) == 15
