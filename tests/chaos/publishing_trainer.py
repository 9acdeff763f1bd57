"""A trainer that may be killed at any time, and publishes a policy version to the mock inference servers at every step.

python -m tests.chaos.publishing_trainer URL FOLDER ENGINE_URL...

FOLDER/history.json is its checkpoint: the group ids of each step. It trains until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import httpx

from atroposlib.client import RolloutClient
from atroposlib.wire.models import RunRequest

BATCH_SIZE = 8
GROUP_SIZE = 4
MAX_STALENESS = 2


async def publish(engines: list[str], version: int) -> None:
    """Tell the engines that can be reached; one that is away hears of the next version."""
    async with httpx.AsyncClient(timeout=2.0) as http:
        for engine in engines:
            try:
                await http.post(f"{engine}/mock/version", json={"version": str(version)})
            except httpx.TransportError:
                continue


def read_history(folder: Path) -> list[list[str]]:
    """The group ids of every step that the checkpoint holds."""
    path = folder / "history.json"
    history: list[list[str]] = json.loads(path.read_text()) if path.exists() else []
    return history


async def train(url: str, folder: Path, engines: list[str]) -> None:
    """From the checkpoint on, for ever."""
    history = read_history(folder)
    request = RunRequest(
        run_name="outages",
        batch_size=BATCH_SIZE,
        group_size=GROUP_SIZE,
        max_staleness=MAX_STALENESS,
        num_steps=1_000_000,
        start_step=len(history),
    )
    async with RolloutClient(url, deadline_s=60) as client:
        run = await client.open_run(request)
        version = max(len(history), run.policy_version)
        await publish(engines, version)
        await client.publish_policy(version, session=run.session)
        while True:
            step = len(history)
            groups = await client.lease(step, session=run.session, deadline_s=60)
            history.append([group.group_id for group in groups])
            await publish(engines, step + 1)
            await client.ack(step, session=run.session, policy_version=step + 1)
            draft = folder / "history.draft"
            draft.write_text(json.dumps(history))
            os.replace(draft, folder / "history.json")
            await client.commit(step + 1, session=run.session)


if __name__ == "__main__":
    asyncio.run(train(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
