"""The sinks of report_to: that they are there, and where they keep a run. wandb without an account stays on disk."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
from collections.abc import Callable
from pathlib import Path

from atroposlib.errors import ConfigError
from trainer.config.grpo import GRPOConfig
from trainer.config.values import nearest

log = logging.getLogger(__name__)

WANDB_HOST = "api.wandb.ai"
PACKAGES = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",)}
"""Any one of these is enough for the sink."""


def prepare_tracking(config: GRPOConfig) -> None:
    """Check the sinks, and set what they read from the environment, where the user has not set it.

    Raises:
        ConfigError: a sink that is not installed, or is none.
    """
    for sink in config.report_to or []:
        check_sink(sink)
    if config.reports_to("tensorboard"):
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(config.run_dir) / "tensorboard"))
    if config.reports_to("wandb"):
        _prepare_wandb(config)


def check_sink(sink: str, *, is_installed: Callable[[str], bool] | None = None) -> None:
    """Whether a sink can be reported to.

    Args:
        is_installed: tells of a package; looks at this environment if absent.
    Raises:
        ConfigError: no.
    """
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    if sink in PACKAGES:
        packages = PACKAGES[sink]
        if not any((is_installed or _is_installed)(package) for package in packages):
            raise ConfigError(
                f"report_to={sink} needs {packages[0]}, which is not installed; install it with: "
                f"pip install {packages[0]}, or leave it out: metrics.jsonl is written in any case"
            )
    elif sink not in INTEGRATION_TO_CALLBACK:
        near = nearest(sink, PACKAGES)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"report_to={sink!r} is no sink; give any of jsonl, {', '.join(PACKAGES)}{hint}")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _prepare_wandb(config: GRPOConfig) -> None:
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
