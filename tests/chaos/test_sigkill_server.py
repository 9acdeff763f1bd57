"""SIGKILL of the rollout server while environments post and a trainer leases: nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from atroposlib.client import RolloutClient
from atroposlib.errors import UnknownEnvError
from atroposlib.wire.models import EnvInfo, EnvRequest, TicketRequest
from tests.builders import a_group, a_run
from tests.processes import RolloutServerProcess

STEPS = 40
BATCH = 8
KILLS = 4


async def environment(url: str, name: str, accepted: set[str]) -> None:
    async with RolloutClient(url, deadline_s=30) as client:
        env: EnvInfo = await client.register_env(EnvRequest(name=name, group_size=2))
        while True:
            request = TicketRequest(env_id=env.env_id, session=env.session, sequences=2, count=4, wait_s=2)
            try:
                grant = await client.request_tickets(request)
            except UnknownEnvError:
                env = await client.register_env(EnvRequest(name=name, group_size=2))
                continue
            if grant.is_finished:
                return
            await asyncio.sleep(random.uniform(0, 0.02))
            groups = [
                a_group(env_id=env.env_id, version=ticket.policy_version, ticket=ticket.ticket)
                for ticket in grant.tickets
            ]
            for result in await client.post_groups(groups) if groups else []:
                assert result.status in ("accepted", "duplicate"), result
                accepted.add(result.group_id)


async def trainer(url: str, trained: dict[int, list[str]]) -> None:
    """Trains, and dies twice: each successor resumes from the last commit."""
    async with RolloutClient(url, deadline_s=30) as client:
        committed = 0
        for crash_at in (13, 27, STEPS):
            run = await client.open_run(a_run(batch_size=BATCH, max_staleness=2, num_steps=STEPS))
            await client.publish_policy(committed, session=run.session)
            for step in range(committed, crash_at):
                groups = await client.lease(step, session=run.session, deadline_s=30)
                for group in groups:
                    assert group.version_range is not None
                    assert step - group.version_range[0] <= 2
                trained[step] = [group.group_id for group in groups]
                await client.ack(step, session=run.session, policy_version=step + 1)
                if step % 5 == 4:
                    committed = step + 1
                    await client.commit(committed, session=run.session)


async def test_every_accepted_group_is_trained_exactly_once(tmp_path: Path) -> None:
    server = RolloutServerProcess(tmp_path / "data", "--ticket-ttl-s", "3")
    server.start()
    accepted: set[str] = set()
    trained: dict[int, list[str]] = {}

    async def kill_now_and_then() -> None:
        for _ in range(KILLS):
            await asyncio.sleep(random.uniform(0.3, 0.8))
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)

    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        training = tasks.create_task(trainer(server.url, trained))
        killer = tasks.create_task(kill_now_and_then())
        await asyncio.sleep(0.2)
        for name in ("a", "b"):
            tasks.create_task(environment(server.url, name, accepted))
        await training
        await killer
    async with RolloutClient(server.url) as client:
        records = await client.group_records()
    server.stop()

    used = [group_id for step in sorted(trained) for group_id in trained[step]]
    queued = {record.group_id for record in records if record.state == "queued"}
    assert sorted(trained) == list(range(STEPS))
    assert len(used) == len(set(used)) == STEPS * BATCH // 2
    assert accepted - set(used) == queued & accepted, "an accepted group is neither trained nor waiting"
    assert {record.group_id for record in records if record.state == "batched"} == set(used)
