"""What a viewer has seen of a run so far: the latest counters, the rate of steps, the last events."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import aclosing, suppress

from rich.console import RenderableType

from atroposlib.cli.view_screen import Look, render
from atroposlib.client import RolloutClient
from atroposlib.errors import AtroposError
from atroposlib.wire.models import Event, Finding, Status

EVENTS_KEPT = 100
RATE_WINDOW_S = 120.0
RETRY_S = 1.0


class Watch:
    """Collects what the view shows.

    Args:
        client: of the rollout server.
    """

    def __init__(self, client: RolloutClient) -> None:
        self._client = client
        self._status = Status()
        self._findings: list[Finding] = []
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._steps: deque[tuple[float, int]] = deque()
        """(time, step) of the looks within RATE_WINDOW_S."""
        self._problem = ""

    async def look(self) -> None:
        """Ask for the counters and findings. Raises AtroposError."""
        self._status = await self._client.status()
        self._findings = (await self._client.diagnosis()).findings
        self._problem = ""
        now = time.monotonic()
        self._steps.append((now, self._status.step))
        while now - self._steps[0][0] > RATE_WINDOW_S or self._steps[0][1] > self._status.step:
            self._steps.popleft()

    async def look_again(self) -> None:
        """As look, but what goes wrong is shown in the picture."""
        try:
            await self.look()
        except AtroposError as error:
            silent_s = time.monotonic() - self._steps[-1][0]
            self._problem = f"this is what was seen {silent_s:.0f} s ago: {error}"

    async def read_events(self) -> None:
        """Collect the events that are there."""
        async with aclosing(self._client.events(follow=False)) as events:
            async for event in events:
                self._events.append(event)

    async def follow_events(self) -> None:
        """Collect events for ever; look_again says when there is no server."""
        while True:
            after = self._events[-1].id if self._events else 0
            with suppress(AtroposError):
                async with aclosing(self._client.events(after=after)) as events:
                    async for event in events:
                        self._events.append(event)
            await asyncio.sleep(RETRY_S)

    def picture(self, *, width: int) -> RenderableType:
        """The view as it stands, for a terminal of so many columns."""
        look = Look(self._status, self._findings, list(self._events), self._steps_per_s(), self._problem)
        return render(look, source=self._client.url, width=width)

    def _steps_per_s(self) -> float | None:
        if not self._steps:
            return None
        (start, first), (end, last) = self._steps[0], self._steps[-1]
        return (last - first) / (end - start) if last > first else None
