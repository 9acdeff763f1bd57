"""Whether a key is one that a method takes, and what to say where it is not."""

from __future__ import annotations

from typing import Any

from atroposlib.errors import ConfigError
from trainer.config import deepspeed_presets, presets
from trainer.config import values as config_values
from trainer.config.grammar import ALIASES, NESTED, VARIABLE, variable_of_key
from trainer.config.refused import why_refused
from trainer.methods import Method, takers

ACCELERATE = "deepspeed_config"
"""The block of accelerate's file."""

SETTINGS = ("method", "strict")
"""Keys of the configuration itself."""


def is_off(value: Any) -> bool:
    """Whether the value of a switch says no."""
    return str(value).lower() in ("false", "no", "off", "0")


class UnusedKeyError(ConfigError):
    """A key that means something elsewhere, and nothing to this method."""


def check_known(name: str, *, written: str, source: str, method: Method) -> None:
    """Refuse a key that the method does not take.

    Args:
        name: canonical.
        written: as the user wrote it.
        source: where.
    Raises:
        UnusedKeyError: it is a key of another method, component or project; says which.
        ConfigError: it is none; names the nearest.
    """
    schema = method.schema
    first, _, rest = name.partition(".")
    if first in SETTINGS or schema.takes(name) or name in schema.named_groups:
        return
    if first == ACCELERATE:
        _check_accelerate(rest, written, source)
    elif first in schema.named_groups:
        near = config_values.nearest(rest, schema.named_groups[first])
        raise _unknown(written, near and f"{first}.{near}", source)
    elif reason := _reason(name, method):
        raise UnusedKeyError(f"key {written!r} in {source} has no use with method={method.name}: {reason}")
    else:
        raise _unknown(written, _nearest(name, method), source)


def _check_accelerate(rest: str, written: str, source: str) -> None:
    if rest and rest not in deepspeed_presets.ACCELERATE_KEYS:
        near = config_values.nearest(rest, deepspeed_presets.ACCELERATE_KEYS)
        raise _unknown(written, near and f"{ACCELERATE}.{near}", source)


def _reason(name: str, method: Method) -> str | None:
    """Why a key that exists elsewhere has no use here."""
    others = " and ".join(f"method={other}" for other in takers(name))
    taken = f"it is a key of {others}" if others else None
    return "; ".join(filter(None, (why_refused(name, method.name), taken))) or None


def _nearest(name: str, method: Method) -> str | None:
    """What was probably meant: a key of a group that was given without the group, or a name that is written alike."""
    schema = method.schema
    group = next((group for group, names in schema.named_groups.items() if name in names), None)
    if group is not None:
        return f"{group}.{name}"
    aliases = {alias for alias, key in ALIASES.items() if schema.takes(key)}
    return config_values.nearest(name, {*schema.names(), *aliases, *presets.GROUPS, *SETTINGS, *NESTED})


def _unknown(written: str, near: str | None, source: str) -> ConfigError:
    if near and written.startswith(VARIABLE):
        near = variable_of_key(near)
    return config_values.unknown(written, near, source)
