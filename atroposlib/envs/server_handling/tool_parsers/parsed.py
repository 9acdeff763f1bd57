"""What every tool-call parser makes of a reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


class ToolCallFormatError(ValueError):
    """A reply begins a tool call and breaks its format: it is text then, not a call."""


@dataclass(frozen=True)
class FunctionCall:
    """One call as the model wrote it."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True)
class ParsedReply:
    """A reply taken apart."""

    content: str | None
    """What stands outside the calls; None: nothing does."""
    calls: list[FunctionCall]


Tools: TypeAlias = Sequence[Mapping[str, Any]]
ToolParser: TypeAlias = Callable[[str, Tools], ParsedReply]
"""From a reply's raw text, special tokens included, and the tools offered; raises ToolCallFormatError."""


def load_json(text: str) -> Any:
    """Parse JSON that a model wrote.

    Raises:
        ToolCallFormatError: it is not JSON, or nested beyond reason.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ToolCallFormatError(f"not JSON: {error}") from error


def function_call(value: Any) -> FunctionCall:
    """A call from an object `{"name", "arguments" or "parameters"}`; no arguments are an empty object.

    Raises:
        ToolCallFormatError: the name is missing, or the arguments are not an object.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ToolCallFormatError(f"a tool call needs a name: {value!r}")
    arguments = value.get("arguments", value.get("parameters"))
    return FunctionCall(name=value["name"], arguments=dump_arguments({} if arguments is None else arguments))


def dump_arguments(arguments: Any) -> str:
    """Arguments as a JSON object; a string that holds one stays as it is.

    Raises:
        ToolCallFormatError: they are not an object.
    """
    if isinstance(arguments, str) and isinstance(load_json(arguments), dict):
        return arguments
    if not isinstance(arguments, dict):
        raise ToolCallFormatError(f"tool call arguments must be an object: {arguments!r}")
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolCallFormatError(f"tool call arguments have no JSON: {error}") from error
    return text


def answer_start(text: str) -> int:
    """Where the thinking ends: a call that is only thought about is not made. 0 without a thought."""
    end = text.find("</think>")
    if end < 0:
        return 0
    # The prompt may have opened the thought. Within a call, though, it is an argument.
    is_opened = text.lstrip().startswith("<think>")
    is_outside = text.count("<tool_call>", 0, end) == text.count("</tool_call>", 0, end)
    return end if is_opened or is_outside else 0


def text_or_none(text: str) -> str | None:
    """The text, or None where it is only white space."""
    return text if text.strip() else None
