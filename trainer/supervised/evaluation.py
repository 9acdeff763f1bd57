"""What a distilled student is worth: right answers and their length on held-out prompts, against a baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atroposlib.data.answers import exact_match, final_answer, ground_truth_of, marked_answer, tidy
from atroposlib.data.chats import as_messages
from atroposlib.errors import DataError
from trainer.supervised.examples import Row, is_prompt_alone

SUCCESS_TARGET = 0.10
"""Right answers that are to be gained over the baseline, as a share of all."""
TOKEN_TARGET = 0.30
"""Tokens that are to be saved, as a share of the baseline's."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Question:
    """One held-out prompt."""

    messages: list[Any]
    """Without a turn of the assistant: there the solution stands."""
    ground_truth: str | None
    """None where the row does not say what is right."""


@dataclass(frozen=True)
class Outcome:
    """What the student made of one question."""

    tokens: int
    is_right: bool | None
    """None where nobody knows."""


def question_of_row(row: Row) -> Question | None:
    """The question that a row asks; None for plain text, which asks none.

    Raises:
        DataError: the row has none of the supervised forms.
    """
    if is_prompt_alone(row):
        prompt = row["prompt"]
        messages = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    else:
        messages = list(as_messages(row))
    asked = [message for message in messages if message.get("role") not in ("assistant", "text")]
    if not asked:
        return None
    return Question(asked, _ground_truth(row, messages))


def questions_of(rows: Sequence[Row], *, most: int) -> list[Question]:
    """The questions of the first rows that ask one.

    Args:
        most: how many, at most.
    """
    found: list[Question] = []
    for row in rows:
        if len(found) >= most:
            break
        try:
            question = question_of_row(row)
        except DataError:
            # A row that cannot be read was named when the examples were made.
            continue
        if question is not None:
            found.append(question)
    return found


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


def _ground_truth(row: Row, messages: Sequence[Any]) -> str | None:
    found = ground_truth_of(row)
    if found is not None:
        return found
    last = messages[-1] if messages else {}
    is_reply = last.get("role") == "assistant" and isinstance(last.get("content"), str)
    return marked_answer(last["content"]) if is_reply else None


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", "").replace("$", "").removesuffix("%").strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None
