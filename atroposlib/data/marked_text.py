"""Trained spans of plain text: what follows a marker, such as the header that a chat template puts before a reply."""

from __future__ import annotations

from typing import Any

from atroposlib.data.trained_text import TrainedText
from atroposlib.data.turn_ends import end_of_turn
from atroposlib.errors import DataError
from atroposlib.type_definitions import MASKED
from atroposlib.utils.chat_tokens import shared_prefix_length


def trained_after_markers(text: str, tokenizer: Any, marker: str, *, all_markers: bool) -> TrainedText:
    """Tokens of a text of which the replies are trained, each from its marker to the end-of-turn token or the text's end.

    Args:
        text: as the model shall see it, special tokens written out.
        marker: what stands right before each reply.
        all_markers: train every reply; else the last one alone.
    Raises:
        DataError: the marker is empty, or not in the text.
    """
    spans = _reply_spans(text, marker, tokenizer)
    tokens = _encoded(tokenizer, text)
    masks = [MASKED] * len(tokens)
    for begin, end in spans if all_markers else spans[-1:]:
        start = shared_prefix_length(_encoded(tokenizer, text[:begin]), tokens)
        stop = len(tokens) if end == len(text) else shared_prefix_length(_encoded(tokenizer, text[:end]), tokens)
        masks[start:stop] = tokens[start:stop]
    return TrainedText(tokens, masks, None)


def _reply_spans(text: str, marker: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where each reply begins and ends among the characters."""
    if not marker or marker not in text:
        raise DataError(f"the response marker {marker!r} is not in {text[:80]!r}; give the text before each reply")
    spans: list[tuple[int, int]] = []
    found = text.find(marker)
    while found >= 0:
        begin = found + len(marker)
        end = end_of_turn(text, begin, tokenizer)
        spans.append((begin, end))
        # What a reply quotes of the marker is a part of the reply.
        found = text.find(marker, end)
    return spans


def _encoded(tokenizer: Any, text: str) -> list[int]:
    # A rendered chat begins with the template's own first token.
    first = getattr(tokenizer, "bos_token", None)
    return list(tokenizer.encode(text, add_special_tokens=not (first and text.startswith(first))))
