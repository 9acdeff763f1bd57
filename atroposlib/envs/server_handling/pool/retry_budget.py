"""How often requests may be tried again: a share of the requests made, plus a floor. Pure, with an injected clock."""

from __future__ import annotations

from collections.abc import Callable

RETRIES_PER_REQUEST = 0.2
RETRIES_PER_S = 10.0


class RetryBudget:
    """A bucket of retries. When it is empty a retry waits; it is not lost.

    Args:
        burst: retries saved up at most: the requests that one dying server drops may move to another at once.
        clock: seconds, monotonic.
    """

    def __init__(self, burst: int, clock: Callable[[], float]) -> None:
        self._burst = float(burst)
        self._clock = clock
        self._balance = float(burst)
        self._filled_at = clock()

    def request_made(self) -> None:
        """A first try was sent: it pays for a part of a retry."""
        self._balance = min(self._burst, self._balance + RETRIES_PER_REQUEST)

    def reserve(self) -> float:
        """Take one retry; returns the seconds to wait before it is made, 0 while there are savings."""
        self._refill()
        self._balance -= 1.0
        return max(0.0, -self._balance / RETRIES_PER_S)

    def give_back(self) -> None:
        """The reserved retry will not be made."""
        self._balance = min(self._burst, self._balance + 1.0)

    def _refill(self) -> None:
        now = self._clock()
        self._balance = min(self._burst, self._balance + (now - self._filled_at) * RETRIES_PER_S)
        self._filled_at = now
