"""What a file holds, told by its first row that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atroposlib.data.chats import as_messages
from atroposlib.data.files import read_file
from atroposlib.data.registry import Row
from atroposlib.errors import DataError

OF_SESSIONS = ("steps", "trajectory_events", "session_metadata", "session_reward")


def guessed(source: str) -> dict[str, Any]:
    """Loader and form of a file; nothing for what is no file."""
    if not Path(source).is_file():
        return {}
    first = next((entry.row for entry in read_file(Path(source)) if entry.row is not None), None)
    if first is None:
        return {}
    if "task" in first and any(name in first for name in OF_SESSIONS):
        return {"loader": "runtime_traces"}
    return {"form": "conversation"} if _is_supervised(first) else {}


def _is_supervised(row: Row) -> bool:
    if "ground_truth" in row:
        return False
    try:
        return any(message["role"] in ("assistant", "text") for message in as_messages(row))
    except DataError:
        return False
