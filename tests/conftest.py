"""What several test files share."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from notebook_cells import run_cells

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import medssl_utils as medssl  # noqa: E402

torch.set_num_threads(1)  # two threads collapse where a neighbour is busy


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    """A checkpoints folder in which the four stand-ins lie; not to be written to by a test."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for method in medssl.METHODS:
        medssl.write_demo_checkpoint(method, folder / "stand-in")
    return folder


@pytest.fixture(scope="module")
def few_phantoms() -> Iterator[medssl.DataSplits]:
    """Phantoms small for speed, also for notebooks that load them while this fixture lives."""
    few = functools.partial(medssl.demo_data, n_train=80, n_val=40, n_test=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medssl, "demo_data", few)
        yield medssl.load_data("phantom", image_size=32)


@pytest.fixture(scope="module")
def planted_file(few_phantoms, tmp_path_factory) -> Path:
    """A checkpoint in BYOL's layout that knows: trained on all labels, the test images' too."""
    import planted

    config = medssl.FineTuneConfig.named("demo", image_size=32)
    prep = medssl.preprocessing_for(config, few_phantoms, "random")
    net = medssl.add_head(medssl.load_backbone("random", seed=9)[0], 2, 0)
    net = net.to(memory_format=torch.channels_last)
    images, labels = (torch.cat([torch.as_tensor(getattr(part, name)) for part in (
        few_phantoms.train, few_phantoms.test)]) for name in ("images", "labels"))
    optimizer = medssl.make_optimizer(net, config)
    for epoch in range(config.epochs):
        medssl.train_one_epoch(net, images, labels, optimizer, config, prep, epoch=epoch, seed=0)
    backbone = {k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    return planted.plant(backbone, "BYOL", tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def looked_inside(few_phantoms, planted_file, stand_ins, tmp_path_factory) -> dict[str, Any]:
    """The names of notebook 06 after a run with the planted checkpoint and one stand-in.

    Small for speed. The seed is one whose twelve labelled images every random network can use:
    after an unlucky draw they differ so much that nothing could be shown.
    """
    return run_cells(
        "06_look_inside", methods=["SparK"], checkpoint=str(planted_file), image_size=32, seed=3,
        probe_fraction=0.15, explain=["SparK"], epochs=1, layers=["layer1", "layer3"],
        checkpoints_dir=str(stand_ins), runs_dir=str(tmp_path_factory.mktemp("runs")),
        device="cpu", widgets=True)
