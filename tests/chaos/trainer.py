"""A trainer that may be killed at any time: leases, "trains", acknowledges, checkpoints, and resumes from its checkpoint.

python -m tests.chaos.trainer URL FOLDER STEPS

FOLDER/checkpoint.json is the history of weights that survives: the group ids of each step. FOLDER/seen.txt is everything
that any incarnation was ever given.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path

from atroposlib.client import RolloutClient
from atroposlib.wire.models import RunRequest

BATCH_SIZE = 16
MAX_STALENESS = 2
STEPS_A_CHECKPOINT = 5


async def train(url: str, folder: Path, steps: int) -> None:
    """From the checkpoint to the last step."""
    checkpoint = folder / "checkpoint.json"
    history: list[list[str]] = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    async with RolloutClient(url, deadline_s=60) as client:
        run = await client.open_run(
            RunRequest(
                run_name="chaos",
                batch_size=BATCH_SIZE,
                max_staleness=MAX_STALENESS,
                num_steps=steps,
                start_step=len(history),
            )
        )
        await client.publish_policy(max(len(history), run.policy_version), session=run.session)
        for step in range(len(history), steps):
            groups = await client.lease(step, session=run.session, deadline_s=60)
            ids = [group.group_id for group in groups]
            oldest = min(group.version_range[0] for group in groups if group.version_range)
            with (folder / "seen.txt").open("a") as seen:
                seen.write(f"{step} {oldest} {' '.join(ids)}\n")
            await asyncio.sleep(random.uniform(0, 0.01))
            history.append(ids)
            await client.ack(step, session=run.session, policy_version=step + 1)
            if len(history) % STEPS_A_CHECKPOINT == 0 or len(history) == steps:
                draft = checkpoint.with_suffix(".draft")
                draft.write_text(json.dumps(history))
                os.replace(draft, checkpoint)
                await client.commit(len(history), session=run.session)


if __name__ == "__main__":
    asyncio.run(train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
