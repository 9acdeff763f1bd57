"""Trajectory: what the judges see of one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from atroposlib.errors import ConfigError

_COLUMNS = {
    "ground_truths": "ground_truth",
    "baseline_solutions": "student_baseline_answer",
    "student_plans": "student_plan",
    "teacher_traces": "teacher_trace",
    "student_traces": "student_trace",
    "student_answers": "student_answer",
    "questions": "question",
}
"""Plural names of dataset columns. The singular names are accepted as they are."""


@dataclass(frozen=True)
class Trajectory:
    """One question with everything said about it; an empty text means that there was none."""

    question: str
    student_answer: str
    """The final answer that is judged: with teaching, the one given after it."""
    ground_truth: str = ""
    student_plan: str = ""
    """The student's first approach, before any teaching."""
    teacher_trace: str = ""
    """The guidance, without the teacher's private thoughts."""
    student_trace: str = ""
    """The student's whole text with its reasoning."""
    student_baseline_answer: str = ""
    """The answer without teaching."""
    constitution_principles: str = ""
    """Rules of the owner that every judge weighs in."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise ConfigError(f"trajectory {field.name} must be a text, is {type(value).__name__}: {value!r:.80}")


def from_columns(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> list[Trajectory]:
    """One trajectory for each completion.

    Args:
        prompts, completions: texts, messages, or lists of messages.
        columns: further fields by their plural or singular name; a list has one entry for each completion, a single
            value is for all, None is an empty text. Columns that no field is named for are left alone. They win over
            prompts (the question) and completions (the answer); without a trace the answer is the student's work.
    Raises:
        ConfigError: lengths differ.
    """
    n = len(completions)
    _check_length("prompts", len(prompts), n)
    known = {field.name for field in fields(Trajectory)}
    values: dict[str, list[str]] = {
        "question": [text_of(prompt) for prompt in prompts],
        "student_answer": [text_of(completion) for completion in completions],
    }
    for name, column in columns.items():
        field = _COLUMNS.get(name, name)
        if field in known and column is not None:
            values[field] = _texts(name, column, n)
    values.setdefault("student_trace", values["student_answer"])
    return [Trajectory(**{name: column[i] for name, column in values.items()}) for i in range(n)]


def text_of(value: Any) -> str:
    """The text of a text, a message or a list of messages (its last one); None is empty, the rest as it prints."""
    if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[-1], Mapping):
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content")
    if isinstance(value, list):
        return "".join(str(part.get("text", "")) for part in value if isinstance(part, Mapping))
    return "" if value is None else str(value)


def _texts(name: str, column: Any, n: int) -> list[str]:
    if not isinstance(column, (list, tuple)):
        return [text_of(column)] * n
    _check_length(name, len(column), n)
    return [text_of(value) for value in column]


def _check_length(name: str, actual: int, expected: int) -> None:
    if actual != expected:
        raise ConfigError(f"{name} has {actual} entries for {expected} completions; give one for each")
