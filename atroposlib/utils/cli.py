"""Pieces for building command lines out of pydantic models, as environments with a command of their own use them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, create_model
from pydantic.fields import FieldInfo


def get_prefixed_pydantic_model(base_model: type[BaseModel], prefix: str) -> type[BaseModel]:
    """The same fields under longer names, e.g. `group_size` as `env.group_size`.

    Type, default and description stay. Constraints are left to base_model, which is built from the values later.

    Args:
        prefix: with its separator: `env.`
    """
    fields: dict[str, Any] = {
        f"{prefix}{name}": (info.annotation, _plain_field(info)) for name, info in base_model.model_fields.items()
    }
    made: type[BaseModel] = create_model(f"{base_model.__name__}Prefixed", **fields)
    return made


def merge_dicts(*dicts: Mapping[str, Any]) -> dict[str, Any]:
    """One dict; later ones win, dicts inside are merged the same way. The arguments are not changed."""
    merged: dict[str, Any] = {}
    for one in dicts:
        for key, value in one.items():
            mine = merged.get(key)
            merged[key] = merge_dicts(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return merged


def extract_namespace(model: BaseModel | Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values whose names begin with the prefix, without it."""
    values = (
        {name: getattr(model, name) for name in type(model).model_fields} if isinstance(model, BaseModel) else model
    )
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def adjust_model_defaults(model_class: type[BaseModel], defaults: BaseModel | Mapping[str, Any]) -> type[BaseModel]:
    """A subclass with other defaults; names that model_class has no field for are ignored."""
    values = dict(defaults) if isinstance(defaults, BaseModel) else defaults
    fields: dict[str, Any] = {
        name: (_constrained(info), Field(default=values[name], description=info.description))
        for name, info in model_class.model_fields.items()
        if name in values
    }
    made: type[BaseModel] = create_model(model_class.__name__, __base__=model_class, **fields)
    return made


def get_double_dash_flags() -> dict[str, Any]:
    """The flags of this process's command line: text, a list of several words, True without a word, None for `None`.

    A word that starts with one dash is a value: `--total_steps -1` means minus one.
    """
    flags: dict[str, Any] = {}
    words = sys.argv[1:]
    for position, word in enumerate(words):
        if not word.startswith("--") or word == "--":
            continue
        name, equals, value = word[2:].partition("=")
        if equals:
            flags[name] = _meaning([value])
            continue
        end = next((i for i in range(position + 1, len(words)) if words[i].startswith("--")), len(words))
        flags[name] = _meaning(words[position + 1 : end])
    return flags


def _meaning(values: list[str]) -> Any:
    if not values:
        return True
    if len(values) > 1:
        return values
    return None if values[0] == "None" else values[0]


def _constrained(info: FieldInfo) -> Any:
    """The field's type, with its constraints."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _plain_field(info: FieldInfo) -> Any:
    if info.default_factory is not None:
        return Field(default_factory=info.default_factory, description=info.description)
    return Field(default=info.default, description=info.description)
