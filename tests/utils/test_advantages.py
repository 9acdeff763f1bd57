"""Advantages are what plain loops over the formula give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.utils.advantages import (
    allclose_to_first,
    compute_discounted_returns,
    compute_grpo_process_supervision_advantages,
    compute_stats,
)

FINITE = st.floats(-100, 100)
GROUPS = st.lists(st.lists(FINITE, max_size=5), min_size=1, max_size=5)


@given(rewards=st.lists(FINITE, max_size=8), gamma=st.floats(0, 1))
def test_discounted_returns_are_sums_over_the_steps_to_come(rewards: list[float], gamma: float) -> None:
    returns = compute_discounted_returns(np.array(rewards), gamma)

    plain = [sum(r * gamma**k for k, r in enumerate(rewards[step:])) for step in range(len(rewards))]
    assert returns.tolist() == pytest.approx(plain, rel=1e-9, abs=1e-9)


@given(data=GROUPS)
def test_stats_count_every_number_once(data: list[list[float]]) -> None:
    flat = [value for row in data for value in row]
    if not flat:
        with pytest.raises(ValueError, match="at least one number"):
            compute_stats(data)
        return
    mean = math.fsum(flat) / len(flat)

    stats = compute_stats(data)

    assert stats["mean"] == pytest.approx(mean, abs=1e-9)
    assert stats["var"] == pytest.approx(math.fsum((v - mean) ** 2 for v in flat) / len(flat), rel=1e-6, abs=1e-9)


def test_stats_reach_into_any_depth() -> None:
    assert compute_stats([1, [2, [3]], np.array([2.0, 2.0])]) == {"mean": 2.0, "var": pytest.approx(0.4)}


@given(rewards=GROUPS, gamma=st.none() | st.floats(0, 1))
def test_process_advantages_sum_the_normalised_rewards_to_come(rewards: list[list[float]], gamma: float | None) -> None:
    flat = [value for row in rewards for value in row]
    if not flat or np.std(flat) < 1e-8:
        with pytest.raises(ValueError, match=r"at least one number|are equal"):
            compute_grpo_process_supervision_advantages(rewards, gamma)
        return
    mean, std = np.mean(flat), np.std(flat)

    advantages = compute_grpo_process_supervision_advantages(rewards, gamma)

    decay = 1.0 if gamma is None else gamma
    for row, advantage in zip(rewards, advantages, strict=True):
        steps = [(value - mean) / std for value in row]
        plain = [sum(s * decay**k for k, s in enumerate(steps[i:])) for i in range(len(steps))]
        assert advantage.tolist() == pytest.approx(plain, rel=1e-6, abs=1e-6)


def test_the_spread_that_counts_as_none_can_be_chosen() -> None:
    assert len(compute_grpo_process_supervision_advantages([[0.0], [1e-3]])) == 2
    with pytest.raises(ValueError, match=r"std_tol=0\.01"):
        compute_grpo_process_supervision_advantages([[0.0], [1e-3]], std_tol=0.01)


def test_all_close_is_measured_against_the_first() -> None:
    assert allclose_to_first([1.0, 1.0 + 1e-9]) is True
    assert allclose_to_first([1.0, 1.1]) is False
    assert allclose_to_first([1.0, 1.1], atol=0.2) is True
    assert allclose_to_first([np.nan, np.nan]) is False
    assert allclose_to_first([np.nan, np.nan], equal_nan=True) is True
    assert allclose_to_first([]) is True


def test_each_entry_can_be_answered_for() -> None:
    by_number = allclose_to_first([1.0, 2.0, 1.0], return_vector=True)
    by_row = allclose_to_first([[1.0, 2.0], [1.0, 3.0]], return_vector=True)

    assert np.asarray(by_number).tolist() == [True, False, True]
    assert np.asarray(by_row).tolist() == [True, False]
