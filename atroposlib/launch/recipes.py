"""`atropos up recipe=NAME`: whole runs, each a file that is read and never written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atroposlib.launch.config import LaunchConfigError

FOLDER = Path("configs")
"""Of the current folder, where the relative paths in the files start too."""
ON_ROLLOUTS = (
    "atlas_compat", "cispo", "dapo", "default", "dr_grpo", "grpo", "gsm8k_rlvr", "gspo", "meta_math_rlvr", "smoke_cpu",
    "teacher_rcl", "teacher_rcl_compat",
)  # fmt: skip
"""Recipes of the trainer that need servers and an environment."""
ON_DATA_SETS = ("gkd_quickstart", "sft_quickstart", "teacher_gkd", "teacher_sft")
"""Recipes of the trainer that need neither."""
_KEY = "recipe="


def split_recipe(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe that the overrides name, and the other overrides.

    Raises:
        LaunchConfigError: they name two.
    """
    names = [override.removeprefix(_KEY) for override in overrides if override.startswith(_KEY)]
    if len(names) > 1:
        raise LaunchConfigError(
            f"recipe={names[0]} and recipe={names[1]} are two whole runs; give one of them",
            hint="a preset of the trainer is another key: trainer.recipe=NAME",
        )
    return (names[0] if names else None), [override for override in overrides if not override.startswith(_KEY)]


def recipe_file(name: str) -> Path:
    """The config of a recipe.

    Raises:
        LaunchConfigError: there is none; names those that there are, and the command of one that is the trainer's.
    """
    path = FOLDER / f"{name}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    here = f"atropos up has: {', '.join(known)}" if known else f"start in the project's folder, which has {FOLDER}/"
    if name in ON_DATA_SETS:
        raise LaunchConfigError(
            f"recipe={name} learns from a data set, without servers and environments, so there is nothing else to start",
            hint=f"run atropos-trainer recipe={name}. {here}",
        )
    if name in ON_ROLLOUTS:
        raise LaunchConfigError(
            f"recipe={name} is the trainer's alone: it names neither a model server nor an environment",
            hint=f"put it into a run of yours, atropos up --config FILE trainer.recipe={name}; or start rollout server, "
            f"inference server and environment as docs/operating.md says under By hand, and run "
            f"atropos-trainer --config trainer.yaml recipe={name}. {here}",
        )
    raise LaunchConfigError(
        f"recipe={name}: there is no {path} in {Path.cwd()}",
        hint=f"{here}. The trainer has: {', '.join((*ON_ROLLOUTS, *ON_DATA_SETS))}",
    )
