"""Checkpoints: all 318 tensors of the right method arrive, or an error says why not."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

import medssl_utils as medssl
from medssl_utils import CheckpointError, export_backbone, load_backbone

LAYOUTS = Path(__file__).resolve().parent.parent.parent / "shared" / "checkpoint_layouts"
NAMES = {"BYOL": "byol", "SwAV": "swav", "MoCo": "moco_mlp", "SparK": "spark"}
PREFIX = {"BYOL": "online_network.encoder.", "SwAV": "model.", "MoCo": "encoder_q.", "SparK": ""}
UNEXPECTED = {"BYOL": 350, "SwAV": 10, "MoCo": 330, "SparK": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A stand-in of each layout, none of them planted: that takes a training."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medssl, "PLANTED", ())
        return {name: medssl.write_demo_checkpoint(name, folder) for name in medssl.METHODS}


@pytest.fixture(scope="module")
def backbone() -> dict[str, torch.Tensor]:
    """The 318 tensors of a ResNet50; a test copies the dictionary before it changes it."""
    return load_backbone("random", seed=7)[0].state_dict()


def save(content, folder: Path) -> Path:
    path = folder / "model.pth"
    torch.save(content, path)
    return path


def state_of(path: Path) -> dict:
    content = torch.load(path)
    return content.get("state_dict", content.get("module"))


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.skipif(not LAYOUTS.exists(), reason="the recorded layouts are not beside this clone")
@pytest.mark.parametrize("method", medssl.METHODS)
def test_a_stand_in_has_the_names_and_types_of_the_recorded_layout(method, files, backbone):
    recorded = json.loads((LAYOUTS / f"{NAMES[method]}.json").read_text())
    state, kinds = state_of(files[method]), {"f32": torch.float32, "i64": torch.int64}
    assert set(state) == set(recorded["tensors"])
    for key, (kind, *shape) in recorded["tensors"].items():
        assert state[key].dtype == kinds[kind]
        if key.removeprefix(PREFIX[method]) in backbone:
            assert list(state[key].shape) == shape


@pytest.mark.parametrize("method", medssl.METHODS)
@pytest.mark.parametrize("asked", [True, False])
def test_every_tensor_of_a_file_arrives_bit_for_bit(method, asked, files):
    model, report = load_backbone(method if asked else None, files[method])
    state, loaded = state_of(files[method]), model.state_dict()
    assert len(loaded) == report.loaded == 318
    assert all(torch.equal(loaded[name], state[PREFIX[method] + name]) for name in loaded)
    assert report.method == method and report.missing_keys == ("fc.weight", "fc.bias")
    assert len(report.unexpected_keys) == UNEXPECTED[method]
    assert sum(report.groups.values()) == UNEXPECTED[method]
    assert "318 of 318" in report.verdict and report.verdict in repr(report)
    assert not model.training and model(torch.zeros(1, 3, 32, 32)).shape == (1, 2048)


@pytest.mark.parametrize("there,asked", list(itertools.permutations(medssl.METHODS, 2)))
def test_a_file_of_another_method_is_refused_by_both_names(there, asked, files):
    with pytest.raises(CheckpointError, match=rf"(?=.*\b{there}\b)(?=.*\b{asked}\b)"):
        load_backbone(asked, files[there])


def contents(b: dict) -> dict:
    """What files hold around a backbone; the tables below speak of them."""
    ones = torch.ones(2)
    swav = {**b, "projection_head.0.weight": ones, "prototypes.weight": ones}
    moco = {**with_prefix("encoder_q.", b), **with_prefix("encoder_k.", b), "queue": ones}
    moco["encoder_q.fc.0.weight"] = ones
    byol = {**with_prefix("online_network.encoder.", b), **with_prefix("target_network.", b)}
    spark = {**with_prefix("sparse_encoder.sp_cnn.", b), "imn_m": ones, "config": {"a": 1}}
    strides = b["conv1.weight"].to(memory_format=torch.channels_last)
    return {
        "plain": b,
        "SimSiam's": {"model": {**with_prefix("online_network.encoder.", b), "p.0.bias": ones}},
        "Lightning's": {"state_dict": with_prefix("module.backbone.", b)},
        "ImageNet's": {**b, "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)},
        "SwAV's own": with_prefix("module.", swav),
        "MoCo's own": {"state_dict": with_prefix("module.", moco), "optimizer": {}},
        "of DDP": {"module": with_prefix("module.", b), "is_pretrain": 1},
        "nested once more": {"state_dict": {"module": b}},
        "of SparK, unfinished": {"module": {**spark, "mask_tokens.0": ones}, "is_pretrain": True},
        "without counters": {key: b[key] for key in b if not key.endswith("tracked")},
        "in channels_last": {**b, "conv1.weight": strides},
        "of two methods": {"state_dict": {**byol, **moco}},
        "a whole module": torchvision.models.resnet18(),
        "a head": {"fc.weight": torch.ones(9, 2048)},
        "a list": list(b.values()),
    }


LOOK_ALIKES = dict.fromkeys(("plain", "SimSiam's", "Lightning's", "ImageNet's"), "ResNet50")
LOOK_ALIKES |= {"SwAV's own": "SwAV", "MoCo's own": "MoCo"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_a_look_alike_is_called_what_it_is(kind, legacy, backbone, tmp_path):
    path = tmp_path / "model.pth.tar"  # SwAV's and MoCo's own are of PyTorch before 1.6
    torch.save(contents(backbone)[kind], path, _use_new_zipfile_serialization=not legacy)
    model, report = load_backbone(path=path)
    assert report.method == LOOK_ALIKES[kind]
    assert torch.equal(model.conv1.weight, backbone["conv1.weight"])
    notes = " ".join(report.notes)
    assert "intensities are not known" in notes or "assumed" in notes


ODD = {"plain": "request", "nested once more": "request", "in channels_last": "request"}
ODD |= {"of DDP": "module.", "without counters": "num_batches_tracked"}
ODD |= {"of SparK, unfinished": "sparse_encoder.sp_cnn."}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_that_is_right_loads_with_a_note(kind, backbone, tmp_path):
    model, report = load_backbone("SparK", save(contents(backbone)[kind], tmp_path))
    assert any(ODD[kind] in note for note in report.notes)
    assert ("without knowing what they are" in report.verdict) == ("unfinished" in kind)
    assert all(torch.equal(tensor, backbone[key]) for key, tensor in model.state_dict().items())


REFUSED = {
    "SimSiam's": ("BYOL", "no BYOL"),
    "Lightning's": ("SwAV", "no SwAV"),
    "of two methods": (None, "two methods, BYOL and MoCo"),
    "a whole module": ("SparK", r"ResNet.*state_dict\(\)"),
    "a head": ("SparK", "0 of 318.*fc"),
    "a list": ("SparK", "holds a list"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_file_is_refused_with_what_it_is(kind, backbone, tmp_path):
    method, words = REFUSED[kind]
    with pytest.raises(CheckpointError, match=words) as caught:
        load_backbone(method, save(contents(backbone)[kind], tmp_path))
    assert "weights_only" not in str(caught.value)


def one(value, tensor):
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


MISSING = "layer4.2.bn3.running_var"
WRONG = {
    "one channel": ("conv1.weight", lambda t: t[:, :1].clone(), "conv1.weight.*64, 1, 7, 7"),
    "half precision": ("conv1.weight", torch.Tensor.half, "conv1.weight.*float16"),
    "a text": ("conv1.weight", lambda t: "weights", "conv1.weight.*str"),
    "zeros": ("conv1.weight", torch.zeros_like, "conv1.weight"),
    "NaN": ("layer2.1.conv2.weight", lambda t: one(float("nan"), t), "layer2.1.conv2.weight"),
    "Inf": ("bn1.bias", lambda t: one(float("inf"), t), "bn1.bias"),
    "variance": ("layer3.5.bn2.running_var", lambda t: one(-0.5, t), "layer3.5.bn2.running_var"),
    "deeper": ("layer3.6.conv1.weight", lambda t: torch.ones(1), "layer3.6.conv1.weight"),
    "missing": (MISSING, lambda t: None, f"1 of 318.*{MISSING}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_that_no_trained_resnet50_has_is_named(case, backbone, tmp_path):
    key, change, words = WRONG[case]
    state = {**backbone, key: change(backbone.get(key))}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=words):
        load_backbone("SparK", save({"module": state}, tmp_path))


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"method": "BYOOL"}, "'BYOOL'.*BYOL"),
        ({"method": "BYOL", "weights": "real"}, "weights 'real'"),
        ({"method": "random", "path": "a.pth"}, "method 'random'"),
        ({}, "method None"),
        ({"path": "nowhere.pth"}, "(?i)nowhere.pth.*no such file"),
    ],
)
def test_a_mistake_in_the_call_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        load_backbone(**arguments)


def test_the_control_is_torchvisions_initialisation_and_leaves_the_callers_dice():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, report = load_backbone("random", weights="published", seed=3)
    assert torch.equal(torch.get_rng_state(), before) and not report.demo
    torch.manual_seed(3)
    assert torch.equal(model.conv1.weight, torchvision.models.resnet50().conv1.weight)


def test_imagenet_weights_are_read_from_torchs_own_folder(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    url = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
    torch.save(contents(backbone)["ImageNet's"], tmp_path / "checkpoints" / Path(url).name)
    _, report = load_backbone("ImageNet", weights="published")
    assert report.mean == medssl.IMAGENET["mean"] and report.weights == "ImageNet"


@pytest.fixture
def published(files, tmp_path) -> Path:
    """A folder with SwAV's file as if it were the published one."""
    content = torch.load(files["SwAV"])
    del content[medssl.STAND_IN_MARK]
    torch.save(content, tmp_path / files["SwAV"].name)
    return tmp_path


