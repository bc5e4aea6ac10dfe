"""merge --interpolate: dense weights between the base and its emulator, with the LoRA that was trained there."""

from __future__ import annotations

from pathlib import Path

import pytest

from emloc_tools import load_emulator
from emloc_tools.stages.merge import merge
from tests import pico
from tests.conftest import Run
from tests.stages.adapters import on, pairs
from tests.stages.merging import load_all, logits
from tests.stages.reference import bytes_hash, close_to, read_json, read_tensors

FLOAT32 = 1e-6  # a few float32 roundings, relative


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_interpolated_weights_lie_between_base_and_emulator(run: Run, tmp_path: Path, share: float) -> None:
    adapter = tmp_path / "adapter"
    pico.save_lora(adapter, run.emulator, target_modules=["q_proj", "lm_head"])
    result = merge(
        base=str(run.base), adapter=adapter, output=tmp_path / "merged", emulator=run.emulator, interpolate=share
    )
    before, factors, after = (read_tensors(folder) for folder in (run.base, run.emulator, tmp_path / "merged"))
    adapted = pairs(adapter)
    factored = read_json(run.emulator / "emulator.json")["layers"]
    assert set(result.merged) == {f"{name}.weight" for name in [*adapted, *factored]}
    for key, tensor in before.items():
        name = key.removesuffix(".weight")
        expected = tensor.double()
        if name in factored:
            U, S, Vh = (factors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
            expected = expected - share * (expected - (U * S) @ Vh)
        if name in adapted:
            A, B = adapted[name]
            expected = expected + 1.5 * (B @ A)
        assert close_to(after[key], expected) < 2 * FLOAT32, key
        assert (close_to(after[key], tensor) > 0.01) == (name in adapted or (name in factored and share > 0))
    assert read_json(tmp_path / "merged" / "emloc-merge.json")["interpolate"] == share
    load_all(tmp_path / "merged", type(run.model))


def test_at_0_it_is_the_uncorrected_lora_on_the_base_and_at_1_the_emulator_with_it(run: Run, tmp_path: Path) -> None:
    found = {}
    for share in (0.0, 0.5, 1.0):
        output = tmp_path / str(share)
        merge(base=str(run.base), adapter=run.adapter, output=output, emulator=run.emulator, interpolate=share)
        found[share] = logits(load_all(output, type(run.model)))
    uncorrected = logits(on(type(run.model).from_pretrained(run.base), run.adapter))
    emulator = logits(on(load_emulator(run.emulator), run.adapter))
    assert close_to(found[0.0], uncorrected) < 1e-5
    assert close_to(found[1.0], emulator) < 1e-4
    assert close_to(uncorrected, emulator) > 0.05
    assert close_to(found[0.5], uncorrected) > 0.01
    assert close_to(found[0.5], emulator) > 0.01


def test_the_emulator_and_what_was_compared_are_recorded(run: Run, tmp_path: Path) -> None:
    result = merge(
        base=str(run.base), adapter=run.adapter, output=tmp_path / "merged", emulator=run.emulator, interpolate=0.5
    )
    note = read_json(tmp_path / "merged" / "emloc-merge.json")
    assert note["emulator"] == bytes_hash(run.emulator / "emulator.json")
    count = len(read_tensors(run.base))
    assert result.checked == note["checked"] == f"{count} tensors are those that the emulator was made from"
