"""Takes a quantised base and the same numbers in full precision through the stages, whose results must be equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from emloc_tools import load_emulator
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.export import export
from emloc_tools.stages.merge import merge
from tests import pico

CHANGED = "model.layers.0.self_attn.q_proj.weight"
FILES = {"emulator": "model", "corrected": "adapter_model", "merged": "model", "exported": "model"}


def save_plain(folder: Path, like: Path, tensors: dict[str, torch.Tensor]) -> str:
    """A checkpoint of `tensors` with the configuration of the folder `like`, but for its quantisation."""
    folder.mkdir()
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((like / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    pico.save_tokenizer(folder)
    return str(folder)


def require_equal_stages(quantised: str, plain: str, root: Path) -> Path:
    """Assert that every stage makes the same of both bases, in full precision; returns the corrected adapter.

    The LoRA is trained on the quantised base's emulator, and corrected with either base: their weights are the same.
    """
    bases, data = {"quantised": quantised, "plain": plain}, pico.save_texts(root / "data.jsonl", count=3)
    for name, base in bases.items():
        calibration, emulator = root / f"{name}-calibration", root / f"{name}-emulator"
        calibrate(base=base, data=data, output=calibration, max_length=16, device="cpu")
        build_emulator(base=base, calibration=calibration, ratio=0.5, output=emulator)
        export(emulator=emulator, output=root / f"{name}-exported")
    assert load_emulator(root / "quantised-emulator").dtype == torch.bfloat16
    pico.save_lora(root / "lora", root / "quantised-emulator", target_modules=["q_proj", "o_proj"])
    for name, base in bases.items():
        options: dict[str, Any] = {"emulator": root / "quantised-emulator", "adapter": root / "lora"}
        correct(**options, base=base, output=root / f"{name}-corrected")
        merge(base=base, adapter=root / f"{name}-corrected", output=root / f"{name}-merged")
    for made, file in FILES.items():
        one, other = (load_file(root / f"{name}-{made}" / f"{file}.safetensors") for name in bases)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), made
        config = root / f"quantised-{made}" / "config.json"
        assert not config.exists() or "quantization_config" not in json.loads(config.read_text())
    merged = load_file(root / "quantised-merged" / "model.safetensors")[CHANGED]
    assert not torch.equal(
        merged, load_file(Path(plain) / "model.safetensors")[CHANGED]
    )  # control: the LoRA changes it
    return root / "quantised-corrected"
