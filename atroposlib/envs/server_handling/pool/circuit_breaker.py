"""Leaves a failing server alone and lets it back gently: closed, open, half-open. Pure, with an injected clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

FAILURES_TO_OPEN = 3
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
PROBATION_S = 5.0
"""A half-open server without a failure for so long is closed, even if its first answer takes longer."""


class Circuit(StrEnum):
    """Where a breaker stands."""

    CLOSED = "closed"
    """Requests pass."""
    OPEN = "open"
    """None passes; the server is asked for its health after a pause."""
    HALF_OPEN = "half_open"
    """The server says that it is well: a few requests pass, to see whether it is."""


@dataclass
class CircuitBreaker:
    """What one server's outcomes say about sending it more.

    Args:
        clock: seconds, monotonic.
        jitter: factor on each pause, so that processes do not all come back at once.
    """

    clock: Callable[[], float]
    jitter: Callable[[], float] = lambda: 1.0
    circuit: Circuit = Circuit.CLOSED
    epoch: int = 0
    """Rises when the circuit opens: an outcome of an earlier epoch says nothing about the server of today."""
    last_error: str = ""
    _failures_in_a_row: int = 0
    _openings: int = 0
    _next_check_at: float = field(default=0.0, repr=False)
    _half_open_since: float = field(default=0.0, repr=False)

    def await_check(self) -> None:
        """Let nothing pass before a health check, which is due now: for a server that has just joined."""
        self.circuit = Circuit.OPEN
        self._next_check_at = self.clock()

    def succeeded(self, epoch: int) -> None:
        """A request that was sent in this epoch was answered."""
        if epoch != self.epoch or self.circuit is Circuit.OPEN:
            return
        self._close()

    def failed(self, epoch: int, error: str = "") -> None:
        """A request that was sent in this epoch failed by the server's fault."""
        if epoch != self.epoch or self.circuit is Circuit.OPEN:
            return
        self.last_error = error
        self._failures_in_a_row += 1
        if self.circuit is Circuit.HALF_OPEN or self._failures_in_a_row >= FAILURES_TO_OPEN:
            self._open()

    def check_in_s(self) -> float:
        """Seconds until the next health check is due; 0 if it is."""
        return max(0.0, self._next_check_at - self.clock())

    def check_succeeded(self) -> None:
        """The server says that it is well."""
        if self.circuit is Circuit.OPEN:
            self.circuit = Circuit.HALF_OPEN
            self._half_open_since = self.clock()

    def check_failed(self, error: str = "") -> None:
        """The server is still down: the next check comes later."""
        if self.circuit is Circuit.OPEN:
            self.last_error = error
            self._pause()

    def settle(self) -> None:
        """Close a circuit that stood half-open through its probation."""
        if self.circuit is Circuit.HALF_OPEN and self.clock() - self._half_open_since >= PROBATION_S:
            self._close()

    def _open(self) -> None:
        self.circuit = Circuit.OPEN
        self.epoch += 1
        self._pause()

    def _close(self) -> None:
        self.circuit = Circuit.CLOSED
        self._failures_in_a_row = 0
        self._openings = 0

    def _pause(self) -> None:
        pause_s = min(FIRST_PAUSE_S * 2.0 ** min(self._openings, 16), LONGEST_PAUSE_S)
        self._openings += 1
        self._next_check_at = self.clock() + pause_s * self.jitter()


def trial_slots(slots: int) -> int:
    """Requests that a half-open server gets at once: an eighth, so that one slow answer does not hold up all."""
    return max(1, slots // 8)
