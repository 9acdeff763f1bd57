"""Objectives against golden values and hand calculation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.losses.objectives import LOSS_TYPES, LossType, Objective, TokenLosses, token_losses


def losses(
    ratios: list[float],
    advantages: list[float],
    *,
    weights: list[float] | None = None,
    sequences: list[int] | None = None,
    **objective: Any,
) -> TokenLosses:
    """Losses of tokens whose probability has changed by these ratios since the step began, from 1/2."""
    before_M = torch.full((len(ratios),), math.log(0.5))
    return token_losses(
        before_M + torch.tensor(ratios).log(),
        before_M,
        torch.tensor(advantages),
        torch.tensor(weights or [1.0] * len(ratios)),
        torch.tensor(sequences or [0] * len(ratios)),
        Objective(**objective),
    )


def gradient(logprobs_M: Tensor, before_M: Tensor, advantages_M: Tensor, sequence_M: Tensor, kind: LossType) -> Tensor:
    """[M] d(sum of losses) / d logprob."""
    leaf_M = logprobs_M.clone().requires_grad_()
    result = token_losses(
        leaf_M, before_M, advantages_M, torch.ones_like(leaf_M), sequence_M, Objective(loss_type=kind)
    )
    result.losses_M.sum().backward()
    assert leaf_M.grad is not None
    return leaf_M.grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -1.28 * 2.0),  # clipped above
        (0.5, 2.0, -0.5 * 2.0),  # not clipped: the pessimistic side
        (0.5, -2.0, 0.8 * 2.0),  # clipped below
        (1.5, -2.0, 1.5 * 2.0),  # not clipped: the pessimistic side
    ],
)
def test_ppo_clip_takes_the_pessimistic_of_clipped_and_unclipped(
    ratio: float, advantage: float, expected: float
) -> None:
    assert float(losses([ratio], [advantage]).losses_M) == pytest.approx(expected)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_only() -> None:
    result = losses([1.9, 1.9], [-1.0, 1.0], dual_clip_c=1.5)

    assert result.losses_M.tolist() == pytest.approx([1.5, -1.28])


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_on_policy_every_objective_has_the_policy_gradient(kind: LossType) -> None:
    before_M = torch.tensor([-0.5, -1.0, -2.0])
    advantages_M = torch.tensor([1.0, 1.0, -0.5])

    found_M = gradient(before_M, before_M, advantages_M, torch.tensor([0, 0, 1]), kind)

    torch.testing.assert_close(found_M, -advantages_M)


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_the_correction_scales_the_loss(kind: LossType) -> None:
    once, thrice = (losses([1.1], [1.0], weights=[w], loss_type=kind).losses_M for w in (1.0, 3.0))

    torch.testing.assert_close(thrice, 3 * once)


def test_gspo_has_one_ratio_a_sequence_the_geometric_mean() -> None:
    ratios = [math.exp(0.02), math.exp(-0.01), math.exp(0.05), 1.0]

    result = losses(ratios, [1.0] * 4, sequences=[0, 0, 0, 1], loss_type="gspo", epsilon_high=0.1)

    assert result.ratio_M.tolist() == pytest.approx([1.020201, 1.020201, 1.020201, 1.0], abs=1e-6)
    assert result.losses_M.tolist() == pytest.approx([-1.020201, -1.020201, -1.020201, -1.0], abs=1e-6)


def test_gspo_clips_a_sequence_as_a_whole() -> None:
    before_M = torch.log(torch.tensor([0.5, 0.5]))
    now_M = before_M + torch.tensor([0.5, 0.3])

    found_M = gradient(now_M, before_M, torch.ones(2), torch.tensor([0, 0]), "gspo")

    assert found_M.tolist() == [0.0, 0.0]


def test_cispo_caps_the_weight_and_keeps_the_gradient() -> None:
    before_M, now_M = torch.tensor([-4.0, -4.0]), torch.tensor([-1.0, -4.0])

    found_M = gradient(now_M, before_M, torch.ones(2), torch.tensor([0, 0]), "cispo")

    assert found_M.tolist() == pytest.approx([-5.0, -1.0])  # e^3 is over the cap of 5


@pytest.mark.parametrize(
    ("before", "now", "advantage", "is_left_out"),
    [
        (0.5, 0.75, 1.0, True),
        (0.5, 0.65, 1.0, False),
        (0.5, 0.25, -1.0, True),
        (0.5, 0.35, -1.0, False),
        (0.5, 0.25, 1.0, False),  # against its advantage: it may come back
        (0.001, 0.01, 1.0, False),  # ten times as likely, and yet rare
    ],
)
def test_dppo_leaves_out_what_has_moved_far_in_probability(
    before: float, now: float, advantage: float, is_left_out: bool
) -> None:
    found_M = gradient(
        torch.log(torch.tensor([now])),
        torch.log(torch.tensor([before])),
        torch.tensor([advantage]),
        torch.tensor([0]),
        "dppo",
    )

    assert (float(found_M) == 0.0) == is_left_out


def test_clipped_tokens_are_told_by_the_bound_that_clipped_them() -> None:
    result = losses([1.5, 0.5, 1.5, 0.5], [1.0, -1.0, -1.0, 1.0])

    assert result.clipped_high_M.tolist() == [True, False, False, False]
    assert result.clipped_low_M.tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", LOSS_TYPES)
@given(logprobs=st.lists(st.floats(-1e4, 0.0), min_size=1, max_size=6), before=st.floats(-1e4, 0.0), data=st.data())
def test_no_logprob_makes_a_loss_infinite(kind: LossType, logprobs: list[float], before: float, data: Any) -> None:
    count = len(logprobs)
    advantages = data.draw(st.lists(st.floats(-10, 10), min_size=count, max_size=count))
    leaf_M = torch.tensor(logprobs, requires_grad=True)

    result = token_losses(
        leaf_M,
        torch.full((count,), before),
        torch.tensor(advantages),
        torch.ones(count),
        torch.zeros(count, dtype=torch.int64),
        Objective(loss_type=kind),
    )
    result.losses_M.sum().backward()

    assert leaf_M.grad is not None
    assert torch.isfinite(result.losses_M).all()
    assert torch.isfinite(leaf_M.grad).all()
