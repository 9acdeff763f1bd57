"""Options of the rollout server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ServerConfig(BaseModel):
    """Checked whole at start, handed down, never written to."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0 picks a free port."""
    data_dir: Path = Path("rollout_server_data")
    """Folder of the embedded store; a server started again on it goes on where it was."""
    synchronous: Literal["normal", "full"] = "full"
    """SQLite durability: normal survives SIGKILL of any process, full also a power cut."""
    ticket_ttl_s: float = Field(default=60.0, gt=0)
    """A ticket that is not renewed for this long is void, and its place goes to another group."""
    max_body_bytes: int = Field(default=256 << 20, ge=1 << 10)
    """Largest request body."""
    max_queued_bytes: int = Field(default=8 << 30, ge=1 << 10)
    """Payload that may wait for the trainer; beyond it groups are answered 429."""
    env_timeout_s: float = Field(default=120.0, gt=0)
    """An environment that is silent for this long is shown as lost."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
