"""Llama: JSON objects (3.x, 4), or a Python list of calls (3.2, 4). The whole reply is calls, or none of it is."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from atroposlib.envs.server_handling.tool_parsers.parsed import (
    FunctionCall,
    ParsedReply,
    ToolCallFormatError,
    Tools,
    dump_arguments,
    function_call,
)

_JSON_MARK = "<|python_tag|>"
_BETWEEN = re.compile(r"[\s;,]*")
_PYTHON_MARKS = re.compile(r"<\|python_(?:start|end|tag)\|>")
_CALLS = re.compile(r"\[\s*[A-Za-z_][\w.]*\s*\(")


def parse_llama_json(text: str, tools: Tools = ()) -> ParsedReply:
    """`{"name": ..., "parameters": {...}}`, several separated by semicolons, with or without `<|python_tag|>`."""
    body = text.strip()
    is_marked = body.startswith(_JSON_MARK)
    body = body.removeprefix(_JSON_MARK).strip()
    if not is_marked and not _begins_a_call(body):
        return ParsedReply(content=text, calls=[])
    calls = [function_call(value) for value in _objects(body)]
    if not calls:
        raise ToolCallFormatError("calls are announced and none follows")
    return ParsedReply(content=None, calls=calls)


def parse_llama_pythonic(text: str, tools: Tools = ()) -> ParsedReply:
    """`[first(a=1), second(b="x")]`; arguments are literals, by name."""
    body = _PYTHON_MARKS.sub("", text).strip()
    if not _CALLS.match(body):
        return ParsedReply(content=text, calls=[])
    try:
        tree = ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ToolCallFormatError(f"not a list of calls: {error}") from error
    if not isinstance(tree, ast.List):
        raise ToolCallFormatError("more than a list of calls")
    return ParsedReply(content=None, calls=[_python_call(element) for element in tree.elts])


def _begins_a_call(body: str) -> bool:
    """JSON without a name in its first object is an answer, not a call."""
    return body.startswith("{") and '"name"' in body


def _objects(body: str) -> list[Any]:
    decoder = json.JSONDecoder()
    values: list[Any] = []
    at = 0
    while at < len(body):
        try:
            value, at = decoder.raw_decode(body, at)
        except (ValueError, RecursionError) as error:
            raise ToolCallFormatError(f"not JSON: {error}") from error
        values += value if isinstance(value, list) else [value]
        between = _BETWEEN.match(body, at)
        at = between.end() if between else at
    return values


def _python_call(node: ast.expr) -> FunctionCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ToolCallFormatError("every element must be a call with named arguments")
    try:
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
        if len(arguments) != len(node.keywords):
            raise ToolCallFormatError("arguments must be named, each once")
        return FunctionCall(name=ast.unparse(node.func), arguments=dump_arguments(arguments))
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolCallFormatError(f"arguments must be literals: {error}") from error
