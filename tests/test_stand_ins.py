"""Stand-ins have the layout of the files that the authors' own code saves."""

import json
from pathlib import Path

import pytest
import torch
import torchvision

import medssl_utils as medssl

LAYOUTS = Path(__file__).resolve().parent.parent.parent / "shared" / "checkpoint_layouts"
VARIANTS = {  # layout file -> method and variant of the stand-in
    "byol": ("BYOL", "published"), "swav": ("SwAV", "published"),
    "moco_mlp": ("MoCo", "published"), "moco": ("MoCo", "linear head"),
    "spark": ("SparK", "published"), "spark_still_pretraining": ("SparK", "still pre-training"),
}
DTYPES = {"f32": torch.float32, "i64": torch.int64}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory) -> tuple[Path, str, dict]:
    """A stand-in, its method, and the recorded layout that it stands for."""
    if not LAYOUTS.is_dir():
        pytest.skip("the recorded layouts are not part of the project")
    method, variant = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    layout = json.loads((LAYOUTS / f"{request.param}.json").read_text("utf-8"))
    return medssl.write_demo_checkpoint(method, folder, variant=variant), method, layout


def opened(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def tensors_of(path: Path, layout: dict) -> dict:
    return opened(path)[layout["state_dict_path"][0]]


def readme_snippet(path: Path, method: str) -> tuple[list[str], list[str]]:
    """What the snippet of the authors' README does, in our words."""
    model = torchvision.models.resnet50()
    state = opened(path)
    if "module" in state:
        state = state["module"]
    if "state_dict" in state:
        state = state["state_dict"]
    removed = {"MoCo": "encoder_q.", "BYOL": "online_network.encoder."}.get(method, "model.")
    state = {key.replace(removed, ""): value for key, value in state.items()}
    result = model.load_state_dict(state, strict=False)
    return result.missing_keys, result.unexpected_keys


def test_names_stand_in_the_same_order(pair):
    path, _, layout = pair
    found = tensors_of(path, layout)
    assert [key for key in found if key != "config"] == list(layout["tensors"])
    assert ("config" in found) == ("config" in layout["non_tensor_state_dict_entries"])


def test_dtypes_are_the_same(pair):
    path, _, layout = pair
    found = tensors_of(path, layout)
    assert {k: found[k].dtype for k in layout["tensors"]} == {
        k: DTYPES[dtype] for k, (dtype, *_) in layout["tensors"].items()}


def test_backbone_shapes_are_the_same(pair):
    path, _, layout = pair
    found, prefix = tensors_of(path, layout), layout["backbone_prefix"]
    names = [prefix + name for name in medssl._backbone_layout()]
    assert {k: list(found[k].shape) for k in names} == {k: layout["tensors"][k][1:] for k in names}


def test_auxiliary_tensors_are_small(pair):
    path, _, layout = pair
    assert path.stat().st_size < 96e6  # a backbone alone takes 94.3 MB


def test_wrapper_keys_are_the_same_beside_the_mark(pair):
    path, _, layout = pair
    wrapper = opened(path)
    assert medssl.STAND_IN_MARK in wrapper
    kinds = {k: type(v).__name__ for k, v in wrapper.items() if k != medssl.STAND_IN_MARK}
    assert list(kinds) == list(layout["top_level"])
    assert kinds == layout["top_level"]


def test_the_readme_snippet_reports_what_it_reports_on_the_real_layout(pair):
    path, method, layout = pair
    told = layout["readme_snippet_gives"]
    if "error" in told:
        with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight.*\[128, 2048\]"):
            readme_snippet(path, method)
        return
    missing, unexpected = readme_snippet(path, method)
    if isinstance(told["missing_keys"], str):  # "267 keys, first: ..."
        assert len(missing) == int(told["missing_keys"].split()[0])
    else:
        assert missing == told["missing_keys"]
    assert len(unexpected) == told["unexpected_count"]
    for prefix, count in told["unexpected_by_prefix"].items():
        assert sum(f"{key}.".startswith(f"{prefix}.") for key in unexpected) == count, prefix


def test_ours_loads_all_318_and_counts_the_keys_that_the_snippet_calls_unexpected(pair):
    path, method, layout = pair
    model, report = medssl.load_backbone(method, path, cache=False)
    found, prefix = tensors_of(path, layout), layout["backbone_prefix"]
    assert (report.loaded, report.expected) == (318, 318)
    assert all(torch.equal(value, found[prefix + name])
               for name, value in model.state_dict().items())
    assert sum(count for count, _ in report.groups.values()) == len(found) - 318
    if "error" not in layout["readme_snippet_gives"]:
        missing, unexpected = readme_snippet(path, method)
        whole = missing == ["fc.weight", "fc.bias"]  # not of SparK's still-pretraining file
        assert whole == (report.left_out == len(unexpected))
        assert whole == ("that the authors' README names" in report.verdict)


@pytest.mark.parametrize("method", medssl.METHODS)
def test_the_readme_snippet_reports_what_the_readme_says(method, stand_ins):
    path = stand_ins / "stand-in" / medssl.CHECKPOINTS[method].filename
    missing, unexpected = readme_snippet(path, method)
    assert missing == ["fc.weight", "fc.bias"]
    assert len(unexpected) == medssl.CHECKPOINTS[method].unexpected[0]


def test_a_stand_in_is_the_same_file_each_time(stand_ins, tmp_path):
    again = medssl.write_demo_checkpoint("SparK", tmp_path)
    assert again.read_bytes() == (stand_ins / "stand-in" / again.name).read_bytes()


@pytest.mark.parametrize(("variant", "left_out"), [("linear head", 326), ("no head", 322)])
def test_moco_with_another_head_loads(variant, left_out, tmp_path):
    path = medssl.write_demo_checkpoint("MoCo", tmp_path, variant=variant)
    report = medssl.load_backbone("MoCo", path, cache=False)[1]
    assert report.left_out == left_out
    assert "that the authors' README names" in report.verdict
