"""Asks a failed server whether it is well, ever less often, and lets it back. No check costs a completion."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from atroposlib.envs.server_handling.pool.circuit_breaker import PROBATION_S, Circuit
from atroposlib.envs.server_handling.pool.seat import Seat

log = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.25
"""Between looks at a server that is marked as failed; it decides itself when it is asked."""


async def bring_back(seat: Seat, changed: Callable[[Seat], None]) -> None:
    """Run from the opening of a circuit until it is closed, or opens again.

    Args:
        changed: called whenever the seat may take more requests than before.
    """
    breaker = seat.breaker
    while breaker.circuit is Circuit.OPEN:
        await asyncio.sleep(breaker.check_in_s())
        error = await _what_is_wrong(seat)
        if error is None:
            breaker.check_succeeded()
        else:
            log.debug("inference server is still down: %s: %s", seat.url, error)
            breaker.check_failed(error)
    log.info("inference server is well: %s", seat.url)
    seat.server.server_healthy = True
    changed(seat)
    await asyncio.sleep(PROBATION_S)
    breaker.settle()
    changed(seat)


def can_recover(seat: Seat) -> bool:
    """Whether the client can ask its server by itself; stand-ins cannot."""
    return callable(getattr(seat.server, "recover", None))


async def await_recovery(seat: Seat, changed: Callable[[Seat], None]) -> None:
    """Run until a server that failed a direct request, its circuit closed, is no longer marked as failed.

    Args:
        changed: called when it is.
    """
    is_well = False
    while not is_well:
        await asyncio.sleep(LOOK_EVERY_S)
        is_well = await _has_recovered(seat)
    changed(seat)


async def _has_recovered(seat: Seat) -> bool:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await seat.server.recover()
    # As in _what_is_wrong.
    except Exception as error:
        log.debug("inference server is still down: %s: %s", seat.url, error)
        return False


async def _what_is_wrong(seat: Seat) -> str | None:
    check = getattr(seat.server, "check_health", None)
    if check is None or not getattr(seat.server.config, "health_check", True):
        return None
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await check()
    # Checks are written by authors of servers too: whatever they raise means that the server is not well.
    except Exception as error:
        return str(error) or type(error).__name__
    return None
