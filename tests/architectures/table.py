"""Write docs/architectures.md from what the matrix measures of every family.

    python -m tests.architectures.table

A test fails while a row of the page differs from what is measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.architectures.catalogue import FAMILIES
from tests.architectures.family import Family
from tests.architectures.journey import Journey
from tests.architectures.measures import ROUNDING, Measures

PAGE = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
COLUMNS = (
    *("family", "model class", "inputs", "linear layers", "gradients"),
    *("Auto classes", "`all-linear`", "LoRA", "notes"),
)
INTRODUCTION = """# Architectures

Nothing in emloc-tools is written for one model: blocks, names on disk and linear layers are found in the model class
that `transformers` or `diffusers` has for `config.json`. Each row below is a family that a test takes through the whole
method, as a tiny model with random weights that is saved and read as a real checkpoint. `make architectures` writes
this page from what the test measures, and the test fails while a row says anything else.

For every family the Grams of `calibrate` equal those of the model in memory, an emulator at full rank computes what the
base does, and a LoRA that targets factored layers by name has the same keys on the emulator as on the base. Bases are
in float32, or where the notes say so in bfloat16 or in several files.

- **linear layers**: how many become factors by default, of how many there are; stacks of fused experts are counted
  apart. `emloc-tools inspect` lists for any base what stays dense, and why.
- **gradients**: `exact` where the second moments of `calibrate --gradients` equal those of autograd in memory; `no
  loss` where the class computes none from its inputs.
- **Auto classes**: those of `AutoModel…` through which the emulator loads, which are those that find the base's blocks.
  A head that the checkpoint lacks is new, as it is for the base.
- **`all-linear`**: whether PEFT's `target_modules="all-linear"` has the same keys on the emulator as on the base. The
  emulator refuses it where it reaches experts, which take no LoRA; PEFT refuses it for some models, whatever they are.
- **LoRA**: `exact` where a LoRA that was trained on the emulator and corrected makes of the base, on the row space of
  A, what it made of the emulator, and `merge` gives what PEFT merges.

"""


def row(measures: Measures) -> str:
    """The line of a family in the table."""
    journey, family = measures.journey, measures.journey.family
    linears = sum(isinstance(module, (nn.Linear, Conv1D)) for module in journey.model.modules())
    stacks = f", {len(journey.stacks)} stacks of experts" if journey.stacks else ""
    exact = measures.gradients < ROUNDING[family.dtype] if journey.has_loss else None
    same = measures.correction < ROUNDING[torch.float32] and measures.merged < ROUNDING[family.dtype]
    cells = (
        family.name,
        f"`{family.model}`",
        family.modality,
        f"{len(journey.factored)} of {linears}{stacks}",
        {True: "exact", False: "differ", None: "no loss"}[exact],
        ", ".join(auto.removeprefix("AutoModel") or "AutoModel" for auto in sorted(journey.auto_map)),
        _all_linear(*measures.all_linear),
        "exact" if same else "differs",
        "; ".join(filter(None, [_stored(family), family.notes])),
    )
    return f"| {' | '.join(cells)} |"


def _stored(family: Family) -> str:
    return ", ".join(["bfloat16"] * (family.dtype == torch.bfloat16) + ["in several files"] * family.sharded)


def _all_linear(on_base: object, on_emulator: object) -> str:
    if isinstance(on_emulator, str):
        return "PEFT refuses it" if isinstance(on_base, str) else "refused: experts are frozen"
    return "same" if on_emulator == on_base else "differ"


def page(rows: list[str]) -> str:
    """The page with these rows."""
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return INTRODUCTION + "\n".join([*head, *rows]) + "\n"


def main() -> None:
    """Measure every family and write the page."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(Measures(Journey(family, Path(folder)))))
        print(rows[-1], flush=True)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
