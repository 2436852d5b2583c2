"""Notebook 06: what it says of a checkpoint that knows something, and of its own pictures."""

import base64
import copy
import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from notebook_cells import ROOT, run_cells
from PIL import Image
from torch import nn

import medssl_utils as medssl

STEM = "06_look_inside"
NOTEBOOK = nbformat.read(ROOT / "notebooks" / f"{STEM}.ipynb", as_version=4)


# --- what pre-training learnt ---------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["nearest neighbours", "linear evaluation"])
def test_a_planted_checkpoint_is_better_than_random_and_a_stand_in_is_not(looked_inside, probe):
    known = looked_inside["known"].set_index(["probe", "network"])["beyond"]
    assert known[probe, "file"]
    assert not known[probe, "SparK"]


def test_the_words_agree_with_the_numbers(looked_inside, capsys):
    run_cells(STEM, "for name in names:\n    by =", **looked_inside)
    said = capsys.readouterr().out.splitlines()
    assert "SparK: not shown to be better than a random network." in said
    assert ("file: better than a random network by nearest neighbours and linear evaluation."
            in said)


def test_random_networks_are_rarely_said_to_be_better_than_random(looked_inside):
    known = looked_inside["known"]
    assert not known.loc[known["network"].str.startswith("random"), "beyond"].any()


def test_nothing_is_beyond_random_networks_that_are_perfect(looked_inside):
    known = looked_inside["known"].assign(score=1.0, low=1.0, high=1.0)
    scope = run_cells(STEM, "drawn = known", **{**looked_inside, "known": known})
    assert not scope["known"]["beyond"].any()


def test_the_range_of_random_networks_is_drawn_whole(looked_inside):
    chance = looked_inside["chance"].assign(low=[0.5, 0.02], high=0.9)  # the second is wider
    known = looked_inside["known"].assign(low=0.6, score=0.7, high=0.8)
    scope = run_cells(STEM, "axis.axvspan(", **{**looked_inside, "chance": chance, "known": known})
    for axis, (lowest, highest) in zip(scope["axes"], chance.to_numpy()):
        left, right = axis.get_xlim()
        assert left < lowest and highest < right


def test_linear_evaluation_is_the_linear_recipe(looked_inside, few_phantoms, tmp_path):
    config = medssl.FineTuneConfig.named("linear", image_size=32, normalise="dataset",
                                         select_by="loss")
    run = medssl.fine_tune(*medssl.load_backbone("random", seed=3), few_phantoms, config, seed=3,
                           label_fraction=0.15, runs_dir=tmp_path, device="cpu", progress="none",
                           keep_best=False)
    assert np.abs(looked_inside["regress"](looked_inside["features"]["random 0"])
                  - run.predictions["scores"]).max() < 1e-3


def test_nearest_image_of_a_copy_is_the_original(looked_inside):
    train = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    nearest = looked_inside["find_nearest"]({"train": train, "test": train[5:8]}, count=3)
    assert nearest.shape == (3, 3) and nearest[:, 0].tolist() == [5, 6, 7]


@pytest.mark.parametrize("projection, kept", [("PCA", "of variance"), ("t-SNE", "")])
def test_map_has_a_point_for_each_image(looked_inside, projection, kept):
    scope = run_cells(STEM, "def flatten(", **{**looked_inside, "projection": projection})
    xy, words = scope["flatten"](looked_inside["features"]["random 0"], points=40)
    assert xy.shape == (120, 2) and np.isfinite(xy).all()
    assert kept in words


def test_no_network_is_kept_once_its_features_are_known(looked_inside):
    def networks(thing):
        inner = thing.values() if isinstance(thing, dict) else thing
        return [thing] if isinstance(thing, nn.Module) else [
            net for part in inner for net in networks(part)
        ] if isinstance(thing, (dict, list, tuple)) else []

    kept = {name: len(found) for name, thing in looked_inside.items() if (found := networks(thing))}
    assert set(kept) == {"net", "tuned", "fresh", "scrambled", "viewable"}  # one, tuned, and random
    assert kept["tuned"] == len(looked_inside["runs"]) == 1


def test_any_other_file_is_a_file_and_no_folder(looked_inside, tmp_path):
    (tmp_path / "exported").mkdir()
    offered = [tmp_path / "a.ckpt", tmp_path / "exported" / "b.safetensors"]
    for path in (*offered, tmp_path / ".c.ckpt", tmp_path / "checksums.json"):
        path.touch()
    scope = run_cells(STEM, "files = [checkpoint]", **{
        **looked_inside, "checkpoint": "", "checkpoints_dir": str(tmp_path), "widgets": False,
        "examine": lambda path: None})
    assert scope["files"] == [str(path) for path in offered]


