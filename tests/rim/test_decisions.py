"""Tiering, consistency rules and the mean: pure decisions, with the values that are written down for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.rim.config import ALL_JUDGES, ConsistencyRules
from atroposlib.rim.scoring import consistent, weighted_mean
from atroposlib.rim.tiering import Escalate, Pick, decide
from atroposlib.rim.verdict import Verdict

SCORES = st.dictionaries(st.sampled_from(ALL_JUDGES), st.floats(0, 1))


def decided(*pairs: tuple[float, float]) -> Pick | Escalate:
    verdicts = [Verdict(score, uncertainty) for score, uncertainty in pairs]
    return decide(verdicts, variance_threshold=0.15, uncertainty_threshold=0.3)


def test_scores_that_agree_well_enough_stand() -> None:
    assert isinstance(decided((0.9, 0.1), (0.6, 0.1), (0.8, 0.1)), Pick)  # standard deviation 0.1247


def test_scores_that_differ_go_to_the_large_model() -> None:
    decision = decided((0.95, 0.1), (0.5, 0.1), (0.8, 0.1))

    assert decision == Escalate("tier1_scores_differ: standard deviation 0.1871 > 0.15")


def test_the_least_uncertain_verdict_is_taken_whole_and_not_the_mean() -> None:
    decision = decided((0.9, 0.2), (0.85, 0.05), (0.8, 0.1))

    assert decision == Pick(Verdict(0.85, 0.05))


def test_of_equally_uncertain_verdicts_the_first_is_taken() -> None:
    assert decided((0.8, 0.1), (0.9, 0.1)) == Pick(Verdict(0.8, 0.1))


def test_one_uncertain_verdict_is_enough_to_escalate() -> None:
    assert decided((0.8, 0.0), (0.8, 0.4)) == Escalate("tier1_uncertain: 0.4 > 0.3")


def test_the_thresholds_themselves_are_allowed() -> None:
    assert isinstance(decided((0.5, 0.3), (0.8, 0.3)), Pick)  # standard deviation 0.15


def test_nothing_valid_goes_to_the_large_model() -> None:
    assert decided() == Escalate("tier1_no_valid_samples")


def test_the_rules_in_their_order() -> None:
    scores = {"accuracy": 0.4, "helpfulness": 0.9, "process": 0.9, "diagnostic": 0.5}

    left, changes = consistent(scores, ConsistencyRules())

    assert left == {"accuracy": 0.4, "helpfulness": 0.6, "process": 0.5, "diagnostic": 0.5}
    assert [str(change) for change in changes] == [
        "[lowered from 0.9 to 0.5: process may exceed accuracy by at most 0.1]",
        "[lowered from 0.9 to 0.6: helpfulness may exceed diagnostic by at most 0.1]",
    ]


def test_a_later_rule_sees_what_an_earlier_one_left() -> None:
    scores = {"accuracy": 0.2, "process": 0.9, "helpfulness": 0.9}
    before = ("alignment_completeness_bound", "completeness_helpfulness_threshold")

    in_order, _ = consistent(scores, ConsistencyRules.model_validate({"order": before}))
    reversed_, _ = consistent(scores, ConsistencyRules.model_validate({"order": before[::-1]}))

    assert in_order["helpfulness"] == 0.5
    assert reversed_["helpfulness"] == 0.9


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"alignment_completeness_bound": 0.3}, 0.7),
        ({"alignment_completeness_bound": None}, 0.9),
        ({"order": ()}, 0.9),
    ],
)
def test_a_rule_can_be_changed_or_switched_off(rules: dict[str, object], expected: float) -> None:
    left, _ = consistent({"accuracy": 0.4, "process": 0.9}, ConsistencyRules.model_validate(rules))

    assert left["process"] == pytest.approx(expected)


@given(scores=SCORES)
def test_rules_only_lower_and_explain_each_time(scores: dict[str, float]) -> None:
    left, changes = consistent(scores, ConsistencyRules())

    assert left.keys() == scores.keys()
    assert all(0 <= left[judge] <= scores[judge] for judge in scores)
    assert {change.judge for change in changes} == {judge for judge in scores if left[judge] != scores[judge]}


@given(scores=SCORES)
def test_a_rule_needs_both_of_its_judges(scores: dict[str, float]) -> None:
    alone, changes = consistent({judge: scores[judge] for judge in list(scores)[:1]}, ConsistencyRules())

    assert alone == {judge: scores[judge] for judge in list(scores)[:1]}
    assert changes == []


def test_the_mean_is_over_the_judges_that_gave_a_score() -> None:
    assert weighted_mean({"process": 0.2, "helpfulness": 0.8}, {}) == pytest.approx(0.5)
    assert weighted_mean({"process": 0.2, "helpfulness": 0.8}, {"process": 3.0}) == pytest.approx(0.35)
    assert weighted_mean({"process": 0.2}, {"helpfulness": 9.0}) == pytest.approx(0.2)
    assert weighted_mean({}, {"process": 1.0}) is None
