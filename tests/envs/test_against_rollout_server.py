"""Environment, real rollout server and a trainer of a few lines, while servers are killed and started again."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

from atroposlib.client import RolloutClient
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig
from atroposlib.envs.serving.records import RunRecords
from atroposlib.envs.serving.runner import EnvRunner
from atroposlib.testing.mock_inference import MockInferenceServer
from atroposlib.wire.columns import Group
from atroposlib.wire.models import RunRequest
from tests.processes import RolloutServerProcess

STEPS, BATCH, GROUP_SIZE, MAX_STALENESS = 12, 8, 4, 2


class EchoEnv(BaseEnv):
    """An environment of a few lines, as the README shows one."""

    name = "echo"

    async def get_next_item(self) -> str:
        return "say a"

    async def collect_trajectories(self, item: str) -> Any:
        return await self.rollout_group(
            [{"role": "user", "content": item}], reward=lambda text: float(text == "a"), max_tokens=4
        )


async def train(url: str, engine: MockInferenceServer, *, at_step: dict[int, Any]) -> list[list[Group]]:
    """Lease, publish the next version, acknowledge."""
    batches = []
    async with RolloutClient(url) as client:
        run = await client.open_run(
            RunRequest(
                run_name="r", batch_size=BATCH, max_staleness=MAX_STALENESS, num_steps=STEPS, group_size=GROUP_SIZE
            )
        )
        await client.publish_policy(0, session=run.session)
        for step in range(STEPS):
            batches.append(await client.lease(step, session=run.session, deadline_s=60))
            if step in at_step:
                await at_step[step]()
            engine.weight_version = str(step + 1)
            await client.ack(step, session=run.session, policy_version=step + 1)
    return batches


async def test_every_accepted_group_is_trained_once_through_two_server_kills_and_an_engine_restart(
    rollout_server: RolloutServerProcess, tokenizer_name: str, tokenizer: Any, tmp_path: Path
) -> None:
    async def kill_rollout_server() -> None:
        await asyncio.to_thread(rollout_server.kill)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(rollout_server.start)

    async def restart_engine() -> None:
        # A fresh engine runs weights that nobody published, until the trainer's next publication.
        await engine.stop()
        engine.weight_version = "default"
        await engine.start()
        await asyncio.sleep(0.3)

    def reply(prompt: list[int], index: int) -> list[int]:
        return [*tokenizer.encode("ab"[index % 2]), tokenizer.eos_token_id]

    async with MockInferenceServer(reply, latency_s=0.01) as engine:
        config = BaseEnvConfig(
            group_size=GROUP_SIZE,
            tokenizer_name=tokenizer_name,
            rollout_server_url=rollout_server.url,
            run_dir=tmp_path / "run",
        )
        env = EchoEnv(config, [APIServerConfig(base_url=engine.url, server_type="vllm", timeout=30)])
        records = RunRecords(config.run_dir, "echo")
        async with RolloutClient(rollout_server.url) as client, asyncio.timeout(120):
            runner = EnvRunner(env, client, records)
            collecting = asyncio.create_task(runner.run())
            batches = await train(
                rollout_server.url, engine, at_step={3: kill_rollout_server, 5: restart_engine, 7: kill_rollout_server}
            )
            await collecting
        records.close()
        await env.server.close()

    trained = Counter(group.group_id for batch in batches for group in batch)
    ledger = [
        json.loads(line)["group_id"] for line in (tmp_path / "run/ledger/env-echo.jsonl").read_text().splitlines()
    ]
    assert set(trained.values()) == {1}
    assert len(set(ledger)) == len(ledger)
    # An answer lost with a killed server is asked for again, so the ledger misses nothing that was trained.
    assert trained.keys() <= set(ledger)
    for step, batch in enumerate(batches):
        assert sum(group.n_sequences for group in batch) == BATCH
        for group in batch:
            oldest, newest = group.version_range or (-1, -1)
            assert step - MAX_STALENESS <= oldest <= newest <= step
            assert set(group.scores.tolist()) == {0.0, 1.0}