# --- what the fine-tuned network looks at ---------------------------------------------------------


class Corner(nn.Module):
    """Calls an image class 1 the more, the brighter it is; its only layer halves the resolution."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 2, stride=2, bias=False)
        nn.init.constant_(self.layer.weight, 1 / 12)
        self.fc = nn.Linear(1, 2, bias=False)
        self.fc.weight.data = torch.tensor([[-1.0], [1.0]])

    def forward(self, x):
        return self.fc(self.layer(x).mean((2, 3)))


def test_map_lights_up_what_speaks_for_the_class_and_nothing_else(looked_inside):
    image = np.zeros((1, 16, 16), np.uint8)
    image[0, 2:4, 12:16] = 200
    prep = medssl.Preprocessing((0.0,) * 3, (1.0,) * 3, 16)
    for target, lit in ((1, 2), (0, 0)):
        cam = looked_inside["grad_cam"](Corner(), prep, image, "layer", [target])
        assert cam.shape == (1, 8, 8) and np.count_nonzero(cam) == lit
    cam = looked_inside["grad_cam"](Corner(), prep, image, "layer", [1])[0]
    assert np.argwhere(cam).tolist() == [[1, 6], [1, 7]]


def test_maps_change_when_the_weights_are_random(looked_inside):
    assert looked_inside["alike"]["intact"].tolist() == [1.0] * len(looked_inside["some"])
    assert looked_inside["last"] < 0.5
    assert looked_inside["passed"]


def test_an_explanation_that_only_draws_the_image_is_found_out(looked_inside, capsys):
    def draw_image(net, prep, images, layer, targets):
        return images[:, ::4, ::4].astype(float)

    run_cells(STEM, "asked = data.test", "stages =", "floor =", "last, flat",
              **{**looked_inside, "grad_cam": draw_image})
    assert "CAREFUL" in capsys.readouterr().out


def test_similarity_of_a_flat_map_is_undefined_and_never_a_number(looked_inside):
    maps = np.random.default_rng(0).random((2, 4, 4))
    alike = looked_inside["liken"](maps, np.stack([maps[0], np.zeros((4, 4))]))
    assert alike[0] == pytest.approx(1) and np.isnan(alike[1])


def test_layers_that_moved_are_measured(looked_inside):
    net = copy.deepcopy(looked_inside["load"]("SparK")[0])
    for name, weight in net.layer3[2].named_parameters():
        if "conv" in name:
            weight.data *= 1.1
    scope = run_cells(STEM, "start, moved =", "moved = moved.groupby", **{
        **looked_inside, "net": net, "name": "SparK"})
    moved = scope["moved"]
    assert moved.loc["layer3.2", "convolutions"] == pytest.approx(0.1, abs=1e-4)
    assert moved.drop("layer3.2").max(axis=None) == 0


def test_a_finished_run_is_looked_into_again(looked_inside):
    folder = looked_inside["runs"]["SparK"].folder
    scope = run_cells(STEM, "for run in map(medssl.load_run", **{
        **looked_inside, "runs": {}, "run_dirs": [str(folder)]})
    assert list(scope["runs"]) == ["SparK"] and scope["runs"]["SparK"].folder == folder


def test_a_run_from_other_weights_is_refused(looked_inside):
    others = {k: v for k, v in looked_inside["reports"].items() if k != "SparK"}
    with pytest.raises(ValueError, match="other starting weights"):
        run_cells(STEM, "for run in map(medssl.load_run", **{
            **looked_inside, "runs": {}, "reports": others,
            "run_dirs": [str(looked_inside["runs"]["SparK"].folder)]})


@pytest.mark.parametrize("name, value, message", [
    ("random_networks", 1, "random_networks is 1"),
    ("explain", [], "explain"),
    ("explain", ["Spark"], "Did you mean 'SparK'"),
])
def test_a_parameter_that_cannot_work_is_named(looked_inside, name, value, message):
    with pytest.raises(ValueError, match=message):
        run_cells(STEM, "if random_networks < 2", "for name in (explain or", **{
            **looked_inside, "checkpoint": "", name: value})


# --- figures for everyone -------------------------------------------------------------------------


def test_a_figure_is_displayed_with_its_words():
    figure = medssl.with_alt(plt.figure(figsize=(1, 1)), "a small empty figure")
    data, metadata = DisplayFormatter(active_types=["text/plain", "image/png"]).format(figure)
    assert metadata["image/png"]["alt"] == data["text/plain"] == "a small empty figure"
    assert not plt.fignum_exists(figure.number)


def test_a_confusion_matrix_is_spelt_out_in_words():
    scores = np.eye(2)[[0, 0, 1, 0]]
    run = medssl.Run(Path(), {"class_names": ["clear", "lesion"], "stamp": "DEMO",
                              "method": "SparK", "dataset": "phantom"}, {},
                     pd.DataFrame(), {"labels": np.array([0, 0, 1, 1]), "scores": scores})
    figure = medssl.plot_confusion(run)
    assert figure._repr_mimebundle_()[0]["text/plain"] == (
        "Confusion matrix of 4 test images: 2 clear called clear, 1 lesion called clear, "
        "1 lesion called lesion.")
    assert figure.axes[0].get_title() == "DEMO: SparK on phantom\n4 test images"


def test_long_class_names_do_not_run_into_each_other():
    names = ["true Glomerular endothelial cells\nsays Collecting Duct, Connecting Tubule (1.00)"
             ] * 7
    figure = medssl.plot_images(np.zeros((7, 8, 8), np.uint8), names, title="two rows")
    figure.draw_without_rendering()
    boxes = [axis.title.get_window_extent() for axis in figure.axes[:7]]
    assert not any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[:i])
    below, above = boxes[6], figure.axes[0].get_window_extent()
    assert below.y1 < above.y0, "the second row's titles lie on the first row's images"


def test_curves_are_told_by_where_they_begin_and_end():
    rows = pd.DataFrame({"epoch": [0, 1, 2], "train_loss": [1.0, 0.5, 0.25],
                         "val_AUC": [0.5, None, 0.9], "val_ACC": [0.5, 0.6, 0.7]})
    words = medssl._draw_history(rows, "SparK", chosen=2)._repr_mimebundle_()[0]["text/plain"]
    assert words == ("Curves of SparK over 3 values of epoch: train_loss from 1 to 0.25, val_AUC "
                     "from 0.5 to 0.9, val_ACC from 0.5 to 0.7; chosen: epoch 2.")


def pictures(notebook):
    """(index of the cell, output) of every picture in a notebook."""
    return [(i, o) for i, cell in enumerate(notebook.cells) for o in cell.get("outputs", [])
            if "image/png" in o.get("data", {})]


def test_every_picture_has_alt_text_in_the_classic_html_export():
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(template_name="classic").from_notebook_node(NOTEBOOK)
    alts = re.findall(r'<img[^>]* alt="([^"]*)"|<img alt="([^"]*)"', page)
    alts = [one or other for one, other in alts]
    assert len(alts) == len(pictures(NOTEBOOK)) >= 6
    assert [alt for alt in alts if "No description" in alt or len(alt) < 30] == []


def test_every_picture_brings_its_own_background_for_a_dark_theme():
    for _, output in pictures(NOTEBOOK):
        image = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        assert image.convert("RGBA").getpixel((1, 1)) == (255, 255, 255, 255)


def test_every_picture_is_followed_by_what_it_cannot_prove():
    for i, _ in pictures(NOTEBOOK):
        following = [c.source for c in NOTEBOOK.cells[i + 1:] if c.cell_type == "markdown"]
        before_next_heading = following[:1 + next(
            k for k, text in enumerate(following) if re.search("^## ", text, re.MULTILINE))]
        assert any("What this cannot prove." in text.split("## ")[0]
                   for text in before_next_heading), NOTEBOOK.cells[i].source[:60]


def test_stand_ins_are_called_random_in_the_findings():
    last = NOTEBOOK.cells[-1]
    assert "stand-ins have random weights" in "".join(o.text for o in last.outputs)


# Viénot, Brettel and Mollon 1999: what red-green blindness leaves of linear RGB.
BLINDNESS = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_of_methods_differ_for_the_colour_blind(kind):
    colors = np.array([[int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)]
                       for c in (*medssl.METHOD_COLORS.values(), "#CC79A7")]) ** 2.2
    seen = np.clip(colors @ np.transpose(BLINDNESS[kind]), 0, 1) ** (1 / 2.2)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distance[~np.eye(len(seen), dtype=bool)].min() > 0.14
