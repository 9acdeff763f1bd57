"""Pays for crossword answers that are written as such."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction

FORMAT_PATTERNS = (
    r"\b\d+\s*[-.]?\s*(?:across|down|[AD])\b\s*[:.)-]\s*(\S+)",
    r"\b(?:across|down)\s+\d+\s*[:.)-]\s*(\S+)",
)
"""`1-Across: WORD`, `3D: WORD`, `Down 3: WORD`. Group 1 of each is the word."""


@registry.register
class CrosswordFormatReward(RewardFunction):
    """reward_value for a reply that answers at least one clue in the right form, else 0.0.

    Args:
        format_patterns: regular expressions, case ignored; group 1 is the word; None: `1-Across: WORD` and the like.
        penalize_invalid_chars: a word with a character outside valid_chars makes the reply earn 0.0.
        valid_chars: the letters of the grid, case ignored.
    """

    def __init__(
        self,
        format_patterns: Sequence[str] | None = None,
        reward_value: float = 1.0,
        penalize_invalid_chars: bool = True,
        valid_chars: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._patterns = [re.compile(pattern, re.IGNORECASE) for pattern in format_patterns or FORMAT_PATTERNS]
        self.reward_value = reward_value
        self.penalize_invalid_chars = penalize_invalid_chars
        self.valid_chars = set(valid_chars.upper())

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Look for answers."""
        return [
            self.reward_value if self._is_well_formed(self.get_content(completion)) else 0.0
            for completion in completions
        ]

    def _is_well_formed(self, text: str) -> bool:
        # A pattern of the author's may have no group: then all that matched is the word.
        found = [match for pattern in self._patterns for match in pattern.finditer(text)]
        words = [(match[1] if match.re.groups else match[0]).rstrip(".,;") for match in found]
        if not words:
            return False
        return not self.penalize_invalid_chars or all(set(word.upper()) <= self.valid_chars for word in words)


def crossword_format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """CrosswordFormatReward with its defaults."""
    return CrosswordFormatReward()(completions)
