"""What the matrix measures of a family, each against a reference that is computed here with plain torch."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from tests.architectures.journey import Journey, floats, read_json, read_tensors
from tests.architectures.moments import (
    Grams,
    distance,
    gradients_in_memory,
    grams_in_memory,
    run,
    stored_grams,
    weight_of,
)

PREFIX = "base_model.model."  # of PEFT
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Keys = dict[str, torch.Size]


class Measures:
    """Relative distances, the largest of all layers or tensors, between what there is and what there should be.

    Those named `..._control` are of something that is wrong on purpose.
    """

    def __init__(self, journey: Journey) -> None:
        self.journey = journey

    @cached_property
    def grams(self) -> float:
        """Between the stored Grams and those that hooks on the model in memory see, every sample unpadded."""
        return distance(self._stored(self.journey.calibration), self._grams_in_memory)

    @cached_property
    def grams_control(self) -> float:
        """The same for a calibration on other inputs."""
        other = self.journey.calibrate("other", seed=1, gradients=False)
        return distance(self._stored(other), self._grams_in_memory)

    def _stored(self, calibration: Path, suffix: str = "") -> Grams:
        grams, _ = stored_grams(calibration, suffix)
        return {name: G for name, G in grams.items() if name in self.journey.layers}

    @cached_property
    def _grams_in_memory(self) -> Grams:
        _, sides = stored_grams(self.journey.calibration)
        return grams_in_memory(
            self.journey.model, self.journey.batches, {name: sides[name] for name in self.journey.layers}
        )

    @cached_property
    def gradients(self) -> float:
        """Between the stored second moments of the loss gradient and those of autograd in memory."""
        expected = gradients_in_memory(self.journey.model, self.journey.batches, self.journey.layers)
        return distance(self._stored(self.journey.calibration, "_gradient"), expected)

    @cached_property
    def gradient_layers(self) -> int:
        """Number of layers whose gradients are stored."""
        return len(self._stored(self.journey.calibration, "_gradient"))

    @cached_property
    def gradients_control(self) -> float:
        """The same for the gradients of other inputs."""
        expected = gradients_in_memory(self.journey.model, self.journey.family.batches(1), self.journey.layers)
        return distance(self._stored(self.journey.calibration, "_gradient"), expected)

    @cached_property
    def outputs(self) -> float:
        """Between all outputs of the base and those of its emulator at full rank, both in float32."""
        return distance(self._outputs(self.journey.load(self.journey.whole)), self._base_outputs)

    @cached_property
    def outputs_control(self) -> float:
        """The same for the emulator that keeps half of the layers' values."""
        emulator = self.journey.load(self.journey.emulator, dtype=torch.float32)
        return distance(self._outputs(emulator), self._base_outputs)

    @cached_property
    def _base_outputs(self) -> dict[str, torch.Tensor]:
        return self._outputs(self.journey.family.load(self.journey.base, dtype=torch.float32))

    def _outputs(self, model: Any) -> dict[str, torch.Tensor]:
        found = {}
        for number, batch in enumerate(self.journey.batches):
            inputs = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
            with torch.no_grad():
                result = run(model, inputs)
            found |= {f"{number}/{place}": tensor for place, tensor in enumerate(floats(result))}
        return found

    @cached_property
    def lacking(self) -> dict[str, set[str]]:
        """The tensors that each Auto class does not find in the base's checkpoint, if it finds all of its blocks'."""
        family, base = self.journey.family, self.journey.base
        found = {}
        for auto in family.auto_classes(base):
            with contextlib.suppress(ValueError):
                model, missing = family.load_by(auto, base)
                blocks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
                if not any(name.startswith(f"{block}.") for name in missing for block in blocks):
                    found[auto] = missing
        return found

    @cached_property
    def lacking_in_emulator(self) -> dict[str, set[str]]:
        """The tensors that each Auto class of the emulator does not find in its files."""
        return {auto: self.journey.family.load_by(auto, self.journey.emulator)[1] for auto in self.journey.auto_map}

    def adapter_keys(self, targets: str | list[str]) -> tuple[Keys | str, Keys | str]:
        """The names and shapes of a LoRA's tensors on the base and on the emulator, or why there can be none."""
        models = self.journey.family.load(self.journey.base), self.journey.load(self.journey.emulator)
        on_base, on_emulator = (adapter_keys(model, targets) for model in models)
        return on_base, on_emulator

    @cached_property
    def all_linear(self) -> tuple[Keys | str, Keys | str]:
        """The same for PEFT's `all-linear`."""
        return self.adapter_keys("all-linear")

    @cached_property
    def correction(self) -> float:
        """How much (W + s B″A′) x differs from (W_E + s B A) x for all x in the row space of A.

        Relative to (W − W_E) x, the error that the correction takes away. W, with B″A′ merged into it, is what PEFT
        makes of the base and the corrected LoRA.
        """
        return self._remaining(self._peft_merged(self.journey.corrected))

    @cached_property
    def correction_control(self) -> float:
        """The same for the LoRA as it was trained, which keeps all of that error."""
        return self._remaining(self._peft_merged(self.journey.adapter))

    def _remaining(self, merged: Any) -> float:
        """Computed in float64 from the files of base, emulator and trained LoRA, on the rows of A."""
        factors, lora = read_tensors(self.journey.emulator), read_tensors(self.journey.adapter)
        config = read_json(self.journey.adapter / "adapter_config.json")
        scaling = config["lora_alpha"] / config["r"]
        found, wanted, errors = {}, {}, {}
        for name in self.journey.factored:
            if f"{PREFIX}{name}.lora_A.weight" not in lora:
                continue
            A, B = (lora[f"{PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
            U, S, Vh = (factors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
            W_E = U @ torch.diag(S) @ Vh
            found[name] = weight_of(merged.get_submodule(name)).double() @ A.T
            wanted[name] = (W_E + scaling * B @ A) @ A.T
            errors[name] = (weight_of(self.journey.model.get_submodule(name)).double() - W_E) @ A.T
        return max(float((found[n] - wanted[n]).norm() / errors[n].norm()) for n in found)

    @cached_property
    def merged(self) -> float:
        """Between the tensors that `merge` wrote, loaded by the base's library, and those that PEFT merges."""
        found = self.journey.family.load(self.journey.merged)
        return distance(state(found), state(self._peft_merged(self.journey.corrected)))

    @cached_property
    def merged_control(self) -> float:
        """The same for the base without the LoRA."""
        return distance(state(self.journey.model), state(self._peft_merged(self.journey.corrected)))

    def _peft_merged(self, adapter: Any) -> Any:
        base = self.journey.family.load(self.journey.base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()


def state(model: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a model."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def adapter_keys(model: Any, targets: str | list[str]) -> Keys | str:
    """The names and shapes of the tensors that PEFT saves of a LoRA, or the message by which it is refused."""
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets))
        return {name: tensor.shape for name, tensor in peft.get_peft_model_state_dict(adapted).items()}
    except (ValueError, NotImplementedError) as error:
        return str(error)
