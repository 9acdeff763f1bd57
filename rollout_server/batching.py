"""Which queued groups make the next batch: exactly batch_size sequences, whole groups, oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SEARCH_WINDOW = 512
"""Groups looked at when sizes differ and the simple first-in-first-out pick does not sum up."""


@dataclass(frozen=True, slots=True)
class QueuedGroup:
    """What batching needs to know of a group."""

    key: int
    """Row of the store."""
    n_sequences: int


def choose_batch(queue: Sequence[QueuedGroup], batch_size: int) -> list[QueuedGroup] | None:
    """Pick groups that sum to batch_size exactly: first in first out; where sizes differ, the oldest that sum up.

    Args:
        queue: oldest first.
    Returns:
        The groups in queue order, or None when no pick sums up.
    """
    picked, room = [], batch_size
    for group in queue:
        if group.n_sequences <= room:
            picked.append(group)
            room -= group.n_sequences
        if room == 0:
            return picked
    return _subset_sum(queue[:SEARCH_WINDOW], batch_size)


def _subset_sum(groups: Sequence[QueuedGroup], target: int) -> list[QueuedGroup] | None:
    """Exact dynamic programme; for each reachable sum the pick found first, that is of the oldest groups."""
    picks: dict[int, tuple[QueuedGroup, ...]] = {0: ()}
    for group in groups:
        for total, pick in list(picks.items()):
            reached = total + group.n_sequences
            if reached <= target and reached not in picks:
                picks[reached] = (*pick, group)
        if target in picks:
            return list(picks[target])
    return None
