"""evaluate on recorded inputs: the squared error to their targets, of base and emulator, with LoRAs and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from emloc_tools.cli import main
from emloc_tools.errors import InputError
from emloc_tools.files.diffusers_lora import WEIGHTS
from emloc_tools.stages import scoring
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from tests.diffusion.conftest import Case
from tests.diffusion.measures import outputs

Calls = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def data(flux: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Held-out inputs with targets that lie near the base's outputs, and these targets."""
    path = tmp_path_factory.mktemp("data") / "inputs.safetensors"
    torch.manual_seed(5)
    targets = outputs(flux.model, flux.heldout)
    targets = targets + 0.1 * torch.randn_like(targets)
    calls = [{**call, "target": target} for call, target in zip(flux.heldout, targets, strict=True)]
    save_file({f"{n}/{name}": value for n, call in enumerate(calls) for name, value in call.items()}, path)
    return path, targets


@pytest.fixture(scope="module")
def loras(flux: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA as diffusers saves it, and the corrected one."""
    from diffusers.training_utils import _collate_lora_metadata

    root = tmp_path_factory.mktemp("loras")
    torch.manual_seed(1)
    model = diffusers.FluxTransformer2DModel.from_pretrained(flux.emulator)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    layers, metadata = get_peft_model_state_dict(model), _collate_lora_metadata({"transformer": model})
    diffusers.FluxPipeline.save_lora_weights(root / "lora", transformer_lora_layers=layers, **metadata)
    correct(emulator=flux.emulator, adapter=root / "lora", base=flux.base, output=root / "corrected")
    return root / "lora", root / "corrected"


def expected(folder: Path, calls: Calls, targets: torch.Tensor, lora: Path | None = None) -> float:
    """The mean squared error of a model in memory, as diffusers loads it and the LoRA."""
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder).eval()
    if lora is not None:
        model.load_lora_adapter(lora / WEIGHTS, use_safetensors=True)
    return float((outputs(model, calls) - targets).double().square().mean())


def test_errors_are_those_of_the_models_in_memory(
    flux: Case, data: tuple[Path, torch.Tensor], loras: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, targets = data
    base, (lora, corrected) = flux.pipeline / "transformer", loras
    cases: dict[tuple[str, Path | None], tuple[Path, Path | None]] = {
        ("base", None): (base, None),
        ("base", lora): (base, lora),
        ("base", corrected): (base, corrected),
        ("emulator", None): (flux.emulator, None),
        ("emulator", lora): (flux.emulator, lora),
    }
    for in_flight in (scoring.TOKENS_IN_FLIGHT, 1):  # one pass for all, and one for each call and LoRA
        monkeypatch.setattr(scoring, "TOKENS_IN_FLIGHT", in_flight)
        results = evaluate(base=flux.base, emulator=flux.emulator, adapters=[lora, corrected], data=path, device="cpu")
        assert len(results) == len(cases)
        for result in results:
            key = (result.model, None if result.adapter is None else Path(result.adapter))
            assert result.loss == pytest.approx(expected(cases[key][0], flux.heldout, targets, cases[key][1]), rel=1e-4)
            assert (result.predicts, result.tokens) == ("entries", targets.numel())
            assert (result.accuracy, result.exact, result.perplexity) == (None, None, None)
    losses = {result.loss for result in results}
    assert max(losses) > 1.5 * min(losses)  # the control: they differ
    assert len(losses) == len(cases)


def test_the_command_shows_entries_and_no_accuracy(flux: Case, data: tuple[Path, torch.Tensor]) -> None:
    words = ["evaluate", "--base", flux.base, "--data", str(data[0]), "--device", "cpu"]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0, shown.output
    assert "entries" in shown.output
    assert "accuracy" not in shown.output
    (result,) = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["results"]
    assert (result["predicts"], result["accuracy"], result["tokens"]) == ("entries", None, data[1].numel())


def test_inputs_without_a_target_or_with_one_of_another_shape_are_refused(
    flux: Case, data: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = [
        {**call, "target": target} for call, target in zip(flux.heldout, data[1], strict=True)
    ]
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "none": ({"target": None}, "hold neither input_ids nor labels nor a target, so there is nothing to predict"),
        "shape": (
            {"target": torch.zeros(1, 2, 3)},
            r"the model gives .* and the target of the ready inputs is \[1, 2, 3\]",
        ),
    }
    for name, (change, message) in cases.items():
        tensors = {
            f"{n}/{key}": value.clone()
            for n, call in enumerate(calls)
            for key, value in {**call, **change}.items()
            if value is not None
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=message):
            evaluate(base=flux.base, data=tmp_path / f"{name}.safetensors", device="cpu")
    mixed = {
        f"{n}/{key}": value for n, call in enumerate(calls) for key, value in call.items() if (n, key) != (0, "target")
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(InputError, match="some of the ready inputs hold a target and some none"):
        evaluate(base=flux.base, data=tmp_path / "mixed.safetensors", device="cpu")
