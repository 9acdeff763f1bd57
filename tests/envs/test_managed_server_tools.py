"""Sessions with tools: calls for the author, raw text and exact tokens for the trainer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atroposlib.envs.server_handling.managed_server import ManagedServer
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from tests.envs.session_fakes import ScriptedServer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
USER = {"role": "user", "content": "1 + 1?"}
# Two spaces: what a template would write again from the parsed call differs.
CALL = '<tool_call>\n{"name": "add",  "arguments": {"a": 1}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def session_that_says(tokenizer: Any, *replies: str, tool_parser: str | None = "hermes") -> ManagedServer:
    server = ScriptedServer(tokenizer, lambda prompt, index: replies[len(server.requests) - 1])
    return ManagedServer(server, tokenizer, tool_parser=tool_parser)


async def test_calls_are_plain_dicts_and_the_node_holds_the_raw_text(tokenizer: Any) -> None:
    session = session_that_says(tokenizer, f"Let me see.{CALL}")

    answer = await session.chat_completion(messages=[USER], tools=TOOLS)

    [choice], [node] = answer.choices, session.get_state()["nodes"]
    [call] = choice.message.tool_calls or []
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}  # type: ignore[index]
    assert call["type"] == "function"  # type: ignore[index]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    assert node.full_text.endswith(CALL)
    assert tokenizer.decode(node.completion_ids) == f"Let me see.{CALL}<|im_end|>"
    assert json.loads(answer.model_dump_json())["choices"][0]["message"]["tool_calls"] == [call]


@pytest.mark.parametrize("as_object", [False, True], ids=["dict", "object"])
async def test_the_answer_of_a_tool_extends_the_sampled_tokens(tokenizer: Any, as_object: bool) -> None:
    session = session_that_says(tokenizer, CALL, "2")
    first = await session.chat_completion(messages=[USER], tools=TOOLS)
    message = first.choices[0].message
    calls: Any = message.tool_calls

    await session.chat_completion(
        messages=[
            USER,
            message if as_object else {"role": "assistant", "content": message.content, "tool_calls": calls},
            {"role": "tool", "tool_call_id": calls[0]["id"], "content": "two"},
        ],
        tools=TOOLS,
    )

    [node] = session.get_state()["nodes"]
    assert tokenizer.decode(node.completion_ids) == f"{CALL}<|im_end|>2<|im_end|>"
    assert "<|im_start|>tool\ntwo<|im_end|>" in node.full_text
    assert node.full_text.count("<|im_start|>system") == 1
    assert session.segments_restarted == 0


async def test_a_broken_call_stays_content_and_is_counted(tokenizer: Any) -> None:
    broken = '<tool_call>{"name": </tool_call>'
    session = session_that_says(tokenizer, broken)

    answer = await session.chat_completion(messages=[USER], tools=TOOLS)

    [choice] = answer.choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (broken, None, "stop")
    assert session.broken_tool_calls == 1


@pytest.mark.parametrize(("max_tokens", "n_calls"), [(len(CALL), 1), (20, 0)])
async def test_a_reply_that_was_cut_says_so(tokenizer: Any, max_tokens: int, n_calls: int) -> None:
    session = session_that_says(tokenizer, f"{CALL} and more")

    answer = await session.chat_completion(messages=[USER], tools=TOOLS, max_tokens=max_tokens)

    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].message.tool_calls or []) == n_calls


async def test_without_a_parser_tools_are_ignored_with_a_warning(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session = session_that_says(tokenizer, CALL, tool_parser=None)

    answer = await session.chat_completion(messages=[USER], tools=TOOLS, tool_choice="auto")

    assert answer.choices[0].message.content == CALL
    assert "tools are ignored" in caplog.text
    assert "tools" not in session.server.requests[0]
    assert "<|im_start|>system" not in session.server.requests[0]["prompt"]


async def test_tool_choice_none_offers_the_tools_and_parses_nothing(tokenizer: Any) -> None:
    session = session_that_says(tokenizer, CALL)

    answer = await session.chat_completion(messages=[USER], tools=TOOLS, tool_choice="none")

    assert (answer.choices[0].message.content, answer.choices[0].message.tool_calls) == (CALL, None)
    assert "<|im_start|>system" in session.server.requests[0]["prompt"]


async def test_several_choices_are_parsed_each_for_itself(tokenizer: Any) -> None:
    server = ScriptedServer(tokenizer, lambda prompt, index: CALL if index else "no need")
    session = ManagedServer(server, tokenizer, tool_parser="hermes")

    answer = await session.chat_completion(messages=[USER], tools=TOOLS, n=2)

    assert [choice.finish_reason for choice in answer.choices] == ["stop", "tool_calls"]
    assert [node.full_text.endswith(CALL) for node in session.get_state()["nodes"]] == [False, True]


async def test_a_template_that_insists_on_seeing_the_calls_costs_a_segment_not_the_rollout() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
        "<|im_start|>{{ message.role }}\n{% if message.tool_calls %}[TOOL_CALLS]{{ message.tool_calls[0].function | tojson }}"
        "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    replies = iter(['[TOOL_CALLS]add{"a": 1}', "2"])
    session = ManagedServer(ScriptedServer(tokenizer, lambda *_: next(replies)), tokenizer, tool_parser="mistral")
    first = await session.chat_completion(messages=[USER], tools=TOOLS)
    calls: Any = first.choices[0].message.tool_calls

    await session.chat_completion(
        messages=[USER, first.choices[0].message, {"role": "tool", "tool_call_id": calls[0]["id"], "content": "2"}],
        tools=TOOLS,
    )

    before, after = session.get_state()["nodes"]
    assert '[TOOL_CALLS]{"name": "add", "arguments": {"a": 1}}' in after.full_text
    assert tokenizer.decode(before.completion_ids) == '[TOOL_CALLS]add{"a": 1}<|im_end|>'
    assert session.segments_restarted == 1
