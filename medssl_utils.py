"""Helpers that the workbook's notebooks share: one file, to be read from top to bottom.

Sections, in reading order:
    Checkpoints   download, open safely, match to a ResNet50, report the keys, convert
    Data          data sets by name, label subsets, checks before anything is trained
    Training      recipes, the loop, the run folder
    Evaluation    scores with their definitions
    Results       finished runs as one table, methods compared
    Study         a grid of settings, run one after another or by an executor
    Figures       plots that return the matplotlib figure
    Demo          stand-in checkpoints and phantom slices, so that nothing needs a download
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchvision
from filelock import FileLock, Timeout
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

__all__ = [
    # Checkpoints
    "CHECKPOINTS", "METHODS", "CONTROLS", "CheckpointError", "KeyReport",
    "download_checkpoint", "load_state_dict", "load_backbone", "export_backbone",
    # Data
    "DATASETS", "Split", "DataSplits", "load_data", "label_subset", "check_splits",
    # Training
    "FineTuneConfig", "Preprocessing", "Run", "TrainingError", "fine_tune", "load_run",
    "train_one_epoch", "evaluate", "predict",
    # Evaluation
    "score", "bootstrap_interval",
    # Results
    "load_runs", "compare_methods",
    # Study
    "run_study",
    # Figures
    "plot_images", "plot_history", "plot_confusion", "plot_label_fractions",
    # Demo
    "write_demo_checkpoint", "demo_data",
]


def _choose(value: str, options: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `options`; else raise ValueError with the nearest name."""
    options = list(options)
    if value in options:
        return value
    near = difflib.get_close_matches(str(value).lower(), [o.lower() for o in options], n=1)
    hint = next((f" Did you mean {o!r}?" for o in options if near and o.lower() == near[0]), "")
    raise ValueError(f"{what} {value!r} is not known.{hint} Choose one of: {', '.join(options)}.")


