"""What is taken for a base of diffusers, and what is refused in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.stages.calibrate import calibrate
from tests import pico
from tests.diffusion.conftest import Case
from tests.stages.reference import read_json


def test_a_pipeline_of_several_denoisers_asks_for_one(flux: Case, tmp_path: Path) -> None:
    index = read_json(flux.pipeline / "model_index.json")
    index["transformer_2"] = index["transformer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"is a pipeline with transformer, transformer_2; name one .*{tmp_path}/tra"):
        calibrate(base=str(tmp_path), data=flux.inputs, output=tmp_path / "out")
    del index["transformer"], index["transformer_2"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"is a pipeline of scheduler, text_encoder, .*; name the model itself"):
        calibrate(base=str(tmp_path), data=flux.inputs, output=tmp_path / "out")


def test_an_emulator_is_no_base(flux: Case, tmp_path: Path) -> None:
    """Also where its manifest, by which others are told, is gone."""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).symlink_to(flux.emulator / name)
    with pytest.raises(InputError, match="is an emulator made by emloc-tools; give the model"):
        calibrate(base=str(tmp_path), data=flux.inputs, output=tmp_path / "out")


def test_texts_are_refused_with_the_command_that_makes_inputs(flux: Case, tmp_path: Path) -> None:
    texts = pico.save_texts(tmp_path / "texts.jsonl")
    with pytest.raises(InputError, match=r"FluxTransformer2DModel of diffusers reads no texts; .* record-inputs"):
        calibrate(base=flux.base, data=texts, output=tmp_path / "out")


def test_a_quantised_base_and_an_unknown_class_are_refused(flux: Case, tmp_path: Path) -> None:
    config = read_json(flux.pipeline / "transformer" / "config.json")
    cases = {
        "is quantised; use the model's full-precision": {"quantization_config": {"quant_method": "bitsandbytes"}},
        "has no model class NoTransformer": {"_class_name": "NoTransformer"},
        "has no model class FluxPipeline": {"_class_name": "FluxPipeline"},
    }
    for message, change in cases.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UnsupportedError, match=message):
            calibrate(base=str(tmp_path), data=flux.inputs, output=tmp_path / "out")


def test_without_diffusers_a_line_names_the_extra(flux: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = r"is a FluxTransformer2DModel of diffusers, which needs the extra `diffusers`: .*emloc-tools\[diffusers\]"
    with pytest.raises(UnsupportedError, match=message):
        calibrate(base=flux.base, data=flux.inputs, output=tmp_path / "out")
