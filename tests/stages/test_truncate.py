"""truncate: a cut emulator equals one that is built at that size, and is corrected like it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools.errors import InputError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.truncate import truncate
from tests import pico
from tests.stages.conftest import Case
from tests.stages.reference import close_to, contents, read_json, read_tensors


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_a_cut_emulator_equals_one_built_at_that_size(
    case_of: Callable[[str], Case], family: str, tmp_path: Path, allocation: Any
) -> None:
    case = case_of(family)
    for name, ratio in (("large", 0.6), ("small", 0.25)):
        build_emulator(
            base=str(case.base),
            calibration=case.calibration,
            ratio=ratio,
            allocation=allocation,
            output=tmp_path / name,
        )
    truncate(emulator=tmp_path / "large", ratio=0.25, output=tmp_path / "cut")
    built, cut, large = (read_tensors(tmp_path / name) for name in ("small", "cut", "large"))
    assert built.keys() == cut.keys()
    for name in built:
        factor = name.endswith((".U", ".S", ".Vh"))
        assert close_to(cut[name], built[name]) < 1e-6 if factor else torch.equal(cut[name], built[name])
    assert any(large[name].shape != built[name].shape for name in built)
    expected, found = (read_json(tmp_path / name / "emulator.json") for name in ("small", "cut"))
    for name, layer in expected["layers"].items():
        for field in ("relative_error", "total_energy"):
            assert found["layers"][name].pop(field) == pytest.approx(layer.pop(field), rel=1e-4)
    assert found["layers"] == expected["layers"]
    for field in ("base", "calibration", "allocation", "eigen_dtype", "parameters", "base_parameters"):
        assert found[field] == expected[field]


def test_all_other_files_are_those_of_a_direct_build(llama: Case, tmp_path: Path) -> None:
    for name, ratio in (("large", 0.6), ("small", 0.25)):
        build_emulator(base=str(llama.base), ratio=ratio, output=tmp_path / name)
    truncate(emulator=tmp_path / "large", ratio=0.25, output=tmp_path / "cut")
    built, cut = contents(tmp_path / "small"), contents(tmp_path / "cut")
    assert built.keys() == cut.keys()
    differing = {name for name in built if built[name] != cut[name]}
    assert differing <= {"emulator.json", "model.safetensors"}
    assert {"config.json", "modeling_emloc.py", "README.md", "tokenizer.json"} <= built.keys()


def test_filled_directions_and_floors_are_counted_as_in_a_direct_build(llama: Case, tmp_path: Path) -> None:
    data = pico.write_jsonl(tmp_path / "short.jsonl", [{"text": "abcdef"}])  # six tokens: rank 6 at most
    calibrate(base=str(llama.base), data=data, output=tmp_path / "calibration", device="cpu")
    for name, ratio in (("large", 0.7), ("small", 0.45)):
        build_emulator(base=str(llama.base), calibration=tmp_path / "calibration", ratio=ratio, output=tmp_path / name)
    truncate(emulator=tmp_path / "large", ratio=0.45, output=tmp_path / "cut")
    expected, found = (read_json(tmp_path / name / "emulator.json")["layers"] for name in ("small", "cut"))
    counts = {name: (layer["rank"], layer["energetic"], layer["floored"]) for name, layer in expected.items()}
    assert {name: (layer["rank"], layer["energetic"], layer["floored"]) for name, layer in found.items()} == counts
    assert any(energetic < rank for rank, energetic, _ in counts.values())
    assert any(floored for *_, floored in counts.values())


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_an_emulator_that_is_no_larger_cannot_be_cut(llama: Case, tmp_path: Path, ratio: float) -> None:
    build_emulator(base=str(llama.base), ratio=0.5, output=tmp_path / "emulator")
    with pytest.raises(InputError, match=r"emulator in .* is not larger than that"):
        truncate(emulator=tmp_path / "emulator", ratio=ratio, output=tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["emulator"]


def test_a_lora_trained_on_a_cut_emulator_is_corrected_as_on_a_built_one(llama: Case, tmp_path: Path) -> None:
    for name, ratio in (("large", 0.6), ("small", 0.25)):
        build_emulator(base=str(llama.base), calibration=llama.calibration, ratio=ratio, output=tmp_path / name)
    truncate(emulator=tmp_path / "large", ratio=0.25, output=tmp_path / "cut")
    pico.save_lora(tmp_path / "lora", tmp_path / "cut")
    corrected = {}
    for name in ("small", "cut", "large"):
        output = tmp_path / f"corrected for {name}"
        correct(emulator=tmp_path / name, adapter=tmp_path / "lora", base=str(llama.base), output=output)
        corrected[name] = read_tensors(output)
    for name, tensor in corrected["cut"].items():
        assert close_to(tensor, corrected["small"][name]) < 1e-5
        assert name.endswith("lora_A.weight") or close_to(tensor, corrected["large"][name]) > 1e-3


def test_the_larger_emulator_is_left_as_it_is(llama: Case, tmp_path: Path) -> None:
    build_emulator(base=str(llama.base), ratio=0.5, output=tmp_path / "emulator")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="would replace the input"):
        truncate(emulator=tmp_path / "emulator", ratio=0.2, output=tmp_path / "emulator", overwrite=True)

    def stop(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        truncate(emulator=tmp_path / "emulator", ratio=0.2, output=tmp_path / "cut", progress=stop)
    assert contents(tmp_path) == before
