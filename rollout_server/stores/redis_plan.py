"""The next batch, planned on what lease.lua saw; bind.lua checks that it still holds."""

from __future__ import annotations

import msgspec

from rollout_server.admission import Bound
from rollout_server.batching import EnvShare, QueuedGroup, Wait
from rollout_server.planning import Plan, Scene, plan_next
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


def plan_on(look: Look, step: int) -> Plan[MemberGroup] | Wait:
    """The batch of `step`, or what it waits for."""
    return plan_next(
        Scene(
            bound=Bound(look.batch_size, look.max_staleness, step),
            queued=dict(look.queued),
            pending=dict(look.pending),
            flight=dict(look.flight),
            window=[_group(row) for row in look.window],
            shares={
                row.env_id: EnvShare(row.weight, row.minimum, row.trained_tokens, row.is_live) for row in look.shares
            },
            is_patient=look.is_patient,
        )
    )


def _group(row: WindowRow) -> MemberGroup:
    oldest = None if row.oldest_version < 0 else row.oldest_version
    return MemberGroup(row.key, row.env_id, row.n_sequences, row.n_tokens, oldest, row.order_version, row.member)
