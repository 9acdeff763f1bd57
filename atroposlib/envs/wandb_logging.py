"""Weights & Biases, imported only when a run is opened, and never a reason to stop."""

from __future__ import annotations

import logging
import random
import string
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.util import find_spec
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

_SUFFIX_LETTERS = 6


def open_run(*, project: str | None, group: str | None, name: str | None, config: dict[str, Any]) -> bool:
    """Open a run in this process. WANDB_MODE=offline needs no network. False, and a line that says why, where it cannot be.

    Args:
        project: as the trainer registered it.
        name: of the run; None lets wandb choose.
    """
    if not project:
        log.info("the trainer names no wandb project: this environment logs to its run folder only")
        return False
    if find_spec("wandb") is None:
        log.info("wandb is not installed: this environment logs to its run folder only; pip install wandb")
        return False
    import wandb

    try:
        wandb.init(project=project, group=group, name=name, config=config)
    except wandb.Error as error:
        log.warning("wandb refused the run, training goes on without it: %s", error)
        return False
    return True


def run_name(wandb_name: str | None) -> str | None:
    """`<wandb_name>-<date>-<6 letters>`: several starts of one environment are told apart."""
    if wandb_name is None:
        return None
    letters = "".join(random.choices(string.ascii_lowercase, k=_SUFFIX_LETTERS))
    return f"{wandb_name}-{datetime.now():%Y-%m-%d}-{letters}"


def is_active() -> bool:
    """Whether a run is open in this process, whoever opened it."""
    wandb = _loaded()
    return wandb is not None and wandb.run is not None


def log_metrics(metrics: dict[str, Any], *, step: int) -> None:
    """Log to the open run; nothing happens where none is."""
    wandb = _loaded()
    if wandb is not None and wandb.run is not None:
        wandb.log(metrics, step=step)


def rollout_table(groups: Iterable[Sequence[Sequence[Any]]]) -> Any:
    """A table of sample rollouts: text, score; further entries of a row are left out. None where wandb is not installed."""
    if find_spec("wandb") is None:
        return None
    import wandb

    table = wandb.Table(columns=["text", "score"])
    for group in groups:
        for row in group:
            table.add_data(row[0], row[1])
    return table


def close_run() -> None:
    """Finish the open run."""
    wandb = _loaded()
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def _loaded() -> ModuleType | None:
    return sys.modules.get("wandb")
