"""Whether a solution ends in the right number. A module of its own, because worker processes import it."""

from __future__ import annotations

from atroposlib.data.answers import exact_match, marked_answer
from atroposlib.envs.reward_fns.accuracy_reward import AccuracyReward


def grade(answer: str, text: str) -> float:
    r"""1.0 when the text ends in the right number, after `####` or in \boxed{}, else 0.0.

    Args:
        answer: the worked solution, which ends in `#### NUMBER`.
    Raises:
        RolloutError: math-verify could not tell in time.
    """
    return AccuracyReward()([text], ground_truth=answer)[0]


def grade_bare(answer: str, text: str) -> float:
    r"""1.0 when the text ends in the right answer, after `Final Answer:` too: letter by letter, or as mathematics.

    Args:
        answer: the answer alone, which need not be a number.
    Raises:
        RolloutError: math-verify could not tell in time.
    """
    if exact_match(text, answer):
        return 1.0
    marked = marked_answer(text)
    return grade(answer, text if marked is None else f"#### {marked}")
