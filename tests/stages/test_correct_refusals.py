"""correct: what would give a wrong adapter without a sign is refused, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools.errors import FormatError, InputError, MismatchError, UnsupportedError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import correct
from tests import pico
from tests.conftest import Run
from tests.stages.adapters import changed
from tests.stages.conftest import Case
from tests.stages.reference import contents


def refuse(run: Run, output: Path, error: type[Exception], message: str, **options: Any) -> None:
    """Correct with one input replaced by `options` must raise and leave no output."""
    chosen = {"emulator": run.emulator, "adapter": run.adapter, "base": str(run.base), **options}
    with pytest.raises(error, match=message):
        correct(output=output, **chosen)
    assert not output.exists()


def test_another_base_of_equal_shapes_is_refused(run: Run, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "other", seed=1)
    refuse(
        run,
        tmp_path / "corrected",
        MismatchError,
        r"is not the weight that the emulator in .* was made from .*pass that very model as --base",
        base=str(tmp_path / "other"),
    )


def test_one_changed_weight_of_the_base_is_enough(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.base, tmp_path / "base")
    model = type(run.model).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight[0, 0] += 1e-6
    model.save_pretrained(tmp_path / "base")
    refuse(run, tmp_path / "out", MismatchError, r"model\.layers\.2\.mlp\.up_proj", base=str(tmp_path / "base"))


def test_another_base_is_refused_even_where_only_dense_layers_are_adapted(run: Run, tmp_path: Path) -> None:
    pico.save_lora(tmp_path / "adapter", run.emulator, target_modules=["lm_head"])
    correct(emulator=run.emulator, adapter=tmp_path / "adapter", base=str(run.base), output=None)
    pico.save_model(tmp_path / "other", seed=1)
    refuse(
        run,
        tmp_path / "corrected",
        MismatchError,
        r"lm_head\.weight of .* is not the weight",
        adapter=tmp_path / "adapter",
        base=str(tmp_path / "other"),
    )


def test_another_architecture_is_refused(run: Run, case_of: Callable[[str], Case], tmp_path: Path) -> None:
    message = r"is a GPT2LMHeadModel, the emulator was made from a LlamaForCausalLM"
    refuse(run, tmp_path / "corrected", MismatchError, message, base=str(case_of("gpt2").base))


def test_a_corrected_adapter_is_not_corrected_again(run: Run, tmp_path: Path) -> None:
    refuse(run, tmp_path / "corrected", MismatchError, "is corrected already", adapter=run.corrected)


def test_an_adapter_of_other_widths_is_refused(run: Run, tmp_path: Path) -> None:
    def narrower(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, value[:, 1:] if "lora_A" in name else value

    adapter = changed(run.adapter, tmp_path / "adapter", tensor=narrower)
    message = r"is for \d+ x \d+, the emulator's layer is \d+ x \d+; the adapter was trained on another model"
    refuse(run, tmp_path / "corrected", MismatchError, message, adapter=adapter)


def test_an_adapter_of_unknown_layers_is_refused(run: Run, tmp_path: Path) -> None:
    def renamed(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.replace("layers.2", "layers.7"), value

    adapter = changed(run.adapter, tmp_path / "adapter", tensor=renamed)
    message = r"adapts model\.layers\.7\..*, which .* does not have; it was trained on another model"
    refuse(run, tmp_path / "corrected", MismatchError, message, adapter=adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"was trained with use_dora: .*use plain LoRA or rsLoRA"),
        ({"lora_bias": True}, r"was trained with lora_bias: .*use plain LoRA or rsLoRA"),
        ({"bias": "all"}, r'was trained with bias="all"'),
        ({"bias": "lora_only"}, r'was trained with bias="lora_only"'),
        (
            {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]},
            r"saves model\.layers\.0\.self_attn\.q_proj as a whole .*leave it out of modules_to_save",
        ),
    ],
    ids=["DoRA", "LoRA bias", "all biases", "biases of LoRA layers", "saved factors"],
)
def test_adapters_beyond_plain_pairs_are_refused(
    run: Run, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    pico.save_lora(tmp_path / "adapter", run.emulator, **options)
    refuse(run, tmp_path / "corrected", UnsupportedError, message, adapter=tmp_path / "adapter")


def test_an_adapter_that_diverged_is_refused(run: Run, tmp_path: Path) -> None:
    def diverged(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, value * float("nan") if "layers.1.mlp.up_proj.lora_B" in name else value

    adapter = changed(run.adapter, tmp_path / "adapter", tensor=diverged)
    message = r"layers\.1\.mlp\.up_proj\.lora_B.* holds NaN or infinity"
    refuse(run, tmp_path / "corrected", FormatError, message, adapter=adapter)


@pytest.mark.parametrize("clamp", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_clamp_that_is_no_positive_number_is_refused(run: Run, tmp_path: Path, clamp: float) -> None:
    refuse(run, tmp_path / "corrected", InputError, "--clamp .* must be a number above 0", clamp=clamp)


@pytest.mark.parametrize("place", ["adapter", "emulator"])
def test_an_output_in_the_place_of_an_input_is_refused(run: Run, place: str) -> None:
    folder = getattr(run, place)
    before = contents(folder)
    with pytest.raises(InputError, match="would replace the input"):
        correct(emulator=run.emulator, adapter=run.adapter, base=str(run.base), output=folder, overwrite=True)
    assert contents(folder) == before


def test_an_output_in_the_place_of_the_data_is_refused(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "corrected"
    correct(emulator=run.emulator, adapter=run.adapter, base=str(run.base), output=output)
    data = output / "heldout.jsonl"
    data.write_bytes(run.data.read_bytes())
    before = contents(output)
    options: dict[str, Any] = {"emulator": run.emulator, "adapter": run.adapter, "base": str(run.base)}
    with pytest.raises(InputError, match=r"would replace the input .*heldout\.jsonl"):
        correct(**options, data=data, output=output, overwrite=True)
    assert contents(output) == before


def test_an_adapter_for_another_emulator_of_the_base_is_taken_but_differs(run: Run, tmp_path: Path) -> None:
    """Adapters do not say which emulator they were trained on; the manifest records the one that was used."""
    build_emulator(base=str(run.base), calibration=run.calibration, ratio=0.2, output=tmp_path / "emulator")
    results = [
        correct(emulator=emulator, adapter=run.adapter, base=str(run.base), output=None)
        for emulator in (run.emulator, tmp_path / "emulator")
    ]
    assert all(results[1].layers[name].delta_norm > layer.delta_norm for name, layer in results[0].layers.items())
