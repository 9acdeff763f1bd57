"""Presets: YAML files of options in trainer/recipes, chosen as group=name, e.g. recipe=dapo. No torch."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from atroposlib.errors import ConfigError
from trainer import config_values

FOLDER = Path(__file__).parent / "recipes"

GROUPS = ("model", "data", "trainer", "reward", "recipe")
"""In rising precedence. deepspeed=NAME is a value like any other: it may also be a file."""

_MEANING = {
    "model": "; for a checkpoint give model_name_or_path=FOLDER",
    "data": "; it chooses how batches are drawn from the rollout server: datasets are the environments'",
    "reward": "; it chooses how rewards become advantages: reward functions are the environments'",
}


def names(group: str) -> list[str]:
    """The presets of a group, sorted."""
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


def load(group: str, name: str) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """A preset: the presets that it builds upon, as (group, name), and its own options.

    Raises:
        ConfigError: there is none; names the nearest and all others.
    """
    known = names(group)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? There are: " if near else "there are: "
        raise ConfigError(f"{group}={name} is no preset; {hint}{', '.join(known) or 'none'}{_MEANING.get(group, '')}")
    values = config_values.read_file(FOLDER / group / f"{name}.yaml")
    bases = [str(base).partition("/") for base in values.pop("defaults", [])]
    return [(base_group, base_name) for base_group, _, base_name in bases], values
