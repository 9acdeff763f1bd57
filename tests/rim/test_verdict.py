"""What a judge wrote becomes a verdict, or says why it does not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.rim.verdict import Principle, VerdictError, parse_verdict
from tests.rim.judges import verdict

SHARES = st.floats(0, 1)


def test_every_field_is_read() -> None:
    found = parse_verdict(json.dumps(verdict(0.7, 0.2, evidence=["line 3"])))

    assert (found.score, found.uncertainty, found.rationale) == (0.7, 0.2, "because of 0.7")
    assert found.principles == (Principle("right", 1.0, "it is right"),)
    assert found.evidence == ("line 3",)
    assert not found.is_clamped


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"score": 0.5, "uncertainty": 0.1}\n```',
        'I think {so}. {"score": 0.5, "uncertainty": 0.1} That is all.',
        '<think>{"score": 0.9, "uncertainty": 0}</think>{"score": 0.5, "uncertainty": 0.1}',
        '{"principles": [{"name": "x", "score": 1}], "score": 0.5, "uncertainty": 0.1}',
        '{"score": 0.5, "uncertainty": 0.1, "score_a": 1, "score_b": 0, "student_learning": null}',
        '{"score": 0.5, "uncertainty": 0.1, "principles": "none", "evidence": 3}',
        '{"draft": true}\n{"score": 0.5, "uncertainty": 0.1}\n{"signed": "me"}',
    ],
)
def test_what_stands_around_the_verdict_does_not_matter(text: str) -> None:
    assert parse_verdict(text).score == 0.5


def test_evidence_that_is_no_list_is_none_and_no_text_in_it_is_turned_into_one() -> None:
    def evidence(value: object) -> tuple[str, ...]:
        return parse_verdict(json.dumps(verdict(0.7, evidence=value))).evidence

    assert [evidence(value) for value in ("line 3", None, {"a": 1})] == [()] * 3
    assert evidence([{"line": 3}, 4]) == ("{'line': 3}", "4")


def test_half_of_a_surrogate_pair_is_replaced_wherever_a_text_may_go_on() -> None:
    found = parse_verdict(
        '{"score": 1, "uncertainty": 0, "rationale": "a\\ud800b", "principles": [{"name": "\\udfff", "weight": 1}]}'
    )

    assert found.rationale == "a?b"
    assert found.principles[0].name == "?"


def test_the_old_name_of_the_rationale_is_read() -> None:
    assert parse_verdict('{"score": 1, "uncertainty": 0, "explanation": "why"}').rationale == "why"


@pytest.mark.parametrize(
    ("score", "uncertainty", "clamped"), [(1.2, 0.1, (1.0, 0.1)), (-3, 0.1, (0.0, 0.1)), (0.5, 7, (0.5, 1.0))]
)
def test_numbers_outside_0_to_1_are_clamped_and_say_so(
    score: float, uncertainty: float, clamped: tuple[float, float]
) -> None:
    found = parse_verdict(json.dumps(verdict(score, uncertainty)))

    assert (found.score, found.uncertainty) == clamped
    assert found.is_clamped


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.5",
        "[0.5]",
        '{"score": 0.5}',
        '{"score": "0.5", "uncertainty": 0.1}',
        '{"score": true, "uncertainty": 0.1}',
        '{"score": NaN, "uncertainty": 0.1}',
        '{"score": 1e999, "uncertainty": 0.1}',
        '{"score": ' + "9" * 5000 + ', "uncertainty": 0.1}',
        '{"score": 0.5, "uncertainty": 0.1',
        '{"score": 0.0, "uncertainty": 1.0, "fallback": true}',
        "{" * 100_000,
        '{"a":' * 50_000,
    ],
)
def test_anything_else_is_no_verdict(text: str) -> None:
    with pytest.raises(VerdictError):
        parse_verdict(text)


@given(text=st.text(alphabet='{}[]":,score0.19 uncertainty\\nul-eE'))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        found = parse_verdict(text)
    except VerdictError:
        return
    assert 0 <= found.score <= 1
    assert 0 <= found.uncertainty <= 1


@given(score=SHARES, uncertainty=SHARES, before=st.text(), rationale=st.text(), after=st.text())
def test_a_verdict_survives_its_surroundings(
    score: float, uncertainty: float, before: str, rationale: str, after: str
) -> None:
    body = json.dumps({"score": score, "uncertainty": uncertainty, "rationale": rationale})
    # Braces of the prose could open objects of their own.
    text = before.replace("{", "(") + body + after.replace("{", "(")

    found = parse_verdict(text)

    assert (found.score, found.uncertainty, found.rationale) == (score, uncertainty, rationale)
