"""What happened lately, for people who watch: a bounded memory of events and the streams that follow it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from atroposlib.errors import AtroposError
from atroposlib.wire.models import Event
from rollout_server.signals import Signal

CAPACITY = 1000
MAX_WATCHERS = 64
KEEP_ALIVE_S = 15.0


class TooManyWatchersError(AtroposError):
    """As many streams of events are open as the server serves."""

    code = "too_many_watchers"
    status = 429


class EventLog:
    """The last events of this process. Append from any thread; make, read and close it on the event loop.

    Args:
        capacity: events remembered; a watcher that is further behind misses the oldest.
        max_watchers: streams open at once.
    """

    def __init__(self, *, capacity: int = CAPACITY, max_watchers: int = MAX_WATCHERS) -> None:
        self._events: deque[Event] = deque(maxlen=capacity)
        # Milliseconds, so that ids rise over a restart too and a watcher that reconnects misses nothing.
        self._last_id = int(time.time() * 1000)
        self._lock = threading.Lock()
        self._changed = Signal()
        self._max_watchers = max_watchers
        self._watchers = 0
        self._is_closed = False

    def append(self, kind: str, text: str) -> None:
        """Remember an event and wake those who watch."""
        with self._lock:
            self._last_id += 1
            self._events.append(Event(id=self._last_id, time_s=time.time(), kind=kind, text=text))
        self._changed.fire()

    def after(self, event_id: int) -> list[Event]:
        """The remembered events behind this id; all of them for an id that was never given (the clock went back)."""
        with self._lock:
            if event_id > self._last_id:
                event_id = 0
            return [event for event in self._events if event.id > event_id]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hold one of the places for watchers.

        Raises:
            TooManyWatchersError: all are taken.
        """
        if self._watchers >= self._max_watchers:
            raise TooManyWatchersError(
                f"{self._watchers} streams of events are open, which is the limit; close one, or poll with ?follow=false"
            )
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    async def follow(self, event_id: int, *, keep_alive_s: float = KEEP_ALIVE_S) -> AsyncGenerator[list[Event], None]:
        """The events behind this id, then new ones as they come, until the log is closed.

        Yields:
            An empty list after every keep_alive_s without news.
        """
        while not self._is_closed:
            changed = self._changed.current()
            events = self.after(event_id)
            if events:
                event_id = events[-1].id
                yield events
                continue
            try:
                async with asyncio.timeout(keep_alive_s):
                    await changed.wait()
            except TimeoutError:
                yield []

    def close(self) -> None:
        """End every stream; call it when the server drains."""
        self._is_closed = True
        self._changed.fire()
