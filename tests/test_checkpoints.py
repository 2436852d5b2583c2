"""Checkpoints: all 318 tensors of the right method arrive, or an error says why not."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

import medssl_utils as medssl

LAYOUTS = Path(__file__).resolve().parent.parent.parent / "shared" / "checkpoint_layouts"
UNEXPECTED = {"BYOL": 350, "SwAV": 10, "MoCo": 330, "SparK": 0}
PREFIX = {name: layout.prefixes[0] for name, layout in medssl.LAYOUTS.items()}


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
    return medssl._new_resnet50(7).state_dict()


def save(content, folder: Path) -> Path:
    torch.save(content, folder / "model.pth")
    return folder / "model.pth"


def content_of(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("method", medssl.METHODS)
def test_the_authors_snippet_finds_in_a_stand_in_what_it_finds_in_their_files(method, files):
    state = content_of(files[method])
    if "module" in state:
        state = state["module"]
    if "state_dict" in state:
        state = state["state_dict"]
    removed = PREFIX[method] or "model."
    state = {key.replace(removed, ""): value for key, value in state.items()}
    result = torchvision.models.resnet50().load_state_dict(state, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"]
    assert len(result.unexpected_keys) == UNEXPECTED[method]


@pytest.mark.skipif(not LAYOUTS.exists(), reason="the recorded layouts are not beside this clone")
@pytest.mark.parametrize(
    "method,name", [("BYOL", "byol"), ("SwAV", "swav"), ("MoCo", "moco_mlp"), ("SparK", "spark")]
)
def test_a_stand_in_has_the_names_and_types_of_the_recorded_layout(method, name, files, backbone):
    recorded = json.loads((LAYOUTS / f"{name}.json").read_text())
    state = content_of(files[method])[recorded["state_dict_path"][0]]
    kinds = {"f32": torch.float32, "i64": torch.int64}
    assert set(state) == set(recorded["tensors"])
    for key, (kind, *shape) in recorded["tensors"].items():
        assert state[key].dtype == kinds[kind]
        if key.removeprefix(PREFIX[method]) in backbone:
            assert list(state[key].shape) == shape


@pytest.mark.parametrize("method", medssl.METHODS)
@pytest.mark.parametrize("asked", [True, False])
def test_every_tensor_of_a_file_arrives_bit_for_bit(method, asked, files):
    model, report = medssl.load_backbone(method if asked else None, files[method])
    content = content_of(files[method])
    state = content.get("state_dict", content.get("module"))
    loaded = model.state_dict()
    assert len(loaded) == report.loaded == 318
    assert all(torch.equal(loaded[name], state[PREFIX[method] + name]) for name in loaded)
    assert report.method == method
    assert report.missing_keys == ("fc.weight", "fc.bias")
    assert len(report.unexpected_keys) == UNEXPECTED[method]
    assert sum(count for count, _ in report.groups.values()) == UNEXPECTED[method]
    assert "318 of 318" in report.verdict and report.verdict in repr(report)
    assert not model.training and isinstance(model.fc, torch.nn.Identity)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2048)


@pytest.mark.parametrize("there,asked", list(itertools.permutations(medssl.METHODS, 2)))
def test_a_file_of_another_method_is_refused_by_both_names(there, asked, files):
    with pytest.raises(medssl.CheckpointError, match=rf"(?=.*\b{there}\b)(?=.*\b{asked}\b)"):
        medssl.load_backbone(asked, files[there])


def simsiam(b):
    return {"state_dict": {**with_prefix("online_network.encoder.", b), "p.0.bias": b["bn1.bias"]}}


def official_swav(b):
    head = {"projection_head.0.weight": b["bn1.bias"], "prototypes.weight": b["bn1.bias"]}
    return with_prefix("module.", {**b, **head})


def official_moco(b):
    state = {**with_prefix("encoder_q.", b), **with_prefix("encoder_k.", b)}
    state |= {"encoder_q.fc.0.weight": torch.ones(2), "queue": torch.ones(2)}
    return {"arch": "resnet50", "state_dict": with_prefix("module.", state), "optimizer": {}}


def imagenet_style(b):
    return {**b, "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}


def lightning_style(b):
    return {"state_dict": with_prefix("module.backbone.", b)}


LOOK_ALIKES = {
    imagenet_style: "ResNet50",
    lightning_style: "ResNet50",
    simsiam: "ResNet50",
    official_swav: "SwAV",
    official_moco: "MoCo",
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("make", LOOK_ALIKES)
def test_a_look_alike_is_called_what_it_is(make, legacy, backbone, tmp_path):
    path = tmp_path / "model.pth.tar"  # SwAV's and MoCo's own are of PyTorch before 1.6
    torch.save(make(backbone), path, _use_new_zipfile_serialization=not legacy)
    model, report = medssl.load_backbone(path=path)
    assert report.method == LOOK_ALIKES[make]
    assert torch.equal(model.conv1.weight, backbone["conv1.weight"])
    notes = " ".join(report.notes)
    assert "intensities are not known" in notes or "assumed" in notes


@pytest.mark.parametrize("make,asked", [(simsiam, "BYOL"), (lightning_style, "SwAV")])
def test_a_look_alike_is_not_taken_for_what_it_is_not(make, asked, backbone, tmp_path):
    with pytest.raises(medssl.CheckpointError, match=f"no {asked} backbone"):
        medssl.load_backbone(asked, save(make(backbone), tmp_path))


def test_a_plain_resnet50_is_sparks_only_on_request_and_with_a_note(backbone, tmp_path):
    path = save(backbone, tmp_path)
    _, report = medssl.load_backbone("SparK", path)
    assert "nothing but the request" in report.notes[0]
    assert medssl.load_backbone(path=path)[1].method == "ResNet50"


def still_pretraining(b):
    state = {**with_prefix("sparse_encoder.sp_cnn.", b), "imn_m": torch.ones(1), "config": {"a": 1}}
    return {"args": "x", "module": {**state, "mask_tokens.0": torch.ones(1)}, "is_pretrain": True}


ODD = {
    "by DDP": (lambda b: {"module": with_prefix("module.", b), "is_pretrain": 1}, "module."),
    "nested once more": (lambda b: {"state_dict": {"module": b}}, "request"),
    "of a run that goes on": (still_pretraining, "sparse_encoder.sp_cnn."),
    "without counters": (
        lambda b: {key: value for key, value in b.items() if not key.endswith("tracked")},
        "num_batches_tracked",
    ),
    "in channels_last": (
        lambda b: {**b, "conv1.weight": b["conv1.weight"].to(memory_format=torch.channels_last)},
        "request",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_that_is_right_loads_with_a_note(name, backbone, tmp_path):
    make, note = ODD[name]
    model, report = medssl.load_backbone("SparK", save(make(backbone), tmp_path))
    assert any(note in text for text in report.notes)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, backbone[name])


@pytest.mark.parametrize(
    "name,index,value",
    [
        ("layer2.1.conv2.weight", 5, float("nan")),
        ("bn1.bias", 0, float("inf")),
        ("layer3.5.bn2.running_var", 1, -0.5),
        ("conv1.weight", slice(None), 0.0),
    ],
)
def test_numbers_of_no_trained_network_are_named(name, index, value, backbone, tmp_path):
    state = {**backbone, name: backbone[name].clone()}
    state[name].view(-1)[index] = value
    with pytest.raises(medssl.CheckpointError, match=name):
        medssl.load_backbone("SparK", save({"module": state}, tmp_path))


WRONG = {
    r"conv1.weight.*64, 1, 7, 7.*64, 3, 7, 7": lambda b: {
        **b,
        "conv1.weight": b["conv1.weight"][:, :1].clone(),
    },
    r"conv1.weight.*float16.*float32": lambda b: {**b, "conv1.weight": b["conv1.weight"].half()},
    r"conv1.weight.*str": lambda b: {**b, "conv1.weight": "weights"},
    r"layer3.6.conv1.weight": lambda b: {**b, "layer3.6.conv1.weight": torch.ones(1)},
    r"1 of 318.*layer4.2.bn3.running_var": lambda b: {
        key: value for key, value in b.items() if key != "layer4.2.bn3.running_var"
    },
    r"0 of 318.*fc": lambda b: {"fc.weight": torch.ones(9, 2048)},
}


@pytest.mark.parametrize("words", WRONG)
def test_another_network_is_refused_with_the_key(words, backbone, tmp_path):
    with pytest.raises(medssl.CheckpointError, match=words):
        medssl.load_backbone("SparK", save(WRONG[words](backbone), tmp_path))


def test_two_methods_in_one_file_are_refused(backbone, tmp_path):
    state = {}
    for prefix in ("online_network.encoder.", "target_network.", "encoder_q.", "encoder_k."):
        state |= with_prefix(prefix, backbone)
    with pytest.raises(medssl.CheckpointError, match="BYOL and MoCo"):
        medssl.load_backbone("MoCo", save({"state_dict": state}, tmp_path))


def test_a_whole_module_is_told_what_to_save(tmp_path):
    path = save(torchvision.models.resnet18(), tmp_path)
    with pytest.raises(medssl.CheckpointError, match=r"resnet.ResNet.*state_dict\(\)") as caught:
        medssl.load_backbone("SparK", path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"method": "BYOOL"}, "'BYOOL'.*BYOL"),
        ({"method": "BYOL", "weights": "real"}, "weights 'real'"),
        ({"method": "random", "path": "a.pth"}, "method 'random'"),
        ({}, "method None"),
        ({"path": "nowhere.pth"}, "nowhere.pth.*no such file"),
    ],
)
def test_a_mistake_in_the_call_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        medssl.load_backbone(**arguments)


def test_the_control_is_torchvisions_initialisation_and_leaves_the_callers_dice(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, report = medssl.load_backbone("random", weights="published", seed=3)
    assert torch.equal(torch.get_rng_state(), before) and not report.demo
    torch.manual_seed(3)
    assert torch.equal(model.conv1.weight, torchvision.models.resnet50().conv1.weight)


def test_imagenet_weights_are_read_from_torchs_own_folder(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    url = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
    torch.save(imagenet_style(backbone), tmp_path / "checkpoints" / Path(url).name)
    _, report = medssl.load_backbone("ImageNet", weights="published")
    assert report.mean == medssl.IMAGENET["mean"] and report.weights == "ImageNet"


def test_a_random_stand_in_is_drawn_anew_for_each_seed_and_method(files):
    folder = files["SwAV"].parent.parent
    (folder / "stand-in").unlink(missing_ok=True)
    (folder / "stand-in").symlink_to(files["SwAV"].parent)
    prints = set()
    for method in ("SwAV", "MoCo"):
        for seed in (0, 1, 0):
            _, report = medssl.load_backbone(method, folder=folder, seed=seed)
            prints.add(report.fingerprint)
            assert report.demo and report.mean is None and report.name == f"{method} (random)"
    assert len(prints) == 4


@pytest.fixture
def published(files, tmp_path) -> Path:
    """A folder with SwAV's file as if it were the published one."""
    content = content_of(files["SwAV"])
    del content[medssl.STAND_IN_MARK]
    torch.save(content, tmp_path / files["SwAV"].name)
    return tmp_path


