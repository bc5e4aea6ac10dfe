"""Every version of the formats can be pushed, and nothing that breaks a rule of one: on the formats' own examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from emloc_tools.errors import EmlocError
from emloc_tools.hub.artifact import examine, files_of, kind_of
from emloc_tools.hub.card import card
from tests.docs.test_docs import ROOT
from tests.hub.conftest import contents

FORMATS = ("calibration", "emulator", "adapter")
GOOD = sorted(path for kind in FORMATS for path in (ROOT / "formats" / kind / "golden").glob("ok-*"))
BAD = sorted(path for kind in FORMATS for path in (ROOT / "formats" / kind / "golden").glob("bad-*"))


def shown(path: Path) -> str:
    return f"{path.parent.parent.name}/{path.name}"


@pytest.mark.parametrize("folder", GOOD, ids=shown)
def test_a_good_example_is_taken_whole_and_has_a_card(folder: Path) -> None:
    artifact = examine(folder)
    assert artifact.kind == folder.parent.parent.name
    assert {*artifact.files, *artifact.others} == {name for name in contents(folder) if name != "README.md"}
    assert artifact.others == ()
    header = yaml.safe_load(card(artifact, "org/name", None).split("---\n")[1])
    assert header["tags"][0] == "emloc"
    in_diffusers = "diffusers" in folder.name
    expected = {
        "calibration": None,
        "emulator": "diffusers" if in_diffusers else "transformers",
        "adapter": "diffusers" if in_diffusers else "peft",
    }
    assert header.get("library_name") == expected[artifact.kind]


@pytest.mark.parametrize("folder", [path for path in BAD if path.is_dir()], ids=shown)
def test_a_bad_example_is_refused(folder: Path) -> None:
    with pytest.raises(EmlocError):
        examine(folder)


def test_what_a_repository_holds_is_told_by_the_names_at_its_root() -> None:
    assert kind_of(["README.md", "emulator.json", "adapter_config.json"]) == "emulator"
    assert kind_of(["pytorch_lora_weights.safetensors"]) == "adapter"
    assert kind_of(["sub/emulator.json", "config.json", "model.safetensors"]) is None
    names = ["README.md", "emloc.json", "../adapter_model.safetensors", "a/emloc.json", "EMLOC.JSON"]
    assert files_of("adapter", names) == (
        ["emloc.json"],
        ["../adapter_model.safetensors", "EMLOC.JSON", "README.md", "a/emloc.json"],
    )
