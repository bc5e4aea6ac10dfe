"""pull: an artifact comes back byte for byte, or nothing appears under its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.hub.conftest import Shell, contents
from tests.hub.hub_server import Hub, Repository, hash_of


def publish(hub: Hub, name: str, folder: Path, **more: bytes) -> dict[str, bytes]:
    """Put a folder into a public repository; returns what it holds."""
    files = {key: value for key, value in contents(folder).items() if not key.startswith("__pycache__")} | more
    hub.repositories[name] = Repository(private=False, branches={"main": [files]})
    return files


@pytest.mark.parametrize("kind", ["calibration", "emulator", "corrected", "adapter"])
def test_what_was_pushed_comes_back(kind: str, run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    folder = getattr(run, kind)
    shell.json("push", folder, "--repo", "org/thing")
    pulled = shell.json("pull", "org/thing", "--output", "back")
    expected = {name: data for name, data in contents(folder).items() if not name.startswith("__pycache__")}
    cards = {"README.md": hub.files("org/thing")["README.md"]} if kind == "emulator" else {}
    expected.pop("README.md", None)
    assert contents(tmp_path / "back") == {**expected, **cards}
    assert pulled["revision"] == hash_of(hub.files("org/thing"))
    assert sorted(pulled["files"]) == sorted({**expected, **cards})
    assert pulled["nbytes"] == sum(map(len, {**expected, **cards}.values()))


def test_a_revision_is_a_branch_or_a_commit(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    old = publish(hub, "org/thing", run.calibration)
    hub.repositories["org/thing"].branches["main"].append(contents(run.corrected))
    hub.repositories["org/thing"].branches["other"] = [old]
    assert shell.json("pull", "org/thing", "--output", "a")["kind"] == "adapter"
    assert shell.json("pull", "org/thing", "--revision", "other", "--output", "b")["kind"] == "calibration"
    assert shell.json("pull", "org/thing", "--revision", hash_of(old), "--output", "c")["kind"] == "calibration"
    refused = shell("pull", "org/thing", "--revision", "nowhere", "--output", "d")
    assert refused.error == "Error: org/thing has no revision nowhere on the Hub"
    assert not (tmp_path / "d").exists()


def test_files_that_are_no_part_of_the_artifact_are_not_fetched(run: Run, shell: Shell, hub: Hub) -> None:
    more: dict[str, Any] = {"evil.pkl": b"x", "optimizer.pt": b"y", "sub/adapter_config.json": b"{}"}
    publish(hub, "org/thing", run.corrected, **more)
    pulled = shell.json("pull", "org/thing", "--output", "back")
    assert pulled["left_out"] == ["evil.pkl", "optimizer.pt", "sub/adapter_config.json"]
    asked = {line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line}
    assert asked == {"adapter_config.json", "adapter_model.safetensors", "emloc.json"}


def flip_a_bit(files: dict[str, bytes]) -> None:
    """Change one bit of the last value of the weights."""
    data = bytearray(files["adapter_model.safetensors"])
    data[-1] ^= 1
    files["adapter_model.safetensors"] = bytes(data)


def test_a_damaged_artifact_is_refused_and_nothing_is_left(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    files = publish(hub, "org/thing", run.corrected)
    flip_a_bit(files)
    refused = shell("pull", "org/thing", "--output", "back")
    assert refused.status == 1
    assert "is not what was written; the weights were changed (format rule A11)" in refused.error
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_ends_too_early_is_refused(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    publish(hub, "org/thing", run.corrected)
    hub.cut = {"adapter_model.safetensors"}
    refused = shell("pull", "org/thing", "--output", "back", "--quiet")
    assert refused.status == 1
    assert refused.error.startswith("Error: cannot fetch adapter_model.safetensors of org/thing: ")
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    hub.cut = set()
    assert shell("pull", "org/thing", "--output", "back").status == 0  # the control


@pytest.mark.parametrize(
    ("failing", "token", "says"),
    [
        ({}, "", "cannot read org/nothing: it is not on the Hub (404); check its name, and for a private one log in"),
        ({}, None, "cannot read org/nothing: the Hub does not know you, or you may not see it (401); log in with"),
        ({"GET /api/models": 403}, "", "cannot read org/nothing: the Hub forbids it (403)"),
        ({"GET /api/models": 500}, "", "cannot read org/nothing: the Hub has an error of its own (500); try again"),
    ],
)
def test_whatever_the_hub_refuses_is_one_line(
    failing: dict[str, int], token: str | None, says: str, shell: Shell, hub: Hub, tmp_path: Path
) -> None:
    hub.failing.update(failing)
    options = {} if token == "" else {"token": token}
    refused = shell("pull", "org/nothing", "--output", "back", **options)
    assert refused.status == 1
    assert refused.error.startswith(f"Error: {says}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "says"), [(500, "has an error of its own (500)"), (403, "forbids it (403)")])
def test_a_file_that_cannot_be_fetched_is_named(status: int, says: str, run: Run, shell: Shell, hub: Hub) -> None:
    publish(hub, "org/thing", run.corrected)
    hub.failing["/emloc.json"] = status
    refused = shell("pull", "org/thing", "--output", "back")
    assert refused.error.startswith("Error: cannot fetch emloc.json of org/thing: the Hub ")
    assert says in refused.error


def test_a_repository_without_an_artifact_is_refused(run: Run, shell: Shell, hub: Hub) -> None:
    publish(hub, "org/tiny", run.base)
    refused = shell("pull", "org/tiny", "--output", "back")
    assert refused.error.startswith(
        "Error: org/tiny holds none of calibration.json, emulator.json, adapter_config.json"
    )
    assert not any("/resolve/" in line for line in hub.requests)


def test_an_existing_output_is_refused_before_any_request(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    publish(hub, "org/thing", run.calibration)
    shell.json("pull", "org/thing", "--output", "back")
    hub.requests.clear()
    assert "back already exists" in shell("pull", "org/thing", "--output", "back").error
    assert hub.requests == []
    shell.json("pull", "org/thing", "--output", "back", "--overwrite")
    assert contents(tmp_path / "back") == contents(run.calibration)
