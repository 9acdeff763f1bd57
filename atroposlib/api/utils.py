"""Packs groups of different sizes into batches of exactly so many sequences. Pure functions over plain group dicts.

The rollout server plans its batches itself; these are for programs that call the functions of Atropos 0.4.0. Where
that finds a batch of the oldest groups so do these, and they find one too where its powers of two do not add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Groups = list[dict[str, Any]]


def find_groups_summing_to_target(buffer: Sequence[Mapping[str, Any]], target_size: int) -> list[int]:
    """Indices of groups that hold exactly target_size sequences together, early ones first; [] where none do."""
    return _pick([_size(group) for group in buffer], target_size) or []


def grab_exact_from_heterogeneous_queue(queue: Groups, batch_size: int) -> tuple[Groups | None, Groups]:
    """Take a batch out of a queue.

    Args:
        queue: groups, oldest first; left as it is.
        batch_size: sequences.
    Returns:
        The batch and the groups that stay, both in queue order; (None, queue) where no groups add up exactly.
    """
    picked = _pick([_size(group) for group in queue], batch_size)
    return _split(queue, picked) if picked else (None, queue)


def grab_batch_with_minimum_allocations(
    queue: Groups, batch_size: int, env_configs: Sequence[Mapping[str, Any]]
) -> tuple[Groups | None, Groups]:
    """Take a batch in which environments have their minimum.

    Args:
        queue: groups with `env_id`, oldest first; left as it is.
        batch_size: sequences.
        env_configs: of each environment `registered_id` (else its place in the list), `connected` and
            `min_batch_allocation`, a share of the batch or None.
    Returns:
        As grab_exact_from_heterogeneous_queue. Minimums that add up to more than the batch are scaled down. (None,
        queue) also where a connected environment with a minimum has nothing in the queue.
    """
    shares = {
        env.get("registered_id", place): env["min_batch_allocation"]
        for place, env in enumerate(env_configs)
        if env.get("connected", True) and env.get("min_batch_allocation") is not None
    }
    own = {env_id: [i for i, group in enumerate(queue) if group.get("env_id") == env_id] for env_id in shares}
    sizes = [_size(group) for group in queue]
    needs = {env_id: need for env_id, share in shares.items() if (need := int(batch_size * share)) > 0}
    if any(not own[env_id] for env_id in needs):
        return None, queue
    reserved: list[int] = []
    # The smallest need first: its one group has to find room.
    for env_id, need in sorted(_scaled(needs, batch_size, own, sizes).items(), key=lambda entry: entry[1]):
        reserved += _reserve(own[env_id], sizes, need, room=batch_size - sum(sizes[i] for i in reserved))
    rest = [i for i in range(len(queue)) if i not in set(reserved)]
    room = batch_size - sum(sizes[i] for i in reserved)
    filling = _pick([sizes[i] for i in rest], room)
    if filling is None:
        return None, queue
    return _split(queue, [*reserved, *(rest[i] for i in filling)])


def _size(group: Mapping[str, Any]) -> int:
    return len(group["tokens"])


def _split(queue: Groups, picked: Sequence[int]) -> tuple[Groups, Groups]:
    taken = set(picked)
    return (
        [group for i, group in enumerate(queue) if i in taken],
        [group for i, group in enumerate(queue) if i not in taken],
    )


def _scaled(
    needs: Mapping[Any, int], batch_size: int, own: Mapping[Any, Sequence[int]], sizes: Sequence[int]
) -> dict[Any, int]:
    """Needs that fit into the batch; each of at least its environment's smallest group."""
    total = sum(needs.values())
    if total <= batch_size:
        return dict(needs)
    return {
        env_id: max(need * batch_size // total, min(sizes[i] for i in own[env_id])) for env_id, need in needs.items()
    }


def _reserve(own: Sequence[int], sizes: Sequence[int], need: int, *, room: int) -> list[int]:
    """The oldest groups of an environment until its need is met, without passing the room."""
    picked: list[int] = []
    held = 0
    for index in own:
        if held >= need:
            break
        if held + sizes[index] <= room:
            picked.append(index)
            held += sizes[index]
    return picked


def _pick(sizes: Sequence[int], target: int) -> list[int] | None:
    """Indices, ascending, of sizes that add up to the target: in order where that sums up, else a subset of the earliest."""
    picked, left = [], target
    for index, size in enumerate(sizes):
        if 0 < size <= left:
            picked.append(index)
            left -= size
    return picked if left == 0 else _subset(sizes, target)


def _subset(sizes: Sequence[int], target: int) -> list[int] | None:
    """Exact dynamic programme; each sum is remembered by the index that reached it first, so early sizes win."""
    reached_by: dict[int, int] = {0: -1}
    for index, size in enumerate(sizes):
        for total in sorted(reached_by):
            if size > 0 and total + size <= target:
                reached_by.setdefault(total + size, index)
        if target in reached_by:
            return _walk_back(reached_by, sizes, target)
    return None


def _walk_back(reached_by: Mapping[int, int], sizes: Sequence[int], total: int) -> list[int]:
    picked: list[int] = []
    while total:
        picked.append(reached_by[total])
        total -= sizes[reached_by[total]]
    return picked[::-1]
