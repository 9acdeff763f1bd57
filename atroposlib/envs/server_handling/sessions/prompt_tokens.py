"""The token ids of a session's prompt: those of the sequence that it continues, as they are, and the new text's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from atroposlib.envs.server_handling.engines.prompts import served_tokenizer
from atroposlib.envs.server_handling.sessions.sequence_node import SequenceNode
from atroposlib.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What a reply is sampled from."""

    text: str
    is_chat: bool = False
    keep_special: bool = False
    """Special tokens stay in the reply's text: tool calls are made of them."""
    has_reply: bool = True
    """Whether it may continue a conversation; one without a reply is a fresh start."""
    prefill: str = ""
    """Tail of the text that belongs to the reply."""


def prompt_ids(tokenizer: Any, base: SequenceNode, prompt: Prompt) -> list[int]:
    """Ids to sample from.

    Args:
        base: the sequence that the prompt's text begins with; without tokens for a new one.
    """
    if not base.tokens:
        return _encode_whole(tokenizer, prompt)
    suffix = prompt.text[len(base.exact_text) :]
    return base.tokens + list(tokenizer.encode(suffix, add_special_tokens=False))


def _encode_whole(tokenizer: Any, prompt: Prompt) -> list[int]:
    bos = getattr(tokenizer, "bos_token", None)
    # Templates that write the BOS themselves must not get a second one.
    add_special = not (prompt.is_chat and bos and prompt.text.startswith(bos))
    ids: list[int] = tokenizer.encode(prompt.text, add_special_tokens=add_special)
    bos_id = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if len(ids) > 1 and bos_id is not None and ids[0] == ids[1] == bos_id else ids


def server_tokenizer(server: Any) -> Any:
    """The server's own tokenizer, else that of its model, else None with a warning."""
    try:
        if (tokenizer := getattr(server, "tokenizer", None)) is not None:
            return tokenizer
        if (config := getattr(server, "config", None)) is not None:
            return served_tokenizer(config)
        log.warning("%s names no model, so the session has no tokenizer", type(server).__name__)
    except ConfigError as error:
        log.warning("the session has no tokenizer: %s", error)
    return None
