"""Ratios of sequences: what they are made of, and what must not count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.losses.corrections import CorrectionRule, correction_weights
from trainer.losses.objectives import Objective, token_losses
from trainer.losses.ratios import sequence_ratio

LOG_RATIOS = st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=6)


def ratio_of(log_ratios: list[float], *, is_sampled: list[bool] | None = None, is_geometric_mean: bool) -> list[float]:
    found_M = sequence_ratio(
        torch.tensor(log_ratios),
        torch.zeros(len(log_ratios)),
        torch.zeros(len(log_ratios), dtype=torch.int64),
        is_geometric_mean=is_geometric_mean,
        is_sampled_M=None if is_sampled is None else torch.tensor(is_sampled),
    )
    return [float(ratio) for ratio in found_M]


def test_the_mean_is_the_golden_one() -> None:
    assert ratio_of([0.02, -0.01, 0.05], is_geometric_mean=True) == pytest.approx([1.020201] * 3, abs=1e-6)
    assert ratio_of([0.02, -0.01, 0.05], is_geometric_mean=False) == pytest.approx([1.061837] * 3, abs=1e-6)


@pytest.mark.parametrize("is_geometric_mean", [True, False])
@given(sampled=LOG_RATIOS, learnt=LOG_RATIOS)
def test_tokens_that_are_learnt_as_they_are_change_no_ratio(
    is_geometric_mean: bool, sampled: list[float], learnt: list[float]
) -> None:
    alone = ratio_of(sampled, is_geometric_mean=is_geometric_mean)

    mixed = ratio_of(
        [*sampled, *learnt],
        is_sampled=[True] * len(sampled) + [False] * len(learnt),
        is_geometric_mean=is_geometric_mean,
    )

    assert mixed[: len(sampled)] == pytest.approx(alone, rel=1e-5)


def test_a_sequence_of_learnt_tokens_alone_has_the_ratio_one() -> None:
    assert ratio_of([1.0, 2.0], is_sampled=[False, False], is_geometric_mean=True) == [1.0, 1.0]


def test_gspo_clips_by_the_sampled_tokens_alone() -> None:
    # The sampled tokens have moved by 0.4, far over the bound; seven learnt ones would hide it.
    log_ratio_M = torch.tensor([0.4] + [0.0] * 7)
    is_sampled_M = torch.tensor([True] + [False] * 7)

    result = token_losses(
        log_ratio_M,
        torch.zeros(8),
        torch.ones(8),
        torch.ones(8),
        torch.zeros(8, dtype=torch.int64),
        Objective("gspo", epsilon_low=0.1, epsilon_high=0.1),
        is_sampled_M=is_sampled_M,
    )

    assert float(result.ratio_M[0]) == pytest.approx(math.exp(0.4))
    assert bool(result.clipped_high_M[0])


def test_seq_mis_masks_by_the_sampled_tokens_alone() -> None:
    log_ratio_M = torch.tensor([2.0] + [0.0] * 7)
    is_sampled_M = torch.tensor([True] + [False] * 7)

    weights_M = correction_weights(
        log_ratio_M,
        torch.zeros(8),
        torch.zeros(8, dtype=torch.int64),
        CorrectionRule("seq_mis"),
        is_sampled_M=is_sampled_M,
    )

    assert float(weights_M[0]) == 0.0
