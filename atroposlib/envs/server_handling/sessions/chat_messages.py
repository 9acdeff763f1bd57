"""Chat messages as authors pass them, brought into the one form that templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def plain_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Dicts all through: objects of the openai package are taken apart, their absent fields left out."""
    return [_plain_message(message) for message in messages]


def has_reply(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the conversation holds an assistant turn."""
    return any(message.get("role") == "assistant" for message in messages)


def with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A turn whose tool calls have objects as arguments: templates write those, and would quote a string."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [{**call, "function": _parsed(call["function"])} for call in calls]}


def _parsed(function: dict[str, Any]) -> dict[str, Any]:
    try:
        return {**function, "arguments": json.loads(function["arguments"])}
    except (KeyError, TypeError, ValueError):
        return function


def _plain_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        # A reply that is all tool calls has no content; templates read the field nevertheless.
        return {"content": "", **message.model_dump(exclude_none=True)}
    calls = message.get("tool_calls")
    if not calls or all(isinstance(call, dict) for call in calls):
        return dict(message)
    return {**message, "tool_calls": [call if isinstance(call, dict) else call.model_dump() for call in calls]}
