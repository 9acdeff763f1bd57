"""Figures of held-out items and their intervals."""

from __future__ import annotations

import pytest

from atroposlib.teaching.evaluation import Outcome, summary


def test_the_figures_of_a_small_evaluation() -> None:
    outcomes = [
        Outcome(baseline=0, taught=1, teaching_tokens=100, is_complete=True, is_leak=False),
        Outcome(baseline=1, taught=1, teaching_tokens=300, is_complete=True, is_leak=False),
        Outcome(baseline=1, taught=0, teaching_tokens=200, is_complete=False, is_leak=False),
        Outcome(baseline=0, taught=1, teaching_tokens=200, is_complete=True, is_leak=False),
    ]

    metrics = summary(outcomes)

    assert metrics["heldout_size"] == 4
    assert (metrics["baseline_accuracy"], metrics["student_accuracy"], metrics["accuracy_delta"]) == (0.5, 0.75, 0.25)
    assert metrics["non_degradation_rate"] == 0.75
    assert metrics["teaching_tokens"] == 200
    assert metrics["teaching_efficiency_score"] == pytest.approx(0.25 * 0.75 / 0.2)


def test_the_interval_is_that_of_pairs() -> None:
    # Unaided scores vary much, the gain of each item is the same: only a paired interval is narrow.
    outcomes = [Outcome(i % 2, i % 2, 10, is_complete=True, is_leak=False) for i in range(40)]

    metrics = summary(outcomes)

    assert (metrics["accuracy_delta_low"], metrics["accuracy_delta_high"]) == (0.0, 0.0)
    assert metrics["student_accuracy_low"] < 0.5 < metrics["student_accuracy_high"]


def test_the_interval_has_the_width_that_theory_gives() -> None:
    outcomes = [Outcome(0, float(i < 50), 10, is_complete=True, is_leak=False) for i in range(100)]

    metrics = summary(outcomes)

    # 1.96 * sqrt(0.25 / 100)
    half = (metrics["accuracy_delta_high"] - metrics["accuracy_delta_low"]) / 2
    assert half == pytest.approx(0.098, abs=0.012)


def test_an_answer_that_was_given_away_is_no_gain_but_harm_stays_harm() -> None:
    def outcome(baseline: float, taught: float, is_leak: bool) -> Outcome:
        return Outcome(baseline, taught, 10, is_complete=True, is_leak=is_leak)

    metrics = summary([outcome(0, 1, True), outcome(0, 1, False), outcome(1, 0, True), outcome(0, 1, True)])

    assert metrics["leak_rate"] == 0.75
    assert metrics["accuracy_delta"] == 0.5
    assert metrics["heldout_reward"] == 0.0
    assert metrics["heldout_reward_low"] < 0 < metrics["heldout_reward_high"]


def test_the_same_outcomes_give_the_same_figures() -> None:
    outcomes = [Outcome(0, float(i % 3 == 0), 10, is_complete=True, is_leak=False) for i in range(20)]

    assert summary(outcomes) == summary(outcomes)


def test_nothing_was_taught_is_no_division_by_zero() -> None:
    assert summary([Outcome(0, 0, 0, is_complete=True, is_leak=False)])["teaching_efficiency_score"] == 0.0


def test_nothing_held_out_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summary([])
