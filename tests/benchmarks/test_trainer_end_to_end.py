"""How two training curves are compared."""

from __future__ import annotations

import pytest

from benchmarks.trainer_end_to_end import Outcome, highest_common, smoothed


def test_a_curve_is_the_mean_of_the_last_steps() -> None:
    steps = [(10.0, 0.0), (20.0, 0.3), (30.0, 0.6), (40.0, 0.9)]

    curve = smoothed(steps, width=3)

    assert [seconds for seconds, _ in curve] == [30.0, 40.0]
    assert [reward for _, reward in curve] == pytest.approx([0.3, 0.6])


def test_a_level_is_reached_the_first_time() -> None:
    outcome = Outcome(warm_up_s=0.0, steps=3, curve=[(10.0, 0.2), (20.0, 0.5), (30.0, 0.4)])

    assert [outcome.reached(reward) for reward in (0.2, 0.45, 0.6)] == [10.0, 20.0, None]
    assert [outcome.at(seconds) for seconds in (5.0, 10.0, 25.0, 99.0)] == [None, 0.2, 0.5, 0.4]


def test_rewards_are_compared_where_both_have_been() -> None:
    fast, slow = (Outcome(0.0, 1, [(1.0, reward)]) for reward in (0.61, 0.357))

    assert highest_common([fast, slow]) == pytest.approx(0.35)
    assert slow.reached(highest_common([fast, slow])) == 1.0
    exact = [Outcome(0.0, 1, [(1.0, 0.41)])]
    assert exact[0].reached(highest_common(exact)) == 1.0
    assert highest_common([fast, Outcome(0.0, 0, [])]) == 0.0
