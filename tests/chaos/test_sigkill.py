"""SIGKILL of servers, environments, trainer and store at random: nothing lost, nothing trained twice, nothing stale.

CHAOS_STEPS and CHAOS_KILL_PERIOD_S make it longer and denser: `make chaos`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import httpx
import pytest

from atroposlib.wire.models import GroupRecord, GroupRecords
from tests.chaos.trainer import BATCH_SIZE, MAX_STALENESS
from tests.processes import RolloutServerProcess
from tests.valkey import ValkeyProcess

STEPS = int(os.environ.get("CHAOS_STEPS", "120"))
KILL_PERIOD_S = float(os.environ.get("CHAOS_KILL_PERIOD_S", "0.8"))
SECONDS_A_STEP = 2.0
"""Far more than a step takes; a run that needs longer hangs."""
ENVIRONMENTS = 3


class Victim(Protocol):
    def start(self) -> None: ...
    def kill(self) -> None: ...


class Module:
    """A Python module as a process, started again when it was killed."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        self._command = [sys.executable, "-m", *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def status(self) -> int | None:
        assert self._process is not None
        return self._process.poll()


class Cluster:
    """Every process of a run, any of which may be killed.

    Args:
        servers: rollout servers; the trainer uses the first, environments spread over all.
        stores: servers of the store, where it has its own.
    """

    def __init__(self, folder: Path, servers: list[RolloutServerProcess], stores: list[ValkeyProcess]) -> None:
        self.folder = folder
        self.servers = servers
        self.stores = stores
        self.trainer = Module(folder / "trainer.log", "tests.chaos.trainer", servers[0].url, str(folder), str(STEPS))
        self.environments = [
            Module(
                folder / f"env-{i}.log",
                "tests.chaos.environment",
                servers[i % len(servers)].url,
                f"env-{i}",
                str(folder / f"env-{i}.ledger"),
            )
            for i in range(ENVIRONMENTS)
        ]

    def start(self) -> None:
        first: list[Victim] = [*self.stores, *self.servers, self.trainer]
        for victim in first:
            victim.start()
        wait_for_run(self.servers[0].url)
        for environment in self.environments:
            environment.start()

    def stop(self) -> None:
        others: list[Victim] = [self.trainer, *self.environments, *self.servers]
        for victim in others:
            victim.kill()
        for store in self.stores:
            store.stop()

    def kill_someone(self, rng: random.Random) -> str:
        victims: list[Victim] = [*self.servers, *self.stores, *self.environments, self.trainer]
        victim = rng.choice(victims)
        victim.kill()
        victim.start()
        return type(victim).__name__


def wait_for_run(url: str) -> None:
    end = time.monotonic() + 30
    while httpx.get(f"{url}/v1/run", timeout=5).status_code != 200:
        assert time.monotonic() < end, "the trainer did not open a run"
        time.sleep(0.05)


@contextmanager
def a_cluster(kind: str, folder: Path) -> Iterator[Cluster]:
    with ExitStack() as clean_up:
        if kind == "redis":
            valkey = ValkeyProcess(folder / "valkey", is_durable=True)
            options = ("--store", "redis", "--redis-url", valkey.url, "--ticket-ttl-s", "3")
            servers = [RolloutServerProcess(folder / f"server-{i}", *options) for i in range(2)]
            cluster = Cluster(folder, servers, [valkey])
        else:
            cluster = Cluster(folder, [RolloutServerProcess(folder / "data", "--ticket-ttl-s", "3")], [])
        clean_up.callback(cluster.stop)
        cluster.start()
        yield cluster


def records_of(url: str) -> list[GroupRecord]:
    found: list[GroupRecord] = []
    after: int | None = 0
    while after is not None:
        page = GroupRecords.model_validate_json(httpx.get(f"{url}/v1/groups?after={after}", timeout=30).content)
        found += page.records
        after = page.next
    return found


@pytest.mark.timeout(STEPS * SECONDS_A_STEP + 120)
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def test_every_accepted_group_is_trained_once_within_the_bound_whoever_is_killed(kind: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    killed: list[str] = []
    with a_cluster(kind, tmp_path) as cluster:
        end = time.monotonic() + STEPS * SECONDS_A_STEP
        while cluster.trainer.status is None:
            assert time.monotonic() < end, f"the run hangs:\n{(tmp_path / 'trainer.log').read_text()[-2000:]}"
            time.sleep(rng.uniform(0, 2 * KILL_PERIOD_S))
            if cluster.trainer.status is None:
                killed.append(cluster.kill_someone(rng))
        assert cluster.trainer.status == 0, (tmp_path / "trainer.log").read_text()[-2000:]
        records = records_of(cluster.servers[0].url)
    history: list[list[str]] = json.loads((tmp_path / "checkpoint.json").read_text())
    trained = [group_id for ids in history for group_id in ids]
    ledger = [line.split(" ") for path in tmp_path.glob("*.ledger") for line in path.read_text().splitlines()]
    accepted = {group_id for status, group_id, _ in ledger if status in ("accepted", "duplicate")}
    where = {record.group_id: record for record in records}

    assert len(killed) >= 2, "the run was over before anybody died"
    assert len(history) == STEPS
    assert len(trained) == len(set(trained)) == STEPS * BATCH_SIZE // 2, "a group was trained twice"
    lost = accepted - set(trained) - {group_id for group_id, record in where.items() if record.state != "batched"}
    assert not lost, "an accepted group is neither trained, nor waiting, nor retired"
    assert {group_id for group_id in accepted if where[group_id].state == "retired"} == set(), "accepted, then given up"
    assert {group_id: record.step for group_id, record in where.items() if record.state == "batched"} == {
        group_id: step for step, ids in enumerate(history) for group_id in ids
    }, "the server's books and the trainer's differ"
    for line in (tmp_path / "seen.txt").read_text().splitlines():
        step, oldest, *ids = line.split(" ")
        assert history[int(step)] == ids, "a replayed batch differs from what the step was given first"
        assert int(step) - int(oldest) <= MAX_STALENESS
