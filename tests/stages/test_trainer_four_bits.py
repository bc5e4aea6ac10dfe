"""trainer-config --four-bits: each trainer's own words for an emulator in 4 bits, and none without the flag."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from emloc_tools.stages.trainer_config import Trainer, trainer_config
from tests.conftest import Run
from tests.stages.test_trainer_config import OWN_LOOPS, PROGRAMS, YAML, read

WORDS: dict[str, dict[str, Any]] = {
    "trl": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True},
    "axolotl": {"load_in_4bit": True, "adapter": "qlora"},
    "llamafactory": {"quantization_bit": 4, "quantization_method": "bnb", "quantization_type": "nf4"},
    "ms-swift": {"quant_method": "bnb", "quant_bits": 4},
    "transformers": {"FOUR_BITS": True},
    "accelerate": {"FOUR_BITS": True},
    "unsloth": {"FOUR_BITS": True},
}


def write(run: Run, path: Path, trainer: Trainer, *, four_bits: bool) -> Path:
    """Write a configuration."""
    path.mkdir()
    trainer_config(trainer=trainer, emulator=run.emulator, data=run.data, output=path / "config", four_bits=four_bits)
    return path / "config"


@pytest.mark.parametrize("trainer", get_args(Trainer))
def test_the_flag_sets_what_the_trainer_calls_4_bits(run: Run, tmp_path: Path, trainer: Trainer) -> None:
    four = read(trainer, write(run, tmp_path / "four", trainer, four_bits=True))
    plain = read(trainer, write(run, tmp_path / "plain", trainer, four_bits=False))
    assert four.items() >= WORDS[trainer].items()
    assert all(plain.get(name) != value for name, value in WORDS[trainer].items())
    # Nothing else differs but what comes with those words.
    others = {name for name in four if four[name] != plain.get(name)} - set(WORDS[trainer])
    assert others <= {"double_quantization", "dataset_dir"}
    assert set(WORDS) == {*YAML, *PROGRAMS}


@pytest.mark.parametrize("trainer", OWN_LOOPS)
def test_programs_load_an_emulator_whose_factors_are_packed(run: Run, tmp_path: Path, trainer: Trainer) -> None:
    """What `from_pretrained` gets, taken to where it goes."""
    import transformers

    program = runpy.run_path(str(write(run, tmp_path / "four", trainer, four_bits=True)))
    options = program["quantisation"](torch.device("cpu"))
    assert options["quantization_config"].bnb_4bit_compute_dtype == torch.float32  # the emulator's dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(run.emulator, trust_remote_code=True, **options)
    assert model.model.layers[0].mlp.up_proj.U.dtype == torch.uint8
    plain = runpy.run_path(str(write(run, tmp_path / "plain", trainer, four_bits=False)))
    assert plain["quantisation"](torch.device("cpu")) == {}
