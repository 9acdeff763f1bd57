"""Pays for thinking before answering, and for an answer that contains the solution."""

from __future__ import annotations

import re
from typing import Any

from atroposlib.envs.reward_fns.answers import after_thinking, golds
from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction

_BLOCK = re.compile(r"<think>(.*?)</think>(.*)\Z", re.DOTALL | re.IGNORECASE)


def parse_reasoning_response(text: str) -> dict[str, str]:
    """Split a reply.

    Returns:
        {"thinking_content": inside the first thinking block, "response": what follows it}; without a block the
        thinking is "" and the response the whole text.
    """
    found = _BLOCK.search(text)
    if found is None:
        return {"thinking_content": "", "response": text.strip()}
    return {"thinking_content": found[1].strip(), "response": found[2].strip()}


@registry.register
class FormatReasoningReward(RewardFunction):
    """reward_value for a reply that thinks, closes its thinking and then responds; else 0.0.

    Args:
        require_thinking: the thinking must not be empty.
        require_response: something must follow the thinking.
        allow_multiple_thinking: more than one thinking block is fine.
    """

    def __init__(
        self,
        reward_value: float = 0.5,
        require_thinking: bool = True,
        require_response: bool = True,
        allow_multiple_thinking: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.reward_value = reward_value
        self.require_thinking = require_thinking
        self.require_response = require_response
        self.allow_multiple_thinking = allow_multiple_thinking

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Look at the shape of each reply."""
        return [
            self.reward_value if self._is_well_formed(self.get_content(completion)) else 0.0
            for completion in completions
        ]

    def _is_well_formed(self, text: str) -> bool:
        parts = parse_reasoning_response(text)
        if self.require_thinking and not parts["thinking_content"]:
            return False
        if self.require_response and not parts["response"]:
            return False
        return self.allow_multiple_thinking or text.lower().count("<think>") <= 1


@registry.register
class AccuracyXReward(RewardFunction):
    """reward_value when the text after the thinking contains the solution, else 0.0.

    Needs `ground_truth` or `solution`: one for all, or a list.

    Args:
        exact_match: the text must be the solution and nothing else.
    """

    def __init__(
        self, exact_match: bool = False, case_sensitive: bool = False, reward_value: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.exact_match = exact_match
        self.case_sensitive = case_sensitive
        self.reward_value = reward_value

    def compute(
        self, completions: list[Any], solution: Any = None, ground_truth: Any = None, **kwargs: Any
    ) -> list[float]:
        """Compare each completion with its solution."""
        wanted = golds(solution, ground_truth, len(completions))
        return [
            self.reward_value if self._is_right(self.get_content(completion), str(gold)) else 0.0
            for completion, gold in zip(completions, wanted, strict=True)
        ]

    def _is_right(self, text: str, gold: str) -> bool:
        answer, gold = after_thinking(text), gold.strip()
        if not gold:
            raise ValueError("the solution is empty, and every text contains it")
        if not self.case_sensitive:
            answer, gold = answer.lower(), gold.lower()
        return answer == gold if self.exact_match else gold in answer


@registry.register
class R1Reward(RewardFunction):
    """format_weight for a well-formed reply plus accuracy_weight for one that contains the solution."""

    def __init__(self, format_weight: float = 0.5, accuracy_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._format = FormatReasoningReward(reward_value=format_weight)
        self._accuracy = AccuracyXReward(reward_value=accuracy_weight)

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Add both up."""
        formats = self._format.compute(completions)
        accuracies = self._accuracy.compute(completions, **kwargs)
        return [one + other for one, other in zip(formats, accuracies, strict=True)]


def format_reasoning_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """FormatReasoningReward with its defaults."""
    return FormatReasoningReward()(completions)


def r1_reward(completions: list[Any], solution: Any = None, ground_truth: Any = None, **kwargs: Any) -> list[float]:
    """R1Reward with its defaults."""
    return R1Reward()(completions, solution=solution, ground_truth=ground_truth)
