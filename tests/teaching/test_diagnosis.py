"""DiagnosticResult, its tiers, and estimates of what the student can do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from atroposlib.teaching.diagnosis import (
    UNKNOWN,
    Capability,
    DiagnosticResult,
    capability_from_judge,
    capability_from_scores,
    diagnose,
    wilson_interval,
)


def a_result(**values: Any) -> DiagnosticResult:
    given = {
        "capability_level": 0.5,
        "confidence_score": 0.5,
        "identified_gaps": [],
        "response_quality": {},
        "probe_tokens": 3,
    }
    return DiagnosticResult(**{**given, **values})


@pytest.mark.parametrize("name", ["capability_level", "confidence_score"])
@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_a_number_out_of_range_is_a_value_error(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        a_result(**{name: value})


def test_a_negative_count_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="probe_tokens=-1"):
        a_result(probe_tokens=-1)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("capability_level", True, r"a number, not True \(bool\)"),
        ("capability_level", "0.5", r"a number, not '0.5' \(str\)"),
        ("confidence_score", None, r"a number, not None \(NoneType\)"),
        ("confidence_score", np.bool_(False), "a number"),
        ("identified_gaps", "gap", r"a list of texts, not 'gap' \(str\)"),
        ("identified_gaps", [7], r"a list of texts, not \[7\] \(list\)"),
        ("response_quality", [], "a mapping of names to numbers"),
        ("response_quality", {"has_plan": "yes"}, r"a mapping of names to numbers, not \{'has_plan': 'yes'\}"),
        ("response_quality", {1: 1.0}, "a mapping of names to numbers"),
        ("probe_tokens", 2.5, r"a whole number, not 2.5 \(float\)"),
        ("probe_tokens", True, r"a whole number, not True"),
        ("approach", None, "a text, not None"),
    ],
)
def test_a_field_of_the_wrong_type_is_a_type_error(name: str, value: Any, expected: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be {expected}"):
        a_result(**{name: value})


def test_types_are_looked_at_before_values() -> None:
    with pytest.raises(TypeError, match="identified_gaps"):
        a_result(capability_level=7.0, identified_gaps=None)


def test_numbers_of_numpy_are_numbers() -> None:
    assert a_result(capability_level=np.float32(0.75), confidence_score=1, probe_tokens=np.int64(3)).tier == "high"


@pytest.mark.parametrize(
    ("level", "tier"), [(0.0, "low"), (0.299, "low"), (0.3, "medium"), (0.699, "medium"), (0.7, "high"), (1.0, "high")]
)
def test_tiers_are_half_open(level: float, tier: str) -> None:
    assert a_result(capability_level=level).tier == tier


def test_the_interval_is_wilson_s() -> None:
    # 8 of 10: 0.4902 to 0.9433 in the usual tables.
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0.0, 4)[0] == 0.0
    assert wilson_interval(1.0, 4)[1] == 1.0


def test_more_attempts_make_more_confidence() -> None:
    few, many = (capability_from_scores([1.0, 0.0] * n) for n in (2, 50))

    assert few.level == many.level == 0.5
    assert 0 < few.confidence < many.confidence < 1


def test_nothing_known_is_half_with_no_confidence() -> None:
    assert capability_from_scores([]) == UNKNOWN
    assert (UNKNOWN.level, UNKNOWN.confidence) == (0.5, 0.0)


def test_what_a_judge_is_not_sure_of_is_no_confidence() -> None:
    assert capability_from_judge(0.8, 0.2) == Capability(0.8, 0.8)


def test_a_judge_s_numbers_are_clamped() -> None:
    capability = capability_from_judge(1.2, -0.5)

    assert (capability.level, capability.confidence) == (1.0, 1.0)


def test_a_probe_is_read() -> None:
    approach = "Type: addition\nSteps: first add the tens, then the ones\nDifficulties:\n- the carry; the sign\n2. large numbers"

    result = diagnose("Add 17 and 25 tens", approach, tokens=21, capability=capability_from_scores([1.0] * 4))

    assert result.identified_gaps == ["the carry", "the sign", "large numbers"]
    assert result.response_quality["has_plan"] == result.response_quality["on_topic"] == 1.0
    assert (result.response_quality["length_tokens"], result.probe_tokens, result.tier) == (21, 21, "high")
    assert result.approach == approach


@pytest.mark.parametrize(
    ("approach", "gaps"),
    [
        ("", ["gave no approach"]),
        ("Bananas.", ["states no plan", "does not refer to the question"]),
        ("First add 17. Difficulties: none", []),
        ("Difficulties: none.\nSteps: add 17 to 25", []),
    ],
)
def test_what_a_probe_lacks_is_a_gap(approach: str, gaps: list[str]) -> None:
    assert diagnose("What is 17 + 25?", approach, tokens=1).identified_gaps == gaps
