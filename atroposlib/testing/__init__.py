"""Helpers for authors' tests: a mock inference server, a tokenizer without a model, builders, check_env.

Importing this package is light; each public name loads its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "CheckReport": "atroposlib.testing.env_check",
    "MockInferenceServer": "atroposlib.testing.mock_inference",
    "build_group": "atroposlib.testing.builders",
    "build_item": "atroposlib.testing.builders",
    "check_env": "atroposlib.testing.env_check",
}

__all__ = [
    "CheckReport",
    "MockInferenceServer",
    "build_group",
    "build_item",
    "check_env",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'atroposlib.testing' has no attribute {name!r}")
