"""Tickets: asked for, held while their groups live, renewed in time, given back with a reason."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from atroposlib.envs.serving.membership import Membership
from atroposlib.errors import NoRunError, UnknownEnvError
from atroposlib.wire.models import EnvInfo, Ticket, TicketGrant, TicketRequest, TicketUpdate, TicketUpdateResult

log = logging.getLogger(__name__)

POLL_S = 20.0
"""How long the server may hold a request for tickets: also how soon an idle environment hears that the run is over."""
LAST_ANSWER_S = 1.0
"""How long leaving waits for polls on their way."""
MAX_TICKETS_PER_REQUEST = 1024
MAX_TICKETS_PER_UPDATE = 4096


class TicketOffice(Protocol):
    """What tickets need of the rollout client."""

    async def request_tickets(self, request: TicketRequest) -> TicketGrant:
        """Long-poll for leave to start groups."""
        ...

    async def renew_tickets(self, update: TicketUpdate) -> TicketUpdateResult:
        """Move deadlines."""
        ...

    async def return_tickets(self, update: TicketUpdate) -> TicketUpdateResult:
        """Give tickets back with a reason."""
        ...


class TicketBook:
    """The tickets that this process holds.

    Args:
        sequences: sequences of one group.
    """

    def __init__(self, office: TicketOffice, membership: Membership, *, sequences: int) -> None:
        self._office = office
        self._membership = membership
        self._sequences = sequences
        self._held: dict[str, EnvInfo] = {}
        """With the registration that each belongs to: after a new one the old tickets are void."""
        self._polls: dict[asyncio.Task[TicketGrant], EnvInfo] = {}
        self._period_s = 5.0
        self.lost = 0
        """Tickets that were void when they should have been renewed."""

    def __len__(self) -> int:
        return len(self._held)

    async def request(self, count: int) -> tuple[EnvInfo, TicketGrant]:
        """Wait for up to count tickets; none may come within one poll."""
        while True:
            info = self._membership.info
            request = TicketRequest(
                env_id=info.env_id,
                session=info.session,
                sequences=self._sequences,
                count=min(count, MAX_TICKETS_PER_REQUEST),
                wait_s=POLL_S,
            )
            poll = asyncio.create_task(self._office.request_tickets(request))
            self._polls[poll] = info
            try:
                # Shielded: who stops waiting must not lose tickets that the server may grant; leave() sees to them.
                grant = await asyncio.shield(poll)
            except (UnknownEnvError, NoRunError) as error:
                del self._polls[poll]
                await self._membership.rejoin(info, error)
                continue
            except Exception:
                del self._polls[poll]
                raise
            self._take(poll)
            return info, grant

    def used(self, ticket: Ticket) -> None:
        """The ticket's group was delivered: the server has taken the ticket."""
        self._held.pop(ticket.ticket, None)

    async def give_back(self, tickets: list[str], reason: str) -> None:
        """Return places that will not be used. Those of an earlier registration are void already."""
        by_owner: dict[int, tuple[EnvInfo, list[str]]] = {}
        for ticket in tickets:
            if ticket in self._held:
                owner = self._held[ticket]
                by_owner.setdefault(id(owner), (owner, []))[1].append(ticket)
        for info, some in by_owner.values():
            update = TicketUpdate(env_id=info.env_id, session=info.session, tickets=some, reason=reason)
            try:
                await self._office.return_tickets(update)
            except (UnknownEnvError, NoRunError):
                log.debug("%d tickets belonged to an earlier registration", len(some))
            for ticket in some:
                self._held.pop(ticket, None)

    async def leave(self, reason: str) -> None:
        """Return everything that is held, and what polls that nobody waits for any more still bring."""
        try:
            await self.give_back(list(self._held), reason)
            if self._polls:
                # The server gives the places just returned to a poll that still waits there. Hear it out.
                answered, _ = await asyncio.wait(self._polls, timeout=LAST_ANSWER_S)
                for poll in answered:
                    if poll.exception() is None:
                        self._take(poll)
                await self.give_back(list(self._held), reason)
        finally:
            for poll in self._polls:
                poll.cancel()
            await asyncio.gather(*self._polls, return_exceptions=True)
            self._polls.clear()

    def _take(self, poll: asyncio.Task[TicketGrant]) -> None:
        info = self._polls.pop(poll)
        for ticket in poll.result().tickets:
            self._held[ticket.ticket] = info
            self._period_s = ticket.deadline_s / 3

    async def keep_alive(self) -> None:
        """Renew what is held, well before the deadlines, for ever."""
        while True:
            await asyncio.sleep(self._period_s)
            info = self._membership.info
            current = [ticket for ticket, owner in self._held.items() if owner is info]
            for start in range(0, len(current), MAX_TICKETS_PER_UPDATE):
                if not await self._renew(info, current[start : start + MAX_TICKETS_PER_UPDATE]):
                    break

    async def _renew(self, info: EnvInfo, tickets: list[str]) -> bool:
        update = TicketUpdate(env_id=info.env_id, session=info.session, tickets=tickets)
        try:
            result = await self._office.renew_tickets(update)
        except (UnknownEnvError, NoRunError) as error:
            await self._membership.rejoin(info, error)
            return False
        for ticket in (set(tickets) - set(result.alive)) & self._held.keys():
            # Its place went to another group; the rollout goes on, and the server decides when it arrives.
            self.lost += 1
            del self._held[ticket]
        return True
