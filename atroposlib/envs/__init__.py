"""Environments: the author's contract (base), its configuration, and the machinery that runs it.

Importing this package is light; each public name loads its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "APIServer": "atroposlib.envs.server_handling.server_baseline",
    "APIServerConfig": "atroposlib.envs.server_handling.server_baseline",
    "BaseEnv": "atroposlib.envs.base",
    "BaseEnvConfig": "atroposlib.envs.config",
    "CombinedReward": "atroposlib.envs.reward_fns",
    "EvalHandlingEnum": "atroposlib.envs.base",
    "RewardFunction": "atroposlib.envs.reward_fns",
    "ScoredDataGroup": "atroposlib.type_definitions",
    "ScoredDataItem": "atroposlib.type_definitions",
    "ServerBaseline": "atroposlib.envs.server_handling.server_baseline",
    "ServerManager": "atroposlib.envs.server_handling.server_manager",
    "TeacherDistillationConfig": "atroposlib.envs.teacher_distillation_env",
    "TeacherDistillationEnv": "atroposlib.envs.teacher_distillation_env",
}

__all__ = [
    "APIServer",
    "APIServerConfig",
    "BaseEnv",
    "BaseEnvConfig",
    "CombinedReward",
    "EvalHandlingEnum",
    "RewardFunction",
    "ScoredDataGroup",
    "ScoredDataItem",
    "ServerBaseline",
    "ServerManager",
    "TeacherDistillationConfig",
    "TeacherDistillationEnv",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'atroposlib.envs' has no attribute {name!r}")
