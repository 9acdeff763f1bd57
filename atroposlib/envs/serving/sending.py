"""What happens to a group between the environment and the wire: filters, the columns that may be absent, sample texts."""

from __future__ import annotations

import logging
from typing import Any, TypeAlias, cast

from atroposlib.type_definitions import ScoredDataGroup

log = logging.getLogger(__name__)

Outcome: TypeAlias = ScoredDataGroup | list[ScoredDataGroup | None] | None
"""What collect_trajectories makes of an item."""

SAID_ON_DROP = {
    "empty": "it holds no sequence",
    "wrong_size": "it has {n} sequences and group_size={group_size}; set group_overrides['group_size'], or min_valid_per_group",
    "zero_variance": "its scores are all equal; ensure_scores_are_not_same=False sends such groups",
    "too_long": "a sequence has more tokens than the trainer's max_token_len={max_token_len}",
}
_FILLED = ("ref_logprobs", "overrides", "group_overrides", "distill_token_ids", "distill_logprobs")


def as_groups(outcome: Outcome) -> list[ScoredDataGroup]:
    """The groups of an outcome; None among them are left out."""
    groups = outcome if isinstance(outcome, list) else [outcome]
    return [group for group in groups if group]


def split_result(result: Any) -> tuple[Any, list[Any]]:
    """Outcome and backlog of what collect_trajectories or collect_trajectory returned: a pair, a triple, or the outcome alone.

    A triple is (groups, further groups, backlog).
    """
    if not isinstance(result, tuple):
        return result, []
    if len(result) == 3:
        first, more, backlog = result
        return [*as_groups(first), *as_groups(more)], list(backlog or [])
    outcome, backlog = result
    return outcome, list(backlog or [])


def fill_absent(group: ScoredDataGroup) -> None:
    """Keys that readers of a group index without asking are there, as None."""
    fields = cast(dict[str, Any], group)
    for name in _FILLED:
        fields.setdefault(name, None)


def fill_messages(group: ScoredDataGroup, tokenizer: Any) -> None:
    """Where the environment gave no messages: one user message a sequence, which holds its decoded text."""
    if group.get("messages") is None and tokenizer is not None:
        group["messages"] = [[{"role": "user", "content": tokenizer.decode(row)}] for row in group["tokens"]]


def sample_rows(group: ScoredDataGroup, tokenizer: Any, *, count: int) -> list[tuple[str, float]]:
    """Decoded text and score of the first sequences, as many as there are."""
    decode = tokenizer.decode if tokenizer is not None else str
    return [
        (decode(tokens), score) for tokens, score in list(zip(group["tokens"], group["scores"], strict=False))[:count]
    ]


def keep_newest(groups: list[Any], limit: int) -> None:
    """Drop the oldest beyond limit, in place: authors hold on to the list."""
    del groups[: max(0, len(groups) - limit)]


def say_dropped(name: str, group: ScoredDataGroup, reason: str, **facts: Any) -> None:
    """Tell the author which group is not sent, and what to do about it."""
    text = SAID_ON_DROP.get(reason, reason).format(n=len(group.get("tokens") or ()), **facts)
    level = logging.DEBUG if reason == "zero_variance" else logging.WARNING
    log.log(level, "%s: group not sent: %s", name, text)
