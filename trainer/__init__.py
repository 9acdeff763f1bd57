"""The trainer process: GRPO on the batches of a rollout server, SFT and GKD on data sets, and new weights to the engines.

Importing this package is light; each public name loads its module, and with it torch, on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "GKDConfig": "trainer.supervised.config",
    "GKDTrainer": "trainer.supervised.gkd_trainer",
    "GRPOConfig": "trainer.config.grpo",
    "GRPOTrainer": "trainer.grpo_trainer",
    "LocalConfig": "trainer.local.config",
    "SFTConfig": "trainer.supervised.config",
    "SFTTrainer": "trainer.supervised.sft_trainer",
    "TeacherGRPOTrainer": "trainer.teacher",
}

__all__ = [
    "GKDConfig",
    "GKDTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "LocalConfig",
    "SFTConfig",
    "SFTTrainer",
    "TeacherGRPOTrainer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
