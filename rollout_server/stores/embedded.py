"""The embedded stores: the state machine in this process, with its changes written to a journal before anybody is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, Self, TypeVar

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
from rollout_server.batching import shard_groups
from rollout_server.stores.base import WHOLE, Batch, NotReady, Payload, Shard, StoreLimits
from rollout_server.stores.changes import Changes
from rollout_server.stores.group_commit import GroupCommit, Unit
from rollout_server.stores.journal import Journal, MemoryJournal
from rollout_server.stores.payloads import split
from rollout_server.stores.run_folder import RunFolder
from rollout_server.stores.run_state import batches, groups, registry, runs, tickets
from rollout_server.stores.run_state.state import RunState
from rollout_server.stores.run_state.status import status_of

T = TypeVar("T")

READ_IN_LOOP_BYTES = 4 << 20
"""Batches up to this size are read without a thread; the bytes are nearly always in the page cache."""


class EmbeddedStore:
    """See stores.base.Store. Made by the `open` of its two kinds, inside a running event loop."""

    def __init__(self, journal: Journal, limits: StoreLimits, *, is_inline: bool = False) -> None:
        self.on_capacity: Callable[[], None] = lambda: None
        self.on_queue: Callable[[], None] = lambda: None
        self.on_event: Callable[[str, str], None] = lambda kind, text: None
        self._journal = journal
        self._limits = limits
        self._is_closed = False
        self._units: list[Unit] = []
        self._in_write: list[Changes] = []
        self._restore()
        self._commits = GroupCommit(
            self._take_units, on_commit=self._after_commit, on_failure=self._restore, is_inline=is_inline
        )

    def _restore(self) -> None:
        """Begin with what the journal holds: at start, and after a transaction that failed."""
        self._units.clear()
        self._in_write.clear()
        snapshot = self._journal.load()
        self._payloads = self._journal.payloads
        self.state = RunState(self._limits, self._payloads.allocate)
        self.state.restore(snapshot)

    def _stage(self) -> None:
        """Make a unit of what has changed since the last one."""
        changes = self.state.take_changes()
        if changes:
            self._in_write.append(changes)
            self._units.append(partial(self._journal.write, changes, self._payloads))

    def _take_units(self) -> list[Unit]:
        self._stage()
        units, self._units = self._units, []
        return units

    def _after_commit(self) -> None:
        state = self.state
        for changes in self._in_write:
            state.unsaved_ids.difference_update([row.group_id for row in changes.groups])
            if changes.released:
                self._payloads.release(changes.released)
        self._in_write.clear()
        if state.capacity_changed:
            self.on_capacity()
        if state.queue_changed:
            self.on_queue()
        state.capacity_changed = state.queue_changed = False
        events, state.events = state.events, []
        for kind, text in events:
            self.on_event(kind, text)

    async def _written(self, answer: T) -> T:
        """The answer, once everything it rests on is durable."""
        await self._commits.written()
        return answer

    async def open_run(self, request: RunRequest) -> RunInfo:
        """See Store.open_run."""
        run = self.state.run
        if run is not None and run.request.run_name != request.run_name:
            self._put_away(run.request.run_name)
        return await self._written(runs.open_run(self.state, request))

    async def close_run(self) -> None:
        """See Store.close_run."""
        if self.state.run is not None:
            self._put_away(self.state.run.request.run_name)
            self.state.events.append(("run_closed", "the run was archived"))
            await self._commits.written()

    def _put_away(self, run_name: str) -> None:
        """Start clean; the journal archives what was, in its turn."""
        self._stage()
        self._in_write.clear()  # its released payloads go to the archive with the rest
        self._units.append(partial(self._journal.archive, run_name, self._payloads))
        self._payloads = self._journal.fresh_payloads()
        events = self.state.events
        self.state = RunState(self._limits, self._payloads.allocate, clock=self.state.clock, events=events)
        self.state.capacity_changed = self.state.queue_changed = True

    async def run_info(self) -> RunInfo:
        """See Store.run_info."""
        return self.state.require_run().info()

    async def renew_trainer(self, session: int) -> None:
        """See Store.renew_trainer."""
        self.state.require_trainer(session)

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        """See Store.register_env."""
        return await self._written(registry.register_env(self.state, request))

    async def touch_env(self, env_id: int) -> bool:
        """See Store.touch_env."""
        return registry.touch_env(self.state, env_id)

    async def disconnect_env(self, env_id: int) -> bool:
        """See Store.disconnect_env."""
        return await self._written(registry.disconnect_env(self.state, env_id))

    async def grant_tickets(self, request: TicketRequest) -> TicketGrant:
        """See Store.grant_tickets."""
        grant = tickets.grant(self.state, request)
        return await self._written(grant) if grant.tickets else grant

    async def renew_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.renew_tickets."""
        return tickets.renew(self.state, update)

    async def return_tickets(self, update: TicketUpdate) -> list[str]:
        """See Store.return_tickets."""
        return await self._written(tickets.give_back(self.state, update))

    async def expire_tickets(self) -> int:
        """See Store.expire_tickets."""
        expired = tickets.expire(self.state)
        if expired or self.state.queue_changed:
            await self._commits.written()
        return expired

    async def append(self, blobs: Sequence[Blob], *, is_strict: bool = True) -> list[GroupResult]:
        """See Store.append."""
        known = self._journal.known([blob.header.group_id for blob in blobs])
        return await self._written(groups.append(self.state, blobs, known=known, is_strict=is_strict))

    async def known(self, group_ids: Sequence[str]) -> set[str]:
        """See Store.known."""
        return self._journal.known(group_ids) | self.state.unsaved_ids.intersection(group_ids)

    async def lease(self, step: int, session: int, shard: Shard = WHOLE) -> Batch | NotReady:
        """See Store.lease."""
        batch = batches.lease(self.state, step, session)
        if isinstance(batch, NotReady):
            return batch
        payloads = self._payloads
        if shard.count > 1:
            parts = shard_groups([group.n_tokens for group in batch], shard.count)
            batch = [batch[index] for index in parts[shard.index]]
        await self._commits.written()
        places = [group.place for group in batch]
        is_small = sum(place.size for place in places) <= READ_IN_LOOP_BYTES
        chunks = payloads.read(places) if is_small else await asyncio.to_thread(payloads.read, places)
        return Batch(step, split(chunks, places), chunks)

    async def nack(self, step: int, request: NackRequest) -> NackResult:
        """See Store.nack."""
        return await self._written(batches.nack(self.state, step, request))

    async def ack(self, step: int, session: int, policy_version: int | None) -> None:
        """See Store.ack."""
        batches.ack(self.state, step, session, policy_version)
        await self._commits.written()

    async def commit(self, step: int, session: int) -> None:
        """See Store.commit."""
        batches.commit(self.state, step, session)
        await self._commits.written()

    async def set_policy(self, policy_version: int, session: int) -> None:
        """See Store.set_policy."""
        runs.set_policy(self.state, policy_version, session)
        await self._commits.written()

    async def register_server(self, server: InferenceServer) -> None:
        """See Store.register_server."""
        registry.register_server(self.state, server)
        await self._commits.written()

    async def remove_server(self, url: str) -> bool:
        """See Store.remove_server."""
        return await self._written(registry.remove_server(self.state, url))

    async def status(self) -> Status:
        """See Store.status."""
        self._commits.check()
        return status_of(self.state)

    async def records(self, after: int = 0, limit: int = 10_000) -> GroupRecords:
        """See Store.records."""
        await self._commits.written()
        return await asyncio.to_thread(self._journal.records, after, limit)

    async def latest_group(self) -> Payload | None:
        """See Store.latest_group."""
        latest = self.state.latest
        if latest is None:
            return None
        await self._commits.written()
        try:
            return (await asyncio.to_thread(self._payloads.read, [latest.place]))[0]
        except (OSError, KeyError):  # trained, committed and gone
            return None

    async def close(self) -> None:
        """See Store.close."""
        if not self._is_closed:
            self._is_closed = True
            await self._commits.close()
            self._journal.close()


class SQLiteStore(EmbeddedStore):
    """The default: index in SQLite, payload in segment files, one folder a run."""

    @classmethod
    async def open(
        cls, data_dir: Path, limits: StoreLimits, *, synchronous: Literal["normal", "full"] = "full"
    ) -> Self:
        """Go on with the run in data_dir, or begin there.

        Raises:
            ConfigError: the folder is in use by another server, or was written by a newer one.
        """
        folder = RunFolder(data_dir, synchronous=synchronous, retain_bytes=limits.retain_bytes)
        return cls(folder, limits)


class MemoryStore(EmbeddedStore):
    """Nothing on disk: a killed server loses the run."""

    @classmethod
    async def open(cls, limits: StoreLimits) -> Self:
        """Begin with nothing."""
        return cls(MemoryJournal(), limits, is_inline=True)