def test_the_first_load_of_a_published_file_is_recorded_and_another_refused(published):
    options = {"weights": "published", "folder": published}
    _, report = medssl.load_backbone("SwAV", **options)
    assert report.weights == "published" and not report.demo
    assert report.mean == medssl.LIDC["mean"]
    path = published / medssl.CHECKPOINTS["SwAV"].filename
    assert json.loads((published / "checksums.json").read_text()) == {path.name: report.sha256}
    medssl.load_backbone("SwAV", **options)
    content = content_of(path)
    content["state_dict"]["model.bn1.bias"] += 0.125
    torch.save(content, path)
    with pytest.raises(medssl.CheckpointError, match="SHA-256"):
        medssl.load_backbone("SwAV", **options)


def test_a_stand_in_never_passes_as_published_nor_the_other_way_round(files, published, tmp_path):
    name = files["SparK"].name
    (published / name).symlink_to(files["SparK"])
    with pytest.raises(medssl.CheckpointError, match="weights='published'"):
        medssl.load_backbone("SparK", weights="published", folder=published)
    (published / "stand-in").symlink_to(published)
    with pytest.raises(medssl.CheckpointError, match="weights='stand-in'"):
        medssl.load_backbone("SwAV", folder=published)


@pytest.mark.parametrize("method", medssl.SISTER_METHODS)
def test_the_sister_papers_checkpoints_have_swavs_layout(method, files):
    entry = medssl.CHECKPOINTS[method]
    _, report = medssl.load_backbone(method, files["SwAV"])
    assert report.loaded == 318 and entry.layout == "SwAV"
    assert (entry.mean is None) == ("PETCT" in method)


