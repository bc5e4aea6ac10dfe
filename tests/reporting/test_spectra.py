"""Spectra: shares of the energy from the stored S, and what is lost from the recorded error; against NumPy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from emloc_tools.errors import FormatError
from emloc_tools.files.emulator import Emulator
from emloc_tools.reporting.spectra import POINTS, spectra, spread
from emloc_tools.stages.build_emulator import build_emulator
from tests.conftest import Run
from tests.stages.reference import read_json, read_tensors


def test_the_shares_are_those_of_the_weights_singular_values(run: Run, tmp_path: Path) -> None:
    """Without calibration the energies are squared singular values of W, which NumPy finds in the base's weight."""
    build_emulator(base=str(run.base), ratio=0.5, output=tmp_path / "emulator")
    weights = {name: tensor.double().numpy() for name, tensor in run.model.state_dict().items()}
    found = list(spectra(tmp_path / "emulator"))
    assert len(found) == 21
    for spectrum in found:
        energies = np.linalg.svd(weights[f"{spectrum.layer}.weight"], compute_uv=False) ** 2
        shares = energies / energies.sum()
        assert spectrum.full_rank == len(energies)
        assert spectrum.direction == list(range(1, spectrum.rank + 1))
        np.testing.assert_allclose(spectrum.share, shares[: spectrum.rank], rtol=1e-5)
        assert spectrum.beyond == pytest.approx(shares[spectrum.rank :].sum(), rel=1e-5)


def test_with_calibration_both_sides_of_the_cut_are_all_of_the_energy(run: Run) -> None:
    for spectrum in spectra(run.emulator):
        assert spectrum.floored == 0
        assert sum(spectrum.share) + spectrum.beyond == pytest.approx(1, abs=1e-5)
        assert spectrum.beyond > 1e-4  # else the test would not see a cut that is taken for nothing


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 100, 4096])
def test_a_long_spectrum_is_thinned_out_but_ends_at_its_cut(count: int) -> None:
    chosen = spread(count)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert len(chosen) == count if count <= POINTS else POINTS // 2 < len(chosen) <= POINTS + 1


def test_experts_without_tokens_are_in_no_spectrum(tmp_path: Path) -> None:
    """Their energies are those of their weights. The golden emulator has three experts, the last without tokens."""
    golden = Path(__file__).parent.parent.parent / "formats" / "emulator" / "golden" / "ok-experts-alone"
    shutil.copytree(golden, tmp_path / "emulator")
    manifest = read_json(golden / "emulator.json")
    ((name, stack),) = manifest["experts"].items()
    assert [expert["tokens"] > 0 for expert in stack["experts"]] == [True, True, False]
    S = read_tensors(golden)[f"{name}_S"].double().numpy()
    energies = [expert["total_energy"] for expert in stack["experts"]]

    def found(changed: int) -> list[float]:
        """The shares where one expert's energy is another."""
        stack["experts"][changed]["total_energy"] = 1e6
        (tmp_path / "emulator" / "emulator.json").write_text(json.dumps(manifest))
        stack["experts"][changed]["total_energy"] = energies[changed]
        (spectrum,) = spectra(tmp_path / "emulator")
        return spectrum.share

    expected = (S[:2] ** 2).sum(0) / sum(energies[:2])
    np.testing.assert_allclose(found(2), expected, rtol=1e-6)
    assert found(0)[0] < expected[0] / 1000  # the control


def test_changed_magnitudes_are_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.emulator, tmp_path / "emulator")
    path = tmp_path / "emulator" / "model.safetensors"
    S = read_tensors(tmp_path / "emulator")["model.layers.0.mlp.up_proj.S"]
    data = path.read_bytes()
    assert data.count(S.numpy().tobytes()) == 1
    path.write_bytes(data.replace(S.numpy().tobytes(), (S * 2).numpy().tobytes()))
    with pytest.raises(FormatError, match=r"up_proj\.S.*another content hash"):
        list(spectra(tmp_path / "emulator"))


def test_only_the_magnitudes_are_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Emulator.read
    monkeypatch.setattr(Emulator, "read", lambda self, name: read.append(name) or original(self, name))
    list(spectra(run.emulator))
    layers = read_json(run.emulator / "emulator.json")["layers"]
    assert sorted(read) == sorted(f"{name}.S" for name in layers)
