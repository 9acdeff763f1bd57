"""From lessons to rewards: by the scores of the student, or by judges."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Protocol

from atroposlib.errors import JudgesFailingError
from atroposlib.rim.result import RIMResult
from atroposlib.rim.trajectory import Trajectory
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.diagnosis import UNKNOWN, Capability, capability_from_judge
from atroposlib.teaching.episode import Attempt, Lesson, PaidLesson, Preparation, TeachingItem, mean_answer_length
from atroposlib.teaching.rewards import after_leak, compute_teaching_reward, outcome_reward, without_rounding

log = logging.getLogger(__name__)

DIAGNOSTIC = "diagnostic"
"""The judge of approaches."""


class Judges(Protocol):
    """What is used of RIMReward."""

    async def score(self, trajectories: Sequence[Trajectory]) -> list[RIMResult]:
        """One result for each trajectory."""
        ...


def reward_of(preparation: Preparation, lesson: Lesson, config: TeacherEnvConfig) -> float:
    """What a lesson is worth by the student's scores, in the modes that need no judge."""
    if config.teaching_reward_mode == "outcome":
        reward = outcome_reward(
            preparation.baseline_score,
            lesson.score,
            baseline_length=mean_answer_length(preparation.baseline),
            enhanced_length=mean_answer_length(lesson.attempts),
        )
    else:
        reward = reward_by_scores(preparation.baseline_score, lesson.score, lesson.guidance.tokens, config)
    return guarded(reward, lesson, config)


def reward_by_scores(baseline: float, enhanced: float, teaching_length: float, config: TeacherEnvConfig) -> float:
    """compute_teaching_reward, as the options say.

    Raises:
        TypeError, ValueError: as compute_teaching_reward.
    """
    return compute_teaching_reward(
        baseline,
        enhanced,
        teaching_length,
        mode=config.teaching_reward_mode,
        degradation_penalty_multiplier=config.degradation_penalty_multiplier,
        efficiency_weight=config.efficiency_weight,
        silence_bonus=config.silence_bonus,
    )


def warn_of_rewards(config: TeacherEnvConfig) -> None:
    """Say so where the options pay for something else than teaching."""
    if config.teaching_reward_mode == "additive":
        log.warning("teaching_reward_mode=additive pays 1 for saying nothing: use it to compare, not to train")
    penalty, most = config.degradation_penalty_multiplier, 1 + config.efficiency_weight
    if config.teaching_reward_mode == "asymmetric" and penalty < most:
        log.warning(
            "degradation_penalty_multiplier=%g makes harm cost less than brief help of the same size pays, which is up to "
            "1 + efficiency_weight = %g times the change: give %g or more",
            penalty,
            most,
            most,
        )


def guarded(reward: float, lesson: Lesson, config: TeacherEnvConfig) -> float:
    """The reward after the leak guard."""
    return after_leak(reward, policy=config.leak_policy, cap=config.leak_cap) if lesson.is_leak else reward


async def judged(
    preparation: Preparation, lessons: Sequence[Lesson], config: TeacherEnvConfig, judges: Judges
) -> list[PaidLesson | None]:
    """Each lesson with the mean of what judges make of its attempts; None where they judged too few of them."""
    cases = [trajectory(preparation, lesson, attempt) for lesson in lessons for attempt in lesson.attempts]
    results = iter(await judges.score(cases))
    return [_paid_by(lesson, [next(results) for _ in lesson.attempts], config) for lesson in lessons]


def _paid_by(lesson: Lesson, results: Sequence[RIMResult], config: TeacherEnvConfig) -> PaidLesson | None:
    scored = [(result.score, result) for result in results if result.score is not None]
    if len(scored) < config.min_student_samples:
        return None
    reward = fmean(score for score, _ in scored)
    return PaidLesson(lesson, guarded(reward, lesson, config), details_of([result for _, result in scored]))


def details_of(results: Sequence[RIMResult]) -> dict[str, Any]:
    """Of judges' results: mean score by judge, the explanations of the first, how often the large judge was asked."""
    names = dict.fromkeys(name for result in results for name in result.judge_scores)
    return {
        "rim_rewards": {
            name: fmean(result.judge_scores[name] for result in results if name in result.judge_scores)
            for name in names
        },
        "rim_explanations": dict(results[0].explanations),
        "escalations": sum(result.escalations for result in results),
    }


def trajectory(preparation: Preparation, lesson: Lesson, attempt: Attempt) -> Trajectory:
    """What judges see of an attempt with guidance."""
    item = preparation.item
    return Trajectory(
        question=item.question,
        student_answer=attempt.answer,
        ground_truth=item.ground_truth or "",
        student_plan=preparation.diagnosis.approach,
        teacher_trace=lesson.guidance.teaching,
        student_trace=attempt.reply.text,
        student_baseline_answer=preparation.baseline[0].answer if preparation.baseline else "",
    )


async def judged_capability(judges: Judges, item: TeachingItem, approach: str) -> Capability:
    """What the diagnostic judge makes of an approach; UNKNOWN where it abstains, or is not asked because it failed lately."""
    case = Trajectory(
        question=item.question, student_answer=approach, ground_truth=item.ground_truth or "", student_plan=approach
    )
    try:
        [result] = await judges.score([case])
    # A diagnosis is no reward: without one the group is worth as much.
    except JudgesFailingError:
        return UNKNOWN
    [judge] = [one for one in result.structured_reward["judges"] if one["identifier"] == DIAGNOSTIC]
    return UNKNOWN if judge["score"] is None else capability_from_judge(judge["score"], judge["uncertainty"])


def relative_to_reference(paid: PaidLesson, reference: float) -> PaidLesson:
    """The same, paid what it is better than the reference teacher's guidance."""
    return replace(paid, reward=paid.reward - reference, details={**paid.details, "reference_reward": reference})


def evened(paid: Sequence[PaidLesson]) -> list[PaidLesson]:
    """The same, with rewards that differ by rounding alone made equal."""
    rewards = without_rounding([one.reward for one in paid])
    return [replace(one, reward=reward) for one, reward in zip(paid, rewards, strict=True)]
