"""Where options come from: flags win over environment variables, those over the file, the file over the defaults."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from atroposlib.errors import ConfigError
from rollout_server.config import ROLES, ServerConfig

ENV_PREFIX = "ATROPOS_SERVER_"
CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"
TOKENS_PREFIX = f"{ENV_PREFIX}TOKENS_"


def resolve(flags: Mapping[str, str], environ: Mapping[str, str], config_file: Path | None) -> ServerConfig:
    """The checked configuration.

    Args:
        flags: raw values by field.
        environ: environment variables; those that start with ATROPOS_SERVER_ are read.
        config_file: YAML, {field: value}.
    Raises:
        ConfigError: an unknown key or a bad value, named with where it came from.
    """
    file = config_file or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def add(layer: Mapping[str, Any], name: Callable[[str], str]) -> None:
        for key, value in layer.items():
            both = [values.get(key), value]
            values[key] = {**both[0], **both[1]} if all(isinstance(part, dict) for part in both) else value
            sources[key] = name(key)

    add(read_file(file) if file else {}, lambda key: f"{file}: {key}")
    add(read_environ(environ), lambda key: f"{ENV_PREFIX}{key.upper()}")
    add(flags, lambda key: f"--{key.replace('_', '-')}")
    try:
        return ServerConfig(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(dict(item), sources) for item in error.errors())) from error


def read_file(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected a mapping of options to values")
    for key in values:
        if key not in ServerConfig.model_fields:
            raise ConfigError(f"{path}: unknown option {key!r}; {nearest(str(key))}")
    return values


def read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """Options among the environment variables. Raises ConfigError."""
    values: dict[str, Any] = {}
    tokens = {role: environ[name] for role in ROLES if environ.get(name := f"{TOKENS_PREFIX}{role.upper()}")}
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name == CONFIG_VARIABLE or name.startswith(TOKENS_PREFIX):
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key not in ServerConfig.model_fields or key == "tokens":
            raise ConfigError(f"unknown environment variable {name}; {nearest(key)}")
        values[key] = value
    if tokens:
        values["tokens"] = tokens
    return values


def nearest(key: str) -> str:
    """A suggestion in place of an unknown option."""
    close = difflib.get_close_matches(key.replace("-", "_"), ServerConfig.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else "run-api --help shows every option"


def masked_yaml(config: ServerConfig) -> str:
    """The configuration as a file for --config, without its secrets."""
    values = config.model_dump(mode="json")
    if config.redis_url is not None:
        values["redis_url"] = re.sub(r"(?<=://)([^@/]*:)[^@/]*@", r"\1**********@", config.redis_url)
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _problem(item: dict[str, Any], sources: Mapping[str, str]) -> str:
    text = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return text
    key = str(item["loc"][0])
    value = "" if key in ("tokens", "redis_url") else f"={str(item['input'])[:80]!r}"
    return f"{sources.get(key, key)}{value}: {text}"
