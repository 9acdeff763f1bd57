"""Supervised rows: five forms become chats, and of each the right tokens are trained."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.data.chats import as_messages, tokenized
from atroposlib.errors import ConfigError, DataError
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from atroposlib.type_definitions import MASKED

TOKENIZER = byte_tokenizer()
USER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}
CHAT = [USER, REPLY, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKER = "<|im_start|>assistant\n"


def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def trained(row: dict[str, Any], tokenizer: Any = TOKENIZER, **options: Any) -> str:
    text = tokenized(row, tokenizer, **options)
    assert len(text.masks) == len(text.tokens)
    assert all(mask in (MASKED, token) for mask, token in zip(text.masks, text.tokens, strict=True))
    return str(tokenizer.decode([text.tokens[position] for position in text.trained]))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REPLY]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [USER], "completion": [REPLY]},
        {"prefix": "a", "completion": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "", "output": "b", "text": "both"},
    ],
)
def test_the_forms_are_one_chat(row: dict[str, Any]) -> None:
    assert as_messages(row) == [USER, REPLY]


def test_what_the_forms_add() -> None:
    assert as_messages({"text": "t"}) == [{"role": "text", "content": "t"}]
    assert as_messages({"completion": "b"}) == [REPLY], "a prompt that is empty"
    assert as_messages({"instruction": "a", "input": "x", "output": "b"})[0]["content"] == "a\n\nx"
    speakers = [{"from": name, "value": "v"} for name in ("system", "human", "gpt", "observation")]
    assert [m["role"] for m in as_messages({"conversations": speakers})] == ["system", "user", "assistant", "tool"]
    calls: dict[str, Any] = {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}
    assert as_messages(calls) == calls["messages"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "columns none: expected"),
        ({"prompt": "a"}, "columns 'prompt': expected .*conversations"),
        ({"text": ""}, "expected"),
        ({"messages": []}, r"'messages' is \[\]"),
        ({"messages": "hi"}, "'messages' is 'hi'; expected a list"),
        ({"messages": ["a"]}, "message 0 of 'messages' is 'a'; expected role"),
        ({"messages": [{"role": "user"}]}, "content of message 0 of 'messages' is None"),
        ({"messages": [{"role": "user", "content": 3}]}, "is 3; expected text"),
        ({"conversations": [{"from": "martian", "value": "a"}]}, "from 'martian'; known are human"),
        ({"conversations": [{"from": ["a"], "value": "a"}]}, "turn 0"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "'value' of turn 0"),
        ({"conversations": 3}, "'conversations' is 3"),
        ({"prompt": 1, "completion": "b"}, "'prompt' is 1"),
        ({"prompt": "a", "completion": ""}, "'completion' is ''"),
        ({"prompt": "a", "completion": None}, "'completion' is None"),
        ({"instruction": "a", "output": 3}, "output 3; expected text"),
    ],
)
def test_a_row_of_no_form_says_what_was_expected(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        as_messages(row)


def test_every_turn_of_the_assistant_is_trained_with_its_end() -> None:
    for tokenizer in (TOKENIZER, with_template(PLAIN_TEMPLATE)):
        whole = trained({"messages": CHAT}, tokenizer)
        assert "".join(whole.split()) == "b<|im_end|>d<|im_end|>"
        assert trained({"messages": CHAT}, tokenizer, trains_all_turns=False).strip() == "d<|im_end|>"


def test_the_templates_own_spans_decide() -> None:
    # It drops earlier thinking, so that only its spans can tell what was generated.
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] if loop.last else message['content'].split('!')[-1] }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}<|im_end|>{% endfor %}"
    )
    chat = [USER, {"role": "assistant", "content": "x!y"}, USER, {"role": "assistant", "content": "x!z"}]

    assert trained({"messages": chat}, with_template(template)) == "y<|im_end|>x!z<|im_end|>", "with the ends"
    without_spans = with_template(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    with pytest.raises(ConfigError, match="renders the turns"):
        trained({"messages": chat}, without_spans)
    assert trained({"messages": chat}, without_spans, response_marker=MARKER) == "y<|im_end|>x!z<|im_end|>"


def test_a_span_that_ends_after_its_own_end_takes_no_more() -> None:
    # The span holds the newline after the end, and the next turn begins with the text's first special token.
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}<|im_end|>{{ '\\n' }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
    )
    with_padded_ends = template.replace("{{ '\\n' }}{% endgeneration %}", "{{ '\\n' }}{% endgeneration %}<|endoftext|>")

    for one in (template, with_padded_ends):
        assert trained({"messages": CHAT}, with_template(one)) == "b<|im_end|>\nd<|im_end|>\n"


@pytest.mark.parametrize("marker", [None, MARKER])
def test_a_chat_that_the_template_refuses_is_a_data_error(marker: str | None) -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}"
    joined = "{% for message in messages %}{{ 'x' + message['content'] }}{% endfor %}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, REPLY]

    with pytest.raises(DataError, match=r"refuses a chat of assistant, user, assistant: must begin.*mend the row"):
        tokenized({"messages": [REPLY, *CHAT[:2]]}, with_template(strict + PLAIN_TEMPLATE), response_marker=marker)
    with pytest.raises(DataError, match="refuses a chat of user, assistant: "):
        tokenized({"messages": parts}, with_template(joined), response_marker=marker)


def test_turns_of_other_names_are_trained_too() -> None:
    chat = [USER, {"role": "agent", "content": "b"}]

    assert trained({"messages": chat}).strip().endswith("b<|im_end|>"), "though the template marks only the assistant's"


def test_what_follows_the_last_reply_is_left_out() -> None:
    text = tokenized({"messages": [*CHAT, USER]}, TOKENIZER)

    assert text == tokenized({"messages": CHAT}, TOKENIZER)
    assert text.messages == CHAT
    with pytest.raises(DataError, match="a chat of user has nothing to train on"):
        tokenized({"messages": [USER]}, TOKENIZER)


def test_of_a_completion_its_own_text_is_trained() -> None:
    assert trained({"prompt": "a b", "completion": " c"}) == " c<|im_end|>"
    assert trained({"prompt": "a b", "completion": " c<|im_end|>"}) == " c<|im_end|>", "one end"
    assert tokenized({"prompt": "a", "completion": "c"}, TOKENIZER).messages is None
    assert "".join(trained({"prompt": [USER], "completion": [REPLY]}).split()) == "b<|im_end|>", (
        "chats use the template"
    )


def test_of_plain_text_everything_or_what_follows_the_marker_is_trained() -> None:
    row = {"text": "Q: x\nA: y<|im_end|>Q: z\nA: w"}

    assert trained({"text": "abc"}) == "abc<|im_end|>"
    assert trained({"text": "abc<|im_end|>"}) == "abc<|im_end|>", "one end"
    assert trained(row, response_marker="A: ") == "y<|im_end|>w<|im_end|>"
    assert trained(row, response_marker="A: ", trains_all_turns=False) == "w<|im_end|>"
    with pytest.raises(DataError, match="the response marker 'B:' is not in 'Q: x"):
        trained(row, response_marker="B:")


contents = st.text(alphabet="ab \n!<", min_size=1, max_size=8)


@given(st.lists(contents, min_size=1, max_size=4))
def test_masks_mark_exactly_the_replies(replies: list[str]) -> None:
    chat = [turn for reply in replies for turn in (USER, {"role": "assistant", "content": reply})]
    expected = "".join(f"{reply}<|im_end|>" for reply in replies)

    assert trained({"messages": chat}) == expected
    assert trained({"messages": chat}, response_marker=MARKER) == expected


@given(st.dictionaries(st.sampled_from(["messages", "prompt", "completion", "text", "conversations", "output"]), st.recursive(
    st.none() | st.text(max_size=3) | st.integers(), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value"]), inner), max_leaves=6)))  # fmt: skip
def test_garbage_is_a_chat_or_a_data_error(row: dict[str, Any]) -> None:
    try:
        messages = as_messages(row)
    except DataError:
        return
    assert messages
    assert all(isinstance(message["role"], str) for message in messages)
