"""Cross-entropy in chunks of rows is that of all rows at once, and so is its gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from emloc_tools.linalg import cross_entropy
from emloc_tools.linalg.cross_entropy import IGNORED, summed_cross_entropy

BATCH, LENGTH, VOCABULARY = 3, 11, 17


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, of which a third do not count."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(BATCH, LENGTH, generator=generator) < 1 / 3] = IGNORED
    return logits.to(dtype).requires_grad_(), labels


def whole(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The reference: the rows that count, all at once."""
    counted = labels != IGNORED
    return F.cross_entropy(logits[counted], labels[counted], reduction="sum")


@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_value_and_gradient_are_those_of_all_rows_at_once(
    monkeypatch: pytest.MonkeyPatch, rows: int, factor: float
) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS_PER_SOFTMAX", rows)
    logits, labels = problem()
    found, expected = summed_cross_entropy(logits, labels), whole(logits, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    ours, reference = (torch.autograd.grad(factor * loss, logits)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    unmasked = labels.where(labels != IGNORED, 0)
    assert float(summed_cross_entropy(logits, unmasked).detach()) > 1.1 * float(expected.detach()), "the control"


def test_logits_of_any_strides_get_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS_PER_SOFTMAX", 5)
    logits, labels = problem()
    turned = logits.detach().permute(2, 0, 1).contiguous().requires_grad_()
    (ours,) = torch.autograd.grad(summed_cross_entropy(turned.permute(1, 2, 0), labels), turned)
    (reference,) = torch.autograd.grad(whole(logits, labels), logits)
    torch.testing.assert_close(ours, reference.permute(2, 0, 1), rtol=0, atol=1e-12)


def test_narrow_logits_are_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS_PER_SOFTMAX", 4)
    logits, labels = problem(torch.bfloat16)
    found = summed_cross_entropy(logits, labels)
    exact = whole(logits.double(), labels)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    assert float(whole(logits, labels).detach()) != pytest.approx(float(exact.detach()), rel=1e-6), "the control"
    (ours,), (reference,) = torch.autograd.grad(found, logits), torch.autograd.grad(exact, logits)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, reference)  # the reference is rounded to bfloat16 by autograd, too


def test_nothing_that_counts_costs_nothing() -> None:
    logits, labels = problem()
    loss = summed_cross_entropy(logits, torch.full_like(labels, IGNORED))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0
    assert torch.equal(gradient, torch.zeros_like(logits))
