"""Loading: the right tensors or an error that says what is wrong; never harm, never a guess."""

import dataclasses
import html
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import faulty_checkpoints as files
import fuzz_load
import pytest
import torch
import torchvision
from notebook_cells import run_cells
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import medssl_utils as medssl
from medssl_utils import CheckpointError

try:
    import resource
except ImportError:  # Windows
    resource = None

# Files of true size take time to build and read. All that run code are tried here; of the others
# every second one (rows L3 to L9) or every fifth. `make faults` tries them all.
CASES = [case for case in files.CASES if not case.trusted]
BAD = [case for case in CASES if case.must == "refused"]
REFUSED = ([case for case in BAD if case.row in ("L1", "L2")]
           + [case for case in BAD if "L3" <= case.row <= "L9"][::2]
           + [case for case in BAD if len(case.row) == 3][::5])
LOADED = [case for case in CASES if case.must != "refused"][::5]


def stand_in(folder: Path, method: str) -> Path:
    return folder / "stand-in" / medssl.CHECKPOINTS[method].filename


def saved(path: Path, state: dict, wrapper: str = "state_dict") -> Path:
    torch.save({wrapper: state}, path)
    return path


def same(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[k], tensors[k]) for k in state)


@pytest.fixture(scope="module")
def byol(stand_ins) -> tuple[torch.nn.Module, medssl.KeyReport]:
    return medssl.load_backbone("BYOL", stand_in(stand_ins, "BYOL"), cache=False)


# Read ------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_a_faulty_file_is_refused_with_its_reason(case, tmp_path):
    path = case.build(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        medssl.load_backbone(case.method, path, allow_extra=case.allow_extra, cache=False)
    assert re.search(case.says, str(caught.value), re.IGNORECASE), caught.value
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not files.side_effect(tmp_path)


@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.id)
def test_an_odd_but_right_file_gives_exactly_its_tensors(case, tmp_path):
    path = case.build(tmp_path)
    try:
        model, report = medssl.load_backbone(
            case.method, path, allow_extra=case.allow_extra, cache=False)
    except CheckpointError:
        assert case.must == "either"
        return
    finally:
        assert not files.side_effect(tmp_path)
    assert same(model, case.expected())
    assert re.search(case.reports, str(report), re.IGNORECASE)


def test_a_hundred_mutations_give_no_wrong_weights(tmp_path):
    outcomes, failures = fuzz_load.fuzz(100, 1, tmp_path)
    assert failures == []
    assert outcomes["refused"] > 50


