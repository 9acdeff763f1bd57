"""A rollout server in memory, and the smallest environment."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from atroposlib.envs.base import BaseEnv, BaseEnvConfig
from atroposlib.errors import NoRunError, UnknownEnvError
from atroposlib.type_definitions import ScoredDataGroup
from atroposlib.wire.columns import Group, decode_groups, encode_group
from atroposlib.wire.models import (
    EnvInfo,
    EnvRequest,
    GroupResult,
    RunInfo,
    RunRequest,
    Status,
    Ticket,
    TicketGrant,
    TicketRequest,
    TicketUpdate,
    TicketUpdateResult,
)

LARGEST_GROUP = 8
"""Sequences."""


class FakeRolloutServer:
    """Grants tickets, keeps what it is given, and finishes when `steps` batches are there.

    Args:
        batch: groups of a batch, whatever their sizes.
        in_flight: tickets out at once.
    """

    def __init__(self, *, batch: int = 2, steps: int = 2, in_flight: int = 4, max_token_len: int = -1) -> None:
        self.request = RunRequest(
            run_name="run", batch_size=batch * LARGEST_GROUP, num_steps=steps, max_token_len=max_token_len
        )
        self.batch, self.in_flight = batch, in_flight
        self.has_run = True
        self.session = 0
        self.registrations: list[EnvRequest] = []
        self.tickets: set[str] = set()
        self.returned: Counter[str] = Counter()
        self.renewed: Counter[str] = Counter()
        self.groups: dict[str, Group] = {}
        self.posts = 0
        self.deadline_s = 60.0
        self.lose_answers = 0
        """Next posts that are accepted but whose answer never arrives: the client repeats them."""
        self.on_post: Callable[[Group], None] = lambda group: None
        self.status_of: Callable[[Group], str] = lambda group: "accepted"
        self.retired_because = "stale"
        self.refuse_with: list[Exception] = []
        self.policy_version = 0
        self._ids = itertools.count()
        self._changed = asyncio.Event()

    @property
    def step(self) -> int:
        return len(self.groups) // self.batch

    def info(self) -> RunInfo:
        return RunInfo(
            run_id=f"id-of-{self.request.run_name}",
            run_name=self.request.run_name, session=1, policy_version=self.policy_version, committed_step=0,
            acknowledged_step=self.step, request=self.request,
        )  # fmt: skip

    def restart_without_memory(self) -> None:
        """The next call of the old session is answered UnknownEnvError."""
        self.session += 100
        self.tickets.clear()

    def check(self, session: int) -> None:
        if session != self.session:
            raise UnknownEnvError(f"session {session} is void, now {self.session}; register again")

    async def register_env(self, request: EnvRequest) -> EnvInfo:
        if not self.has_run:
            raise NoRunError("no trainer has registered")
        self.registrations.append(request)
        self.session += 1
        return EnvInfo(env_id=self.session, session=self.session, run=self.info())

    async def request_tickets(self, request: TicketRequest) -> TicketGrant:
        self.check(request.session)
        is_finished = self.step >= self.request.num_steps
        while not is_finished and len(self.tickets) >= self.in_flight:
            self._changed.clear()
            await self._changed.wait()
            self.check(request.session)
            is_finished = self.step >= self.request.num_steps
        free = 0 if is_finished else min(request.count, self.in_flight - len(self.tickets))
        names = [f"t{next(self._ids)}" for _ in range(free)]
        self.tickets.update(names)
        granted = [
            Ticket(ticket=name, policy_version=self.policy_version, deadline_s=self.deadline_s) for name in names
        ]
        return TicketGrant(tickets=granted, policy_version=self.policy_version, step=self.step, is_finished=is_finished)

    async def renew_tickets(self, update: TicketUpdate) -> TicketUpdateResult:
        self.check(update.session)
        self.renewed.update(update.tickets)
        return TicketUpdateResult(alive=[ticket for ticket in update.tickets if ticket in self.tickets])

    async def return_tickets(self, update: TicketUpdate) -> TicketUpdateResult:
        self.check(update.session)
        alive = [ticket for ticket in update.tickets if ticket in self.tickets]
        self.tickets.difference_update(alive)
        self.returned[update.reason or ""] += len(alive)
        self._changed.set()
        return TicketUpdateResult(alive=alive)

    async def status(self) -> Status:
        return Status(
            run_name=self.request.run_name, run_id=self.info().run_id, batch_size=self.batch, step=self.step,
            num_steps=self.request.num_steps, policy_version=self.policy_version,
        )  # fmt: skip

    async def post_groups(self, groups: Sequence[Group]) -> list[GroupResult]:
        self.posts += 1
        if self.refuse_with:
            raise self.refuse_with.pop(0)
        # Through the codec, so that what the runner builds is checked as the server would.
        arrived = decode_groups(b"".join(encode_group(group) for group in groups))
        for group in arrived:
            if group.env_id != self.session:
                raise UnknownEnvError(f"environment {group.env_id} is not registered")
            self.on_post(group)
        results = [self._answer(group) for group in arrived]
        self._changed.set()
        if self.lose_answers > 0:
            self.lose_answers -= 1
            return await self.post_groups(groups)
        return results

    def _answer(self, group: Group) -> GroupResult:
        status: Any = self.status_of(group)
        if status == "accepted":
            if group.group_id in self.groups:
                status = "duplicate"
            self.groups[group.group_id] = group
        self.tickets.discard(group.ticket or "")
        reason = self.retired_because if status == "retired" else None
        return GroupResult(group_id=group.group_id, status=status, reason=reason)


class CountingEnv(BaseEnv):
    """Items are numbers; the group of each is made by `make`."""

    name: ClassVar[str | None] = "counting"
    make: Callable[[int], Any] = staticmethod(lambda item: a_scored_group())

    def __init__(self, config: BaseEnvConfig, servers: Any, **kwargs: Any) -> None:
        super().__init__(config, servers, **kwargs)
        self.items = itertools.count()
        self.collected: list[int] = []
        self.evaluated_at: list[int] = []

    async def get_next_item(self) -> int:
        return next(self.items)

    async def collect_trajectories(self, item: int) -> Any:
        self.collected.append(item)
        made = type(self).make(item)
        return (await made if asyncio.iscoroutine(made) else made), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.evaluated_at.append(self.curr_step)
        return {"heldout_reward": 0.5}


def a_scored_group(scores: Sequence[float] = (0.0, 1.0), *, length: int = 5, version: int = 0) -> ScoredDataGroup:
    """Two prompt tokens, then sampled ones."""
    n = len(scores)
    tokens = [[1, 2, *range(10, 8 + length)] for _ in range(n)]
    return ScoredDataGroup(
        tokens=tokens,
        masks=[[-100, -100, *row[2:]] for row in tokens],
        scores=list(scores),
        inference_logprobs=[[1.0, 1.0] + [-0.5] * (length - 2)] * n,
        policy_versions=[[(-1, 2), (version, length - 2)]] * n,
    )
