"""Whether a solution ends in the right number. A module of its own, because worker processes import it."""

from __future__ import annotations

from atroposlib.envs.reward_fns.accuracy_reward import AccuracyReward


def grade(answer: str, text: str) -> float:
    r"""1.0 when the text ends in the right number, after `####` or in \boxed{}, else 0.0.

    Args:
        answer: the worked solution, which ends in `#### NUMBER`.
    Raises:
        RolloutError: math-verify could not tell in time.
    """
    return AccuracyReward()([text], ground_truth=answer)[0]
