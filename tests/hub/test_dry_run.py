"""push --dry-run: shows the files and the card, and sends nothing at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.cli.conftest import invoke as invoke  # the fixture
from tests.conftest import Run
from tests.hub.conftest import Shell
from tests.hub.hub_server import Hub


def test_a_dry_run_asks_the_hub_nothing_and_shows_what_a_push_uploads(run: Run, shell: Shell, hub: Hub) -> None:
    dry = shell.json("push", run.emulator, "--repo", "org/thing", "--dry-run")
    assert hub.requests == []
    assert dry["commit"] is None
    wet = shell.json("push", run.emulator, "--repo", "org/thing")
    assert {**dry, "commit": None} == {**wet, "commit": None}
    assert hub.requests != []


def test_what_is_shown_to_people_holds_every_file_and_the_card(run: Run, invoke: Invoke) -> None:
    printed = invoke("push", run.corrected, "--repo", "org/thing", "--dry-run", columns=200)
    assert printed.status == 0
    assert printed.stdout.startswith("Dry run: nothing was sent, and this is what org/thing would hold\n")
    for name in ("adapter_config.json", "adapter_model.safetensors", "emloc.json"):
        assert f"{name} " in printed.stdout
        assert f"{(run.corrected / name).stat().st_size:,}\n" in printed.stdout
    card = json.loads(invoke("push", run.corrected, "--repo", "org/thing", "--dry-run", "--json").stdout)["card"]
    shown = [line.removeprefix("  ") for line in printed.stdout.partition("\nREADME.md\n")[2].splitlines()]
    assert shown == card.splitlines()


def test_paths_that_the_artifact_itself_records_are_pointed_out(run: Run, invoke: Invoke) -> None:
    """The fixture was made by absolute paths; a card must not repeat them, and others could still read them."""
    printed = invoke("push", run.corrected, "--repo", "org/thing", "--dry-run")
    said = " ".join(printed.stderr.split())
    assert "Warning: adapter_config.json, emloc.json of the artifact itself record paths of this machine," in said
    assert f"such as {run.base} in adapter_config.json, which all" in said
    assert str(run.base.parent) not in printed.stdout


@pytest.mark.parametrize("repo", ["name", "a/b/c", "org/", "../x", "org/na me", "org/" + "x" * 100, "https://hub/a"])
def test_a_name_that_is_none_is_refused(repo: str, run: Run, invoke: Invoke) -> None:
    refused = invoke("push", run.corrected, "--repo", repo, "--dry-run")
    assert refused.status == 1
    assert refused.error == f"Error: {repo!r} is no name of a repository on the Hub; expected a name such as org/name"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda folder, run: None,
            "thing does not exist; expected the folder of a calibration, an emulator or an adapter",
        ),
        (
            lambda folder, run: folder.mkdir(),
            "thing holds none of calibration.json, emulator.json, adapter_config.json",
        ),
        (lambda folder, run: shutil.copytree(run.base, folder), "of a merged model upload the whole folder"),
        (lambda folder, run: _linked(folder, run), "thing/notes.json: is a link that leads out of its folder"),
        (lambda folder, run: _incomplete(folder, run), "emloc.json: does not exist|marks a corrected adapter"),
    ],
)
def test_a_folder_that_is_no_whole_artifact_is_refused(
    make: object, says: str, run: Run, invoke: Invoke, tmp_path: Path
) -> None:
    assert callable(make)
    make(tmp_path / "thing", run)
    refused = invoke("push", "thing", "--repo", "org/thing", "--dry-run")
    assert refused.status == 1
    assert any(part in refused.error for part in says.split("|")), refused.error


def _linked(folder: Path, run: Run) -> None:
    """A file that the patterns of an emulator take, and that is a secret of somebody else's."""
    shutil.copytree(run.emulator, folder)
    (folder.parent / "secret").write_text("{}")
    (folder / "notes.json").symlink_to(folder.parent / "secret")


def _incomplete(folder: Path, run: Run) -> None:
    shutil.copytree(run.corrected, folder)
    (folder / "emloc.json").unlink()
