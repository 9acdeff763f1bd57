"""Where the bytes of groups lie: in memory, or in append-only files beside the index (segments.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from rollout_server.stores.base import Payload


class Place(msgspec.Struct, frozen=True):
    """Where one payload lies."""

    segment: int
    offset: int
    size: int
    """Bytes."""


def split(chunks: Sequence[Payload], places: Sequence[Place]) -> list[Payload]:
    """One payload a place, out of what Payloads.read gave for them; nothing is copied."""
    found: list[Payload] = []
    pieces = iter(chunks)
    rest = memoryview(b"")
    for place in places:
        if not rest:
            rest = memoryview(next(pieces))
        found.append(rest[: place.size])
        rest = rest[place.size :]
    return found


class Payloads(Protocol):
    """Places are given out on the event loop; bytes are written and read on threads."""

    def allocate(self, size: int) -> Place:
        """A place for a payload that is about to be written, or may never be."""

    def write(self, payloads: Sequence[tuple[Place, Payload]]) -> None:
        """Put bytes in their places; they are kept over a crash of the process, and over a power cut where so configured."""

    def read(self, places: Sequence[Place]) -> list[Payload]:
        """The bytes of these places, in order; what lies side by side may come as one piece."""

    def release(self, places: Iterable[Place]) -> None:
        """These will not be leased again; they may go, or be kept for export while there is room."""

    def close(self) -> None:
        """Nothing more will be written; called on the writing thread."""


class MemoryPayloads:
    """Bytes in this process, gone with it. The body of a request stays until the last of its groups is released."""

    def __init__(self) -> None:
        self._held: dict[int, Payload] = {}
        self._next = 0

    def allocate(self, size: int) -> Place:
        """See Payloads."""
        self._next += 1
        return Place(0, self._next, size)

    def write(self, payloads: Sequence[tuple[Place, Payload]]) -> None:
        """See Payloads. Views are kept, not copied: groups of one request are consumed together."""
        for place, payload in payloads:
            self._held[place.offset] = payload

    def read(self, places: Sequence[Place]) -> list[Payload]:
        """See Payloads."""
        return [self._held[place.offset] for place in places]

    def release(self, places: Iterable[Place]) -> None:
        """See Payloads."""
        for place in places:
            self._held.pop(place.offset, None)

    def close(self) -> None:
        """See Payloads."""
