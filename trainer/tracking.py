"""Weights & Biases without an account: keep the run on disk instead of asking for a key."""

from __future__ import annotations

import logging
import netrc
import os
from pathlib import Path

from trainer.config import GRPOConfig

log = logging.getLogger(__name__)

WANDB_HOST = "api.wandb.ai"


def prepare_tracking(config: GRPOConfig) -> None:
    """Set what wandb reads from the environment, where the user has not set it."""
    if not config.reports_to("wandb"):
        return
    os.environ.setdefault("WANDB_DIR", config.run_dir)
    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        log.warning("wandb has no key: logging offline into %s (wandb sync uploads it later)", config.run_dir)
        os.environ["WANDB_MODE"] = "offline"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(str(Path.home() / ".netrc")).authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
