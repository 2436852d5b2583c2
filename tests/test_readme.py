"""What the README says agrees with the project."""

import re
import subprocess
from pathlib import Path

import pytest

import medssl_utils as medssl

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def checkpoint_rows() -> dict[str, list[str]]:
    """The checkpoint table: method -> its cells."""
    table = README.split("## Checkpoints")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if "drive.google" in line]
    return {row[0].split()[0]: row for row in rows}


def test_checkpoint_table_matches_the_module():
    rows = checkpoint_rows()
    assert list(rows) == list(medssl.METHODS)
    for method, (_, file, prefix, missing, unexpected) in rows.items():
        checkpoint = medssl.CHECKPOINTS[method]
        assert f"({checkpoint.url})" in file
        assert prefix == (f"`{checkpoint.prefix}`" if checkpoint.prefix else "none")
        assert missing == "`fc.weight`, `fc.bias`"
        assert int(re.match(r"\d+", unexpected)[0]) in checkpoint.unexpected


def anchors(text: str) -> set[str]:
    """The names that a code host gives to a file's headings, for links to them."""
    titles = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_local_link_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", README)
    assert links
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors((ROOT / (path or "README.md")).read_text("utf-8"))


def test_every_make_command_exists():
    named = set(re.findall(r"`?\bmake ([a-z-]+)(?:`|  |\n| [A-Z]+=)", README))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    assert {"workbook", "lab", "test"} <= named <= targets


def test_make_alone_lists_the_commands_and_the_settings_of_the_demo():
    said = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    named = set(re.findall(r"`?\bmake ([a-z-]+)(?:`|  |\n| [A-Z]+=)", README))
    assert named <= set(re.findall(r"^make ([a-z-]+) ", said, flags=re.MULTILINE))
    assert "WEIGHTS=stand-in DATASET=phantom RECIPE=demo STUDY=workbook" in said


def test_every_make_parameter_exists():
    named = set(re.findall(r"\b([A-Z]{3,})=", README))
    assert named == set(re.findall(r"^([A-Z]+) *\?=", MAKEFILE, flags=re.MULTILINE)) & named


def test_every_recipe_has_its_words():
    assert [r for r in medssl.RECIPES if f"`{r}`" not in README] == []


@pytest.mark.parametrize("recipe", ["recommended", "paper", "demo"])
def test_every_recipe_has_its_epochs_and_its_size(recipe):
    config = medssl.FineTuneConfig.named(recipe)
    stated = re.search(rf"`{recipe}`(?:\*\*)?: (\d+) epochs at (\d+) pixels", README)
    assert [int(number) for number in stated.groups()] == [config.epochs, config.image_size]


@pytest.mark.parametrize("words", [
    "sent a web page, not the file", "checkpoint, but", "is not fit for training",
    "Another process is writing", "Out of memory", "No runs in", "pass allow_extra=",
])
def test_a_listed_failure_is_in_the_words_of_its_error(words):
    table = README.split("## When something fails")[1].split("\n## ")[0]
    assert words in table
    assert words in Path(medssl.__file__).read_text("utf-8")


def test_nothing_is_left_to_fill_in():
    assert re.findall(r"@\w+@|TODO|TBD|XXX", README) == []
