"""The SDK of atroposlib: write environments, talk to the rollout server, start runs.

Importing this package is light; each public name loads its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.5.0.dev0"

_HOMES = {
    "APIServerConfig": "atroposlib.envs.server_handling.server_baseline",
    "AtroposError": "atroposlib.errors",
    "BaseEnv": "atroposlib.envs.base",
    "BaseEnvConfig": "atroposlib.envs.config",
    "Group": "atroposlib.wire.columns",
    "RolloutClient": "atroposlib.client",
    "ScoredDataGroup": "atroposlib.type_definitions",
    "ServerManager": "atroposlib.envs.server_handling.server_manager",
}

__all__ = [
    "APIServerConfig",
    "AtroposError",
    "BaseEnv",
    "BaseEnvConfig",
    "Group",
    "RolloutClient",
    "ScoredDataGroup",
    "ServerManager",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'atroposlib' has no attribute {name!r}")
