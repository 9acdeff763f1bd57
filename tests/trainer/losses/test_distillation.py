"""Divergence from a teacher: golden values, its limits, the tail bucket."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atroposlib.wire.layout import PADDING_LOGPROB
from trainer.losses.distillation import topk_jsd

STUDENT = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.4, 0.6]], dtype=torch.float64).log()


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return topk_jsd(student, teacher, teacher > PADDING_LOGPROB / 2, beta=beta)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 0.017100), (0.5, 0.046201), (0.9, 0.016518)])
def test_golden_values_over_a_whole_vocabulary(beta: float, expected: float) -> None:
    assert float(jsd(STUDENT, TEACHER, beta)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.0, (TEACHER, STUDENT)), (1.0, (STUDENT, TEACHER))], ids=["forward", "reverse"]
)
def test_the_ends_are_the_two_kls(beta: float, expected: tuple[Tensor, Tensor]) -> None:
    p, q = expected

    assert float(jsd(STUDENT, TEACHER, beta)) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-9)


def test_what_the_candidates_leave_is_one_bucket() -> None:
    student = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()

    found = jsd(student[:, :2], teacher[:, :2], 0.5)

    assert float(found) == pytest.approx(float(jsd(student, teacher, 0.5)), abs=1e-9)


def test_an_absent_candidate_counts_for_nothing() -> None:
    padded = torch.tensor([[0.0, PADDING_LOGPROB]]).double() + torch.tensor([[-0.5, 0.0]])

    found = jsd(torch.tensor([[-0.7, -0.2]]).double(), padded, 0.5)

    assert float(found) == pytest.approx(float(jsd(torch.tensor([[-0.7]]).double(), padded[:, :1], 0.5)), abs=1e-9)


@given(st.lists(st.floats(-8, 8), min_size=6, max_size=6), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_it_is_zero_for_equals_and_never_negative(logits: list[float], beta: float) -> None:
    table = torch.tensor(logits).double().view(2, 3).log_softmax(-1)
    student, teacher = table[:1, :2], table[1:, :2]

    assert float(jsd(student, student, beta)) == pytest.approx(0.0, abs=1e-9)
    assert float(jsd(student, teacher, beta)) >= -1e-9


def test_the_gradient_draws_the_student_to_the_teacher() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    teacher = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).log()
    for _ in range(300):
        (step,) = torch.autograd.grad(jsd(logits.log_softmax(-1)[:, :2], teacher[:, :2], 0.5).sum(), logits)
        logits = (logits - 2.0 * step).detach().requires_grad_()

    assert logits.softmax(-1)[0, :2].tolist() == pytest.approx([0.7, 0.1], abs=0.02)


def test_beta_is_a_share() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        jsd(STUDENT, TEACHER, 1.5)
