"""Pays for reasoning that is laid out in steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction
from atroposlib.errors import ConfigError

PATTERN_WEIGHTS = {"numbered": 0.5, "list": 0.5, "bullets": 0.4, "transitions": 0.3}

_PATTERNS = {
    "numbered": re.compile(r"\bstep\s+\d+", re.IGNORECASE),
    "list": re.compile(r"^\s*\d+[.)]\s", re.MULTILINE),
    "bullets": re.compile(r"^\s*[-*\u2022]\s", re.MULTILINE),
    "transitions": re.compile(
        r"\b(?:first|firstly|second|secondly|third|thirdly|next|then|after that|finally|lastly|therefore|thus|hence|"
        r"because|consequently|as a result)\b",
        re.IGNORECASE,
    ),
}


@registry.register
class ReasoningStepsReward(RewardFunction):
    """base_score plus, for each kind of step mark, its weight times the share of min_steps that is there; at most 1.0.

    Args:
        min_words: a shorter reply earns 0.0.
        min_steps: marks of a kind that earn its whole weight.
        pattern_weights: weights by kind: numbered ("Step 1"), list ("1."), bullets, transitions ("then"); those not
            named keep their default.
    Raises:
        ConfigError: a kind is unknown.
    """

    def __init__(
        self,
        min_words: int = 10,
        min_steps: int = 3,
        base_score: float = 0.1,
        pattern_weights: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.min_words = min_words
        self.min_steps = min_steps
        self.base_score = base_score
        self.pattern_weights = {**PATTERN_WEIGHTS, **(pattern_weights or {})}
        if unknown := sorted(set(self.pattern_weights) - set(_PATTERNS)):
            raise ConfigError(f"unknown pattern_weights {unknown}; known: {', '.join(_PATTERNS)}")

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Count the marks."""
        return [self._score(self.get_content(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        if len(text.split()) < self.min_words:
            return 0.0
        marks = sum(
            min(1.0, len(_PATTERNS[kind].findall(text)) / self.min_steps) * weight
            for kind, weight in self.pattern_weights.items()
        )
        return min(1.0, self.base_score + marks)


def reasoning_steps_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """ReasoningStepsReward with its defaults."""
    return ReasoningStepsReward()(completions)
