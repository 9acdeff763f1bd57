"""What a distilled student is worth: right answers and their length on held-out prompts, against a baseline."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

from atroposlib.data.answers import exact_match, final_answer, ground_truth_of, marked_answer, tidy
from atroposlib.data.chats import as_messages, prompt_of
from atroposlib.errors import DataError
from atroposlib.utils.tokenize_for_trainer import UNMASKED_ROLES
from trainer.supervised.examples import Row, chat_prompt, is_prompt_alone

log = logging.getLogger(__name__)
SUCCESS_TARGET = 0.10
"""Right answers that are to be gained over the baseline, as a share of all."""
TOKEN_TARGET = 0.30
"""Tokens that are to be saved, as a share of the baseline's."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Question:
    """One held-out prompt."""

    messages: list[Any]
    """Up to the first turn of the assistant: there the solution stands."""
    ground_truth: str | None
    """None where the row does not say what is right."""
    text: str | None = None
    """The prompt where it is no chat; None for a chat."""


@dataclass(frozen=True)
class Asked:
    """What an evaluation samples answers to."""

    questions: list[Question]
    prompts: list[list[int]]
    """Ids of each."""
    too_long: int = 0
    """Left out: as long as max_seq_length, or longer."""

    def as_metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            "eval_data/questions": float(len(self.questions)),
            "eval_data/questions_too_long": float(self.too_long),
        }


@dataclass(frozen=True)
class Outcome:
    """What the student made of one question."""

    tokens: int
    is_right: bool | None
    """None where nobody knows."""


def question_of_row(row: Row) -> Question | None:
    """The question that a row asks, the first of several; None for plain text, which asks none.

    Raises:
        DataError: the row has none of the supervised forms.
    """
    if is_prompt_alone(row):
        prompt = row["prompt"]
        messages = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    else:
        messages = list(as_messages(row))
    asked = list(takewhile(lambda message: message.get("role") not in UNMASKED_ROLES, messages))
    if not any(message.get("role") == "user" for message in asked) and not _holds_task(asked, row):
        return None
    return Question(asked, _ground_truth(row, messages[len(asked) :]), _text(row))


def questions_of(rows: Sequence[Row], tokenizer: Any, *, most: int, max_seq_length: int) -> Asked:
    """The questions of the first rows that ask one that is short enough.

    Args:
        tokenizer: the student's.
        most: how many, at most.
    Raises:
        DataError: a row cannot be read, or the chat template does not take it.
    """
    questions: list[Question] = []
    prompts: list[list[int]] = []
    too_long = 0
    for number, row in enumerate(rows):
        if len(questions) >= most:
            break
        try:
            question = question_of_row(row)
            prompt = prompt_of_question(question, tokenizer) if question is not None else []
        except DataError as error:
            raise DataError(f"row {number} of those held out: {error}") from error
        if question is None:
            continue
        if len(prompt) >= max_seq_length:
            too_long += 1
            continue
        questions.append(question)
        prompts.append(prompt)
    return Asked(questions, prompts, too_long)


def prompt_of_question(question: Question, tokenizer: Any) -> list[int]:
    """Ids of a question, as rows of its form are trained: text is no chat.

    Raises:
        DataError: the chat template does not take it.
    """
    if question.text is None:
        return chat_prompt(question.messages, tokenizer)
    return list(tokenizer.encode(question.text, add_special_tokens=True))


def is_right(text: str, ground_truth: str) -> bool:
    """Whether a reply ends in the right answer, to the letter or as a number: 1,234.0 is 1234."""
    if exact_match(text, ground_truth):
        return True
    found, expected = _number(final_answer(text)), _number(tidy(ground_truth))
    return found is not None and expected is not None and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)


def generation_metrics(
    outcomes: Sequence[Outcome], *, baseline_success: float | None, baseline_tokens: float | None
) -> dict[str, float]:
    """The figures of an evaluation; without a baseline, or without anything to judge by, some are absent.

    Args:
        outcomes: at least one.
        baseline_success: share of right answers to compare with; 0 means none was right.
        baseline_tokens: tokens of an answer to compare with.
    """
    judged = [outcome.is_right for outcome in outcomes if outcome.is_right is not None]
    tokens = sum(outcome.tokens for outcome in outcomes) / len(outcomes)
    metrics = {"eval_avg_tokens": tokens}
    targets: list[bool] = []
    if judged:
        metrics["eval_success_rate"] = sum(judged) / len(judged)
    elif baseline_success is not None:
        _warn_that_nothing_is_judged()
    if judged and baseline_success is not None:
        delta = metrics["eval_success_rate"] - baseline_success
        metrics["metrics/success_delta"] = delta
        targets.append(delta > SUCCESS_TARGET - _ROUNDING)
    if baseline_tokens is not None:
        saved = (baseline_tokens - tokens) / baseline_tokens
        metrics["metrics/token_reduction"] = saved
        targets.append(saved > TOKEN_TARGET - _ROUNDING)
    # Both, or it would be said of a student that only answers shorter.
    if len(targets) == 2:
        metrics["metrics/meets_target"] = float(all(targets))
    return metrics


def _holds_task(messages: Sequence[Any], row: Row) -> bool:
    """Whether the messages say the row's task: in sessions it is the system's word, and the teacher may speak right after it."""
    task = row.get("task")
    said = (message.get("content") for message in messages)
    return isinstance(task, str) and bool(task) and any(isinstance(text, str) and task in text for text in said)


def _text(row: Row) -> str | None:
    """The prompt of a row of plain prompt and completion; None for a chat."""
    if "completion" not in row:
        return None
    prompt = prompt_of(row)
    return prompt if isinstance(prompt, str) and isinstance(row["completion"], str) else None


def _ground_truth(row: Row, reply: Sequence[Any]) -> str | None:
    """What is right by the row, or by the end of the reply: the turns up to the user's next one."""
    found = ground_truth_of(row)
    if found is not None:
        return found
    turns = list(takewhile(lambda message: message.get("role") != "user", reply))
    last = turns[-1] if turns else {}
    is_text = last.get("role") in UNMASKED_ROLES and isinstance(last.get("content"), str)
    return marked_answer(last["content"]) if is_text else None


@cache
def _warn_that_nothing_is_judged() -> None:
    """Once a process: every evaluation would say the same."""
    log.warning(
        "baseline_success is given, but no held-out question says what is right: eval_success_rate and "
        "metrics/success_delta are left out; give rows a ground_truth or final_answer (sessions: ground_truth in "
        "session_metadata), or end their replies in `Final Answer: VALUE`"
    )


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", "").replace("$", "").removesuffix("%").strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None
