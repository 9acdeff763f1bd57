"""A coroutine on an event loop and thread of its own: the caller's thread belongs to the trainer, or to a notebook."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from atroposlib.errors import AtroposError


class Background:
    """Runs one coroutine from start() to stop(), or to its own end.

    Args:
        name: of the thread.
        work: makes the coroutine.
        on_failure: told of what ended it, on its thread; not of stop().
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], Coroutine[Any, Any, None]],
        *,
        on_failure: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self._work = work
        self._on_failure = on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._has_begun = threading.Event()
        # A daemon: a process that ends without stop() must not hang on it.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.failure: Exception | None = None
        """What ended it."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        self._has_begun.wait()

    def call_soon(self, call: Callable[[], object]) -> None:
        """Have something called on the loop, if it still runs."""
        if self._loop is not None:
            # It may have closed just now.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call)

    def stop(self, timeout_s: float) -> bool:
        """Cancel it and wait for its end. False: it has not ended within timeout_s."""
        if self._thread.is_alive():
            # An impatient Ctrl-C may come between start and begin.
            self._has_begun.wait(timeout_s)
        if self._task is not None:
            self.call_soon(self._task.cancel)
        return self.join(timeout_s)

    def join(self, timeout_s: float) -> bool:
        """Wait for its end. False: it has not ended within timeout_s."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._main())
        except asyncio.CancelledError:
            pass
        except SystemExit as error:
            # Else the thread would end without a word.
            self._fail(
                AtroposError(f"{self._thread.name} was ended by sys.exit({error.code!r}); raise an error instead")
            )
        except Exception as error:
            self._fail(first_cause(error))
        finally:
            self._has_begun.set()

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self._on_failure(error)

    async def _main(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._has_begun.set()
        await self._work()


def first_cause(error: Exception) -> Exception:
    """The first error inside groups of them, as task groups raise."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
