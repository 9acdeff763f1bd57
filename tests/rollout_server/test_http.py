"""The /v1 routes over a real socket, through the client that environments and trainer use."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from atroposlib.client import RolloutClient
from atroposlib.errors import FencedError, NoBatchError, NoRunError, ServerUnreachableError
from atroposlib.wire.columns import encode_group
from atroposlib.wire.models import EnvRequest, TicketRequest
from tests.builders import a_group, a_run
from tests.processes import RolloutServerProcess, free_port


@pytest.fixture
async def client(rollout_server: RolloutServerProcess) -> AsyncIterator[RolloutClient]:
    async with RolloutClient(rollout_server.url, deadline_s=5.0) as client:
        yield client


async def joined(client: RolloutClient) -> tuple[int, TicketRequest]:
    run = await client.open_run(a_run(batch_size=4, max_staleness=1))
    env = await client.register_env(EnvRequest(name="env", group_size=2))
    await client.publish_policy(0, session=run.session)
    return run.session, TicketRequest(env_id=env.env_id, session=env.session, sequences=2, count=8, wait_s=10)


async def test_a_group_goes_from_environment_to_trainer(client: RolloutClient) -> None:
    session, request = await joined(client)
    grant = await client.request_tickets(request)
    groups = [a_group(ticket=ticket.ticket) for ticket in grant.tickets[:2]]

    results = await client.post_groups(groups)
    batch = await client.lease(0, session=session, deadline_s=5)
    await client.ack(0, session=session, policy_version=1)

    assert [result.status for result in results] == ["accepted", "accepted"]
    assert [group.group_id for group in batch] == [group.group_id for group in groups]
    assert (await client.status()).policy_version == 1


async def test_a_trainer_that_waits_is_woken_by_the_last_group(client: RolloutClient) -> None:
    session, request = await joined(client)
    tickets = (await client.request_tickets(request)).tickets
    await client.post_groups([a_group(ticket=tickets[0].ticket)])

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        lease = tasks.create_task(client.lease(0, session=session, deadline_s=30))
        await asyncio.sleep(0.3)
        assert not lease.done()
        await client.post_groups([a_group(ticket=tickets[1].ticket)])

    assert len(lease.result()) == 2


async def test_an_environment_that_waits_is_woken_by_the_next_version(client: RolloutClient) -> None:
    session, request = await joined(client)
    tickets = (await client.request_tickets(request)).tickets
    await client.post_groups([a_group(ticket=ticket.ticket) for ticket in tickets])
    await client.lease(0, session=session, deadline_s=5)

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(client.request_tickets(request))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await client.ack(0, session=session, policy_version=1)

    assert len(waiting.result().tickets) == 2


async def test_a_caller_that_hung_up_is_given_no_tickets(client: RolloutClient) -> None:
    session, request = await joined(client)
    tickets = (await client.request_tickets(request)).tickets
    await client.post_groups([a_group(ticket=ticket.ticket) for ticket in tickets])
    await client.lease(0, session=session, deadline_s=5)
    waiting = asyncio.create_task(client.request_tickets(request))
    await asyncio.sleep(0.3)
    waiting.cancel()
    await asyncio.wait([waiting])

    await client.ack(0, session=session, policy_version=1)
    await asyncio.sleep(0.3)

    assert (await client.status()).tickets_outstanding == 0


async def test_no_batch_within_the_deadline_says_what_is_missing(client: RolloutClient) -> None:
    session, _ = await joined(client)

    with pytest.raises(NoBatchError, match="4 more sequences for step 0"):
        await client.lease(0, session=session, deadline_s=0.2)


async def test_errors_arrive_as_the_type_the_server_raised(client: RolloutClient) -> None:
    with pytest.raises(NoRunError, match="atropos-trainer"):
        await client.run_info()
    session, _ = await joined(client)
    await client.open_run(a_run())
    with pytest.raises(FencedError, match="taken over"):
        await client.ack(0, session=session, policy_version=None)


async def test_hostile_bodies_are_refused_and_the_next_request_works(
    client: RolloutClient, rollout_server: RolloutServerProcess
) -> None:
    await joined(client)
    async with httpx.AsyncClient(base_url=rollout_server.url) as http:
        truncated = await http.post("/v1/groups", content=encode_group(a_group())[:-3])
        noise = await http.post("/v1/groups", content=b"\xff" * 5000)
        empty = await http.post("/v1/groups", content=b"")
        misspelt = await http.post("/v1/run", json={"run_name": "x", "batchsize": 4, "num_steps": 1})
        not_json = await http.post("/v1/tickets", content=b"{")
        gzipped = await http.post("/scored_data", content=gzip.compress(b"{}")[:-4])

    assert [answer.status_code for answer in (truncated, noise, empty, misspelt, not_json, gzipped)] == [422] * 6
    assert "batchsize" in misspelt.json()["detail"]
    assert (await client.status()).queued_groups == 0


async def test_an_oversized_body_is_refused_before_it_is_read(tmp_path: Path) -> None:
    server = RolloutServerProcess(tmp_path / "data", "--max-body-bytes", "2048")
    server.start()
    try:
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{server.url}/v1/groups", content=b"x" * 100_000)
        assert answer.status_code == 413
        assert "max_body_bytes=2048" in answer.json()["detail"]
    finally:
        server.stop()


async def test_the_client_waits_out_a_restart(rollout_server: RolloutServerProcess) -> None:
    async with RolloutClient(rollout_server.url, deadline_s=20.0) as client:
        _session, request = await joined(client)
        ticket = (await client.request_tickets(request)).tickets[0]
        rollout_server.kill()

        async with asyncio.timeout(25), asyncio.TaskGroup() as tasks:
            posting = tasks.create_task(client.post_groups([a_group(ticket=ticket.ticket)]))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(rollout_server.start)

        assert posting.result()[0].status == "accepted"


async def test_a_server_that_is_not_there_is_named_within_the_deadline() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with RolloutClient(url, deadline_s=0.3) as client:
        with pytest.raises(ServerUnreachableError, match=url):
            await client._send("GET", "/v1/status", timeout_s=0.1)


async def test_sigterm_ends_the_server_cleanly(tmp_path: Path) -> None:
    server = RolloutServerProcess(tmp_path / "data")
    server.start()

    assert server.stop() in (0, -15)
