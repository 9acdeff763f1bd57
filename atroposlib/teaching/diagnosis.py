"""What a probe says about the student: how able it is at a task, how sure we are, what it seems to miss."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, TypeAlias

from atroposlib.teaching.argument_types import check_number, check_text, check_whole_number, wrong_type
from atroposlib.teaching.errors import TeachingValueError

Tier: TypeAlias = Literal["low", "medium", "high"]

MEDIUM_FROM = 0.3
HIGH_FROM = 0.7
"""Tiers are half-open: low [0, 0.3), medium [0.3, 0.7), high [0.7, 1]."""
UNKNOWN_CAPABILITY = 0.5
Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

_PLAN = re.compile(r"(?m)^\s*(?:\d+[.)]|[-*•]|steps?\b)|\b(?:first|then|next|finally|step \d)\b", re.I)
_SECTION = re.compile(r"(?m)^\W*(?P<name>[A-Za-z][A-Za-z /]{2,40}?)\W{0,4}:\s*(?P<rest>.*)$")
_GAP_NAMES = ("difficult", "gap", "unsure", "trouble", "unclear", "challenge")
_WORD = re.compile(r"[A-Za-z]{4,}|\d+")
_ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s*")


@dataclass(frozen=True)
class DiagnosticResult:
    """What a diagnostic probe found.

    Raises:
        TypeError: a field is of another type than declared; NumPy's numbers are numbers, a bool is none.
        ValueError: a number is out of its range.
    """

    capability_level: float
    """0 to 1: share of right answers to be expected without help."""
    confidence_score: float
    """0 to 1: 0 says that capability_level is a guess."""
    identified_gaps: list[str]
    """In words, what the student seems to miss."""
    response_quality: Mapping[str, float]
    """Figures of the probe's text: length_tokens, has_plan (0 or 1), on_topic (0 or 1), and others."""
    probe_tokens: int
    """Tokens that the student produced."""
    approach: str = field(default="", repr=False)
    """What the student said: the variable of that name in the teacher's template."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("capability_level", "confidence_score"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise TeachingValueError(f"{name}={value} must lie between 0 and 1")
        if self.probe_tokens < 0:
            raise TeachingValueError(f"probe_tokens={self.probe_tokens} must not be negative")

    def _check_types(self) -> None:
        for name in ("capability_level", "confidence_score"):
            check_number(name, getattr(self, name))
        gaps, quality = self.identified_gaps, self.response_quality
        if not isinstance(gaps, list) or not all(isinstance(gap, str) for gap in gaps):
            raise wrong_type("identified_gaps", gaps, "a list of texts")
        if not isinstance(quality, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Real) for name, value in quality.items()
        ):
            raise wrong_type("response_quality", quality, "a mapping of names to numbers")
        check_whole_number("probe_tokens", self.probe_tokens)
        check_text("approach", self.approach)

    @property
    def tier(self) -> Tier:
        """low: walk through the steps; medium: hints; high: at most a remark."""
        if self.capability_level < MEDIUM_FROM:
            return "low"
        return "medium" if self.capability_level < HIGH_FROM else "high"


@dataclass(frozen=True)
class Capability:
    """An estimate and how much it is worth, both 0 to 1."""

    level: float
    confidence: float


UNKNOWN = Capability(UNKNOWN_CAPABILITY, 0.0)
"""Nothing is known."""


def capability_from_scores(scores: Sequence[float]) -> Capability:
    """From unaided attempts, each scored 0 to 1; UNKNOWN without any."""
    if not scores:
        return UNKNOWN
    level = sum(scores) / len(scores)
    low, high = wilson_interval(level, len(scores))
    return Capability(level, 1.0 - (high - low))


def capability_from_judge(score: float, uncertainty: float) -> Capability:
    """From a judge of the approach."""
    return Capability(_clamped(score), 1.0 - _clamped(uncertainty))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share seen in n trials.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n < 1:
        raise TeachingValueError(f"an interval needs at least 1 trial, not {n}")
    square = Z_95**2
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def diagnose(
    question: str, approach: str, *, tokens: int, is_cut: bool = False, capability: Capability = UNKNOWN
) -> DiagnosticResult:
    """A diagnosis of what the student answered to the probe.

    Args:
        tokens: that the student produced.
        is_cut: the answer ended at the token limit.
    """
    has_plan = _PLAN.search(approach) is not None
    on_topic = _overlap(question, approach) > 0
    return DiagnosticResult(
        capability_level=capability.level,
        confidence_score=capability.confidence,
        identified_gaps=identified_gaps(approach, has_plan=has_plan, on_topic=on_topic),
        response_quality={
            "length_tokens": float(tokens),
            "has_plan": float(has_plan),
            "on_topic": float(on_topic),
            "question_overlap": _overlap(question, approach),
            "is_cut": float(is_cut),
        },
        probe_tokens=tokens,
        approach=approach,
    )


def identified_gaps(approach: str, *, has_plan: bool, on_topic: bool) -> list[str]:
    """What the student itself calls difficult, and what its answer lacks."""
    if not approach.strip():
        return ["gave no approach"]
    found = _named_difficulties(approach)
    if not has_plan:
        found.append("states no plan")
    if not on_topic:
        found.append("does not refer to the question")
    return found


def _named_difficulties(approach: str) -> list[str]:
    """The entries of sections whose heading names difficulties; an entry a line or a semicolon."""
    found: list[str] = []
    is_inside = False
    for line in approach.splitlines():
        heading = _SECTION.match(line)
        if heading:
            is_inside = any(word in heading["name"].lower() for word in _GAP_NAMES)
        text = heading["rest"] if heading else line
        if is_inside:
            found += [entry.strip() for entry in _ITEM.sub("", text).split(";") if entry.strip()]
    return [entry for entry in found if entry.lower().rstrip(".") not in ("none", "nothing", "no")]


def _overlap(question: str, approach: str) -> float:
    """Share of the question's words and numbers that the approach takes up."""
    asked = {word.lower() for word in _WORD.findall(question)}
    said = {word.lower() for word in _WORD.findall(approach)}
    return len(asked & said) / len(asked) if asked else 1.0


def _clamped(value: float) -> float:
    return min(1.0, max(0.0, value))
