"""Where a model's name leads: the OpenAI-compatible server, the model's name there, and the variable of its key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from atroposlib.errors import ConfigError
from atroposlib.rim.config import ModelConfig


@dataclass(frozen=True)
class Provider:
    """A public service, or a server that listens where its makers say."""

    base_url: str
    key_variable: str | None
    """None: it asks for no key."""
    tokens_field: str = "max_tokens"
    """What its chat route calls the largest number of tokens."""


PROVIDERS: Mapping[str, Provider] = {
    "anthropic": Provider("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    "cerebras": Provider("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY", "max_completion_tokens"),
    "deepinfra": Provider("https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    "deepseek": Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "fireworks_ai": Provider("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    "gemini": Provider("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "groq": Provider("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "moonshot": Provider("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY"),
    "nvidia_nim": Provider("https://integrate.api.nvidia.com/v1", "NVIDIA_NIM_API_KEY"),
    "ollama": Provider("http://localhost:11434/v1", None),
    "openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY", "max_completion_tokens"),
    "openrouter": Provider("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "perplexity": Provider("https://api.perplexity.ai", "PERPLEXITYAI_API_KEY"),
    "sambanova": Provider("https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    "together_ai": Provider("https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    "xai": Provider("https://api.x.ai/v1", "XAI_API_KEY"),
}
LOCAL_PREFIXES = ("hosted_vllm", "ollama", "openai")
"""Prefixes that say only which protocol the server at base_url speaks."""
# Not gpt-oss, gpt-j or gpt-neo, which others serve.
_OPENAI_MODEL = re.compile(r"(gpt-\d|chatgpt-|o[134](-|$))[^/]*")


@dataclass(frozen=True)
class Endpoint:
    """A model behind a chat route."""

    base_url: str
    """Up to and with /v1, without a slash at the end."""
    model: str
    """Its name there."""
    api_key: str = field(default="", repr=False)
    tokens_field: str = "max_tokens"

    def __str__(self) -> str:
        return f"{self.model} at {self.base_url}"


def endpoint_of(name: str, config: ModelConfig, environ: Mapping[str, str] | None = None) -> Endpoint:
    """Where `provider/model`, `http://host:port/v1#model`, or any model of config.base_url is asked.

    `gpt-4o-mini` and the like are OpenAI's without its name before them.

    Raises:
        ConfigError: the name leads nowhere, or the variable of the key is not set.
    """
    environ = os.environ if environ is None else environ
    if name.startswith(("http://", "https://")):
        base_url, _, model = name.partition("#")
        if not model:
            raise ConfigError(f"judge model {name!r} names no model; write http://host:port/v1#model")
        return Endpoint(base_url.rstrip("/"), model, _named_key(config.api_key, environ))
    prefix, _, model = name.partition("/")
    if config.base_url is not None:
        bare = model if model and prefix in LOCAL_PREFIXES else name
        return Endpoint(config.base_url.rstrip("/"), bare, _named_key(config.api_key, environ))
    if _OPENAI_MODEL.fullmatch(name):
        prefix, model = "openai", name
    provider = PROVIDERS.get(prefix)
    if provider is None or not model:
        raise ConfigError(
            f"judge model {name!r} names no provider that is known ({', '.join(PROVIDERS)}); write provider/model, "
            "http://host:port/v1#model, or set base_url in model_configs"
        )
    usual = f"env:{provider.key_variable}" if provider.key_variable else None
    key = _named_key(config.api_key or usual, environ)
    return Endpoint(provider.base_url, model, key, provider.tokens_field)


def _named_key(place: str | None, environ: Mapping[str, str]) -> str:
    if place is None:
        return ""
    variable = place.removeprefix("env:")
    if not environ.get(variable):
        raise ConfigError(
            f"the key of the judge model is looked for in {variable}, which is not set; export {variable}"
        )
    return environ[variable]
