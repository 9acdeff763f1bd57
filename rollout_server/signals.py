"""Waiting for a change without polling the store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Signal:
    """Wakes everybody who waits, whenever it fires. Fire from any thread; wait on the loop it was made on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wake all waiters."""
        self._loop.call_soon_threadsafe(self._wake)

    def current(self) -> asyncio.Event:
        """The event that the next fire sets. Take it before looking at the state, so that no change is missed."""
        return self._event

    def _wake(self) -> None:
        self._event.set()
        self._event = asyncio.Event()


async def poll_until(
    signal: Signal,
    look: Callable[[], Awaitable[T]],
    is_done: Callable[[T], bool],
    *,
    wait_s: float,
    is_gone: Callable[[], Awaitable[bool]],
) -> T:
    """Look, and look again at every change, until the answer will do or wait_s is over; returns the last answer.

    A caller that hung up is not looked for again: what it would be given would be nobody's.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + wait_s
    while True:
        changed = signal.current()
        answer = await look()
        if is_done(answer) or loop.time() >= end:
            return answer
        try:
            async with asyncio.timeout_at(end):
                await changed.wait()
        except TimeoutError:
            return answer
        if await is_gone():
            return answer
