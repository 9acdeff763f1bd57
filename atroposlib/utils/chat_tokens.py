"""Token ids of chats, over whatever a tokenizer's chat template returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from atroposlib.errors import ConfigError


def as_messages(chat: Sequence[Any]) -> list[dict[str, Any]]:
    """A chat as a list of plain dicts; tuples of messages and messages stored as item pairs are taken too."""
    return [dict(message) for message in chat]


def chat_token_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
) -> list[int]:
    """[T] ids of the rendered chat.

    Raises:
        ConfigError: the template returned something other than one row of ids.
    """
    ids = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    # A tokenizer that wraps another may ignore return_dict; a processor returns a batch of one.
    if isinstance(ids, Mapping):
        ids = ids["input_ids"]
    if len(ids) == 1 and isinstance(ids[0], Sequence) and not isinstance(ids[0], str):
        ids = ids[0]
    row = list(ids)
    if not all(isinstance(token, int) for token in row):
        raise ConfigError(
            f"apply_chat_template of {type(tokenizer).__name__} returned {type(ids).__name__} of "
            f"{type(row[0]).__name__}, expected a list of token ids; pass a tokenizer that renders to ids"
        )
    return row


def shared_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
