"""Which client class speaks to a server, by its config's server_type."""

from __future__ import annotations

import inspect
from importlib import import_module

from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from atroposlib.errors import ConfigError

# Imported at first use: an environment pays only for the clients that it needs.
_CLASSES = {
    "openai": ("openai_server", "OpenAIServer"),
    "vllm": ("vllm_server", "VLLMServer"),
    "sglang": ("sglang_server", "SGLangServer"),
    "trl": ("trl_vllm_server", "TrlVllmServer"),
}


def server_class_of(config: APIServerConfig, server_class: type[APIServer]) -> type[APIServer]:
    """The class asked for, or the one of the server_type where an abstract class was asked for."""
    if not inspect.isabstract(server_class):
        return server_class
    if config.server_type not in _CLASSES:
        raise ConfigError(f"server_type {config.server_type!r} is unknown; known: {', '.join(_CLASSES)}")
    module, name = _CLASSES[config.server_type]
    found: type[APIServer] = getattr(import_module(f"atroposlib.envs.server_handling.{module}"), name)
    return found