@contextlib.contextmanager
def _atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _sha256(path: str | Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# =============================================================================
# Checkpoints
# =============================================================================


class CheckpointError(ValueError):
    """A checkpoint that could not be fetched, opened, or matched; says what to do next."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of one published checkpoint (Wolf et al. 2023, authors' README and code).

    Attributes:
        method: the name it is selected by.
        drive_id: Google Drive file id.
        filename: the name it is kept under.
        wrapper: key of the outer dictionary that holds the tensors.
        prefix: what stands before each backbone key ("" for none).
        groups: auxiliary key prefix -> what those tensors are; all of them are left out.
        snippet_unexpected: number of unexpected keys that the authors' README snippet reports.
        mean, std: intensity statistics of the pre-training input, per channel, in [0, 1].
    """

    method: str
    drive_id: str
    filename: str
    wrapper: str
    prefix: str
    groups: Mapping[str, str]
    snippet_unexpected: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def url(self) -> str:
        """The download link of the authors' README."""
        return f"https://drive.google.com/uc?export=download&id={self.drive_id}"


LIDC_MEAN, LIDC_STD = (0.1806,) * 3, (0.1907,) * 3
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CHECKPOINTS: dict[str, Checkpoint] = {
    "BYOL": Checkpoint(
        "BYOL", "1eBZYl1rXkKJxz42Wu75uzb1kLg8FTv1H", "byol_resnet50.ckpt",
        "state_dict", "online_network.encoder.",
        {
            "online_network.projector.": "projector of the online network",
            "online_network.predictor.": "predictor of the online network",
            "target_network.encoder.": "momentum (target) encoder",
            "target_network.projector.": "projector of the target network",
            "target_network.predictor.": "predictor of the target network",
        },
        (350,), LIDC_MEAN, LIDC_STD,
    ),
    "SwAV": Checkpoint(
        "SwAV", "11OWRzifq_BXrcFMZ13H0HwS4UGcaiAn_", "swav_resnet50.ckpt",
        "state_dict", "model.",
        {
            "model.projection_head.": "projection head for the online clustering",
            "model.prototypes.": "prototypes (cluster centres)",
        },
        (10,), LIDC_MEAN, LIDC_STD,
    ),
    "MoCo": Checkpoint(
        "MoCo", "1hUr_6XdYxjB66ZYEGTqE7b8I88IN9a1l", "moco_v2_resnet50.ckpt",
        "state_dict", "encoder_q.",
        {
            "encoder_q.fc.": "contrastive head of the query encoder",
            "encoder_k.": "momentum (key) encoder",
            "queue": "queue of negative keys",
            "queue_ptr": "position in the queue",
            "val_queue": "queue of negative keys for validation",
            "val_queue_ptr": "position in the validation queue",
        },
        (330,), LIDC_MEAN, LIDC_STD,
    ),
    "SparK": Checkpoint(
        "SparK", "1kYFS67jH9s8kAmhNyf5wlRj_Gh9vTK_H", "spark_resnet50.pth",
        "module", "",
        {},
        (0,), IMAGENET_MEAN, IMAGENET_STD,
    ),
}
METHODS = tuple(CHECKPOINTS)
CONTROLS = ("random", "ImageNet")

# =============================================================================
# Data
# =============================================================================


@dataclass(frozen=True)
class Split:
    """One part of a data set, in memory.

    Attributes:
        images: (N, H, W) grey or (N, H, W, 3) RGB; uint8 0..255, or float32 in the same range.
        labels: (N,) int64 class indices.
        ids: (N,) str, unique within the data set (file name or index).
        groups: (N,) str patient ids, "" where unknown; None if the data set has none.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Split:
        """Return the images at `index` as a new Split."""
        groups = None if self.groups is None else self.groups[index]
        return Split(self.images[index], self.labels[index], self.ids[index], groups)


@dataclass(frozen=True)
class DataSplits:
    """A data set as the training code sees it.

    Attributes:
        name: the name it was asked for by.
        train, val, test: disjoint `Split`s.
        class_names: C names; label i is class_names[i].
        mean, std: per-channel intensity statistics for normalising, in units of [0, 1].
        source: one line: where it came from, its licence.
        demo: True for procedural images, whose results are stamped DEMO.
        notes: facts the reader should know (excluded files, known overlaps).
    """

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    demo: bool = False
    notes: tuple[str, ...] = ()


# =============================================================================
# Training
# =============================================================================

RECIPES = ("recommended", "paper", "linear", "demo")
RESUME_SECONDS = 60.0  # a run writes its resume file at most this often


@dataclass(frozen=True)
class FineTuneConfig:
    """How a backbone is fine-tuned. `FineTuneConfig()` is the recipe that we recommend.

    Attributes:
        recipe: one of RECIPES; the others come from `FineTuneConfig.named`.
        image_size: side of the square that the network sees, in pixels.
        epochs: passes over the labelled images.
        batch_size: images per step.
        lr: peak learning rate of the head.
        backbone_lr: peak learning rate of the backbone.
        weight_decay: coefficient; decoupled (AdamW) unless `l2` puts it into the gradient (Adam).
        freeze_epochs: epochs in which only the head trains and BatchNorm keeps its statistics.
        warmup: share of the steps over which the rate rises linearly, in [0, 1].
        schedule: "cosine" to zero, "constant", or "authors" (see `paper`).
        augment: names among "flip_ud", "flip_lr" (p = 0.5) and "affine" (+-10 degrees, +-10 %).
        select_by: validation score that picks the best epoch: "ACC", "AUC" or "loss".
        normalise: "dataset" or "checkpoint": whose mean and std are used.
        subset_rule: "stratified" or "authors", see `label_subset`.
        precision: "fp32", "tf32", "bf16", or "auto" (bf16 on a CUDA device that has it).
    """

    recipe: str = "recommended"
    image_size: int = 224
    epochs: int = 50
    batch_size: int = 32
    lr: float = 1e-3
    backbone_lr: float = 1e-4
    weight_decay: float = 1e-4
    l2: bool = False
    freeze_epochs: int = 5
    warmup: float = 0.1
    schedule: str = "cosine"
    augment: tuple[str, ...] = ("affine",)
    select_by: str = "AUC"
    normalise: str = "checkpoint"
    subset_rule: str = "stratified"
    precision: str = "auto"

    def __post_init__(self) -> None:
        _choose(self.recipe, RECIPES, "recipe")
        _choose(self.schedule, ("cosine", "constant", "authors"), "schedule")
        _choose(self.select_by, ("ACC", "AUC", "loss"), "select_by")
        _choose(self.normalise, ("dataset", "checkpoint"), "normalise")
        _choose(self.precision, ("auto", "fp32", "tf32", "bf16"), "precision")
        for name in self.augment:
            _choose(name, ("flip_ud", "flip_lr", "affine"), "augment")
        for name in ("image_size", "epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")

    @classmethod
    def named(cls, recipe: str, dataset: str = "", **changes: Any) -> FineTuneConfig:
        """Return the recipe called `recipe`, with `changes` to single fields."""
        _choose(recipe, RECIPES, "recipe")
        build = {"recommended": cls, "linear": cls.linear, "demo": cls.demo}
        config = cls.paper(dataset) if recipe == "paper" else build[recipe]()
        return dataclasses.replace(config, **changes)

    @classmethod
    def paper(cls, task: str = "covid_ct") -> FineTuneConfig:
        """Return what the authors' notebooks really do, faults included.

        Adam with L2 5e-4, batch 64, 70 epochs, fp32, best epoch by validation accuracy. Their
        freezing callback acts on an optimizer that already owns every parameter, so epochs 0-9
        train the head and all BatchNorm parameters at 1e-4, epoch 10 everything at 1e-4 and
        epochs 11-69 everything at 2e-5.

        Args:
            task: data set name; OrganSMNIST has no augmentation, all others the flip of COVID-CT.
        """
        flip = () if task.startswith("organ") else ("flip_ud",)
        return cls(
            recipe="paper", epochs=70, batch_size=64, lr=1e-4, backbone_lr=1e-4,
            weight_decay=5e-4, l2=True, freeze_epochs=10, warmup=0.0, schedule="authors",
            augment=flip, select_by="ACC", normalise="dataset", subset_rule="authors",
            precision="fp32",
        )

    @classmethod
    def linear(cls) -> FineTuneConfig:
        """Return linear evaluation: features once, then a logistic regression on them."""
        return cls(recipe="linear", augment=(), freeze_epochs=50, precision="fp32")

    @classmethod
    def demo(cls) -> FineTuneConfig:
        """Return a recipe that learns the phantoms from scratch on a CPU in seconds."""
        return cls(
            recipe="demo", image_size=64, epochs=5, batch_size=16, lr=1e-3, backbone_lr=1e-3,
            freeze_epochs=0, warmup=0.1, augment=(), normalise="dataset", precision="fp32",
        )

    @property
    def short(self) -> bool:
        """True if this is shorter or smaller than the recipe that it names."""
        full = FineTuneConfig.named(self.recipe)
        return self.epochs < full.epochs or self.image_size < full.image_size


@dataclass(frozen=True)
class Preprocessing:
    """What happens to raw images before the network: expand, normalise, resize, in this order.

    The order and the `area` resize are those of the authors' notebooks (MONAI `Resize`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Turn (N, H, W) or (N, H, W, 3), 0..255, into float32 (N, 3, S, S)."""
        x = images.float().div(255)
        x = x.unsqueeze(1).expand(-1, 3, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1)
                     for v in (self.mean, self.std))
        x = (x - mean) / std                                             # (N, 3, H, W)
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="area")
        return x.contiguous(memory_format=torch.channels_last)