def test_the_first_load_of_a_published_file_is_recorded_and_another_refused(published):
    options = {"weights": "published", "folder": published}
    _, report = load_backbone("SwAV", **options)
    assert report.weights == "published" and not report.demo
    assert report.mean == medssl.LIDC["mean"]
    path = published / medssl.CHECKPOINTS["SwAV"].filename
    assert json.loads((published / "checksums.json").read_text()) == {path.name: report.sha256}
    load_backbone("SwAV", **options)
    content = torch.load(path)
    content["state_dict"]["model.bn1.bias"] += 0.125
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_backbone("SwAV", **options)


def test_a_stand_in_never_passes_as_published_nor_the_other_way_round(files, published):
    (published / files["SparK"].name).symlink_to(files["SparK"])
    with pytest.raises(CheckpointError, match="weights='published'"):
        load_backbone("SparK", weights="published", folder=published)
    (published / "stand-in").symlink_to(published)
    with pytest.raises(CheckpointError, match="weights='stand-in'"):
        load_backbone("SwAV", folder=published)


@pytest.mark.parametrize("method", list(medssl.CHECKPOINTS)[len(medssl.METHODS) :])
def test_the_sister_papers_checkpoints_have_swavs_layout(method, files):
    entry = medssl.CHECKPOINTS[method]
    assert load_backbone(method, files["SwAV"])[1].loaded == 318 and entry.layout == "SwAV"
    assert bool(entry.mean) == ("PETCT" not in method)


