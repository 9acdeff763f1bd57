"""Where the seconds of a step go."""

from __future__ import annotations

import time
from typing import Literal

Phase = Literal["wait", "train", "sync"]


class StepClock:
    """Adds up the phases of one step; a phase lasts until the next one starts."""

    def __init__(self) -> None:
        self._seconds: dict[Phase, float] = {}
        self._phase: Phase | None = None
        self._since = 0.0

    def start(self, phase: Phase) -> None:
        """Enter a phase."""
        self._stop()
        self._phase = phase

    def finish(self) -> dict[str, float]:
        """End the step; returns its seconds under the names in metrics.jsonl."""
        self._stop()
        seconds, self._seconds = self._seconds, {}
        named = {f"time/{phase}_s": seconds.get(phase, 0.0) for phase in ("wait", "train", "sync")}
        return {**named, "time/step_s": sum(seconds.values())}

    def _stop(self) -> None:
        now = time.monotonic()
        if self._phase is not None:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = None, now
