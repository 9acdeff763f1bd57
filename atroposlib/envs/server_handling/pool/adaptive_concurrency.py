"""How many requests one engine gets at once, from what it reports about itself. Pure: AIMD, as TCP does.

Latencies take no part: completions of one policy differ in length by orders of magnitude, so a slow answer says
little about the engine. Its queue and its cache say it directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.engines.engine_load import EngineLoad

DECREASE = 0.8
STEPS_TO_CEILING = 16
"""Polls without a queue that lead from nothing to the ceiling."""
CACHE_ROOMY = 0.9
CACHE_FULL = 0.98


@dataclass(frozen=True)
class Concurrency:
    """The limit of one server and what it was decided from."""

    limit: int
    """Requests at once."""
    waiting: int = 0
    """The engine's queue at the last look."""


def adapt(state: Concurrency, load: EngineLoad, *, in_flight: int, ceiling: int) -> Concurrency:
    """The limit after one look at the engine.

    Down by a fifth when the engine's queue does not shrink or its cache is full; up by a fixed step when it has no
    queue, room in the cache, and the limit was in use; else as it was.

    Args:
        in_flight: our requests there now.
        ceiling: the largest limit allowed; the smallest is 1.
    """
    is_queue_stuck = load.waiting > 0 and load.waiting >= state.waiting
    if is_queue_stuck or load.kv_cache_usage >= CACHE_FULL:
        # From what is in flight where that is less: a limit far above it would not be felt for several looks.
        limit = int(min(state.limit, max(in_flight, 1)) * DECREASE)
    elif load.waiting == 0 and load.kv_cache_usage < CACHE_ROOMY and in_flight >= state.limit:
        limit = state.limit + max(1, ceiling // STEPS_TO_CEILING)
    else:
        limit = state.limit
    return Concurrency(limit=min(max(limit, 1), ceiling), waiting=load.waiting)
