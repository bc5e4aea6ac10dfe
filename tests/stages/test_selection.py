"""The rule by which a LoRA is chosen, on constructed losses, and the standard error that it asks."""

from __future__ import annotations

import math

import pytest
import torch

from emloc_tools.files.manifest import Candidate
from emloc_tools.models.lora import LoraPair
from emloc_tools.stages.selection import NONE, REFERENCE, Tried, candidates, choose, scaled, standard_error, table


def measured(**losses: float) -> list[Candidate]:
    """Candidates with these losses, named `none`, `trained_050`, …; 0.1 is the standard error of every difference."""
    found = []
    for name, loss in losses.items():
        adapter, _, scale = name.partition("_")
        fields = {"standard_error": 1.0, "standard_error_to_none": 0.1, "standard_error_to_corrected": 0.1}
        found.append(Candidate(adapter=adapter, scale=int(scale or 0) / 100, loss=loss, **fields))  # type: ignore[arg-type]
    return found


def name_of(candidate: Candidate) -> str:
    return f"{candidate.adapter}_{100 * candidate.scale:.0f}"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"none": 3.0, "trained_100": 3.0, "corrected_100": 2.0}, "corrected_100"),
        # lower, but by less than the standard error of the difference: a near-tie
        ({"none": 1.95, "trained_100": 1.92, "corrected_100": 2.0, "corrected_50": 1.91}, "corrected_100"),
        ({"none": 3.0, "trained_100": 3.0, "corrected_100": 2.0, "corrected_50": 1.89}, "corrected_50"),
        (
            {"none": 3.0, "trained_75": 1.80, "trained_100": 1.85, "corrected_100": 2.0, "corrected_50": 1.81},
            "trained_75",
        ),
        # between candidates that both beat the reference the lower loss decides, however near they are
        ({"none": 1.8, "trained_25": 1.7999, "corrected_100": 2.0}, "trained_25"),
        ({"none": 1.7999, "trained_25": 1.8, "corrected_100": 2.0}, "none_0"),
    ],
)
def test_the_corrected_lora_stays_unless_another_is_better_by_more_than_the_standard_error(
    losses: dict[str, float], expected: str
) -> None:
    found = measured(**losses)
    assert name_of(found[choose(found)]) == expected
    assert name_of(found[::-1][choose(found[::-1])]) == expected, "the order of the candidates must not matter"


def test_a_difference_of_just_the_standard_error_is_a_tie() -> None:
    """Dyadic numbers, so that the difference is exact."""
    fields = {"standard_error": 1.0, "standard_error_to_none": 0.0, "standard_error_to_corrected": 0.125}
    reference = Candidate(adapter="corrected", scale=1.0, loss=2.0, **fields)
    for loss, expected in ((1.875, 1), (1.875 - 2**-40, 0)):
        none = Candidate(adapter="none", scale=0.0, loss=loss, **fields)
        assert choose([none, reference]) == expected


def test_at_equal_lengths_the_standard_error_is_that_of_a_mean() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    mean = values.mean()
    textbook = math.sqrt(float(((values - mean) ** 2).sum()) / 3) / math.sqrt(4)
    assert standard_error(5 * values, torch.full((4,), 5)) == pytest.approx(textbook, rel=1e-12)


def test_the_standard_error_is_that_of_a_ratio_of_sums() -> None:
    """By the jackknife, which knows no formula: leave every sample out in turn. To first order in 1/m they agree."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (2000,), generator=generator)
    losses = tokens * (2 + torch.randn(2000, generator=generator, dtype=torch.float64))
    without = (losses.sum() - losses) / (tokens.sum() - tokens)
    jackknife = float((1999 / 2000 * ((without - without.mean()) ** 2).sum()).sqrt())
    found = standard_error(losses, tokens)
    assert found == pytest.approx(jackknife, rel=2e-3)
    # the control: means per sample with equal weight have another standard error
    assert float((losses / tokens).std() / math.sqrt(2000)) != pytest.approx(jackknife, rel=2e-2)


def test_samples_without_a_target_change_nothing() -> None:
    losses, tokens = torch.tensor([3.0, 5.0, 4.0]), torch.tensor([1, 2, 3])
    padded = standard_error(torch.tensor([3.0, 0.0, 5.0, 4.0, 0.0]), torch.tensor([1, 0, 2, 3, 0]))
    assert padded == standard_error(losses, tokens)


def test_pairing_tells_a_difference_that_the_losses_by_themselves_hide() -> None:
    """Hard and easy samples are so for every candidate; paired, a constant gain has no error at all."""
    hard = torch.tensor([10.0, 200.0, 50.0, 1000.0], dtype=torch.float64)
    tokens = torch.tensor([10, 10, 10, 10])
    found = table([NONE, Tried("trained", 1.0), REFERENCE], [hard, hard - 1, hard + 1], tokens)
    assert [each.loss for each in found] == pytest.approx([31.5, 31.4, 31.6])
    assert all(each.standard_error > 20 for each in found)
    assert [each.standard_error_to_none for each in found] == pytest.approx([0, 0, 0], abs=1e-12)
    assert [each.standard_error_to_corrected for each in found] == pytest.approx([0, 0, 0], abs=1e-12)
    assert choose(found) == 1


def test_differences_are_paired_with_the_right_candidate() -> None:
    """Errors against none and against the corrected LoRA, each recomputed from the differences per sample."""
    generator = torch.Generator().manual_seed(1)
    tried = candidates((0.5, 1.0))
    tokens = torch.randint(1, 9, (6,), generator=generator)
    losses = [5 * torch.rand(6, generator=generator, dtype=torch.float64) for _ in tried]
    found = table(tried, losses, tokens)
    assert [(each.adapter, each.scale) for each in found] == [(each.adapter, each.scale) for each in tried]
    none, reference = losses[0], losses[tried.index(REFERENCE)]
    for each, loss in zip(found, losses, strict=True):
        assert each.loss == pytest.approx(float(loss.sum() / tokens.sum()), rel=1e-12)
        assert each.standard_error == pytest.approx(by_hand(loss, tokens), rel=1e-12)
        assert each.standard_error_to_none == pytest.approx(by_hand(loss - none, tokens), rel=1e-12)
        assert each.standard_error_to_corrected == pytest.approx(by_hand(loss - reference, tokens), rel=1e-12)
    assert len({each.standard_error_to_none for each in found}) == len(found)


def by_hand(losses: torch.Tensor, tokens: torch.Tensor) -> float:
    """√(m/(m−1) Σ (l_i − L n_i)²) / Σ n_i in plain Python."""
    pairs = list(zip(losses.tolist(), tokens.tolist(), strict=True))
    total, m = sum(n for _, n in pairs), len(pairs)
    mean = sum(loss for loss, _ in pairs) / total
    return float(math.sqrt(m / (m - 1) * sum((loss - mean * n) ** 2 for loss, n in pairs)) / total)


def test_scaled_pairs_share_their_tensors() -> None:
    pair = LoraPair(torch.ones(2, 3), torch.ones(4, 2), scaling=1.5)
    (found,) = scaled({"layer": pair}, 0.5).values()
    assert found.A is pair.A
    assert found.B is pair.B
    assert found.scaling == 0.75


def test_no_lora_and_both_loras_are_tried_at_every_scale() -> None:
    tried = [(each.adapter, each.scale) for each in candidates()]
    scales = [0.25, 0.5, 0.75, 1.0, 1.25]
    assert tried == [("none", 0.0)] + [(adapter, scale) for adapter in ("trained", "corrected") for scale in scales]
