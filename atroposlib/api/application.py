"""Makes the rollout server's application for whichever ASGI runner asks."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

from atroposlib.errors import ConfigError


@cache
def load_app() -> Any:
    """The FastAPI application, the same at every call; ATROPOS_SERVER_* variables configure it, as they do run-api.

    The runner listens, so its own --host and --port decide where; the server still asks for tokens, or
    ATROPOS_SERVER_INSECURE=true, when ATROPOS_SERVER_HOST is no loopback address, and answers requests for another
    host name than that with 421. run-api sets limits on connections besides and drains before it ends: prefer it.

    Raises:
        ConfigError: the rollout server is not installed, or a variable is unknown or bad.
    """
    # Not by import statements: the SDK knows no server, and works where none is installed.
    try:
        app = importlib.import_module("rollout_server.app")
        sources = importlib.import_module("rollout_server.config_sources")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the rollout server needs the module {error.name}, which is not installed; pip install 'atroposlib[server]'"
        ) from error
    return app.create_app(sources.resolve({}, os.environ, None))
