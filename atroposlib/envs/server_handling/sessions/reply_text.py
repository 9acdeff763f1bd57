"""The text of sampled tokens, with the token that ended the reply told apart from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from atroposlib.envs.server_handling.engines.samples import TokenCompletion


@dataclass(frozen=True)
class ReplyText:
    """A completion as text."""

    text: str
    terminator: str
    """Text of the special token that ended it, which `text` leaves out; empty where it was cut."""


def reply_text(tokenizer: Any, completion: TokenCompletion, *, keep_special: bool = False) -> ReplyText:
    """Decode a completion.

    Args:
        keep_special: leave special tokens in the text; the terminator is left out all the same.
    """
    terminator = _terminator(tokenizer, completion)
    body = completion.token_ids[:-1] if terminator else completion.token_ids
    return ReplyText(text=tokenizer.decode(body, skip_special_tokens=not keep_special), terminator=terminator)


def _terminator(tokenizer: Any, completion: TokenCompletion) -> str:
    last = completion.token_ids[-1:]
    if not last:
        return ""
    # A reply that was cut ends in an ordinary place, unless the limit fell on its very last token.
    if completion.finish_reason == "length" and last[0] != getattr(tokenizer, "eos_token_id", None):
        return ""
    return _special_text(tokenizer, last[0])


@lru_cache(maxsize=256)
def _special_text(tokenizer: Any, token_id: int) -> str:
    """The text of a special token; empty for an ordinary one. Few different tokens end replies: remembered."""
    if tokenizer.decode([token_id], skip_special_tokens=True):
        return ""
    text: str = tokenizer.decode([token_id], skip_special_tokens=False)
    return text
