"""Groups of old clients on their way into a store."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from rollout_server.compat.dedupe import Deduplication
from rollout_server.compat.intake import Reader, take_in
from rollout_server.config import ServerConfig
from rollout_server.services import Services
from rollout_server.signals import Signal
from rollout_server.stores.base import StoreLimits
from rollout_server.stores.embedded import MemoryStore
from tests.compat.old_bodies import old_group

BODY = json.dumps(old_group()).encode()


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    store = await MemoryStore.open(StoreLimits())
    yield Services(config=ServerConfig(), store=store, capacity=Signal(), queue=Signal())
    await store.close()


def reader(clock: Clock, *, sender: str = "a", window_s: float = 100.0) -> Reader:
    return Reader(ServerConfig(), Deduplication(window_s, clock), sender)


async def kept(services: Services) -> tuple[int, int]:
    """Groups queued, and repetitions counted."""
    status = await services.store.status()
    return status.queued_groups, status.groups_duplicate


async def test_a_repetition_is_recognised_across_the_edge_of_two_windows(services: Services) -> None:
    clock = Clock(1099.0)
    await take_in(services, BODY, reader(clock).one)
    clock.now = 1101.0

    n_groups = await take_in(services, BODY, reader(clock).one)

    assert n_groups == 1
    assert await kept(services) == (1, 1)


async def test_the_same_content_much_later_is_a_new_group(services: Services) -> None:
    clock = Clock()
    await take_in(services, BODY, reader(clock).one)
    clock.now += 200.0

    await take_in(services, BODY, reader(clock).one)

    assert await kept(services) == (2, 0)


async def test_the_same_content_of_another_host_is_another_group(services: Services) -> None:
    clock = Clock()
    await take_in(services, BODY, reader(clock).one)

    await take_in(services, BODY, reader(clock, sender="b").one)

    assert await kept(services) == (2, 0)


async def test_without_a_window_nothing_is_a_repetition(services: Services) -> None:
    for _ in range(2):
        await take_in(services, BODY, reader(Clock(), window_s=0.0).one)

    assert await kept(services) == (2, 0)


async def test_the_largest_group_of_an_environment_is_remembered(services: Services) -> None:
    body = json.dumps([old_group(1.0, n=4), old_group(2.0, n=2), old_group(3.0, env_id=1)]).encode()

    await take_in(services, body, reader(Clock()).many)

    assert services.legacy.largest_groups == {0: 4, 1: 2}


async def test_an_empty_list_keeps_nothing(services: Services) -> None:
    assert await take_in(services, b"[]", reader(Clock()).many) == 0
    assert await kept(services) == (0, 0)
