"""Pays for tags around the parts of a reply."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from atroposlib.envs.reward_fns.registry import registry
from atroposlib.envs.reward_fns.reward_function import RewardFunction


@registry.register
class FormatReward(RewardFunction):
    """1.0 for a reply with `<tag>...</tag>`, else 0.0.

    Args:
        preferred_tags: tag names; None: think and answer.
        require_all_tags: every tag must be there; else one is enough.
        case_sensitive: whether `<Think>` is another tag than `<think>`.
    """

    def __init__(
        self,
        preferred_tags: Sequence[str] | None = None,
        require_all_tags: bool = False,
        case_sensitive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.preferred_tags = list(preferred_tags or ("think", "answer"))
        self.require_all_tags = require_all_tags
        flags = re.DOTALL | (re.NOFLAG if case_sensitive else re.IGNORECASE)
        self._patterns = [
            re.compile(rf"<{re.escape(tag)}>.*?</{re.escape(tag)}>", flags) for tag in self.preferred_tags
        ]

    def compute(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """Look for the tags."""
        return [float(self._has_tags(self.get_content(completion))) for completion in completions]

    def _has_tags(self, text: str) -> bool:
        found = [pattern.search(text) is not None for pattern in self._patterns]
        return all(found) if self.require_all_tags else any(found)


def format_reward(completions: list[Any], preferred_tags: Sequence[str] | None = None, **kwargs: Any) -> list[float]:
    """FormatReward with its defaults."""
    return FormatReward(preferred_tags=preferred_tags)(completions)
