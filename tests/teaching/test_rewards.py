"""What a guidance is paid: golden values, bounds, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.teaching.rewards import after_leak, compute_teaching_reward, outcome_reward, without_rounding

SCORES = st.floats(0, 1)
LENGTHS = st.integers(0, 10_000)


@pytest.mark.parametrize(
    ("mode", "baseline", "enhanced", "length", "expected"),
    [
        ("asymmetric", 0.6, 0.8, 120, 0.290909),
        ("asymmetric", 0.8, 0.6, 120, -0.4),
        ("asymmetric", 0.0, 1.0, 0, 2.0),
        ("asymmetric", 1.0, 1.0, 0, 0.0),
        ("additive", 0.6, 0.8, 120, 0.6),
        ("additive", 0.5, 0.5, 0, 1.0),
        ("additive", 0.8, 0.6, 200, -2.2),
    ],
)
def test_the_golden_values(mode: Any, baseline: float, enhanced: float, length: float, expected: float) -> None:
    assert compute_teaching_reward(baseline, enhanced, length, mode=mode) == pytest.approx(expected, abs=1e-6)


@given(baseline=SCORES, enhanced=SCORES, length=LENGTHS)
def test_asymmetric_rewards_stay_within_their_bounds(baseline: float, enhanced: float, length: int) -> None:
    reward = compute_teaching_reward(
        baseline, enhanced, length, degradation_penalty_multiplier=3.0, efficiency_weight=0.5
    )

    assert -3.0 <= reward <= 1.5
    assert math.copysign(1, reward) == math.copysign(1, enhanced - baseline) or reward == 0


@given(baseline=SCORES, enhanced=SCORES, length=LENGTHS)
def test_a_longer_teaching_never_pays_more(baseline: float, enhanced: float, length: int) -> None:
    short, long = (
        compute_teaching_reward(baseline, enhanced, tokens, silence_bonus=0.5) for tokens in (length, length + 50)
    )

    assert long <= short + 1e-12


def test_silence_pays_where_the_student_is_right_anyway_and_only_there() -> None:
    paid = {scores: compute_teaching_reward(*scores, 0, silence_bonus=0.25) for scores in [(1.0, 1.0), (0.0, 0.0)]}

    assert paid == {(1.0, 1.0): 0.25, (0.0, 0.0): 0.0}
    assert compute_teaching_reward(1.0, 0.0, 0, silence_bonus=0.25) == -2.0


@pytest.mark.parametrize(
    "arguments",
    [
        ("1", 0.5, 1),
        (0.5, None, 1),
        (True, 0.5, 1),
        (0.5, 0.5, "1"),
        (0.5, 0.5, False),
        (0.5, np.bool_(True), 1),
        (0.5j, 0.5, 1),
    ],
)
def test_what_is_no_number_is_a_type_error(arguments: Any) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        compute_teaching_reward(*arguments)


@pytest.mark.parametrize(
    "arguments", [(np.float32(0.6), np.float64(0.8), np.int64(120)), (0.6, np.float32(0.8), np.int8(120))]
)
@pytest.mark.parametrize(("mode", "expected"), [("asymmetric", 0.290909), ("additive", 0.6)])
def test_numbers_of_numpy_are_numbers(arguments: Any, mode: Any, expected: float) -> None:
    reward = compute_teaching_reward(*arguments, mode=mode)

    assert type(reward) is float
    assert reward == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "arguments", [(-0.1, 0.5, 1), (0.5, 1.1, 1), (0.5, 0.5, -1), (math.nan, 0.5, 1), (0.5, 0.5, math.nan)]
)
def test_an_impossible_number_is_a_value_error(arguments: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        compute_teaching_reward(*arguments)


def test_types_are_looked_at_before_values() -> None:
    with pytest.raises(TypeError):
        compute_teaching_reward(7.0, "x", -1)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["outcome", "rim"])
def test_modes_that_need_more_than_scores_say_so(mode: Any) -> None:
    with pytest.raises(ValueError, match=f"teaching_reward_mode={mode}"):
        compute_teaching_reward(0.5, 0.5, 1, mode=mode)


@pytest.mark.parametrize(
    ("baseline", "enhanced", "lengths", "expected"),
    [(0, 1, (10, 6), 1.4), (1, 1, (10, 6), 0.4), (1, 0, (10, 6), -1.0), (0, 0, (10, 6), 0.0), (0, 1, (0, 6), 1.0)],
)
def test_outcome_pays_by_right_and_wrong(
    baseline: float, enhanced: float, lengths: tuple[float, float], expected: float
) -> None:
    paid = outcome_reward(baseline, enhanced, baseline_length=lengths[0], enhanced_length=lengths[1])

    assert paid == pytest.approx(expected)


@pytest.mark.parametrize(("policy", "expected"), [("zero", (0.0, -2.0)), ("cap", (0.3, -2.0)), ("off", (1.5, -2.0))])
def test_a_leak_takes_a_reward_and_no_penalty(policy: Any, expected: tuple[float, float]) -> None:
    assert tuple(after_leak(reward, policy=policy, cap=0.3) for reward in (1.5, -2.0)) == expected


def test_rewards_that_differ_by_rounding_are_one_reward() -> None:
    assert without_rounding([0.3, 0.1 + 0.2, 0.3]) == [0.3, 0.3, 0.3]
    assert without_rounding([0.3, 0.31]) == [0.3, 0.31]
    assert without_rounding([]) == []
