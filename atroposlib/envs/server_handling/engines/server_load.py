"""What one inference server is doing, counted on this side."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

MAX_PAUSE_S = 5.0


@dataclass
class ServerLoad:
    """Requests, tokens and failures of one server."""

    in_flight: int = 0
    """Requests under way, those waiting for a slot and those of evaluations included."""
    eval_in_flight: int = 0
    """Those of evaluations."""
    requests: int = 0
    failures: int = 0
    sampled_tokens: int = 0
    completions: int = 0
    failures_in_a_row: int = 0
    retry_at: float = field(default=0.0, repr=False)
    """Monotonic time before which a server that failed is left alone."""

    def note_failure(self) -> None:
        """Count a failure, and leave the server alone for longer the more of them came in a row."""
        self.failures += 1
        self.failures_in_a_row += 1
        pause_s = min(0.25 * 2 ** min(self.failures_in_a_row, 8), MAX_PAUSE_S)
        self.retry_at = time.monotonic() + pause_s * random.uniform(0.5, 1.0)
