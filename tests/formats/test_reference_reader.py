"""The reference reader and the package read the same numbers, and the former needs neither torch nor the package."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from emloc_tools.files.calibration import Calibration
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.emulator import Emulator
from formats import reference_reader
from tests.formats.golden import FORMATS, GOOD, golden

BLOCKED = ("torch", "safetensors", "transformers", "peft", "pydantic", "xxhash", "emloc_tools")


def of(kind: str) -> list[str]:
    return [name for this, name in GOOD if this == kind]


@pytest.mark.parametrize("name", of("calibration"))
def test_grams_agree(name: str) -> None:
    calibration, found = (
        Calibration(golden("calibration", name)),
        reference_reader.read_calibration(golden("calibration", name)),
    )
    gradients = {layer for layer, side in found if side.endswith("_gradient")}
    assert {layer for layer, side in found if not side.endswith("_gradient")} == set(calibration.reached)
    assert gradients == calibration.gradient_layers
    assert len(found) == len(calibration.reached) + len(gradients)
    for (layer, side), (tokens, G, energy) in found.items():
        if side.endswith("_gradient"):
            gradient = calibration.gradient(layer)
            assert gradient is not None
            assert (f"{gradient.side}_gradient", gradient.tokens, gradient.energy) == (side, tokens, energy)
            matrix = gradient.matrix
        else:
            gram = calibration.gram(layer)
            assert (gram.side, gram.tokens, None) == (side, tokens, energy)
            matrix = gram.matrix
        assert np.array_equal(matrix.numpy(), G)
        assert np.array_equal(G, G.T)
    calibration.close()


@pytest.mark.parametrize("name", of("emulator"))
def test_emulated_weights_and_other_tensors_agree(name: str) -> None:
    emulator = Emulator(golden("emulator", name))
    weights, others = reference_reader.read_emulator(golden("emulator", name))
    records = {**emulator.layers, **emulator.stacks}
    assert set(weights) == set(records)
    for layer, W in weights.items():
        U, S, Vh = (factor.double() for factor in emulator.factors(layer))
        assert np.array_equal((U @ torch.diag_embed(S) @ Vh).numpy(), W)
        assert W.shape[-2:] == (records[layer].out_features, records[layer].in_features)
        assert W.ndim == 2 + (layer in emulator.stacks)
    own = {f"{layer}.{part}" for layer in emulator.layers for part in ("U", "S", "Vh", "weight")}
    own |= {f"{stack}{part}" for stack in emulator.stacks for part in ("_U", "_S", "_Vh", "")}
    assert set(others) == set(emulator.tensors.names()) - own
    for tensor, value in others.items():
        assert np.array_equal(emulator.read(tensor).float().numpy(), value.astype(np.float32))
    emulator.close()


@pytest.mark.parametrize("name", of("adapter"))
def test_pairs_and_scalings_agree(name: str) -> None:
    adapter = open_adapter(golden("adapter", name))
    pairs, corrected = reference_reader.read_adapter(golden("adapter", name))
    assert corrected == adapter.corrected
    assert set(pairs) == set(adapter.loras)
    for module, (A, B, scaling) in pairs.items():
        assert scaling == adapter.loras[module].scaling
        for ours, theirs in zip(adapter.pair(module), (A, B), strict=True):
            assert np.array_equal(ours.float().numpy(), theirs.astype(np.float32))
    adapter.close()


def test_the_good_adapters_differ_in_what_their_scaling_depends_on() -> None:
    """Control: without patterns and rsLoRA the comparison above would prove little."""
    plain, _ = reference_reader.read_adapter(golden("adapter", "ok-trained"))
    special, _ = reference_reader.read_adapter(golden("adapter", "ok-trained-rslora-patterns"))
    assert {scaling for _, _, scaling in plain.values()} == {3 / 2}
    assert {scaling for _, _, scaling in special.values()} == {16 / 4**0.5, 1.5 / 2**0.5}


def test_the_good_calibrations_hold_gradients_of_both_sides_and_layers_without() -> None:
    """Control: without them the comparison above would not show that gradients are kept apart from data."""
    found = reference_reader.read_calibration(golden("calibration", "ok-gradients"))
    layers = {layer for layer, _ in found}
    assert {side for _, side in found} == {"input", "output", "input_gradient", "output_gradient"}
    assert len(layers) < len(found) < 2 * len(layers)


@pytest.mark.parametrize(
    ("kind", "rule", "newest"), [("calibration", "C2", 4), ("emulator", "E2", 5), ("adapter", "A8", 4)]
)
def test_a_later_version_is_refused_by_name(kind: str, rule: str, newest: int) -> None:
    folder = golden(kind, f"bad-{rule}-version-{newest + 1}")
    read = getattr(reference_reader, f"read_{kind}")
    with pytest.raises(
        SystemExit, match=rf"is emloc-{kind} {newest + 1}; this program reads emloc-{kind} up to {newest}"
    ):
        read(folder)


@pytest.mark.parametrize(("kind", "name"), GOOD)
def test_it_runs_where_torch_and_the_package_are_blocked(kind: str, name: str) -> None:
    blocked = "; ".join(f"sys.modules[{module!r}] = None" for module in BLOCKED)
    script, folder = str(FORMATS / "reference_reader.py"), str(golden(kind, name))
    start = f"sys.argv = [{script!r}, {folder!r}]; runpy.run_path({script!r}, run_name='__main__')"
    code = f"import sys, runpy; {blocked}; {start}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "norm" in done.stdout or "Gram" in done.stdout


def test_it_stays_short() -> None:
    assert len((FORMATS / "reference_reader.py").read_text(encoding="utf-8").splitlines()) <= 150
