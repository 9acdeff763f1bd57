"""What an evaluation of a distilled student says: no leak of the solution, both targets, nothing without a baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atroposlib.data import DataConfig, load_splits
from atroposlib.errors import DataError
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from trainer.supervised.evaluation import (
    Asked,
    Outcome,
    _warn_that_nothing_is_judged,
    generation_metrics,
    is_right,
    question_of_row,
    questions_of,
)

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "2 + 2 = 4\n#### 4"},
    ]
}
TURNS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "agent", "content": "#### 4"},
        {"role": "user", "content": "3 + 3?"},
        {"role": "assistant", "content": "#### 6"},
    ]
}
OUTCOMES = [Outcome(10, True), Outcome(20, False), Outcome(30, True), Outcome(40, True)]


def metrics(**baselines: float | None) -> dict[str, float]:
    return generation_metrics(OUTCOMES, **{"baseline_success": None, "baseline_tokens": None, **baselines})


def asked(rows: list[dict[str, Any]], *, most: int = 9, max_seq_length: int = 500, student: Any = None) -> Asked:
    return questions_of(rows, student or byte_tokenizer(), most=most, max_seq_length=max_seq_length)


def test_of_several_questions_the_first_is_asked_and_judged() -> None:
    question = question_of_row(TURNS)

    assert question is not None
    assert question.messages == TURNS["messages"][:1]
    assert question.ground_truth == "4"


def test_after_calls_of_tools_the_last_reply_is_the_answer() -> None:
    turns = [("user", "2 + 2?"), ("assistant", "let me count"), ("tool", "4"), ("assistant", "#### 4")]
    question = question_of_row({"messages": [{"role": role, "content": text} for role, text in turns]})

    assert question is not None
    assert (len(question.messages), question.ground_truth) == (1, "4")


def test_a_greeting_asks_nothing() -> None:
    greeting = {"role": "assistant", "content": "Hello!"}

    assert question_of_row({"messages": [{"role": "system", "content": "Be kind."}, greeting]}) is None


def test_plain_text_is_asked_as_it_is_trained_without_a_template() -> None:
    plain = byte_tokenizer()
    plain.chat_template = None

    found = asked([{"prompt": "2 + 2 =", "completion": " 4"}], student=plain)

    assert found.prompts == [plain.encode("2 + 2 =", add_special_tokens=True)]


def test_a_chat_is_asked_up_to_where_the_reply_begins() -> None:
    (prompt,) = asked([CHAT]).prompts

    assert byte_tokenizer().decode(prompt).endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_as_long_as_an_example_may_be_are_left_out_and_counted() -> None:
    rows = [{"prompt": "a" * n, "completion": "b"} for n in (3, 20, 19, 25)]

    found = asked(rows, max_seq_length=20)

    assert [len(prompt) for prompt in found.prompts] == [3, 19]
    assert found.as_metrics() == {"eval_data/questions": 2.0, "eval_data/questions_too_long": 2.0}


def test_a_prompt_that_the_template_refuses_names_its_row() -> None:
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('only from users') }}"

    with pytest.raises(DataError, match=r"row 1 of those held out: .*only from users"):
        asked([{"text": "once"}, {"prompt": "hi"}], student=strict)


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


def sessions(written: Path, *found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of runtime sessions, as recipe=teacher_gkd has them."""
    written.write_text("".join(json.dumps(session) + "\n" for session in found))
    config = DataConfig(
        loader="runtime_traces", form="conversation", dataset_path=written, eval_split_ratio=0, shuffle=False
    )
    rows: list[dict[str, Any]] = load_splits(config).train
    return rows


def test_a_session_asks_its_task_and_says_what_is_right_without_a_leak(tmp_path: Path) -> None:
    guided = [{"actor": "student", "text": "is it 5?"}, {"actor": "teacher", "text": "It is 4917."}]
    session = {"task": "add", "final_answer": "4917", "session_metadata": {"ground_truth": "4917"}}
    found = asked(sessions(tmp_path / "export.jsonl", {**session, "trajectory_events": guided}))

    assert [question.ground_truth for question in found.questions] == ["4917"]
    prompt = byte_tokenizer().decode(found.prompts[0])
    assert "add" in prompt
    assert "is it 5?" in prompt
    assert "4917" not in prompt


def test_a_session_in_which_the_teacher_speaks_first_asks_its_task(tmp_path: Path) -> None:
    steps = [{"guidance": ["count them"], "output": "4917"}]
    session = {"task": "add", "final_answer": "4917", "session_metadata": {"status": "succeeded"}, "steps": steps}

    (question,) = asked(sessions(tmp_path / "export.jsonl", session)).questions

    assert question.messages == [{"role": "system", "content": "add"}]
    assert question.ground_truth == "4917"


def test_rows_that_ask_nothing_are_passed_over() -> None:
    rows: list[dict[str, Any]] = [{"text": "once upon a time"}, {"prompt": "hi", "ground_truth": "x"}, CHAT, CHAT]

    assert [question.ground_truth for question in asked(rows, most=2).questions] == ["x", "4"]


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


def test_a_baseline_that_nothing_can_be_compared_with_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_that_nothing_is_judged.cache_clear()

    for _ in range(2):
        generation_metrics([Outcome(3, None)], baseline_success=0.75, baseline_tokens=None)
        generation_metrics([Outcome(3, None)], baseline_success=None, baseline_tokens=None)
        metrics(baseline_success=0.75)

    (said,) = caplog.messages
    assert "baseline_success is given, but no held-out question says what is right" in said
