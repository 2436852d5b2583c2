"""One training step, run in each way that the engine knows, and evaluation in batches.

    python bench/step.py      five minutes on two CPU cores
    python bench/step.py      on a GPU: 224 px, batch 64, passes of 16 steps

All ways train the same network on the same images in turns: a plain NCHW float32 loop that reads
the loss at each step (on a GPU with TF32 convolutions, PyTorch's default); the engine in fp32, on a
GPU in tf32 too; in the precision that it takes by itself (bf16 where the device computes in it);
and then, on top of that, with `compile`, with `cuda_graph` and with both, as far as the device can.
A way's first pass is not part of its speed. What it takes longer than the others is its preparation
(compiling, recording), and the images that must be trained until that is earned back are computed
from it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.fx.experimental.optimization import fuse  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import medssl_utils as medssl  # noqa: E402

CEILING = 10_200  # img/s: training a ResNet50 at 224 px in bf16 on an H200, memory-bound


def plain_loop(images: torch.Tensor, labels: torch.Tensor, config: medssl.FineTuneConfig,
               prep: medssl.Preprocessing) -> Callable[[], None]:
    """Return one pass of what a textbook writes."""
    net = medssl.add_head(medssl.load_backbone("random")[0], 2, 0).to(labels.device).train()
    optimizer = torch.optim.AdamW(net.parameters(), config.lr, fused=False)

    def epoch() -> None:
        for index in torch.randperm(len(labels)).split(config.batch_size):
            loss = F.cross_entropy(net(prep(images[index]).contiguous()), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return epoch


def engine(images: torch.Tensor, labels: torch.Tensor, config: medssl.FineTuneConfig,
           prep: medssl.Preprocessing) -> Callable[[], None]:
    """Return one pass of the engine."""
    net = medssl.add_head(medssl.load_backbone("random")[0], 2, 0)
    net = net.to(labels.device, memory_format=torch.channels_last)
    optimizer, kept = medssl.make_optimizer(net, config), {}
    return lambda: medssl.train_one_epoch(net, images, labels, optimizer, config, prep, kept=kept,
                                          epoch=config.epochs - 1, seed=0)


def seconds(work: Callable[[], None]) -> float:
    """Return what `work` takes until the device has done it."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def train(ways: dict[str, Callable[[], None]], best: str, rounds: int, images: int,
          ceiling: bool) -> None:
    """Print a row a way: median speed of the rounds, and what its first pass cost on top; of those
    that add something to the way `best`, after how many images that is earned back."""
    first = {name: seconds(way) for name, way in ways.items()}
    spent = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            spent[name].append(seconds(way))
    typical = {name: statistics.median(times) for name, times in spent.items()}
    base, before = typical["plain loop"], typical[best] / images
    print(f"\n{'training':<24}{'img/s':>9}{'faster':>8}{'first pass':>12}  earned back after")
    for name, pass_seconds in typical.items():
        gained = before - pass_seconds / images
        extra = first[name] - pass_seconds
        back = f"{extra / gained:,.0f} images" if gained > 0 else "never"
        note = back if name.startswith(f"{best} +") else ""
        share = f"  {images / pass_seconds / CEILING:.0%} of the ceiling" if ceiling else ""
        print(f"{name:<24}{images / pass_seconds:>9,.1f}{base / pass_seconds:>7.2f}x"
              f"{extra:>+10.1f} s  {note}{share}")


def evaluation(images: torch.Tensor, prep: medssl.Preprocessing, precision: str,
               sizes: list[int], rounds: int) -> None:
    """Print the speed of a forward pass in batches of each size, in turns with a network whose
    BatchNorm layers are folded into its convolutions, which the engine does not do."""
    net = medssl.load_backbone("random")[0].eval()
    nets = [n.to(images.device, memory_format=torch.channels_last) for n in (net, fuse(net))]
    print(f"\n{'evaluation, batch':<24}{'img/s':>9}{'folded':>9}{'ratio':>8}")
    for size in sizes:
        some = images[:size].repeat(max(1, min(512, 4 * size) // len(images[:size])), 1, 1)

        def once(net: torch.nn.Module) -> float:
            return seconds(lambda: medssl.predict(net, some, prep, batch_size=size,
                                                  precision=precision))

        spent = [[once(net) for net in nets] for _ in range(rounds + 1)][1:]
        plain, folded = (len(some) / statistics.median(times) for times in zip(*spent))
        ratio = statistics.median(a / b for a, b in spent)
        print(f"{size:<24}{plain:>9,.1f}{folded:>9,.1f}{ratio:>7.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="of a pass; a graph needs four")
    parser.add_argument("--rounds", type=int, default=5)
    device = medssl.pick_device()
    if device.type == "cuda":
        parser.set_defaults(image_size=224, batch_size=64, steps=16)
    args = parser.parse_args()
    cuda, n = device.type == "cuda", args.steps * args.batch_size
    config = medssl.FineTuneConfig(image_size=args.image_size, batch_size=args.batch_size,
                                   freeze_epochs=0, precision="fp32", normalise="dataset")
    data = medssl.demo_data(n_train=max(n, 1024 if cuda else 256), image_size=args.image_size)
    pixels, labels = (torch.as_tensor(part).to(device)
                      for part in (data.train.images, data.train.labels))
    prep = medssl.preprocessing_for(config, data, "random")
    best = medssl._precision(replace(config, precision="auto"), device)
    quick = replace(config, precision=best)
    settings = {"fp32": config, best: quick,
                f"{best}, backbone frozen": replace(quick, freeze_epochs=config.epochs),
                f"{best} + compile": replace(quick, compile=True)}
    if cuda:
        settings |= {"tf32": replace(config, precision="tf32"),
                     f"{best} + graph": replace(quick, cuda_graph=True),
                     f"{best} + compile + graph": replace(quick, compile=True, cuda_graph=True)}
    print(medssl.describe_environment())
    print(f"{args.image_size} px, batch {args.batch_size}, passes of {args.steps} steps, "
          f"{args.rounds} rounds in turns, {torch.get_num_threads()} threads")
    ways = {"plain loop": plain_loop(pixels[:n], labels[:n], config, prep)}
    ways |= {name: engine(pixels[:n], labels[:n], each, prep) for name, each in settings.items()}
    train(ways, best, args.rounds, n, ceiling=cuda and args.image_size == 224)
    sizes = [1, 64, 256, 1024] if cuda else [1, 16, 64, 256]
    evaluation(pixels, prep, best, sizes, args.rounds)


if __name__ == "__main__":
    main()
