"""Our divergence and its gradient are TRL's, at every beta.

The values were written by `benchmarks/trl_distillation.py` in TRL's own environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.losses.distillation import generalised_jsd, jsd_scale, topk_jsd

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("trl_jsd.json").read_text(encoding="utf-8"))
STUDENT = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.4, 0.6]], dtype=torch.float64).log()


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['beta']}-{case['temperature']}")
def test_loss_and_gradient_are_trls(case: dict[str, Any]) -> None:
    student = torch.tensor(GOLDEN["student"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(GOLDEN["teacher"], dtype=torch.float64)
    scaled = [(logits / case["temperature"]).log_softmax(-1) for logits in (student, teacher)]

    loss = generalised_jsd(*scaled, beta=case["beta"]).mean()
    loss.backward()

    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    torch.testing.assert_close(student.grad, torch.tensor(case["gradient"], dtype=torch.float64), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 0.017100), (0.5, 0.046201), (0.9, 0.016518)])
def test_golden_values(beta: float, expected: float) -> None:
    assert generalised_jsd(STUDENT, TEACHER, beta=beta).item() == pytest.approx(expected, abs=1e-6)


def test_the_ends_are_the_limits_of_the_divergence_over_its_weight() -> None:
    forward, reverse = (generalised_jsd(STUDENT, TEACHER, beta=beta).item() for beta in (0.0, 1.0))

    assert generalised_jsd(STUDENT, TEACHER, beta=1e-6).item() / 1e-6 == pytest.approx(forward, rel=1e-4)
    assert generalised_jsd(STUDENT, TEACHER, beta=1 - 1e-6).item() / 1e-6 == pytest.approx(reverse, rel=1e-4)
    assert forward == pytest.approx((TEACHER.exp() * (TEACHER - STUDENT)).sum().item())


def test_the_scale_is_one_in_the_middle_and_undoes_the_ends() -> None:
    assert jsd_scale(0.5) == 1.0
    assert generalised_jsd(STUDENT, TEACHER, beta=1e-5).item() * jsd_scale(1e-5) == pytest.approx(
        generalised_jsd(STUDENT, TEACHER, beta=0.0).item() / 4, rel=1e-3
    )
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="no scale"):
            jsd_scale(beta)


def test_all_candidates_of_a_vocabulary_are_the_whole_vocabulary() -> None:
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    student, teacher = logits

    found = topk_jsd(student, teacher, torch.ones_like(student, dtype=torch.bool), beta=0.3)

    torch.testing.assert_close(found, generalised_jsd(student, teacher, beta=0.3), rtol=1e-6, atol=1e-9)


def test_a_beta_that_mixes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        generalised_jsd(STUDENT, TEACHER, beta=1.5)
