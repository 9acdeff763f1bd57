"""Small recorded runs for tests: made by a real store, as a server would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atroposlib.wire.columns import Group, encode_group, read_blobs
from atroposlib.wire.models import EnvRequest
from rollout_server.stores.base import Batch, StoreLimits
from rollout_server.stores.embedded import SQLiteStore
from tests.builders import a_group, a_run

RUN_NAME = "recorded"
BATCH_SIZE = 4
MANY_STEPS = 1000


async def record(folder: Path, batches: Sequence[Sequence[Group]], queued: Sequence[Group] = ()) -> list[list[bytes]]:
    """Train on batches of BATCH_SIZE sequences, leave some groups queued; returns each batch as it was leased."""
    store = await SQLiteStore.open(folder, StoreLimits(), synchronous="normal")
    run = await store.open_run(a_run(RUN_NAME, batch_size=BATCH_SIZE, num_steps=MANY_STEPS, max_staleness=MANY_STEPS))
    await store.register_env(EnvRequest(name="env", group_size=2))
    await store.set_policy(0, run.session)
    leased: list[list[bytes]] = []
    for step, groups in enumerate(batches):
        await store.append(list(read_blobs(b"".join(encode_group(group) for group in groups))))
        batch = await store.lease(step, run.session)
        assert isinstance(batch, Batch)
        leased.append([bytes(blob) for blob in batch.blobs])
        await store.ack(step, run.session, step + 1)
    if queued:
        await store.append(list(read_blobs(b"".join(encode_group(group) for group in queued))))
    await store.close()
    return leased


def some_batches(count: int) -> list[list[Group]]:
    """Batches of two groups, each group with its own tokens."""
    return [
        [a_group(f"s{step}-{place}", prompt=2 + step, completion=3 + place, version=step) for place in range(2)]
        for step in range(count)
    ]
