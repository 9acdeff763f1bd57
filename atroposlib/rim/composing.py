"""From the judgements of one trajectory to its result. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from atroposlib.rim.config import RIMConfig
from atroposlib.rim.gaming import detect
from atroposlib.rim.judging import Judgement
from atroposlib.rim.result import RIMResult
from atroposlib.rim.scoring import consistent, weighted_mean
from atroposlib.rim.trajectory import Trajectory
from atroposlib.rim.verdict import Verdict

NO_GROUND_TRUTH = "accuracy: skipped, there is no ground truth"


def result_of(trajectory: Trajectory, judgements: Sequence[Judgement], config: RIMConfig) -> RIMResult:
    """The reward of one trajectory: judges that abstained are left out, rules and detectors apply to the rest.

    Args:
        judgements: of the judges that were asked, in their usual order.
    """
    raw: dict[str, float] = {one.judge: one.verdict.score for one in judgements if one.verdict is not None}
    explanations: dict[str, str] = {one.judge: one.verdict.rationale for one in judgements if one.verdict is not None}
    scores, changes = consistent(raw, config.consistency_rules)
    for change in changes:
        explanations[change.judge] = f"{explanations[change.judge]} {change}".strip()
    score = weighted_mean(scores, {str(judge): weight for judge, weight in config.judge_weights.items()})
    found = detect(trajectory, config.anti_gaming, judges=config.judges)
    if score is not None and found:
        score = min(score, config.anti_gaming.cap_score)
    failures = [f"{one.judge}: {one.failure}" for one in judgements if one.verdict is None]
    is_skipped = "accuracy" in config.judges and not any(one.judge == "accuracy" for one in judgements)
    return RIMResult(
        score=score,
        judge_scores=scores,
        explanations=explanations,
        structured_reward={
            "score": score,
            "rationale": "\n".join(f"{judge}: {text}" for judge, text in explanations.items()),
            "judges": [_breakdown(one, scores, explanations) for one in judgements],
            "raw": raw,
            "gaming": found,
        },
        escalations=sum(bool(one.escalation_reason) for one in judgements),
        failures=len(failures),
        reasons=[*([NO_GROUND_TRUTH] if is_skipped else []), *failures, *(f"gaming: {one}" for one in found)],
    )


def _breakdown(one: Judgement, scores: dict[str, float], explanations: dict[str, str]) -> dict[str, Any]:
    return {
        "identifier": one.judge,
        "score": scores.get(one.judge),
        "rationale": explanations.get(one.judge, one.failure),
        "principles": [asdict(principle) for principle in one.verdict.principles] if one.verdict else [],
        "evidence": list(one.verdict.evidence) if one.verdict else [],
        "uncertainty": one.verdict.uncertainty if one.verdict else None,
        "samples": [_sample(sample.verdict) | {"temperature": sample.temperature} for sample in one.samples],
        "escalated": bool(one.escalation_reason),
        "escalation_reason": one.escalation_reason or None,
    }


def _sample(verdict: Verdict) -> dict[str, Any]:
    return {
        "score": verdict.score,
        "rationale": verdict.rationale,
        "principles": [asdict(principle) for principle in verdict.principles],
        "evidence": list(verdict.evidence),
        "uncertainty": verdict.uncertainty,
    }
