"""An environment that may be killed at any time: asks tickets, posts groups, notes each that the server took.

python -m tests.chaos.environment URL NAME LEDGER
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from atroposlib.client import RolloutClient
from atroposlib.errors import UnknownEnvError
from atroposlib.wire.models import EnvInfo, EnvRequest, TicketRequest, TicketUpdate
from tests.builders import a_group

GROUP_SIZE = 2
STRAGGLER_SHARE = 0.02
STRAGGLER_S = 0.5
FAILURE_SHARE = 0.02


async def collect(url: str, name: str, ledger: Path) -> None:
    """Until the run is finished."""
    request = EnvRequest(name=name, group_size=GROUP_SIZE)
    async with RolloutClient(url, deadline_s=60) as client:
        env = await client.register_env(request)
        while True:
            ask = TicketRequest(env_id=env.env_id, session=env.session, sequences=GROUP_SIZE, count=8, wait_s=2)
            try:
                grant = await client.request_tickets(ask)
                if grant.is_finished:
                    return
                await roll_out(client, env, [(t.ticket, t.policy_version) for t in grant.tickets], ledger)
            except UnknownEnvError:
                env = await client.register_env(request)


async def roll_out(client: RolloutClient, env: EnvInfo, tickets: list[tuple[str, int]], ledger: Path) -> None:
    await asyncio.sleep(STRAGGLER_S if random.random() < STRAGGLER_SHARE else random.uniform(0, 0.01))
    failed = [ticket for ticket, _ in tickets if random.random() < FAILURE_SHARE]
    if failed:
        update = TicketUpdate(env_id=env.env_id, session=env.session, tickets=failed, reason="rollout_error")
        await client.return_tickets(update)
    groups = [
        a_group(
            f"{ticket}-group",
            env_id=env.env_id,
            n=GROUP_SIZE,
            completion=random.randint(1, 40),
            version=version,
            ticket=ticket,
        )
        for ticket, version in tickets
        if ticket not in failed
    ]
    results = await client.post_groups(groups) if groups else []
    with ledger.open("a") as lines:
        for result in results:
            lines.write(f"{result.status} {result.group_id} {result.reason or ''}\n")


if __name__ == "__main__":
    asyncio.run(collect(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
