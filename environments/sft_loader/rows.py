"""Rows of supervised data as tokens and masks: chats, prompts with completions, or the lines of `atropos-sft-gen`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atroposlib.errors import ConfigError
from atroposlib.type_definitions import MASKED, Message
from atroposlib.utils.tokenize_for_trainer import UNMASKED_ROLES, tokenize_for_trainer


@dataclass(frozen=True)
class TrainedText:
    """What is trained on. T counts all tokens."""

    tokens: list[int]
    """[T]"""
    masks: list[int]
    """[T] the token's id where it is trained, else MASKED."""
    messages: list[Message] | None
    """The chat; None for plain text."""

    @property
    def trained(self) -> list[int]:
        """Positions of the trained tokens."""
        return [position for position, mask in enumerate(self.masks) if mask != MASKED]


def form_of(row: Mapping[str, Any]) -> str | None:
    """`chat` or `completion`, by the fields of a row; None when it is neither."""
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return "chat" if messages[-1]["role"] in UNMASKED_ROLES else None
    if isinstance(row.get("completion"), str) and row["completion"] and isinstance(_prompt(row), str):
        return "completion"
    return None


def check_rows(rows: list[dict[str, Any]], source: str) -> None:
    """Refuse data that cannot be trained on.

    Raises:
        ConfigError: names the first such row.
    """
    for number, row in enumerate(rows, start=1):
        if form_of(row) is None:
            raise ConfigError(
                f"{source}, row {number}: neither a chat nor a completion; write "
                '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]} '
                'or {"prompt": ..., "completion": ...}'
            )


def tokenized(row: Mapping[str, Any], tokenizer: Any, *, trains_all_turns: bool) -> TrainedText:
    """Tokens and masks of a row.

    Args:
        trains_all_turns: train every assistant's turn of a chat; else the last one alone.
    Raises:
        ConfigError: the tokenizer's chat template changes earlier turns when later ones follow.
    """
    if form_of(row) == "chat":
        chat = row["messages"]
        found = tokenize_for_trainer(tokenizer, chat, train_on_all_assistant_turns=trains_all_turns)
        return TrainedText(found["tokens"], found["masks"], chat)
    prompt = list(tokenizer.encode(_prompt(row), add_special_tokens=True))
    completion = list(tokenizer.encode(row["completion"], add_special_tokens=False))
    # Without its end the policy would learn to go on for ever.
    completion += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return TrainedText(prompt + completion, [MASKED] * len(prompt) + completion, None)


def prompt_key(row: Mapping[str, Any]) -> str:
    """What rows of one prompt have in common."""
    prompt = row["messages"][:-1] if form_of(row) == "chat" else _prompt(row)
    return json.dumps(prompt or row, sort_keys=True, default=str)


def _prompt(row: Mapping[str, Any]) -> Any:
    # `prefix` is what atropos-sft-gen writes.
    return row["prompt"] if "prompt" in row else row.get("prefix", "")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()
