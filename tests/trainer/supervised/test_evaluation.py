"""What an evaluation of a distilled student says: no leak of the solution, both targets, nothing without a baseline."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.supervised.evaluation import Outcome, generation_metrics, is_right, question_of_row, questions_of

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "2 + 2 = 4\n#### 4"},
    ]
}
OUTCOMES = [Outcome(10, True), Outcome(20, False), Outcome(30, True), Outcome(40, True)]


def metrics(**baselines: float | None) -> dict[str, float]:
    return generation_metrics(OUTCOMES, **{"baseline_success": None, "baseline_tokens": None, **baselines})


def test_a_question_has_no_turn_of_the_assistant() -> None:
    question = question_of_row(CHAT)

    assert question is not None
    assert [message["role"] for message in question.messages] == ["system", "user"]
    assert "4" not in question.messages[-1]["content"]


def test_what_is_right_comes_from_a_column_or_from_the_marked_answer() -> None:
    questions = [question_of_row({**CHAT, "final_answer": "four"}), question_of_row(CHAT)]
    unknown = question_of_row({"prompt": "hi", "completion": "hello"})

    assert [question and question.ground_truth for question in questions] == ["four", "4"]
    assert unknown is not None
    assert unknown.ground_truth is None


def test_rows_that_ask_nothing_are_passed_over() -> None:
    rows: list[dict[str, Any]] = [{"text": "once upon a time"}, {"prompt": "hi", "ground_truth": "x"}, CHAT, CHAT]

    assert [question.ground_truth for question in questions_of(rows, most=2)] == ["x", "4"]


@pytest.mark.parametrize(
    ("text", "ground_truth", "expected"),
    [
        ("so it is\n#### 42", "42", True),
        ("Final Answer: 1,234.0", "1234", True),
        ("the answer: Paris.", "Paris", True),
        ("Final Answer: 41", "42", False),
        ("42 is not it\nFinal Answer: nan", "nan.", True),
        ("", "42", False),
    ],
)
def test_the_final_answer_decides(text: str, ground_truth: str, expected: bool) -> None:
    assert is_right(text, ground_truth) is expected


def test_without_a_baseline_nothing_is_compared() -> None:
    assert metrics() == {"eval_avg_tokens": 25.0, "eval_success_rate": 0.75}


def test_a_baseline_of_zero_is_one() -> None:
    assert metrics(baseline_success=0.0)["metrics/success_delta"] == 0.75


def test_one_target_alone_says_nothing_of_both() -> None:
    assert "metrics/meets_target" not in metrics(baseline_success=0.0)
    assert metrics(baseline_tokens=50)["metrics/token_reduction"] == 0.5


@pytest.mark.parametrize(
    ("success", "tokens", "expected"),
    [(0.65, 36, 1.0), (0.7, 50, 0.0), (0.5, 30, 0.0)],
    ids=["both", "length", "success"],
)
def test_both_targets_must_be_met(success: float, tokens: float, expected: float) -> None:
    assert metrics(baseline_success=success, baseline_tokens=tokens)["metrics/meets_target"] == expected


def test_without_anything_right_there_is_no_success_rate() -> None:
    assert generation_metrics([Outcome(3, None)], baseline_success=0.5, baseline_tokens=None) == {
        "eval_avg_tokens": 3.0
    }