def test_a_checkpoint_of_ones_own_needs_one_entry(backbone, tmp_path, monkeypatch):
    path = save({"net": with_prefix("student.", backbone), "model": {"a": 1}}, tmp_path)
    entry = medssl.Checkpoint(path=str(path), wrapper="net", mean=(0.2,) * 3, std=(0.1,) * 3)
    monkeypatch.setitem(medssl.CHECKPOINTS, "mine", entry)
    model, report = medssl.load_backbone("mine", weights="published")
    assert torch.equal(model.conv1.weight, backbone["conv1.weight"])
    assert (report.name, report.weights, report.demo) == ("mine", "file", False)
    assert report.mean == (0.2,) * 3
    assert medssl.load_backbone("mine")[1].demo, "beside stand-ins, its study is a demo"


def test_its_prefix_chooses_one_of_two_networks(files, monkeypatch):
    entry = medssl.Checkpoint(path=str(files["BYOL"]), prefix="online_network.encoder.")
    monkeypatch.setitem(medssl.CHECKPOINTS, "mine", entry)
    assert medssl.load_backbone("mine")[1].loaded == 318


def test_an_exported_backbone_loads_here_and_in_plain_torchvision(files, tmp_path):
    model, report = medssl.load_backbone("SwAV", files["SwAV"])
    path = medssl.export_backbone(model, tmp_path / "a" / "swav.safetensors", report)
    again, later = medssl.load_backbone(path=path)
    plain = torchvision.models.resnet50()
    assert plain.load_state_dict(load_file(path), strict=False).unexpected_keys == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert torch.equal(plain.state_dict()[name], tensor)
    assert (later.method, later.fingerprint, later.demo) == ("SwAV", report.fingerprint, True)
    with pytest.raises(medssl.CheckpointError, match="SwAV.*BYOL"):
        medssl.load_backbone("BYOL", path)


def test_a_trained_network_is_not_exported_as_its_checkpoint(files, tmp_path):
    model, report = medssl.load_backbone("SwAV", files["SwAV"])
    model.bn1.bias.data += 1
    with pytest.raises(medssl.CheckpointError, match="before training"):
        medssl.export_backbone(model, tmp_path / "swav.safetensors", report)
    with pytest.raises(ValueError, match="safetensors"):
        medssl.export_backbone(model, tmp_path / "swav.pth", report)


def test_a_changed_export_is_refused(files, tmp_path):
    model, report = medssl.load_backbone("SparK", files["SparK"])
    path = medssl.export_backbone(model, tmp_path / "spark.safetensors", report)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(medssl.CheckpointError, match="fingerprint|numbers"):
        medssl.load_backbone(path=path)


def test_a_runs_own_network_is_told_where_it_belongs(backbone, tmp_path):
    save_file(backbone, tmp_path / "best.safetensors")
    with pytest.raises(medssl.CheckpointError, match="notebook 07"):
        medssl.load_backbone("SparK", tmp_path / "best.safetensors")
