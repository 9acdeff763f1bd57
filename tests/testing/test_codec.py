"""The mock's bytes are those of the byte tokenizer; the byte tokenizer is a tokenizer in every respect."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atroposlib.testing.byte_tokenizer import byte_tokenizer
from atroposlib.testing.mock.codec import SPECIAL_TOKENS, ByteCodec, TokenizerCodec

TOKENIZER = byte_tokenizer()
CODEC = ByteCodec()
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hié"}, {"type": "image_url"}]},
    {"role": "assistant", "content": "yes"},
    {"role": "tool", "content": "3"},
]
TEXTS = st.lists(st.one_of(st.text(st.characters(codec="utf-8")), st.sampled_from(SPECIAL_TOKENS))).map("".join)


@given(TEXTS)
def test_the_codec_and_the_tokenizer_have_the_same_ids(text: str) -> None:
    assert CODEC.encode(text) == TOKENIZER.encode(text, add_special_tokens=False)


@given(TEXTS)
def test_decoding_gives_the_text_back(text: str) -> None:
    assert CODEC.decode(CODEC.encode(text), keep_special=True) == text
    plain = text
    for special in SPECIAL_TOKENS:
        plain = plain.replace(special, "")
    if not any(special in plain for special in SPECIAL_TOKENS):
        assert CODEC.decode(CODEC.encode(text)) == plain


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_chats_are_rendered_alike(tools: Any) -> None:
    text = TOKENIZER.apply_chat_template(CHAT, tools=tools, tokenize=False, add_generation_prompt=True)

    assert CODEC.render(CHAT, tools) == TOKENIZER.encode(text, add_special_tokens=False)
    assert TokenizerCodec(TOKENIZER).decode(CODEC.render(CHAT, tools), keep_special=True) == text


def test_the_template_renders_tool_calls_and_marks_what_the_assistant_said() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}, CHAT[-1], CHAT[2]]

    encoded = TOKENIZER.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)

    said = [token for token, is_said in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if is_said]
    assert (
        TOKENIZER.decode(said) == '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>yes<|im_end|>'
    )


def test_the_tokenizer_has_the_special_tokens_that_environments_ask_for() -> None:
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # fmt: skip
    assert TOKENIZER.eos_token_id == CODEC.eos_id
    assert len(TOKENIZER) == CODEC.vocab_size
    assert TOKENIZER.decode([*TOKENIZER.encode("a"), 2], skip_special_tokens=True) == "a"
