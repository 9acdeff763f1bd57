"""A turn ends where a chat format ends it, whatever the tokenizer calls the end of a text."""

from __future__ import annotations

from typing import Any

import pytest

from atroposlib.data.chats import tokenized
from atroposlib.data.turn_ends import end_of_turn, end_tokens, is_closed
from atroposlib.testing.byte_tokenizer import byte_tokenizer

MARKER = "<|im_start|>assistant\n"
TEXT = (
    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    "<|im_start|>user\nsecret<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
)


class Special:
    """As much of a tokenizer as its special tokens."""

    def __init__(self, tokens: list[str], eos: str | None) -> None:
        self.all_special_tokens = tokens
        self.all_special_ids = list(range(len(tokens)))
        self.eos_token = eos
        self.eos_token_id = None if eos is None else tokens.index(eos)


def base_tokenizer() -> Any:
    """A base model's: its eos ends texts, while turns of a chat end with <|im_end|>."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_base_model_with_a_chat_format_trains_no_turn_of_the_user(form: str) -> None:
    tokenizer = base_tokenizer()
    turns = [("user", "a"), ("assistant", "b"), ("user", "secret"), ("assistant", "d")]
    chat = [{"role": role, "content": content} for role, content in turns]
    row = {"text": TEXT} if form == "text" else {"messages": chat}

    found = tokenized(row, tokenizer, response_marker=MARKER)

    assert tokenizer.decode([found.tokens[place] for place in found.trained]) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize(
    ("special", "eos", "text", "reply"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "b<|im_end|>\n<|im_start|>user", "b<|im_end|>"),
        (["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"], "<|eot_id|>", "<|python_tag|>x<|eom_id|>y",
         "<|python_tag|>x<|eom_id|>"),
        (["<s>", "</s>", "[INST]", "[TOOL_CALLS]"], "</s>", "[TOOL_CALLS]x</s>[INST]y", "[TOOL_CALLS]x</s>"),
        (["<s>", "</s>", "[INST]"], "</s>", "x[INST]y</s>", "x"),
        (["<|endoftext|>", "<|user|>", "<|assistant|>"], "<|endoftext|>", "x<|user|>y", "x<|user|>"),
        (["<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>"], "<|return|>",
         "<|channel|>final<|message|>x<|end|><|start|>user", "<|channel|>final<|message|>x<|end|>"),
        (["<|endoftext|>"], "<|endoftext|>", "x and y", "x and y"),
        ([], None, "x</s>", "x</s>"),
    ],
)  # fmt: skip
def test_a_reply_ends_with_the_token_that_closes_it(special: list[str], eos: str | None, text: str, reply: str) -> None:
    marker = "assistant\n"

    assert (marker + text)[len(marker) : end_of_turn(marker + text, len(marker), Special(special, eos))] == reply


def test_the_eos_closes_turns_whatever_its_name() -> None:
    assert end_tokens(Special(["<s>", "<|start|>"], "<|start|>")) == {"<|start|>": 1}
    assert end_tokens(object()) == {}


def test_blanks_may_follow_the_end() -> None:
    tokenizer = byte_tokenizer()

    assert is_closed(tokenizer.encode("a<|im_end|>\n"), tokenizer)
    assert not is_closed(tokenizer.encode("a<|im_end|>b"), tokenizer)
    assert not is_closed(tokenizer.encode("a"), tokenizer)
