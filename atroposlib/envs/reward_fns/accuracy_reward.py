"""Pays for the right mathematical answer."""

from __future__ import annotations

from typing import Any

from atroposlib.envs.reward_fns.answers import THINK_END, boxed, golds
from atroposlib.envs.reward_fns.math_answers import is_right
from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction


@registry.register
class AccuracyReward(RewardFunction):
    r"""1.0 for the right answer, else 0.0. Needs `ground_truth` or `solution`: one for all, or a list.

    Args:
        tolerance: of numbers, absolute; whole numbers must be equal.
        split_on_think_tag: look only at what follows the last `</think>`.
        max_boxed_threshold: a reply with more `\boxed` than this is guessing, and earns 0.0.
    """

    def __init__(
        self, tolerance: float = 1e-6, split_on_think_tag: bool = True, max_boxed_threshold: int = 6, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.tolerance = tolerance
        self.split_on_think_tag = split_on_think_tag
        self.max_boxed_threshold = max_boxed_threshold

    def compute(
        self, completions: list[Any], solution: Any = None, ground_truth: Any = None, **kwargs: Any
    ) -> list[float]:
        """Compare each completion with its answer."""
        wanted = golds(solution, ground_truth, len(completions))
        return [
            self._score(self.get_content(completion), gold)
            for completion, gold in zip(completions, wanted, strict=True)
        ]

    def _score(self, text: str, gold: Any) -> float:
        answer = text.rpartition(THINK_END)[2] if self.split_on_think_tag else text
        if len(boxed(answer)) > self.max_boxed_threshold:
            return 0.0
        return float(is_right(gold, answer, tolerance=self.tolerance))


def accuracy_reward(
    completions: list[Any], solution: Any = None, ground_truth: Any = None, **kwargs: Any
) -> list[float]:
    """AccuracyReward with its defaults."""
    return AccuracyReward()(completions, solution=solution, ground_truth=ground_truth)
