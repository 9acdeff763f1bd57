"""State that an environment saves beside the trainer's checkpoints, and finds again after a restart."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_STEP_FILE = re.compile(r"step-(\d+)\.json")


def save_state(root: Path, env_name: str, step: int, data: dict[str, Any]) -> Path:
    """Write `env_checkpoints/<env_name>/step-<step>.json` under root; whoever reads sees all of it or nothing."""
    folder = _folder(root, env_name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.json"
    draft = path.with_suffix(".tmp")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return path


def load_state(root: Path, env_name: str, step: int) -> tuple[int, dict[str, Any]] | None:
    """The newest readable state of at most this step, and its step; None when there is none.

    Looks under env_name, then under its base name, then under the names that upstream numbers by registration
    (`name_0`, `name_1`): a restarted environment has another number.
    """
    for names in _candidates(root, env_name):
        found = sorted((entry for name in names for entry in _states(_folder(root, name), step)), reverse=True)
        for saved_step, path in found:
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                log.warning("environment checkpoint %s cannot be read, an older one is tried: %s", path, error)
                continue
            return saved_step, data
    return None


def _candidates(root: Path, env_name: str) -> Iterator[list[str]]:
    yield [env_name]
    base = re.sub(r"_\d+$", "", env_name)
    yield [base]
    numbered = re.compile(re.escape(_safe(base)) + r"_\d+")
    parent = _folder(root, env_name).parent
    if parent.is_dir():
        yield [entry.name for entry in parent.iterdir() if numbered.fullmatch(entry.name)]


def _states(folder: Path, step: int) -> Iterator[tuple[int, Path]]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _STEP_FILE.fullmatch(path.name)
        if match and int(match[1]) <= step:
            yield int(match[1]), path


def _folder(root: Path, env_name: str) -> Path:
    return root / "env_checkpoints" / _safe(env_name)


def _safe(name: str) -> str:
    return name.replace("/", "_")
