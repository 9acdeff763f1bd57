"""Asks a frozen model's servers once, at the start, whether they serve it under the name that they will be asked for."""

from __future__ import annotations

import logging
from typing import Any

from atroposlib.envs.server_handling.engines.http_client import EngineHttp
from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.errors import ConfigError, RolloutError
from atroposlib.teaching.frozen_model import FrozenModel

log = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 60.0
LIST_TIMEOUT_S = 10.0


async def check_served(model: FrozenModel, *, option: str) -> None:
    """Ask each server for one token.

    A server that does not answer yet is none to complain of: requests wait for it, as they do for one that restarts.

    Args:
        option: that holds the model's name.
    Raises:
        ConfigError: a server knows no such model, or lets nobody in; names the models that it serves.
    """
    for server in model.server.servers:
        # One without an address is a stand-in with canned answers.
        if server.config.base_url:
            await _check(server, model.role, option)


async def _check(server: APIServer, role: str, option: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "Say yes."}]
    try:
        await server.chat_completion(messages=messages, max_tokens=1, temperature=0.0, timeout=CHECK_TIMEOUT_S)
    except ConfigError as error:
        at, name = server.config.base_url, server.config.model_name
        raise ConfigError(
            f"the {role} cannot be asked for model {name!r} at {at}, which serves {await _served(server.config)}; "
            f"set {option} to one of these, or start a server of {name!r} ({error})"
        ) from error
    except RolloutError as error:
        log.warning("the %s at %s does not answer yet: %s", role, server.config.base_url, error)


async def _served(config: APIServerConfig) -> str:
    http = EngineHttp(f"inference server {config.root_url}", api_key=config.api_key, timeout_s=LIST_TIMEOUT_S)
    try:
        answer = await http.get(f"{config.root_url}/v1/models", timeout_s=LIST_TIMEOUT_S)
        listed = http.read(answer, "/v1/models")["data"]
        return ", ".join(repr(str(one["id"])) for one in listed) or "no model"
    except (ConfigError, RolloutError, LookupError, TypeError):
        return "models that it does not list"
    finally:
        await http.close()
