"""Where a run is kept: one protocol (base.py), and the stores that keep it."""

from __future__ import annotations

from rollout_server.config import ServerConfig
from rollout_server.stores.base import Store, StoreLimits
from rollout_server.stores.embedded import MemoryStore, SQLiteStore


async def open_store(config: ServerConfig) -> Store:
    """The store that the configuration names; it goes on with the run it finds there.

    Raises:
        ConfigError: its folder or server cannot be used.
    """
    limits = StoreLimits(
        ticket_ttl_s=config.ticket_ttl_s,
        max_queued_bytes=config.max_queued_bytes,
        retain_bytes=config.retain_bytes,
        env_timeout_s=config.env_timeout_s,
        allocation_wait_s=config.allocation_wait_s,
    )
    match config.store:
        case "memory":
            return await MemoryStore.open(limits)
        case "redis":
            from rollout_server.stores.redis_store import RedisStore  # an extra: pip install atroposlib[redis]

            assert config.redis_url is not None
            return await RedisStore.open(config.redis_url, limits, namespace=config.redis_namespace)
        case "sqlite":
            return await SQLiteStore.open(config.data_dir, limits, synchronous=config.synchronous)
