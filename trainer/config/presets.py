"""Presets: options under a name, chosen as group=name, e.g. recipe=dapo. No torch.

They are YAML files in trainer/recipes. Data sets of the data package are presets of the group data.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from atroposlib.data.presets import PRESETS as DATA_SETS
from atroposlib.errors import ConfigError
from trainer.config import values as config_values

FOLDER = Path(__file__).parents[1] / "recipes"

GROUPS = ("model", "data", "trainer", "reward", "recipe")
"""In rising precedence. deepspeed=NAME is a value like any other: it may also be a file."""

_MEANING = {
    "model": "; for a checkpoint give model_name_or_path=FOLDER",
    "data": "; for a data set of your own give dataset_path=FILE or dataset_id_or_path=OWNER/NAME",
    "reward": "; it chooses how rewards become advantages: reward functions are the environments'",
}

ELSEWHERE = {
    (
        "reward",
        "interpretation_teaching",
    ): "it chooses judges, who are the environment's: set `rim.preset` to this name in its options",
    (
        "reward",
        "rim_teaching",
    ): "it chooses judges, who are the environment's: set `rim.preset` to this name in its options",
}
"""Presets of other components, with where they go."""

RUNS = ("demo", "teacher_quickstart")
"""Recipes of `atropos up` that are none of a trainer: files in configs/."""


def names(group: str) -> list[str]:
    """The presets of a group, sorted."""
    files = {path.stem for path in (FOLDER / group).glob("*.yaml")}
    return sorted(files | set(DATA_SETS if group == "data" else ()))


def load(group: str, name: str) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """A preset: the presets that it builds upon, as (group, name), and its own options.

    Raises:
        ConfigError: there is none; names the nearest and all others, or the command whose recipe it is.
    """
    if group == "recipe" and name in RUNS:
        raise ConfigError(
            f"recipe={name} is a run with servers and environments: start it with atropos up recipe={name}"
        )
    known = names(group)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? There are: " if near else "there are: "
        raise ConfigError(f"{group}={name} is no preset; {hint}{', '.join(known) or 'none'}{_MEANING.get(group, '')}")
    path = FOLDER / group / f"{name}.yaml"
    if group == "data" and not path.is_file():
        return [], dict(DATA_SETS[name])
    values = config_values.read_file(path)
    bases = [str(base).partition("/") for base in values.pop("defaults", [])]
    return [(base_group, base_name) for base_group, _, base_name in bases], values
