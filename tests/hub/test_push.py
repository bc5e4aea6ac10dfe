"""push: what arrives at the Hub, byte for byte, who sees it, and what stays behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from emloc_tools.stages.truncate import truncate
from tests.conftest import Run
from tests.hub.conftest import Shell, contents
from tests.hub.hub_server import READER, Hub, Repository, hash_of
from tests.stages.reference import read_json

KINDS = ("calibration", "emulator", "corrected", "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_an_artifact_arrive_as_they_are_in_one_commit(kind: str, run: Run, shell: Shell, hub: Hub) -> None:
    folder = getattr(run, kind)
    pushed = shell.json("push", folder, "--repo", "org/thing", "--message", "the first one")
    there = hub.files("org/thing")
    expected = {name: content for name, content in contents(folder).items() if name != "README.md"}
    expected = {name: content for name, content in expected.items() if not name.startswith("__pycache__")}
    assert {name: content for name, content in there.items() if name not in (".gitattributes", "README.md")} == expected
    assert [file["name"] for file in pushed["files"]] == [*sorted(expected), "README.md"]
    assert {file["name"]: file["nbytes"] for file in pushed["files"]} == {
        name: len(there[name]) for name in [*expected, "README.md"]
    }
    assert there["README.md"].decode() == pushed["card"]
    assert hub.repositories["org/thing"].private
    assert not pushed["public"]
    assert hub.messages == ["the first one"]
    assert pushed["commit"].startswith(f"{hub.url}/org/thing/commit/")


def test_only_what_belongs_to_the_artifact_leaves_the_machine(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(run.adapter, tmp_path / "lora")
    (tmp_path / "lora" / "training_args.bin").write_bytes(b"pickled, with paths")
    (tmp_path / "lora" / "checkpoint-8").mkdir()
    (tmp_path / "lora" / "checkpoint-8" / "adapter_model.safetensors").write_bytes(b"")
    pushed = shell.json("push", "lora", "--repo", "org/lora")
    assert pushed["left_out"] == ["training_args.bin", "checkpoint-8/"]
    assert set(hub.files("org/lora")) == {
        *(".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors")
    }


def test_public_is_asked_for_and_never_assumed(run: Run, shell: Shell, hub: Hub) -> None:
    assert shell.json("push", run.calibration, "--repo", "org/open", "--public")["public"]
    assert not hub.repositories["org/open"].private
    refused = shell("push", run.calibration, "--repo", "org/open")
    assert refused.status == 1
    assert refused.error == (
        "Error: org/open exists and is public; pass --public to push to it all the same, or choose another --repo"
    )
    assert len(hub.messages) == 1
    hub.repositories["org/closed"] = Repository(private=True)
    kept = shell("push", run.calibration, "--repo", "org/closed", "--public")
    assert kept.status == 0
    assert "the repository exists and is private; --public does not change that" in kept.stderr
    assert hub.repositories["org/closed"].private


def test_nothing_is_uploaded_where_the_hub_makes_a_private_repository_public(run: Run, shell: Shell, hub: Hub) -> None:
    hub.makes_public = True
    refused = shell("push", run.calibration, "--repo", "org/thing")
    assert refused.error.startswith("Error: the Hub made org/thing public all the same; nothing was uploaded")
    assert set(hub.files("org/thing")) == {".gitattributes"}


def test_an_earlier_push_leaves_nothing_behind(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    """The shards of a larger emulator beside those of a smaller one would make it a damaged one."""
    truncate(emulator=run.emulator, ratio=0.4, output=tmp_path / "shards", max_shard_size=20_000)
    shell.json("push", "shards", "--repo", "org/thing")
    before = {name for name in hub.files("org/thing") if name.startswith("model-")}
    assert len(before) > 1
    pushed = shell.json("push", run.emulator, "--repo", "org/thing")
    assert pushed["deleted"] == sorted({*before, "model.safetensors.index.json"})
    assert {name for name in hub.files("org/thing") if name.startswith("model")} == {
        *("model.safetensors", "modeling_emloc.py")
    }


def test_a_repository_with_another_kind_is_left_alone(run: Run, shell: Shell, hub: Hub) -> None:
    shell.json("push", run.emulator, "--repo", "org/thing")
    refused = shell("push", run.corrected, "--repo", "org/thing")
    assert refused.error == (
        "Error: org/thing holds an artifact of another kind, emulator; push the adapter to a repository of its own"
    )
    assert len(hub.messages) == 1


def test_a_branch_is_created_from_main_and_main_stays(run: Run, shell: Shell, hub: Hub) -> None:
    shell.json("push", run.calibration, "--repo", "org/thing")
    main = dict(hub.files("org/thing"))
    shell.json("push", run.calibration, "--repo", "org/thing", "--revision", "v2", "--message", "second")
    shell.json("push", run.calibration, "--repo", "org/thing", "--revision", "v2", "--message", "third")
    assert hub.messages == ["Push calibration with emloc-tools", "second", "third"]
    assert hub.files("org/thing") == main
    assert len(hub.repositories["org/thing"].branches["v2"]) == 4  # the two of main, and two of its own


@pytest.mark.parametrize("where", ["folder", "repository"])
def test_a_card_that_a_user_wrote_is_kept(where: str, run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(run.corrected, tmp_path / "lora")
    text = "---\nlicense: mit\n---\n# Mine\n"
    if where == "folder":
        (tmp_path / "lora" / "README.md").write_text(text)
    else:
        shell.json("push", "lora", "--repo", "org/lora")
        hub.repositories["org/lora"].branches["main"][-1]["README.md"] = text.encode()
    pushed = shell.json("push", "lora", "--repo", "org/lora")
    assert pushed["card"] is None
    assert hub.files("org/lora")["README.md"].decode() == text


def test_the_card_that_push_wrote_is_renewed(run: Run, shell: Shell, hub: Hub) -> None:
    shell.json("push", run.corrected, "--repo", "org/lora")
    stale = hub.files("org/lora")["README.md"].replace(b"# LoRA", b"# Old LoRA")
    hub.repositories["org/lora"].branches["main"][-1]["README.md"] = stale
    shell.json("push", run.corrected, "--repo", "org/lora")
    assert b"# Old LoRA" not in hub.files("org/lora")["README.md"]


def test_the_license_is_that_of_the_commit_of_the_base(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    """Of a base from the Hub the header names it, and the license is read from its own card there."""
    card = "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE.md\n---\n# Tiny\n"
    base, later = {"README.md": card.encode()}, {"README.md": b"---\nlicense: mit\n---\n"}
    hub.repositories["org/tiny"] = Repository(private=False, branches={"main": [base, later]})
    shutil.copytree(run.calibration, tmp_path / "calibration")
    manifest = read_json(tmp_path / "calibration" / "calibration.json")
    manifest["base"] |= {"id": "org/tiny", "revision": hash_of(base)}
    (tmp_path / "calibration" / "calibration.json").write_text(json.dumps(manifest))
    pushed = shell.json("push", "calibration", "--repo", "org/thing")
    header = yaml.safe_load(pushed["card"].split("---")[1])
    assert header == {
        "base_model": "org/tiny",
        "license": "other",
        "license_name": "tiny-1",
        "license_link": "https://huggingface.co/org/tiny/blob/main/LICENSE.md",
        "tags": ["emloc", "calibration"],
    }
    assert pushed["license"] == "other"


@pytest.mark.parametrize(
    ("failing", "token", "says"),
    [
        ({}, None, "cannot create org/thing: the Hub does not know you, or you may not see it (401); log in with"),
        ({}, READER, "cannot create org/thing: the Hub forbids it (403); use a token that may do that"),
        ({"POST /api/repos/create": 500}, "", "cannot create org/thing: the Hub has an error of its own (500); try"),
        (
            {"POST /api/repos/create": 409},
            "",
            "cannot create org/thing: it exists, and you may not see it (409); log in",
        ),
        ({"GET /api/models/org/thing": 503}, "", "cannot read org/thing: the Hub has an error of its own (503)"),
        ({"/preupload/": 500}, "", "cannot write to org/thing: the Hub has an error of its own (500)"),
        ({"/objects/batch": 403}, "", "cannot write to org/thing: the Hub forbids it (403)"),
        ({"PUT /lfs/": 403}, "", "cannot write to org/thing: the Hub forbids it (403)"),
        ({"/commit/": 412}, "", "cannot write to org/thing: somebody else changed it just now (412); run the command"),
    ],
)
def test_whatever_the_hub_refuses_is_one_line_and_leaves_no_commit(
    failing: dict[str, int], token: str | None, says: str, run: Run, shell: Shell, hub: Hub
) -> None:
    hub.failing.update(failing)
    options = {} if token == "" else {"token": token}
    refused = shell("push", run.corrected, "--repo", "org/thing", "--quiet", **options)
    assert refused.status == 1
    assert refused.error.startswith(f"Error: {says}")
    assert refused.stderr.count("\n") == 1
    assert hub.messages == []


def test_a_damaged_folder_is_refused_before_any_request(run: Run, shell: Shell, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(run.emulator, tmp_path / "emulator")
    path = tmp_path / "emulator" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit of the last value
    path.write_bytes(data)
    refused = shell("push", "emulator", "--repo", "org/thing")
    assert refused.status == 1
    assert "has another content hash than the manifest; the file was changed (format rule E10)" in refused.error
    assert hub.requests == []
