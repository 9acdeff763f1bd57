"""One configuration from layers that are laid over each other; the class follows from the key `method` in them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from atroposlib.errors import ConfigError
from trainer.batches.resolver import resolve_batch
from trainer.config import deepspeed_presets
from trainer.config import values as config_values
from trainer.config.grammar import Layer, canonical
from trainer.config.interpolation import Interpolation
from trainer.config.keys import ACCELERATE, UnusedKeyError, check_known, is_off
from trainer.config.layers import layers
from trainer.config.schema import NOMINAL_BATCH
from trainer.methods import DEFAULT, METHODS, Method, check_required, method_named

log = logging.getLogger(__name__)

_PLACES = ("run_dir", "output_dir")
"""Folders in which the ranks of a run meet."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Any:
    """Compose, parse and check a configuration.

    Args:
        path: YAML file, or None.
        overrides: key=value, +key=value or ~key, which win over the file. Values are YAML; 1e-6 is a number.
    Returns:
        An object of the method's config class: GRPOConfig, SFTConfig or GKDConfig.
    Raises:
        ConfigError: unknown key or preset (with the nearest one), wrong type, impossible value, missing model folder.
    """
    config, _ = load_config_with_origins(path, overrides)
    return config


def load_config_with_origins(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Any, dict[str, str]]:
    """As load_config; also says for each key that was set, dotted inside a group, where it comes from."""
    composed = Composition(layers(path, overrides))
    values = composed.values()
    try:
        config = composed.method.config_class(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"impossible configuration: {error}") from error
    check_required(config)
    config.origins = dict(composed.origins)
    return config, composed.origins


class Composition:
    """Layers laid over each other.

    Args:
        layers: from the lowest to the highest.
    Raises:
        ConfigError: there is no such method, or a key that its configuration does not take.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.origins: dict[str, str] = {}
        self.method: Method = _method_of(layers)
        self._merged: dict[str, Any] = {}
        self._levels: dict[str, int] = {}
        is_strict = not any(is_off(layer.values.get("strict")) for layer in layers)
        for level, layer in enumerate(layers):
            self._reset(layer)
            for name, value in layer.values.items():
                if name != "strict" and self._is_used(name, layer, is_strict=is_strict):
                    self._put(name, value, layer, level)

    def values(self) -> dict[str, Any]:
        """Arguments of the config class: references resolved, numbers of the batch derived, each of the type of its field."""
        timeless = _PLACES if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ()
        references = Interpolation(self._lookup, environ=os.environ, now=datetime.now(), timeless=timeless)
        flat = {name: references.resolve(value, key=name) for name, value in self._merged.items() if name != "method"}
        self._resolve_batch(flat)
        nested = self.method.schema.nested(flat)
        self._import_accelerate(nested)
        hints = self.method.schema.hints
        return {
            name: config_values.coerce(name, value, hints[name], source_of=self._source_of)
            for name, value in nested.items()
        }

    def _is_used(self, name: str, layer: Layer, *, is_strict: bool) -> bool:
        """Whether a key is one of the method's; with strict=false a key of others is left out with a warning.

        Raises:
            ConfigError: it is unknown, or of others.
        """
        written = layer.spellings[name].lstrip("+")
        try:
            check_known(name, written=written, source=layer.source, method=self.method)
        except UnusedKeyError as error:
            if is_strict:
                raise
            log.warning("%s", error)
            return False
        return True

    def _reset(self, layer: Layer) -> None:
        for name in layer.resets:
            check_known(name, written=f"~{name}", source=layer.source, method=self.method)
            for leaf in [leaf for leaf in self._merged if leaf == name or leaf.startswith(f"{name}.")]:
                del self._merged[leaf], self._levels[leaf], self.origins[leaf]

    def _put(self, name: str, value: Any, layer: Layer, level: int) -> None:
        self._merged[name] = value
        self._levels[name] = level
        self.origins[name] = layer.origin_of(name)

    def _lookup(self, reference: str) -> Any:
        name = canonical(reference)
        if name in self._merged:
            return self._merged[name]
        defaults = {"method": DEFAULT, **self.method.schema.defaults}
        if name not in defaults:
            near = config_values.nearest(name, defaults)
            raise ConfigError(
                f"${{{reference}}} refers to an unknown key" + (f"; did you mean ${{{near}}}?" if near else "")
            )
        return defaults[name]

    def _source_of(self, key: str) -> str:
        """Of a dotted key, or of the nearest part of it that was set."""
        parts = canonical(key).split(".")
        for length in range(len(parts), 0, -1):
            if source := self.origins.get(".".join(parts[:length])):
                return source
        return next(
            (source for name, source in self.origins.items() if name.startswith(f"{key}.")), "the configuration"
        )

    def _resolve_batch(self, flat: dict[str, Any]) -> None:
        """Turn the names of other trainers into batch_size; those of a higher layer win over one below."""
        nominal = [name for name in NOMINAL_BATCH if name in flat and self.method.schema.is_nominal(name)]
        if not nominal:
            return
        passes = {name: self._whole(name, flat.pop(name)) for name in nominal}
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
        block = nested.pop(ACCELERATE, None)
        if block is None:
            return
        level, own_level = self._level_of(ACCELERATE), self._level_of("deepspeed")
        if own_level > level:
            return
        if own_level == level and nested["deepspeed"] is not None:
            raise ConfigError(
                "deepspeed and deepspeed_config both configure DeepSpeed: give one of them, or ~deepspeed or "
                "~deepspeed_config to take one back"
            )
        nested["deepspeed"] = deepspeed_presets.from_accelerate(block)
        self.origins["deepspeed"] = self._source_of(ACCELERATE)

    def _level_of(self, name: str) -> int:
        """Of the highest layer that sets a key or a part of it; -1 for none."""
        levels = (level for key, level in self._levels.items() if key == name or key.startswith(f"{name}."))
        return max(levels, default=-1)


def _method_of(layers: Sequence[Layer]) -> Method:
    """What the highest layer says that says anything."""
    for layer in reversed(layers):
        if "method" in layer.values:
            return method_named(layer.values["method"], layer.source)
        if "method" in layer.resets:
            break
    return METHODS[DEFAULT]
