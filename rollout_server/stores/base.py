"""What every store promises. A store owns the run's state; the HTTP layer only waits and translates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from atroposlib.wire.columns import Blob
from atroposlib.wire.models import (
    EnvInfo,
    EnvRequest,
    GroupRecords,
    GroupResult,
    InferenceServer,
    NackRequest,
    NackResult,
    RunInfo,
    RunRequest,
    Status,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
)

Payload = bytes | memoryview


@dataclass(frozen=True)
class Batch:
    """The groups of one step, or of one rank's part of it, as the encoded bytes that came in."""

    step: int
    blobs: Sequence[Payload]
    chunks: Sequence[Payload] = ()
    """The same bytes in fewer pieces, where the store has read them so."""


@dataclass(frozen=True)
class NotReady:
    """Why there is no batch yet."""

    waiting_for: str


@dataclass(frozen=True)
class Shard:
    """One rank's part of a batch; see batching.shard_groups."""

    index: int = 0
    count: int = 1


WHOLE = Shard()


@dataclass(frozen=True)
class StoreLimits:
    """What a store needs of the server's configuration."""

    ticket_ttl_s: float = 60.0
    """A ticket that is not renewed for this long is void."""
    max_queued_bytes: int = 8 << 30
    """Payload that may wait; beyond it append raises QueueFullError."""
    retain_bytes: int = 10 << 30
    """Payload of committed groups kept for export and replay; -1 keeps all."""
    env_timeout_s: float = 120.0
    """A silent environment holds back no share of a batch or of the tickets."""
    allocation_wait_s: float = 30.0
    """How long a batch that could be complete waits for an environment with min_batch_allocation."""


class Store(Protocol):
    """Every method is atomic, and durable when it returns. Errors leave the state unchanged."""

    on_capacity: Callable[[], None]
    """Called (from any thread) after a change that may let groups start."""
    on_queue: Callable[[], None]
    """Called (from any thread) after a change that may complete a batch."""
    on_event: Callable[[str, str], None]
    """Called (from any thread) with kind and text of something worth watching; see wire.models.Event."""

    async def open_run(self, request: RunRequest) -> RunInfo:
        """Open a run, or take over the one of the same name with a new session; another name starts clean, the earlier run is archived.

        Groups that old clients posted before any run was opened become the run's.
        """

    async def close_run(self) -> None:
        """Archive the open run and start clean: no run, no environments. Nothing is destroyed; without a run nothing happens."""

    async def run_info(self) -> RunInfo:
        """The open run. Raises NoRunError."""

    async def renew_trainer(self, session: int) -> None:
        """The trainer lives."""

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        """Add an environment; the same name again voids the tickets of its earlier session."""

    async def touch_env(self, env_id: int) -> bool:
        """An environment without session (an old client) lives; False when it is not known."""

    async def disconnect_env(self, env_id: int) -> bool:
        """An environment goes: its tickets are void, its queued groups stay. False when it is not known."""

    async def grant_tickets(self, request: TicketRequest) -> TicketGrant:
        """Give as many tickets as the staleness bound and the environment's fair share allow, at most request.count. Does not wait."""

    async def renew_tickets(self, update: TicketUpdate) -> list[str]:
        """Move deadlines; returns the tickets that are alive."""

    async def return_tickets(self, update: TicketUpdate) -> list[str]:
        """Give tickets back, counted by reason; returns those that were alive."""

    async def expire_tickets(self) -> int:
        """Void the tickets whose deadline has passed; returns how many."""

    async def append(self, blobs: Sequence[Blob], *, is_strict: bool = True) -> list[GroupResult]:
        """Keep groups. A known group_id is a duplicate; one that cannot be trained in time, or names another run, is retired.

        Args:
            is_strict: False for old clients: unknown environments are taken, and groups before any run was opened.
        """

    async def known(self, group_ids: Sequence[str]) -> set[str]:
        """Which of these groups the run has seen."""

    async def lease(self, step: int, session: int, shard: Shard = WHOLE) -> Batch | NotReady:
        """The batch of a step, formed on first asking and the same ever after."""

    async def nack(self, step: int, request: NackRequest) -> NackResult:
        """Dissolve the batch of a step that is not acknowledged, and those formed after it."""

    async def ack(self, step: int, session: int, policy_version: int | None) -> None:
        """The optimizer step used its batch."""

    async def commit(self, step: int, session: int) -> None:
        """A checkpoint holds the weights after `step` steps; older payloads may go."""

    async def set_policy(self, policy_version: int, session: int) -> None:
        """The inference servers run this version. Never goes back."""

    async def register_server(self, server: InferenceServer) -> None:
        """An inference server joins the registry or is reported again."""

    async def remove_server(self, url: str) -> bool:
        """An inference server goes; False when it was not known."""

    async def status(self) -> Status:
        """Counters; cost independent of the queue."""

    async def records(self, after: int = 0, limit: int = 10_000) -> GroupRecords:
        """A page of the ledger: where each group of the run is, in order of arrival."""

    async def latest_group(self) -> Payload | None:
        """The group accepted last, while its payload is kept."""

    async def close(self) -> None:
        """Finish what was asked, then release files and connections."""
