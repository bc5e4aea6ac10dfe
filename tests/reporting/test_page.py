"""The page: numbers as the manifests say, nothing from outside, and nothing from a file that could run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from emloc_tools.reporting.collecting import Report, collect
from emloc_tools.reporting.markdown import markdown
from emloc_tools.reporting.page import page
from tests.conftest import Run
from tests.stages.reference import read_json

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "rect", "path", "use", "br", "link", "img"}


class Elements(HTMLParser):
    """Start tags with their attributes, the text of every cell, scripts and styles; and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.raw:
            self.raw[self._open[-1]].append(data)
        if "td" in self._open or "th" in self._open:
            self.cells[-1][-1] += data

    def row(self, first: str, last: str | None = None) -> list[str]:
        """The cells of the row that begins with a text (and holds another)."""
        return next(row for row in self.cells if row[0] == first and (last is None or last in row))


@pytest.fixture(scope="module")
def text(collected: Report) -> str:
    """The page of the run."""
    return page(collected, title="a run")


@pytest.fixture(scope="module")
def elements(text: str) -> Elements:
    """Its elements; a tag that is not closed where it should be is an error."""
    return Elements(text)


def test_the_rows_of_layers_say_what_the_manifest_says(elements: Elements, run: Run) -> None:
    layers = read_json(run.emulator / "emulator.json")["layers"]
    for name, layer in layers.items():
        row = next(row for row in elements.cells if row[0] == name and len(row) == 7)
        kept = layer["rank"] * (layer["out_features"] + layer["in_features"] + 1)
        assert [row[1], row[2], row[3]] == [str(layer["out_features"]), str(layer["in_features"]), str(layer["rank"])]
        assert row[4] == f"{kept / (layer['out_features'] * layer['in_features']):.1%}"
        assert row[5] == f"{layer['relative_error']:.3f}"
        assert float(row[6].rstrip("%")) / 100 == pytest.approx(layer["relative_error"] ** 2, abs=6e-5)


def test_the_rows_of_pairs_say_what_the_correction_did(elements: Elements, run: Run) -> None:
    for name, layer in read_json(run.corrected / "emloc.json")["layers"].items():
        rows = [row for row in elements.cells if row[0] == name and len(row) == 6]
        (row,) = [row for row in rows if row[3] not in ("input", "output", "not recorded")]  # calibrated, trained
        size = layer["delta_norm"] / layer["update_norm"]
        assert row[1:] == ["4", "1.5", f"{size:.3f}", str(layer["directions"]), str(layer["clamped"])]


def test_what_a_trained_lora_does_not_know_is_not_recorded(elements: Elements) -> None:
    rows = [row for row in elements.cells if row[0] == "model.layers.0.mlp.up_proj" and len(row) == 6]
    assert sum(row[3:] == ["not recorded"] * 3 for row in rows) == 1


def test_sizes_are_compared_with_the_base(elements: Elements, run: Run) -> None:
    manifest = read_json(run.emulator / "emulator.json")
    row = elements.row("emulator")
    assert row[2] == f"{manifest['parameters']:,}"
    assert row[3] == f"{manifest['parameters'] / manifest['base_parameters']:.1%}"
    files = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (run.emulator, run.base)]
    assert row[4:] == [f"{files[0] / 2**10:.1f} KiB", f"{files[0] / files[1]:.1%}"]


def test_nothing_is_loaded_from_anywhere(elements: Elements) -> None:
    for tag, attributes in elements.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "image", "form")
        for key in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "url(" not in re.sub(r"url\(#figure\d+-", "", "".join(elements.raw["style"]))


