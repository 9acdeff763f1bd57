"""Off-policy weights against hand calculation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.losses.corrections import CORRECTIONS, Correction, CorrectionRule, correction_weights


def weights(ratios: list[float], sequences: list[int], **rule: object) -> list[float]:
    engine_M = torch.full((len(ratios),), -3.0)
    found_M: Tensor = correction_weights(
        engine_M + torch.tensor(ratios).log(),
        engine_M,
        torch.tensor(sequences),
        CorrectionRule(**rule),  # type: ignore[arg-type]
    )
    return found_M.tolist()


def test_tis_caps_each_token() -> None:
    assert weights([0.5, 3.0], [0, 0], is_cap=2.0) == pytest.approx([0.5, 2.0])


def test_mis_gives_no_weight_to_a_token_outside_the_bounds() -> None:
    found = weights([0.4, 0.6, 4.9, 5.1], [0, 0, 0, 0], correction="mis")

    assert found == pytest.approx([0.0, 0.6, 4.9, 0.0], abs=1e-5)


def test_seq_tis_caps_the_product_over_the_sequence() -> None:
    found = weights([1.5, 1.5, 0.9, 0.9], [0, 0, 1, 1], correction="seq_tis", is_cap=2.0)

    assert found == pytest.approx([2.0, 2.0, 0.81, 0.81])


def test_seq_mis_judges_a_sequence_by_its_geometric_mean() -> None:
    found = weights([6.0, 1.0, 0.1, 0.4], [0, 0, 1, 1], correction="seq_mis")

    assert found == pytest.approx([math.sqrt(6.0), math.sqrt(6.0), 0.0, 0.0])


def test_seq_mis_does_not_judge_by_length() -> None:
    short, long = (weights([1.1] * n, [0] * n, correction="seq_mis") for n in (2, 500))

    assert short[0] == pytest.approx(long[0], rel=1e-4)


@pytest.mark.parametrize("correction", ["bypass", "none"])
def test_no_correction_weighs_all_alike(correction: str) -> None:
    assert weights([0.1, 9.0], [0, 0], correction=correction) == [1.0, 1.0]


@pytest.mark.parametrize("correction", CORRECTIONS)
@given(st.lists(st.tuples(st.floats(-1e4, 0.0), st.floats(-1e4, 0.0)), min_size=1, max_size=8))
def test_weights_are_finite_bounded_and_without_gradient(
    correction: Correction, pairs: list[tuple[float, float]]
) -> None:
    rule = CorrectionRule(correction=correction)
    trainer_M = torch.tensor([pair[0] for pair in pairs], requires_grad=True)
    engine_M = torch.tensor([pair[1] for pair in pairs])

    found_M = correction_weights(trainer_M, engine_M, torch.zeros(len(pairs), dtype=torch.int64), rule)

    assert not found_M.requires_grad
    assert bool(((found_M >= 0) & (found_M <= max(rule.is_cap, rule.mis_high))).all())
