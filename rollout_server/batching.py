"""Which queued groups make the next batch, and which rank gets which: exactly batch_size sequences, whole groups.

The order is: what would go stale otherwise; each environment's minimum; then oldest policy version first and, within a
version, the environment that has had the fewest tokens trained for its weight. The mix over a run is decided where groups start
(admission.may_take), because all that starts is trained.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import msgspec

SEARCH_WINDOW = 512
"""Groups looked at beyond the first batch_size when sizes differ and the simple pick does not sum up."""


class QueuedGroup(msgspec.Struct, frozen=True):
    """What batching needs to know of a group."""

    key: int
    """Rises in order of arrival."""
    env_id: int
    n_sequences: int
    n_tokens: int
    oldest_version: int | None
    """None where the sender does not know."""
    order_version: int
    """oldest_version, or the policy version at arrival where the sender does not know its own."""


G = TypeVar("G", bound=QueuedGroup)


@dataclass(frozen=True, slots=True)
class EnvShare:
    """What batching needs to know of an environment."""

    weight: float = 1.0
    minimum: float = 0.0
    """Share of each batch reserved for it, 0 to 1."""
    trained_tokens: int = 0
    is_live: bool = True
    """False once it is silent, gone, or has been waited for too long: it holds nothing back."""


@dataclass(frozen=True)
class Wait:
    """No batch, and why."""

    waiting_for: str
    is_for_minimum: bool = False
    """Only an environment's minimum is missing: the wait has a deadline."""


def plan_batch(
    queue: Sequence[G], batch_size: int, *, must_leave: int = 0, shares: Mapping[int, EnvShare] | None = None
) -> list[G] | Wait:
    """Pick groups that sum to batch_size exactly.

    Args:
        queue: oldest version first, then in order of arrival; a window of batch_size + SEARCH_WINDOW groups is enough.
        must_leave: sequences, oldest first, that would go stale behind this batch.
        shares: by env_id; environments not named have weight 1 and no minimum.
    Returns:
        The groups in queue order, or what is missing.
    """
    shares = shares or {}
    urgent = _prefix(queue, must_leave)
    reserved = _minimums(queue, batch_size, urgent, shares)
    if isinstance(reserved, Wait):
        return reserved
    taken = {group.key for group in (*urgent, *reserved)}
    rest = [group for group in fair_order(queue, shares) if group.key not in taken]
    picked = (
        _exact([*urgent, *reserved], rest, batch_size)
        or _exact(urgent, [*reserved, *rest], batch_size)
        or _exact([], [*urgent, *reserved, *rest], batch_size)
    )
    if picked is None:
        sizes = sorted({group.n_sequences for group in queue})
        return Wait(f"groups that sum to exactly batch_size={batch_size}; queued group sizes are {sizes[:16]}")
    keys = {group.key for group in picked}
    return [group for group in queue if group.key in keys]


def _prefix(queue: Iterable[G], sequences: int) -> list[G]:
    """The oldest groups that together hold at least this many sequences. Groups of unknown version are never urgent."""
    picked: list[G] = []
    for group in queue:
        if sequences <= 0:
            break
        if group.oldest_version is not None:
            picked.append(group)
            sequences -= group.n_sequences
    return picked


def _minimums(
    queue: Sequence[G], batch_size: int, urgent: Sequence[G], shares: Mapping[int, EnvShare]
) -> list[G] | Wait:
    """The oldest groups of each environment with a minimum, up to it."""
    minimums = {env_id: share for env_id, share in shares.items() if share.minimum > 0 and share.weight > 0}
    if not minimums:
        return []
    total = sum(share.minimum for share in minimums.values())
    room = batch_size - sum(group.n_sequences for group in urgent)
    held = {env_id: sum(g.n_sequences for g in urgent if g.env_id == env_id) for env_id in minimums}
    urgent_keys = {group.key for group in urgent}
    picked: list[G] = []
    for env_id, share in minimums.items():
        need = int(batch_size * share.minimum / max(total, 1.0))
        own = [group for group in queue if group.env_id == env_id and group.key not in urgent_keys]
        for group in own:
            if held[env_id] + group.n_sequences <= need and group.n_sequences <= room:
                picked.append(group)
                held[env_id] += group.n_sequences
                room -= group.n_sequences
        if need > 0 and held[env_id] == 0 and not own and share.is_live:
            return Wait(
                f"environment {env_id}, which is promised {need} of {batch_size} sequences", is_for_minimum=True
            )
    return picked


