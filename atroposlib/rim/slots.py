"""Bounds the calls in flight, and says whose turn is next: what the last judgement waits for goes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

URGENT, DOUBTED, FIRST, FURTHER = range(4)
"""Ranks: calls that finish something; samples of a judgement that will need its large model; the first sample of each
other one, which shows whether it will; the rest."""


class Line(Protocol):
    """Where a call waits for its turn."""

    def held(self, *, is_urgent: bool) -> AbstractAsyncContextManager[None]:
        """One slot, until the end of the block."""
        ...


class Place:
    """Where some calls of one judgement stand in the line; a new rank also moves those that wait already."""

    def __init__(self, slots: CallSlots, rank: int) -> None:
        self.rank = rank
        self._slots = slots

    def held(self, *, is_urgent: bool) -> AbstractAsyncContextManager[None]:
        """One slot, until the end of the block."""
        return self._slots.held(is_urgent=is_urgent, place=self)


class CallSlots:
    """`async with slots.held(is_urgent=...)` waits for one of `size` slots.

    The lowest rank goes first: a judgement whose large model is found late to be needed would end alone, after all
    others. Among equals, first come first served.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._urgent, self._patient = Place(self, URGENT), Place(self, FIRST)
        self._waiting: list[tuple[Place, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def held(self, *, is_urgent: bool, place: Place | None = None) -> AsyncIterator[None]:
        """One slot, until the end of the block."""
        await self._take(self._urgent if is_urgent else place or self._patient)
        try:
            yield
        finally:
            self._give_back()

    async def _take(self, place: Place) -> None:
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append((place, turn))
        # Not at once: of calls that come together, those of the lowest rank are to get the free slots.
        loop.call_soon(self._hand_out)
        try:
            await turn
        except asyncio.CancelledError:
            # The slot may have been given to us just before.
            if turn.done() and not turn.cancelled():
                self._give_back()
            raise

    def _give_back(self) -> None:
        self._free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        if self._free == 0:
            return
        self._waiting = [(place, turn) for place, turn in self._waiting if not turn.done()]
        while self._free > 0 and self._waiting:
            # Ranks change while calls wait, so no sorted line would stay sorted.
            chosen = min(self._waiting, key=lambda waiting: waiting[0].rank)
            self._waiting.remove(chosen)
            self._free -= 1
            chosen[1].set_result(None)
