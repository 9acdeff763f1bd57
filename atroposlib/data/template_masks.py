"""Trained tokens by the chat template's own word: what it renders between `{% generation %}` and `{% endgeneration %}`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from atroposlib.data.turn_ends import end_tokens, is_closed
from atroposlib.type_definitions import MASKED, Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def has_generation_spans(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template says what the model generates. Only fast tokenizers can tell which tokens."""
    template = getattr(tokenizer, "chat_template", None)
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    return is_fast and isinstance(template, str) and _GENERATION.search(template) is not None


def tokens_and_masks(
    chat: Sequence[Message], tokenizer: Any, *, n_replies: int, last_only: bool
) -> tuple[list[int], list[int]] | None:
    """[T] ids of a chat and [T] masks by the template's spans, each with the special token that ends its turn.

    Args:
        n_replies: turns that are to be trained; where the template marks another number, the answer is None.
        last_only: train the last of them alone.
    """
    rendered = tokenizer.apply_chat_template(
        list(chat), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens = list(rendered["input_ids"])
    spans = _with_ends(_spans(rendered["assistant_masks"]), tokens, tokenizer)
    if len(spans) != n_replies:
        return None
    masks = [MASKED] * len(tokens)
    for start, stop in spans[-1:] if last_only else spans:
        masks[start:stop] = tokens[start:stop]
    return tokens, masks


def _spans(flags: Sequence[int]) -> list[tuple[int, int]]:
    edges = [0, *flags, 0]
    starts = [place for place in range(len(flags)) if edges[place + 1] and not edges[place]]
    stops = [place + 1 for place in range(len(flags)) if edges[place + 1] and not edges[place + 2]]
    return list(zip(starts, stops, strict=True))


def _with_ends(spans: list[tuple[int, int]], tokens: Sequence[int], tokenizer: Any) -> list[tuple[int, int]]:
    """Some templates close the span before the token that ends the turn; a model must learn to end."""
    ends = set(end_tokens(tokenizer).values())
    return [
        (start, stop + (stop < len(tokens) and tokens[stop] in ends and not is_closed(tokens[start:stop], tokenizer)))
        for start, stop in spans
    ]
