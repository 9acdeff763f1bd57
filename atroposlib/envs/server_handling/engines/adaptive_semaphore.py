"""A semaphore of which only a share may be used, so that several environments can divide one inference server."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Literal


class AsyncSemWithAdaptiveWeight:
    """Of `value` slots, ceil(value * weight) can be held at once, and never fewer than one. First come, first served.

    Slots already held stay held when the weight falls; the next ones are given out once enough came back.
    """

    def __init__(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"a semaphore needs at least 1 slot, got {value}")
        self.max_val = value
        self.weight = 1.0
        self._value = value
        self._waiters: deque[asyncio.Future[None]] = deque()

    def update_weight(self, weight: float) -> None:
        """Use this share of the slots from now on: a number from 0 to 1."""
        self.weight = weight
        self._wake()

    def min_val(self) -> float:
        """Slots that must stay free."""
        # Rounded: 10 * (1 - 0.9) is a hair below 1 in floating point, which would give a tenth slot away.
        return min(max(round(self.max_val * (1 - self.weight), 9), 0), self.max_val - 1)

    def locked(self) -> bool:
        """Whether acquire() would wait now."""
        return self._value <= self.min_val()

    async def acquire(self) -> Literal[True]:
        """Take a slot, waiting for one."""
        if not self._waiters and not self.locked():
            self._value -= 1
            return True
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # The slot was given to us in the same moment: pass it on.
                self.release()
            elif turn in self._waiters:
                self._waiters.remove(turn)
            raise
        return True

    def release(self) -> None:
        """Give a slot back."""
        self._value += 1
        self._wake()

    def _wake(self) -> None:
        while self._waiters and not self.locked():
            turn = self._waiters.popleft()
            if not turn.done():
                self._value -= 1
                turn.set_result(None)

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
