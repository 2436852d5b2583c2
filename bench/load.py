"""Time of loading a checkpoint: the authors' snippet, ours, and an exported backbone, side by side.

    python bench/load.py --rounds 5

One file as Lightning writes BYOL's (562 MB, its optimizer state counted), one as SparK's (94 MB).
Interleaved, in one process; each round ends when every weight has been read once.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import medssl_utils as medssl


def write_files(folder: Path) -> dict[str, Path]:
    """Checkpoints of true size around random weights."""
    backbone, _ = medssl.load_backbone("random")
    state = backbone.state_dict()
    both = {}
    for network in ("online_network.encoder.", "target_network.encoder."):
        both |= {network + name: tensor.clone() for name, tensor in state.items()}
    rest = torch.rand((562_000_000 - 2 * 94_000_000) // 4)
    content = {"state_dict": both, "optimizer_states": [{"momentum": rest}]}
    torch.save(content, folder / "byol.ckpt")
    torch.save({"module": state, "is_pretrain": True}, folder / "spark.pth")
    return {"BYOL": folder / "byol.ckpt", "SparK": folder / "spark.pth"}


def snippet(method: str, path: Path) -> torch.nn.Module:
    """The authors' snippet in our words."""
    model = torchvision.models.resnet50()
    content = torch.load(path)
    state = content["module"] if method == "SparK" else content["state_dict"]
    removed = {"BYOL": "online_network.encoder.", "SparK": "model."}[method]
    state = {key.replace(removed, ""): value for key, value in state.items()}
    model.load_state_dict(state, strict=False)
    return model


def ours(method: str, path: Path) -> torch.nn.Module:
    return medssl.load_backbone(method, path)[0]


def exported(method: str, path: Path) -> torch.nn.Module:
    return medssl.load_backbone(method, path.with_suffix(".safetensors"))[0]


def plain_exported(method: str, path: Path) -> torch.nn.Module:
    """The two lines of notebook 02."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = torchvision.models.resnet50()
    model.load_state_dict(load_file(path.with_suffix(".safetensors")), strict=False, assign=True)
    return model


WAYS = {
    "the authors' snippet": snippet,
    "load_backbone, every check": ours,
    "load_backbone of the exported": exported,
    "exported, in plain torchvision": plain_exported,
}


def milliseconds(way, method: str, path: Path) -> float:
    start = time.perf_counter()
    state = way(method, path).state_dict()
    for name, tensor in state.items():
        if not name.startswith("fc."):
            float(tensor.sum())
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{medssl.describe_environment()}, median of {rounds}\n")
    print("| file | way | ms | times as fast as the snippet |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for method, path in write_files(Path(folder)).items():
            model, report = medssl.load_backbone(method, path)
            medssl.export_backbone(model, path.with_suffix(".safetensors"), report)
            times = {name: [] for name in WAYS}
            for _ in range(rounds):
                for name, way in WAYS.items():
                    times[name].append(milliseconds(way, method, path))
            slow = times["the authors' snippet"]
            for name in WAYS:
                ratios = [a / b for a, b in zip(slow, times[name], strict=True)]
                median, ratio = statistics.median(times[name]), statistics.median(ratios)
                print(f"| {method} | {name} | {median:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
