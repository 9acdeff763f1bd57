"""Groups through outages: kept on disk while the rollout server is away, delivered once, by whichever process comes next."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from atroposlib.client import RolloutClient
from atroposlib.envs.serving import courier, membership
from atroposlib.envs.serving.records import RunRecords
from atroposlib.envs.serving.runner import EnvRunner
from atroposlib.envs.serving.serve import EnvClient
from atroposlib.envs.serving.spool import Spool
from atroposlib.errors import NoRunError
from atroposlib.testing.mock_inference import MockInferenceServer
from atroposlib.wire.columns import Group, decode_groups
from atroposlib.wire.models import EnvRequest, GroupResult, RunRequest, Status
from tests.envs.fakes import CountingEnv, FakeRolloutServer
from tests.processes import RolloutServerProcess

MakeEnv = Callable[..., CountingEnv]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "SPOOL_AFTER_S", 0.02)
    monkeypatch.setattr(membership, "FIRST_PAUSE_S", 0.01)


class AwayServer(FakeRolloutServer):
    """Takes no group until it is back."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.back = asyncio.Event()

    async def post_groups(self, groups: Sequence[Group]) -> list[GroupResult]:
        await self.back.wait()
        return await super().post_groups(groups)


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def ledger(env: CountingEnv) -> list[str]:
    path = env.config.run_dir / "ledger" / "env-counting.jsonl"
    return [json.loads(line)["group_id"] for line in path.read_text().splitlines()]


async def test_groups_go_to_disk_while_the_server_is_away_and_leave_it_when_it_is_back(
    make_env: MakeEnv, tmp_path: Path
) -> None:
    env, server = make_env(max_num_workers=2), AwayServer(batch=3, steps=2, in_flight=3)
    spool = Spool(tmp_path / "s.groups", max_bytes=1 << 20)
    records = RunRecords(env.config.run_dir, env.display_name)

    running = asyncio.create_task(EnvRunner(env, server, records, spool=spool).run())
    # Generation goes on as far as tickets reach: two workers have made three groups.
    await until(lambda: len(spool) == 3)
    assert spool.path.stat().st_size > 0
    server.back.set()
    await running
    records.close()

    assert sorted(ledger(env)) == sorted(server.groups)
    assert len(spool) == 0
    assert not spool.path.exists()


async def test_what_a_stopped_environment_had_in_hand_is_delivered_by_the_next_one_once(
    make_env: MakeEnv, tmp_path: Path
) -> None:
    server, path = AwayServer(batch=2, steps=4, in_flight=2), tmp_path / "s.groups"
    first = make_env(max_num_workers=2)
    records = RunRecords(first.config.run_dir, first.display_name)
    runner = EnvRunner(first, server, records, spool=Spool(path, max_bytes=1 << 20))
    running = asyncio.create_task(runner.run())
    await until(lambda: len(first.collected) == 2)
    runner.stop()
    await running
    assert path.stat().st_size > 0

    server.back.set()
    taken, *_ = _read(path)
    # The first of them had arrived, and only its answer was lost.
    server.groups[taken.group_id] = taken
    second = make_env(max_num_workers=2)
    await EnvRunner(second, server, records, spool=Spool(path, max_bytes=1 << 20)).run()
    records.close()

    assert sorted(ledger(second)) == sorted(server.groups)
    assert taken.group_id in ledger(second)
    assert len(set(ledger(second))) == len(ledger(second))
    assert not path.exists()


async def test_spooled_groups_of_an_earlier_run_are_thrown_away(make_env: MakeEnv, tmp_path: Path) -> None:
    server, path = AwayServer(batch=2, steps=2, in_flight=2), tmp_path / "s.groups"
    first = make_env(max_num_workers=2)
    runner = EnvRunner(first, server, RunRecords(None, "counting"), spool=Spool(path, max_bytes=1 << 20))
    running = asyncio.create_task(runner.run())
    await until(lambda: len(first.collected) == 2)
    runner.stop()
    await running

    server.back.set()
    server.request = server.request.model_copy(update={"run_name": "another"})
    await EnvRunner(make_env(), server, RunRecords(None, "counting"), spool=Spool(path, max_bytes=1 << 20)).run()

    assert {group.run_id for group in server.groups.values()} == {"id-of-another"}
    assert not path.exists()


