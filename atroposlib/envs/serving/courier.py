"""Delivers groups: all that wait go in one request; what the rollout server does not take soon is spooled first."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from atroposlib.envs.serving.membership import Membership
from atroposlib.envs.serving.spool import Spool
from atroposlib.errors import (
    AtroposError,
    GroupFormatError,
    NoRunError,
    ProtocolError,
    RunChangedError,
    SpoolError,
    UnknownEnvError,
)
from atroposlib.wire.columns import Group
from atroposlib.wire.models import GroupResult

log = logging.getLogger(__name__)

SPOOL_AFTER_S = 2.0
"""An answer that takes longer than this may never come: from here on the group must survive this process."""
REQUESTS_AT_ONCE = 2
"""While one is answered the next is filled: more would only make them smaller."""
MAX_GROUPS_PER_REQUEST = 256
MAX_TOKENS_PER_REQUEST = 1 << 21
"""About 20 MB of columns."""


class GroupServer(Protocol):
    """What delivery needs of the rollout client."""

    async def post_groups(self, groups: Sequence[Group]) -> list[GroupResult]:
        """Deliver groups; rides out outages."""
        ...


@dataclass(frozen=True)
class _Parcel:
    """A group on its way, and the answer that its sender waits for."""

    group: Group
    answer: asyncio.Future[GroupResult]

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Courier:
    """Brings groups to the rollout server, through restarts of the server and of this process. run() does the work.

    Args:
        spool: None keeps undelivered groups in memory only.
    """

    def __init__(self, client: GroupServer, membership: Membership, spool: Spool | None) -> None:
        self._client = client
        self._membership = membership
        self._spool = spool
        self._waiting: deque[_Parcel] = deque()
        self._arrived = asyncio.Event()
        self.is_run_over = False
        """Nothing is kept any more: nobody will ask for it."""

    @property
    def spooled(self) -> int:
        """Groups that are on disk because the server has not taken them."""
        return len(self._spool) if self._spool is not None else 0

    async def run(self) -> None:
        """Send what waits, for ever. Failures go to those who wait for an answer."""
        slots = asyncio.Semaphore(REQUESTS_AT_ONCE)

        async def send(parcels: list[_Parcel]) -> None:
            try:
                await self._send(parcels)
            finally:
                slots.release()

        async with asyncio.TaskGroup() as requests:
            while True:
                await slots.acquire()
                while not self._waiting:
                    self._arrived.clear()
                    await self._arrived.wait()
                requests.create_task(send(self._take()))

    async def deliver(self, group: Group) -> GroupResult:
        """Hand a group over and wait for the server's answer; forget() once that is in the books.

        Raises:
            RunChangedError: the run that the group was made for is gone.
            ProtocolError: the server refused the group.
            AtroposError: no answer within server_deadline_s, or no leave to send; the group is in the spool.
        """
        parcel = _Parcel(group, asyncio.get_running_loop().create_future())
        self._waiting.append(parcel)
        self._arrived.set()
        try:
            await asyncio.wait([parcel.answer], timeout=SPOOL_AFTER_S)
            if not parcel.answer.done():
                self._keep(group)
            result = await parcel.answer
        except asyncio.CancelledError:
            parcel.answer.cancel()
            self._keep(group)
            raise
        except (RunChangedError, ProtocolError):
            self.forget(group)
            raise
        except AtroposError:
            self._keep(group)
            raise
        return result

    def forget(self, group: Group) -> None:
        """The group is answered for: it need not survive this process."""
        if self._spool is not None:
            self._spool.delivered(group.group_id)

    async def deliver_left_over(self) -> AsyncIterator[tuple[Group, GroupResult]]:
        """Send what an earlier process spooled; groups of an earlier run are thrown away."""
        for group in self._recover():
            try:
                [result] = await self._post([group])
                yield group, result
            except (RunChangedError, ProtocolError) as error:
                log.warning("spooled group %s is thrown away: %s", group.group_id, error)
            self.forget(group)

    def close(self) -> None:
        """Close the spool."""
        if self._spool is not None:
            self._spool.close()

    def _take(self) -> list[_Parcel]:
        """What the next request holds: at least one group."""
        taken = [self._waiting.popleft()]
        tokens = taken[0].group.n_tokens
        while self._waiting and len(taken) < MAX_GROUPS_PER_REQUEST:
            tokens += self._waiting[0].group.n_tokens
            if tokens > MAX_TOKENS_PER_REQUEST:
                break
            taken.append(self._waiting.popleft())
        return [parcel for parcel in taken if not parcel.answer.done()]

    async def _send(self, parcels: list[_Parcel]) -> None:
        if not parcels:
            return
        try:
            results = await self._post([parcel.group for parcel in parcels])
        except (RunChangedError, ProtocolError) as error:
            if len(parcels) == 1:
                parcels[0].fail(error)
                return
            # One of them is to blame, and the request changed nothing: the others must not suffer.
            for parcel in parcels:
                await self._send([parcel])
        except AtroposError as error:
            for parcel in parcels:
                parcel.fail(error)
        else:
            for parcel, result in zip(parcels, results, strict=True):
                if not parcel.answer.done():
                    parcel.answer.set_result(result)

    async def _post(self, groups: Sequence[Group]) -> list[GroupResult]:
        """Send until the server has answered; the client rides out outages."""
        while True:
            info = self._membership.info
            for group in groups:
                if group.run_id != info.run.run_id:
                    raise RunChangedError(f"the group was made for run {group.run_id}, and {info.run.run_id} is open")
            try:
                return await self._client.post_groups([replace(group, env_id=info.env_id) for group in groups])
            except (UnknownEnvError, NoRunError) as error:
                await self._membership.rejoin(info, error)

    def _recover(self) -> list[Group]:
        try:
            groups = self._spool.recover() if self._spool is not None else []
        except (SpoolError, OSError) as error:
            log.warning("this environment goes on without its spool: %s", error)
            self._spool = None
            return []
        if groups:
            log.info("%d groups of an earlier process are delivered from the spool", len(groups))
        return groups

    def _keep(self, group: Group) -> None:
        if self._spool is None or self.is_run_over:
            return
        try:
            # Blocks for one flush; there is nothing to do anyway while the server is away.
            self._spool.keep(group)
        except (SpoolError, GroupFormatError, OSError) as error:
            log.warning("group %s waits in memory only: %s", group.group_id, error)
