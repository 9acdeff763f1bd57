"""The trainer's line to the rollout server: leases batches ahead on a thread of its own, and sends what it confirms.

Leasing is idempotent by step, so every rank leases the whole batch for itself and takes its share of it; no collective
ever waits on the network. Only rank 0 opens the run, acknowledges and commits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from atroposlib.errors import AtroposError, NoBatchError, ServerUnreachableError
from atroposlib.wire.columns import Group
from atroposlib.wire.models import RunInfo, RunRequest

log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often a waiting caller looks whether it should stop."""
LEASE_SLICE_S = 30.0
"""One lease call waits this long; the deadline over all of them starts when the trainer asks for the batch."""
RENEW_PERIOD_S = 60.0
"""How often the server hears that the trainer lives, however long a step takes."""
STOP_GRACE_S = 10.0
"""How long a call may still take once the trainer is told to stop."""

T = TypeVar("T")


class Client(Protocol):
    """The part of atroposlib.client.RolloutClient that a trainer uses."""

    async def open_run(self, request: RunRequest) -> RunInfo: ...  # noqa: D102
    async def lease(self, step: int, *, session: int, deadline_s: float) -> list[Group]: ...  # noqa: D102
    async def ack(self, step: int, *, session: int, policy_version: int | None) -> None: ...  # noqa: D102
    async def commit(self, step: int, *, session: int) -> None: ...  # noqa: D102
    async def publish_policy(self, policy_version: int, *, session: int) -> None: ...  # noqa: D102
    async def renew_trainer(self, session: int) -> None: ...  # noqa: D102
    async def close(self) -> None: ...  # noqa: D102


class BatchStream:
    """Batches in order, the next one fetched while this one trains.

    Args:
        connect: makes the client; called on the stream's own thread.
        last_step: no step from this one on is leased.
        prefetch: batches leased ahead of the one in use.
        deadline_s: how long `get` waits.
        should_stop: looked at while waiting; `get` then returns None.
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        *,
        last_step: int,
        prefetch: int = 1,
        deadline_s: float = 600.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._last_step = last_step
        self._prefetch = prefetch
        self._deadline_s = deadline_s
        self._should_stop = should_stop
        self._session: int | None = None
        self._leases: dict[int, Future[list[Group]]] = {}
        self._obstacles: dict[int, str] = {}
        self._loop = asyncio.new_event_loop()
        # A daemon: a trainer that dies of an error must not hang on its own network thread.
        self._thread = threading.Thread(target=self._loop.run_forever, name="batch-stream", daemon=True)
        self._thread.start()

        async def connected() -> Client:
            return connect()

        try:
            self._client = asyncio.run_coroutine_threadsafe(connected(), self._loop).result()
        except BaseException:
            self._end_thread()
            raise

    def open_run(self, request: RunRequest) -> RunInfo:
        """Open the run, or take it over (rank 0)."""
        info = self._call(self._client.open_run(request))
        self.join(info.session)
        asyncio.run_coroutine_threadsafe(self._keep_alive(info.session), self._loop)
        return info

    def join(self, session: int) -> None:
        """Lease under this session (every rank)."""
        self._session = session

    def get(self, step: int, *, on_idle: Callable[[], None] = lambda: None) -> list[Group] | None:
        """The batch of a step; blocks until it is there, and starts to fetch the next.

        Args:
            on_idle: called again and again while waiting.
        Returns:
            The groups, in the order that every rank sees; None when the trainer should stop.
        Raises:
            NoBatchError: none came within the deadline; says what the server waits for.
            FencedError: another trainer took the run over.
            StepError: the server cannot serve this step.
        """
        end = time.monotonic() + self._deadline_s
        lease = self._lease(step)
        while not _is_done(lease, POLL_S):
            if self._should_stop():
                return None
            if time.monotonic() >= end:
                obstacle = self._obstacles.get(step, "")
                raise NoBatchError(
                    f"no batch for step {step} within {self._deadline_s:.0f} s: "
                    f"{obstacle or 'the rollout server has not said why'}",
                    waiting_for=obstacle,
                )
            on_idle()
        groups = lease.result()
        del self._leases[step]
        for ahead in range(step + 1, min(step + 1 + self._prefetch, self._last_step)):
            self._lease(ahead)
        return groups

    def ack(self, step: int, *, policy_version: int | None) -> None:
        """Say that the optimizer step used its batch, and which version the engines now run (rank 0)."""
        self._call(self._client.ack(step, session=self._joined(), policy_version=policy_version))

    def commit(self, step: int) -> None:
        """Say that a checkpoint holds the weights after `step` steps (rank 0)."""
        self._call(self._client.commit(step, session=self._joined()))

    def publish_policy(self, policy_version: int) -> None:
        """Say which version the engines run (rank 0)."""
        self._call(self._client.publish_policy(policy_version, session=self._joined()))

    def close(self) -> None:
        """Give up what is under way and end the thread."""

        async def finish() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
            self._end_thread()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _joined(self) -> int:
        if self._session is None:
            raise RuntimeError("open_run or join comes first")
        return self._session

    def _lease(self, step: int) -> Future[list[Group]]:
        if step not in self._leases:
            coroutine = self._lease_patiently(step, self._joined())
            self._leases[step] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return self._leases[step]

    async def _keep_alive(self, session: int) -> None:
        """Until the stream is closed. Trouble is left to the calls that need an answer."""
        while True:
            await asyncio.sleep(RENEW_PERIOD_S)
            with suppress(AtroposError):
                await self._client.renew_trainer(session)

    async def _lease_patiently(self, step: int, session: int) -> list[Group]:
        """Ask until there is a batch. An unreachable server may be restarting; `get` has the deadline."""
        while True:
            try:
                groups = await self._client.lease(step, session=session, deadline_s=LEASE_SLICE_S)
            except NoBatchError as error:
                self._obstacles[step] = error.waiting_for
            except ServerUnreachableError as error:
                self._obstacles[step] = str(error)
            else:
                self._obstacles.pop(step, None)
                return groups

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the network thread; the client has the deadline, a request to stop shortens it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        stop_at: float | None = None
        while not _is_done(future, POLL_S):
            if self._should_stop():
                stop_at = stop_at or time.monotonic() + STOP_GRACE_S
                if time.monotonic() > stop_at:
                    future.cancel()
                    raise ServerUnreachableError("told to stop while the rollout server did not answer")
        return future.result()


def _is_done(future: Future[Any], timeout_s: float) -> bool:
    # Not future.result(timeout): a task that itself fails with TimeoutError would look unfinished.
    return bool(wait([future], timeout=timeout_s).done)
