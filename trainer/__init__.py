"""The trainer process: GRPO on the batches of a rollout server, and the way of new weights to the engines.

Importing this package is light; each public name loads its module, and with it torch, on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "GRPOConfig": "trainer.config",
    "GRPOTrainer": "trainer.grpo_trainer",
    "LocalConfig": "trainer.local.config",
}

__all__ = ["GRPOConfig", "GRPOTrainer", "LocalConfig"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
