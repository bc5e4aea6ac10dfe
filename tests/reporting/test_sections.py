"""What a report says in words: what a LoRA is worth to the base, and when it is worth nothing."""

from __future__ import annotations

import pytest

from emloc_tools.reporting.losses import Loss, Losses
from emloc_tools.reporting.sections import verdict

BASE, BOUND = Loss("base", "base", 5.0), Loss("base, LoRA trained on it", "upper bound", 3.0)
EMULATOR = Loss("emulator", "emulator", 1.0)  # says nothing of the base
RAW, CORRECTED = Loss("raw", "uncorrected", 4.0), Loss("mended", "corrected", 3.5)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [BASE, BOUND, EMULATOR, RAW, CORRECTED],
            "The best of the LoRAs (mended) brings the base from 5.0000 to 3.5000, 75% of what a LoRA trained on the "
            "base itself gains.",
        ),
        ([BASE, RAW], "The best of the LoRAs (raw) brings the base from 5.0000 to 4.0000."),
        (
            [BASE, Loss("base, LoRA trained on it", "upper bound", 5.5), RAW],  # it gains nothing to be a part of
            "The best of the LoRAs (raw) brings the base from 5.0000 to 4.0000.",
        ),
        (
            [BASE, BOUND, Loss("raw", "uncorrected", 5.5), Loss("mended", "corrected", 5.25)],
            "The base is better without any of these LoRAs: 5.0000, and 5.2500 with mended.",
        ),
    ],
)
def test_the_losses_are_put_into_a_sentence(rows: list[Loss], sentence: str) -> None:
    assert verdict(Losses("x", rows)) == [sentence]


@pytest.mark.parametrize("rows", [[BASE, EMULATOR], [RAW, CORRECTED]])
def test_without_a_base_or_a_lora_there_is_nothing_to_say(rows: list[Loss]) -> None:
    assert verdict(Losses("x", rows)) == []
