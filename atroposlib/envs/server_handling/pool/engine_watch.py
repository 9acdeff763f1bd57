"""Looks at an engine's own metrics while it is in use, and moves its concurrency limit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from atroposlib.envs.server_handling.pool.adaptive_concurrency import Concurrency, adapt
from atroposlib.envs.server_handling.pool.seat import Seat, Split
from atroposlib.errors import ModelServerError

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.engines.engine_load import EngineLoad

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
LOOK_TIMEOUT_S = 2.0
LONGEST_PAUSE_S = 60.0
"""Between looks at an engine that gives no metrics."""


def can_be_watched(seat: Seat) -> bool:
    """Whether the client can ask its engine for metrics at all."""
    return hasattr(seat.server, "engine_load")


async def follow_load(seat: Seat, changed: Callable[[Seat], None]) -> None:
    """Run while the server has requests in flight. Without metrics the limit is the configured one.

    A look that fails changes nothing: an engine that is overloaded may be slow to answer this too.

    Args:
        changed: called after each look that gave metrics.
    """
    pause_s = LOOK_EVERY_S
    while True:
        await asyncio.sleep(pause_s)
        if not seat.total_in_flight:
            return
        try:
            load = await _look(seat)
        except (ModelServerError, TimeoutError) as error:
            log.debug("%s: no metrics this time: %s", seat.url, error)
            pause_s = LOOK_EVERY_S
            continue
        if load is None:
            seat.concurrency = Concurrency(limit=seat.ceiling)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            adopt(seat, load)
            pause_s = LOOK_EVERY_S
        changed(seat)


def adopt(seat: Seat, load: EngineLoad) -> None:
    """Move the seat's limit after one look."""
    before = seat.concurrency
    seat.concurrency = adapt(before, load, in_flight=seat.in_flight[Split.TRAIN], ceiling=seat.ceiling)
    if seat.concurrency.limit != before.limit:
        log.debug("%s: %d requests at once, was %d: %s", seat.url, seat.concurrency.limit, before.limit, load)


async def _look(seat: Seat) -> EngineLoad | None:
    async with asyncio.timeout(LOOK_TIMEOUT_S):
        return await seat.server.engine_load()
