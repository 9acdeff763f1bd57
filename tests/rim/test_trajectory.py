"""Columns of a data set become what the judges see."""

from __future__ import annotations

import pytest

from atroposlib.errors import ConfigError
from atroposlib.rim.trajectory import Trajectory, from_columns


def test_columns_by_plural_and_by_singular_name() -> None:
    [first, second] = from_columns(
        ["q1", "q2"],
        ["a1", "a2"],
        {
            "ground_truths": ["g1", 7],
            "baseline_solutions": ["b1", None],
            "student_plans": ["p1", "p2"],
            "teacher_traces": ["t1", "t2"],
            "student_traces": ["s1", "s2"],
            "constitution_principles": "be kind",
            "some_other_column": [1, 2],
        },
    )

    assert first == Trajectory("q1", "a1", "g1", "p1", "t1", "s1", "b1", "be kind")
    assert (second.ground_truth, second.student_baseline_answer) == ("7", "")


def test_columns_win_over_prompts_and_completions() -> None:
    columns = {"questions": ["task"], "student_answers": ["taught answer"], "teacher_traces": ["guidance"]}

    [found] = from_columns(["teacher prompt"], ["<teaching>guidance</teaching>"], columns)

    assert found == Trajectory("task", "taught answer", teacher_trace="guidance", student_trace="taught answer")


def test_without_a_trace_the_completion_is_the_work_too() -> None:
    assert from_columns(["q"], ["a"], {"ground_truth": None}) == [Trajectory("q", "a", student_trace="a")]


def test_chats_are_read_as_texts() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}]

    [found] = from_columns([chat], [{"role": "assistant", "content": "a"}], {})

    assert (found.question, found.student_answer) == ("q", "a")


@pytest.mark.parametrize(
    ("prompts", "columns", "said"),
    [
        (["q", "q"], {}, "prompts has 2 entries for 1 completions"),
        (["q"], {"teacher_traces": ["t", "t"]}, "teacher_traces has 2 entries for 1 completions"),
    ],
)
def test_lengths_that_differ_are_named(prompts: list[str], columns: dict[str, list[str]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_columns(prompts, ["a"], columns)


def test_a_field_that_is_no_text_is_named() -> None:
    with pytest.raises(ConfigError, match="ground_truth must be a text, is int: 4"):
        Trajectory("q", "a", ground_truth=4)  # type: ignore[arg-type]
