"""Data sets of environments and trainers: read, checked, filtered, shuffled and split.

Importing this package is light; each public name loads its module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DataConfig": "atroposlib.data.config",
    "Splits": "atroposlib.data.load",
    "load_splits": "atroposlib.data.load",
    "register_loader": "atroposlib.data.registry",
}

__all__ = ["DataConfig", "Splits", "load_splits", "register_loader"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'atroposlib.data' has no attribute {name!r}")
