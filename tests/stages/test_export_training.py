"""A LoRA that is trained on the dense export is the one that is trained on the emulator, and is corrected alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from emloc_tools.errors import InputError, MismatchError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from emloc_tools.stages.export import export
from emloc_tools.stages.merge import merge
from tests import pico
from tests.conftest import Run

STEPS = 8


@pytest.fixture(scope="module")
def dense(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the run's emulator."""
    folder = tmp_path_factory.mktemp("exported") / "dense"
    export(emulator=run.emulator, output=folder)
    return folder


@pytest.fixture(scope="module")
def adapters(run: Run, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs trained from one seed on the emulator, on its export, and on the base."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "emulator": train(run, run.emulator, root / "emulator", trust_remote_code=True),
        "dense": train(run, dense, root / "dense"),
        "base": train(run, run.base, root / "base"),
    }


def train(run: Run, model: Path, output: Path, **options: Any) -> Path:
    """A few steps of plain gradient descent with momentum, in float32, on all samples at once."""
    ids = [torch.tensor(sample) for sample in pico.token_ids(run.data, run.base, 32)]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(loaded, config)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.3, momentum=0.9)
    for _ in range(STEPS):
        peft(input_ids=batch, attention_mask=(labels >= 0).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(output)
    return output


def updates(adapter: Path) -> dict[str, torch.Tensor]:
    """B A of every module, float64."""
    tensors = {name: tensor.double() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    names = {name.split(".lora_")[0] for name in tensors}
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of any module, relative to its own size."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def test_both_trainings_give_the_same_adapter(adapters: dict[str, Path]) -> None:
    emulator, dense, base = (updates(adapters[name]) for name in ("emulator", "dense", "base"))
    assert all(update.norm() > 0 for update in emulator.values())
    assert largest_difference(emulator, dense) < 1e-4  # float32's rounding, over the steps
    assert largest_difference(emulator, base) > 0.1, "on any model the adapter would be the same"


def test_correct_takes_both_and_gives_the_same(run: Run, adapters: dict[str, Path], tmp_path: Path) -> None:
    for name in ("emulator", "dense"):
        correct(emulator=run.emulator, adapter=adapters[name], base=str(run.base), output=tmp_path / name)
    found = [updates(tmp_path / name) for name in ("emulator", "dense")]
    assert largest_difference(*found) < 1e-4
    assert largest_difference(found[1], updates(adapters["dense"])) > 0.01, "correcting makes no difference here"


def test_correct_refuses_the_emulator_that_the_export_is_not_of(
    run: Run, adapters: dict[str, Path], tmp_path: Path
) -> None:
    build_emulator(base=str(run.base), ratio=0.3, output=tmp_path / "other")
    with pytest.raises(MismatchError, match="dense export of another emulator"):
        correct(emulator=tmp_path / "other", adapter=adapters["dense"], base=str(run.base), output=None)


def test_a_copy_of_the_emulator_is_the_same_emulator(run: Run, adapters: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(run.emulator, tmp_path / "copy")
    result = correct(emulator=tmp_path / "copy", adapter=adapters["dense"], base=str(run.base), output=None)
    assert len(result.layers) == len(updates(adapters["dense"]))


def test_merge_refuses_an_adapter_of_an_export_that_is_not_corrected(
    run: Run, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="not corrected"):
        merge(base=str(run.base), adapter=adapters["dense"], output=tmp_path / "merged")
    merge(base=str(run.base), adapter=adapters["base"], output=tmp_path / "merged")  # the control: a LoRA of the base


def test_an_export_is_no_base(run: Run, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"emloc-export\.json names"):
        build_emulator(base=str(dense), ratio=0.3, output=tmp_path / "emulator")
    with pytest.raises(InputError, match=r"emloc-export\.json names"):
        correct(emulator=run.emulator, adapter=run.adapter, base=str(dense), output=None)
    with pytest.raises(InputError, match=r"emloc-export\.json names"):
        evaluate(base=str(dense), data=run.data)
