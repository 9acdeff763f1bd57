"""Read YAML and key=value overrides, and say in the user's words what is wrong with them. No torch."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from atroposlib.errors import ConfigError

_KEY = re.compile(r"\+{0,2}(override )?/?[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(@_global_)?")


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but with the scalars of YAML 1.2: 1e-6 is a number, and no and off are words. And a key stands
    once in its mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See PyYAML, which lets the last of several equal keys win.

        Raises:
            DuplicateKeyError: a key stands twice.
        """
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            # Two merges (<<) are legal, and a key that is no scalar is refused elsewhere.
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in lines:
                raise DuplicateKeyError(key.value, first=lines[key.value], second=line)
            lines[key.value] = line
        return super().construct_mapping(node, deep=deep)


class DuplicateKeyError(yaml.YAMLError):
    """A mapping holds a key twice. Lines count from 1."""

    def __init__(self, key: str, *, first: int, second: int) -> None:
        super().__init__(f"{key!r} in line {second} stands in line {first} already: keep one of them")


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
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
    except DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold keys and values, e.g. 'learning_rate: 1e-6'")
    return values


def read_override(override: str) -> tuple[str, Any]:
    """Key and value of one `key=value` argument; the value is YAML.

    Raises:
        ConfigError: it is no key=value.
    """
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"{override!r} is not key=value, e.g. learning_rate=1e-6 or weight_sync.transport=disk")
    return key, read_value(text, of=override)


def read_value(text: str, *, of: str) -> Any:
    """A value that was given as text, which is YAML.

    Args:
        of: what it is the value of, for the message.
    Raises:
        ConfigError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        # A reference is a mapping to YAML.
        if "${" in text:
            return text
        raise ConfigError(f"the value of {of!r} is not YAML: {' '.join(str(error).split())}") from error


def nearest(key: str, names: Collection[str]) -> str | None:
    """The name that was probably meant."""
    near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.6)
    return near[0] if near else None


def unknown(key: str, near: str | None, source: str) -> ConfigError:
    """The error for a key that does not exist."""
    hint = f"; did you mean {near!r}?" if near else "; see --print-config for all keys"
    return ConfigError(f"unknown key {key!r} in {source}{hint}")


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


def coerce(key: str, value: Any, hint: Any, *, source_of: Callable[[str], str]) -> Any:
    """The value as the type of its field.

    Args:
        source_of: where the value of a dotted key comes from, for the message.
    Raises:
        ConfigError: it is none.
    """
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *map(str, first["loc"])])
        problem = first["msg"].removeprefix("Input should be ")
        # A class whose values may hold a password says so; pydantic hides them in its own text alone.
        is_hidden = getattr(hint, "model_config", {}).get("hide_input_in_errors", False)
        shown = "" if is_hidden else f", is {first['input']!r}"
        raise ConfigError(f"{where} in {source_of(where)} should be {problem}{shown}") from (
            None if is_hidden else error
        )
