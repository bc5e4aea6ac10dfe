"""Bases in float16 and bfloat16 go through every stage in their own dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools import load_emulator
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.merge import merge
from tests import pico
from tests.stages.adapters import pairs
from tests.stages.reference import close_to, read_json, read_tensors

ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # machine epsilon


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_half_precision_costs_its_rounding_and_no_more(dtype: torch.dtype, tmp_path: Path) -> None:
    model, data = pico.save_model(tmp_path / "base", dtype=dtype), pico.save_texts(tmp_path / "data.jsonl", count=6)
    base, name = str(tmp_path / "base"), "model.layers.1.mlp.up_proj"
    calibrate(base=base, data=data, output=tmp_path / "calibration", max_length=32, gradients=True, device="cpu")
    layers = read_json(tmp_path / "calibration" / "calibration.json")["layers"]
    full = {name: min(layer["out_features"], layer["in_features"]) for name, layer in layers.items()}
    options: dict[str, Any] = {"base": base, "calibration": tmp_path / "calibration"}
    build_emulator(**options, ranks=full, output=tmp_path / "full")
    build_emulator(**options, ratio=0.4, output=tmp_path / "emulator")

    ids, outputs = torch.tensor([[5, 9, 40, 77, 13, 201]]), {}
    for folder in ("full", "emulator"):
        emulator = load_emulator(tmp_path / folder).eval()
        assert {parameter.dtype for parameter in emulator.parameters()} == {dtype}
        with torch.no_grad():
            outputs[folder] = close_to(emulator(input_ids=ids).logits, model(input_ids=ids).logits)
    assert outputs["full"] < 10 * ROUNDING[dtype]  # three products in place of one, in every layer
    assert outputs["emulator"] > 20 * ROUNDING[dtype]  # control

    pico.save_lora(tmp_path / "lora", tmp_path / "emulator")
    correct(
        emulator=tmp_path / "emulator", adapter=tmp_path / "lora", base=base, clamp=None, output=tmp_path / "corrected"
    )
    merge(base=base, adapter=tmp_path / "corrected", output=tmp_path / "merged")
    factors, dense, merged = (read_tensors(tmp_path / folder) for folder in ("emulator", "base", "merged"))
    U, S, Vh = (factors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
    (A, B), (A_new, B_new) = (pairs(tmp_path / folder)[name] for folder in ("lora", "corrected"))
    W, x = dense[f"{name}.weight"].double(), torch.randn(7, 4, dtype=torch.float64) @ A
    wanted = x @ ((U * S) @ Vh + 1.5 * B @ A).T
    assert close_to(x @ (W + 1.5 * B_new @ A_new).T, wanted) < 3 * ROUNDING[dtype]
    assert close_to(x @ (W + 1.5 * B @ A).T, wanted) > 10 * ROUNDING[dtype]  # control: uncorrected
    assert merged[f"{name}.weight"].dtype == dtype
    assert close_to(merged[f"{name}.weight"], W + 1.5 * B_new @ A_new) < ROUNDING[dtype]