def augment_batch(x: torch.Tensor, names: Sequence[str], rng: torch.Generator) -> torch.Tensor:
    """Augment a batch (N, 3, S, S) on its device; the random numbers come from a CPU `rng`."""
    n = len(x)
    for name, axis in (("flip_ud", 2), ("flip_lr", 3)):
        if name in names:
            flip = (torch.rand(n, generator=rng) < 0.5).to(x.device).view(-1, 1, 1, 1)
            x = torch.where(flip, x.flip(axis), x)
    if "affine" in names:
        angle = (torch.rand(n, generator=rng) * 2 - 1) * math.radians(10)
        scale = 1 + (torch.rand(n, generator=rng) * 2 - 1) * 0.1
        shift = (torch.rand(n, 2, 1, generator=rng) * 2 - 1) * 0.1
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
        theta = torch.cat([turn, shift], 2).to(x.device)                 # (N, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return x


@dataclass(frozen=True)
class Phase:
    """What trains in one epoch, and at which rate before warm-up and schedule.

    Attributes:
        trainable: "head", "head+bn" (BatchNorm's affine parameters too) or "all".
        lr, backbone_lr: rates of the head and of the backbone.
        batchnorm_moves: whether BatchNorm normalises by the batch and updates its statistics.
    """

    trainable: str
    lr: float
    backbone_lr: float
    batchnorm_moves: bool


