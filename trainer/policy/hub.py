"""Upload of the final model, once it is on disk. What goes wrong here costs nothing but the upload."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atroposlib.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config.grpo import GRPOConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubTarget:
    """Where the model goes, and as whom."""

    repo_id: str
    """OWNER/NAME."""
    token: str
    is_private: bool | None = None
    """None: as the owner's account has it."""
    revision: str | None = None


def hub_target(config: GRPOConfig) -> HubTarget | None:
    """Where a configuration wants the model; None where it wants no upload. To be asked at start, not after hours.

    Raises:
        ConfigError: push_to_hub without a token.
    """
    if not config.push_to_hub:
        return None
    from huggingface_hub import get_token

    token = config.hub_token or get_token()
    if not token:
        raise ConfigError("push_to_hub needs a token that may write: set HF_TOKEN, or log in with: hf auth login")
    return HubTarget(config.hub_model_id, token, config.hub_private_repo, config.hub_revision)


def push_folder(folder: Path, target: HubTarget, *, api: Any = None) -> bool:
    """Upload a saved model.

    Args:
        folder: a whole Hugging Face folder.
        api: a huggingface_hub.HfApi, or what stands for one.
    Returns:
        Whether it arrived. If not, a warning has the command that tries again; the folder is as it was.
    """
    try:
        if api is None:
            from huggingface_hub import HfApi

            api = HfApi(token=target.token)
        api.create_repo(target.repo_id, private=target.is_private, exist_ok=True)
        api.upload_folder(
            repo_id=target.repo_id,
            folder_path=folder,
            revision=target.revision,
            commit_message="Trained with atropos-trainer",
        )
    except Exception as error:
        # Anything: the training is done and saved, and no failure of a network or an account may end it as an error.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning(
            "the model is in %s but not on the Hub: %s\ntry again with: %s",
            folder,
            first,
            retry_command(folder, target),
        )
        return False
    log.info("uploaded %s to %s", folder, target.repo_id)
    return True


def retry_command(folder: Path, target: HubTarget) -> str:
    """The command line that uploads the folder. Without the token: it is in the environment."""
    parts = ["hf", "upload", target.repo_id, str(folder), "."]
    parts += ["--private"] if target.is_private else []
    parts += ["--revision", target.revision] if target.revision else []
    return shlex.join(parts)
