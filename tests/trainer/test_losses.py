"""Objectives, correction and aggregation against golden values and hand calculation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.losses import loss_weights, token_losses, truncated_importance_weights


def ones_like(values: list[float]) -> Tensor:
    return torch.ones(len(values))


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("sequence_mean", 0.0), ("token_mean", 0.8), ("constant", 0.4), ("prompt_mean", 0.8)]
)
def test_aggregation_weighs_long_and_short_sequences_as_its_name_says(aggregation: str, expected: float) -> None:
    lengths_N, advantages_N = torch.tensor([10, 90]), torch.tensor([1.0, -1.0], dtype=torch.float64)

    weights_N = loss_weights(
        lengths_N,
        torch.tensor([0, 0]),
        aggregation=aggregation,  # type: ignore[arg-type]
        max_completion_length=100 if aggregation == "constant" else None,
    )

    # With a ratio of 1 the loss of a token is minus its advantage.
    assert float((-advantages_N * lengths_N * weights_N).sum()) == pytest.approx(expected)


def test_prompt_mean_gives_every_group_the_same_weight() -> None:
    weights_N = loss_weights(torch.tensor([10, 30, 5]), torch.tensor([0, 0, 1]), aggregation="prompt_mean")

    assert weights_N.tolist() == pytest.approx([0.5 / 40, 0.5 / 40, 0.5 / 5])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean"])
def test_a_batch_with_nothing_to_train_has_finite_weights(aggregation: str) -> None:
    weights_N = loss_weights(torch.tensor([0, 0]), torch.tensor([0, 1]), aggregation=aggregation)  # type: ignore[arg-type]

    assert torch.isfinite(weights_N).all()


def test_constant_needs_a_length() -> None:
    with pytest.raises(ValueError, match="max_completion_length"):
        loss_weights(torch.tensor([1]), torch.tensor([0]), aggregation="constant")


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -1.28 * 2.0),  # clipped above
        (0.5, 2.0, -0.5 * 2.0),  # not clipped: the pessimistic side
        (0.5, -2.0, 0.8 * 2.0),  # clipped below
        (1.5, -2.0, 1.5 * 2.0),
    ],
)
def test_ppo_clip_takes_the_pessimistic_of_clipped_and_unclipped(
    ratio: float, advantage: float, expected: float
) -> None:
    loss = token_losses(
        torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), torch.ones(1), loss_type="ppo_clip"
    )

    assert loss.item() == pytest.approx(expected)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_only() -> None:
    loss = token_losses(
        torch.log(torch.tensor([10.0, 10.0])), torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.ones(2), dual_clip_c=3.0
    )

    assert loss.tolist() == pytest.approx([3.0, -1.28])


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_on_policy_gradient_is_the_policy_gradient(loss_type: str) -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages, weights = torch.tensor([0.5, -1.5]), torch.tensor([1.0, 0.25])

    token_losses(logprobs, logprobs.detach(), advantages, weights, loss_type=loss_type).sum().backward()  # type: ignore[arg-type]

    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx((-advantages * weights).tolist())


def test_importance_weights_are_capped_and_carry_no_gradient() -> None:
    proximal = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)

    weights = truncated_importance_weights(proximal, torch.tensor([-1.0, -3.0, -0.5]), cap=2.0)

    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5)])
    assert not weights.requires_grad


def test_an_impossible_token_does_not_overflow() -> None:
    weights = truncated_importance_weights(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), cap=1e12)
    losses = token_losses(torch.tensor([1e4]), torch.zeros(1), torch.ones(1), torch.ones(1))

    assert weights.tolist() == pytest.approx([math.exp(20), math.exp(-20)])
    assert torch.isfinite(losses).all()
