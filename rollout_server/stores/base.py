"""What every store promises. A store owns the run's state; the HTTP layer only waits and translates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from atroposlib.wire.columns import Blob
from atroposlib.wire.models import (
    EnvInfo,
    EnvRequest,
    GroupRecord,
    GroupResult,
    RunInfo,
    RunRequest,
    Status,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
)


@dataclass(frozen=True)
class Batch:
    """The groups of one step, as the encoded bytes that came in."""

    step: int
    blobs: Sequence[bytes]


@dataclass(frozen=True)
class NotReady:
    """Why there is no batch yet."""

    waiting_for: str


class Store(Protocol):
    """Every method is atomic and durable when it returns. Errors leave the state unchanged."""

    on_capacity: Callable[[], None]
    """Called (from any thread) after a change that may let groups start."""
    on_queue: Callable[[], None]
    """Called (from any thread) after a change that may complete a batch."""

    async def open_run(self, request: RunRequest) -> RunInfo:
        """Open a run, or take over the one of the same name with a new session; another name starts clean."""

    async def run_info(self) -> RunInfo:
        """The open run. Raises NoRunError."""

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        """Add an environment; the same name again voids the tickets of its earlier session."""

    async def grant_tickets(self, request: TicketRequest) -> TicketGrant:
        """Give as many tickets as the staleness bound allows, at most request.count. Does not wait."""

    async def renew_tickets(self, update: TicketUpdate) -> list[str]:
        """Move deadlines; returns the tickets that are alive."""

    async def return_tickets(self, update: TicketUpdate) -> list[str]:
        """Give tickets back, counted by reason; returns those that were alive."""

    async def append(self, blobs: Sequence[Blob]) -> list[GroupResult]:
        """Keep groups. A known group_id is a duplicate; one that cannot be trained in time is retired."""

    async def lease(self, step: int, session: int) -> Batch | NotReady:
        """The batch of a step, formed on first asking and the same ever after."""

    async def ack(self, step: int, session: int, policy_version: int | None) -> None:
        """The optimizer step used its batch."""

    async def commit(self, step: int, session: int) -> None:
        """A checkpoint holds the weights after `step` steps; older payloads may go."""

    async def set_policy(self, policy_version: int, session: int) -> None:
        """The inference servers run this version. Never goes back."""

    async def expire_tickets(self) -> int:
        """Void the tickets whose deadline has passed; returns how many."""

    async def status(self) -> Status:
        """Counters; cost independent of the queue."""

    async def records(self) -> list[GroupRecord]:
        """Where each group of the run is."""

    async def close(self) -> None:
        """Finish what was asked, then release the files."""
