"""Questions and right answers in rows, under the names that data sets give them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from atroposlib.errors import DataError

QUESTION_COLUMNS = ("question", "problem", "prompt", "problem_text", "query", "original_question", "input", "task")
SOLUTION_COLUMNS = ("solution", "cot_solution", "rationale", "answer", "response", "output")
ANSWER_COLUMNS = ("ground_truth", "final_answer", "expected_answer")
"""Bare answers."""
GROUND_TRUTH_COLUMNS = (*ANSWER_COLUMNS, "answer", "solution", "output", "response")
_MARKED = re.compile(r"(?:####|\bfinal answer(?: is:?|\s*:))[ \t]*([^\n]+)", re.IGNORECASE)


def question_of(row: Mapping[str, Any]) -> str:
    """The question of a row; of a prompt that is a chat, what the user said last.

    Raises:
        DataError: no column holds one.
    """
    for name in QUESTION_COLUMNS:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and (text := _last_of_user(value)):
            return text
    raise DataError(
        f"columns {', '.join(map(repr, row)) or 'none'}: expected a question under {', '.join(QUESTION_COLUMNS)}"
    )


def ground_truth_of(row: Mapping[str, Any]) -> str | None:
    """The right answer of a row; None where it has none.

    `ground_truth` is taken whole. Of a worked solution that ends in `#### 42` or `Final Answer: 42` the answer alone is
    taken. Numbers become text, lists and objects JSON.
    """
    return _first_answer(row, GROUND_TRUTH_COLUMNS)


def bare_answer_of(row: Mapping[str, Any]) -> str | None:
    """The right answer of a row that has it apart from a worked solution, else None; read as ground_truth_of does."""
    return _first_answer(row, ANSWER_COLUMNS)


def _first_answer(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = row.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return text if name == "ground_truth" else marked_answer(text) or text
    return None


def solution_of(row: Mapping[str, Any]) -> str | None:
    """The worked solution of a row; None where it has none."""
    found = (row.get(name) for name in SOLUTION_COLUMNS)
    return next((value for value in found if isinstance(value, str) and value.strip()), None)


def marked_answer(text: str) -> str | None:
    """What follows the last `####` or `Final Answer:` on its line; None without either."""
    found = _MARKED.findall(text)
    return tidy(found[-1]) if found else None


def final_answer(text: str) -> str:
    """The answer that a solution ends in: the marked one, else what follows the last colon of the last line."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    lines = text.strip().splitlines()
    return tidy(lines[-1].rpartition(":")[2]) if lines else ""


def tidy(answer: str) -> str:
    """Single spaces and no period at the end."""
    return " ".join(answer.split()).removesuffix(".").strip()


def exact_match(text: str, ground_truth: str) -> float:
    """1.0 where a reply ends in exactly the right answer, after tidying both, else 0.0: the strict rule, without arithmetic."""
    return float(final_answer(text) == tidy(ground_truth))


def _last_of_user(messages: Sequence[Any]) -> str:
    said = [
        message["content"]
        for message in messages
        if isinstance(message, dict) and message.get("role") == "user" and isinstance(message.get("content"), str)
    ]
    return said[-1] if said else ""
