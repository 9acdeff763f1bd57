"""Read flat YAML and key=value overrides, and say in the user's words what is wrong with them. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from atroposlib.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-6 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a flat YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold keys and values, e.g. 'learning_rate: 1e-6'")
    return values


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The keys of `key=value` arguments; values are YAML.

    Raises:
        ConfigError: an argument is no key=value.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        *groups, name = key.split(".")
        if not equals or not all(part.isidentifier() for part in (*groups, name)):
            raise ConfigError(f"{override!r} is not key=value, e.g. learning_rate=1e-6 or weight_sync.transport=disk")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        try:
            place[name] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {override!r} is not YAML: {' '.join(str(error).split())}") from error
    return values


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `over`, group by group."""
    both = dict(values)
    for key, value in over.items():
        is_group = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged(both[key], value) if is_group else value
    return both


def check_keys(values: Mapping[str, Any], *, known: Collection[str], refused: Mapping[str, str], source: str) -> None:
    """Refuse keys that are misspelt, or that would have no effect.

    Args:
        refused: keys that transformers knows and this trainer does not use, with what to do instead.
        source: where the values come from, for the message.
    Raises:
        ConfigError: names the key and the nearest one that exists.
    """
    for key in values:
        if key in refused:
            raise ConfigError(f"key {key!r} in {source} has no use in this trainer: {refused[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(set(known) - set(refused)), n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else "; see --print-config for all keys"
            raise ConfigError(f"unknown key {key!r} in {source}{hint}")


def coerce(key: str, value: Any, hint: Any, *, source: str) -> Any:
    """The value as the type of its field.

    Raises:
        ConfigError: it is none.
    """
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *map(str, first["loc"])])
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"unknown key {where!r} in {source}; see --print-config for all keys") from error
        problem = first["msg"].removeprefix("Input should be ")
        raise ConfigError(f"{where} in {source} should be {problem}, is {first['input']!r}") from error
