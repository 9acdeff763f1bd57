"""The spellings that a key may come in, and the one name that it has here. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atroposlib.errors import ConfigError
from trainer.config import presets
from trainer.config import values as config_values

SECTIONS = (
    "trainer", "trainer_args", "args", "data", "model", "reward", "rollout", "algo", "optim", "logging", "checkpoint",
    "teacher", "launch", "make_dataset_fn",
)  # fmt: skip
"""Names that may stand before a key, or hold keys, and mean nothing by themselves."""

NESTED = ("weight_sync", "deepspeed_config")
"""Keys that hold further keys, and keep their name."""

VARIABLE = "ATROPOS_TRAINER_"
"""Environment variables that begin so are keys: ATROPOS_TRAINER_WEIGHT_SYNC__TRANSPORT is weight_sync.transport."""

ALIASES = {
    "train_batch_size": "batch_size",
    "num_generations": "group_size",
    "warmup_ratio": "warmup_steps",
    "run": "recipe",
    "make_dataset_fn._target_": "loader",
}
"""Documented names of keys that are called otherwise here."""

_SELECTOR = re.compile(r"(?:override )?/?(\w+)@_global_")


@dataclass
class Layer:
    """The keys of one source."""

    source: str
    """For messages: a file, the command line, a preset."""
    presets: dict[str, str] = field(default_factory=dict)
    """Chosen presets by group."""
    values: dict[str, Any] = field(default_factory=dict)
    """By dotted name."""
    spellings: dict[str, str] = field(default_factory=dict)
    """How each of them was written."""
    resets: list[str] = field(default_factory=list)
    """Keys that take their defaults again."""

    def add(self, key: str, value: Any, *, written: str = "") -> None:
        """Take in a key with its value, which may be a section of further keys.

        Args:
            written: the environment variable that held it; empty where there was none.
        Raises:
            ConfigError: two spellings of a key with different values, or a preset that is no name.
        """
        name = canonical(key)
        if name in (*presets.GROUPS, *SECTIONS) and isinstance(value, Mapping):
            for inner, item in value.items():
                self.add(f"{key}.{inner}", item, written=written)
        elif name in presets.GROUPS:
            self._choose(name, value)
        elif name in NESTED and isinstance(value, Mapping):
            for inner, item in value.items():
                self._set(f"{name}.{inner}", item, written or f"{key}.{inner}")
        else:
            self._set(name, value, written or key)

    def origin_of(self, name: str) -> str:
        """Where the value of a key comes from, with the name that it was written under, if that is another."""
        written = self.spellings[name]
        if written.startswith(VARIABLE):
            return f"environment variable {written}"
        last = written.split(".")[-1]
        return f"{self.source} ({last})" if last in ALIASES else self.source

    def _choose(self, group: str, name: Any) -> None:
        if not isinstance(name, str):
            raise ConfigError(f"{group} in {self.source} should be the name of a preset, is {name!r}")
        self.presets[group] = name

    def _set(self, name: str, value: Any, key: str) -> None:
        before = self.spellings.get(name, key)
        if before != key and self.values[name] != value:
            raise ConfigError(
                f"{before} and {key} in {self.source} are the same key with different values, "
                f"{self.values[name]!r} and {value!r}: give one of them"
            )
        self.values[name] = value
        self.spellings[name] = key


def canonical(key: str) -> str:
    """The name that a key has here: without +, Hydra's package, and sections before it; an alias by what it stands for."""
    key = key.lstrip("+")
    if match := _SELECTOR.fullmatch(key):
        key = match[1]
    parts = key.split(".")
    while ".".join(parts) not in ALIASES and len(parts) > 1 and parts[0] in SECTIONS:
        parts = parts[1:]
    whole = ".".join(parts)
    return ALIASES.get(whole) or ".".join([ALIASES.get(parts[0], parts[0]), *parts[1:]])


def layer_of_mapping(values: Mapping[str, Any], *, source: str) -> Layer:
    """The keys of a file."""
    layer = Layer(source)
    for key, value in values.items():
        layer.add(key, value)
    return layer


def layer_of_arguments(arguments: Sequence[str], *, source: str) -> Layer:
    """The keys of key=value, +key=value and ~key arguments.

    Raises:
        ConfigError: an argument is none of these.
    """
    layer = Layer(source)
    for key, value in _pairs(arguments, layer):
        layer.add(key, value)
    return layer


def layer_of_variables(environ: Mapping[str, str]) -> Layer:
    """The keys of environment variables that begin with VARIABLE; `__` is a dot.

    Raises:
        ConfigError: a value is not YAML, or two variables mean one key.
    """
    layer = Layer("the environment variables")
    for variable in sorted(environ):
        if variable.startswith(VARIABLE):
            value = config_values.read_value(environ[variable], of=variable)
            layer.add(key_of_variable(variable), value, written=variable)
    return layer


def key_of_variable(variable: str) -> str:
    """The key that an environment variable sets."""
    return variable.removeprefix(VARIABLE).lower().replace("__", ".")


def variable_of_key(key: str) -> str:
    """The environment variable that sets a key."""
    return VARIABLE + key.upper().replace(".", "__")


def _pairs(arguments: Sequence[str], layer: Layer) -> Iterator[tuple[str, Any]]:
    for argument in arguments:
        if argument.startswith("~"):
            # Hydra also has ~key=value; the value says nothing more.
            layer.resets.append(canonical(argument[1:].partition("=")[0]))
        else:
            yield config_values.read_override(argument)