def test_the_policy_allows_this_style_and_this_script_alone(elements: Elements) -> None:
    (policy,) = [
        attributes["content"] or ""
        for tag, attributes in elements.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    for kind in ("style", "script"):
        (body,) = elements.raw[kind]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_no_element_has_a_style_or_a_handler_of_its_own(elements: Elements) -> None:
    assert not [key for _, attributes in elements.tags for key in attributes if key == "style" or key.startswith("on")]


def test_ids_are_unique_and_every_address_leads_to_one(elements: Elements) -> None:
    ids = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    addresses = {(attributes["href"] or "")[1:] for tag, attributes in elements.tags if tag in ("a", "use")}
    assert addresses <= set(ids)
    assert addresses


def test_equal_folders_give_equal_pages(run_folder: Path, text: str) -> None:
    assert page(collect([run_folder]), title="a run") == text


@pytest.fixture
def hostile(run: Run, tmp_path: Path) -> Path:
    """A run in whose manifests names, commands and files are scripts."""
    folder = tmp_path / EVIL.replace("/", "_")
    folder.mkdir()
    for name in ("calibration", "emulator", "corrected"):
        shutil.copytree(getattr(run, name), folder / name)
    for name, field in (("calibration/calibration.json", "data"), ("emulator/emulator.json", "layers")):
        manifest = read_json(folder / name)
        manifest["made_by"]["command"] = manifest["base"]["id"] = f'{EVIL}" onload="x'
        manifest["made_by"]["libraries"] = {EVIL: EVIL}
        manifest["data"] = [record | {"file": EVIL} for record in manifest["data"]] if field == "data" else None
        if field == "layers":
            del manifest["data"]
        (folder / name).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("form", [page, markdown])
def test_scripts_in_manifests_are_shown_and_are_no_markup(form: object, hostile: Path) -> None:
    text = form(collect([hostile]), title=hostile.name)  # type: ignore[operator]
    assert EVIL not in text
    if form is markdown:
        assert r"\<script\>alert\(1\)\</script\>" in text
        return
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    found = Elements(text)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]


def test_a_script_as_the_name_of_a_layer_is_text_in_tables_and_figures(run: Run) -> None:
    report = collect([run.emulator])
    name = f"m.0.{EVIL}"
    for row, spectrum in zip(report.subjects[0].inspection.layers, report.subjects[0].spectra, strict=True):
        if row["layer"] == "model.layers.0.mlp.up_proj":
            row["layer"] = name
            object.__setattr__(spectrum, "layer", name)
    text = page(report, title="hostile")
    assert EVIL not in text
    found = Elements(text)
    assert found.row(name)[0] == name
    assert [tag for tag, _ in found.tags].count("script") == 1


def test_markdown_has_the_tables_of_the_page(collected: Report, elements: Elements) -> None:
    lines = markdown(collected, title="a run").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line and "--:" not in line]
    shown = [[cell.replace("\\", "") for cell in line.strip("| ").split(" | ")] for line in rows]
    assert [row for row in shown if row[0].startswith("model.")] == [
        row for row in elements.cells if row[0].startswith("model.")
    ]


GOLDEN = sorted((Path(__file__).parent.parent.parent / "formats").glob("*/golden/ok-*"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_every_version_of_every_format_has_a_page_with_all_its_layers(path: Path) -> None:
    """Experts, diffusion models, code of their own, weighted, refined and chosen ones among them."""
    report = collect([path])
    shown = {row[0] for row in Elements(page(report, title=path.name)).cells if row}
    for each in report.subjects:
        assert {row["layer"] for row in each.inspection.layers} <= shown
    manifests = [read_json(path / name) for name in ("calibration.json", "emulator.json") if (path / name).is_file()]
    for manifest in manifests:
        assert {*manifest["layers"], *manifest.get("experts", {})} <= shown
    assert report.subjects or report.plans


def test_a_refined_lora_follows_the_one_that_it_was_made_from() -> None:
    folder = next(path for path in GOLDEN if path.name == "ok-refined")
    (subject,) = collect([folder]).subjects
    (refinement,) = read_json(folder / "emloc.json")["refinements"]
    assert subject.inspection.facts["refinement_steps"] == len(refinement["losses"])
    assert subject.inspection.made_from["adapter before"] == refinement["adapter"]
    assert "Refined LoRA" in page(collect([folder]), title="refined")
