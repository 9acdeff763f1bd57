"""Reads the tool call that a model wrote as JSON between tags."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

ERROR_NAME = "-ERROR-"
DEFAULT_TAGS = ("tool_call", "function_call", "tool", "function")


def extract_tool_call(text: str, preferred_tags: Sequence[str] | None = None) -> str | None:
    """What stands in the first of the tags that occurs, in the order of the tags; None without one.

    Args:
        preferred_tags: tag names, tried before the usual ones.
    """
    for tag in (*(preferred_tags or ()), *DEFAULT_TAGS):
        found = re.search(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL | re.IGNORECASE)
        if found:
            return found.group(1).strip()
    return None


def parse_tool_call(
    response: str,
    available_tools: Sequence[Mapping[str, Any]] | None = None,
    preferred_tags: Sequence[str] | None = None,
) -> tuple[str, dict[str, Any], bool]:
    """Name and arguments of the tool that a reply calls.

    Args:
        available_tools: OpenAI tool descriptions; a call of another tool is an error. None or empty: any name.
        preferred_tags: as in extract_tool_call.
    Returns:
        (name, arguments, False), or ("-ERROR-", {}, True) for a reply without a call that can be read.
    """
    error: tuple[str, dict[str, Any], bool] = (ERROR_NAME, {}, True)
    written = extract_tool_call(response, preferred_tags)
    call = None if written is None else _read_object(written)
    if call is None:
        return error
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _read_object(arguments)
    names = {_name_of(tool) for tool in available_tools or ()}
    if not isinstance(name, str) or not isinstance(arguments, dict) or (names and name not in names):
        return error
    return name, arguments, False


def _read_object(text: str) -> dict[str, Any] | None:
    """A JSON object; failing that a Python one; failing that JSON with its quotes mended."""
    for read in (json.loads, ast.literal_eval, lambda written: json.loads(written.replace("'", '"'))):
        try:
            value = read(text)
        # literal_eval raises each of these on some text that is no literal.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _name_of(tool: Mapping[str, Any]) -> Any:
    return (tool.get("function") or tool).get("name")
