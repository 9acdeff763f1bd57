"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, and since v11 `[TOOL_CALLS]name{...}` for each call."""

from __future__ import annotations

import re

from atroposlib.envs.server_handling.tool_parsers.parsed import (
    FunctionCall,
    ParsedReply,
    ToolCallFormatError,
    Tools,
    dump_arguments,
    function_call,
    load_json,
    text_or_none,
)

MARK = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(\{.*\})\s*\Z", re.DOTALL)


def parse_mistral(text: str, tools: Tools = ()) -> ParsedReply:
    """Calls in the order written; content is what stands before the first."""
    content, *parts = text.split(MARK)
    if not parts:
        return ParsedReply(content=text, calls=[])
    calls = [call for part in parts for call in _calls(part)]
    if not calls:
        raise ToolCallFormatError("calls are announced and none follows")
    return ParsedReply(content=text_or_none(content), calls=calls)


def _calls(part: str) -> list[FunctionCall]:
    if part.lstrip().startswith("["):
        return [function_call(value) for value in load_json(part)]
    named = _NAMED.match(part)
    if named is None:
        raise ToolCallFormatError(f"neither a list of calls nor name and arguments: {part[:80]!r}")
    name, arguments = named.groups()
    return [FunctionCall(name=name, arguments=dump_arguments(load_json(arguments)))]