def phase_of(config: FineTuneConfig, epoch: int) -> Phase:
    """Return the phase of `epoch` (from 0)."""
    if config.schedule == "authors":
        if epoch < config.freeze_epochs:
            return Phase("head+bn", config.lr, config.lr, True)
        rate = config.lr if epoch == config.freeze_epochs else config.lr / 5
        return Phase("all", rate, rate, True)
    if epoch < config.freeze_epochs:
        return Phase("head", config.lr, 0.0, False)
    return Phase("all", config.lr, config.backbone_lr, True)


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Freeze and unfreeze the parameters of a ResNet, and switch its BatchNorm layers."""
    model.train(phase.batchnorm_moves)
    model.requires_grad_(phase.trainable == "all")
    model.fc.requires_grad_(True)
    if phase.trainable == "head+bn":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)


def lr_factor(config: FineTuneConfig, step: int, steps: int) -> float:
    """Return the factor of warm-up and schedule at `step` of `steps`, in [0, 1]."""
    if config.schedule != "cosine":
        return 1.0
    rise = max(1, round(config.warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(model: nn.Module, config: FineTuneConfig) -> torch.optim.Optimizer:
    """Return Adam or AdamW with two groups: the backbone's parameters, then the head's."""
    head = list(model.fc.parameters())
    backbone = [p for n, p in model.named_parameters() if not n.startswith("fc.")]
    kind = torch.optim.Adam if config.l2 else torch.optim.AdamW
    groups = [{"params": backbone, "lr": config.backbone_lr}, {"params": head, "lr": config.lr}]
    return kind(groups, weight_decay=config.weight_decay, fused=True)


def _rng(*numbers: int) -> torch.Generator:
    """Return a CPU generator for this seed and epoch: nothing random has to be saved."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _batches(n: int, size: int, rng: torch.Generator) -> list[torch.Tensor]:
    """Return shuffled index batches; a last batch of one joins its neighbour (BatchNorm)."""
    batches = list(torch.randperm(n, generator=rng).split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _precision(config: FineTuneConfig, device: torch.device) -> str:
    """Return the precision that `config` means on `device`."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


@contextlib.contextmanager
def _numerics(precision: str, device: torch.device) -> Iterator[None]:
    """Set repeatable kernels and the float32 mode for a block; autocast for "bf16"."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.benchmark = True, False
    cudnn.allow_tf32 = matmul.allow_tf32 = precision != "fp32"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (N, C) logits; binary, per label, where labels are (N, L) of 0 and 1."""
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels)


def _probabilities(logits: torch.Tensor, labels_ndim: int) -> np.ndarray:
    """Softmax of (N, C) logits, or a sigmoid for each of several labels."""
    return (logits.sigmoid() if labels_ndim == 2 else logits.softmax(1)).numpy()


class TrainingError(RuntimeError):
    """Training could not go on; says where it stopped and what to do next."""


def train_one_epoch(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer: torch.optim.Optimizer,
    config: FineTuneConfig, preprocessing: Preprocessing, *, epoch: int, seed: int,
) -> tuple[float, int | None, torch.Tensor]:
    """Train once over the images; every random choice follows from `seed` and `epoch`.

    Args:
        images: (N, H, W) or (N, H, W, 3) on the device of the model.
        labels: (N,) int64, same device.

    Returns:
        The mean loss, the first step whose loss was not finite (None if all were), and the
        indices (B,) of the images of that step.
    """
    phase = phase_of(config, epoch)
    set_phase(model, phase)
    rng = _rng(seed, epoch)
    batches = _batches(len(labels), config.batch_size, rng)
    losses = torch.zeros(len(batches), device=labels.device)
    steps = len(batches) * config.epochs
    for step, batch in enumerate(batches):
        factor = lr_factor(config, epoch * len(batches) + step, steps)
        optimizer.param_groups[0]["lr"] = phase.backbone_lr * factor
        optimizer.param_groups[1]["lr"] = phase.lr * factor
        index = batch.to(labels.device)
        x = augment_batch(preprocessing(images[index]), config.augment, rng)  # (B, 3, S, S)
        with _numerics(_precision(config, labels.device), labels.device):
            loss = _loss(model(x), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()  # stays on the device: read once an epoch
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    return losses.mean().item(), bad[0] if bad else None, batches[bad[0] if bad else 0]


@torch.inference_mode()
def predict(
    model: nn.Module, images: np.ndarray | torch.Tensor, preprocessing: Preprocessing, *,
    batch_size: int = 256, precision: str = "fp32",
) -> torch.Tensor:
    """Run the model in evaluation mode over raw images, in large batches.

    Args:
        images: (N, H, W) or (N, H, W, 3), 0..255.

    Returns:
        What the model returns, float32 on the CPU: logits (N, C), or features (N, 2048) of a
        backbone without a head.
    """
    device = next(model.parameters()).device
    model.eval()
    rows = []
    for batch in torch.as_tensor(images).split(batch_size):
        with _numerics(precision, device):
            rows.append(model(preprocessing(batch.to(device))).float())
    return torch.cat(rows).cpu()


def evaluate(
    model: nn.Module, split: Split, preprocessing: Preprocessing, **options: Any,
) -> tuple[float, dict[str, float | None], np.ndarray]:
    """Return the mean cross-entropy, the scores (see `score`) and the (N, C) probabilities."""
    logits = predict(model, split.images, preprocessing, **options)
    loss = _loss(logits, torch.as_tensor(split.labels)).item()
    probabilities = _probabilities(logits, split.labels.ndim)
    return loss, score(split.labels, probabilities), probabilities


@dataclass(frozen=True)
class Run:
    """One finished fine-tuning, as it lies in its folder.

    Attributes:
        folder: where it lies.
        config: everything that was asked for (config.json).
        metrics: test scores, best epoch, time (metrics.json).
        history: one row per epoch: losses, validation scores, rates, seconds.
        predictions: test ids (N,), groups (N,), labels (N,), scores (N, C), and the same of val.
        found: True if it was there already and this call trained nothing.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: pd.DataFrame
    predictions: dict[str, np.ndarray]
    found: bool = False

    @property
    def stamp(self) -> str:
        """"DEMO", "SHORT" or "" (a real, full run)."""
        return self.config["stamp"]


def _settings(
    report: KeyReport, data: DataSplits, config: FineTuneConfig, subset: np.ndarray,
    label_fraction: float, seed: int,
) -> dict[str, Any]:
    """Return everything that decides a run's result, JSON-ready."""
    demo = report.demo or data.demo or config.recipe == "demo"
    return {
        "dataset": data.name,
        "dataset_fingerprint": data.fingerprint,
        "test_fingerprint": data.test.fingerprint,
        "class_names": list(data.class_names),
        "method": report.method,
        "weights": report.weights,
        "weights_fingerprint": report.fingerprint,
        "allow_extra": list(report.allow_extra),
        "label_fraction": label_fraction,
        "seed": seed,
        "n_train": len(subset),
        "subset_fingerprint": data.train.take(subset).fingerprint,
        **dataclasses.asdict(config),
        "augment": list(config.augment),
        "stamp": "DEMO" if demo else "SHORT" if config.short else "",
    }


def run_name(settings: Mapping[str, Any]) -> str:
    """Return the folder name: what a reader looks for, then 8 hex digits of all settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return (f"{settings['dataset']}_{settings['method']}_{settings['recipe']}"
            f"_f{settings['label_fraction']:g}_s{settings['seed']}_{digest}")


def load_run(folder: str | Path) -> Run:
    """Read a finished run from its folder.

    Raises:
        FileNotFoundError: the folder has no metrics.json, so the run is not finished.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").exists():
        raise FileNotFoundError(
            f"{folder.name} has no metrics.json: the run is not finished. Run it again.")
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        predictions = dict(arrays)
    return Run(folder, json.loads((folder / "config.json").read_text()),
               json.loads((folder / "metrics.json").read_text()),
               pd.read_csv(folder / "history.csv"), predictions)


def add_head(model: nn.Module, n_classes: int, seed: int) -> nn.Module:
    """Return a copy of the backbone with a new `Linear(2048, n_classes)`, initialised by `seed`."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.fc = nn.Linear(2048, n_classes)
    return model


def _selection_key(config: FineTuneConfig, loss: float, scores: Mapping) -> tuple[float, ...]:
    """Return what a better epoch has more of; the loss breaks ties of the AUC."""
    return {"ACC": lambda: (scores["ACC"],), "AUC": lambda: (scores["AUC"], -loss),
            "loss": lambda: (-loss,)}[config.select_by]()


def _save_resume(path: Path, **state: Any) -> None:
    """Write the resume file; an older one stays intact until the new one is whole."""
    with _atomic(path) as temporary:
        torch.save(state, temporary)


def _train(
    model: nn.Module, train: Split, val: Split, config: FineTuneConfig, prep: Preprocessing,
    seed: int, folder: Path, log: Callable[[dict], None],
) -> tuple[list[dict[str, Any]], int]:
    """Fine-tune `model` in place, from the resume file if there is one; load the best epoch.

    Returns:
        One row per epoch, and the best epoch (from 0).
    """
    device = next(model.parameters()).device
    precision = _precision(config, device)
    images, labels = (torch.as_tensor(a).to(device) for a in (train.images, train.labels))
    optimizer = make_optimizer(model, config)
    history, best, best_key, start = [], {}, None, 0
    resume = folder / "last.pt"
    if resume.exists():
        state = torch.load(resume, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, best, best_key = state["history"], state["best"], state["best_key"]
        start = len(history)
    saved = time.monotonic()
    for epoch in range(start, config.epochs):
        began = time.perf_counter()
        loss, bad, batch = train_one_epoch(
            model, images, labels, optimizer, config, prep, epoch=epoch, seed=seed)
        if bad is not None:
            if best:
                _save_weights(folder / "best.safetensors", best)
            raise TrainingError(
                f"The loss is not finite at epoch {epoch}, step {bad}, on images "
                f"{', '.join(train.ids[batch.numpy()])}. The best weights so far are kept in "
                f"{folder.name}. Check these images, or lower lr (now {config.lr:g}).")
        val_loss, scores, _ = evaluate(model, val, prep, precision=precision)
        history.append({"epoch": epoch, "train_loss": loss, "val_loss": val_loss,
                        **{f"val_{k}": scores[k] for k in ("ACC", "AUC", "F1")},
                        "lr": optimizer.param_groups[1]["lr"],
                        "backbone_lr": optimizer.param_groups[0]["lr"],
                        "seconds": time.perf_counter() - began})
        log(history[-1])
        key = _selection_key(config, val_loss, scores)
        if best_key is None or key > tuple(best_key):
            best_key = key
            best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if time.monotonic() - saved > RESUME_SECONDS and epoch + 1 < config.epochs:
            _save_resume(resume, model=model.state_dict(), optimizer=optimizer.state_dict(),
                         history=history, best=best, best_key=best_key)
            saved = time.monotonic()
    model.load_state_dict(best)
    keys = [_selection_key(config, r["val_loss"], {"ACC": r["val_ACC"], "AUC": r["val_AUC"]})
            for r in history]
    return history, keys.index(max(keys))


def _fit_linear(
    model: nn.Module, train: Split, val: Split, config: FineTuneConfig, prep: Preprocessing,
    log: Callable[[dict], None],
) -> tuple[list[dict[str, Any]], int]:
    """Put a logistic regression on frozen features into `model.fc`; L2 strength by validation.

    The protocol is that of Kornblith et al. 2019 (Do Better ImageNet Models Transfer Better?):
    features in evaluation mode, L-BFGS, the regularisation picked on validation data.
    """
    from sklearn.linear_model import LogisticRegression

    head, model.fc = model.fc, nn.Identity()
    features, val_features = (predict(model, s.images, prep) for s in (train, val))
    model.fc = head
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    history, best_key = [], None
    for row, strength in enumerate(np.logspace(-5, 1, 7)):
        began = time.perf_counter()
        fit = LogisticRegression(C=strength, max_iter=2000)
        fit.fit(((features - mean) / std).double().numpy(), train.labels)
        weight, bias = _as_softmax(fit, len(head.bias))
        weight = weight / std                                  # undo the scaling: (C, 2048)
        bias = bias - weight @ mean
        logits = val_features @ weight.T + bias
        val_loss = F.cross_entropy(logits, torch.as_tensor(val.labels)).item()
        scores = score(val.labels, logits.softmax(1).numpy())
        history.append({"epoch": row, "C": strength, "val_loss": val_loss,
                        **{f"val_{k}": scores[k] for k in ("ACC", "AUC", "F1")},
                        "seconds": time.perf_counter() - began})
        log(history[-1])
        key = _selection_key(config, val_loss, scores)
        if best_key is None or key > best_key:
            best_key, best_row = key, row
            head.weight.data.copy_(weight)
            head.bias.data.copy_(bias)
    return history, best_row


def _as_softmax(fit: Any, n_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's coefficients as softmax weight (C, D) and bias (C,)."""
    coef, intercept, classes = fit.coef_, fit.intercept_, fit.classes_
    if len(classes) == 2:  # one row in scikit-learn: the log-odds of the second class
        coef, intercept = np.vstack([0 * coef, coef]), np.append(0, intercept)
    weight, bias = torch.zeros(n_classes, coef.shape[1]), torch.full((n_classes,), -1e4)
    weight[classes] = torch.as_tensor(coef, dtype=torch.float32)
    bias[classes] = torch.as_tensor(intercept, dtype=torch.float32)
    return weight, bias  # a class without a training image keeps a bias that never wins


def pick_device(device: str = "auto") -> torch.device:
    """Return the device called `device`; "auto" takes a GPU if there is one.

    Raises:
        ValueError: the device was asked for by name and is not there.
    """
    mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if not there.get(device.split(":")[0], False):
        raise ValueError(f"device {device!r} is not here. Choose one of: auto, "
                         f"{', '.join(name for name, yes in there.items() if yes)}.")
    return torch.device(device)


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two processes never write one run."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise TrainingError(f"Another process is writing {folder.name} right now. "
                            "Wait for it, then ask again: the finished run will be loaded.") from None


