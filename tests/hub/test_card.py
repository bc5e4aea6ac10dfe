"""The model card: names from a manifest stay names, in YAML and in Markdown, and paths stay on this machine."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from emloc_tools.files.manifest import AdapterManifest, AdapterV2, AdapterV4, BaseRecord
from emloc_tools.hub.artifact import Artifact, examine
from emloc_tools.hub.card import MARK, card, is_of_a_user
from emloc_tools.hub.licenses import License, license_in, license_of
from emloc_tools.hub.privacy import absolute_paths, recorded_paths, shown_command, shown_name
from tests.conftest import Run
from tests.stages.reference import read_json

HOSTILE = [
    "evil\nlicense: wtfpl\n---\n# Boo",
    "x]: (javascript:alert(1)) [click](https://evil.example) <script>alert(1)</script>",
    "``` \n<img src=x onerror=alert(1)>\n```",
    '"\nbase_model: other/model\n"',
    "a | b | c ![pixel](https://evil.example/p.png) https://evil.example",
    "&lt;b&gt; \u2028 \x1b[31m \x85 # {{ 7*7 }} @everyone",
    "--- ",
    "' : { [ - ? ! % @ `",
]


def parsed(text: str) -> tuple[dict[str, Any], str]:
    """The header by a YAML parser, and the HTML of the rest by a CommonMark parser that lets HTML through."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1]), MarkdownIt("commonmark", {"html": True}).enable("table").render(
        text[found.end() :]
    )


def tags(rendered: str) -> set[str]:
    """The HTML elements of a page, without comments."""
    return set(re.findall(r"<(\w+)", re.sub(r"<!--.*?-->", "", rendered)))


PLAIN = {"h1", "h2", "p", "strong", "code", "pre", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "em"}


def with_base(artifact: Artifact, **changes: Any) -> Artifact:
    """An artifact whose manifest says something else of its base, and of how it was made."""
    assert artifact.manifest is not None
    made = changes.pop("made_by", None)
    base = artifact.manifest.base.model_copy(update=changes)
    update = {"base": base} | ({"made_by": artifact.manifest.made_by.model_copy(update=made)} if made else {})
    return dataclasses.replace(artifact, manifest=artifact.manifest.model_copy(update=update))


@pytest.fixture(scope="module")
def artifacts(run: Run) -> dict[str, Artifact]:
    """One of each kind."""
    return {kind: examine(getattr(run, kind)) for kind in ("calibration", "emulator", "corrected", "adapter")}


@pytest.mark.parametrize("kind", ["calibration", "emulator", "corrected"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_and_mean_nothing(kind: str, name: str, artifacts: dict[str, Artifact]) -> None:
    made = {"command": f"emloc-tools {name}", "emloc_tools": name, "libraries": {name: name}}
    hostile = with_base(artifacts[kind], id=name, revision=name, architecture=name, made_by=made)
    header, rendered = parsed(card(hostile, "org/thing", License("mit")))
    plain = with_base(artifacts[kind], id="org/base", revision="0" * 40, architecture="Llama")
    expected, _ = parsed(card(plain, "org/thing", License("mit")))
    assert {**header, "base_model": None} == {**expected, "base_model": None}
    assert "\n" not in header["base_model"]
    assert tags(rendered) <= PLAIN
    # What is visible of the name, its blanks aside, is the name.
    visible = re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]*>", "", rendered)))
    assert re.sub(r"\s", "", "".join(c if c.isprintable() else "" for c in name)) in visible


def test_without_the_escapes_the_names_would_mean_something(
    artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr("emloc_tools.hub.card.prose", lambda text: text)
    hostile = with_base(artifacts["emulator"], id=HOSTILE[1], architecture=HOSTILE[1])
    assert {"script", "a"} <= tags(parsed(card(hostile, "org/thing", None))[1])


@settings(max_examples=60, deadline=None)
@given(name=st.text(min_size=1, max_size=40))
def test_any_name_leaves_the_header_and_the_elements_alone(name: str, artifacts: dict[str, Artifact]) -> None:
    hostile = with_base(artifacts["calibration"], id=name, revision="1", architecture=name, made_by={"command": name})
    header, rendered = parsed(card(hostile, "org/thing", None))
    assert set(header) == {"base_model", "tags"}
    assert tags(rendered) <= PLAIN


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("calibration", {"tags": ["emloc", "calibration"]}),
        ("emulator", {"library_name": "transformers", "tags": ["emloc", "emulator"]}),
        ("corrected", {"library_name": "peft", "base_model_relation": "adapter", "tags": ["emloc", "lora"]}),
    ],
)
def test_the_header_names_the_base_of_the_hub_and_its_license(
    kind: str, expected: dict[str, Any], artifacts: dict[str, Artifact]
) -> None:
    of_hub = with_base(artifacts[kind], id="org/base/transformer", revision="a" * 40)
    header, _ = parsed(card(of_hub, "org/thing", License("apache-2.0")))
    assert header == {"base_model": "org/base", "license": "apache-2.0", **expected}
    # A local folder is no model of the Hub, whatever it is called.
    local, rendered = parsed(card(with_base(artifacts[kind], id="org/base"), "org/thing", None))
    assert local == {key: value for key, value in expected.items() if key != "base_model_relation"}
    assert "No license is named here" in rendered


