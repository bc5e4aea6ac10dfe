"""docs/diffusion.md is true: its commands and programs run, but for sizes that a tiny pipeline does not have."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner

from emloc_tools.cli import main
from tests.diffusion import pico_flux
from tests.diffusion.conftest import Case, calls_in
from tests.diffusion.measures import outputs
from tests.docs.test_docs import ROOT, blocks
from tests.stages.reference import close_to

PAGE = ROOT / "docs" / "diffusion.md"
# A tiny pipeline paints small pictures and reads short prompts; a test has no time for the steps of a training.
SMALLER = {
    "--steps 28 --keep 4": f"--steps 3 --keep 2 {' '.join(f'--set {k}={v}' for k, v in pico_flux.SIZE.items())}",
    "num_inference_steps=8": f"num_inference_steps=2, {', '.join(f'{k}={v}' for k, v in pico_flux.SIZE.items())}",
    "encode_prompt(prompt, prompt)": "encode_prompt(prompt, prompt, max_sequence_length=24)",
    "range(500)": "range(4)",
}


def smaller(text: str) -> str:
    for usual, small in SMALLER.items():
        text = text.replace(usual, small)
    return text


def run(lines: str) -> None:
    """The commands of emloc-tools in a block of bash."""
    for line in smaller(lines.replace("\\\n", " ")).splitlines():
        if line.startswith("emloc-tools "):
            done = CliRunner().invoke(main, shlex.split(line)[1:])
            assert done.exit_code == 0, f"{line}\n{done.output}"


@pytest.fixture
def folder(flux: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page's reader works."""
    (tmp_path / "pipeline").symlink_to(flux.pipeline)
    (tmp_path / "prompts.txt").write_text("a photo of sks dog\na photo of sks dog in the snow\n")
    torch.save(torch.rand(2, 3, 16, 16) * 2 - 1, tmp_path / "pictures.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_from_prompts_to_a_fused_pipeline(flux: Case, folder: Path) -> None:
    bash, python = blocks(PAGE, "bash"), blocks(PAGE, "python")
    assert all(usual in "".join([*bash, *python]) for usual in SMALLER)
    for block in bash[1:2]:
        run(block)
    spaces: list[dict[str, Any]] = [{}, {}, {}]
    exec(smaller(python[0]), spaces[0])
    assert len(calls_in(folder / "own-inputs.safetensors")) == 4
    exec(smaller(python[1]), spaces[1])
    os.system(bash[2])
    light = pico_flux.load_pipeline(folder / "light")
    emulator = diffusers.FluxTransformer2DModel.from_pretrained(folder / "emulator")
    assert torch.equal(outputs(light.transformer, flux.heldout), outputs(emulator, flux.heldout))
    for block in bash[3:]:
        run(block)
    exec(smaller(python[2]), spaces[2])
    fused = outputs(spaces[2]["pipeline"].transformer, flux.heldout)
    for command in re.findall(r"`(emloc-tools merge [^`…]+)`", PAGE.read_text(encoding="utf-8")):
        run(command)
    merged = diffusers.FluxTransformer2DModel.from_pretrained(folder / "merged")
    assert close_to(outputs(merged, flux.heldout), fused) < 1e-5
    assert not torch.equal(fused, outputs(flux.model, flux.heldout))  # control: the LoRA does something
