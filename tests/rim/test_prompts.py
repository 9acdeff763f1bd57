"""What judges are told: their inputs and no others, whatever braces stand in them."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.rim.config import ALL_JUDGES, JudgeName
from atroposlib.rim.prompts import NOTHING, arbiter_prompt, judge_prompt, render
from atroposlib.rim.trajectory import Trajectory
from atroposlib.rim.verdict import Principle, Verdict
from tests.rim.judges import SHOWN, a_trajectory

MARKED = Trajectory(**{field.name: f"<<{field.name}>>" for field in fields(Trajectory)})


@pytest.mark.parametrize("judge", ALL_JUDGES)
def test_a_judge_sees_its_inputs_and_no_others(judge: JudgeName) -> None:
    prompt = judge_prompt(judge, MARKED)

    assert {name for name in SHOWN[judge] if f"<<{name}>>" in prompt} == SHOWN[judge]
    assert {field.name for field in fields(Trajectory) if f"<<{field.name}>>" in prompt} == {
        *SHOWN[judge],
        "constitution_principles",
    }


@pytest.mark.parametrize("judge", ALL_JUDGES)
def test_every_judge_is_told_the_form_of_its_answer(judge: JudgeName) -> None:
    prompt = judge_prompt(judge, a_trajectory())

    assert all(f'"{name}"' in prompt for name in ("principles", "score", "rationale", "uncertainty"))
    assert "more than 0.3" in prompt


@given(text=st.text(alphabet='{}"%question_ student_answer:[]$'))
def test_braces_in_values_are_left_alone(text: str) -> None:
    prompt = judge_prompt("accuracy", a_trajectory(question=f"q:{text}:q", student_answer="{ground_truth}"))

    assert f"q:{text}:q" in prompt
    assert "<answer>\n{ground_truth}\n</answer>" in prompt


def test_only_names_that_have_a_value_are_replaced() -> None:
    assert render('{a} {b} {} {"a": {a}} {{a}}', {"a": "{b}"}) == '{b} {b} {} {"a": {b}} {{b}}'


def test_an_empty_field_is_said_to_be_empty() -> None:
    prompt = judge_prompt("helpfulness", a_trajectory(teacher_trace=" "))

    assert f"<guidance>\n{NOTHING}\n</guidance>" in prompt


def test_rules_of_the_owner_are_shown_only_where_there_are_some() -> None:
    assert "<rules>" not in judge_prompt("process", a_trajectory())
    assert "<rules>\nBe terse.\n</rules>" in judge_prompt("process", a_trajectory(constitution_principles="Be terse."))


def test_the_large_model_sees_the_case_and_every_assessment() -> None:
    samples = [
        Verdict(0.25, 0.5, "too {short}", (Principle("clear", 0.7, "easy to follow"),)),
        Verdict(0.75, 0.125, "fine"),
    ]

    prompt = arbiter_prompt("process", MARKED, samples)

    assert all(f"<<{name}>>" in prompt for name in SHOWN["process"])
    for text in ("score 0.25, uncertainty 0.5", "too {short}", "clear (0.7): easy to follow", "score 0.75", "fine"):
        assert text in prompt
    assert '"score"' in prompt
