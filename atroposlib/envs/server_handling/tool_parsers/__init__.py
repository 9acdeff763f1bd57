"""Tool-call parsers by name: pure functions on a reply's text."""

from __future__ import annotations

from collections.abc import Mapping

from atroposlib.envs.server_handling.tool_parsers.hermes import parse_hermes
from atroposlib.envs.server_handling.tool_parsers.llama import parse_llama_json, parse_llama_pythonic
from atroposlib.envs.server_handling.tool_parsers.mistral import parse_mistral
from atroposlib.envs.server_handling.tool_parsers.parsed import (
    FunctionCall,
    ParsedReply,
    ToolCallFormatError,
    ToolParser,
    Tools,
)
from atroposlib.envs.server_handling.tool_parsers.qwen_coder import parse_qwen_coder
from atroposlib.errors import ConfigError

__all__ = [
    "TOOL_PARSERS",
    "FunctionCall",
    "ParsedReply",
    "ToolCallFormatError",
    "ToolParser",
    "Tools",
    "register_tool_parser",
    "tool_parser",
]

TOOL_PARSERS: Mapping[str, ToolParser] = {
    "hermes": parse_hermes,
    "qwen3": parse_hermes,
    "qwen3_coder": parse_qwen_coder,
    "qwen3_xml": parse_qwen_coder,
    "llama3_json": parse_llama_json,
    "llama4_json": parse_llama_json,
    "llama4_pythonic": parse_llama_pythonic,
    "pythonic": parse_llama_pythonic,
    "mistral": parse_mistral,
}
"""Ours, under the names that vLLM gives them."""

_registered: dict[str, ToolParser] = {}


def register_tool_parser(name: str, parser: ToolParser) -> None:
    """Make a parser known under a name for `tool_parser=`; one of ours may be replaced."""
    _registered[name] = parser


def tool_parser(name: str) -> ToolParser:
    """The parser of that name.

    Raises:
        ConfigError: there is none.
    """
    known = {**TOOL_PARSERS, **_registered}
    if name not in known:
        raise ConfigError(
            f"there is no tool parser {name!r}; known: {', '.join(sorted(known))}; "
            "or add yours with tool_parsers.register_tool_parser(name, function)"
        )
    return known[name]
