"""The load generator's books: every group that went in comes out once, unchanged."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from benchmarks.rollout_server.exchanges import Exchange


class AccountingError(AssertionError):
    """A group was lost, doubled or altered."""


class Ledger:
    """Numbers of the groups that are in the server, shared by all threads.

    Args:
        exchange: takes a batch apart, and holds what was sent.
        compare_every: the groups of one batch in so many are compared byte by byte.
    """

    def __init__(self, exchange: Exchange, *, compare_every: int) -> None:
        self._exchange = exchange
        self._compare_every = compare_every
        self._lock = threading.Lock()
        self._inside: set[int] = set()
        self._next = 0
        self.batches = 0
        self.groups_out = 0
        self.groups_compared = 0

    @property
    def groups_in(self) -> int:
        """Groups sent so far."""
        return self._next

    @property
    def groups_inside(self) -> int:
        """Groups that were sent and did not come back yet."""
        return len(self._inside)

    def reserve(self) -> int:
        """First number of the next request; its groups count as sent from now on."""
        count = len(self._exchange.payload.groups)
        with self._lock:
            first = self._next
            self._next += count
            self._inside.update(range(first, first + count))
        return first

    def settle(self, batch: bytes) -> int:
        """Book a batch; returns how many groups it held.

        Raises:
            AccountingError: a group too many or too few, one that is not inside, or one that came back altered.
        """
        numbers, expected = self._exchange.numbers(batch), len(self._exchange.payload.groups)
        if len(numbers) != expected:
            raise AccountingError(f"a batch holds {len(numbers)} groups, expected {expected}")
        with self._lock:
            for number in numbers:
                if number not in self._inside:
                    raise AccountingError(f"group {number} came back, but is not inside: doubled or never sent")
                self._inside.remove(number)
        if self.batches % self._compare_every == 0:
            self._compare(numbers, batch)
        self.batches += 1
        self.groups_out += len(numbers)
        return len(numbers)

    def _compare(self, numbers: Sequence[int], batch: bytes) -> None:
        for number, data in zip(numbers, self._exchange.groups(batch), strict=True):
            self.groups_compared += 1
            original = self._exchange.payload.original(number)
            if data != original:
                at = next((i for i, (a, b) in enumerate(zip(data, original, strict=False)) if a != b), len(original))
                raise AccountingError(
                    f"group {number} came back altered at byte {at} ({len(data)} of {len(original)} bytes)"
                )
