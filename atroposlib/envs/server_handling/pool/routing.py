"""One request over the pool: the only retry policy there is, within one deadline, keeping every server's answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from atroposlib.envs.server_handling.pool.busy_clock import BusyClock
from atroposlib.envs.server_handling.pool.retry_budget import RetryBudget
from atroposlib.envs.server_handling.pool.seat import DEFAULT_TIMEOUT_S, Seat, Split
from atroposlib.envs.server_handling.pool.server_pool import Lease, ServerPool
from atroposlib.errors import ModelServerError, RolloutError

MAX_TRIES = 8
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0

T = TypeVar("T")


@dataclass
class _Request:
    """What one request has been through."""

    what: str
    split: Split
    needs_tokens: bool
    home: Seat | None
    timeout_s: float
    is_callers_limit: bool = False
    """Whether the caller gave it less time than the servers' configs do."""
    started: float = field(default_factory=time.monotonic)
    tries: int = 0
    said: dict[Seat, ModelServerError] = field(default_factory=dict)
    """The last answer of each server that failed it."""

    @property
    def left_s(self) -> float:
        return self.started + self.timeout_s - time.monotonic()

    @property
    def last(self) -> ModelServerError | None:
        return next(reversed(self.said.values()), None)


class Router:
    """Sends requests over the pool until a server answers.

    Args:
        busy: runs while a request is at a server.
    """

    def __init__(self, pool: ServerPool, busy: BusyClock) -> None:
        self._pool = pool
        self._busy = busy
        burst = max((seat.ceiling for seat in pool.seats), default=1)
        self._last_timeout_s = DEFAULT_TIMEOUT_S
        self._budget = RetryBudget(burst, time.monotonic)

    async def ask(
        self,
        what: str,
        call: Callable[[Seat], Awaitable[T]],
        *,
        split: Split,
        needs_tokens: bool = False,
        home: Seat | None = None,
        timeout_s: float | None = None,
    ) -> T:
        """Call one server, and others after it while they fail.

        Args:
            what: name of the call, for messages.
            home: the server to try first and to wait for.
            timeout_s: the caller's own limit; the servers' configs bound it. That it passed says nothing about a server.
        Raises:
            ModelServerError: none answered within its timeout, or 8 tries failed; the last failure is the cause.
            RolloutError, ConfigError: a server refused the request itself: another would too.
        """
        longest_s = self._timeout_s()
        limit_s = longest_s if timeout_s is None else min(timeout_s, longest_s)
        request = _Request(what, split, needs_tokens, home, limit_s, is_callers_limit=limit_s < longest_s)
        self._budget.request_made()
        while True:
            lease = await self._slot(request)
            request.tries += 1
            try:
                return await self._at_server(request, lease, call)
            except ModelServerError as error:
                self._note(request, lease.seat, error)
            finally:
                self._pool.release(lease)
            await self._before_next_try(request)

    async def wait_for_slot(self, split: Split) -> None:
        """Wait until some server could take a request; the slot stays free.

        Raises:
            ModelServerError: none could within its timeout.
        """
        lease = await self._slot(_Request("with a free slot", split, False, None, self._timeout_s()))
        self._pool.release(lease)

    def _timeout_s(self) -> float:
        """The longest of the servers; while there is none, the one before counts: a new server may join."""
        self._last_timeout_s = max((seat.timeout_s for seat in self._pool.seats), default=self._last_timeout_s)
        return self._last_timeout_s

    async def _slot(self, request: _Request) -> Lease:
        choice = self._first_choice(request)
        # Nearly always one is free, and then no timer is needed.
        lease = self._pool.acquire_now(request.split, needs_tokens=request.needs_tokens, home=choice)
        if lease is not None:
            return lease
        try:
            async with asyncio.timeout(request.left_s):
                return await self._pool.acquire(request.split, needs_tokens=request.needs_tokens, home=choice)
        except TimeoutError:
            raise self._gave_up(request) from request.last

    async def _at_server(self, request: _Request, lease: Lease, call: Callable[[Seat], Awaitable[T]]) -> T:
        time_here_s = request.left_s
        scope = asyncio.timeout(time_here_s)
        try:
            async with scope:
                with self._busy:
                    answer = await call(lease.seat)
        except ModelServerError as error:
            # The client measures the caller's limit as well.
            if not (request.is_callers_limit and isinstance(error.__cause__, TimeoutError)):
                self._pool.failed(lease, str(error))
            raise
        except RolloutError:
            # It refused this request: the server itself works.
            self._pool.succeeded(lease)
            raise
        except TimeoutError as error:
            if not scope.expired():
                raise
            failure = ModelServerError(f"inference server {lease.seat.url}: no answer in time")
            # A request that spent its time in the line says nothing about the server that it came to last.
            if time_here_s >= request.timeout_s / 2 and not request.is_callers_limit:
                self._pool.failed(lease, str(failure))
            raise failure from error
        self._pool.succeeded(lease)
        return answer

    def _note(self, request: _Request, seat: Seat, error: ModelServerError) -> None:
        # That time was up is known anyway: an earlier answer of the same server says more.
        if seat not in request.said or request.left_s > 0:
            request.said.pop(seat, None)
            request.said[seat] = error

    def _first_choice(self, request: _Request) -> Seat | None:
        """After a failure rather a server that has not failed this request yet; else the home, or any."""
        if not request.said:
            return request.home
        untried = [
            seat
            for seat in self._pool.seats
            if seat not in request.said and seat.takes_requests and (seat.returns_tokens or not request.needs_tokens)
        ]
        return min(untried, key=lambda seat: seat.occupancy(request.split).filled, default=None)

    async def _before_next_try(self, request: _Request) -> None:
        if request.tries >= MAX_TRIES:
            raise self._gave_up(request) from request.last
        pause_s = self._budget.reserve()
        if self._first_choice(request) is None:
            pause_s += random.uniform(0.5, 1.0) * min(FIRST_PAUSE_S * 2.0**request.tries, LONGEST_PAUSE_S)
        if pause_s >= request.left_s:
            self._budget.give_back()
            raise self._gave_up(request) from request.last
        try:
            await asyncio.sleep(pause_s)
        except asyncio.CancelledError:
            self._budget.give_back()
            raise

    def _gave_up(self, request: _Request) -> ModelServerError:
        seats = dict.fromkeys([*request.said, *self._pool.seats])
        said = "; ".join(f"{seat.url}: {self._what_it_said(request, seat)}" for seat in seats)
        waited_s = time.monotonic() - request.started
        limit = "the request's own timeout" if request.is_callers_limit else "openai.timeout"
        return ModelServerError(
            f"no inference server answered {request.what}: gave up after {waited_s:.1f} s and {request.tries} tries "
            f"({limit} is {request.timeout_s:g} s); {said or 'there is none, all have left'}"
        )

    def _what_it_said(self, request: _Request, seat: Seat) -> str:
        if seat in request.said:
            return str(request.said[seat])
        if not seat.takes_requests:
            return f"left alone since it failed: {seat.breaker.last_error or 'not well yet'}"
        at = seat.occupancy(request.split)
        return f"well, {at.in_flight} of {at.slots} slots in use"
