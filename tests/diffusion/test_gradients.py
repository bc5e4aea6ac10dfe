"""calibrate --gradients on recorded inputs with targets: of the squared error of the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_tools.errors import InputError
from emloc_tools.files.calibration import Calibration
from emloc_tools.models.recording import record_inputs
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.merge_calibration import merge_calibration
from tests.diffusion.conftest import RATIO, Case, calls_in
from tests.diffusion.measures import linears, outputs
from tests.stages.reference import close_to, read_grams, read_json


@pytest.fixture(scope="module")
def probed(flux: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The training inputs with the model's own outputs plus noise as targets, and the calibration on them."""
    root = tmp_path_factory.mktemp("probed")
    with record_inputs(flux.model, root / "inputs.safetensors", probe=True), torch.no_grad():
        for call in calls_in(flux.inputs):
            flux.model(**call)
    data, calibration = root / "inputs.safetensors", root / "calibration"
    result = calibrate(base=flux.base, data=data, gradients=True, output=calibration, device="cpu")
    assert result.gradients == result.layers
    return data, calibration


def test_gradients_are_those_of_the_squared_error_in_memory(flux: Case, probed: tuple[Path, Path]) -> None:
    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def add(gradient: torch.Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).double()
            sums[name] = sums.get(name, torch.zeros(())) + g.T @ g

        return lambda module, args, output: output.register_hook(add) and None

    handles = [module.register_forward_hook(hook(name)) for name, module in linears(flux.model).items()]
    for call in calls_in(probed[0]):
        target = call.pop("target")
        (flux.model(**call).sample - target).square().sum().backward()
    for handle in handles:
        handle.remove()
    flux.model.zero_grad()
    calibration = Calibration(probed[1])
    assert (calibration.manifest.format_version, calibration.loss) == (4, "squared-error")
    for name, module in linears(flux.model).items():
        gradient = calibration.gradient(name)
        assert gradient is not None
        W = module.weight.detach().double()
        expected = sums[name] if gradient.side == "output" else W.T @ sums[name] @ W
        assert close_to(gradient.matrix, expected) < 1e-5
        assert gradient.energy == pytest.approx(float(sums[name].trace()), rel=1e-5)
    calibration.close()


def test_targets_do_not_change_the_statistics_of_the_data(
    flux: Case, probed: tuple[Path, Path], tmp_path: Path
) -> None:
    calibrate(base=flux.base, data=probed[0], output=tmp_path / "without", device="cpu")
    assert read_json(tmp_path / "without" / "calibration.json")["format_version"] == 1
    found, expected = (read_grams(folder) for folder in (tmp_path / "without", flux.calibration))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name][2], expected[name][2]) for name in expected)


def test_weighting_lowers_the_error_on_held_out_inputs_further(
    flux: Case, probed: tuple[Path, Path], tmp_path: Path
) -> None:
    """At the same ratio, in every held-out call; and without any knowledge of what the output should be."""
    build_emulator(base=flux.base, calibration=probed[1], ratio=RATIO, output=tmp_path / "weighted")
    manifest = read_json(tmp_path / "weighted" / "emulator.json")
    assert (manifest["format_version"], manifest["library"]) == (4, "diffusers")
    assert set(manifest["weighting"]["sensitivity"]) == set(manifest["layers"])
    expected, errors = outputs(flux.model, flux.heldout), {}
    for name, folder in (("weighted", tmp_path / "weighted"), ("calibrated", flux.emulator)):
        found = outputs(diffusers.FluxTransformer2DModel.from_pretrained(folder), flux.heldout)
        errors[name] = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    sizes = [read_json(folder / "emulator.json")["parameters"] for folder in (tmp_path / "weighted", flux.emulator)]
    assert sizes[0] <= sizes[1]
    assert (errors["weighted"] < 0.8 * errors["calibrated"]).all(), errors


def test_merged_calibrations_add_up(flux: Case, probed: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(probed[0])
    for part in range(2):
        chosen = {name: tensor for name, tensor in tensors.items() if int(name.split("/")[0]) % 2 == part}
        save_file(chosen, tmp_path / f"{part}.safetensors")
        data, output = tmp_path / f"{part}.safetensors", tmp_path / f"part-{part}"
        calibrate(base=flux.base, data=data, gradients=True, output=output, device="cpu")
    merge_calibration(parts=[tmp_path / "part-0", tmp_path / "part-1"], output=tmp_path / "merged")
    whole, merged = Calibration(probed[1]), Calibration(tmp_path / "merged")
    assert merged.loss == whole.loss
    for name in whole.manifest.layers:
        one, other = whole.gradient(name), merged.gradient(name)
        assert one is not None
        assert other is not None
        assert close_to(other.matrix, one.matrix) < 1e-5
    whole.close()
    merged.close()


def test_targets_that_do_not_fit_or_are_missing_are_refused(
    flux: Case, probed: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors = load_file(probed[0])
    cases = {
        r"gives \[1, 64, 4\] and the target of the ready inputs is \[1, 4, 64\]": {
            **tensors,
            "0/target": tensors["0/target"].mT.contiguous(),
        },
        "nor what the output is to be": {name: tensor for name, tensor in tensors.items() if name != "0/target"},
    }
    for message, content in cases.items():
        save_file(content, tmp_path / "inputs.safetensors")
        with pytest.raises(InputError, match=message):
            calibrate(
                base=flux.base,
                data=tmp_path / "inputs.safetensors",
                gradients=True,
                output=tmp_path / "out",
                device="cpu",
            )
