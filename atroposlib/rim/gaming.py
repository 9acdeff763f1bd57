"""Detectors of text that works on the judge instead of on the task. Pure: each one says what it found, or None."""

from __future__ import annotations

import re
from collections.abc import Collection

from atroposlib.envs.reward_fns.leaks import gives_away
from atroposlib.rim.config import AntiGaming
from atroposlib.rim.trajectory import Trajectory

NGRAM_WORDS = 4
MIN_NGRAMS = 12
MIN_DISTINCT_SHARE = 0.35
"""Of the n-grams of a text; running prose has nearly 1, a phrase in a loop nearly 0."""

_GRADER = r"(?:judges?|graders?|evaluators?|raters?|reviewers?)"
_TOP = r"(?:full|maximum|max|highest|perfect|top|1\.0|10/10|100\s?%)"
_INSTRUCTIONS = (
    re.compile(
        rf"\b(?:dear|note (?:to|for)|attention|message (?:to|for)|hey)[\s,:]+(?:the |all |any )?{_GRADER}\b", re.I
    ),
    re.compile(
        r"\b(?:ignore|disregard|forget|override)\b[^.\n]{0,30}\b(?:previous|prior|above|earlier|your|all)\b[^.\n]{0,30}"
        r"\b(?:instructions?|rules|criteria|principles|rubric|prompt)\b",
        re.I,
    ),
    re.compile(
        rf"\b(?:give|award|assign|grant|rate|score|grade)\b\s+(?:me|us|this|it|my|the (?:student|teacher|teaching|answer|"
        rf"response|guidance|solution))\b[^.\n]{{0,40}}\b{_TOP}(?!\w)",
        re.I,
    ),
    re.compile(rf"\b(?:you are|as) (?:a|an|the) (?:\w+ )?{_GRADER}\b", re.I),
    re.compile(
        r"\b(?:set|report|return|output)\b[^.\n]{0,30}\b(?:score|uncertainty)\b[^.\n]{0,10}(?:\b(?:to|as|of)\b|\s*[=:])",
        re.I,
    ),
)
_SCORE_JSON = re.compile(r"[\"']score[\"']\s*:\s*[-\d.]")


def detect(trajectory: Trajectory, rules: AntiGaming, *, judges: Collection[str]) -> list[str]:
    """What was found in the trained text, in words; empty where nothing was, or where detection is off."""
    if not rules.enabled:
        return []
    text = trained_text(trajectory, judges)
    asked = trajectory.question
    found = [
        instructions_to_judge(text, asked) if rules.detect_instructions_to_judge else None,
        empty_or_repeated(text) if rules.detect_empty_or_repeated else None,
        answer_leak(trajectory) if rules.detect_answer_leak else None,
        judge_format(text, asked) if rules.detect_judge_format else None,
        too_long(text, rules.max_chars),
    ]
    return [one for one in found if one is not None]


def trained_text(trajectory: Trajectory, judges: Collection[str]) -> str:
    """The guidance where there is some or a judge of guidance is active; otherwise the answer is what is trained."""
    has_teacher = bool(trajectory.teacher_trace) or "helpfulness" in judges
    return trajectory.teacher_trace if has_teacher else trajectory.student_answer


def instructions_to_judge(text: str, question: str) -> str | None:
    """A sentence that tells a grader what to do, and that the question does not contain."""
    for pattern in _INSTRUCTIONS:
        match = pattern.search(text)
        if match and match[0].casefold() not in question.casefold():
            return f"instruction to the judge: {match[0]!r:.80}"
    return None


def empty_or_repeated(text: str) -> str | None:
    """No text, or the same few words again and again."""
    words = text.split()
    if not words:
        return "empty text"
    ngrams = [tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)]
    if len(ngrams) >= MIN_NGRAMS and len(set(ngrams)) < MIN_DISTINCT_SHARE * len(ngrams):
        return f"repeated text: {len(set(ngrams))} different sequences of {NGRAM_WORDS} words in {len(ngrams)}"
    return None


def answer_leak(trajectory: Trajectory) -> str | None:
    """The ground truth stands in the guidance, but neither in the question nor in the student's plan."""
    is_leak = gives_away(
        trajectory.teacher_trace,
        trajectory.ground_truth,
        question=trajectory.question,
        approach=trajectory.student_plan,
    )
    return "the guidance contains the answer" if is_leak else None


def judge_format(text: str, question: str) -> str | None:
    """JSON with a score in it, which a judge might take for its own."""
    if _SCORE_JSON.search(text) and not _SCORE_JSON.search(question):
        return 'the text imitates a judge: JSON with a "score"'
    return None


def too_long(text: str, max_chars: int | None) -> str | None:
    """More characters than allowed."""
    if max_chars is None or len(text) <= max_chars:
        return None
    return f"{len(text)} characters, {max_chars} are allowed"