def test_a_checkpoint_of_ones_own_needs_one_entry(files, backbone, tmp_path, monkeypatch):
    path = save({"net": with_prefix("student.", backbone), "model": {"a": 1}}, tmp_path)
    entry = medssl.Checkpoint(path=str(path), wrapper="net", mean=(0.2,) * 3, std=(0.1,) * 3)
    monkeypatch.setitem(medssl.CHECKPOINTS, "mine", entry)
    model, report = load_backbone("mine", weights="published")
    assert torch.equal(model.conv1.weight, backbone["conv1.weight"])
    assert (report.name, report.weights, report.demo) == ("mine", "file", False)
    assert report.mean == (0.2,) * 3
    assert load_backbone("mine")[1].demo, "beside stand-ins, its study is a demo"
    entry = medssl.Checkpoint(path=str(files["BYOL"]), prefix=PREFIX["BYOL"])  # of two networks
    monkeypatch.setitem(medssl.CHECKPOINTS, "mine", entry)
    assert load_backbone("mine")[1].loaded == 318


def test_an_exported_backbone_loads_here_and_in_plain_torchvision(files, tmp_path):
    model, report = load_backbone("SwAV", files["SwAV"])
    path = export_backbone(model, tmp_path / "a" / "swav.safetensors", report)
    again, later = load_backbone(path=path)
    plain = torchvision.models.resnet50()
    assert plain.load_state_dict(load_file(path), strict=False).unexpected_keys == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(plain.state_dict()[name], tensor)
    assert (later.method, later.fingerprint, later.demo) == ("SwAV", report.fingerprint, True)
    with pytest.raises(CheckpointError, match="SwAV.*BYOL"):
        load_backbone("BYOL", path)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="fingerprint|numbers"):
        load_backbone(path=path)


def test_a_trained_network_is_not_exported_as_its_checkpoint(files, backbone, tmp_path):
    model, report = load_backbone("SwAV", files["SwAV"])
    with pytest.raises(ValueError, match="safetensors"):
        export_backbone(model, tmp_path / "swav.pth", report)
    model.bn1.bias.data += 1
    with pytest.raises(CheckpointError, match="before training"):
        export_backbone(model, tmp_path / "swav.safetensors", report)
    save_file(backbone, tmp_path / "best.safetensors")  # as a run's own
    with pytest.raises(CheckpointError, match="notebook 07"):
        load_backbone("SparK", tmp_path / "best.safetensors")
