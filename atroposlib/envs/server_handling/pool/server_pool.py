"""Slots of several servers: who gets one, who waits, which servers are out. Everything is driven by events."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atroposlib.envs.server_handling.pool.balancing import home_of_session, least_busy, may_leave_home
from atroposlib.envs.server_handling.pool.circuit_breaker import Circuit
from atroposlib.envs.server_handling.pool.engine_watch import can_be_watched, follow_load
from atroposlib.envs.server_handling.pool.seat import Seat, Split
from atroposlib.envs.server_handling.pool.server_recovery import await_recovery, bring_back, can_recover
from atroposlib.envs.server_handling.pool.waiting_line import Line, Waiter
from atroposlib.errors import ModelServerError

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.server_baseline import APIServer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """A slot in use."""

    seat: Seat
    split: Split
    epoch: int
    """Of the circuit breaker, when the slot was given."""


class ServerPool:
    """The servers that requests are spread over.

    A request gets a server only when one has a free slot, so a slow or dead server holds up nobody else.
    """

    def __init__(self, servers: Sequence[APIServer]) -> None:
        self.seats = [Seat(server) for server in servers]
        self.leaving: list[Seat] = []
        """Removed servers whose last requests still run."""
        self.waiting = 0
        """Requests without a slot."""
        self.weight = 1.0
        self.sampled_by_the_gone = 0
        self._lines = {(split, needs_tokens): Line() for split in Split for needs_tokens in (False, True)}
        self._order = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    # Slots

    async def acquire(self, split: Split, *, needs_tokens: bool = False, home: Seat | None = None) -> Lease:
        """Wait for a slot.

        Args:
            needs_tokens: only of a server that returns token ids, if there is any.
            home: the server to stay with while it is well and not crowded.
        """
        lease = self.acquire_now(split, needs_tokens=needs_tokens, home=home)
        if lease is None:
            seat = await self._wait(split, self._can_give_tokens(needs_tokens), home)
            lease = self._leased(seat, split)
        return lease

    def acquire_now(self, split: Split, *, needs_tokens: bool = False, home: Seat | None = None) -> Lease | None:
        """A slot that is free now; None where one would have to wait. Arguments as acquire."""
        self._resume_recoveries()
        seat = self._free_seat(split, self._can_give_tokens(needs_tokens), home)
        if seat is None:
            return None
        seat.in_flight[split] += 1
        return self._leased(seat, split)

    def release(self, lease: Lease) -> None:
        """Give a slot back; who waits for it gets it now."""
        self._release(lease.seat, lease.split)

    def succeeded(self, lease: Lease) -> None:
        """The server answered."""
        was = lease.seat.breaker.circuit
        lease.seat.breaker.succeeded(lease.epoch)
        lease.seat.server.server_healthy = lease.seat.takes_requests
        if was is not lease.seat.breaker.circuit:
            self._serve(lease.seat)

    def failed(self, lease: Lease, error: str) -> None:
        """The server failed the request."""
        seat, was = lease.seat, lease.seat.breaker.circuit
        seat.breaker.failed(lease.epoch, error)
        seat.server.server_healthy = seat.breaker.circuit is not Circuit.OPEN
        if seat.breaker.circuit is Circuit.OPEN and was is not Circuit.OPEN and not seat.is_leaving:
            log.warning("inference server failed, leaving it alone until it is well: %s: %s", seat.url, error)
            self._bring_back(seat)

    # Sessions

    @contextmanager
    def session(self, *, needs_tokens: bool = False) -> Iterator[Seat]:
        """The server that a conversation settles on. It takes no slot; it counts when the next one settles.

        Raises:
            ModelServerError: the pool has no server for it.
        """
        seats = [seat for seat in self.seats if seat.returns_tokens or not needs_tokens]
        if not seats:
            raise ModelServerError("no inference server is left for a session: all have left, and another may join")
        found = home_of_session([seat.occupancy(Split.TRAIN) for seat in seats])
        home = min(seats, key=lambda seat: seat.sessions) if found is None else seats[found]
        home.sessions += 1
        try:
            yield home
        finally:
            home.sessions -= 1

    # Servers

    def set_weight(self, weight: float) -> None:
        """This environment's share of every server, 0 to 1."""
        self.weight = weight
        for seat in self.seats:
            seat.weight = weight
            self._serve(seat)

    def add(self, server: APIServer) -> None:
        """A server joins: it gets requests once it says that it is well."""
        seat = Seat(server, weight=self.weight)
        seat.breaker.await_check()
        self.seats.append(seat)
        self._bring_back(seat)

    def detach(self, seat: Seat) -> None:
        """A server leaves: nothing new goes there. Its connections stay open until drain()."""
        seat.is_leaving = True
        self.seats.remove(seat)
        self.leaving.append(seat)
        self._cancel(seat.recovery)
        self._evict_waiters(seat)

    async def drain(self, seat: Seat) -> None:
        """Wait until what a leaving server has in flight has ended, at most its timeout; then close its connections."""
        try:
            async with asyncio.timeout(seat.timeout_s):
                while seat.total_in_flight:
                    seat.drained.clear()
                    await seat.drained.wait()
        except TimeoutError:
            log.warning("inference server left with %d requests in flight: %s", seat.total_in_flight, seat.url)
        finally:
            self._cancel(seat.recovery)
            self._cancel(seat.watch)
            try:
                await seat.server.close()
            finally:
                self.leaving.remove(seat)
                self.sampled_by_the_gone += seat.server.load.sampled_tokens

    def own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run in the background until it ends or the pool closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """End the background work and close all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(seat.server.close() for seat in [*self.seats, *self.leaving]))

    def _can_give_tokens(self, needs_tokens: bool) -> bool:
        return needs_tokens and any(seat.returns_tokens for seat in self.seats)

    def _leased(self, seat: Seat, split: Split) -> Lease:
        self._watch(seat)
        return Lease(seat, split, seat.breaker.epoch)

    def _free_seat(self, split: Split, needs_tokens: bool, home: Seat | None) -> Seat | None:
        seats = [seat for seat in self.seats if seat.returns_tokens or not needs_tokens]
        if home is None or not home.takes_requests:
            found = least_busy([seat.occupancy(split) for seat in seats])
            return None if found is None else seats[found]
        at_home = home.occupancy(split)
        if not at_home.is_full:
            return home
        others = [seat for seat in seats if seat is not home]
        found = may_leave_home(at_home, [seat.occupancy(split) for seat in others])
        return None if found is None else others[found]

    async def _wait(self, split: Split, needs_tokens: bool, home: Seat | None) -> Seat:
        waiter = Waiter(next(self._order), needs_tokens, asyncio.get_running_loop().create_future())
        line = self._lines[split, needs_tokens] if home is None or not home.takes_requests else home.lines[split]
        line.join(waiter)
        self.waiting += 1
        try:
            return await waiter.seat
        except asyncio.CancelledError:
            # The slot may have come in the very moment of giving up.
            if waiter.seat.done() and not waiter.seat.cancelled():
                self._release(waiter.seat.result(), split)
            raise
        finally:
            self.waiting -= 1

    def _release(self, seat: Seat, split: Split) -> None:
        seat.in_flight[split] -= 1
        if not seat.total_in_flight:
            seat.drained.set()
        self._serve(seat)

    def _serve(self, seat: Seat) -> None:
        """Give the seat's free slots to those who wait."""
        if not self.waiting:
            return
        for split in Split:
            while not seat.occupancy(split).is_full:
                line = self._next_line(seat, split)
                if line is None:
                    break
                seat.in_flight[split] += 1
                line.leave().seat.set_result(seat)

    def _next_line(self, seat: Seat, split: Split) -> Line | None:
        """The line whose first waiter came earliest, of those that the seat may serve."""
        lines = [seat.lines[split], self._lines[split, False]]
        if seat.returns_tokens:
            lines.append(self._lines[split, True])
        if not any(line.first() for line in lines):
            # Nobody waits for this server: it may relieve one that is full.
            lines = [other.lines[split] for other in self.seats if self._may_relieve(seat, other, split)]
        firsts = [(waiter.order, line) for line in lines if (waiter := line.first())]
        return min(firsts, key=lambda entry: entry[0])[1] if firsts else None

    def _may_relieve(self, seat: Seat, other: Seat, split: Split) -> bool:
        waiter = other.lines[split].first()
        if other is seat or waiter is None or (waiter.needs_tokens and not seat.returns_tokens):
            return False
        return may_leave_home(other.occupancy(split), [seat.occupancy(split)]) is not None

    def _bring_back(self, seat: Seat) -> None:
        self._evict_waiters(seat)
        self._cancel(seat.recovery)
        seat.recovery = self.own(bring_back(seat, self._serve))

    def _resume_recoveries(self) -> None:
        """Ask failed servers that nobody asks: an event loop takes its tasks with it, and direct requests open no circuit."""
        for seat in self.seats:
            if seat.recovery is not None and not seat.recovery.done():
                continue
            if not seat.takes_requests:
                self._bring_back(seat)
            elif seat.is_marked_failed and seat.breaker.circuit is Circuit.CLOSED and can_recover(seat):
                seat.recovery = self.own(await_recovery(seat, self._serve))

    def _evict_waiters(self, seat: Seat) -> None:
        """Who waits for this very server may have any other now."""
        for split, line in seat.lines.items():
            waiters = line.take_all()
            for needs_tokens in (False, True):
                self._lines[split, needs_tokens].merge(w for w in waiters if w.needs_tokens is needs_tokens)
        for other in self.seats:
            self._serve(other)

    def _watch(self, seat: Seat) -> None:
        if (seat.watch is None or seat.watch.done()) and can_be_watched(seat):
            seat.watch = self.own(follow_load(seat, self._serve))

    def _cancel(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work of the inference servers failed", exc_info=error)
