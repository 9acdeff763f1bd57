"""The embedded store: SQLite in WAL mode behind a writer thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

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
from rollout_server.stores.base import Batch, NotReady
from rollout_server.stores.group_commit import GroupCommit
from rollout_server.stores.run_tables import RunTables


class SQLiteStore:
    """See stores.base.Store.

    Args:
        data_dir: holds run.sqlite, and archive/ with the databases of earlier runs.
        synchronous: SQLite's setting; normal survives SIGKILL, full a power cut too.
        ticket_ttl_s: seconds after which a ticket that is not renewed is void.
        max_queued_bytes: payload that may wait; beyond it append raises QueueFullError.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        synchronous: Literal["normal", "full"] = "full",
        ticket_ttl_s: float = 60.0,
        max_queued_bytes: int = 8 << 30,
    ) -> None:
        self.on_capacity: Callable[[], None] = lambda: None
        self.on_queue: Callable[[], None] = lambda: None
        self._tables = RunTables(
            data_dir, synchronous=synchronous, ticket_ttl_s=ticket_ttl_s, max_queued_bytes=max_queued_bytes
        )
        self._writer = GroupCommit(lambda: self._tables.db, on_commit=self._notify, on_rollback=self._tables.reload)

    async def open_run(self, request: RunRequest) -> RunInfo:
        """See Store.open_run."""
        return await self._writer.submit(lambda: self._tables.open_run(request))

    async def run_info(self) -> RunInfo:
        """See Store.run_info."""
        return await self._writer.submit(self._tables.run_info)

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        """See Store.register_env."""
        return await self._writer.submit(lambda: self._tables.register_env(request))

    async def grant_tickets(self, request: TicketRequest) -> TicketGrant:
        """See Store.grant_tickets."""
        return await self._writer.submit(lambda: self._tables.grant_tickets(request))

    async def renew_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.renew_tickets."""
        return await self._writer.submit(lambda: self._tables.renew_tickets(update))

    async def return_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.return_tickets."""
        return await self._writer.submit(lambda: self._tables.return_tickets(update))

    async def append(self, blobs: Sequence[Blob]) -> list[GroupResult]:
        """See Store.append."""
        return await self._writer.submit(lambda: self._tables.append(blobs))

    async def lease(self, step: int, session: int) -> Batch | NotReady:
        """See Store.lease."""
        return await self._writer.submit(lambda: self._tables.lease(step, session))

    async def ack(self, step: int, session: int, policy_version: int | None) -> None:
        """See Store.ack."""
        await self._writer.submit(lambda: self._tables.ack(step, session, policy_version))

    async def commit(self, step: int, session: int) -> None:
        """See Store.commit."""
        await self._writer.submit(lambda: self._tables.commit(step, session))

    async def set_policy(self, policy_version: int, session: int) -> None:
        """See Store.set_policy."""
        await self._writer.submit(lambda: self._tables.set_policy(policy_version, session))

    async def expire_tickets(self) -> int:
        """See Store.expire_tickets."""
        return await self._writer.submit(self._tables.expire_tickets)

    async def status(self) -> Status:
        """See Store.status."""
        return await self._writer.submit(self._tables.status)

    async def records(self) -> list[GroupRecord]:
        """See Store.records."""
        return await self._writer.submit(self._tables.records)

    async def close(self) -> None:
        """See Store.close."""
        await self._writer.close()

    def _notify(self) -> None:
        if self._tables.capacity_changed:
            self.on_capacity()
        if self._tables.queue_changed:
            self.on_queue()
        self._tables.capacity_changed = self._tables.queue_changed = False
