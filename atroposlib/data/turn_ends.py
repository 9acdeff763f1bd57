"""Where a turn ends: which special tokens close it, and which open the next one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

_INSIDE = re.compile(
    r"tool|python|channel|message|constrain|think|box|ref_|quad|vision|image|audio|video|fim|repo|file", re.I
)
"""Special tokens that replies hold: calls of tools, channels, places in pictures."""
_OPENING = re.compile(r"start|begin|header|bos|unk|mask|^\[inst|^<s>$", re.I)
"""Special tokens that a turn or a text begins with, or that stand for something else."""


def end_tokens(tokenizer: Any) -> dict[str, int]:
    """Id of each special token that closes a turn: the tokenizer's eos, and those that chat formats end turns with.

    The eos of a base model ends texts; its turns may end with another token.
    """
    ends = {
        token: id_ for token, id_ in _special(tokenizer) if not _INSIDE.search(token) and not _OPENING.search(token)
    }
    if getattr(tokenizer, "eos_token_id", None) is not None:
        ends[str(getattr(tokenizer, "eos_token", ""))] = tokenizer.eos_token_id
    return {token: id_ for token, id_ in ends.items() if token}


def end_of_turn(text: str, begin: int, tokenizer: Any) -> int:
    """Where the turn that begins at a character ends: after the token that closes it, else before one that opens a turn."""
    ends = end_tokens(tokenizer)
    openings = [token for token, _ in _special(tokenizer) if token not in ends and _OPENING.search(token)]
    boundaries = sorted([*ends, *openings], key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, boundaries))).search(text, begin) if boundaries else None
    if found is None:
        return len(text)
    return found.end() if found[0] in ends else found.start()


def is_closed(tokens: Sequence[int], tokenizer: Any) -> bool:
    """Whether the tokens of a turn end with one that closes it; blanks may follow."""
    ends = set(end_tokens(tokenizer).values())
    last = max((place for place, token in enumerate(tokens) if token in ends), default=-1)
    return last >= 0 and not tokenizer.decode(list(tokens[last + 1 :])).strip()


def _special(tokenizer: Any) -> Iterator[tuple[str, int]]:
    tokens = getattr(tokenizer, "all_special_tokens", None) or ()
    ids = getattr(tokenizer, "all_special_ids", None) or ()
    yield from zip(map(str, tokens), ids, strict=False)