async def test_a_full_spool_leaves_groups_in_memory_and_loses_none(
    make_env: MakeEnv, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env, server = make_env(max_num_workers=3), AwayServer(batch=3, steps=1, in_flight=3)
    spool = Spool(tmp_path / "s.groups", max_bytes=10)

    running = asyncio.create_task(EnvRunner(env, server, RunRecords(None, "counting"), spool=spool).run())
    await until(lambda: caplog.text.count("waits in memory only") == 3)
    server.back.set()
    await running

    assert len(server.groups) == 3


async def test_a_group_leaves_the_spool_after_its_entry_into_the_ledger(make_env: MakeEnv, tmp_path: Path) -> None:
    env, server = make_env(max_num_workers=2), AwayServer(batch=2, steps=1, in_flight=2)
    spool = Spool(tmp_path / "s.groups", max_bytes=1 << 20)
    was_spooled: list[bool] = []

    class Watched(RunRecords):
        def accepted(self, group_id: str, n_sequences: int) -> None:
            was_spooled.append(group_id in spool)

    running = asyncio.create_task(EnvRunner(env, server, Watched(None, "counting"), spool=spool).run())
    await until(lambda: len(spool) == 2)
    server.back.set()
    await running

    assert was_spooled == [True, True]
    assert len(spool) == 0


async def test_a_spooled_group_that_the_ledger_has_already_is_not_entered_again(
    make_env: MakeEnv, tmp_path: Path
) -> None:
    server, path = AwayServer(batch=2, steps=2, in_flight=2), tmp_path / "s.groups"
    first = make_env(max_num_workers=2)
    records = RunRecords(first.config.run_dir, first.display_name)
    runner = EnvRunner(first, server, records, spool=Spool(path, max_bytes=1 << 20))
    running = asyncio.create_task(runner.run())
    await until(lambda: len(first.collected) == 2)
    runner.stop()
    await running
    taken, *_ = _read(path)
    records.accepted(taken.group_id, 2)

    server.back.set()
    await EnvRunner(make_env(), server, records, spool=Spool(path, max_bytes=1 << 20)).run()
    records.close()

    assert ledger(first).count(taken.group_id) == 1
    assert sorted(ledger(first)) == sorted(server.groups)


async def test_groups_that_wait_for_the_server_are_bounded(make_env: MakeEnv) -> None:
    env, server = make_env(max_num_workers=2), AwayServer(batch=2, steps=9, in_flight=100)

    running = asyncio.create_task(EnvRunner(env, server, RunRecords(None, "counting")).run())
    await until(lambda: len(env.workers) == 4)
    await asyncio.sleep(0.05)
    assert len(env.collected) == 4
    server.back.set()
    await running

    assert len(server.groups) >= 18


async def test_the_last_thing_is_a_goodbye(make_env: MakeEnv) -> None:
    server = FakeRolloutServer()
    said: list[tuple[int, int]] = []

    async def farewell(info: Any) -> None:
        said.append((info.env_id, len(server.tickets)))

    await EnvRunner(make_env(), server, RunRecords(None, "counting"), farewell=farewell).run()

    assert said == [(server.session, 0)]


async def test_nobody_is_told_goodbye_who_was_never_met(make_env: MakeEnv) -> None:
    server = FakeRolloutServer()
    server.has_run = False

    async def farewell(info: Any) -> None:
        raise AssertionError("it never joined")

    runner = EnvRunner(make_env(), server, RunRecords(None, "counting"), farewell=farewell)
    running = asyncio.create_task(runner.run())
    await asyncio.sleep(0.02)
    runner.stop()
    await running


# Real processes


RUN = RunRequest(run_name="r", batch_size=8, max_staleness=2, num_steps=6, group_size=4)

ENV_SCRIPT = """
import sys
from atroposlib.envs.serving import courier
from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig

courier.SPOOL_AFTER_S = 0.05


class EchoEnv(BaseEnv):
    name = "echo"

    async def get_next_item(self):
        return "say a"

    async def collect_trajectories(self, item):
        messages = [{"role": "user", "content": item}]
        return await self.rollout_group(messages, reward=lambda text: float(text == "a"), max_tokens=4)


if __name__ == "__main__":
    import asyncio

    url, engine, tokenizer, folder = sys.argv[1:]
    config = BaseEnvConfig(
        group_size=4, tokenizer_name=tokenizer, rollout_server_url=url, run_dir=folder, max_num_workers=4, use_wandb=False
    )
    asyncio.run(EchoEnv(config, [APIServerConfig(base_url=engine, server_type="vllm", timeout=30)]).env_manager())
"""


class EnvProcess:
    """The environment above, as a user would start it."""

    def __init__(self, script: Path, *arguments: str) -> None:
        self.log = script.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def ended(self, timeout_s: float = 15.0) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_s)


