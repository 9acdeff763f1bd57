"""One generation, whatever the wire: what is asked, what comes out, which weight version sampled each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any


@dataclass(frozen=True)
class Generation:
    """What a client asks for."""

    prompt_ids: list[int]
    n: int = 1
    max_tokens: int | None = None
    is_greedy: bool = False
    seed: int | None = None
    stop: tuple[str, ...] = ()
    messages: list[dict[str, Any]] | None = None


@dataclass
class Choice:
    """One completion."""

    index: int
    token_ids: list[int]
    """The terminator included, where there is one."""
    logprobs: list[float]
    """Nats; as many as token_ids unless the fault misalign struck."""
    finish_reason: str
    """stop, length, abort."""
    spans: list[dict[str, Any]] = field(default_factory=list)
    """`{version, start, end}` over token_ids."""


@dataclass
class Outcome:
    """What a generation gave, or the fault that struck it."""

    choices: list[Choice]
    fault: str | None = None


def mock_logprobs(n_tokens: int) -> list[float]:
    """Nats: -0.25, -0.5, ... -2.0, and again from the start."""
    return [-0.25 * (1 + position % 8) for position in range(n_tokens)]


def prompt_logprobs(token_ids: Sequence[int], top_k: int, vocab_size: int) -> list[dict[int, float] | None]:
    """For each position of a prompt top_k token ids with their logprobs, the prompt's own first; None for position 0.

    The numbers are those of no model. They depend on the token alone and add up to less than 1 in probability.
    """
    columns: list[dict[int, float] | None] = [None]
    for token in token_ids[1:]:
        nearby = [(token + offset) % max(vocab_size, 1) for offset in range(max(1, top_k))]
        columns.append({other: -1.0 - 0.125 * (token % 7) - rank for rank, other in enumerate(dict.fromkeys(nearby))})
    return columns[: len(token_ids)]


def version_spans(
    changes: Sequence[tuple[float, str]], n_tokens: int, *, started: float, ended: float
) -> list[dict[str, Any]]:
    """Which weight version sampled which tokens, when versions changed while the tokens were sampled evenly over time.

    Args:
        changes: (time, version) in order; the first one holds from the beginning of time.
        started: time of the request, ended: time of its answer; on the same clock.
    """
    spans: list[dict[str, Any]] = []
    version, start = changes[0][1], 0
    # A deque has no slices.
    for at, newer in islice(changes, 1, None):
        if at > ended:
            break
        share = (at - started) / (ended - started) if ended > started else 0.0
        end = min(n_tokens, max(start, round(share * n_tokens)))
        if end > start:
            spans.append({"version": version, "start": start, "end": end})
        version, start = newer, end
    if start < n_tokens:
        spans.append({"version": version, "start": start, "end": n_tokens})
    return spans
