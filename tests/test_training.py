"""The training engine: phases, recipes, repeatability, the run folder."""

import dataclasses
import functools
import inspect
import re
import signal
import subprocess
import sys
import types
import weakref

import fake_cuda_graph
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import medssl_utils as medssl
from medssl_utils import DataSplits, FineTuneConfig, Split, fine_tune

SIZE = 32  # pixels, small for speed


def toy_split(n: int, prefix: str, seed: int) -> Split:
    """n images (n, SIZE, SIZE) of two classes; class 1 has a bright corner."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(0, 120, (n, SIZE, SIZE)).astype(np.uint8)
    images[labels == 1, 4:14, 4:14] += 90
    ids = np.array([f"{prefix}{i}" for i in range(n)])
    return Split(images, labels.astype(np.int64), ids)


def make_toy(task: str = "binary") -> DataSplits:
    """Two classes; "ordinal": four grades; "multi-label": 3 findings, the third by chance."""
    data = toy_data()
    if task == "binary":
        return data
    parts = {}
    for name in medssl.SPLITS:
        part = getattr(data, name)
        i = np.arange(len(part))
        labels = i % 4 if task == "ordinal" else np.stack([i % 2, (i + 1) % 2, i // 2 % 2], 1)
        parts[name] = dataclasses.replace(part, labels=labels)
    names = ("none", "mild", "severe", "worst")[:4 if task == "ordinal" else 3]
    return dataclasses.replace(data, **parts, task=task, class_names=names)


def toy_data() -> DataSplits:
    return DataSplits("toy", toy_split(24, "a", 0), toy_split(12, "b", 1), toy_split(16, "c", 2),
                      ("clear", "lesion"), (0.3,) * 3, (0.2,) * 3, "made by the test", demo=True)


@pytest.fixture(scope="module")
def toy() -> DataSplits:
    return make_toy()


class TinyNet(nn.Module):
    """Small for speed: what the engine needs of a ResNet is BatchNorm layers and `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5, stride=3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class TinyBackbone(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Identity()


ADD_HEAD = medssl.add_head


@pytest.fixture(autouse=True)
def tiny_head(monkeypatch):
    """A head on the tiny backbone's 8 features instead of 2048."""
    def add_head(model, n_classes, seed):
        torch.manual_seed(seed)
        net = TinyNet()
        net.load_state_dict(model.state_dict(), strict=False)
        net.fc = net.fc if n_classes == 2 else nn.Linear(8, n_classes)
        return net

    monkeypatch.setattr(medssl, "add_head", add_head)


@pytest.fixture
def backbone() -> nn.Module:
    torch.manual_seed(1)
    return TinyBackbone()


REPORT = types.SimpleNamespace(method="random", weights="random", fingerprint="0", demo=True,
                               allow_extra=())
QUICK = FineTuneConfig.named("demo", image_size=SIZE, epochs=3, batch_size=8)


def run_quick(backbone, toy, folder, config=QUICK, **options):
    return fine_tune(backbone, REPORT, toy, config, runs_dir=folder, device="cpu",
                     progress="none", **options)


# --- recipes -----------------------------------------------------------------------------------

@pytest.mark.parametrize("epoch, trainable, lr", [
    (0, "head+bn", 1e-4), (9, "head+bn", 1e-4), (10, "all", 1e-4), (11, "all", 2e-5),
    (69, "all", 2e-5),
])
def test_paper_recipe_trains_what_the_authors_notebooks_train(epoch, trainable, lr):
    phase = medssl.phase_of(FineTuneConfig.paper(), epoch)
    assert (phase.trainable, phase.lr, phase.backbone_lr) == (trainable, lr, pytest.approx(lr))
    assert phase.batchnorm_moves


def test_paper_recipe_trains_53120_batchnorm_parameters_and_the_head_while_frozen():
    import torchvision

    model = torchvision.models.resnet50()
    model.fc = nn.Linear(2048, 2)
    medssl.set_phase(model, medssl.phase_of(FineTuneConfig.paper(), 9))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 53_120 + 2 * 2048 + 2
    medssl.set_phase(model, medssl.phase_of(FineTuneConfig.paper(), 10))
    assert all(p.requires_grad for p in model.parameters())


def test_paper_recipe_gives_the_weights_of_a_plain_restatement(toy):
    """The authors' schedule, written again without the engine, across both boundaries."""
    config = FineTuneConfig.named("paper", epochs=4, freeze_epochs=1, batch_size=8,
                                  image_size=SIZE)
    torch.manual_seed(0)
    ours = TinyNet()
    plain = TinyNet()
    plain.load_state_dict(ours.state_dict())
    prep = medssl.preprocessing_for(config, toy, "random")
    images, labels = torch.as_tensor(toy.train.images), torch.as_tensor(toy.train.labels)
    optimizer = medssl.make_optimizer(ours, config)
    for epoch in range(4):
        medssl.train_one_epoch(ours, images, labels, optimizer, config, prep, epoch=epoch, seed=5)

    adam = torch.optim.Adam(plain.parameters(), lr=1e-4, weight_decay=5e-4)
    for epoch in range(4):
        plain.train()
        for name, parameter in plain.named_parameters():
            parameter.requires_grad = epoch >= 1 or name.startswith(("bn", "fc"))
        if epoch == 2:
            adam.param_groups[0]["lr"] = 2e-5
        rng = medssl._rng(5, epoch)
        batches = medssl._batches(len(labels), 8, rng)
        draws = torch.rand(len(labels), 6, generator=rng)
        for index in batches:
            x = images[index][:, None].repeat(1, 3, 1, 1) / 255
            x = (x - 0.3) / 0.2
            flip = draws[index, 0] < 0.5
            x[flip] = x[flip].flip(2)
            adam.zero_grad()
            F.cross_entropy(plain(x), labels[index]).backward()
            adam.step()
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_recommended_recipe_in_fp32_gives_the_weights_of_a_plain_loop(toy):
    """The plain loop: NCHW, AdamW unfused, images resized and normalised beforehand, in order."""
    config = FineTuneConfig(epochs=3, freeze_epochs=1, batch_size=8, image_size=SIZE, augment=(),
                            precision="fp32")
    torch.manual_seed(0)
    ours, plain = TinyNet(), TinyNet()
    plain.load_state_dict(ours.state_dict())
    ours = ours.to(memory_format=torch.channels_last)
    images, labels = torch.as_tensor(toy.train.images), torch.as_tensor(toy.train.labels)
    prep, optimizer = medssl.preprocessing_for(config, toy, "random"), None
    optimizer = medssl.make_optimizer(ours, config)
    for epoch in range(3):
        medssl.train_one_epoch(ours, images, labels, optimizer, config, prep, epoch=epoch, seed=5)

    ready = (images[:, None].repeat(1, 3, 1, 1) / 255 - 0.3) / 0.2
    of_head = {"params": plain.fc.parameters(), "lr": 1e-3}
    backbone = {"params": [p for n, p in plain.named_parameters() if n[:2] != "fc"], "lr": 0.0}
    adam = torch.optim.AdamW([of_head, backbone], weight_decay=1e-4, fused=False)
    step = 0
    for epoch in range(3):
        plain.train(epoch > 0)
        for name, parameter in plain.named_parameters():
            parameter.requires_grad = epoch > 0 or name.startswith("fc")
        for index in medssl._batches(len(labels), 8, medssl._rng(5, epoch)):
            of_head, backbone = adam.param_groups
            of_head["lr"] = 1e-3 * (1 if step < 1 else 0.5 * (1 + np.cos(np.pi * (step - 1) / 8)))
            backbone["lr"] = of_head["lr"] / 10
            adam.zero_grad()
            F.cross_entropy(plain(ready[index]), labels[index]).backward()
            adam.step()
            step += 1
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_bf16_scores_as_fp32_does(backbone, toy, tmp_path):
    """Within 0.02 of every probability of the test set, after three epochs."""
    scores = {precision: run_quick(
        backbone, toy, tmp_path, dataclasses.replace(QUICK, precision=precision)
    ).predictions["scores"] for precision in ("fp32", "bf16")}
    difference = np.abs(scores["bf16"] - scores["fp32"]).max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("major, expected", [(7, "fp32"), (8, "bf16")])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_fp32(monkeypatch, major, expected):
    """Compute capability 7.5 is Colab's T4; PyTorch says that it supports bfloat16."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: types.SimpleNamespace(major=major, minor=5))
    assert medssl._precision(FineTuneConfig(), torch.device("cuda")) == expected


def test_the_precision_is_that_of_the_gpu_asked_for_not_of_the_current_one(monkeypatch):
    """An old card is the first of a machine's two."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(
        major=9 if torch.device(device).index == 1 else 7, minor=0))
    assert [medssl._precision(FineTuneConfig(), torch.device(f"cuda:{k}")) for k in (0, 1)] == [
        "fp32", "bf16"]


@pytest.mark.parametrize("precision, tf32", [("fp32", False), ("tf32", True)])
def test_a_gpu_is_told_to_repeat_itself_in_the_precision_asked_for_backwards_too(
        toy, precision, tf32):
    cudnn, told = torch.backends.cudnn, []
    config = dataclasses.replace(QUICK, precision=precision)

    def note(*_):
        told.append((cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32,
                     torch.backends.cuda.matmul.allow_tf32))

    net = TinyNet()
    net.conv2.register_forward_hook(note)
    net.conv2.register_full_backward_hook(note)
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    images, labels = torch.as_tensor(toy.train.images), torch.as_tensor(toy.train.labels)
    medssl.train_one_epoch(
        net, images, labels, medssl.make_optimizer(net, config), config,
        medssl.preprocessing_for(config, toy, "random"), epoch=0, seed=0)
    assert told == [(True, False, tf32, tf32)] * 6  # three steps, forward and backward
    assert before == (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_float32_mode_that_was_set_in_pytorchs_newer_way_is_no_error_and_stays(toy, precision):
    """PyTorch raises one where the older switches are asked then."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    modes = matmul, cudnn.conv, cudnn.rnn
    before, told = [mode.fp32_precision for mode in modes], []
    net = TinyNet()
    net.conv2.register_forward_hook(lambda *_: told.append(
        ([mode.fp32_precision for mode in modes], matmul.allow_tf32, cudnn.allow_tf32)))
    try:
        matmul.fp32_precision, cudnn.conv.fp32_precision = "tf32", "ieee"
        medssl.predict(net, toy.val.images, medssl.preprocessing_for(QUICK, toy, "random"),
                       precision=precision)
        assert [mode.fp32_precision for mode in modes] == ["tf32", "ieee", "tf32"]
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = False, True  # PyTorch's defaults
        for mode, old in zip(modes, before):
            mode.fp32_precision = old
    tf32 = precision != "fp32"
    assert told == [(["tf32" if tf32 else "ieee"] * 3, tf32, tf32)]


def train_tiny(toy, config, kept=None) -> dict[str, torch.Tensor]:
    """Train as `fine_tune` does and return the weights."""
    torch.manual_seed(0)
    net = TinyNet().to(memory_format=torch.channels_last)
    images, labels = torch.as_tensor(toy.train.images), torch.as_tensor(toy.train.labels)
    optimizer, kept = medssl.make_optimizer(net, config), {} if kept is None else kept
    prep = medssl.preprocessing_for(config, toy, "random")
    for epoch in range(config.epochs):
        medssl.train_one_epoch(net, images, labels, optimizer, config, prep, epoch=epoch, seed=5,
                               kept=kept)
    return net.state_dict()


@pytest.mark.parametrize("recipe, change", [
    ("recommended", {"augment": ("flip_lr", "affine"), "class_weights": True}),
    ("recommended", {"accumulate": 2}), ("paper", {})])
def test_a_recorded_step_gives_the_bits_of_a_plain_one(toy, monkeypatch, recipe, change):
    """Across phases, schedule and batches of two sizes; the graph is acted out on the CPU."""
    config = FineTuneConfig.named(recipe, epochs=6, freeze_epochs=1, batch_size=7,
                                  image_size=SIZE, precision="fp32", **change)
    plain = train_tiny(toy, config)
    fake_cuda_graph.install(monkeypatch.setattr)
    recorded = train_tiny(toy, dataclasses.replace(config, cuda_graph=True))
    # 24 images: 3 batches of 7 and one of 3 an epoch; three steps of each size come first
    assert [graph.replays for graph in fake_cuda_graph.Graph.made] == [5 * 3 - 3, 5 - 3]
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)


def test_a_recorded_run_that_is_interrupted_goes_on_to_the_same_bits(toy, tmp_path, monkeypatch):
    """Its steps are recorded again, later than in the run that nothing interrupted."""
    config = FineTuneConfig(epochs=8, freeze_epochs=1, batch_size=7, image_size=SIZE,
                            precision="fp32", cuda_graph=True)
    prep, epoch = medssl.preprocessing_for(config, toy, "random"), medssl.train_one_epoch
    fake_cuda_graph.install(monkeypatch.setattr)
    monkeypatch.setattr(medssl, "RESUME_SECONDS", 0.0)

    def train(folder):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        net = TinyNet()
        rows = medssl._train(net, toy.train, toy.val, config, prep, 0, folder,
                             medssl.Progress("none", 1, ""))
        return net.state_dict(), [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    def interrupted(*args, **options):
        if options["epoch"] == 5:
            raise KeyboardInterrupt
        return epoch(*args, **options)

    whole, rows = train(tmp_path / "whole")
    monkeypatch.setattr(medssl, "train_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken")
    monkeypatch.setattr(medssl, "train_one_epoch", epoch)
    again, rows_again = train(tmp_path / "broken")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert rows == rows_again


def test_a_step_is_recorded_on_a_stream_of_its_own_gpu(toy, monkeypatch):
    """PyTorch's own stream for recording stays on the GPU that first used it in this process."""
    fake_cuda_graph.install(monkeypatch.setattr)
    train_tiny(toy, dataclasses.replace(QUICK, epochs=4, cuda_graph=True))
    graph, = fake_cuda_graph.Graph.made
    assert isinstance(graph.stream, fake_cuda_graph.Stream)


def test_steps_of_a_phase_that_is_over_are_let_go(toy, monkeypatch):
    """On a GPU each recorded step holds the memory of a whole pass."""
    fake_cuda_graph.install(monkeypatch.setattr)
    kept = {}
    train_tiny(toy, FineTuneConfig.named("paper", epochs=3, freeze_epochs=2, batch_size=7,
                                         image_size=SIZE, cuda_graph=True), kept)
    assert sorted(kept) == [("all", 3), ("all", 7)]


def test_a_recorded_run_needs_a_gpu(backbone, toy, tmp_path):
    with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA GPU, and this run is on"):
        run_quick(backbone, toy, tmp_path, dataclasses.replace(QUICK, cuda_graph=True))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def compiler(monkeypatch):
    """Counts what is compiled; without the slow last stage, which `bench/step.py` runs."""
    counter, whole = CompileCounterWithBackend("aot_eager"), torch.compile

    def compile(model, *, options, **given):
        assert options.keys() <= set(torch._inductor.list_options())  # of that last stage
        counter.options = options
        return whole(model, backend=counter, **given)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compile)
    return counter


def test_a_compiled_step_trains_alike_and_a_warm_process_compiles_once(toy, compiler):
    config = FineTuneConfig(epochs=3, freeze_epochs=1, batch_size=7, image_size=SIZE,
                            precision="fp32")
    plain = train_tiny(toy, config)
    for _ in range(3):  # runs
        compiled = train_tiny(toy, dataclasses.replace(config, compile=True))
        assert compiler.frame_count == 2  # with a frozen backbone, and without
    for name in plain:
        torch.testing.assert_close(plain[name], compiled[name], rtol=1e-5, atol=1e-6, msg=name)


def test_compiled_kernels_are_picked_without_timing_them(toy, compiler):
    """Timing would pick others in another process, which round differently."""
    train_tiny(toy, dataclasses.replace(QUICK, epochs=1, compile=True))
    assert compiler.options == {"deterministic": True}


def test_a_warm_process_compiles_as_many_shapes_as_a_study_has(toy, compiler):
    """PyTorch's own limit of 8 would stop the study at the ninth."""
    for size in range(4, 14):
        train_tiny(toy, dataclasses.replace(QUICK, epochs=1, batch_size=size, compile=True))
    assert compiler.frame_count == 10


def test_a_set_smaller_than_a_batch_is_not_worth_compiling(toy, compiler):
    train_tiny(toy, dataclasses.replace(QUICK, epochs=2, batch_size=25, compile=True))
    assert compiler.frame_count == 0


class Copies(TorchDispatchMode):
    """Counts what goes from the processor to a GPU."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        given = [a for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
        self.count += bool(given) and isinstance(made, torch.Tensor) and (
            made.device.type == "cuda" and any(a.device.type == "cpu" and a.ndim for a in given))
        return made


@pytest.mark.parametrize("images, graph", [(24, False), (96, False), (96, True)])
def test_no_step_copies_to_the_gpu_or_reads_from_it(images, graph, monkeypatch):
    """On tensors without numbers, which need no GPU: reading one would be an error."""
    config = FineTuneConfig(epochs=2, freeze_epochs=0, batch_size=8, image_size=SIZE,
                            augment=("flip_ud", "affine"), precision="fp32", cuda_graph=graph)

    def fill(loss):  # the backward pass asks for a real GPU
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", fill)
    monkeypatch.setattr(medssl._Step, "__call__", medssl._Step._take)  # what would be recorded
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        with torch.device("cuda"):
            net = TinyNet()
            pixels = torch.zeros(images, SIZE, SIZE, dtype=torch.uint8)
            labels = torch.zeros(images, dtype=torch.int64)
        optimizer = medssl.make_optimizer(net, config)
        if graph:  # its kernel for rates on the GPU works with numbers only
            monkeypatch.setattr(optimizer, "step", lambda: None)
        prep, steps = medssl.Preprocessing((0.3,) * 3, (0.2,) * 3, SIZE), []
        with pytest.raises(DynamicOutputShapeException):  # the losses, read at the epoch's end
            medssl.train_one_epoch(net, pixels, labels, optimizer, config, prep, epoch=1, seed=0,
                                   tick=lambda n: steps.append(copies.count))
    assert len(steps) == images // 8
    # order and random numbers (a graph: rates too) are there before the first step
    assert set(steps) == {3 if graph else 2}


def test_recommended_recipe_freezes_the_backbone_and_its_batchnorm():
    config = FineTuneConfig()
    model = TinyNet()
    medssl.set_phase(model, medssl.phase_of(config, 0))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["fc.weight", "fc.bias"]
    assert not model.bn1.training


def test_warm_up_rises_and_cosine_ends_near_zero():
    config = FineTuneConfig()
    factors = [medssl.lr_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == sorted(factors[:10]) and factors[9] == 1
    assert factors[99] < 0.01 and max(factors) == 1


def test_each_default_of_the_recommended_recipe_says_why():
    source = inspect.getsource(FineTuneConfig)
    for field in dataclasses.fields(FineTuneConfig)[1:]:
        line, = re.findall(rf"^    {field.name}: .+ = .+$", source, flags=re.MULTILINE)
        assert re.search(r"  # (literature|convention|measured): .{5}", line), line


@pytest.mark.parametrize("change, words", [
    ({"recipe": "papr"}, "Did you mean 'paper'"),
    ({"epochs": 0}, "epochs must be above 0"),
    ({"select_by": "F1"}, "select_by 'F1' is not known"),
    ({"augment": ("blur",)}, "augment 'blur' is not known"),
    ({"lr": float("nan")}, "lr must be above 0, not nan"),
    ({"lr_candidates": (1e-3, -1)}, "lr_candidates must be above 0"),
    ({"backbone_lr": -1e-4}, r"backbone_lr must lie in \[0, inf\], not -0.0001"),
    ({"epochs": 2.5}, "epochs is 2.5; give one int, such as 50"),
    ({"batch_size": "8"}, "batch_size is '8'; give one int"),
    ({"lr": (1e-3, 1e-4)}, "lr is .*Several values belong in the grid of a study"),
    ({"augment": "affine"}, "augment is 'affine'; give one tuple, such as .'affine',."),
    ({"warmup": 10}, r"warmup must lie in \[0, 1\], not 10"),
])
def test_config_names_a_bad_setting(change, words):
    with pytest.raises(ValueError, match=words):
        FineTuneConfig(**change)


@pytest.mark.parametrize("change", [{"class_weights": True}, {"augment": ("flip_lr",)},
                                    {"lr_candidates": (1e-3, 1e-2)}])
def test_linear_evaluation_refuses_what_it_would_not_do(change):
    """The run folder would else say that the result had it."""
    with pytest.raises(ValueError, match=f"on fixed features, without {next(iter(change))}"):
        FineTuneConfig.named("linear", **change)


@pytest.mark.parametrize("change, short", [({}, False), ({"epochs": 2}, True),
                                           ({"image_size": 64}, True), ({"lr": 1e-2}, False)])
def test_a_run_cut_down_is_short(change, short):
    assert FineTuneConfig.named("paper", **change).short is short


# --- input -------------------------------------------------------------------------------------

def test_enlarging_28_to_224_repeats_each_pixel_8_by_8():
    images = torch.randint(0, 255, (2, 28, 28), dtype=torch.uint8)
    x = medssl.Preprocessing((0.5,) * 3, (0.5,) * 3, 224)(images)
    expected = ((images / 255 - 0.5) / 0.5).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(x, expected[:, None].expand(-1, 3, -1, -1))


def test_colour_images_keep_their_channels():
    images = torch.randint(0, 255, (2, SIZE, SIZE, 3), dtype=torch.uint8)
    x = medssl.Preprocessing((0.0,) * 3, (1.0,) * 3, SIZE)(images)
    torch.testing.assert_close(x, images.permute(0, 3, 1, 2) / 255)


def test_augmentation_follows_its_random_numbers():
    x, draws = torch.rand(4, 3, SIZE, SIZE), torch.rand(4, 6)
    names = ("flip_ud", "flip_lr", "affine")
    once, again = (medssl.augment_batch(x, names, draws) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, x)


def test_affine_augmentation_moves_by_at_most_a_tenth_and_turns_by_at_most_ten_degrees():
    """Its ends, against torchvision's own affine transform on a picture with a soft edge."""
    from torchvision.transforms import functional as transforms

    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    picture = torch.exp(-4 * (x - 0.2) ** 2 - 8 * (y + 0.1) ** 2).expand(1, 3, -1, -1)
    for angle, scale, shift in ((0, 0.5, 0.5), (1, 0.5, 0.5), (0.5, 1, 0.5), (0.5, 0.5, 0)):
        draws = torch.tensor([[0.9, 0.9, angle, scale, shift, shift]])
        moved = medssl.augment_batch(picture, ("affine",), draws)
        expected = transforms.affine(
            picture, angle=(1 - angle * 2) * 10, scale=1 / (0.9 + 0.2 * scale), shear=[0.0],
            translate=[(1 - 2 * shift) * 6.4] * 2,
            interpolation=transforms.InterpolationMode.BILINEAR)
        torch.testing.assert_close(moved[..., 8:-8, 8:-8], expected[..., 8:-8, 8:-8],
                                   atol=1e-5, rtol=0)


def test_a_new_head_follows_its_seed_and_leaves_random_numbers_alone(backbone, monkeypatch):
    """Also those of a GPU, which PyTorch's `manual_seed` sets."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's, too"))
    before = torch.get_rng_state()
    heads = [ADD_HEAD(backbone, 3, seed).fc for seed in (5, 5, 6)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_last_batch_of_one_joins_its_neighbour():
    assert [len(b) for b in medssl._batches(17, 8, medssl._rng(0))] == [8, 9]


# --- options -----------------------------------------------------------------------------------

def test_balanced_class_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0, 0, 0, 1, 1, 2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    found = medssl._class_weights(torch.as_tensor(labels), 3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_accumulated_parts_give_the_gradient_of_the_batch_where_batchnorm_is_frozen(toy):
    """With BatchNorm in evaluation mode, two half batches are the whole batch."""
    whole = FineTuneConfig(image_size=SIZE, epochs=2, freeze_epochs=2, batch_size=8, augment=(),
                           precision="fp32")
    weights = []
    for config in (whole, dataclasses.replace(whole, accumulate=2)):
        torch.manual_seed(0)
        model = TinyNet()
        medssl.train_one_epoch(
            model, torch.as_tensor(toy.train.images), torch.as_tensor(toy.train.labels),
            medssl.make_optimizer(model, config), config,
            medssl.preprocessing_for(config, toy, "random"), epoch=0, seed=0)
        weights.append(model.fc.weight)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_accumulated_parts_give_the_gradient_of_the_batch_with_class_weights_too(toy):
    """The loss of a batch is divided by the weights of its images, that of a part by its own."""
    few = np.flatnonzero((toy.train.labels == 0) | (np.arange(24) < 8))       # 12 + 4 images
    images, labels = (torch.as_tensor(array[few]) for array in (
        toy.train.images, toy.train.labels))
    whole = FineTuneConfig(image_size=SIZE, epochs=2, freeze_epochs=2, batch_size=8, augment=(),
                           precision="fp32", class_weights=True)
    gradients = []
    for parts in 1, 3:
        config = dataclasses.replace(whole, accumulate=parts)
        torch.manual_seed(0)
        model = TinyNet()
        medssl.set_phase(model, medssl.phase_of(config, 0))
        optimizer = medssl.make_optimizer(model, config)
        step = medssl._Step(model, images, labels, optimizer, config,
                            medssl.preprocessing_for(config, toy, "random"), compiled=False)
        loss = step(torch.arange(len(few)), torch.rand(len(few), 6), (0.0, 0.0))
        gradients.append(torch.cat([loss.view(1), model.fc.weight.grad.flatten()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("images, parts", [(7, [3, 2, 2]), (5, [3, 2]), (3, [3]), (2, [2])])
def test_no_part_of_a_batch_is_a_single_image(toy, images, parts, monkeypatch):
    """BatchNorm raises an error where one image is one pixel in the end, as in a ResNet at 32."""
    augment, seen = medssl.augment_batch, []
    monkeypatch.setattr(medssl, "augment_batch", lambda x, *rest: (
        seen.append(len(x)), augment(x, *rest))[1])
    some = toy.train.take(np.arange(images))
    config = dataclasses.replace(QUICK, epochs=1, accumulate=3)
    train_tiny(dataclasses.replace(toy, train=some), config)
    assert seen == parts


def test_a_rate_that_broke_down_leaves_its_memory_to_the_next(
        backbone, toy, tmp_path, monkeypatch, only_small_rates):
    """Its optimizer and, on a GPU, its recorded steps."""
    made, make = [], medssl.make_optimizer

    def watch(*args):
        assert not any(other() for other in made)
        optimizer = make(*args)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(medssl, "make_optimizer", watch)
    config = dataclasses.replace(QUICK, lr_candidates=(0.5, 0.1, 1e-2))
    run_quick(backbone, toy, tmp_path, config)
    assert len(made) == 3


def test_the_rate_is_chosen_on_validation_and_recorded(backbone, toy, tmp_path):
    config = dataclasses.replace(QUICK, lr_candidates=(1e-6, 1e-2))
    run = run_quick(backbone, toy, tmp_path, config)
    assert sorted(run.history["lr_candidate"].unique()) == [1e-6, 1e-2]
    chosen = run.history.loc[run.metrics["best_epoch"]]
    assert chosen["val_AUC"] == run.history["val_AUC"].max()
    assert run.metrics["lr"] == chosen["lr_candidate"]
    assert not list(run.folder.glob("last*"))


@pytest.fixture
def only_small_rates(monkeypatch):
    """Training breaks down in the second epoch of every rate from 0.1 on."""
    epoch = medssl.train_one_epoch

    def fragile(*args, **options):
        loss, bad, batch = epoch(*args, **options)
        broken = args[4].lr >= 0.1 and options["epoch"] == 1
        return loss, 0 if broken else bad, batch

    monkeypatch.setattr(medssl, "train_one_epoch", fragile)


def test_a_rate_at_which_training_breaks_down_loses_the_race(
        backbone, toy, tmp_path, only_small_rates):
    config = dataclasses.replace(QUICK, lr_candidates=(0.5, 1e-2, 0.1))
    run = run_quick(backbone, toy, tmp_path, config, keep_best=False)
    assert run.metrics["lr"] == 1e-2 and run.metrics["lr_not_finite"] == [0.1, 0.5]
    assert list(run.history["lr_candidate"].unique()) == [1e-2]
    assert not list(run.folder.glob("*.safetensors"))


def test_a_race_that_every_rate_loses_says_so(backbone, toy, tmp_path, only_small_rates):
    config = dataclasses.replace(QUICK, lr_candidates=(0.5, 0.1))
    with pytest.raises(medssl.TrainingError, match="Epoch 1: The loss is not finite.*lower lr"):
        run_quick(backbone, toy, tmp_path, config)


# --- the run folder ----------------------------------------------------------------------------

def test_run_folder_holds_what_the_design_names(backbone, toy, tmp_path):
    run = run_quick(backbone, toy, tmp_path, label_fraction=0.5, seed=3, study="s")
    assert run.folder.parent == tmp_path / "s"
    assert run.folder.name.startswith("toy_random_demo_f0.5_s3_")
    files = {p.name for p in run.folder.iterdir()} - {".lock"}
    assert files == {"config.json", "history.csv", "predictions.npz", "best.safetensors",
                     "metrics.json"}
    assert run.config["n_train"] == 12 and run.stamp == "DEMO"
    assert run.metrics["seconds"] > 0 and 0.01 < run.metrics["memory_gb"] < 100
    assert run.predictions["scores"].shape == (16, 2)
    assert list(run.predictions["ids"]) == list(toy.test.ids)
    np.testing.assert_allclose(run.predictions["scores"].sum(1), 1, rtol=1e-5)


def test_run_folder_says_what_precision_auto_meant(backbone, toy, tmp_path, monkeypatch):
    """On another computer it may mean another."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    run = run_quick(backbone, toy, tmp_path)
    assert run.config["precision"] == "auto" and run.config["environment"]["precision"] == "bf16"


def test_asking_again_loads_the_finished_run(backbone, toy, tmp_path):
    first = run_quick(backbone, toy, tmp_path)
    before = (first.folder / "metrics.json").stat().st_mtime_ns
    again = run_quick(backbone, toy, tmp_path)
    assert again.found and not first.found
    assert (again.folder / "metrics.json").stat().st_mtime_ns == before


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(backbone, toy, tmp_path):
    one, two, other = (run_quick(backbone, toy, tmp_path / name, seed=seed)
                       for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert np.array_equal(one.predictions["scores"], two.predictions["scores"])
    assert not np.array_equal(one.predictions["scores"], other.predictions["scores"])


def test_the_backbone_handed_in_is_not_changed(backbone, toy, tmp_path):
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    run_quick(backbone, toy, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_a_whole_number_names_the_same_run(backbone, toy, tmp_path):
    assert run_quick(backbone, toy, tmp_path, label_fraction=1.0).folder == run_quick(
        backbone, toy, tmp_path, label_fraction=1).folder


def test_numbers_of_numpy_name_the_same_run(backbone, toy, tmp_path):
    """A seed of `np.arange` was an error that named neither seed nor setting."""
    numbers = dataclasses.replace(QUICK, epochs=np.int64(3), lr=np.float32(0.5), augment=["affine"])
    plain = dataclasses.replace(QUICK, lr=0.5, augment=("affine",))
    assert run_quick(backbone, toy, tmp_path, numbers, seed=np.int64(1)).folder == run_quick(
        backbone, toy, tmp_path, plain, seed=1).folder


@pytest.mark.parametrize("asked, words", [
    ({"seed": 0.5}, "seed is 0.5; give one int"),
    ({"label_fraction": "all"}, "label_fraction is 'all'; give one float, such as 1.0")])
def test_a_seed_or_share_of_another_type_is_named(backbone, toy, tmp_path, asked, words):
    with pytest.raises(ValueError, match=words):
        run_quick(backbone, toy, tmp_path, **asked)
    assert not list(tmp_path.iterdir())


def test_a_setting_that_changes_the_result_changes_the_folder(backbone, toy, tmp_path):
    a = run_quick(backbone, toy, tmp_path)
    b = run_quick(backbone, toy, tmp_path, dataclasses.replace(QUICK, lr=2e-3))
    assert a.folder != b.folder


def test_best_epoch_is_the_best_on_validation(backbone, toy, tmp_path):
    run = run_quick(backbone, toy, tmp_path)
    best = run.history.loc[run.metrics["best_epoch"]]
    assert best["val_AUC"] == run.history["val_AUC"].max()
    assert run.metrics["val"]["AUC"] == pytest.approx(best["val_AUC"], abs=1e-6)


def test_linear_recipe_leaves_the_backbone_as_it_was(backbone, toy, tmp_path):
    config = FineTuneConfig.named("linear", image_size=SIZE, normalise="dataset")
    run = run_quick(backbone, toy, tmp_path, config)
    saved = load_file(run.folder / "best.safetensors")
    for name, value in backbone.state_dict().items():
        assert torch.equal(saved[name], value)
    assert run.metrics["AUC"] > 0.8


@pytest.mark.parametrize("labels", [np.arange(80) % 2, np.arange(80) % 4, 1 + np.arange(80) % 3])
def test_head_of_a_linear_evaluation_is_scikit_learns_logistic_regression(labels):
    from sklearn.linear_model import LogisticRegression

    features = np.random.default_rng(0).normal(size=(80, 5)) + labels[:, None]
    weight, bias = medssl._logistic(features, labels, 0.1, 4)
    found = torch.as_tensor(features @ weight.T + bias).softmax(1)
    fit = LogisticRegression(C=0.1, max_iter=2000).fit(features, labels)
    np.testing.assert_allclose(found[:, fit.classes_], fit.predict_proba(features), atol=1e-9)
    assert found.sum(1).allclose(found[:, fit.classes_].sum(1))  # no class that wasn't seen


def test_several_labels_get_a_logistic_regression_each():
    from sklearn.linear_model import LogisticRegression

    labels = np.stack([np.arange(80) % 2, np.arange(80) % 3 == 0], 1).astype(int)
    features = np.random.default_rng(0).normal(size=(80, 5)) + labels[:, :1]
    weight, bias = medssl._logistic(features, labels, 0.1, 2)
    found = torch.as_tensor(features @ weight.T + bias).sigmoid()
    for c in range(2):
        fit = LogisticRegression(C=0.1, max_iter=2000).fit(features, labels[:, c])
        np.testing.assert_allclose(found[:, c], fit.predict_proba(features)[:, 1], atol=1e-9)


@pytest.fixture
def passes(monkeypatch):
    """The sizes of the batches that went through a backbone; nothing kept from other tests."""
    sizes, forward = [], TinyNet.forward
    monkeypatch.setattr(medssl, "_kept_features", {})

    def counting(net, x):
        sizes.append(len(x))
        return forward(net, x)

    monkeypatch.setattr(TinyNet, "forward", counting)
    return sizes


LINEAR = FineTuneConfig.named("linear", image_size=SIZE, normalise="dataset")


def test_features_are_computed_once_for_all_fractions_and_seeds(backbone, toy, tmp_path, passes):
    for fraction in (0.25, 0.5, 1.0):
        for seed in (0, 1):
            run_quick(backbone, toy, tmp_path, LINEAR, label_fraction=fraction, seed=seed)
    assert sum(passes) == len(toy.train) + len(toy.val) + len(toy.test)


@pytest.mark.parametrize("config", [LINEAR, QUICK])
def test_a_small_batch_size_makes_evaluation_small_as_well(
        backbone, toy, tmp_path, passes, config):
    """Else the advice to lower it would not help a GPU that cannot hold 256 images."""
    data = dataclasses.replace(toy, test=toy_split(40, "c", 2))
    run_quick(backbone, data, tmp_path / "many", config)
    assert max(passes) == 40
    passes.clear()
    run_quick(backbone, data, tmp_path / "few", dataclasses.replace(config, batch_size=2))
    assert max(passes) == 32


def test_kept_features_give_the_bits_of_new_ones(backbone, toy, tmp_path, passes):
    kept = [run_quick(backbone, toy, tmp_path / "kept", LINEAR, label_fraction=f) for f in (1, 0.5)]
    medssl._kept_features.clear()
    new = run_quick(backbone, toy, tmp_path / "new", LINEAR, label_fraction=0.5)
    assert np.array_equal(new.predictions["scores"], kept[1].predictions["scores"])
    assert new.history.drop(columns="seconds").equals(kept[1].history.drop(columns="seconds"))


def test_another_backbone_other_images_or_another_size_get_their_own_features(
        backbone, toy, tmp_path, passes):
    changed = dataclasses.replace(toy, test=toy.test.take(np.arange(15)))
    other = TinyBackbone()
    for i, asked in enumerate(((backbone, toy, LINEAR), (other, toy, LINEAR),
                               (backbone, changed, LINEAR),
                               (backbone, toy, dataclasses.replace(LINEAR, image_size=40)))):
        model, data, config = asked
        run_quick(model, data, tmp_path / str(i), config)
    assert sum(passes) == 3 * 52 + 51


def test_features_kept_in_memory_are_bounded(toy, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(medssl, "FEATURE_BYTES", 2.5 * 52 * 8192)
    first, second, third = (TinyBackbone() for _ in range(3))
    for i, model in enumerate((first, second, first, third)):  # the second waited longest
        run_quick(model, toy, tmp_path / str(i), LINEAR)
    assert len(medssl._kept_features) == 2 and sum(passes) == 3 * 52
    run_quick(first, toy, tmp_path / "again", LINEAR)
    assert sum(passes) == 3 * 52


# --- tasks -------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", ["demo", "linear"])
def test_several_labels_an_image_are_trained_and_scored_each(backbone, tmp_path, recipe):
    data = make_toy("multi-label")
    config = LINEAR if recipe == "linear" else dataclasses.replace(
        QUICK, epochs=25, lr=1e-2, backbone_lr=1e-2)
    run = run_quick(backbone, data, tmp_path, config)
    labels, scores = run.predictions["labels"], run.predictions["scores"]
    assert labels.shape == scores.shape == (16, 3)
    assert not np.allclose(scores.sum(1), 1)  # a sigmoid each, not a softmax
    expected = F.binary_cross_entropy(torch.tensor(scores), torch.tensor(labels).float())
    assert run.metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    per_label = [medssl.score(labels[:, [c]], scores[:, [c]])["AUC"] for c in range(3)]
    assert run.metrics["AUC"] == pytest.approx(np.mean(per_label))
    assert min(per_label[:2]) > 0.8  # the third finding is not in the picture
    assert run.metrics["ACC"] == pytest.approx(((scores > 0.5) == labels).mean())
    assert run.metrics["threshold"] is None and run.metrics["balanced ACC"] is None


def test_a_label_that_validation_never_has_is_refused_before_training(backbone, tmp_path):
    data = make_toy("multi-label")
    labels = data.val.labels * [1, 1, 0]
    data = dataclasses.replace(data, val=dataclasses.replace(data.val, labels=labels))
    with pytest.raises(ValueError, match="no image of severe"):
        run_quick(backbone, data, tmp_path)
    assert not list(tmp_path.iterdir())


def test_ordered_classes_are_trained_and_scored_as_classes(backbone, tmp_path):
    """As MedMNIST does with RetinaMNIST."""
    run = run_quick(backbone, make_toy("ordinal"), tmp_path)
    assert run.predictions["scores"].shape == (16, 4)
    np.testing.assert_allclose(run.predictions["scores"].sum(1), 1, rtol=1e-5)
    assert run.metrics["F1 paper"] == pytest.approx(run.metrics["ACC"])  # micro


# --- bad luck ----------------------------------------------------------------------------------

@pytest.mark.parametrize("fraction", [0, 2, -0.1])
def test_impossible_label_fraction_leaves_nothing_behind(backbone, toy, tmp_path, fraction):
    with pytest.raises(ValueError, match="label_fraction"):
        run_quick(backbone, toy, tmp_path, label_fraction=fraction)
    assert not list(tmp_path.iterdir())


def test_a_class_missing_from_validation_is_refused_before_training(backbone, toy, tmp_path):
    one_class = toy.val.take(np.flatnonzero(toy.val.labels == 0))
    with pytest.raises(ValueError, match="no image of lesion"):
        run_quick(backbone, dataclasses.replace(toy, val=one_class), tmp_path)
    assert not list(tmp_path.iterdir())


def test_not_finite_pixels_are_refused_before_training(backbone, toy, tmp_path):
    images = toy.train.images.astype(np.float32)
    images[5] = np.nan
    broken = dataclasses.replace(toy, train=dataclasses.replace(toy.train, images=images))
    with pytest.raises(ValueError, match="not fit for training"):
        run_quick(backbone, broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_loss_that_is_not_finite_names_epoch_step_and_images(
        backbone, toy, tmp_path, monkeypatch):
    """An image turns bad in the second epoch; the first epoch's weights are kept."""
    augment = medssl.augment_batch
    calls = []

    def spoil(x, names, rng):
        calls.append(1)
        return augment(x, names, rng) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(medssl, "augment_batch", spoil)
    with pytest.raises(medssl.TrainingError, match=r"Epoch 1: .* step 1, on images a\d+, a"):
        run_quick(backbone, toy, tmp_path)
    assert not list(tmp_path.rglob("metrics.json"))
    kept = load_file(next(tmp_path.rglob("best.safetensors")))
    assert all(torch.isfinite(v).all() for v in kept.values())


def test_a_last_step_that_breaks_the_weights_is_named(backbone, toy, tmp_path):
    """One step an epoch: its loss was still finite, and validation is the first to notice."""
    config = dataclasses.replace(QUICK, batch_size=24, lr=1e38, backbone_lr=1e38)
    with pytest.raises(medssl.TrainingError, match="Epoch 0: .*not finite for 12 of 12 images held"
                                                   " out: b0, b1.*lower lr"):
        run_quick(backbone, toy, tmp_path, config)
    assert not list(tmp_path.rglob("metrics.json"))


def test_full_disk_keeps_the_older_resume_file_and_the_next_run_completes(
        backbone, toy, tmp_path, monkeypatch):
    whole, save, calls = run_quick(backbone, toy, tmp_path / "whole"), torch.save, []

    def full(state, path):
        calls.append(1)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(medssl, "RESUME_SECONDS", 0.0)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(medssl.TrainingError, match="No space left.*The one before it is intact"):
        run_quick(backbone, toy, tmp_path / "full")
    names = [p.name for p in (tmp_path / "full").rglob("*") if p.is_file() and p.name != ".lock"]
    assert sorted(names) == ["config.json", "last.pt"]
    again = run_quick(backbone, toy, tmp_path / "full")
    assert np.array_equal(again.predictions["scores"], whole.predictions["scores"])


def test_a_damaged_resume_file_is_named(backbone, toy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(medssl, "evaluate", lambda *_, **__: 1 / 0)
        run_quick(backbone, toy, tmp_path)
    folder, = tmp_path.glob("study/*")
    (folder / "last.pt").write_bytes(b"PK\3\4 cut")
    with pytest.raises(medssl.TrainingError, match=r"last\.pt is damaged .*Delete it and run"):
        run_quick(backbone, toy, tmp_path)


def test_a_disk_that_fails_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error", "last.pt")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Input/output error: 'last.pt'"):
        medssl._read_resume(tmp_path / "last.pt", torch.device("cpu"))


def test_out_of_memory_says_what_to_lower(backbone, toy, tmp_path, monkeypatch):
    def hungry(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(medssl, "augment_batch", hungry)
    with pytest.raises(medssl.TrainingError, match="Lower batch_size.*accumulate=2"):
        run_quick(backbone, toy, tmp_path)


def test_out_of_memory_while_a_step_is_recorded_says_so_too(backbone, toy, tmp_path, monkeypatch):
    """What ends the recording then fails as well, for a reason of its own."""
    def hungry(*args):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")

    monkeypatch.setattr(medssl, "augment_batch", hungry)
    with pytest.raises(medssl.TrainingError, match="Out of memory with batch_size 8"):
        run_quick(backbone, toy, tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError("out of memory")])
def test_a_run_that_stopped_holds_no_memory_though_its_error_is_kept(
        backbone, toy, tmp_path, monkeypatch, error):
    """A notebook keeps its last error, and with it the variables of all calls in between: the next
    try, with a smaller batch, would not find the memory of this one."""
    held = []

    def stop(x, *_):
        held.append(weakref.ref(x))
        raise error

    monkeypatch.setattr(medssl, "augment_batch", stop)
    with pytest.raises((KeyboardInterrupt, medssl.TrainingError)) as kept:
        run_quick(backbone, toy, tmp_path)
    assert kept.value.__traceback__ is not None and held[0]() is None


def test_an_illegal_memory_access_is_not_called_a_lack_of_memory(
        backbone, toy, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(medssl, "augment_batch", broken)
    with pytest.raises(RuntimeError, match="^CUDA error: an illegal memory access"):
        run_quick(backbone, toy, tmp_path)


def test_interrupt_says_how_to_go_on(backbone, toy, tmp_path, monkeypatch, capsys):
    epoch, calls = medssl.train_one_epoch, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return epoch(*args, **options)

    whole = run_quick(backbone, toy, tmp_path / "whole")
    monkeypatch.setattr(medssl, "RESUME_SECONDS", 0.0)
    monkeypatch.setattr(medssl, "train_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_quick(backbone, toy, tmp_path / "a")
    assert "goes on from its last saved epoch" in capsys.readouterr().out
    again = run_quick(backbone, toy, tmp_path / "a")
    assert np.array_equal(again.predictions["scores"], whole.predictions["scores"])


def test_a_run_that_was_interrupted_counts_the_time_of_all_its_epochs(
        backbone, toy, tmp_path, monkeypatch):
    whole, save = run_quick(backbone, toy, tmp_path / "whole"), torch.save

    def interrupted(state, path):
        for row in state["history"]:
            row["seconds"] = 1000.0
        save(state, path)
        path.replace(path.parent / "last.pt")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(medssl, "RESUME_SECONDS", 0.0)
        patch.setattr(torch, "save", interrupted)
        run_quick(backbone, toy, tmp_path / "a")
    again = run_quick(backbone, toy, tmp_path / "a")
    assert whole.metrics["seconds"] < 1000 < again.metrics["train_seconds"]
    assert again.metrics["seconds"] > again.metrics["train_seconds"]


def test_two_processes_never_write_one_folder(backbone, toy, tmp_path):
    run = run_quick(backbone, toy, tmp_path)
    (run.folder / "metrics.json").unlink()
    with medssl._sole_writer(run.folder):
        with pytest.raises(medssl.TrainingError, match="Another process is writing"):
            run_quick(backbone, toy, tmp_path)


def test_unknown_device_is_named(backbone, toy, tmp_path):
    with pytest.raises(ValueError, match="device 'gpu' is not here"):
        fine_tune(backbone, REPORT, toy, QUICK, runs_dir=tmp_path, device="gpu")


def test_a_gpu_that_is_not_there_is_named_and_nothing_is_written(
        backbone, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device 'cuda:2' is not here.*cuda:0, cuda:1, cpu"):
        fine_tune(backbone, REPORT, toy, QUICK, runs_dir=tmp_path, device="cuda:2")
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_not_read_as_a_result(backbone, toy, tmp_path):
    run = run_quick(backbone, toy, tmp_path)
    (run.folder / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="not finished"):
        medssl.load_run(run.folder)
    assert list(medssl.load_runs(tmp_path)["status"]) == ["unfinished"]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch, medssl_utils as medssl, test_training as t
medssl.RESUME_SECONDS = 0.0
medssl.add_head = lambda model, n, seed: (torch.manual_seed(seed), t.TinyNet())[1]
moment, count = sys.argv[1], int(sys.argv[2])
calls = {{"train": 0, "save": 0}}
train, save = medssl.train_one_epoch, torch.save
def dying_train(*a, **k):
    calls["train"] += 1
    if moment == "epoch" and calls["train"] == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(*a, **k)
def dying_save(state, path):
    calls["save"] += 1
    if moment == "save" and calls["save"] == count:
        with open(path, "wb") as file:
            file.write(b"half a file")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return save(state, path)
medssl.train_one_epoch, torch.save = dying_train, dying_save
torch.manual_seed(1)
config = medssl.FineTuneConfig.named("demo", image_size=t.SIZE, epochs=4, batch_size=8)
medssl.fine_tune(t.TinyBackbone(), t.REPORT, t.make_toy(), config, runs_dir=sys.argv[3], device="cpu",
                 progress="none")
"""


def run_in_process(folder, moment="never", count=0) -> subprocess.CompletedProcess:
    here = medssl.Path(__file__).parent
    script = KILLED.format(tests=str(here), root=str(here.parent))
    return subprocess.run([sys.executable, "-c", script, moment, str(count), str(folder)],
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The final weights of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run_in_process(folder).returncode == 0
    return load_file(next(folder.rglob("best.safetensors")))


@pytest.mark.parametrize("moment, count", [("epoch", 1), ("epoch", 3), ("save", 1), ("save", 2)])
def test_killed_and_run_again_gives_the_bits_of_an_unbroken_run(
        tmp_path, unbroken, moment, count):
    assert run_in_process(tmp_path, moment, count).returncode == -signal.SIGKILL
    assert not list(tmp_path.rglob("metrics.json"))
    result = run_in_process(tmp_path)
    assert result.returncode == 0, result.stderr
    weights = load_file(next(tmp_path.rglob("best.safetensors")))
    assert all(torch.equal(weights[k], unbroken[k]) for k in unbroken)
    assert not list(tmp_path.rglob("last.pt")) and not list(tmp_path.rglob("*.tmp"))


# --- progress ----------------------------------------------------------------------------------

def test_unattended_progress_is_a_line_an_epoch(backbone, toy, tmp_path, capsys):
    fine_tune(backbone, REPORT, toy, QUICK, runs_dir=tmp_path, device="cpu")
    out = capsys.readouterr()
    assert [line[:10] for line in out.out.splitlines()] == [f"epoch   {i}:" for i in range(3)]
    assert "val_AUC" in out.out and out.err == ""


def test_progress_bar_counts_images_and_shows_the_validation_score(
        backbone, toy, tmp_path, capsys):
    fine_tune(backbone, REPORT, toy, QUICK, runs_dir=tmp_path, device="cpu", progress="bar")
    out = capsys.readouterr()
    assert "72/72" in out.err and "img/s" in out.err and "val_AUC" in out.err and out.out == ""


def test_the_bar_of_a_run_that_stopped_is_closed(backbone, toy, tmp_path, monkeypatch):
    """Else the bar of the next run stands below it, and both are drawn anew for ever."""
    bars, make = [], medssl.tqdm
    monkeypatch.setattr(medssl, "tqdm", lambda **given: bars.append(make(**given)) or bars[-1])
    monkeypatch.setattr(medssl, "train_one_epoch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fine_tune(backbone, REPORT, toy, QUICK, runs_dir=tmp_path, device="cpu", progress="bar")
    assert bars[0] not in make._instances


def test_a_watched_notebook_gets_one_curve_that_is_redrawn(monkeypatch):
    import IPython.display

    drawn = []
    handle = types.SimpleNamespace(update=lambda figure: drawn.append(("again", figure)))

    def display(figure, display_id):
        drawn.append(("first", figure))
        return handle

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(medssl, "_kernel", lambda: types.SimpleNamespace(_allow_stdin=True))
    shown = medssl.Progress("auto", 4, "toy")
    row = {"epoch": 0, "train_loss": 1.0, "val_loss": 1.0, "val_AUC": 0.5, "val_ACC": 0.5,
           "seconds": 1.0}
    shown.epoch([row])
    shown.epoch([row, {**row, "epoch": 1}])
    shown.bar.close()
    assert [kind for kind, _ in drawn] == ["first", "again"]
    assert len(drawn[1][1].axes[0].lines[0].get_xdata()) == 2