def test_the_card_shows_the_last_parts_of_paths_alone(artifacts: dict[str, Artifact]) -> None:
    command = (
        "emloc-tools correct --base /home/me/secret/llama --adapter=~/lora --clamp 3 --emulator ../client/emulator"
    )
    for kind in ("calibration", "emulator", "corrected"):
        text = card(with_base(artifacts[kind], id="/home/me/secret/llama", made_by={"command": command}), "org/x", None)
        assert "emloc-tools correct --base llama --adapter=lora --clamp 3 --emulator emulator" in text
        assert not re.search("home|secret|client", text)
    trained = dataclasses.replace(artifacts["adapter"], config={"base_model_name_or_path": "/home/me/secret/emulator"})
    assert "# LoRA trained on emulator" in card(trained, "org/x", None)
    assert "secret" not in card(trained, "org/x", None)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/llama/", "llama"),
        ("~/models/llama", "llama"),
        (r"C:\Users\me\llama", "llama"),
        (r"\\server\share\llama", "llama"),
        ("file:///home/me/llama", "llama"),
        ("../llama", "llama"),
        ("/", "…"),
        ("org/name", "org/name"),
        ("data/train.jsonl", "data/train.jsonl"),
        (r".*q_proj|.*\.v_proj", r".*q_proj|.*\.v_proj"),
    ],
)
def test_what_leads_somewhere_on_this_machine_is_shortened(name: str, shown: str) -> None:
    assert shown_name(name) == shown
    assert shown_command(f"emloc-tools x '{name}'").split(maxsplit=2)[2].strip("'") == shown


def test_absolute_paths_are_found_in_commands_and_names() -> None:
    command = "emloc-tools x --base /a/b --data=/c/d.jsonl --output out --adapter 'open quote"
    assert list(absolute_paths(command)) == ["/a/b", "/c/d.jsonl"]
    assert list(absolute_paths("~/e")) == ["~/e"]
    assert list(absolute_paths("org/name")) == []


def test_files_that_record_paths_are_found_and_vocabularies_are_not_taken_for_such(tmp_path: Path) -> None:
    holds: dict[str, object] = {
        "emulator.json": {"made_by": {"command": "x --base /home/me/llama"}, "base": {"id": "org/name"}},
        "tokenizer_config.json": {"name_or_path": "/home/me/tokenizer", "eos_token": "/s"},
        "config.json": {"_name_or_path": "org/name", "layers": [{"path": "/no/record"}]},
        "vocab.json": {"id": "/home"},
    }
    for name, value in holds.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "broken.json").write_text("{")
    files = [tmp_path / name for name in (*holds, "broken.json")]
    assert recorded_paths(files) == {"emulator.json": "/home/me/llama", "tokenizer_config.json": "/home/me/tokenizer"}


def test_the_results_are_those_of_the_manifest(run: Run, artifacts: dict[str, Artifact]) -> None:
    manifest = read_json(run.emulator / "emulator.json")
    errors = [layer["relative_error"] for layer in manifest["layers"].values()]
    text = card(artifacts["emulator"], "org/x", None)
    assert f"| parameters | {manifest['parameters']:,} of {manifest['base_parameters']:,} " in text
    assert f"| relative error, mean | {sum(errors) / len(errors):.3f} |" in text
    assert f"| relative error, largest | {max(errors):.3f} |" in text
    layers = read_json(run.corrected / "emloc.json")["layers"].values()
    sizes = sorted(layer["delta_norm"] / layer["update_norm"] for layer in layers)
    text = card(artifacts["corrected"], "org/x", None)
    assert f"largest {sizes[-1]:.3f}; {sum(layer['clamped'] for layer in layers)} directions clamped" in text
    assert "Nothing was recorded of what it is worth" in text