@pytest.mark.parametrize("method", medssl.METHODS)
def test_the_state_dict_is_the_files_whole_state_dict(method, stand_ins):
    path = stand_in(stand_ins, method)
    wrapper = medssl.CHECKPOINTS[method].wrapper
    expected = torch.load(path, map_location="cpu", weights_only=True)[wrapper]
    found = medssl.load_state_dict(path)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_the_error_names_the_extra_that_accepts_a_pickled_name(tmp_path, monkeypatch):
    settings = type("Settings", (), {"__module__": "lab"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lab", SimpleNamespace(Settings=settings))
        torch.save({"state_dict": {"a": torch.ones(2)}, "hyper_parameters": settings()},
                   tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=re.escape("allow_extra=('lab.Settings',)")):
        medssl.load_state_dict(tmp_path / "x.ckpt")
    found = medssl.load_state_dict(tmp_path / "x.ckpt", allow_extra=["lab.Settings"])
    assert found["a"].tolist() == [1, 1]


def test_the_error_keeps_the_extras_that_were_given(tmp_path, monkeypatch):
    kinds = [type(name, (), {"__module__": "lab"}) for name in ("First", "Second")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lab", SimpleNamespace(First=kinds[0], Second=kinds[1]))
        torch.save({"state_dict": {"a": torch.ones(2)}, "more": [kind() for kind in kinds]},
                   tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=re.escape("extra=('lab.First', 'lab.Second')")):
        medssl.load_state_dict(tmp_path / "x.ckpt", allow_extra="lab.First")


def test_a_list_of_records_that_no_weight_file_has_is_refused_unread(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.ckpt", {"a": torch.ones(2)})
    monkeypatch.setattr(medssl, "MAX_PICKLE_BYTES", path.stat().st_size)
    assert list(medssl.load_state_dict(path)) == ["a"]
    monkeypatch.setattr(medssl, "MAX_PICKLE_BYTES", 300)
    with (monkeypatch.context() as patch,
          pytest.raises(CheckpointError, match=r"it lists records in \d\d\d bytes, more than")):
        patch.setattr("zipfile.ZipFile", None)
        medssl.load_state_dict(path)


def test_a_file_that_goes_on_behind_its_directory_is_refused(tmp_path):
    path = saved(tmp_path / "x.ckpt", {"a": torch.ones(2)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + b"\x0c\0" + b"\xff" * 12)  # as a comment to it
    with pytest.raises(CheckpointError, match="the file doesn't end where it does"):
        medssl.load_state_dict(path)


def test_two_files_joined_to_one_are_refused(tmp_path):
    for value in (1, 2):
        torch.save({"state_dict": {"a": torch.full((9,), value)}}, tmp_path / f"{value}.ckpt")
    joined = (tmp_path / "1.ckpt").read_bytes() + (tmp_path / "2.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(joined)  # torch.load reads the one, zipfile the other
    with pytest.raises(CheckpointError, match="first record isn't where the file begins"):
        medssl.load_state_dict(tmp_path / "x.ckpt")


def test_a_size_too_long_to_print_is_refused(tmp_path):
    path = files.lying(files.CONV, length=1 << 20_000)(tmp_path)
    with pytest.raises(CheckpointError, match="something that is no storage"):
        medssl.load_state_dict(path)


def test_a_legacy_file_whose_storages_are_listed_as_numbers_is_refused(tmp_path):
    state = {"a": torch.ones(2)}
    key = str(state["a"].untyped_storage()._cdata)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.pth").read_bytes()
    assert (text := pickle.dumps([key], 2)) in whole
    (tmp_path / "old.pth").write_bytes(whole.replace(text, pickle.dumps([int(key)], 2)))
    with pytest.raises(CheckpointError, match="list of storages isn't its tensors' list"):
        medssl.load_state_dict(tmp_path / "old.pth")


def test_what_a_hostile_file_nested_is_never_hashed_or_printed(tmp_path):
    storage = files.name("torch", "FloatStorage")  # doubled 60 times, a tuple would take for ever
    path = files.repickled(lambda body: body.replace(storage, b")", 1))(tmp_path)
    with pytest.raises(CheckpointError, match="a reference to something that is no storage"):
        medssl.load_state_dict(path)
    deep = files.legacy_stream(b"}").removesuffix(pickle.dumps([], 2))
    path.write_bytes(deep + b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    with pytest.raises(CheckpointError, match="list of storages isn't its tensors' list"):
        medssl.load_state_dict(path)


def test_a_tensor_or_settings_beside_the_wrapper_do_not_hide_it(tmp_path):
    state = {"a": torch.ones(2)}
    torch.save({"state_dict": state, "best_acc1": torch.tensor(0.5), "model": {"depth": 50}},
               tmp_path / "x.ckpt")
    assert list(medssl.load_state_dict(tmp_path / "x.ckpt")) == ["a"]
    torch.save({"state_dict": state, "model": state}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="more than one set"):
        medssl.load_state_dict(tmp_path / "x.ckpt")


def test_a_file_saved_on_a_gpu_opens_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = saved(tmp_path / "gpu.ckpt", {"a": torch.arange(3)})
    assert medssl.load_state_dict(path)["a"].tolist() == [0, 1, 2]


# Match -----------------------------------------------------------------------


@pytest.mark.parametrize(("found", "asked"), list(itertools.permutations(medssl.METHODS, 2)))
def test_a_file_of_one_method_asked_for_as_another_names_both(found, asked, stand_ins):
    with pytest.raises(CheckpointError, match=f"is a {found} checkpoint, but {asked} was asked"):
        medssl.load_backbone(asked, stand_in(stand_ins, found), cache=False)


def test_a_control_is_no_file(stand_ins):
    with pytest.raises(CheckpointError, match="SparK .*ImageNet is loaded without a path"):
        medssl.load_backbone("ImageNet", stand_in(stand_ins, "SparK"), cache=False)


@pytest.mark.parametrize("method", medssl.METHODS)
def test_without_a_method_the_files_own_is_recognised(method, stand_ins):
    report = medssl.load_backbone(path=stand_in(stand_ins, method), cache=False)[1]
    assert (report.method, report.loaded) == (method, 318)


def test_the_backbone_maps_images_to_2048_features(byol):
    model, _ = byol
    assert not model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2048)
    assert len(model.state_dict()) == 318
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plain_resnet50_is_not_guessed_to_be_spark(tmp_path):
    path = saved(tmp_path / "plain.pth", files.weights())
    with pytest.raises(CheckpointError, match="nothing that tells the method"):
        medssl.load_backbone(path=path)
    report = medssl.load_backbone("SparK", path, cache=False)[1]
    assert "nothing but the prefix" in str(report)


def test_a_plain_resnet50_asked_for_as_another_method_is_not_called_spark_for_sure(tmp_path):
    path = saved(tmp_path / "plain.pth", files.weights())
    with pytest.raises(CheckpointError, match="BYOL was asked for.*another ResNet50 may have the same"):
        medssl.load_backbone("BYOL", path)


def test_what_the_user_accepts_does_not_tell_the_method(tmp_path):
    state = {**files.prefixed("model.", files.weights()), "model.fc.weight": torch.ones(2)}
    path = saved(tmp_path / "classifier.ckpt", state)
    with pytest.raises(CheckpointError, match="nothing that tells the method"):
        medssl.load_backbone(path=path, allow_extra=["model.fc."])


def test_a_classifier_is_not_taken_for_spark(tmp_path):
    state = {**files.weights(), "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}
    with pytest.raises(CheckpointError, match=re.escape("allow_extra=('fc.',)")):
        medssl.load_backbone("SparK", saved(tmp_path / "classifier.pth", state, "module"))


def test_an_unknown_group_loads_only_when_allowed_and_is_recorded(tmp_path):
    state = {**files.prefixed("model.", files.weights()), "model.prototypes.weight": torch.ones(2),
             "model.projector_2.0.weight": torch.ones(2), "teacher.weight": torch.ones(2)}
    path = saved(tmp_path / "extra.ckpt", state)
    extra = ("model.projector_2.", "teacher.")
    with pytest.raises(CheckpointError, match=re.escape(f"allow_extra={extra!r}")):
        medssl.load_backbone("SwAV", path)
    report = medssl.load_backbone("SwAV", path, allow_extra=extra, cache=False)[1]
    assert report.allow_extra == extra
    assert report.groups["teacher."] == (1, "accepted by allow_extra")
    assert "are not quite those known of a SwAV file: see the table" in report.verdict


def test_a_single_extra_may_be_a_plain_text(tmp_path):
    state = {**files.weights(), "teacher.weight": torch.ones(2)}
    path = saved(tmp_path / "x.pth", state, "module")
    report = medssl.load_backbone("SparK", path, allow_extra="teacher.", cache=False)[1]
    assert report.allow_extra == ("teacher.",)


def test_an_unknown_head_of_the_backbone_is_named_apart_from_it(tmp_path):
    prefix = medssl.CHECKPOINTS["BYOL"].prefix
    state = {**files.prefixed(prefix, files.weights()), f"{prefix}fc.weight": torch.ones(2)}
    path = saved(tmp_path / "x.ckpt", state)
    with pytest.raises(CheckpointError, match=re.escape(f"allow_extra=('{prefix}fc.',)")):
        medssl.load_backbone("BYOL", path)


def test_an_extra_that_a_file_does_not_need_is_not_reported(tmp_path):
    path = saved(tmp_path / "x.pth", files.weights(), "module")
    report = medssl.load_backbone("SparK", path, allow_extra=("teacher.", "lab.Settings"))[1]
    assert report == medssl.load_backbone("SparK", path)[1]
    assert report.allow_extra == ()
    assert "are those known of a SparK file" in report.verdict


def test_what_was_accepted_in_a_published_file_is_recorded_and_holds_from_then_on(tmp_path):
    state = {**files.weights(), "teacher.weight": torch.ones(2)}
    path = saved(tmp_path / "spark_resnet50.pth", state, "module")
    arguments = {"weights": "published", "folder": tmp_path}
    with pytest.raises(CheckpointError, match="kept in checksums.json"):
        medssl.load_backbone("SparK", **arguments)
    medssl.load_backbone("SparK", allow_extra=["teacher.", "never."], **arguments)
    assert medssl._checksums(tmp_path)[path.name]["allow_extra"] == ("teacher.",)
    for cache in (False, True):
        report = medssl.load_backbone("SparK", cache=cache, **arguments)[1]
        assert report.allow_extra == ("teacher.",)
        assert "accepted by you beyond what is known: teacher." in str(report)


def test_what_was_accepted_in_one_file_is_not_accepted_in_another(tmp_path):
    state = {**files.weights(), "teacher.weight": torch.ones(2)}
    path = saved(tmp_path / "spark_resnet50.pth", state, "module")
    arguments = {"weights": "published", "folder": tmp_path}
    medssl.load_backbone("SparK", allow_extra=["teacher."], **arguments)
    saved(path, {**state, **files.weights(1)}, "module")
    with pytest.raises(CheckpointError, match="at its first load it was"):
        medssl.load_backbone("SparK", **arguments)
    saved(path, {**state, "student.weight": torch.ones(2)}, "module")
    with pytest.raises(CheckpointError, match=re.escape("allow_extra=('teacher.', 'student.')")):
        medssl.load_backbone("SparK", **arguments)


def test_notebook_02_takes_what_the_user_accepts_and_later_runs_need_not_name_it(tmp_path):
    state = {**files.weights(), "teacher.weight": torch.ones(2)}
    saved(tmp_path / "spark_resnet50.pth", state, "module")
    names = {"weights": "published", "methods": ["SparK"], "checkpoints_dir": str(tmp_path)}
    run_cells("02_load_and_check_keys", **names, allow_extra=["teacher."])
    shown = run_cells("02_load_and_check_keys", **names)["displayed"]
    assert [report.allow_extra for report in shown] == [("teacher.",)] * 2


def test_an_extra_does_not_excuse_a_foreign_backbone(tmp_path):
    state = {**files.weights(), "layer4.3.conv1.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"doesn't have \(first: layer4\.3\.conv1\.weight\)"):
        medssl.load_backbone("SparK", saved(tmp_path / "x.pth", state, "module"),
                             allow_extra=("layer4.", "layer4.3."))


def test_tensors_that_share_numbers_are_refused(tmp_path):
    state = dict(files.weights())
    state["layer1.1.bn1.weight"] = state["layer1.0.bn1.weight"]
    with pytest.raises(CheckpointError, match=r"overlap another \(first: layer1\.0\.bn1\.weight\)"):
        medssl.load_backbone("SparK", saved(tmp_path / "x.pth", state, "module"))


@pytest.mark.parametrize(("arguments", "words"), [
    ({"method": "BYOl"}, "Did you mean 'BYOL'"),
    ({"method": "BYOL", "weights": "real"}, "weights 'real' is not known"),
    ({"method": "random", "weights": "standin"}, "Did you mean 'stand-in'"),
    ({"method": "BYOL", "cache": "Verify"}, "cache='Verify' is not known"),
    ({"method": "checkpoints/byol"}, "looks like a file: give it as path="),
    ({"method": Path("byol.ckpt")}, "looks like a file: give it as path="),
    ({"path": "x.ckpt", "allow_extra": [["a"]]}, "names are expected, each a text"),
    ({}, "Give a method"),
])
def test_unknown_settings_are_refused(arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        medssl.load_backbone(folder=tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


# Report ----------------------------------------------------------------------


def test_the_report_says_it_in_a_terminal(byol):
    text = str(byol[1])
    assert "318 of 318 backbone tensors loaded" in text
    assert re.search(r"target_network\.encoder\. +318 +momentum \(target\) encoder", text)
    assert re.search(r"missing_keys +fc\.weight, fc\.bias +fc\.weight, fc\.bias", text)
    assert "STAND-IN" in text


def test_the_report_is_a_table_in_a_notebook(byol):
    text = byol[1]._repr_html_()
    assert "<table" in text and "momentum (target) encoder" in text
    assert html.escape(byol[1].verdict) in text


def test_a_report_with_groups_leads_over_to_them_and_one_without_does_not(byol, stand_ins):
    _, spark = medssl.load_backbone("SparK", folder=stand_ins, cache=False)
    words = {r.method: list(r.to_frame()["what it is"]) for r in (byol[1], spark)}
    assert words["BYOL"][2] == "left out, by group:" and len(words["BYOL"]) == 8
    assert words["SparK"][2:] == ["nothing to leave out"]


def test_the_report_shows_no_path_of_this_machine(byol, stand_ins):
    assert str(stand_ins) not in str(byol[1]) + byol[1]._repr_html_()


def test_every_tensor_of_a_stand_in_differs_from_a_fresh_network(byol):
    assert byol[1].changed == 318
    assert "perhaps it was never trained" not in str(byol[1])


def test_an_untrained_network_is_counted_as_unchanged_where_it_is(tmp_path):
    state = torchvision.models.resnet50().state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    report = medssl.load_backbone("SparK", saved(tmp_path / "x.pth", state, "module"))[1]
    assert report.changed == 53  # the convolutions are random, BatchNorm is as it begins
    assert "perhaps it was never trained" in str(report)


def test_the_fingerprint_is_of_the_weights_not_of_the_file(tmp_path):
    state = files.weights()
    torch.save({"module": state}, tmp_path / "new.pth")
    torch.save({"module": state, "epoch": 3}, tmp_path / "old.pth",
               _use_new_zipfile_serialization=False)
    new, old = (medssl.load_backbone("SparK", tmp_path / name, cache=False)[1]
                for name in ("new.pth", "old.pth"))
    assert new.fingerprint == old.fingerprint
    assert new.sha256 != old.sha256


# Stand-in, published, controls -----------------------------------------------


def test_a_stand_in_never_passes_as_published(stand_ins, tmp_path):
    (tmp_path / "byol_resnet50.ckpt").write_bytes(stand_in(stand_ins, "BYOL").read_bytes())
    with pytest.raises(CheckpointError, match="is a stand-in with random weights"):
        medssl.load_backbone("BYOL", weights="published", folder=tmp_path)
    assert not (tmp_path / "checksums.json").exists()


def test_a_file_without_the_mark_never_passes_as_a_stand_in(tmp_path):
    path = tmp_path / "stand-in" / "spark_resnet50.pth"
    path.parent.mkdir()
    saved(path, files.weights(), "module")
    with pytest.raises(CheckpointError, match="has no stand-in's mark"):
        medssl.load_backbone("SparK", folder=tmp_path)


def test_the_first_verified_load_records_the_checksum_and_then_other_weights_are_refused(tmp_path):
    path = saved(tmp_path / "spark_resnet50.pth", files.weights(), "module")
    report = medssl.load_backbone("SparK", weights="published", folder=tmp_path)[1]
    recorded = json.loads((tmp_path / "checksums.json").read_text())
    assert recorded[path.name]["sha256"] == report.sha256 == medssl._digest(path)
    assert (report.weights, report.demo) == ("published", False)
    saved(path, files.weights(1), "module")
    with pytest.raises(CheckpointError, match=f"at its first load it was {report.sha256}"):
        medssl.load_backbone("SparK", path)


def test_a_file_recorded_by_another_process_meanwhile_is_held_against_that(tmp_path, monkeypatch):
    path = saved(tmp_path / "spark_resnet50.pth", files.weights(), "module")
    check = medssl._check_values

    def other_first(tensors):
        medssl._record_checksum(path, "0" * 64)
        check(tensors)
    monkeypatch.setattr(medssl, "_check_values", other_first)
    with pytest.raises(CheckpointError, match=f"at its first load it was {'0' * 64}"):
        medssl.load_backbone("SparK", weights="published", folder=tmp_path)


def test_a_file_that_fails_a_check_is_not_recorded(tmp_path):
    state = {**files.weights(), "bn1.running_var": -torch.ones(64)}
    saved(tmp_path / "spark_resnet50.pth", state, "module")
    with pytest.raises(CheckpointError, match=r"bn1\.running_var holds negative values"):
        medssl.load_backbone("SparK", weights="published", folder=tmp_path)
    assert not (tmp_path / "checksums.json").exists()


def test_two_processes_may_ask_for_a_stand_in_at_once(tmp_path):
    code = ("import sys, medssl_utils as m; "
            "print(m.load_backbone('SparK', folder=sys.argv[1])[1].fingerprint)")
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(medssl.__file__).parent)}
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True,
                             stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    answers = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1]


def test_the_random_control_follows_its_seed_and_leaves_the_callers_random_state(tmp_path):
    before = torch.random.get_rng_state()
    first, report = medssl.load_backbone("random", seed=1)
    again = medssl.load_backbone("random", seed=1)[1]
    other = medssl.load_backbone("random", seed=2)[1]
    assert report.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    fresh = torchvision.models.resnet50()
    assert torch.equal(first.conv1.weight, fresh.conv1.weight)
    assert (report.method, report.weights, report.changed) == ("random", "random", 0)


def test_imagenet_weights_that_cannot_be_fetched_are_an_error(tmp_path, monkeypatch):
    def offline(*arguments, **keywords):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no network.*resnet50-\w+\.pth.*by hand"):
        medssl.load_backbone("ImageNet", weights="published")


def test_imagenet_weights_load_from_torchvisions_cache(monkeypatch):
    with torch.device("meta"):
        whole = torchvision.models.resnet50()
    state = {**files.weights(), "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}
    whole.load_state_dict(state, assign=True)
    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict",
                        lambda self, **keywords: whole.state_dict())
    model, report = medssl.load_backbone("ImageNet", weights="published")
    assert same(model, files.weights())
    assert (report.method, report.weights, report.demo) == ("ImageNet", "ImageNet", False)
    assert (report.loaded, report.changed) == (318, 318)


# Convert ---------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path) -> Path:
    """A checkpoint that was loaded once, so that its cache lies beside it."""
    path = saved(tmp_path / "spark.pth", files.weights(), "module")
    medssl.load_backbone("SparK", path)
    return path


def reader_of_originals(monkeypatch) -> list[str]:
    """Note each time that an original is read."""
    read, original = [], medssl._load_original
    monkeypatch.setattr(medssl, "_load_original",
                        lambda *arguments: read.append("read") or original(*arguments))
    return read


@pytest.mark.parametrize("cache", [True, "verify"])
def test_the_cache_gives_the_same_tensors_and_report(cache, cached, monkeypatch):
    fresh = medssl.load_backbone("SparK", cached, cache=False)[1]
    read = reader_of_originals(monkeypatch)
    model, report = medssl.load_backbone("SparK", cached, cache=cache)
    assert read == []
    assert same(model, files.weights())
    assert report == fresh


def test_a_change_of_the_original_outdates_the_cache(cached):
    saved(cached, files.weights(1), "module")
    model, _ = medssl.load_backbone("SparK", cached)
    assert same(model, files.weights(1))


def test_an_original_of_the_same_age_but_another_size_outdates_the_cache(cached, monkeypatch):
    stamp = cached.stat().st_mtime_ns
    torch.save({"module": files.weights(1), "more": "x" * 999}, cached)
    os.utime(cached, ns=(stamp, stamp))
    assert same(medssl.load_backbone("SparK", cached)[0], files.weights(1))


@pytest.mark.parametrize("cache", [True, "verify"])
@pytest.mark.parametrize("old_format", [False, True])
def test_other_weights_of_the_same_size_and_age_outdate_the_cache(cache, old_format, tmp_path):
    paths = [tmp_path / "first.pth", tmp_path / "other.pth"]
    for seed, path in enumerate(paths):
        torch.save({"module": files.weights(seed)}, path,
                   _use_new_zipfile_serialization=not old_format)
        os.utime(path, ns=(1, 1))  # as an archive does whose files are all of one date
    assert paths[0].stat().st_size == paths[1].stat().st_size
    medssl.load_backbone("SparK", paths[0])
    os.replace(paths[1], paths[0])
    assert same(medssl.load_backbone("SparK", paths[0], cache=cache)[0], files.weights(1))


def test_the_cache_of_a_renamed_file_reports_the_new_name(cached, monkeypatch):
    read, renamed = reader_of_originals(monkeypatch), cached.with_name("mine.pth")
    os.replace(medssl._cache_path(cached), medssl._cache_path(renamed))
    os.replace(cached, renamed)
    assert medssl.load_backbone("SparK", renamed)[1].path == "mine.pth"
    assert read == []


@pytest.mark.parametrize("hidden", [False, True])
def test_a_damaged_cache_is_written_anew(hidden, cached):
    converted = medssl._cache_path(cached)
    stamp = converted.stat().st_mtime_ns
    with open(converted, "r+b") as file:
        file.seek(-999, os.SEEK_END)
        file.write(b"\1")
    if hidden:  # as a failing disk does it: the time stamp stays
        os.utime(converted, ns=(stamp, stamp))
    model, _ = medssl.load_backbone("SparK", cached, cache="verify" if hidden else True)
    assert same(model, files.weights())
    assert same(medssl.load_backbone("SparK", cached, cache="verify")[0], files.weights())


def test_a_cut_cache_is_written_anew(cached):
    converted = medssl._cache_path(cached)
    stamp = converted.stat().st_mtime_ns
    os.truncate(converted, 1000)
    os.utime(converted, ns=(stamp, stamp))
    assert same(medssl.load_backbone("SparK", cached)[0], files.weights())


def test_the_cache_does_not_carry_an_extra_to_someone_who_did_not_allow_it(tmp_path):
    state = {**files.weights(), "teacher.weight": torch.ones(2)}
    path = saved(tmp_path / "x.pth", state, "module")
    medssl.load_backbone("SparK", path, allow_extra=("teacher.",))
    with pytest.raises(CheckpointError, match="teacher"):
        medssl.load_backbone("SparK", path)


def test_the_cache_does_not_hide_a_mix_up(cached):
    with pytest.raises(CheckpointError, match="is a SparK checkpoint, but BYOL was asked"):
        medssl.load_backbone("BYOL", cached)


def test_the_cache_does_not_tell_the_method_of_a_plain_resnet50(tmp_path):
    path = saved(tmp_path / "plain.pth", files.weights())
    medssl.load_backbone("SparK", path)
    with pytest.raises(CheckpointError, match="nothing that tells the method"):
        medssl.load_backbone(path=path)
    with pytest.raises(CheckpointError, match="another ResNet50 may have the same"):
        medssl.load_backbone("BYOL", path)


def test_training_a_cached_backbone_leaves_the_cache_alone(cached):
    model, _ = medssl.load_backbone("SparK", cached)
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert same(medssl.load_backbone("SparK", cached)[0], files.weights())


def test_a_folder_that_cannot_be_written_to_only_costs_the_cache(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError("read-only")
    path = saved(tmp_path / "x.pth", files.weights(), "module")
    monkeypatch.setattr(medssl, "_save_backbone", refuse)
    assert same(medssl.load_backbone("SparK", path)[0], files.weights())


@pytest.mark.skipif(resource is None, reason="needs a limit on the size of files")
def test_a_full_disk_only_costs_the_cache(tmp_path):
    path = saved(tmp_path / "x.pth", files.weights(), "module")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # stands for a full disk
    try:
        assert same(medssl.load_backbone("SparK", path)[0], files.weights())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["", "."])
def test_a_folder_in_the_place_of_a_file_is_named(path):
    with pytest.raises(CheckpointError, match="it is a folder, not a file"):
        medssl.load_backbone("SparK", path)


def test_a_file_that_cannot_be_read_is_named(cached):
    (cached.parent / "checksums.json").mkdir()
    with pytest.raises(CheckpointError, match=r"spark\.pth: .*Is a directory.*checksums\.json"):
        medssl.load_backbone("SparK", cached)


def test_a_file_replaced_while_it_is_read_is_refused(cached, monkeypatch):
    monkeypatch.setattr(medssl, "_check_values", lambda tensors: os.utime(cached, ns=(1, 1)))
    with pytest.raises(CheckpointError, match="replaced while it was read"):
        medssl.load_backbone("SparK", cached, cache=False)


@pytest.fixture(scope="module")
def exported(byol, tmp_path_factory) -> Path:
    model, report = byol
    return medssl.export_backbone(
        model, tmp_path_factory.mktemp("exported") / "byol.safetensors", report)


def test_an_exported_backbone_needs_nothing_of_this_project(exported, byol):
    plain = torchvision.models.resnet50()
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(load_file(exported))
    assert same(plain, byol[0].state_dict())


def test_an_exported_backbone_tells_where_it_comes_from(exported, byol):
    with safe_open(exported, "pt") as file:
        told = file.metadata()
    assert (told["method"], told["weights"]) == ("BYOL", "stand-in")
    assert told["source_sha256"] == byol[1].sha256
    assert told["fingerprint"] == byol[1].fingerprint


def test_an_exported_backbone_loads_again_and_stays_a_stand_in(exported, byol):
    model, report = medssl.load_backbone(path=exported)
    assert same(model, byol[0].state_dict())
    assert (report.method, report.demo, report.fingerprint) == ("BYOL", True, byol[1].fingerprint)
    assert "exported from byol_resnet50.ckpt" in str(report)


def test_an_exported_backbone_asked_for_as_another_method_names_both(exported):
    with pytest.raises(CheckpointError, match="is a BYOL checkpoint, but MoCo was asked"):
        medssl.load_backbone("MoCo", exported)


def test_a_changed_export_is_refused(exported, tmp_path):
    path = tmp_path / "changed.safetensors"
    data = bytearray(exported.read_bytes())
    data[-999] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those it was written with"):
        medssl.load_backbone("BYOL", path)


def test_an_export_with_other_weights_is_refused(byol, tmp_path):
    path = medssl._save_backbone(files.weights(), tmp_path / "x.safetensors", byol[1])
    with pytest.raises(CheckpointError, match="not those it was written with"):
        medssl.load_backbone("BYOL", path)


def test_a_web_page_under_the_name_of_an_export_is_called_so(tmp_path):
    (tmp_path / "x.safetensors").write_text("<html>Sign in</html>")
    with pytest.raises(CheckpointError, match="it is a web page"):
        medssl.load_backbone("BYOL", tmp_path / "x.safetensors")


@pytest.mark.parametrize("change", [
    {"notes": 5}, {"notes": ["\x1b[2K"]}, {"groups": [1]}, {"groups": {"a.": 1}}, {"loaded": 300},
    {"method": "DINO"}, {"method": ["BYOL"]}, {"missing_keys": [1]}, {"of_tomorrow": 1}])
def test_an_export_whose_report_is_not_ours_is_refused(change, exported, tmp_path):
    with safe_open(exported, "pt") as file:
        told = file.metadata()
    told["report"] = json.dumps({**json.loads(told["report"]), **change})
    save_file(load_file(exported), tmp_path / "x.safetensors", told)
    with pytest.raises(CheckpointError, match="is no exported backbone.*: export it anew"):
        medssl.load_backbone(path=tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["x.pt", "x"])
def test_a_name_by_which_an_export_could_not_be_loaded_is_refused(name, byol, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: the name .* must end in .safetensors"):
        medssl.export_backbone(byol[0], tmp_path / name, byol[1])
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_no_state_dict_and_the_error_says_what_takes_it(exported):
    with pytest.raises(CheckpointError, match="load_backbone takes what export_backbone wrote"):
        medssl.load_state_dict(exported)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="export_backbone didn't write"):
        medssl.load_backbone("BYOL", tmp_path / "foreign.safetensors")


def test_a_trained_model_is_not_exported_under_the_checkpoints_report(byol, tmp_path):
    model, report = medssl.load_backbone("random")
    with torch.no_grad():
        model.conv1.weight.add_(1)
    with pytest.raises(CheckpointError, match="no longer those of its report"):
        medssl.export_backbone(model, tmp_path / "x.safetensors", report)
    with pytest.raises(CheckpointError, match="no longer those of its report"):
        medssl.export_backbone(torch.nn.Sequential(model), tmp_path / "x.safetensors", report)
    assert list(tmp_path.iterdir()) == []


def test_a_report_cannot_be_changed_by_accident(byol):
    with pytest.raises(dataclasses.FrozenInstanceError):
        byol[1].weights = "published"


def test_a_control_beside_stand_ins_is_part_of_a_demo():
    assert medssl.load_backbone("random", weights="stand-in")[1].demo
    assert not medssl.load_backbone("random", weights="published")[1].demo
