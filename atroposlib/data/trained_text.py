"""TrainedText: tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atroposlib.type_definitions import MASKED, Message


@dataclass(frozen=True)
class TrainedText:
    """What is trained on. T counts all tokens."""

    tokens: list[int]
    """[T]"""
    masks: list[int]
    """[T] the token's id where it is trained, else MASKED."""
    messages: list[Message] | None
    """The chat; None for plain text."""

    @property
    def trained(self) -> list[int]:
        """Positions of the trained tokens."""
        return [position for position, mask in enumerate(self.masks) if mask != MASKED]

    @classmethod
    def after_prompt(cls, prompt: Sequence[int], completion: Sequence[int]) -> TrainedText:
        """Plain text of which the completion is trained."""
        return cls([*prompt, *completion], [MASKED] * len(prompt) + list(completion), None)
