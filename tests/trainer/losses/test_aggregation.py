"""Aggregation against golden values and hand calculation."""

from __future__ import annotations

import pytest
import torch

from trainer.losses.aggregation import loss_weights


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
