"""The whole method on every family of models: each test runs for all rows of the table in docs/architectures.md.

All models are tiny and random, and saved and read as real checkpoints. Every bound is a rounding error of the family's
dtype; the same measure of something that is wrong on purpose is far beyond it.
"""

from __future__ import annotations

import pytest
import torch

from tests.architectures.catalogue import BY_NAME
from tests.architectures.measures import ROUNDING, Measures
from tests.architectures.table import PAGE, page, row

FAR = 0.05  # where controls begin; ELECTRA's small weights change its outputs least


def test_grams_are_those_of_the_model_in_memory(measures: Measures) -> None:
    assert measures.grams < ROUNDING[measures.journey.family.dtype]
    assert measures.grams_control > FAR


def test_gradients_are_those_of_autograd_in_memory(measures: Measures) -> None:
    if not measures.journey.has_loss:
        assert measures.gradient_layers == 0
        return
    assert measures.gradient_layers > 0
    assert measures.gradients < ROUNDING[measures.journey.family.dtype]
    assert measures.gradients_control > FAR


def test_an_emulator_at_full_rank_computes_what_the_base_does(measures: Measures) -> None:
    assert measures.outputs < ROUNDING[torch.float32]
    assert measures.outputs_control > 100 * ROUNDING[torch.float32]


def test_emulators_load_through_every_auto_class_that_loads_the_base(measures: Measures) -> None:
    """And make no tensor anew that would have come from the base: only the same heads."""
    assert measures.lacking_in_emulator == measures.lacking
    assert measures.journey.family.model in {name.removeprefix("Emloc") for name in measures.journey.auto_map.values()}


def test_adapters_have_the_same_keys_on_emulator_and_base(measures: Measures) -> None:
    on_base, on_emulator = measures.adapter_keys(measures.journey.targets)
    assert isinstance(on_base, dict)
    assert on_base
    assert on_emulator == on_base


def test_all_linear_means_the_same_on_emulator_and_base(measures: Measures) -> None:
    """Keys, or a refusal: PEFT's own for either, or the emulator's of a LoRA on its experts."""
    on_base, on_emulator = measures.all_linear
    if isinstance(on_base, str):
        assert isinstance(on_emulator, str)
        assert on_emulator.partition("Incompatible modules")[0] == on_base.partition("Incompatible modules")[0]
    elif measures.journey.stacks and any("experts" in key for key in on_base):
        assert isinstance(on_emulator, str)
        assert "the experts of an EMLoC emulator are frozen" in on_emulator
    else:
        assert on_base
        assert on_emulator == on_base


def test_a_corrected_adapter_makes_of_the_base_what_the_trained_one_made_of_the_emulator(measures: Measures) -> None:
    """On the row space of A, where a LoRA acts."""
    assert measures.correction < ROUNDING[torch.float32]
    assert measures.correction_control == pytest.approx(1, rel=1e-3)


def test_merging_gives_what_peft_merges(measures: Measures) -> None:
    assert measures.merged < ROUNDING[measures.journey.family.dtype]
    assert measures.merged_control > FAR


def test_the_table_says_what_was_measured(measures: Measures) -> None:
    assert row(measures) in PAGE.read_text(encoding="utf-8").splitlines(), "run `make architectures`"


def test_the_table_has_a_row_for_each_family_and_nothing_else() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == list(BY_NAME)
    assert text == page(rows), "run `make architectures`"
