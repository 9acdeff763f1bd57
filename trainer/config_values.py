"""Read YAML and key=value overrides, and say in the user's words what is wrong with them. No torch."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import re
import textwrap
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
    """The keys of a YAML file.

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


def check_keys(
    values: Mapping[str, Any],
    *,
    known: Collection[str],
    refused: Mapping[str, str],
    groups: Mapping[str, Collection[str]],
    source: str,
) -> None:
    """Refuse keys that are misspelt, or that would have no effect.

    Args:
        refused: keys that transformers knows and this trainer does not use, with what to do instead.
        groups: the keys of each known key that holds further ones.
        source: where the values come from, for the message.
    Raises:
        ConfigError: names the key and the nearest one that exists.
    """
    for key, value in values.items():
        if key in refused:
            raise ConfigError(f"key {key!r} in {source} has no use in this trainer: {refused[key]}")
        if key not in known:
            # It may be a key of a group, given without the group.
            group = next((group for group, names in groups.items() if key in names), None)
            near = f"{group}.{key}" if group else _nearest(key, set(known) - set(refused))
            raise _unknown(key, near, source)
        for name in value if key in groups and isinstance(value, Mapping) else ():
            if name not in groups[key]:
                near = _nearest(name, groups[key])
                raise _unknown(f"{key}.{name}", near and f"{key}.{near}", source)


def _nearest(key: str, names: Collection[str]) -> str | None:
    """The name that was probably meant."""
    near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.6)
    return near[0] if near else None


def _unknown(key: str, near: str | None, source: str) -> ConfigError:
    hint = f"; did you mean {near!r}?" if near else "; see --print-config for all keys"
    return ConfigError(f"unknown key {key!r} in {source}{hint}")


def leaves(values: Mapping[str, Any], groups: Collection[str]) -> list[str]:
    """The keys that were given, those inside groups dotted."""
    return [
        leaf
        for key, value in values.items()
        for leaf in ([f"{key}.{name}" for name in value] if key in groups and isinstance(value, Mapping) else [key])
    ]


def attribute_docs(cls: type) -> dict[str, str]:
    """The string below each attribute of a class, on one line."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for before, after in itertools.pairwise(body):
        match before, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                docs[name] = " ".join(text.split())
    return docs


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
        problem = first["msg"].removeprefix("Input should be ")
        raise ConfigError(f"{where} in {source} should be {problem}, is {first['input']!r}") from error
