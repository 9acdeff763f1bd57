"""Which event loop an environment's process runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_fast(work: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on uvloop where there is one: thousands of requests in flight are mostly the loop's work."""
    try:
        from uvloop import new_event_loop
    except ImportError:  # it is not made for Windows
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)
