"""docs/data.md says what the code does: its snippets run, its commands work, its table has every key."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from atroposlib.data.chats import ROLES_OF_SPEAKERS
from atroposlib.data.config import DataConfig
from atroposlib.data.presets import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
CODE = re.findall(r"```py\n(.*?)```", PAGE, flags=re.S)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    for line in block.splitlines()
    if line.startswith("python ") and "runtime_pg" not in line
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the files that the page shows."""
    for name, text in re.findall(r"`([\w.]+)`:\n\n```json\n(.*?)```", PAGE, flags=re.S):
        # The last line ends where the block does: one of the files is cut on purpose.
        (tmp_path / name).write_text(text.removesuffix("\n"))
    return tmp_path


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_a_snippet_runs(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works(command: str, folder: Path) -> None:
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_there_is_something_to_run() -> None:
    assert len(CODE) >= 5
    assert len(COMMANDS) >= 2


def test_the_table_has_every_key_its_default_and_its_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| (.*) \|$", PAGE, flags=re.M)
    expected = [
        (name, _default(field.default), str(field.description)) for name, field in DataConfig.model_fields.items()
    ]

    assert rows == expected


def test_every_preset_is_on_the_page() -> None:
    (table,) = re.findall(r"\| preset \|.*?\n\n", PAGE, flags=re.S)
    named = {name for line in table.strip().splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}

    assert named == PRESETS.keys()


def test_the_speakers_on_the_page_are_known() -> None:
    assert {"human", "gpt", "system", "tool"} <= ROLES_OF_SPEAKERS.keys()


def _default(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
