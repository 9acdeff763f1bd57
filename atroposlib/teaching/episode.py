"""The records of one round of teaching: what was asked, what was said, what it was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from atroposlib.teaching.answers import correctness, extract_answer
from atroposlib.teaching.diagnosis import DiagnosticResult
from atroposlib.teaching.frozen_model import ChatReply


@dataclass(frozen=True)
class TeachingItem:
    """A problem for the student."""

    question: str
    ground_truth: str | None = None
    source_id: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Values of the templates' optional variables."""


@dataclass(frozen=True)
class Attempt:
    """One solution of the student."""

    reply: ChatReply
    answer: str
    """The final answer in it, normalised; "" where there is none."""
    score: float
    """1.0 right, 0.0 wrong."""

    @classmethod
    def of(cls, reply: ChatReply, ground_truth: str | None) -> Attempt:
        """A reply, scored."""
        answer = extract_answer(reply.text)
        return cls(reply, answer, 0.0 if ground_truth is None else correctness(answer, ground_truth))


def mean_score(attempts: Sequence[Attempt]) -> float:
    """Share of the attempts that are right."""
    return fmean(attempt.score for attempt in attempts)


def mean_answer_length(attempts: Sequence[Attempt]) -> float:
    """Characters of the answers."""
    return fmean(len(attempt.answer) for attempt in attempts)


@dataclass(frozen=True)
class Preparation:
    """What comes before the guidance: the same for every member of a group."""

    item: TeachingItem
    diagnosis: DiagnosticResult
    baseline: tuple[Attempt, ...]
    teacher_prompt: str

    @property
    def baseline_score(self) -> float:
        """Share of the unaided attempts that are right."""
        return mean_score(self.baseline)


@dataclass(frozen=True)
class Guidance:
    """What a teacher wrote."""

    text: str
    teaching: str
    """What the student is shown of it."""
    tokens: int
    """That count for the reward."""


@dataclass(frozen=True)
class Lesson:
    """A guidance and what it did."""

    guidance: Guidance
    attempts: tuple[Attempt, ...]
    is_leak: bool
    """Whether the guidance states the answer."""

    @property
    def score(self) -> float:
        """Share of the attempts with the guidance that are right."""
        return mean_score(self.attempts)


@dataclass(frozen=True)
class PaidLesson:
    """A lesson with its reward."""

    lesson: Lesson
    reward: float
    details: Mapping[str, Any] = field(default_factory=dict)
    """What judges said, where they were asked."""
