"""Tool-call parsers: text in, calls out; a broken format is an error, never half a call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atroposlib.envs.server_handling.tool_parsers import (
    TOOL_PARSERS,
    FunctionCall,
    ParsedReply,
    ToolCallFormatError,
    register_tool_parser,
    tool_parser,
)
from atroposlib.errors import ConfigError

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "exact": {"type": "boolean"}, "note": {"type": "string"}},
            },
        },
    }
]

ONE = '{"a": 1}'
CASES = [
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', None, [("add", ONE)]),
    ("hermes", 'Well:<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "Well:", [("add", ONE)]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}', None, [("add", ONE)]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', None, [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("add", ONE)]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        None,
        [("f", "{}"), ("g", "{}")],
    ),
    ("hermes", "<think>I could <tool_call> it</think>no", "<think>I could <tool_call> it</think>no", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "</think>"}}</tool_call>', None, [("f", '{"x": "</think>"}')]),
    ("hermes", "plain", "plain", []),
    (
        "qwen3_coder",
        "So\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
        "<parameter=note>\n1\n\n2\n</parameter>\n</function>\n</tool_call>",
        "So\n",
        [("add", '{"a": 1, "exact": true, "note": "1\\n\\n2"}')],
    ),
    ("qwen3_coder", "<function=add><parameter=a>x</parameter></function>", None, [("add", '{"a": "x"}')]),
    ("qwen3_coder", "<function=now></function>", None, [("now", "{}")]),
    ("qwen3_coder", "plain", "plain", []),
    ("llama3_json", '{"name": "add", "parameters": {"a": 1}}', None, [("add", ONE)]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        None,
        [("f", "{}"), ("g", "{}")],
    ),
    ("llama4_json", '[{"name": "f", "parameters": {}}]', '[{"name": "f", "parameters": {}}]', []),
    ("llama3_json", '{"answer": 4}', '{"answer": 4}', []),
    ("llama3_json", 'I say {"name": "f"}', 'I say {"name": "f"}', []),
    (
        "llama4_pythonic",
        '<|python_start|>[add(a=1), go.now(x=[1, "b"], y=-2)]<|python_end|>',
        None,
        [("add", ONE), ("go.now", '{"x": [1, "b"], "y": -2}')],
    ),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "see f(1)", "see f(1)", []),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', None, [("f", "{}"), ("g", "{}")]),
    ("mistral", 'Hm.[TOOL_CALLS]add{"a": 1}[TOOL_CALLS]now{}', "Hm.", [("add", ONE), ("now", "{}")]),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]abc123xyz[ARGS]{"a": 1}', None, [("add", ONE)]),
    ("mistral", "plain", "plain", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_and_content(name: str, text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    reply = tool_parser(name)(text, TOOLS)

    assert reply == ParsedReply(content, [FunctionCall(*call) for call in calls])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": </tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"na</tool_call>'),
        ("qwen3_coder", "<function=add><parameter=a>1</function>"),
        ("qwen3_coder", "<tool_call><function="),
        ("llama3_json", '<|python_tag|>print("hi")'),
        ("llama3_json", '{"name": "f", "parameters": {'),
        ("pythonic", "[f(a=1), g(b=os.getcwd())]"),
        ("pythonic", "[f(1)]"),
        ("pythonic", "[f(**x)]"),
        ("pythonic", "[f(a=1e999)]"),
        ("pythonic", "[f(a={1})]"),
        ("pythonic", "[f(a=1)"),
        ("mistral", "[TOOL_CALLS]"),
        ("mistral", '[TOOL_CALLS][{"name": "f"'),
        ("mistral", "[TOOL_CALLS]add{a: 1}"),
    ],
)
def test_a_broken_format_is_refused_whole(name: str, text: str) -> None:
    with pytest.raises(ToolCallFormatError):
        tool_parser(name)(text, TOOLS)


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<function=f>", "<parameter=a>", "</parameter>", "</function>", "[TOOL_CALLS]",
     "<|python_tag|>", "{", "}", '{"name": "f", "arguments": {}}', '"', ":", "[", "]", "f(a=1)", ",", ";", " ", "</think>", "x\n"]
)  # fmt: skip


@pytest.mark.parametrize("name", TOOL_PARSERS)
@given(pieces=st.lists(PIECES, max_size=8))
@settings(deadline=None, max_examples=60)
def test_any_text_gives_calls_with_json_arguments_or_the_one_error(name: str, pieces: list[str]) -> None:
    try:
        reply = tool_parser(name)("".join(pieces), TOOLS)
    except ToolCallFormatError:
        return
    assert all(isinstance(json.loads(call.arguments), dict) and call.name for call in reply.calls)
    assert reply.calls or reply.content == "".join(pieces)


def test_an_unknown_parser_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no tool parser 'nope'; known: hermes, llama3_json"):
        tool_parser("nope")


def test_authors_can_add_a_format() -> None:
    register_tool_parser("shout", lambda text, tools: ParsedReply(None, [FunctionCall(text.lower(), "{}")]))

    assert tool_parser("shout")("NOW", ()).calls == [FunctionCall("now", "{}")]
