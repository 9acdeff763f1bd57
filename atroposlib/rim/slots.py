"""Bounds the calls in flight; a call that finishes something goes before one that begins something."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class CallSlots:
    """`async with slots.held(is_urgent=...)` waits for one of `size` slots.

    Urgent callers go first: a judgement that waits for its large model would otherwise wait behind the small calls of
    every other judgement, and the last of them would end alone. Among equals, first come first served.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._urgent: deque[asyncio.Future[None]] = deque()
        self._patient: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def held(self, *, is_urgent: bool) -> AsyncIterator[None]:
        """One slot, until the end of the block."""
        await self._take(self._urgent if is_urgent else self._patient)
        try:
            yield
        finally:
            self._give_back()

    async def _take(self, line: deque[asyncio.Future[None]]) -> None:
        if self._free > 0:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # The slot may have been given to us just before.
            if turn.done() and not turn.cancelled():
                self._give_back()
            raise

    def _give_back(self) -> None:
        for line in (self._urgent, self._patient):
            while line:
                turn = line.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._free += 1
