"""Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from atroposlib.envs.server_handling.tool_parsers.parsed import (
    FunctionCall,
    ParsedReply,
    ToolCallFormatError,
    Tools,
    answer_start,
    dump_arguments,
    text_or_none,
)

_START = re.compile(r"(?:<tool_call>\s*)?<function=")
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL)


def parse_qwen_coder(text: str, tools: Tools = ()) -> ParsedReply:
    """Calls in the order written; values get the types that the tools' schemas name, else stay text."""
    start = _START.search(text, answer_start(text))
    if start is None:
        return ParsedReply(content=text, calls=[])
    functions = _FUNCTION.findall(text, start.start())
    if not functions:
        raise ToolCallFormatError("a function is begun and not named")
    calls = [_call(name.strip(), body, _properties(name.strip(), tools)) for name, body in functions]
    return ParsedReply(content=text_or_none(text[: start.start()]), calls=calls)


def _call(name: str, body: str, properties: Mapping[str, Any]) -> FunctionCall:
    if body.count("<parameter=") != len(_PARAMETER.findall(body)):
        raise ToolCallFormatError(f"a parameter of {name!r} has no end")
    arguments = {
        key.strip(): _value(_without_frame(value), properties.get(key.strip()))
        for key, value in _PARAMETER.findall(body)
    }
    return FunctionCall(name=name, arguments=dump_arguments(arguments))


def _without_frame(value: str) -> str:
    """Without the line breaks that set the value off; those inside it stay."""
    return value.removeprefix("\n").removesuffix("\n")


def _properties(name: str, tools: Tools) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties: Mapping[str, Any] = (function.get("parameters") or {}).get("properties") or {}
            return properties
    return {}


def _value(text: str, schema: Any) -> Any:
    """As the schema's type says; a value that is not of its type stays text, for the tool to refuse."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind is None or kind == "string":
        return text
    try:
        return json.loads(text.lower() if kind == "boolean" else text)
    except (ValueError, RecursionError):
        return text
