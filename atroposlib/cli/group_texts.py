"""From a group to training examples: texts, prefix and completions, and which of them are worth keeping."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atroposlib.errors import AtroposError
from atroposlib.type_definitions import MASKED

Group = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One sequence of a group: its score and what is written of it."""

    score: float
    prefix: str | None
    """None: the content is messages."""
    content: Any
    """The completion's text, or the messages."""


def candidates(group: Group, tokenizer: Any | None) -> list[Candidate]:
    """The sequences of a group, best first.

    Args:
        tokenizer: None: the messages are wanted, not the texts.
    Raises:
        AtroposError: messages are wanted and the environment sent none.
    """
    if tokenizer is None:
        messages = group.get("messages")
        if not messages:
            raise AtroposError("the groups hold no messages; start the environment with --include_messages true")
        made = [Candidate(score, None, content) for score, content in zip(group["scores"], messages, strict=True)]
    else:
        prefix, completions = split_texts(group, tokenizer)
        made = [Candidate(score, prefix, text) for score, text in zip(group["scores"], completions, strict=True)]
    return sorted(made, key=lambda candidate: candidate.score, reverse=True)


def split_texts(group: Group, tokenizer: Any) -> tuple[str, list[str]]:
    """Prefix and completions: the longest text that all sequences begin with, and what follows it.

    Where one of them would have no completion left (equal texts, a single sequence), the prefix is what is not trained.
    """
    texts = [tokenizer.decode(tokens) for tokens in group["tokens"]]
    prefix = common_prefix(texts)
    if any(len(text) == len(prefix) for text in texts):
        prompts = [
            tokenizer.decode(tokens[: prompt_length(labels)])
            for tokens, labels in zip(group["tokens"], group["masks"], strict=True)
        ]
        prefix = common_prefix([prefix, *prompts])
    return prefix, [text[len(prefix) :] for text in texts]


def common_prefix(texts: Sequence[str]) -> str:
    """The longest text that all begin with; empty for no texts."""
    if not texts:
        return ""
    # What the first and the last in order share, all in between share.
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def prompt_length(labels: Sequence[int]) -> int:
    """Tokens before the first that is trained."""
    return next((index for index, label in enumerate(labels) if label != MASKED), len(labels))


def sft_lines(
    group: Sequence[Candidate], *, top_n: int, minimum_diff: float, is_negative_allowed: bool
) -> list[dict[str, Any]]:
    """The best of a group, best first.

    Args:
        group: best first.
        minimum_diff: above 0: only scores that are more than this above the group's lowest.
        is_negative_allowed: scores of 0 and below count too.
    """
    if not group:
        return []
    lowest = group[-1].score
    kept = [
        candidate
        for candidate in group
        if (is_negative_allowed or candidate.score > 0)
        and (minimum_diff <= 0 or candidate.score - lowest > minimum_diff)
    ]
    return [
        {"messages": candidate.content, "score": candidate.score}
        if candidate.prefix is None
        else {"prefix": candidate.prefix, "completion": candidate.content, "score": candidate.score}
        for candidate in kept[:top_n]
    ]


def dpo_lines(
    group: Sequence[Candidate], *, n_pairs: int, minimum_diff: float, is_negative_allowed: bool, draw: random.Random
) -> list[dict[str, Any]]:
    """Pairs of a group: each of the best with one of the worst, drawn among those that are more than minimum_diff below it.

    Args:
        group: best first.
        is_negative_allowed: scores of 0 and below may be the better side.
    """
    lines = []
    worst = group[-n_pairs:] if n_pairs else []
    for best in group[:n_pairs]:
        below = [candidate for candidate in worst if candidate.score < best.score - minimum_diff]
        if below and (is_negative_allowed or best.score > 0):
            pair = {"pos": best.content, "score": best.score, "neg": draw.choice(below).content}
            lines.append(pair if best.prefix is None else {"prefix": best.prefix, **pair})
    return lines
