"""Lay sequences end to end into micro batches, and deal micro batches to ranks. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

MicroBatchPlan = list[int]
"""Indices of the sequences of one micro batch; empty for a pass that only keeps step with the other ranks."""


def pack(lengths: Sequence[int], *, capacity: int) -> list[MicroBatchPlan]:
    """Fill micro batches best-fit, longest sequence first: each goes where the least room is left over.

    Args:
        lengths: tokens of each sequence.
        capacity: tokens of a micro batch. A longer sequence gets a micro batch of its own.
    Returns:
        Indices into `lengths`, each exactly once. No two micro batches would fit into one.
    """
    plans: list[MicroBatchPlan] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, plan), least first
    for index in _longest_first(lengths):
        length = lengths[index]
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            room, plan = capacity, len(plans)
            plans.append([])
        else:
            room, plan = rooms.pop(place)
        plans[plan].append(index)
        if room > length:
            insort(rooms, (room - length, plan))
    return plans


def pack_for_ranks(
    lengths: Sequence[int], *, capacity: int, ranks: int, hidden_size: int
) -> list[list[MicroBatchPlan]]:
    """Pack, then give every rank the same number of micro batches at about the same cost.

    Where the number of micro batches does not divide by `ranks`, the dearest ones are halved; where there are too few
    sequences for that, plans are left empty.

    Args:
        lengths: tokens of each sequence.
        capacity: tokens of a micro batch.
        ranks: data-parallel processes.
        hidden_size: of the model, which decides when attention outweighs the rest.
    Returns:
        For each rank its plans, the same number for each and at least one. The same on every rank that computes it.
    """
    cost = [sequence_cost(length, hidden_size=hidden_size) for length in lengths]
    plans = _halve_until_divisible(pack(lengths, capacity=capacity), cost, ranks)
    passes = max(1, -(-len(plans) // ranks))
    return _deal(plans, [sum(cost[i] for i in plan) for plan in plans], ranks=ranks, passes=passes)


def sequence_cost(length: int, *, hidden_size: int) -> float:
    """Work for one sequence, in tokens of a short one: attention grows with the square of the length.

    A transformer layer multiplies each token by about 12 hidden_size^2 weights and each pair of tokens by
    2 hidden_size, so the two are equal at 6 hidden_size tokens.
    """
    return length * (1.0 + length / (6.0 * hidden_size))


def _longest_first(lengths: Sequence[int] | Sequence[float]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _halve_until_divisible(plans: list[MicroBatchPlan], cost: Sequence[float], ranks: int) -> list[MicroBatchPlan]:
    plans = list(plans)
    while len(plans) % ranks:
        splittable = [i for i, plan in enumerate(plans) if len(plan) > 1]
        if not splittable:
            break
        dearest = max(splittable, key=lambda i: (sum(cost[j] for j in plans[i]), -i))
        halves = _deal([[j] for j in plans[dearest]], [cost[j] for j in plans[dearest]], ranks=2, passes=None)
        plans[dearest : dearest + 1] = [[j for plan in half for j in plan] for half in halves]
    return plans


def _deal(
    plans: Sequence[MicroBatchPlan], cost: Sequence[float], *, ranks: int, passes: int | None
) -> list[list[MicroBatchPlan]]:
    """Longest processing time first: the dearest plan to the rank with the least work that still has a pass free."""
    dealt: list[list[MicroBatchPlan]] = [[] for _ in range(ranks)]
    work = [0.0] * ranks
    for i in _longest_first(cost):
        free = [rank for rank in range(ranks) if passes is None or len(dealt[rank]) < passes]
        rank = min(free, key=lambda r: (work[r], r))
        dealt[rank].append(plans[i])
        work[rank] += cost[i]
    for share in dealt:
        share.extend([] for _ in range((passes or 0) - len(share)))
    return dealt
