"""Group commit: one thread runs whatever requests have come in as one SQLite transaction, and only then answers.

An answer therefore means durable, and the price of a disk flush is shared by everybody who waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from atroposlib.errors import AtroposError

log = logging.getLogger(__name__)

MAX_JOBS_PER_COMMIT = 512
JOIN_TIMEOUT_S = 30.0

T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    call: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class GroupCommit:
    """The writer thread.

    Args:
        connection: gives the connection in use (a job may exchange it).
        on_commit: called in the thread after each commit, before anybody is answered.
        on_rollback: called in the thread after a transaction that failed as a whole.
    """

    def __init__(
        self,
        connection: Callable[[], sqlite3.Connection],
        *,
        on_commit: Callable[[], None],
        on_rollback: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._on_commit = on_commit
        self._on_rollback = on_rollback
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    async def submit(self, call: Callable[[], T]) -> T:
        """Run `call` in the writer thread; returns when its transaction is committed.

        Raises:
            AtroposError: the call's own refusal; it must come before its first write.
            Exception: the transaction failed and nothing of it happened.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(call, loop, future))
        return await future

    async def close(self) -> None:
        """Finish what was submitted, then close the connection."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)

    def _run(self) -> None:
        is_open = True
        while is_open:
            jobs = [self._jobs.get()]
            while jobs[-1] is not None and len(jobs) < MAX_JOBS_PER_COMMIT:
                try:
                    jobs.append(self._jobs.get_nowait())
                except queue.Empty:
                    break
            is_open = jobs[-1] is not None
            self._commit_together([job for job in jobs if job is not None])
        self._connection().close()

    def _commit_together(self, jobs: Sequence[_Job]) -> None:
        outcomes: list[tuple[_Job, Any, Exception | None]] = []
        try:
            self._connection().execute("BEGIN IMMEDIATE")
            for job in jobs:
                try:
                    outcomes.append((job, job.call(), None))
                except AtroposError as error:
                    outcomes.append((job, None, error))
            self._connection().execute("COMMIT")
            self._on_commit()
        except Exception as error:  # disk full, corrupt file, a bug: nobody's request happened, and everybody is told
            log.exception("store transaction failed; %d requests are refused", len(jobs))
            if self._connection().in_transaction:
                self._connection().execute("ROLLBACK")
            self._on_rollback()
            outcomes = [(job, None, error) for job in jobs]
        for job, result, failure in outcomes:
            job.loop.call_soon_threadsafe(_settle, job.future, result, failure)


def _settle(future: asyncio.Future[Any], result: Any, failure: Exception | None) -> None:
    if future.done():  # the caller went away; the work is durable all the same
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)
