"""One family's way through all stages, on files as a user has them. Every step is taken when it is first asked for."""

from __future__ import annotations

import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.merge import merge
from tests.architectures.family import Family

RATIO = 0.5
STEPS = 3


class Journey:
    """The folders that the stages make of a family's model, below `root`."""

    def __init__(self, family: Family, root: Path) -> None:
        self.family, self._root = family, root
        self.batches = family.batches()

    @cached_property
    def base(self) -> Path:
        """The model's checkpoint."""
        self.family.save(self._root / "base")
        return self._root / "base"

    @cached_property
    def model(self) -> Any:
        """The model in memory, as its library loads it."""
        return self.family.load(self.base)

    @property
    def has_loss(self) -> bool:
        """Whether the model computes a loss: from labels among the inputs, or of pairs that it matches."""
        return all("labels" in batch for batch in self.batches) or matches_pairs(self.model)

    def data(self, seed: int) -> Path:
        """A file of ready model inputs."""
        path = self._root / f"inputs-{seed}.safetensors"
        batches = self.family.batches(seed)
        save_file({f"{n}/{name}": value for n, batch in enumerate(batches) for name, value in batch.items()}, path)
        return path

    @cached_property
    def calibration(self) -> Path:
        """A calibration on the batches, with gradients where the model has a loss."""
        return self.calibrate("calibration", seed=0, gradients=self.has_loss)

    def calibrate(self, name: str, *, seed: int, gradients: bool) -> Path:
        """A calibration on the batches of a seed."""
        output = self._root / name
        calibrate(base=str(self.base), data=self.data(seed), output=output, gradients=gradients, device="cpu")
        return output

    @cached_property
    def layers(self) -> list[str]:
        """The linear layers that the calibration reached."""
        return list(read_json(self.calibration / "calibration.json")["layers"])

    @cached_property
    def whole(self) -> Path:
        """An emulator in float32 at full rank."""
        ranks = {name: min(self.model.get_submodule(name).weight.shape) for name in self.layers}
        return self._build("whole", ranks=ranks, dtype="float32")

    @cached_property
    def emulator(self) -> Path:
        """An emulator that keeps half of the layers' values."""
        return self._build("emulator", ratio=RATIO)

    def _build(self, name: str, **options: Any) -> Path:
        output = self._root / name
        build_emulator(base=str(self.base), calibration=self.calibration, output=output, **options)
        return output

    @cached_property
    def auto_map(self) -> dict[str, str]:
        """The class in the emulator's folder that each Auto class gives."""
        mapped = read_json(self.emulator / "config.json")["auto_map"]
        return {auto: reference.rpartition(".")[2] for auto, reference in mapped.items()}

    @property
    def own_auto_class(self) -> str:
        """The Auto class that gives the emulator of the base's own class."""
        return next(auto for auto, name in self.auto_map.items() if name == f"Emloc{self.family.model}")

    def load(self, emulator: Path, **options: Any) -> Any:
        """An emulator by the code in its folder."""
        return self.family.load_by(self.own_auto_class, emulator, **options)[0]

    @cached_property
    def factored(self) -> list[str]:
        """The linear layers that the emulator holds as factors."""
        return list(read_json(self.emulator / "emulator.json")["layers"])

    @cached_property
    def stacks(self) -> list[str]:
        """The stacks of experts that the emulator holds as factors."""
        return list(read_json(self.emulator / "emulator.json").get("experts", {}))

    @cached_property
    def targets(self) -> list[str]:
        """The ends of names by which a LoRA targets factored layers, and nothing that is none, such as q_proj."""
        others = [name for name, _ in self.model.named_modules() if name not in self.factored]
        forbidden = self.family.no_lora
        found = set()
        for name in self.factored:
            parts = name.split(".")
            ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
            end = next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))
            found |= {end} if parts[-1] not in forbidden else set()
        return sorted(found)

    @cached_property
    def adapter(self) -> Path:
        """A LoRA that was trained on the emulator for a few steps, on all kinds of factored layers."""
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=self.targets)
        adapted = peft.get_peft_model(self.load(self.emulator), settings)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(STEPS):
            for batch in self.batches:
                objective(adapted(**batch)).backward()
                optimizer.step()
                optimizer.zero_grad()
        adapted.save_pretrained(self._root / "adapter")
        return self._root / "adapter"

    @cached_property
    def corrected(self) -> Path:
        """The LoRA for the base."""
        output = self._root / "corrected"
        correct(emulator=self.emulator, adapter=self.adapter, base=str(self.base), clamp=None, output=output)
        return output

    @cached_property
    def merged(self) -> Path:
        """The base with the corrected LoRA in its weights."""
        merge(base=str(self.base), adapter=self.corrected, output=self._root / "merged")
        return self._root / "merged"


def matches_pairs(model: Any) -> bool:
    """Whether a model has a loss for images and texts that belong together."""
    return "return_loss" in inspect.signature(model.forward).parameters


def objective(output: Any) -> torch.Tensor:
    """The model's own loss; else the mean square of what it computes."""
    if output.get("loss") is not None:
        return output["loss"]
    return torch.stack([tensor.float().square().mean() for tensor in floats(output)]).sum()


def floats(output: Any) -> list[torch.Tensor]:
    """All floating-point tensors in a model's output, nested ones too."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in floats(value)]


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files in a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
