"""Which rows of supervised data the loader takes: chats, prompts with completions, or the lines of `atropos-sft-gen`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from atroposlib.data.chats import prompt_of
from atroposlib.errors import ConfigError
from atroposlib.utils.tokenize_for_trainer import UNMASKED_ROLES


def form_of(row: Mapping[str, Any]) -> str | None:
    """`chat` or `completion`, by the fields of a row; None when it is neither."""
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return "chat" if messages[-1]["role"] in UNMASKED_ROLES else None
    if isinstance(row.get("completion"), str) and row["completion"] and isinstance(prompt_of(row), str):
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


def prompt_key(row: Mapping[str, Any]) -> str:
    """What rows of one prompt have in common."""
    prompt = row["messages"][:-1] if form_of(row) == "chat" else prompt_of(row)
    return json.dumps(prompt or row, sort_keys=True, default=str)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()