def fair_order(queue: Sequence[G], shares: Mapping[int, EnvShare]) -> Iterator[G]:
    """Oldest version first; within a version by turns, the environment with the fewest trained tokens for its weight first."""
    if len({group.env_id for group in queue}) == 1:
        yield from queue
        return
    trained = {env_id: float(share.trained_tokens) / max(share.weight, 1e-9) for env_id, share in shares.items()}
    for _, same_version in groupby(queue, key=lambda group: group.order_version):
        lines: dict[int, deque[G]] = {}
        for group in same_version:
            lines.setdefault(group.env_id, deque()).append(group)
        if len(lines) == 1:
            for group in next(iter(lines.values())):
                yield group
                trained[group.env_id] = trained.get(group.env_id, 0.0) + _cost(group, shares)
            continue
        turns = [(trained.get(env_id, 0.0), env_id) for env_id in lines]
        heapq.heapify(turns)
        while turns:
            tokens, env_id = heapq.heappop(turns)
            group = lines[env_id].popleft()
            yield group
            trained[env_id] = tokens + _cost(group, shares)
            if lines[env_id]:
                heapq.heappush(turns, (trained[env_id], env_id))


def _cost(group: QueuedGroup, shares: Mapping[int, EnvShare]) -> float:
    share = shares.get(group.env_id)
    return group.n_tokens / max(share.weight if share else 1.0, 1e-9)


def _exact(fixed: Sequence[G], rest: Sequence[G], batch_size: int) -> list[G] | None:
    """The fixed groups and, of the rest, those that fill the batch exactly: in order where that sums up, else the first that do."""
    room = batch_size - sum(group.n_sequences for group in fixed)
    if room < 0:
        return None
    picked, left = list(fixed), room
    for group in rest:
        if left == 0:
            break
        if group.n_sequences <= left:
            picked.append(group)
            left -= group.n_sequences
    if left == 0:
        return picked
    subset = _subset_sum(rest[:SEARCH_WINDOW], room)
    return None if subset is None else [*fixed, *subset]


def _subset_sum(groups: Sequence[G], target: int) -> list[G] | None:
    """Exact dynamic programme; for each reachable sum the pick found first, that is of the earliest groups."""
    came_by: dict[int, tuple[G, int] | None] = {0: None}
    for group in groups:
        for total in list(came_by):
            reached = total + group.n_sequences
            if reached <= target and reached not in came_by:
                came_by[reached] = (group, total)
        if target in came_by:
            return _walk_back(came_by, target)
    return None


def _walk_back(came_by: Mapping[int, tuple[G, int] | None], target: int) -> list[G]:
    picked: list[G] = []
    step = came_by[target]
    while step is not None:
        group, total = step
        picked.append(group)
        step = came_by[total]
    return picked


def shard_groups(costs: Sequence[int], n_shards: int) -> list[list[int]]:
    """Deal groups out to ranks so that the token costs balance: largest first, each to the lightest rank so far.

    Args:
        costs: tokens of each group.
    Returns:
        For each rank the indices of its groups, in batch order. The same input gives the same parts on every server.
    Source: longest processing time first, Graham 1969, doi:10.1137/0117039.
    """
    parts: list[list[int]] = [[] for _ in range(n_shards)]
    loads = [(0, rank) for rank in range(n_shards)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        parts[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(part) for part in parts]
