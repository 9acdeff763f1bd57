"""Hermes and Qwen 2.5/3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, after the text."""

from __future__ import annotations

import re

from atroposlib.envs.server_handling.tool_parsers.parsed import (
    ParsedReply,
    Tools,
    answer_start,
    function_call,
    load_json,
    text_or_none,
)

OPEN = "<tool_call>"
# The last block may lack its end where that is the token that ended the reply.
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def parse_hermes(text: str, tools: Tools = ()) -> ParsedReply:
    """Calls in the order written; content is what stands before the first."""
    at = text.find(OPEN, answer_start(text))
    if at < 0:
        return ParsedReply(content=text, calls=[])
    calls = [function_call(load_json(block)) for block in _BLOCK.findall(text, at)]
    return ParsedReply(content=text_or_none(text[:at]), calls=calls)
