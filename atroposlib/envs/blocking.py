"""Blocking functions off the event loop: on a bounded number of threads or processes, with a time limit."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from atroposlib.errors import RolloutError

T = TypeVar("T")


class _DaemonThreads(Executor):
    """A thread for each call, however many there are. ThreadPoolExecutor would wait for a hung one when Python ends."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="atropos-blocking", daemon=True).start()
        return future


class BlockingPool:
    """Made on first use, so that environments without blocking graders pay nothing.

    Args:
        workers: calls that run at once on threads, and as many on processes.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._threads = _DaemonThreads()
        self._processes: ProcessPoolExecutor | None = None
        self._slots: dict[bool, asyncio.Semaphore] = {}

    async def run(
        self, call: Callable[..., T], *args: Any, timeout_s: float, in_process: bool = False, limit: str = "timeout_s"
    ) -> T:
        """The result of call(*args).

        The limit counts from the moment the call may start, not the time it waits for its turn.

        Args:
            limit: what the user knows timeout_s as.
        Raises:
            RolloutError: it took longer, or its process died. A thread cannot be stopped and runs on in the
                background, at most until this process ends; a process is killed.
        """
        slots = self._slots.setdefault(in_process, asyncio.Semaphore(self._workers))
        async with slots:
            while True:
                pool: Executor = self._process_pool() if in_process else self._threads
                try:
                    async with asyncio.timeout(timeout_s) as scope:
                        return await asyncio.get_running_loop().run_in_executor(pool, call, *args)
                except TimeoutError as error:
                    if not scope.expired():
                        raise
                    self._give_up(pool)
                    raise RolloutError(f"{_name(call)} took longer than {timeout_s} s; raise {limit}") from error
                except BrokenProcessPool as error:
                    if not in_process:
                        raise
                    if pool is not self._processes:
                        # Another call's time was over and took this one's process along.
                        continue
                    self._give_up(pool)
                    raise RolloutError(f"the process that ran {_name(call)} died") from error

    def close(self) -> None:
        """Stop; calls that run are not waited for."""
        if self._processes is not None:
            self._give_up(self._processes)

    def _process_pool(self) -> ProcessPoolExecutor:
        if self._processes is None:
            # spawn: a fork of a process with threads and an event loop may lock up.
            self._processes = ProcessPoolExecutor(self._workers, mp_context=multiprocessing.get_context("spawn"))
        return self._processes

    def _give_up(self, pool: Executor) -> None:
        """Take a pool out of use: the next call gets a fresh one, whose workers are all free."""
        if pool is self._processes:
            self._processes = None
        # ProcessPoolExecutor learns to kill its workers in Python 3.14; until then its own list of them is the only way.
        workers = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False)
        for worker in workers:
            worker.kill()


def _name(call: Callable[..., Any]) -> str:
    """Without its arguments, which may be whole prompts."""
    while isinstance(call, partial):
        call = call.func
    return getattr(call, "__qualname__", type(call).__qualname__)
