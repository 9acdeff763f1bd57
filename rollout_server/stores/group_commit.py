"""Group commit: whatever requests have changed by now is written as one transaction on a thread, and only then are they answered.

An answer therefore means durable, and the price of a disk flush is shared by everybody who waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from atroposlib.errors import StoreUnavailableError

log = logging.getLogger(__name__)

Unit = Callable[[], None]
"""Writes some changes, all or nothing."""


class GroupCommit:
    """Runs units one after another on a thread of its own.

    Args:
        take: gives the units that have come up since it was last asked; called on the event loop.
        on_commit: called on the event loop after they are written, before anybody is answered.
        on_failure: called on the event loop when one of them failed; what came up since is void as well. Where it fails too,
            nothing is written any more.
        is_inline: units do not wait for a disk: run them on the event loop.
    """

    def __init__(
        self,
        take: Callable[[], Sequence[Unit]],
        *,
        on_commit: Callable[[], None],
        on_failure: Callable[[], None],
        is_inline: bool,
    ) -> None:
        self._is_inline = is_inline
        self._take = take
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="group-commit")
        self._wanted = asyncio.Event()
        self._next = _quiet_future()
        self._broken_by: Exception | None = None
        self._task = asyncio.create_task(self._commit_forever())

    async def written(self) -> None:
        """Returns when all that has changed so far is durable.

        Raises:
            StoreUnavailableError: the transaction failed and nothing of it happened.
        """
        self.check()
        self._wanted.set()
        await asyncio.shield(self._next)

    def check(self) -> None:
        """Raises StoreUnavailableError where nothing is written any more."""
        if self._broken_by is not None:
            raise StoreUnavailableError(
                f"the store could not return to what it last wrote ({self._broken_by}); check disk space and rights, then"
                " restart the server"
            ) from self._broken_by

    async def close(self) -> None:
        """Write what is left, then end the thread. A second call does nothing."""
        if not self._task.done():
            await self.written()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def _commit_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while self._broken_by is None:
            await self._wanted.wait()
            self._wanted.clear()
            waiting, self._next = self._next, _quiet_future()
            try:
                units = self._take()
                if self._is_inline:
                    _run_all(units)
                elif units:
                    await loop.run_in_executor(self._thread, _run_all, units)
                self._on_commit()
                waiting.set_result(None)
            except (
                Exception
            ) as error:  # disk full, corrupt file, a bug: nobody's request happened, and everybody is told
                log.exception("store transaction failed; the requests in it are refused")
                later, self._next = self._next, _quiet_future()
                self._recover()
                for future in (waiting, later):
                    future.set_exception(_as_unavailable(error))

    def _recover(self) -> None:
        try:
            self._on_failure()
        except Exception as error:  # whatever it is, those who wait must be told
            log.exception("the store cannot go on after the failed transaction; every request is refused")
            self._broken_by = error


def _as_unavailable(error: Exception) -> StoreUnavailableError:
    unavailable = StoreUnavailableError(
        f"the store could not write ({error}); nothing of this request happened: check disk space and rights, then try again"
    )
    unavailable.__cause__ = error
    return unavailable


def _run_all(units: Sequence[Unit]) -> None:
    for unit in units:
        unit()


def _quiet_future() -> asyncio.Future[None]:
    """A future whose failure need not be looked at: nobody may be waiting."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
