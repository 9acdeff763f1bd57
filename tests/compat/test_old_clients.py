"""Old environments and trainers, unchanged, against the server of today."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from rollout_server.config import ServerConfig
from tests.compat.old_bodies import old_group
from tests.compat.old_clients import (
    DEADLINE_S,
    PAUSE_S,
    OldEnvironment,
    OldExampleTrainer,
    OldPollingPlugin,
    eventually,
)
from tests.processes import RolloutServerProcess, rollout_server_on_a_thread


@pytest.fixture
def url() -> Iterator[str]:
    with rollout_server_on_a_thread(ServerConfig(port=0, store="memory")) as url:
        yield url


def run_to_the_end(env: OldEnvironment) -> OldEnvironment:
    """An environment's life."""
    env.start()
    end = time.monotonic() + DEADLINE_S
    while env.step():
        assert time.monotonic() < end, "the environment never saw the end of the run"
        time.sleep(PAUSE_S)
    return env


def train(trainer: OldExampleTrainer, is_over: Callable[[], bool]) -> list[list[float]]:
    """Collect until nobody makes anything any more."""
    batches: list[list[float]] = []
    end = time.monotonic() + DEADLINE_S
    while not is_over():
        assert time.monotonic() < end, "the environments do not end"
        batches += trainer.collect()
        time.sleep(PAUSE_S)
    return batches + trainer.collect()


def test_environments_and_the_example_trainer_come_to_the_end_of_a_run(url: str) -> None:
    envs = [OldEnvironment(url), OldEnvironment(url, min_batch_allocation=0.25, group_size=4)]
    with ThreadPoolExecutor(len(envs)) as threads:
        lives = [threads.submit(run_to_the_end, env) for env in envs]  # before there is a trainer
        trainer = OldExampleTrainer(url, batch_size=8)
        trainer.register()
        batches = train(trainer, lambda: all(life.done() for life in lives))
        for life in lives:
            life.result()

    trained = [number for batch in batches for number in batch]
    assert len(batches) >= 5
    assert len(set(trained)) == len(trained), "nothing is trained twice"
    assert set(trained) <= {number for env in envs for number in env.sent}
    for env in envs:
        assert env.steps_seen == sorted(env.steps_seen)
        own = [number for number in trained if number in env.sent]
        assert own == sorted(own), "oldest first"


def test_a_plugin_may_poll_before_it_registers(url: str) -> None:
    plugin, env = OldPollingPlugin(url), OldEnvironment(url)
    assert plugin.poll() is None
    plugin.register()
    assert plugin.poll() is None

    eventually(env._register)
    env.env_id, env.batch_size = 0, plugin.batch_size
    env.send([env.new_group() for _ in range(4)])

    assert [plugin.poll() for _ in range(3)] == [[0.0, 1.0], [2.0, 3.0], None]


def test_an_environment_without_a_name_is_taken(url: str) -> None:
    OldExampleTrainer(url).register()

    env = OldEnvironment(url, name=None)
    env.start()

    assert env.env_id == 0


@pytest.mark.parametrize("is_reset", [False, True], ids=["registers again", "resets and registers"])
def test_environments_outlive_a_trainer_that_starts_again(url: str, is_reset: bool) -> None:
    env, trainer = OldEnvironment(url), OldExampleTrainer(url, num_steps=50)
    trainer.register()
    env.start()
    for _ in range(3):
        assert env.step()
    first = trainer.collect()

    if is_reset:
        httpx.get(f"{url}/reset_data")
        assert env.step(), "it goes on while there is no trainer"
    trainer.register()
    for _ in range(3):
        assert env.step()
    second = trainer.collect()

    assert first
    assert second
    assert not {number for batch in first for number in batch} & {number for batch in second for number in batch}


def test_a_server_that_is_killed_takes_nobody_with_it(rollout_server: RolloutServerProcess) -> None:
    env = OldEnvironment(rollout_server.url)
    trainer = OldExampleTrainer(rollout_server.url, num_steps=50)
    trainer.register()
    env.start()
    env.step()

    rollout_server.kill()
    restart = threading.Thread(target=rollout_server.start)
    restart.start()
    eventually(lambda: True if _answers(rollout_server.url) else None)
    assert env.step()
    restart.join()

    assert [number for batch in trainer.collect() for number in batch] == env.sent[: len(env.sent) // 2 * 2]


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/info", timeout=1.0).status_code == 200
    except httpx.TransportError:
        return False


def test_a_watcher_sees_the_step_and_the_queue(url: str) -> None:
    trainer = OldExampleTrainer(url)
    trainer.register()
    for i in range(3):
        httpx.post(f"{url}/scored_data", json=old_group(float(i)) | {"overrides": [{}, {}]})

    assert httpx.get(f"{url}/status").json() == {"current_step": 0, "queue_size": 3}
