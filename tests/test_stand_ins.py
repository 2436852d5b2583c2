"""Stand-ins have the layout of the files that the authors' own code saves; others load as well."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision

import medssl_utils as medssl

LAYOUTS = Path(__file__).resolve().parent.parent.parent / "shared" / "checkpoint_layouts"
RECORDED = {  # layout file -> method; the last two are files that no stand-in copies
    "byol": "BYOL", "swav": "SwAV", "moco_mlp": "MoCo", "spark": "SparK",
    "moco": "MoCo", "spark_still_pretraining": "SparK",
}
COPIED = list(RECORDED)[:4]
DTYPES = {"f32": torch.float32, "i64": torch.int64}


def read_layout(name: str) -> dict:
    if not LAYOUTS.is_dir():
        pytest.skip("the recorded layouts are not part of the project")
    return json.loads((LAYOUTS / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=COPIED)
def pair(request, stand_ins) -> tuple[Path, str, dict]:
    """A stand-in, its method, and the recorded layout that it stands for."""
    method = RECORDED[request.param]
    return stand_in(method, stand_ins), method, read_layout(request.param)


@pytest.fixture(scope="module", params=RECORDED)
def file(request, stand_ins, tmp_path_factory) -> tuple[Path, str, dict]:
    """A file of each recorded layout, its method, and the layout."""
    method, layout = RECORDED[request.param], read_layout(request.param)
    path = stand_in(method, stand_ins)
    if request.param not in COPIED:
        backbone = medssl.load_backbone(method, path, cache=False)[0].state_dict()
        path = tmp_path_factory.mktemp(request.param) / "model.ckpt"
        torch.save(filled(layout, backbone), path)
    return path, method, layout


def stand_in(method: str, folder: Path) -> Path:
    return folder / "stand-in" / medssl.CHECKPOINTS[method].filename


def filled(layout: dict, backbone: dict) -> dict:
    """What a file of this layout holds: this backbone, heads in their shape, the rest small."""
    prefix, state = layout["backbone_prefix"], OrderedDict()
    for key, (dtype, *shape) in layout["tensors"].items():
        shape = shape if ".fc." in key else [1] * len(shape)
        state[key] = backbone.get(key.removeprefix(prefix), torch.zeros(shape, dtype=DTYPES[dtype]))
    state |= dict.fromkeys(layout["non_tensor_state_dict_entries"], {"mask_ratio": 0.6})
    values = {"str": "", "int": 1, "float": 1.0, "bool": True, "dict": {}, "list": []}
    wrapper = {key: values.get(kind) for key, kind in layout["top_level"].items()}
    return wrapper | {layout["state_dict_path"][0]: state}


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
    assert list(tensors_of(path, layout)) == list(layout["tensors"])


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


def test_the_readme_snippet_reports_what_it_reports_on_the_real_layout(file):
    path, method, layout = file
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


def test_ours_loads_all_318_and_reports_the_keys_that_the_snippet_calls_unexpected(file):
    path, method, layout = file
    model, report = medssl.load_backbone(method, path, cache=False)
    found, prefix = tensors_of(path, layout), layout["backbone_prefix"]
    assert (report.loaded, report.expected) == (318, 318)
    assert all(torch.equal(value, found[prefix + name])
               for name, value in model.state_dict().items())
    assert sum(count for count, _ in report.groups.values()) == len(found) - 318
    if "error" not in layout["readme_snippet_gives"]:
        missing, unexpected = readme_snippet(path, method)
        whole = missing == ["fc.weight", "fc.bias"]  # not of SparK's still-pretraining file
        assert list(report.missing_keys) == ["fc.weight", "fc.bias"]
        assert whole == (len(report.unexpected_keys) == len(unexpected))
        assert whole == ("are those known of a" in report.verdict)


@pytest.mark.parametrize("method", medssl.METHODS)
def test_the_readme_snippet_reports_what_the_readme_says(method, stand_ins):
    missing, unexpected = readme_snippet(stand_in(method, stand_ins), method)
    assert missing == ["fc.weight", "fc.bias"]
    assert len(unexpected) == medssl.CHECKPOINTS[method].unexpected[0]


@pytest.mark.parametrize("method", medssl.METHODS)
def test_a_stand_in_is_the_same_file_each_time(method, stand_ins, tmp_path):
    again = medssl.write_demo_checkpoint(method, tmp_path)
    assert again.read_bytes() == stand_in(method, stand_ins).read_bytes()


def test_a_stand_in_leaves_the_callers_random_state(tmp_path):
    before = torch.random.get_rng_state()
    medssl.write_demo_checkpoint("BYOL", tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("kept", "unexpected"), [(".fc.2.", 326), (".no head.", 322)])
def test_moco_with_another_head_loads(kept, unexpected, stand_ins, tmp_path):
    """A plain head is one layer, whatever its shape, in each of the two encoders."""
    content = opened(stand_in("MoCo", stand_ins))
    content["state_dict"] = {k.replace(".fc.2.", ".fc."): v
                             for k, v in content["state_dict"].items()
                             if ".fc." not in k or kept in k}
    torch.save(content, path := tmp_path / "model.ckpt")
    report = medssl.load_backbone("MoCo", path, cache=False)[1]
    assert len(report.unexpected_keys) == unexpected
    assert "are those known of a" in report.verdict