def _environment(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware, for the record; they do not name the run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "numpy": np.__version__}


def _check_trainable(config: FineTuneConfig, data: DataSplits, report: KeyReport) -> None:
    """Refuse what would fail or mislead later, before anything is written."""
    for name in ("train", "val", "test"):
        if len(getattr(data, name)) == 0:
            raise ValueError(f"{data.name} has no {name} images. Training needs all three parts.")
    absent = set(range(len(data.class_names))) - set(np.unique(data.val.labels))
    if config.select_by == "AUC" and data.val.labels.ndim == 1 and absent:
        names = ", ".join(data.class_names[i] for i in sorted(absent))
        raise ValueError(f"{data.name}: validation has no image of {names}, so its AUC is undefined "
                         'and cannot pick the best epoch. Set select_by="loss", or split again.')
    if config.recipe == "linear" and data.val.labels.ndim == 2:
        raise ValueError('The "linear" recipe knows one label per image; '
                         f"{data.name} has several. Choose another recipe.")


def _preprocessing(config: FineTuneConfig, data: DataSplits, method: str) -> Preprocessing:
    """Return the input of this method: normalised as the checkpoint or the data set asks."""
    mean, std = data.mean, data.std
    if config.normalise == "checkpoint" and method in CHECKPOINTS:
        mean, std = CHECKPOINTS[method].mean, CHECKPOINTS[method].std
    elif config.normalise == "checkpoint" and method == "ImageNet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return Preprocessing(tuple(mean), tuple(std), config.image_size)


