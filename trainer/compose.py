"""One configuration from presets, a recipe, a file and the command line, each winning over those before."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_type_hints

from atroposlib.errors import ConfigError
from trainer import config_values, deepspeed_presets, presets
from trainer.batch_resolver import resolve_batch
from trainer.config import GROUPS, NOMINAL_BATCH, WIDER_TYPES, GRPOConfig, settable_keys
from trainer.config_checks import check_named_model
from trainer.grammar import ALIASES, Layer, canonical, layer_of_arguments, layer_of_mapping
from trainer.interpolation import Interpolation
from trainer.refused import REFUSED, why_refused

log = logging.getLogger(__name__)

_ACCELERATE = "deepspeed_config"
_NESTED = (*GROUPS, _ACCELERATE)
_PLACES = ("run_dir", "output_dir")
"""Folders in which the ranks of a run meet."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> GRPOConfig:
    """Compose, parse and check a configuration.

    Args:
        path: YAML file, or None.
        overrides: key=value, +key=value or ~key, which win over the file. Values are YAML; 1e-6 is a number.
    Raises:
        ConfigError: unknown key or preset (with the nearest one), wrong type, impossible value, missing model folder.
    """
    config, _ = load_config_with_origins(path, overrides)
    return config


def load_config_with_origins(
    path: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[GRPOConfig, dict[str, str]]:
    """As load_config; also says for each key that was set, dotted inside a group, where it comes from."""
    composed = Composition(layers(path, overrides))
    values = composed.values()
    try:
        config = GRPOConfig(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"impossible configuration: {error}") from error
    check_named_model(config)
    config.origins = dict(composed.origins)
    return config, composed.origins


def layers(path: str | Path | None, overrides: Sequence[str]) -> list[Layer]:
    """From the lowest to the highest."""
    given = [layer_of_arguments(overrides, source="the command line", groups=_NESTED)]
    if path is not None:
        values = config_values.read_file(Path(path))
        given.insert(0, layer_of_mapping(values, source=str(path), groups=_NESTED))
    chosen: dict[str, str] = {}
    for layer in given:
        chosen |= layer.presets
    recipe = _preset_layers("recipe", chosen["recipe"]) if "recipe" in chosen else []
    for layer in reversed(recipe):
        chosen = layer.presets | chosen
    groups = [layer for name in presets.GROUPS[:-1] if name in chosen for layer in _preset_layers(name, chosen[name])]
    return [*groups, *recipe, *given]


def _preset_layers(group: str, name: str, above: tuple[str, ...] = ()) -> list[Layer]:
    """A preset after those of its own group that it builds upon. A recipe chooses those of other groups, if nobody else does.

    Raises:
        ConfigError: no such preset, a circle, or a choice that only a recipe may make.
    """
    if name in above:
        raise ConfigError(f"presets of {group} build upon each other in a circle: {' -> '.join((*above, name))}")
    bases, values = presets.load(group, name)
    source = f"{group}={name}"
    layer = layer_of_mapping(values, source=source, groups=_NESTED)
    layer.presets = {base_group: base for base_group, base in bases if base_group != group}
    if layer.presets and group != "recipe":
        others = ", ".join(f"{other}={base}" for other, base in layer.presets.items())
        raise ConfigError(f"{source} builds upon {others}: only a recipe may choose presets of other groups")
    below = [
        lower
        for base_group, base in bases
        if base_group == group
        for lower in _preset_layers(group, base, (*above, name))
    ]
    return [*below, layer]


class Composition:
    """Layers laid over each other.

    Args:
        layers: from the lowest to the highest.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.origins: dict[str, str] = {}
        self._merged: dict[str, Any] = {}
        self._levels: dict[str, int] = {}
        is_strict = all(layer.values.get("strict", True) is not False for layer in layers)
        for level, layer in enumerate(layers):
            self._reset(layer)
            for name, value in layer.values.items():
                if name != "strict" and _is_used(name, layer, is_strict=is_strict):
                    self._put(name, value, layer, level)

    def values(self) -> dict[str, Any]:
        """Arguments of GRPOConfig: references resolved, numbers of the batch derived, each with the type of its field."""
        timeless = _PLACES if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ()
        references = Interpolation(self._lookup, environ=os.environ, now=datetime.now(), timeless=timeless)
        flat = {name: references.resolve(value, key=name) for name, value in self._merged.items()}
        self._resolve_batch(flat)
        nested = _nested(flat)
        self._import_accelerate(nested)
        hints = get_type_hints(GRPOConfig) | WIDER_TYPES
        return {
            name: config_values.coerce(name, value, hints[name], source_of=self._source_of)
            for name, value in nested.items()
        }

    def _reset(self, layer: Layer) -> None:
        for name in layer.resets:
            _check_known(name, f"~{name}", layer.source)
            for leaf in [leaf for leaf in self._merged if leaf == name or leaf.startswith(f"{name}.")]:
                del self._merged[leaf], self._levels[leaf], self.origins[leaf]

    def _put(self, name: str, value: Any, layer: Layer, level: int) -> None:
        self._merged[name] = value
        self._levels[name] = level
        written = layer.spellings[name].split(".")[-1]
        self.origins[name] = f"{layer.source} ({written})" if written in ALIASES else layer.source

    def _lookup(self, reference: str) -> Any:
        name = canonical(reference)
        if name in self._merged:
            return self._merged[name]
        defaults = _defaults()
        if name not in defaults:
            near = config_values.nearest(name, defaults)
            raise ConfigError(
                f"${{{reference}}} refers to an unknown key" + (f"; did you mean ${{{near}}}?" if near else "")
            )
        return defaults[name]

    def _source_of(self, key: str) -> str:
        """Of a dotted key, or of the nearest part of it that was set."""
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            if source := self.origins.get(".".join(parts[:length])):
                return source
        return next(
            (source for name, source in self.origins.items() if name.startswith(f"{key}.")), "the configuration"
        )

    def _resolve_batch(self, flat: dict[str, Any]) -> None:
        """Turn the names of other trainers into batch_size; those of a higher layer win over one below."""
        passes = {name: self._whole(name, flat.pop(name)) for name in NOMINAL_BATCH if name in flat}
        if not passes:
            return
        level = max(self._levels[name] for name in passes)
        is_derived = len(passes) == len(NOMINAL_BATCH) and self._levels.get("batch_size", -1) < level
        given = None if is_derived or "batch_size" not in flat else self._whole("batch_size", flat["batch_size"])
        sizes = resolve_batch(
            batch_size=given,
            per_device=passes.get("per_device_train_batch_size"),
            accumulation=passes.get("gradient_accumulation_steps"),
            ranks=int(os.environ.get("WORLD_SIZE", "1")),
            group_size=self._whole("group_size", flat.get("group_size")),
        )
        if given is None:
            sources = dict.fromkeys(f"{self.origins[name]} ({name})" for name in passes)
            self.origins["batch_size"] = ", ".join(sources)
        for name in passes:
            del self.origins[name]
        flat["batch_size"] = sizes.batch_size

    def _whole(self, name: str, value: Any) -> int | None:
        number: int | None = config_values.coerce(name, value, int | None, source_of=self._source_of)
        return number

    def _import_accelerate(self, nested: dict[str, Any]) -> None:
        block = nested.pop(_ACCELERATE, None)
        if block is None:
            return
        level, own_level = self._level_of(_ACCELERATE), self._level_of("deepspeed")
        if own_level > level:
            return
        if own_level == level and nested["deepspeed"] is not None:
            raise ConfigError(
                "deepspeed and deepspeed_config both configure DeepSpeed: give one of them, or ~deepspeed or "
                "~deepspeed_config to take one back"
            )
        nested["deepspeed"] = deepspeed_presets.from_accelerate(block)
        self.origins["deepspeed"] = self._source_of(_ACCELERATE)

    def _level_of(self, name: str) -> int:
        """Of the highest layer that sets a key or a part of it; -1 for none."""
        levels = (level for key, level in self._levels.items() if key == name or key.startswith(f"{name}."))
        return max(levels, default=-1)


def _is_used(name: str, layer: Layer, *, is_strict: bool) -> bool:
    """Whether a key is one of ours; with strict=false a key of others is left out with a warning.

    Raises:
        ConfigError: it is unknown, or of others.
    """
    written = layer.spellings[name].lstrip("+")
    try:
        _check_known(name, written, layer.source)
    except UnusedKeyError as error:
        if is_strict:
            raise
        log.warning("%s", error)
        return False
    return True


class UnusedKeyError(ConfigError):
    """A key that means something elsewhere, and nothing to this trainer."""


def _check_known(name: str, written: str, source: str) -> None:
    first, _, rest = name.partition(".")
    if first in settable_keys() or first in NOMINAL_BATCH or first == _ACCELERATE:
        known = GROUPS.get(first) or (deepspeed_presets.ACCELERATE_KEYS if first == _ACCELERATE else [])
        if rest and rest not in known:
            near = config_values.nearest(rest, known)
            raise config_values.unknown(written, near and f"{first}.{near}", source)
        return
    if reason := why_refused(name):
        raise UnusedKeyError(f"key {written!r} in {source} has no use in this trainer: {reason}")
    # It may be a key of a group, given without the group.
    group = next((group for group, names in GROUPS.items() if name in names), None)
    names = {*settable_keys(), *ALIASES, *NOMINAL_BATCH, *presets.GROUPS} - REFUSED.keys()
    raise config_values.unknown(written, f"{group}.{name}" if group else config_values.nearest(name, names), source)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        first, _, rest = name.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = value
        else:
            nested[first] = value
    return nested


def _defaults() -> dict[str, Any]:
    """Of every key that can be set, dotted inside groups."""
    defaults: dict[str, Any] = {}
    settable = set(settable_keys())
    for field in fields(GRPOConfig):
        if field.name not in settable:
            continue
        value = field.default if field.default_factory is MISSING else field.default_factory()
        if is_dataclass(value):
            defaults |= {f"{field.name}.{inner.name}": getattr(value, inner.name) for inner in fields(value)}
        else:
            defaults[field.name] = value
    return defaults
