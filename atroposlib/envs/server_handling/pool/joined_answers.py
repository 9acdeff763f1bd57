"""A request for many choices as several requests, and their answers as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_COUNTED = ("prompt_tokens", "completion_tokens", "total_tokens")


def split_n(n: int, at_most: int) -> list[int]:
    """Choices of each request: 20 in parts of at most 8 are 8, 8 and 4."""
    return [min(at_most, n - done) for done in range(0, n, at_most)]


def join_answers(answers: Sequence[Any]) -> Any:
    """One answer of the openai package's type: all choices, numbered anew, and the tokens of all."""
    choices = [choice for answer in answers for choice in answer.choices]
    for index, choice in enumerate(choices):
        choice.index = index
    joined = answers[0].model_copy(update={"choices": choices})
    usages = [answer.usage for answer in answers if getattr(answer, "usage", None) is not None]
    if usages:
        joined.usage = usages[0].model_copy(
            update={name: sum(getattr(usage, name) for usage in usages) for name in _COUNTED}
        )
    return joined
