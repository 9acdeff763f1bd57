"""MOCK inference in a process of its own: fixed tokens after a fixed time, and how busy it was.

python -m benchmarks.env_overhead_mock PORT LATENCY_S SIGMA TOKENS SLOTS

A line on stdin is answered with one line of JSON: completions, and the mean share of SLOTS sequences that were being
sampled, since the line before.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from atroposlib.testing.mock_inference import Latency, MockInferenceServer


class SlotClock:
    """Integrates the number of sequences in flight over time."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._now = 0
        self._since = self._start = time.monotonic()
        self._busy = 0.0
        self.completions = 0

    def change(self, by: int) -> None:
        """Sequences begin, or, negative, end."""
        now = time.monotonic()
        self._busy += min(self._now, self._slots) * (now - self._since)
        self._now, self._since = self._now + by, now
        self.completions += max(0, -by)

    def read(self) -> dict[str, float]:
        """The figures since the last call."""
        self.change(0)
        seconds = time.monotonic() - self._start
        figures = {"completions": self.completions, "seconds": seconds, "busy": self._busy / (self._slots * seconds)}
        self._start, self._busy, self.completions = time.monotonic(), 0.0, 0
        return figures


class TimedServer(MockInferenceServer):
    """Counts sequences, not requests."""

    clock: SlotClock

    async def generate(self, body: dict[str, Any], asked: Any) -> Any:
        n = sum(one.n for one in asked)
        self.clock.change(n)
        try:
            return await super().generate(body, asked)
        finally:
            self.clock.change(-n)


async def serve(port: int, latency: Latency, tokens: int, slots: int) -> None:
    """Until stdin ends."""
    ids: Sequence[int] = list(range(10, 10 + tokens))
    server = TimedServer(lambda prompt, index: ids, latency_s=latency, port=port, keeps_requests=False)
    server.clock = SlotClock(slots)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with server:
        print("ready", flush=True)
        while await reader.readline():
            print(json.dumps(server.clock.read()), flush=True)


if __name__ == "__main__":
    port, tokens, slots = (int(sys.argv[i]) for i in (1, 4, 5))
    asyncio.run(serve(port, Latency(base_s=float(sys.argv[2]), sigma=float(sys.argv[3])), tokens, slots))
