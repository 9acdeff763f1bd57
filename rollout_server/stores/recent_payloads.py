"""The newest payloads, still in memory: a batch is mostly made of groups that have just come in."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from rollout_server.stores.base import Payload
from rollout_server.stores.payloads import Place


class RecentPayloads:
    """First in, first out, up to a number of bytes. Safe from several threads.

    A view keeps the whole buffer behind it in memory, so that is what counts, once for all its views.

    Args:
        limit_bytes: what all of them may hold.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[Place, Payload] = {}
        self._views: Counter[int] = Counter()
        """Views held, by the id of their buffer."""
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, payloads: Sequence[tuple[Place, Payload]]) -> None:
        """Keep these; the oldest go where they are too many."""
        with self._lock:
            for place, payload in payloads:
                self._held[place] = payload
                self._count(payload)
            while self._bytes > self._limit_bytes:
                self._forget(next(iter(self._held)))

    def get(self, place: Place) -> Payload | None:
        """The payload, if it is still here."""
        return self._held.get(place)

    def drop(self, places: Iterable[Place]) -> None:
        """These will not be asked for again."""
        with self._lock:
            for place in places:
                if place in self._held:
                    self._forget(place)

    def _count(self, payload: Payload) -> None:
        if isinstance(payload, memoryview):
            self._views[id(payload.obj)] += 1
            if self._views[id(payload.obj)] > 1:
                return
        self._bytes += _bytes_held(payload)

    def _forget(self, place: Place) -> None:
        payload = self._held.pop(place)
        if isinstance(payload, memoryview):
            self._views[id(payload.obj)] -= 1
            if self._views[id(payload.obj)]:
                return
            del self._views[id(payload.obj)]
        self._bytes -= _bytes_held(payload)


def _bytes_held(payload: Payload) -> int:
    return memoryview(payload.obj).nbytes if isinstance(payload, memoryview) else len(payload)
