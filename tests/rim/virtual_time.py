"""An event loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Where the loop would wait, time passes at once."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "every task waits for something that no timer brings"
            self.now_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Seconds since its start cost nothing, and are the same in every run. For programs without threads and sockets."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run_in_virtual_time(program: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """What the program returns, and how many seconds it took."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        started_s = runner.get_loop().time()
        result = runner.run(program)
        return result, runner.get_loop().time() - started_s
