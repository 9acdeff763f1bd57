"""Figures of held-out items and their intervals."""

from __future__ import annotations

import pytest

from atroposlib.teaching.evaluation import Outcome, summary


def test_the_figures_of_a_small_evaluation() -> None:
    outcomes = [
        Outcome(baseline=0, taught=1, teaching_tokens=100, is_complete=True),
        Outcome(baseline=1, taught=1, teaching_tokens=300, is_complete=True),
        Outcome(baseline=1, taught=0, teaching_tokens=200, is_complete=False),
        Outcome(baseline=0, taught=1, teaching_tokens=200, is_complete=True),
    ]

    metrics = summary(outcomes)

    assert metrics["heldout_size"] == 4
    assert (metrics["baseline_accuracy"], metrics["student_accuracy"], metrics["accuracy_delta"]) == (0.5, 0.75, 0.25)
    assert metrics["non_degradation_rate"] == 0.75
    assert metrics["teaching_tokens"] == 200
    assert metrics["teaching_efficiency_score"] == pytest.approx(0.25 * 0.75 / 0.2)


def test_the_interval_is_that_of_pairs() -> None:
    # Unaided scores vary much, the gain of each item is the same: only a paired interval is narrow.
    outcomes = [Outcome(baseline=i % 2, taught=i % 2, teaching_tokens=10, is_complete=True) for i in range(40)]

    metrics = summary(outcomes)

    assert (metrics["accuracy_delta_low"], metrics["accuracy_delta_high"]) == (0.0, 0.0)
    assert metrics["student_accuracy_low"] < 0.5 < metrics["student_accuracy_high"]


def test_the_interval_has_the_width_that_theory_gives() -> None:
    outcomes = [Outcome(0, float(i < 50), 10, True) for i in range(100)]

    metrics = summary(outcomes)

    # 1.96 * sqrt(0.25 / 100)
    half = (metrics["accuracy_delta_high"] - metrics["accuracy_delta_low"]) / 2
    assert half == pytest.approx(0.098, abs=0.012)


def test_the_same_outcomes_give_the_same_figures() -> None:
    outcomes = [Outcome(0, float(i % 3 == 0), 10, True) for i in range(20)]

    assert summary(outcomes) == summary(outcomes)


def test_nothing_was_taught_is_no_division_by_zero() -> None:
    assert summary([Outcome(0, 0, 0, True)])["teaching_efficiency_score"] == 0.0


def test_nothing_held_out_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summary([])
