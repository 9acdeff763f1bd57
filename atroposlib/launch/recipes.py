"""`atropos up recipe=NAME`: whole runs, each a file that is read and never written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atroposlib.launch.config import LaunchConfigError

FOLDER = Path("configs")
"""Of the current folder, where the relative paths in the files start too."""
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
        LaunchConfigError: there is none; names those that there are.
    """
    path = FOLDER / f"{name}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    here = f"recipes here: {', '.join(known)}" if known else f"start in the project's folder, which has {FOLDER}/"
    raise LaunchConfigError(
        f"recipe={name}: there is no {path} in {Path.cwd()}",
        hint=f"{here}. Presets of the trainer (dapo, grpo, ...) go beside a config: --config FILE trainer.recipe={name}; "
        f"SFT and GKD need no servers: atropos-trainer recipe={name}",
    )
