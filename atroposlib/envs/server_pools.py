"""Pools of inference servers beside the policy's: which ones an environment has, and how they reach its constructor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from atroposlib.envs.base import BaseEnv
from atroposlib.envs.command_line.server_choice import Servers
from atroposlib.envs.config import BaseEnvConfig
from atroposlib.envs.constants import ENV_NAMESPACE, OPENAI_NAMESPACE
from atroposlib.errors import ConfigError

E = TypeVar("E", bound=BaseEnv)

_handed_over: ContextVar[Mapping[str, Servers | None] | None] = ContextVar("server_pools", default=None)


def pools_of(env_cls: type[BaseEnv]) -> dict[str, Servers | None]:
    """The further pools of an environment class, by name, with their default servers.

    A class that has teacher_namespace and teacher_config_init without deriving from TeacherDistillationEnv has that pool.

    Raises:
        ConfigError: a pool has a name that is taken.
    """
    pools = env_cls.server_pools()
    name = getattr(env_cls, "teacher_namespace", None)
    if name and name not in pools and hasattr(env_cls, "teacher_config_init"):
        pools = {**pools, name: env_cls.teacher_config_init()}
    for taken in sorted({ENV_NAMESPACE, OPENAI_NAMESPACE} & pools.keys()):
        raise ConfigError(
            f"{env_cls.__name__}.server_pools names {taken!r}, and --{taken}.* is taken: choose another name"
        )
    return pools


def build_env(
    env_cls: type[E],
    config: BaseEnvConfig,
    servers: Servers,
    pools: Mapping[str, Servers | None] | None = None,
    *,
    slurm: bool = False,
    testing: bool = False,
) -> E:
    """Construct an environment and hand it its further pools of servers, whatever the arguments of its constructor.

    A constructor that names NAME_server_configs gets that pool; one that does not finds it with `handed_over`.
    """
    pools = pools or {}
    named = inspect.signature(env_cls).parameters
    keywords: dict[str, Any] = {
        f"{name}_server_configs": pool for name, pool in pools.items() if f"{name}_server_configs" in named
    }
    before = _handed_over.set(pools)
    try:
        return env_cls(config, servers, slurm=slurm, testing=testing, **keywords)
    finally:
        _handed_over.reset(before)


def handed_over(name: str) -> Servers | None:
    """Servers of a pool of the environment that build_env is constructing: a subclass need not pass them on."""
    return (_handed_over.get() or {}).get(name)
