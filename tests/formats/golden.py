"""The golden folders, and how a reader takes one in completely."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from emloc_tools.files.calibration import Calibration
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.emulator import Emulator

FORMATS = Path(__file__).parents[2] / "formats"
KINDS = ("calibration", "emulator", "adapter")
MANIFESTS = {"calibration": "calibration.json", "emulator": "emulator.json", "adapter": "emloc.json"}
GOOD = [(kind, path.name) for kind in KINDS for path in sorted((FORMATS / kind / "golden").glob("ok-*"))]
EXPECTED = {kind: json.loads((FORMATS / kind / "golden" / "bad.json").read_text(encoding="utf-8")) for kind in KINDS}
BAD = [(kind, name) for kind in KINDS for name in EXPECTED[kind]]


def golden(kind: str, name: str) -> Path:
    """The path of a golden folder."""
    return FORMATS / kind / "golden" / name


def read_all(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Open a folder and read every value that it holds, with all checks."""
    if kind == "calibration":
        calibration = Calibration(folder)
        values = {layer: calibration.gram(layer).matrix for layer in calibration.reached}
        for layer in calibration.gradient_layers:
            gradient = calibration.gradient(layer)
            assert gradient is not None
            values[f"{layer} gradient"] = gradient.matrix
        calibration.close()
    elif kind == "emulator":
        emulator = Emulator(folder)
        values = {name: emulator.read(name) for name in emulator.tensors.names()}
        for layer in (*emulator.layers, *emulator.stacks):
            for factor, tensor in zip(("U", "S", "Vh"), emulator.factors(layer), strict=True):
                values[f"{layer}.{factor}"] = tensor
        emulator.close()
    else:
        adapter = open_adapter(folder)
        values = {name: adapter.read(name) for name in adapter.tensors.names()}
        for module in adapter.loras:
            values[f"{module} A"], values[f"{module} B"] = adapter.pair(module)
        adapter.close()
    return values
