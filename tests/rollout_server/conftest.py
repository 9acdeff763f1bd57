"""Stores of every kind under one roof: opened on the same data again, with a clock that stands until it is moved."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout_server.stores.base import Store, StoreLimits
from rollout_server.stores.embedded import EmbeddedStore, MemoryStore, SQLiteStore
from tests.valkey import ValkeyProcess


class Clock:
    """Unix time, in seconds, as the tests want it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Stores:
    """Opens stores of one kind; all of them hold the same run, where the kind holds anything."""

    def __init__(self, kind: str, data_dir: Path, redis_url: str | None = None) -> None:
        self.kind = kind
        self.is_durable = kind != "memory"
        self.clock = Clock()
        self.data_dir = data_dir
        self.namespace = uuid.uuid4().hex
        self._redis_url = redis_url
        self._open: list[Store] = []

    async def open(self, **limits: Any) -> Store:
        """Another store, with these limits."""
        store = await self._make(StoreLimits(**limits))
        self._open.append(store)
        self.set_clock(store)
        return store

    async def _make(self, limits: StoreLimits) -> Store:
        if self.kind == "memory":
            return await MemoryStore.open(limits)
        if self.kind == "sqlite":
            return await SQLiteStore.open(self.data_dir, limits, synchronous="normal")
        from rollout_server.stores.redis_store import RedisStore  # an extra

        assert self._redis_url is not None
        return await RedisStore.open(self._redis_url, limits, namespace=self.namespace, clock=self.clock)

    def set_clock(self, store: Store) -> None:
        """An embedded store makes a new state, with the system's clock, for each run."""
        if isinstance(store, EmbeddedStore):
            store.state.clock = self.clock

    async def reopen(self, store: Store, **limits: Any) -> Store:
        """As after a restart of the server."""
        await self.close(store)
        return await self.open(**limits)

    async def close(self, store: Store) -> None:
        self._open.remove(store)
        await store.close()

    async def close_all(self) -> None:
        for store in list(self._open):
            await self.close(store)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    server = ValkeyProcess(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.redis)])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    if request.param == "redis" and not os.environ.get("CI"):
        pytest.importorskip("redis")
    url = request.getfixturevalue("valkey").url if request.param == "redis" else None
    stores = Stores(request.param, tmp_path / "data", url)
    yield stores
    await stores.close_all()


@pytest.fixture
async def store(stores: Stores) -> Store:
    return await stores.open()
