"""Whether a Redis can be trusted with a run: its version, what it does when full, what it loses when it dies."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from redis.exceptions import RedisError

from atroposlib.errors import ConfigError
from rollout_server.stores.redis_link import PASSING_ERRORS, RedisLink

log = logging.getLogger(__name__)

OLDEST_REDIS = 7
KEY_FORMAT = 1
"""Of the keys in Redis; a server refuses to work on a newer one."""


async def check_server(link: RedisLink) -> None:
    """Refuse a server that cannot work; warn where data could be lost.

    Raises:
        ConfigError: an older Redis, or keys of a newer rollout server.
        StoreUnavailableError: no answer, or wrong credentials.
    """
    info = await link.persist("connecting", lambda: link.redis.info("server"))
    if int(str(info["redis_version"]).split(".")[0]) < OLDEST_REDIS:
        raise ConfigError(
            f"Redis at {link.address} has version {info['redis_version']}; Redis {OLDEST_REDIS} or any Valkey is needed"
        )
    key = f"{link.namespace}:format"
    found = int(await link.persist("reading the key format", lambda: link.command("GET", key)) or 0)
    if found == 0:
        await link.persist("writing the key format", lambda: link.command("SET", key, KEY_FORMAT))
    if found > KEY_FORMAT:
        raise ConfigError(
            f"the keys of {link.namespace} have format {found}, this server reads up to {KEY_FORMAT}; update it, or use another"
            " --redis-namespace"
        )
    for warning in durability_warnings(await _settings(link)):
        log.warning("Redis at %s %s", link.address, warning)


async def _settings(link: RedisLink) -> Mapping[str, str]:
    """What CONFIG GET may tell; managed services often forbid it."""
    try:
        found = await link.redis.config_get("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
    except (RedisError, *PASSING_ERRORS) as error:
        log.info("Redis at %s does not show its settings (%s): durability is not checked", link.address, error)
        return {}
    return {str(name): str(value) for name, value in found.items()}


def durability_warnings(settings: Mapping[str, str]) -> list[str]:
    """What could lose groups that were accepted, each with its fix. Settings that are not known raise no warning."""
    warnings = []
    if settings.get("appendonly") == "no":
        warnings.append(
            "keeps nothing when it dies: set appendonly yes (and appendfsync always to survive a power cut)"
        )
    elif settings.get("appendfsync") == "no":
        warnings.append("leaves flushing to the kernel: set appendfsync everysec, or always to survive a power cut")
    policy = settings.get("maxmemory-policy", "noeviction")
    if policy.startswith("allkeys") and settings.get("maxmemory", "0") != "0":
        warnings.append(
            f"deletes keys when memory is full (maxmemory-policy {policy}): set maxmemory-policy noeviction"
        )
    return warnings