def fine_tune(
    model: nn.Module, report: KeyReport, data: DataSplits,
    config: FineTuneConfig | None = None, *, label_fraction: float = 1.0, seed: int = 0,
    study: str = "study", runs_dir: str | Path = "runs", device: str = "auto",
    progress: bool = True, keep_best: bool = True,
) -> Run:
    """Fine-tune a backbone on a labelled subset, test it once, and write the run folder.

    A finished run with the same settings is loaded instead; an interrupted one is resumed.

    Args:
        model, report: from `load_backbone`; the model is copied, not changed.
        data: from `load_data`.
        config: the recipe; `FineTuneConfig()` if None.
        label_fraction: share of the training labels to use, in (0, 1].
        seed: decides subset, head, order and augmentation, alike for every method.
        study: name of the folder under `runs_dir` that keeps runs to be compared.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        progress: print a line per epoch.
        keep_best: keep the best epoch's weights as best.safetensors.

    Raises:
        ValueError: settings that cannot work; nothing has been written.
        TrainingError: the loss was not finite, or another process writes this run.
    """
    config = config or FineTuneConfig()
    where = pick_device(device)
    _check_trainable(config, data, report)
    subset = label_subset(data.train.labels, label_fraction, seed=seed,
                          groups=data.train.groups, rule=config.subset_rule)
    settings = _settings(report, data, config, subset, label_fraction, seed)
    folder = Path(runs_dir) / study / run_name(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with _sole_writer(folder):
        if (folder / "metrics.json").exists():
            return dataclasses.replace(load_run(folder), found=True)
        _write_json(folder / "config.json", {**settings, "environment": _environment(where)})
        began = time.perf_counter()
        net = add_head(model, len(data.class_names), seed)
        net = net.to(where, memory_format=torch.channels_last)
        train, prep = data.train.take(subset), _preprocessing(config, data, report.method)
        log = _log_epoch if progress else (lambda row: None)
        if config.recipe == "linear":
            history, best = _fit_linear(net, train, data.val, config, prep, log)
        else:
            history, best = _train(net, train, data.val, config, prep, seed, folder, log)
        trained = time.perf_counter()
        results = {part: evaluate(net, getattr(data, part), prep) for part in ("val", "test")}
        if keep_best:
            _save_weights(folder / "best.safetensors", net.state_dict())
        pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
        _write_predictions(folder / "predictions.npz", data, results)
        _write_json(folder / "metrics.json", {
            **results["test"][1], "loss": results["test"][0], "n_test": len(data.test),
            "val": results["val"][1], "best_epoch": best, "train_seconds": trained - began,
            "seconds": time.perf_counter() - began, "mean": prep.mean, "std": prep.std,
        })
        (folder / "last.pt").unlink(missing_ok=True)
    return load_run(folder)


def _log_epoch(row: Mapping[str, Any]) -> None:
    """Print one epoch as one line."""
    parts = [f"{k} {v:.3g}" for k, v in row.items() if k != "epoch" and v is not None]
    print(f"epoch {row['epoch']:>3}: " + ", ".join(parts), flush=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically; a NaN would be an error, since no score is ever NaN."""
    with _atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _save_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state_dict as safetensors, atomically."""
    from safetensors.torch import save_file

    with _atomic(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)


def _write_predictions(path: Path, data: DataSplits, results: Mapping[str, tuple]) -> None:
    """Write ids, groups, labels and (N, C) scores of test and val, atomically."""
    arrays = {}
    for part, prefix in (("test", ""), ("val", "val_")):
        split = getattr(data, part)
        groups = np.full(len(split), "") if split.groups is None else split.groups
        arrays |= {f"{prefix}ids": split.ids.astype(str), f"{prefix}groups": groups.astype(str),
                   f"{prefix}labels": split.labels, f"{prefix}scores": results[part][2]}
    with _atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


# =============================================================================
# Evaluation
# =============================================================================


def score(labels: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Score probabilities against labels with scikit-learn; None means undefined.

    Args:
        labels: (N,) class indices, or (N, L) of 0 and 1 for several labels an image.
        scores: (N, C) probabilities; the largest is the prediction (0.5 with several labels).

    Returns:
        ACC: share of right answers (with several labels: over all of them, as in MedMNIST).
        balanced ACC: mean recall over the classes.
        AUC: area under the ROC curve; one-vs-rest macro mean with more than two classes.
        F1: macro mean. "F1 paper": as in the authors' notebooks, class 1 with two classes,
        micro (which is ACC) with more.
        An AUC without both kinds of labels, or a mean over such, is None.
    """
    from sklearn import metrics

    labels, scores = np.asarray(labels), np.asarray(scores)
    several = labels.ndim == 2
    present = [len(np.unique(column)) == 2 for column in (
        labels.T if several else (labels == c for c in range(scores.shape[1])))]
    options = {"average": "macro"} if several else {"multi_class": "ovr"}
    predicted = (scores > 0.5).astype(int) if several else scores.argmax(1)
    ranked = scores[:, 1] if scores.shape[1] == 2 and not several else scores
    two = scores.shape[1] == 2 and not several
    f1 = {name: float(metrics.f1_score(labels, predicted, average=average, zero_division=0.0))
          for name, average in (("F1", "macro"), ("F1 paper", "binary" if two else "micro"))}
    return {
        "ACC": float((labels == predicted).mean()),
        "balanced ACC": None if several or not all(present) else float(
            metrics.balanced_accuracy_score(labels, predicted)),
        "AUC": float(metrics.roc_auc_score(labels, ranked, **options)) if all(present) else None,
        **f1,
    }


def bootstrap_interval(
    labels: np.ndarray, scores: np.ndarray, metric: str = "AUC", *, level: float = 0.95,
    n_draws: int = 1000, seed: int = 0,
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of one run's score over new test images.

    It speaks of drawing other test images for this one trained model; it knows nothing of the
    spread between seeds. Draws in which the score is undefined are left out.

    Args:
        labels, scores: as in `score`.
        metric: a key of `score`.
        level: coverage aimed at, in (0, 1).

    Returns:
        Lower and upper end, or None where the score itself is undefined.
    """
    if score(labels, scores)[metric] is None:
        return None
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(labels), size=len(labels)) for _ in range(n_draws))
    values = [score(labels[draw], scores[draw])[metric] for draw in draws]
    values = [v for v in values if v is not None]
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


# =============================================================================
# Results
# =============================================================================

RESULT_COLUMNS = (
    "dataset", "method", "recipe", "label_fraction", "seed", "stamp", "weights", "n_train",
    "image_size", "epochs", "weights_fingerprint", "test_fingerprint", "subset_fingerprint",
)


def load_runs(folder: str | Path) -> pd.DataFrame:
    """Read every run folder below `folder` into one table, a row a run.

    Returns:
        What was asked for (dataset, method, recipe, label_fraction, seed, stamp, ...), the test
        scores (None where undefined), `status` ("done", or "unfinished" for a folder without
        metrics.json) and `folder`.

    Raises:
        FileNotFoundError: no run lies below `folder`.
    """
    rows = []
    for path in sorted(Path(folder).rglob("config.json")):
        config = json.loads(path.read_text())
        row = {name: config.get(name) for name in RESULT_COLUMNS}
        done = path.with_name("metrics.json")
        if done.exists():
            metrics = json.loads(done.read_text())
            row |= {k: v for k, v in metrics.items() if not isinstance(v, (dict, list))}
        rows.append({**row, "status": "done" if done.exists() else "unfinished",
                     "folder": path.parent})
    if not rows:
        raise FileNotFoundError(f"No runs in {Path(folder).name!r}. Run notebook 03 first, "
                                "or set the folder of a study that has been run.")
    return pd.DataFrame(rows)


def compare_methods(
    runs: pd.DataFrame, metric: str = "AUC", *, control: str = "random",
) -> pd.DataFrame:
    """Summarise finished runs over seeds, and each method's paired difference to the control.

    Differences are taken seed by seed: the same seed means the same labelled images, the same
    order and the same test set, so what varies alike cancels.

    Args:
        runs: from `load_runs`; unfinished runs are left out.
        metric: a score's column, in [0, 1].
        control: the method to subtract.

    Returns:
        One row per dataset, recipe, label_fraction and method: n seeds, mean, sd (None with one
        seed, and where a score is undefined), and n_pairs, difference, difference_sd.

    Raises:
        ValueError: runs that must not be mixed (demo with real, different test sets, sizes or
            subsets), or an unknown metric or control.
    """
    done = runs[runs["status"] == "done"]
    _choose(metric, [c for c in ("ACC", "balanced ACC", "AUC", "F1", "F1 paper") if c in done],
            "metric")
    _refuse_mixing(done)
    cell = ["dataset", "recipe", "label_fraction"]
    rows = []
    for key, group in done.groupby(cell):
        wide = group.pivot(index="seed", columns="method", values=metric).astype(float)
        if control not in wide:
            raise ValueError(f"No run of the control {control!r} for {dict(zip(cell, key))}. "
                             f"Run it, or choose a control among: {', '.join(wide)}.")
        for method in wide:
            values = wide[method][group.set_index("method").loc[[method], "seed"]]
            paired = (wide[method] - wide[control]).dropna()
            rows.append({**dict(zip(cell, key)), "method": method, "n": len(values),
                         "mean": values.mean(skipna=False), "sd": values.std(skipna=False),
                         "n_pairs": len(paired), "difference": paired.mean(),
                         "difference_sd": paired.std()})
    table = pd.DataFrame(rows)
    order = {name: i for i, name in enumerate(METHOD_COLORS)}
    return table.sort_values([*cell, "method"], key=lambda c: c.map(order) if c.name == "method"
                             else c, ignore_index=True)


def _refuse_mixing(done: pd.DataFrame) -> None:
    """Raise ValueError if the runs cannot stand in one comparison, naming what differs."""
    if done["stamp"].nunique() > 1:
        raise ValueError(f"These runs mix {sorted(s or 'real' for s in done['stamp'].unique())}: "
                         "demo or shortened runs are never compared with real ones. "
                         "Keep each kind in a study of its own.")
    cell = ["dataset", "recipe"]
    for column in ("test_fingerprint", "image_size", "epochs"):
        for key, group in done.groupby(cell):
            if group[column].nunique() > 1:
                raise ValueError(f"Runs of {key} differ in {column}: "
                                 f"{sorted(group[column].unique())}. Compare like with like.")
    for key, group in done.groupby([*cell, "label_fraction", "seed"]):
        if group["subset_fingerprint"].nunique() > 1:
            raise ValueError(f"Runs of {key} were trained on different labelled images.")
        twice = group[group["method"].duplicated()]["method"]
        if len(twice):
            raise ValueError(f"{twice.iloc[0]} was run twice for {key} with different settings: "
                             f"{', '.join(p.name for p in group['folder'])}. Keep one.")


# =============================================================================
# Study
# =============================================================================


def expand_grid(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of the grid's values, the last name varying fastest."""
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def run_notebook(
    notebook: str | Path, output: str | Path, parameters: Mapping[str, Any],
) -> Path:
    """Execute a notebook with papermill, in its own folder, and return the executed copy.

    Raises:
        ValueError: a parameter that the notebook does not have (papermill would only warn).
        papermill.PapermillExecutionError: a cell failed; the executed copy shows where.
    """
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        _choose(name, known, f"Parameter of {Path(notebook).name}")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(str(notebook), str(output), dict(parameters), progress_bar=False,
                               cwd=str(Path(notebook).parent), kernel_name="python3")
    return Path(output)


def _run_cell(notebook: str, output: str, parameters: dict[str, Any]) -> str:
    """Run one cell of a study; return "" or the reason why it failed."""
    try:
        run_notebook(notebook, output, parameters)
    except Exception as error:  # one bad cell never stops the rest; the reason is listed
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return ""


def run_study(
    grid: Mapping[str, Sequence[Any]], *, notebook: str | Path = "notebooks/03_fine_tune.ipynb",
    output_dir: str | Path = "runs/study/notebooks", executor: Executor | None = None,
    **fixed: Any,
) -> pd.DataFrame:
    """Run notebook 03 for every combination of a grid; finished runs are only loaded.

    Args:
        grid: parameter name -> values, such as {"method": METHODS, "seed": [0, 1, 2]}.
        output_dir: where the executed notebooks go, one a combination.
        executor: runs the cells; a pool of one process by default. Threads are refused, since
            they share random state.
        fixed: parameters that are the same for all.

    Returns:
        The grid, a row a cell, with `notebook` and `error` ("" where it went well).
    """
    if isinstance(executor, ThreadPoolExecutor):
        raise ValueError("Threads share random state. Give an executor of processes.")
    cells = expand_grid(grid)
    names = ["_".join(f"{k}-{v}" for k, v in cell.items()) + ".ipynb" for cell in cells]
    outputs = [str(Path(output_dir) / name) for name in names]
    own = ProcessPoolExecutor(1) if executor is None else contextlib.nullcontext(executor)
    with own as pool:
        futures = {pool.submit(_run_cell, str(notebook), out, {**fixed, **cell}): row
                   for row, (out, cell) in enumerate(zip(outputs, cells))}
        errors = [""] * len(cells)
        for future in tqdm(as_completed(futures), total=len(cells), desc="study", unit="run"):
            errors[futures[future]] = future.result()
    return pd.DataFrame(cells).assign(notebook=outputs, error=errors)


# =============================================================================
# Figures
# =============================================================================

# Okabe and Ito's palette, told apart with every common kind of colour blindness.
METHOD_COLORS = {
    "random": "#888888", "ImageNet": "#000000", "BYOL": "#0072B2", "SwAV": "#E69F00",
    "MoCo": "#009E73", "SparK": "#D55E00",
}


def plot_images(
    images: np.ndarray, titles: Sequence[str], *, columns: int = 6, title: str = "",
) -> Figure:
    """Show images (N, H, W) or (N, H, W, 3), 0..255, in a grid with a title over each."""
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows + 0.3),
                                squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, text in zip(axes.flat, images, titles):
        axis.imshow(np.asarray(image).astype(np.uint8), cmap="gray", vmin=0, vmax=255)
        axis.set_title(text, fontsize=8)
    figure.suptitle(title, fontsize=10)
    plt.close(figure)
    return figure


def plot_history(run: Run) -> Figure:
    """Draw a run's losses and validation scores over its epochs, the chosen epoch marked."""
    rows, config = run.history, run.config
    x, unit = ("C", "inverse L2 strength C") if "C" in rows else ("epoch", "epoch")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for name, label, style in (("train_loss", "training", "--"), ("val_loss", "validation", "-")):
        if name in rows:
            left.plot(rows[x], rows[name], style, marker="o", ms=3, label=label, color="#0072B2")
    for name, color in (("val_AUC", "#D55E00"), ("val_ACC", "#009E73")):
        right.plot(rows[x], rows[name].astype(float), marker="o", ms=3, color=color,
                   label=f"validation {name[4:]}")
    for axis, text in ((left, "cross-entropy"), (right, "score")):
        axis.axvline(rows[x][run.metrics["best_epoch"]], color="0.6", lw=1, label="chosen")
        axis.set(xlabel=unit, ylabel=text, xscale="log" if x == "C" else "linear")
        axis.legend(fontsize=8)
    right.set_ylim(0, 1.02)
    figure.suptitle(_titled(f"{config['method']} on {config['dataset']}", run.stamp), fontsize=10)
    plt.close(figure)
    return figure


def plot_confusion(run: Run) -> Figure:
    """Draw the test set's confusion matrix with counts; rows are the true classes."""
    from sklearn.metrics import ConfusionMatrixDisplay

    names, labels = run.config["class_names"], run.predictions["labels"]
    side = 2.2 + 0.45 * len(names)
    figure, axis = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        labels, run.predictions["scores"].argmax(1), labels=range(len(names)),
        display_labels=names, cmap="Blues", colorbar=False, ax=axis, xticks_rotation="vertical")
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(_titled(f"{len(labels)} test images", run.stamp), fontsize=10)
    plt.close(figure)
    return figure


