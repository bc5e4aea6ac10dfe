"""A model that matches images and texts has a loss for several pairs at once, and for a single one none."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from emloc_tools.errors import InputError
from emloc_tools.stages.calibrate import calibrate
from tests.architectures.catalogue import BY_NAME


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_gradients_of_a_single_pair_are_refused(name: str, tmp_path: Path) -> None:
    """CLIP's would be zero: there is nothing to take the caption for but the image's own."""
    family, output = BY_NAME[name], tmp_path / "calibration"
    family.save(tmp_path / "base")
    batch = family.batches()[1]
    for pairs in (1, 2):
        inputs = {f"0/{key}": tensor[:pairs].contiguous() for key, tensor in batch.items()}
        save_file(inputs, tmp_path / f"{pairs}.safetensors")
    options = {"base": str(tmp_path / "base"), "output": output, "gradients": True, "device": "cpu"}
    with pytest.raises(InputError, match=f"{family.model} compares every pair of a batch with the others"):
        calibrate(data=tmp_path / "1.safetensors", **options)
    assert not output.exists()
    assert calibrate(data=tmp_path / "2.safetensors", **options).gradients > 0  # control
