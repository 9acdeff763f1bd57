"""What a guidance is paid: for the change of the student's score, for brevity, and not for giving the answer away."""

from __future__ import annotations

from typing import Literal, TypeAlias

from atroposlib.teaching.argument_types import check_number
from atroposlib.teaching.errors import TeachingValueError

RewardMode: TypeAlias = Literal["asymmetric", "outcome", "additive", "rim"]
LeakPolicy: TypeAlias = Literal["zero", "cap", "off"]

HALF_LENGTH = 100
"""Tokens of teaching at which half of the brevity bonus is left."""
ADDITIVE_LENGTH = 200
"""mode additive: tokens of teaching at which the bonus is gone."""
RIGHT_FROM = 0.5
"""mode outcome: a mean score from here on counts as right."""
SAME_WITHIN = 1e-6
"""Rewards this close are one reward."""


def compute_teaching_reward(
    baseline_score: float,
    enhanced_score: float,
    teaching_length: float,
    *,
    mode: RewardMode = "asymmetric",
    degradation_penalty_multiplier: float = 2.0,
    efficiency_weight: float = 1.0,
    silence_bonus: float = 0.0,
) -> float:
    """The reward of one guidance, from scores alone.

    Args:
        baseline_score: of the student without guidance, 0 to 1; NumPy's numbers will do, here and below.
        enhanced_score: with it.
        teaching_length: tokens of what the student was told.
        mode: asymmetric or additive; outcome needs answers (outcome_reward), rim needs judges.
        silence_bonus: asymmetric: paid, the shorter the more, where the student was right anyway.
    Raises:
        TypeError: an argument is no number; a bool is none.
        ValueError: a score outside 0 to 1, a negative length, or a mode that needs more than scores.
    """
    scores = {"baseline_score": baseline_score, "enhanced_score": enhanced_score}
    for name, value in {**scores, "teaching_length": teaching_length}.items():
        check_number(name, value)
    for name, value in scores.items():
        if not 0.0 <= value <= 1.0:
            raise TeachingValueError(f"{name}={value} must lie between 0 and 1")
    if not teaching_length >= 0:
        raise TeachingValueError(f"teaching_length={teaching_length} must not be negative")
    # NumPy's narrow numbers would round, and overflow: np.int8(120) + 100.
    baseline, enhanced, length = float(baseline_score), float(enhanced_score), float(teaching_length)
    if mode == "additive":
        return additive_reward(baseline, enhanced, length)
    if mode == "asymmetric":
        return asymmetric_reward(
            baseline,
            enhanced,
            length,
            penalty=degradation_penalty_multiplier,
            efficiency_weight=efficiency_weight,
            silence_bonus=silence_bonus,
        )
    raise TeachingValueError(f"teaching_reward_mode={mode} cannot be computed from scores and a length alone")


def asymmetric_reward(
    baseline: float,
    enhanced: float,
    length: float,
    *,
    penalty: float,
    efficiency_weight: float,
    silence_bonus: float = 0.0,
) -> float:
    """Harm costs `penalty` times the loss of score; help pays the gain, up to 1 + efficiency_weight times where it is brief.

    So with a penalty below 1 + efficiency_weight harm may cost less than help of the same size pays.
    Without a silence_bonus it ranges over [-penalty, 1 + efficiency_weight].
    """
    delta, brevity = enhanced - baseline, HALF_LENGTH / (HALF_LENGTH + length)
    if delta < 0:
        return -penalty * -delta
    return delta * (1 + efficiency_weight * brevity) + silence_bonus * baseline * brevity


def additive_reward(baseline: float, enhanced: float, length: float) -> float:
    """Pays 1 for saying nothing, whatever comes of it: for comparisons, not for training."""
    delta = enhanced - baseline
    return delta + max(0.0, 1 - length / ADDITIVE_LENGTH) - 2.0 * (delta < 0)


def outcome_reward(baseline: float, enhanced: float, *, baseline_length: float, enhanced_length: float) -> float:
    """By right and wrong alone, with a bonus where the taught answer is shorter.

    Args:
        baseline_length, enhanced_length: mean characters of the extracted answers.
    """
    was_right, is_right = baseline >= RIGHT_FROM, enhanced >= RIGHT_FROM
    saved = max(0.0, (baseline_length - enhanced_length) / baseline_length) if baseline_length > 0 else 0.0
    if is_right:
        return (0.0 if was_right else 1.0) + saved
    return -1.0 if was_right else 0.0


def after_leak(reward: float, *, policy: LeakPolicy, cap: float) -> float:
    """The reward of a guidance that gives the answer away; a penalty stays what it is.

    Args:
        cap: policy cap: the most that is left.
    """
    if policy == "off" or reward <= 0:
        return reward
    return 0.0 if policy == "zero" else min(reward, cap)


def without_rounding(rewards: list[float]) -> list[float]:
    """The same, but exactly equal where rounding is all that tells them apart, so that the group counts as one of no variance."""
    if rewards and max(rewards) - min(rewards) < SAME_WITHIN:
        return [rewards[0]] * len(rewards)
    return rewards
