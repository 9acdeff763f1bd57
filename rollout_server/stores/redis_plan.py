"""The next batch, planned on what lease.lua saw; bind.lua checks that it still holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import msgspec

from rollout_server.admission import Bound, must_leave, must_wait_for, overfull_version
from rollout_server.batching import EnvShare, QueuedGroup, Wait, plan_batch
from rollout_server.stores.redis_answers import BatchRow


class WindowRow(msgspec.Struct, frozen=True, array_like=True):
    """A queued group; -1 stands for an unknown version."""

    key: int
    env_id: int
    n_sequences: int
    n_tokens: int
    oldest_version: int
    order_version: int
    member: str


class ShareRow(msgspec.Struct, frozen=True, array_like=True):
    """An environment's claim on the batch."""

    env_id: int
    weight: float
    minimum: float
    trained_tokens: int
    is_live: bool


class Look(msgspec.Struct, frozen=True):
    """The run at the moment of planning. Pairs are (policy version, sequences), in flight (policy version, groups)."""

    batch_size: int
    max_staleness: int
    is_patient: bool
    pending: list[tuple[int, int]]
    queued: list[tuple[int, int]]
    flight: list[tuple[int, int]]
    window: list[WindowRow]
    shares: list[ShareRow]


class Leased(msgspec.Struct, frozen=True):
    """One of: the batch, what it waits for, what to plan on, or that the plan was overtaken."""

    batch: list[BatchRow] | None = None
    waiting_for: str | None = None
    look: Look | None = None
    again: bool = False


class MemberGroup(QueuedGroup, frozen=True):
    """A queued group as the sorted set names it."""

    member: str


@dataclass(frozen=True)
class Plan:
    """Groups for the next batch, oldest first."""

    members: list[str]
    overfull: int | None
    """The version up to which more stays queued than can be trained in time; none as long as admission keeps its promise."""


def plan_next(look: Look, step: int) -> Plan | Wait:
    """Choose the groups of the batch of `step`, or say what it waits for."""
    bound = Bound(look.batch_size, look.max_staleness, step)
    pending, flight = dict(look.pending), dict(look.flight)
    version = must_wait_for(bound, pending, dict(look.queued)) if look.is_patient else None
    if version is not None:
        return _stragglers(flight, version, step)
    shares = {row.env_id: EnvShare(row.weight, row.minimum, row.trained_tokens, row.is_live) for row in look.shares}
    groups = [_group(row) for row in look.window]
    plan = plan_batch(groups, look.batch_size, must_leave=must_leave(bound, pending), shares=shares)
    if isinstance(plan, Wait):
        return plan
    stays = Counter(pending)
    for group in plan:
        if group.oldest_version is not None:
            stays[group.oldest_version] -= group.n_sequences
    version = overfull_version(bound.after_next_batch(), +stays)
    if version is None or not any(other <= version for other in flight):
        return Plan([group.member for group in plan], version)
    if look.is_patient:
        return _stragglers(flight, version, step)
    return Plan([group.member for group in plan], None)


def _stragglers(flight: dict[int, int], version: int, step: int) -> Wait:
    older = sum(groups for other, groups in flight.items() if other <= version)
    return Wait(f"{older} older groups in flight that step {step} must leave room for (max_staleness)")


def _group(row: WindowRow) -> MemberGroup:
    oldest = None if row.oldest_version < 0 else row.oldest_version
    return MemberGroup(row.key, row.env_id, row.n_sequences, row.n_tokens, oldest, row.order_version, row.member)
