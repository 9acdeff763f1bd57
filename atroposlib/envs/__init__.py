"""Environments: the author's contract (base), its configuration, and the machinery that runs it."""

from __future__ import annotations

from typing import Any

__all__ = ["APIServerConfig", "BaseEnv", "BaseEnvConfig", "ScoredDataGroup", "ScoredDataItem"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("atroposlib.envs.base"), name)
    raise AttributeError(f"module 'atroposlib.envs' has no attribute {name!r}")
