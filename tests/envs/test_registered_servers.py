"""Rollouts come only from servers that the registry shows at a published version within the staleness bound."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from atroposlib.client import RolloutClient
from atroposlib.envs.base import APIServerConfig
from atroposlib.envs.server_handling.pool.registered_servers import servable_urls
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.testing.mock_inference import MockInferenceServer
from atroposlib.wire.models import InferenceServer, InferenceServerStatus, RunRequest, Status
from tests.processes import RolloutServerProcess


def a_status(*servers: InferenceServer, policy_version: int = 7, max_staleness: int = 2) -> Status:
    entries = [InferenceServerStatus(server=server, last_seen_s=500.0) for server in servers]
    return Status(policy_version=policy_version, max_staleness=max_staleness, inference_servers=entries)


@pytest.mark.parametrize(
    ("server", "is_servable"),
    [
        (InferenceServer(url="http://a", policy_version=7), True),
        (InferenceServer(url="http://a", policy_version=8), True),
        (InferenceServer(url="http://a", policy_version=5), True),
        (InferenceServer(url="http://a", policy_version=4), False),
        (InferenceServer(url="http://a", policy_version=None), False),
        (InferenceServer(url="http://a", policy_version=7, role="teacher"), False),
        (InferenceServer(url="http://a", policy_version=7, problem="quarantined"), False),
    ],
)
def test_only_a_policy_server_without_a_problem_and_within_the_bound_serves(
    server: InferenceServer, is_servable: bool
) -> None:
    assert servable_urls(a_status(server)) == (["http://a/v1"] if is_servable else [])


def test_nobody_serves_before_the_first_publication() -> None:
    assert servable_urls(a_status(InferenceServer(url="http://a", policy_version=0), policy_version=-1)) == []


def test_version_0_serves_while_it_is_within_the_bound() -> None:
    server = InferenceServer(url="http://a/v1/", policy_version=0)

    assert servable_urls(a_status(server, policy_version=1)) == ["http://a/v1"]


def reply(prompt: list[int], index: int) -> list[int]:
    return [50 + index, 2]


async def test_a_server_that_lags_gets_no_traffic_until_it_has_caught_up(rollout_server: RolloutServerProcess) -> None:
    async def sample() -> Any:
        return await manager.sample_tokens(input_ids=[5, 6], max_tokens=4)

    async def follow() -> None:
        await manager.sync_servers(servable_urls(await client.status()))

    async with (
        MockInferenceServer(reply, weight_version="7") as current,
        MockInferenceServer(reply, weight_version="1") as late,
        RolloutClient(rollout_server.url, deadline_s=10) as client,
    ):
        run = await client.open_run(RunRequest(run_name="r", batch_size=4, num_steps=9, max_staleness=2))
        await client.publish_policy(7, session=run.session)
        for engine in (current, late):
            await client.register_server(InferenceServer(url=engine.url, policy_version=int(engine.weight_version)))
        manager = ServerManager([APIServerConfig(base_url=late.url, server_type="vllm", timeout=20)])
        manager.train_only_on_published_versions()

        await follow()
        await asyncio.gather(*(sample() for _ in range(6)))
        assert (len(current.requests), len(late.requests)) == (6, 0)

        late.weight_version = "7"
        await client.register_server(InferenceServer(url=late.url, policy_version=7))
        await follow()
        async with asyncio.timeout(10):
            while not late.requests:
                await asyncio.gather(*(sample() for _ in range(4)))

        await client.register_server(InferenceServer(url=current.url, policy_version=7, problem="quarantined"))
        served = len(current.requests)
        await follow()
        await asyncio.gather(*(sample() for _ in range(4)))
        assert len(current.requests) == served
        await manager.close()
