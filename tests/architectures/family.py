"""What the matrix knows of a family of models: a tiny configuration, its class, and inputs that the model runs on.

A new family is one entry in one of the catalogues beside this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

Inputs = dict[str, torch.Tensor]

VOCABULARY = 96
SPECIAL = 8  # token ids below are special in one family or another
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE: Mapping[str, Any] = {"image_size": 32, "patch_size": 8}  # 16 patches


@dataclass(frozen=True)
class Family:
    """One row of the matrix.

    `config()` makes the configuration of the class `model`; `inputs(draw)` the batches of ready model inputs, with
    labels where the model has a loss. `spread` multiplies the usual random weights, with which attention would be
    nearly uniform. PEFT refuses LoRAs on layers named in `no_lora`. `notes` go into the table.
    """

    name: str
    model: str
    modality: str
    config: Callable[[], Any]
    inputs: Callable[[Draw], list[Inputs]]
    dtype: torch.dtype = torch.float32
    sharded: bool = False
    spread: float = 3.0
    no_lora: tuple[str, ...] = ()
    notes: str = ""

    def make(self) -> Any:
        """A model with random weights that differ from their defaults everywhere, in evaluation mode."""
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(self.config())
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
                elif name == "weight" and isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)):
                    parameter.data *= self.spread
        model = model.to(self.dtype).eval()
        model.config.dtype = self.dtype
        return model

    def save(self, folder: Path) -> None:
        """Save a new model as a checkpoint."""
        self.make().save_pretrained(folder, max_shard_size="20KB" if self.sharded else "1GB")

    def load(self, folder: Path, **options: Any) -> Any:
        """The model in memory, as its library loads it."""
        return getattr(transformers, self.model).from_pretrained(folder, **options).eval()

    def auto_classes(self, folder: Path) -> list[str]:
        """The Auto classes of its library that know the configuration of a model in a folder."""
        kind = type(transformers.AutoConfig.from_pretrained(folder))
        return [name for name in auto_classes() if kind in getattr(transformers, name)._model_mapping]

    def load_by(self, auto_class: str, folder: Path, **options: Any) -> tuple[Any, set[str]]:
        """A model as a trainer loads it, by code in its folder if there is any, and the tensors that it did not find.

        Raises `ValueError` where the class wants more files than a checkpoint has.
        """
        model, info = getattr(transformers, auto_class).from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, **options
        )
        return model.eval(), set(info["missing_keys"])

    def batches(self, seed: int = 0) -> list[Inputs]:
        """Its inputs; another seed gives others of the same kind."""
        return self.inputs(Draw(seed, self.dtype))


@functools.cache  # transformers takes half a second to list its names
def auto_classes() -> list[str]:
    """All Auto classes of models."""
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    return [name for name in names if getattr(getattr(transformers, name), "_model_mapping", None) is not None]


class Draw:
    """Random model inputs from a seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator, self._dtype = torch.Generator().manual_seed(seed), dtype

    def ids(self, rows: int, length: int) -> torch.Tensor:
        """Token ids."""
        return torch.randint(SPECIAL, VOCABULARY, (rows, length), generator=self._generator)

    def classes(self, rows: int, count: int = 2) -> torch.Tensor:
        """Class numbers."""
        return torch.randint(count, (rows,), generator=self._generator)

    def values(self, *shape: int) -> torch.Tensor:
        """Numbers in the model's dtype, such as pixels."""
        return torch.randn(shape, generator=self._generator).to(self._dtype)


def padded(inputs: Inputs, row: int, positions: slice) -> Inputs:
    """Inputs with padding at some positions of a row, which labels leave out."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[row, positions] = 0
    labels = {"labels": inputs["labels"].masked_fill(mask == 0, -100)} if "labels" in inputs else {}
    return {**inputs, "attention_mask": mask, **labels}


def texts(draw: Draw) -> list[Inputs]:
    """Three batches for a model that predicts tokens; the second is padded on the right."""
    batches = [{"input_ids": ids, "labels": ids.clone()} for ids in (draw.ids(3, 11), draw.ids(2, 9), draw.ids(2, 14))]
    batches[1] = padded(batches[1], 0, slice(-4, None))
    return batches


def configured(name: str, **changes: Any) -> Callable[[], Any]:
    """Makes a configuration class of transformers with the usual small sizes and what else a family needs."""
    return lambda: getattr(transformers, name)(**{**SIZES, **changes})