async def test_sigkill_of_server_and_environment_loses_no_scored_group_and_trains_none_twice(
    rollout_server: RolloutServerProcess, tokenizer_name: str, tokenizer: Any, tmp_path: Path
) -> None:
    script = tmp_path / "echo_env.py"
    script.write_text(ENV_SCRIPT)
    spool = tmp_path / "run" / "spool" / "echo.groups"
    in_flight = asyncio.Semaphore(0)

    def reply(prompt: list[int], index: int) -> list[int]:
        in_flight.release()
        return [*tokenizer.encode("ab"[index % 2]), tokenizer.eos_token_id]

    async with MockInferenceServer(reply, latency_s=0.3) as engine, RolloutClient(rollout_server.url) as client:
        arguments = (rollout_server.url, engine.url, tokenizer_name, str(tmp_path / "run"))
        session = (await client.open_run(RUN)).session
        await client.publish_policy(0, session=session)
        first = EnvProcess(script, *arguments)
        try:
            async with asyncio.timeout(20):
                # Generations are under way; their groups will be scored while the server is dead.
                await in_flight.acquire()
            await asyncio.to_thread(rollout_server.kill)
            await until(lambda: spool.exists() and spool.stat().st_size > 0)
            kept = [group.group_id for group in _read(spool)]
        finally:
            first.kill()
        await asyncio.to_thread(rollout_server.start)
        second = EnvProcess(script, *arguments)
        try:
            trained = await train(client, session, engine)
            assert await second.ended() == 0, second.log.read_text()
        finally:
            second.kill()
        records = {record.group_id: record.state for record in await client.group_records()}

    assert kept
    assert set(kept) <= records.keys()
    assert set(trained.values()) == {1}
    assert not spool.exists()


async def train(client: RolloutClient, session: int, engine: MockInferenceServer) -> Counter[str]:
    trained: Counter[str] = Counter()
    for step in range(RUN.num_steps):
        trained.update(group.group_id for group in await client.lease(step, session=session, deadline_s=30))
        engine.weight_version = str(step + 1)
        await client.ack(step, session=session, policy_version=step + 1)
    return trained


def _read(spool: Path) -> list[Group]:
    return decode_groups(spool.read_bytes())


async def test_sigterm_ends_it_cleanly_and_the_server_hears_it(
    rollout_server: RolloutServerProcess, tokenizer_name: str, tokenizer: Any, tmp_path: Path
) -> None:
    script = tmp_path / "echo_env.py"
    script.write_text(ENV_SCRIPT)

    async with (
        MockInferenceServer(lambda prompt, index: [5], latency_s=30.0) as engine,
        RolloutClient(rollout_server.url) as client,
    ):
        session = (await client.open_run(RUN)).session
        await client.publish_policy(0, session=session)
        env = EnvProcess(script, rollout_server.url, engine.url, tokenizer_name, str(tmp_path / "run"))
        try:
            await _until_status(client, lambda status: status.tickets_outstanding > 0)
            os.kill(env.process.pid, signal.SIGTERM)
            assert await env.ended() == 0, env.log.read_text()
        finally:
            env.kill()
        status = await client.status()

    assert status.tickets_outstanding == 0
    assert [one.is_connected for one in status.envs] == [False]


async def _until_status(client: RolloutClient, condition: Callable[[Status], bool]) -> None:
    end = time.monotonic() + 20
    while not condition(await client.status()):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def test_a_late_goodbye_does_not_send_the_successor_away(rollout_server: RolloutServerProcess) -> None:
    async with EnvClient(rollout_server.url) as client:
        with pytest.raises(NoRunError):
            await client.register_env(EnvRequest(name="e", group_size=4))
        await client.open_run(RUN)
        old = await client.register_env(EnvRequest(name="e", group_size=4))
        new = await client.register_env(EnvRequest(name="e", group_size=4))

        await client.leave(old)
        assert [one.is_connected for one in (await client.status()).envs] == [True]

        await client.leave(new)
        assert [one.is_connected for one in (await client.status()).envs] == [False]
