"""Stays beside a running engine: reports it to the rollout server, and ends a pause that nobody ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from atroposlib.launch.engine_look import Look

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
DEFAULT_MAX_PAUSE_S = 1200.0
"""Longer than a publication may take with all of its attempts at weight_sync.timeout_s=60; raise with it."""


@dataclass(frozen=True)
class Pause:
    """A pause as it was seen."""

    since: float
    """When it was first seen, or when the weights last changed during it, on the watch's clock."""
    weight_version: str | None


def seen_pause(before: Pause | None, look: Look, now: float) -> Pause | None:
    """The pause after another look; None when the engine generates.

    An engine that does not say stays what it was: it is busy with a transfer, or dead. A new version shows a trainer at
    work, so the time starts again.
    """
    if look.is_paused is None:
        return before
    if not look.is_paused:
        return None
    if before is None or look.weight_version not in (None, before.weight_version):
        return Pause(now, look.weight_version)
    return before


def is_orphaned(pause: Pause | None, look: Look, now: float, *, max_pause_s: float) -> bool:
    """Whether to resume: the engine says now that it is paused, and has been for too long. 0 seconds: never."""
    return bool(look.is_paused) and pause is not None and 0 < max_pause_s <= now - pause.since


class Engine(Protocol):
    """What is watched."""

    async def look(self) -> Look: ...  # noqa: D102
    async def resume(self) -> bool: ...  # noqa: D102


class InferenceWatch:
    """Looks at an engine again and again.

    Args:
        report: told of every look, and of a problem in words or "".
        max_pause_s: a pause longer than this has lost its trainer and is ended; 0: never.
    """

    def __init__(
        self,
        engine: Engine,
        report: Callable[[Look, str], Awaitable[None]],
        *,
        max_pause_s: float = DEFAULT_MAX_PAUSE_S,
        look_every_s: float = LOOK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._engine = engine
        self._report = report
        self._max_pause_s = max_pause_s
        self._look_every_s = look_every_s
        self._clock = clock
        self._sleep = sleep
        self._pause: Pause | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.step()
            await self._sleep(self._look_every_s)

    async def step(self) -> None:
        """One look, and what follows from it."""
        look, now = await self._engine.look(), self._clock()
        self._pause = seen_pause(self._pause, look, now)
        problem = "" if look.is_healthy else "its engine does not answer /health"
        if self._pause is not None and is_orphaned(self._pause, look, now, max_pause_s=self._max_pause_s):
            problem = await self._end_pause(now - self._pause.since)
            if not problem:
                look = replace(look, is_paused=False)
        await self._report(look, problem)

    async def _end_pause(self, lasted_s: float) -> str:
        """Resume the engine; the problem that is left, or ""."""
        if await self._engine.resume():
            log.error(
                "THE ENGINE WAS LEFT PAUSED for %.0f s: no trainer finished its publication, so it was resumed with the"
                " weights that it has; look at the trainer's log", lasted_s,
            )  # fmt: skip
            self._pause = None
            return ""
        log.error("THE ENGINE IS PAUSED for %.0f s and refuses to resume; start it again", lasted_s)
        return f"paused for {lasted_s:.0f} s, and it refuses to resume"
