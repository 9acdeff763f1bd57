"""Finds code that blocks the event loop, and names the line: while it runs, every other rollout stands still."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import atroposlib

BLOCKED_S = 0.1
_BEAT_S = 0.02
_SDK = str(Path(atroposlib.__file__).parent)


class LoopWatch:
    """``async with LoopWatch(file) as watch``: afterwards `watch.blocked` has seconds by `FILE:LINE in FUNCTION`.

    Args:
        file: the author's file; only what it calls is reported, and imports are not.
        threshold_s: shorter blocks are ignored.
    """

    def __init__(self, file: Path, *, threshold_s: float = BLOCKED_S) -> None:
        self._file = str(file)
        self._threshold_s = threshold_s
        self._last_beat = time.monotonic()
        self._is_over = threading.Event()
        self.blocked: dict[str, float] = {}

    async def __aenter__(self) -> Self:
        self._last_beat = time.monotonic()
        self._beating = asyncio.create_task(self._beat())
        self._thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        self._thread.join(1.0)

    async def _beat(self) -> None:
        while True:
            self._last_beat = time.monotonic()
            await asyncio.sleep(_BEAT_S)

    def _watch(self, watched_thread: int) -> None:
        while not self._is_over.wait(_BEAT_S):
            late_s = time.monotonic() - self._last_beat - _BEAT_S
            if late_s < self._threshold_s:
                continue
            place = blamed(sys._current_frames().get(watched_thread), self._file)
            if place is not None:
                self.blocked[place] = max(late_s, self.blocked.get(place, 0.0))


def blamed(frame: FrameType | None, file: str) -> str | None:
    """The line of `file` that calls what runs now; None when the SDK, an import or the idle loop runs."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name == file:
            return f"{Path(file).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        if name.startswith((_SDK, "<frozen importlib")) or frame.f_code.co_name == "run_forever":
            return None
        frame = frame.f_back
    return None
