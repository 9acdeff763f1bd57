"""Golden values of the advantage scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.batches.advantages import ADVANTAGE_SCALES, AdvantageScale, batch_advantages, group_advantages


@pytest.mark.parametrize(
    ("rewards", "scale", "expected"),
    [
        ([1, 0, 0, 1], "none", [0.5, -0.5, -0.5, 0.5]),
        ([1, 0, 0, 1], "group_std", [0.865875, -0.865875, -0.865875, 0.865875]),
        ([1, 0, 0, 0, 0, 0, 0, 0], "group_std", [2.474174, *[-0.353453] * 7]),
        ([1, 0, 0, 1], "loo", [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
    ],
)
def test_golden_values(rewards: list[float], scale: AdvantageScale, expected: list[float]) -> None:
    advantages = group_advantages(np.array(rewards, dtype=np.float64), scale=scale)

    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_batch_std_divides_by_the_spread_of_the_whole_batch() -> None:
    first, second = batch_advantages([np.array([1.0, 0.0]), np.array([5.0, 5.0])], scale="batch_std")

    # The centred rewards are +-0.5, 0, 0.
    assert first.tolist() == pytest.approx([0.5 / np.sqrt(0.125), -0.5 / np.sqrt(0.125)], rel=1e-5)
    assert second.tolist() == [0.0, 0.0]


def test_one_trajectory_has_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="at least 2 trajectories"):
        group_advantages(np.array([1.0]))


def test_a_group_of_one_in_a_batch_is_no_signal() -> None:
    lone, pair = batch_advantages([np.array([3.0]), np.array([1.0, 0.0])])

    assert lone.tolist() == [0.0]
    assert pair.tolist() == [0.5, -0.5]


@given(
    rewards=st.lists(st.lists(st.floats(-10, 10), min_size=2, max_size=6), min_size=1, max_size=4),
    scale=st.sampled_from(ADVANTAGE_SCALES),
)
def test_advantages_of_a_group_sum_to_zero(rewards: list[list[float]], scale: AdvantageScale) -> None:
    for advantages in batch_advantages([np.array(group) for group in rewards], scale=scale):
        assert advantages.sum() == pytest.approx(0.0, abs=1e-6 * (1 + np.abs(advantages).max()))
