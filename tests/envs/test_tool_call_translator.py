"""Tool calls there and back again."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.envs.server_handling.tool_call_translator import VLLM_AVAILABLE, ToolCallTranslator, call_as_dict
from atroposlib.errors import ConfigError

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
RAW = 'Well.\n<tool_call>\n{"name": "add",  "arguments": {"a": 1}}\n</tool_call>'
CALL = {"id": "nobody-knows", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture
def translator(tokenizer: Any) -> ToolCallTranslator:
    return ToolCallTranslator(tokenizer)


def test_a_call_remembers_the_text_it_came_from(translator: ToolCallTranslator) -> None:
    content, calls, finish_reason = translator.parse_model_output(RAW, tools=TOOLS)

    assert (content, finish_reason) == ("Well.\n", "tool_calls")
    assert calls is not None
    assert (calls[0].function.name, calls[0].function.arguments) == ("add", '{"a": 1}')
    assert translator.call_id_to_raw_text == {calls[0].id: RAW}
    assert translator.reconstruct_raw_text_from_tool_calls([call_as_dict(calls[0])]) == RAW
    assert translator.convert_messages_for_template(
        [{"role": "assistant", "content": "Well.\n", "tool_calls": [call_as_dict(calls[0])]}]
    ) == [{"role": "assistant", "content": RAW}]


@pytest.mark.parametrize(("tool_choice", "tools"), [("none", TOOLS), (None, None), ("auto", [])])
def test_without_tools_the_text_is_left_alone(
    translator: ToolCallTranslator, tool_choice: str | None, tools: Any
) -> None:
    assert translator.parse_model_output(RAW, tool_choice=tool_choice, tools=tools) == (RAW, None, "stop")


def test_a_broken_call_stays_text_and_is_counted(translator: ToolCallTranslator) -> None:
    raw = '<tool_call>{"name": "add", </tool_call>'

    assert translator.parse_model_output(raw, tools=TOOLS) == (raw, None, "stop")
    assert translator.broken_replies == 1


def test_a_call_that_nobody_sampled_becomes_hermes_text(translator: ToolCallTranslator) -> None:
    line = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

    assert translator.reconstruct_raw_text_from_tool_calls([CALL, CALL]) == f"{line}\n{line}"
    assert translator.reconstruct_raw_text_from_tool_calls([]) == ""
    assert translator.convert_messages_for_template(
        [{"role": "assistant", "content": "Hm.", "tool_calls": [CALL]}]
    ) == [{"role": "assistant", "content": f"Hm.\n{line}"}]


def test_such_a_call_of_another_model_is_left_to_its_template(tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]

    [message] = ToolCallTranslator(tokenizer, "mistral").convert_messages_for_template(messages)

    # As an object: a template would quote a string.
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_other_turns_are_unchanged(translator: ToolCallTranslator) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "1", "content": "2"}]

    assert translator.convert_messages_for_template(messages) == messages


def test_mistral_ids_are_as_its_templates_want_them(tokenizer: Any) -> None:
    _, calls, _ = ToolCallTranslator(tokenizer, "mistral").parse_model_output("[TOOL_CALLS]add{}", tools=TOOLS)

    assert calls is not None
    assert len(calls[0].id) == 9
    assert calls[0].id.isalnum()


def test_special_tokens_stay_in_the_text_only_with_tools(translator: ToolCallTranslator, tokenizer: Any) -> None:
    ids = tokenizer.encode("a<|im_end|>", add_special_tokens=False)

    assert translator.decode_with_tool_awareness(ids) == "a"
    assert translator.decode_with_tool_awareness(ids, has_tools=True) == "a<|im_end|>"


def test_an_unknown_format_is_refused_at_once(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no tool parser"):
        ToolCallTranslator(tokenizer, "nope")


def test_the_flag_says_whether_vllm_is_here() -> None:
    assert isinstance(VLLM_AVAILABLE, bool)
