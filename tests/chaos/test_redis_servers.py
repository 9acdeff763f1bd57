"""Two rollout servers on one Redis behind clients that know both: whichever dies, work goes on at the other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from atroposlib.client import RolloutClient
from atroposlib.errors import NoBatchError, ServerUnreachableError, UnknownEnvError
from atroposlib.wire.columns import Group
from atroposlib.wire.models import EnvRequest, Ticket, TicketRequest
from tests.builders import a_group, a_run
from tests.chaos.test_sigkill import records_of
from tests.processes import RolloutServerProcess
from tests.valkey import ValkeyProcess

pytestmark = pytest.mark.redis

STEPS = 40
BATCH = 8
MAX_STALENESS = 2
DEADLINE_S = 60.0
WAIT_S = 0.3
ANSWER_S = 1.0
"""A server that needs longer is taken for dead."""
RETRY_SHARE = 0.05
"""Of the calls, after which a dead server is tried again."""

T = TypeVar("T")


@dataclass
class Pool:
    """The clients of both servers; a call goes to either, and to the other one when that one is dead."""

    clients: list[RolloutClient]
    failovers: int = 0
    accepted: set[str] = field(default_factory=set)
    trained: dict[int, list[str]] = field(default_factory=dict)
    dead: set[RolloutClient] = field(default_factory=set)

    async def ask(self, call: Callable[[RolloutClient], Awaitable[T]]) -> T:
        """The same call to one server after the other, until one answers."""
        while True:
            client = random.choice([client for client in self.clients if client not in self.dead] or self.clients)
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await call(client)
            except (ServerUnreachableError, TimeoutError):
                self.failovers += 1
                self.dead = {client}
                continue
            if random.random() < RETRY_SHARE:
                self.dead.clear()
            return answer

    async def progress(self, steps: int) -> None:
        """Until this many more steps are trained."""
        goal = min(len(self.trained) + steps, STEPS)
        while len(self.trained) < goal:  # noqa: ASYNC110  (bounded by the test's deadline)
            await asyncio.sleep(0.02)

    async def environment(self, name: str) -> None:
        request = EnvRequest(name=name, group_size=2)
        env = await self.ask(lambda client: client.register_env(request))
        while len(self.trained) < STEPS:
            ticket_request = TicketRequest(env_id=env.env_id, session=env.session, sequences=2, count=4, wait_s=WAIT_S)
            try:
                grant = await self.ask(lambda client, r=ticket_request: client.request_tickets(r))  # type: ignore[misc]
            except UnknownEnvError:  # registered twice, because an answer was lost
                env = await self.ask(lambda client: client.register_env(request))
                continue
            await asyncio.sleep(random.uniform(0, 0.02))
            if grant.tickets:
                await self._post(env.env_id, grant.tickets)

    async def _post(self, env_id: int, tickets: Sequence[Ticket]) -> None:
        """A repetition at the other server must not count twice."""
        groups = [a_group(env_id=env_id, version=ticket.policy_version, ticket=ticket.ticket) for ticket in tickets]
        for result in await self.ask(lambda client: client.post_groups(groups)):
            if result.status != "retired":  # its ticket can expire while nobody answers
                self.accepted.add(result.group_id)

    async def trainer(self, session: int) -> None:
        """Each rank of a step asks the server it likes."""
        for step in range(STEPS):
            parts = [await self._shard(step, session, rank) for rank in (0, 1)]
            self.trained[step] = [group.group_id for part in parts for group in part]
            await self.ask(partial(RolloutClient.ack, step=step, session=session, policy_version=step + 1))
            if step % 5 == 4:
                await self.ask(partial(RolloutClient.commit, step=step + 1, session=session))

    async def _shard(self, step: int, session: int, rank: int) -> Sequence[Group]:
        lease = partial(RolloutClient.lease, step=step, session=session, deadline_s=WAIT_S, shard=rank, n_shards=2)
        while True:
            try:
                groups = await self.ask(lease)
            except NoBatchError:
                continue
            assert all(step - group.version_range[0] <= MAX_STALENESS for group in groups if group.version_range)
            return groups


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyProcess]:
    server = ValkeyProcess(tmp_path / "valkey", is_durable=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def servers(valkey: ValkeyProcess, tmp_path: Path) -> Iterator[list[RolloutServerProcess]]:
    options = ("--store", "redis", "--redis-url", valkey.url, "--ticket-ttl-s", "3")
    servers = [RolloutServerProcess(tmp_path / f"server-{i}", *options) for i in range(2)]
    for server in servers:
        server.start()
    yield servers
    for server in servers:
        server.kill()


async def test_clients_go_on_at_the_other_server_and_every_group_counts_once(
    servers: list[RolloutServerProcess], valkey: ValkeyProcess
) -> None:
    async def kill_in_turn(pool: Pool) -> None:
        await pool.progress(4)
        for server in (*servers, *servers):
            await asyncio.to_thread(server.kill)
            await pool.progress(3)  # at the other one
            await asyncio.to_thread(server.start)
            await pool.progress(2)
        await asyncio.to_thread(valkey.kill)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(valkey.start)

    async with (
        asyncio.timeout(DEADLINE_S),
        RolloutClient(servers[0].url) as first,
        RolloutClient(servers[1].url) as second,
    ):
        pool = Pool([first, second])
        run = await first.open_run(a_run(batch_size=BATCH, max_staleness=MAX_STALENESS, num_steps=STEPS))
        await second.publish_policy(0, session=run.session)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pool.trainer(run.session))
            tasks.create_task(kill_in_turn(pool))
            for name in ("a", "b", "c"):
                tasks.create_task(pool.environment(name))

    records = await asyncio.to_thread(records_of, servers[1].url)
    used = [group_id for step in range(STEPS) for group_id in pool.trained[step]]
    places = {record.group_id: record.state for record in records}
    assert pool.failovers > 0, "nobody noticed a death"
    assert len(used) == len(set(used)) == STEPS * BATCH // 2
    assert {group_id for group_id, state in places.items() if state == "batched"} == set(used)
    assert {places[group_id] for group_id in pool.accepted} <= {"batched", "queued"}, "accepted, then given up"
    assert pool.accepted - set(used) == {group_id for group_id, state in places.items() if state == "queued"}
