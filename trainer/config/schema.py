"""What a config class takes: its keys, the groups among them, types and defaults. No torch of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel

NOMINAL_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys of other trainers that say batch_size in another way: see batch_resolver."""

FLAT_GROUPS = ("data",)
"""Groups whose keys are written without the group's name."""


@dataclass(frozen=True)
class Schema:
    """The keys of a config class."""

    keys: tuple[str, ...]
    """That a file or an override may set, in order."""
    groups: Mapping[str, tuple[str, ...]]
    """Keys that hold further keys, with those."""
    hints: Mapping[str, Any]
    """The type of each key."""
    defaults: Mapping[str, Any]
    """By key, dotted inside a group whose name is written."""
    named_groups: Mapping[str, tuple[str, ...]] = field(init=False)
    """The groups whose name is written before their keys."""
    home: Mapping[str, str] = field(init=False)
    """The group of each key that is written without it."""

    def __post_init__(self) -> None:
        named = {name: inner for name, inner in self.groups.items() if name not in FLAT_GROUPS}
        home = {key: name for name in FLAT_GROUPS for key in self.groups.get(name, ())}
        object.__setattr__(self, "named_groups", named)
        object.__setattr__(self, "home", home)

    def takes(self, key: str) -> bool:
        """Whether a key, dotted inside a group, is one of these."""
        first, _, rest = key.partition(".")
        if rest:
            return rest in self.named_groups.get(first, ()) or (first in self.keys and self._holds_any(first, rest))
        return first in self.home or (first in self.keys and first not in FLAT_GROUPS) or self.is_nominal(first)

    def _holds_any(self, key: str, rest: str) -> bool:
        """Whether a key is a mapping with keys that are not ours, as model_init_kwargs is."""
        kinds = get_args(self.hints[key])
        return "." not in rest and str not in kinds and any(get_origin(kind) is dict for kind in kinds)

    def is_nominal(self, key: str) -> bool:
        """Whether a key only says batch_size in another way."""
        return key in NOMINAL_BATCH and "batch_size" in self.keys

    def names(self) -> set[str]:
        """Every key without a dot that is taken, for hints."""
        nominal = {key for key in NOMINAL_BATCH if self.is_nominal(key)}
        return {*self.keys, *self.home, *nominal} - set(FLAT_GROUPS)

    def nested(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the class from values by key.

        A key that the class and one of its groups both have, as `seed`, is meant for both.
        """
        found: dict[str, Any] = {}
        for name, value in flat.items():
            first, _, rest = name.partition(".")
            if rest:
                found.setdefault(first, {})[rest] = value
            if not rest and (first not in self.home or first in self.keys):
                found[first] = value
            if first in self.home and not rest:
                found.setdefault(self.home[first], {})[first] = value
        return found


def schema_of(config_class: Any, *, refused: Collection[str]) -> Schema:
    """The schema of a dataclass whose groups are dataclasses or pydantic models.

    Args:
        refused: fields that are no keys.
    """
    taken = [
        f for f in fields(config_class) if f.init and f.name not in refused and not _is_other_name(f.name, config_class)
    ]
    defaults: dict[str, Any] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for f in taken:
        value = f.default if f.default_factory is MISSING else f.default_factory()
        inner = _inner(value)
        if inner is None:
            defaults[f.name] = value
            continue
        groups[f.name] = tuple(inner)
        prefix = "" if f.name in FLAT_GROUPS else f"{f.name}."
        defaults |= {f"{prefix}{key}": item for key, item in inner.items() if prefix or key not in defaults}
    hints = get_type_hints(config_class) | getattr(config_class, "WIDER_TYPES", {})
    return Schema(tuple(f.name for f in taken), groups, hints, defaults)


def _is_other_name(name: str, config_class: Any) -> bool:
    """Whether a field only says in another way what a second field says."""
    others = {f.name for f in fields(config_class)}
    return (name in NOMINAL_BATCH and "batch_size" in others) or (name == "num_generations" and "group_size" in others)


def _inner(value: Any) -> dict[str, Any] | None:
    """The fields of a group with their defaults."""
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return None
