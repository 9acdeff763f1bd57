"""The layers of a configuration: presets, recipe, file, environment variables, command line. No torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from atroposlib.errors import ConfigError
from trainer.config import presets
from trainer.config import values as config_values
from trainer.config.grammar import Layer, layer_of_arguments, layer_of_mapping, layer_of_variables
from trainer.config.keys import UnusedKeyError, is_off

log = logging.getLogger(__name__)


def layers(
    path: str | Path | None, overrides: Sequence[str], *, environ: Mapping[str, str] | None = None
) -> list[Layer]:
    """From the lowest to the highest.

    Args:
        path: YAML file, or None.
        overrides: key=value, +key=value or ~key.
        environ: environment variables; those of the process if absent.
    Raises:
        ConfigError: something cannot be read, or there is no such preset.
    """
    given = [
        layer_of_variables(os.environ if environ is None else environ),
        layer_of_arguments(overrides, source="the command line"),
    ]
    if path is not None:
        given.insert(0, _layer_of_file(Path(path)))
    is_lenient = any(is_off(layer.values.get("strict")) for layer in given)
    chosen: dict[str, str] = {}
    for layer in given:
        chosen |= layer.presets
    recipe = _preset_layers("recipe", chosen["recipe"]) if "recipe" in chosen else []
    for layer in reversed(recipe):
        chosen = layer.presets | chosen
    chosen = {group: name for group, name in chosen.items() if _is_ours(group, name, is_lenient=is_lenient)}
    groups = [layer for name in presets.GROUPS[:-1] if name in chosen for layer in _preset_layers(name, chosen[name])]
    return [*groups, *recipe, *given]


def _layer_of_file(path: Path) -> Layer:
    values = config_values.read_file(path)
    if "environments" in values:
        raise ConfigError(
            f"{path} is a config of atropos up, which starts a trainer with its section `trainer`: run "
            f"atropos up --config {path}"
        )
    return layer_of_mapping(values, source=str(path))


def _is_ours(group: str, name: str, *, is_lenient: bool) -> bool:
    reason = presets.ELSEWHERE.get((group, name))
    if reason is None:
        return True
    error = UnusedKeyError(f"{group}={name} has no use in a trainer: {reason}")
    if not is_lenient:
        raise error
    log.warning("%s", error)
    return False


def _preset_layers(group: str, name: str, above: tuple[str, ...] = ()) -> list[Layer]:
    """A preset after those of its own group that it builds upon. A recipe chooses those of other groups, if nobody else does.

    Raises:
        ConfigError: no such preset, a circle, or a choice that only a recipe may make.
    """
    if name in above:
        raise ConfigError(f"presets of {group} build upon each other in a circle: {' -> '.join((*above, name))}")
    bases, values = presets.load(group, name)
    source = f"{group}={name}"
    layer = layer_of_mapping(values, source=source)
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
