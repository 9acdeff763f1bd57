"""Rows become tokens and masks; what is too long is cut or left out, and counted."""

from __future__ import annotations

import numpy as np
import pytest

from atroposlib.errors import DataError
from atroposlib.testing.byte_tokenizer import byte_tokenizer
from atroposlib.type_definitions import Message
from trainer.supervised.examples import Example, Row, Tokenize, prepare, row_tokenizer, with_completion
from trainer.supervised.span_scores import prompt_messages

TOKENIZER = byte_tokenizer()
CHAT: Row = {
    "messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
}
FORMS: list[Row] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"prompt": "hi", "completion": "hello"},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"instruction": "hi", "input": "", "output": "hello"},
]


def tokenize(
    *,
    completion_only: bool = True,
    last_turn_only: bool = False,
    marker: str | None = None,
    takes_prompts: bool = False,
) -> Tokenize:
    return row_tokenizer(
        TOKENIZER,
        completion_only=completion_only,
        last_turn_only=last_turn_only,
        response_marker=marker,
        takes_prompts=takes_prompts,
    )


def learnt(example: Example) -> str:
    return str(TOKENIZER.decode(example.tokens_L[example.is_trained_L].tolist()))


def one(row: Row, max_seq_length: int = 500, **options: bool) -> Example:
    (example,), _ = prepare([row], tokenize(**options), max_seq_length=max_seq_length)  # type: ignore[arg-type]
    return example


@pytest.mark.parametrize("row", FORMS, ids=["messages", "completion", "conversations", "instruction"])
def test_of_every_form_the_reply_and_its_end_are_learnt(row: Row) -> None:
    assert learnt(one(row)) == "hello<|im_end|>"


def test_plain_text_is_learnt_whole_but_for_its_first_token() -> None:
    assert learnt(one({"text": "hello"})) == "ello<|im_end|>"


def test_every_turn_or_the_last() -> None:
    assert learnt(one(CHAT)) == "1<|im_end|>2<|im_end|>"
    assert learnt(one(CHAT, last_turn_only=True)) == "2<|im_end|>"


def test_without_completion_only_every_token_is_learnt() -> None:
    example = one(CHAT, completion_only=False)

    assert example.is_trained_L.tolist() == [False] + [True] * (len(example.tokens_L) - 1)


def test_the_prompt_is_what_stands_before_the_last_learnt_run() -> None:
    example = one(CHAT)

    assert TOKENIZER.decode(example.prompt.tolist()).endswith("two<|im_end|>\n<|im_start|>assistant\n")


def test_long_examples_lose_their_end_and_are_counted() -> None:
    long = {"prompt": "a", "completion": "b" * 50}
    examples, counts = prepare([long, FORMS[1]], tokenize(), max_seq_length=20)

    assert [len(example.tokens_L) for example in examples] == [20, len("hi" + "hello") + 1]
    assert (counts.rows, counts.truncated, counts.prompt_too_long) == (2, 1, 0)


def test_a_prompt_that_is_too_long_by_itself_leaves_the_row_out() -> None:
    examples, counts = prepare([{"prompt": "a" * 30, "completion": "b"}, FORMS[1]], tokenize(), max_seq_length=20)

    assert len(examples) == 1
    assert counts.prompt_too_long == 1
    assert "too long" in str(counts)


def test_no_row_at_all_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match=r"not one row .* the prompt alone is too long.*max_seq_length=20"):
        prepare([{"prompt": "a" * 30, "completion": "b"}], tokenize(), max_seq_length=20)


def test_a_malformed_row_is_named() -> None:
    with pytest.raises(DataError, match="row 1 of the data set"):
        prepare([FORMS[0], {"question": "?"}], tokenize(), max_seq_length=20)


def test_rows_without_a_reply_are_taken_where_somebody_samples_it() -> None:
    row = {"prompt": "hi", "ground_truth": "x"}
    (example,), counts = prepare([row], tokenize(takes_prompts=True), max_seq_length=50, takes_prompts=True)

    assert example.trained_tokens == 0
    assert TOKENIZER.decode(example.prompt.tolist()).endswith("<|im_start|>assistant\n")
    assert counts.nothing_to_train == 0
    with pytest.raises(DataError, match="row 0"):
        prepare([row], tokenize(), max_seq_length=50)


def test_another_completion_takes_the_place_of_the_last() -> None:
    example = with_completion(one(CHAT), [50, 2], is_sampled=True)

    assert example.tokens_L[-2:].tolist() == [50, 2]
    assert example.is_trained_L.sum() == 2
    assert np.array_equal(example.prompt, one(CHAT).prompt)
    assert example.is_sampled


def test_a_chat_that_is_cut_ends_with_the_reply_that_is_left() -> None:
    whole = one(CHAT)
    within_the_second_question = len(one({"messages": CHAT["messages"][:2]}).tokens_L) + 5

    example = one(CHAT, max_seq_length=within_the_second_question)

    assert len(whole.messages or ()) == 4
    assert list(example.messages or ()) == CHAT["messages"][:2]
    assert prompt_messages(example) == CHAT["messages"][:1]


def test_a_reply_that_is_cut_itself_stays_in_the_chat() -> None:
    example = one(CHAT, max_seq_length=len(one(CHAT).tokens_L) - 2)

    assert list(example.messages or ()) == CHAT["messages"]


@pytest.mark.parametrize("role", ["assistant", "agent"])
def test_the_reply_of_no_trained_role_stands_in_the_prompt(role: str) -> None:
    messages: list[Message] = [{"role": "user", "content": "hi"}, {"role": role, "content": "hello"}]

    assert prompt_messages(Example(np.array([1, 2]), np.array([False, True]), messages)) == messages[:1]


def test_a_prompt_that_the_template_refuses_names_its_row() -> None:
    plain = byte_tokenizer()
    plain.chat_template = None
    tokenize = row_tokenizer(
        plain, completion_only=True, last_turn_only=False, response_marker=None, takes_prompts=True
    )

    with pytest.raises(DataError, match="row 0 of the data set: a prompt of user cannot be rendered"):
        prepare([{"prompt": "hi"}], tokenize, max_seq_length=50, takes_prompts=True)