def test_losses_by_which_a_lora_was_chosen_and_refined_are_in_the_card(artifacts: dict[str, Artifact]) -> None:
    before = artifacts["corrected"].manifest
    assert isinstance(before, AdapterManifest)
    data = {
        "file": "held|out.jsonl",
        "hash": before.emulator,
        "samples": 7,
        "tokens": 90,
        "max_length": None,
        "seed": 0,
    }
    measured = {"standard_error": 0.01, "standard_error_to_none": 0.02, "standard_error_to_corrected": 0.03}
    candidates = [
        {"adapter": "none", "scale": 0.0, "loss": 3.25, **measured},
        {"adapter": "corrected", "scale": 0.5, "loss": 2.125, **measured},
    ]
    selection = {"data": data, "candidates": candidates, "chosen": 1}
    fields = before.model_dump(exclude={"format_version"})
    refinement = {
        "adapter": before.emulator,
        "data": data,
        "samples_per_step": 4,
        "step_size": 0.2,
        "losses": [2.5, 1.75],
    }
    manifests: list[AdapterManifest] = [
        AdapterV2.model_validate({**fields, "selection": selection}),
        AdapterV4.model_validate({**fields, "selection": None, "component": None, "refinements": [refinement]}),
    ]
    chosen, refined = (
        card(dataclasses.replace(artifacts["corrected"], manifest=manifest), "org/x", None) for manifest in manifests
    )
    assert "| no LoRA |  | 3.2500 | 0.0100 |\n| corrected (this one) | 0.5 | 2.1250 | 0.0100 |" in chosen
    assert r"on held\|out.jsonl, 7 samples, 90 tokens" in chosen
    assert "4 samples a step. Loss before each step, on its samples: 2.5000, 1.7500." in refined
    assert "Nothing was recorded" not in chosen + refined


def test_a_card_is_known_as_that_of_a_program_or_of_a_user(run: Run, artifacts: dict[str, Artifact]) -> None:
    written = card(artifacts["corrected"], "org/x", None)
    built = (run.emulator / "README.md").read_text()
    by_peft = (run.adapter / "README.md").read_text()
    assert not is_of_a_user(written)
    assert not is_of_a_user(built)
    assert not is_of_a_user(by_peft)
    assert is_of_a_user(written.replace(MARK, ""))
    assert is_of_a_user(built + "\nTrained on our tickets.\n")
    assert is_of_a_user(built.replace("# EMLoC", "# Our EMLoC\n\nHello\n\n# EMLoC"))
    assert is_of_a_user("# My model\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", License("apache-2.0")),
        ("---\r\nlicense: 'mit' # free\r\n---\r\n", License("mit")),
        ("---\ntags: [a]\nlicense: other\nlicense_name: llama3.1\nlicense_link: https://a.example/L\n---\nx",
         License("other", "llama3.1", "https://a.example/L")),
        ("---\nlicense: other\nlicense_link: javascript:alert(1)\n---\n", License("other")),
        ("---\nlicense: other\nlicense_link: ../../etc\n---\n", License("other")),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: a b\n---\n", None),
        ("---\nother: |\n  license: mit\n---\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
    ],
)  # fmt: skip
def test_a_license_is_taken_from_the_header_or_is_unknown(text: str, expected: License | None) -> None:
    assert license_in(text) == expected


def test_the_license_of_a_local_base_is_that_of_its_card(tmp_path: Path) -> None:
    base = BaseRecord(id=str(tmp_path), revision=None, architecture="Llama")
    assert license_of(base) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert license_of(base) == License("mit")


def test_a_link_in_a_command_is_no_way_out_of_its_block(artifacts: dict[str, Artifact]) -> None:
    command = shown_command("emloc-tools x '```' '<b>' '````'")
    text = card(with_base(artifacts["calibration"], made_by={"command": command}), "org/x", None)
    assert f"`````text\n{command}\n`````" in text
