"""Measures how long at least one request was in flight."""

from __future__ import annotations

import time
from types import TracebackType


class BusyClock:
    """Runs while it is entered at least once: ``with clock: await request``."""

    def __init__(self) -> None:
        self._entered = 0
        self._since = 0.0
        self._total_s = 0.0

    @property
    def seconds(self) -> float:
        """Busy time so far."""
        return self._total_s + (time.monotonic() - self._since if self._entered else 0.0)

    def __enter__(self) -> None:
        if self._entered == 0:
            self._since = time.monotonic()
        self._entered += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._total_s += time.monotonic() - self._since
