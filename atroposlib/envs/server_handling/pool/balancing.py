"""Which server gets the next request: the one with the least in flight for its size. Decisions only, no waiting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SPARE_BELOW = 0.8
"""A server filled less than this takes requests over from one that is full."""


@dataclass(frozen=True)
class Occupancy:
    """How full one server is, for one kind of request (training or evaluation)."""

    in_flight: int
    slots: int
    """Requests of this kind that it may have in flight now; 0: it takes none."""
    reserved: int = 0
    """Open sessions that will come back here."""
    others_in_flight: int = 0
    """Requests of the other kind: they decide between equals."""
    is_suspect: bool = False
    """Said to be unwell by someone other than the circuit breaker: taken last."""

    @property
    def is_full(self) -> bool:
        """No request fits in."""
        return self.in_flight >= self.slots

    @property
    def filled(self) -> float:
        """Share of the slots in use; infinite where there are none."""
        return self.in_flight / self.slots if self.slots else math.inf


def usable_slots(limit: int, weight: float) -> int:
    """Slots that a weight leaves of a limit: rounded up, at least one, so that no weight stops everything.

    Args:
        limit: requests at once under weight 1.
        weight: this environment's share of the servers, 0 to 1.
    """
    # Without the subtraction 0.07 * 100 would round up to 8.
    return max(1, math.ceil(limit * weight - 1e-9))


def least_busy(servers: Sequence[Occupancy]) -> int | None:
    """Position of the server that a new request goes to; None while every server is full."""
    free = [index for index, server in enumerate(servers) if not server.is_full]
    return min(free, key=lambda index: _preference(servers[index]), default=None)


def home_of_session(servers: Sequence[Occupancy]) -> int | None:
    """Position of the server that a new session settles on, full ones included; None if none takes requests."""
    open_ones = [index for index, server in enumerate(servers) if server.slots]
    return min(open_ones, key=lambda index: _preference(servers[index]), default=None)


def may_leave_home(home: Occupancy, others: Sequence[Occupancy]) -> int | None:
    """Position in `others` of the server that a session's request moves to, losing its cached prefix; None: it waits.

    It moves when its own server takes nothing, or is full while another has room to spare. While all are about equally
    full it waits: moving would cost every session its cache and win nothing.
    """
    if not home.is_full:
        return None
    limit = 1.0 if home.slots == 0 else SPARE_BELOW
    best = least_busy(others)
    return best if best is not None and others[best].filled < limit else None


def _preference(server: Occupancy) -> tuple[bool, float, int]:
    load = (max(server.in_flight, server.reserved)) / server.slots if server.slots else math.inf
    return (server.is_suspect, load, server.others_in_flight)
