"""A request for many choices as several requests, and their answers as one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_COUNTED = ("prompt_tokens", "completion_tokens", "total_tokens")


def split_n(n: int, at_most: int) -> list[int]:
    """Choices of each request: 20 in parts of at most 8 are 8, 8 and 4."""
    return [min(at_most, n - done) for done in range(0, n, at_most)]


async def all_or_none(requests: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Answers in order. The first failure cancels the other requests and is raised as it is."""
    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(request) for request in requests]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__
    return [task.result() for task in tasks]


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