def plot_label_fractions(runs: pd.DataFrame, metric: str = "AUC") -> Figure:
    """Draw a test score over the label fraction, a line a method: mean over seeds, every run.

    Args:
        runs: from `load_runs`, of one dataset and one recipe.
    """
    table = compare_methods(runs, metric)
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    spread = np.linspace(0.97, 1.03, table["method"].nunique())
    for nudge, (method, rows) in zip(spread, table.groupby("method", sort=False)):
        color = METHOD_COLORS.get(method)
        axis.plot(rows["label_fraction"] * nudge, rows["mean"], "-o", color=color, label=method)
        single = runs[(runs["method"] == method) & (runs["status"] == "done")]
        axis.plot(single["label_fraction"] * nudge, single[metric].astype(float), ".",
                  color=color, alpha=0.4)
    fractions = sorted(table["label_fraction"].unique())
    axis.set_xscale("log")
    axis.set_xticks(fractions, [f"{f:g}" for f in fractions])
    axis.minorticks_off()
    axis.set(xlabel="share of the training labels", ylabel=f"test {metric}")
    axis.legend(fontsize=8, ncols=2)
    low, high = table["n"].min(), table["n"].max()
    seeds = f"{low}" if low == high else f"{low} to {high}"
    axis.set_title(_titled(f"{table['dataset'].iloc[0]}: mean and single runs, "
                           f"{seeds} seeds each", runs["stamp"].iloc[0]), fontsize=10)
    plt.close(figure)
    return figure


def _titled(text: str, stamp: str) -> str:
    """Put DEMO or SHORT before a title, so that a figure never travels without it."""
    return f"{stamp}: {text}" if stamp else text


# =============================================================================
# Demo
# =============================================================================
