"""RIMResult: the reward of one sample, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RIMResult:
    """What the judges made of one trajectory."""

    score: float | None
    """0 to 1; None: nobody could judge it, which says nothing about the sample. Leave it out."""
    judge_scores: dict[str, float] = field(default_factory=dict)
    """By judge, after the consistency rules; a judge that abstained is missing."""
    explanations: dict[str, str] = field(default_factory=dict)
    """By judge: its rationale, with a note for each rule that changed its score."""
    structured_reward: dict[str, Any] = field(default_factory=dict)
    """`score`, `rationale`, `judges` (each with identifier, score, rationale, principles, evidence, uncertainty, samples,
    escalated, escalation_reason), `raw`, the scores before the rules, and `gaming`, what the detectors found."""
    escalations: int = 0
    """Judges for whom the large model was asked."""
    failures: int = 0
    """Judges that abstained."""
    reasons: list[str] = field(default_factory=list)
    """Why judges abstained or were skipped, and which detectors held the reward down."""
