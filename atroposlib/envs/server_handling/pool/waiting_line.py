"""A line of requests that wait for a slot, first come first served."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.pool.seat import Seat


@dataclass(eq=False)
class Waiter:
    """One request that waits."""

    order: int
    """Rises with the time of arrival, over all lines."""
    needs_tokens: bool
    seat: asyncio.Future[Seat]
    """Resolves to the server whose slot it got; cancelled when the request gave up."""


class Line:
    """Waiters in order of arrival. Those that gave up are dropped when they come to the front."""

    def __init__(self) -> None:
        self._waiters: deque[Waiter] = deque()

    def join(self, waiter: Waiter) -> None:
        """Stand at the end."""
        self._waiters.append(waiter)

    def first(self) -> Waiter | None:
        """Who is next; stays in the line."""
        while self._waiters and self._waiters[0].seat.done():
            self._waiters.popleft()
        return self._waiters[0] if self._waiters else None

    def leave(self) -> Waiter:
        """Take the first one out; there must be one."""
        return self._waiters.popleft()

    def take_all(self) -> list[Waiter]:
        """Empty the line."""
        waiters = [waiter for waiter in self._waiters if not waiter.seat.done()]
        self._waiters.clear()
        return waiters

    def merge(self, waiters: Iterable[Waiter]) -> None:
        """Let others in where their time of arrival puts them."""
        self._waiters = deque(heapq.merge(self._waiters, waiters, key=lambda waiter: waiter.order))
