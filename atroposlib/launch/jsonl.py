"""Reads JSON-lines files that another process may be writing, or was killed while writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class JsonlTail:
    """Hands out the lines of a file once each, as they appear."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def new_lines(self) -> list[Line]:
        """Lines completed since the last call. A line that is no JSON object is skipped."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return _parse(complete)


def read_jsonl(path: Path) -> list[Line]:
    """Every whole line of the file; none when there is no file.

    A last line without its line feed is used when it is whole JSON.
    """
    return _parse(path.read_bytes()) if path.is_file() else []


def _parse(data: bytes) -> list[Line]:
    lines = []
    for raw in data.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:  # also UnicodeDecodeError: the process was killed in mid-write
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def surviving_history(lines: list[Line]) -> list[Line]:
    """The steps that led to the final weights, in order.

    A trainer that resumes from a checkpoint writes its steps again. A line of step s therefore takes back
    every earlier line of step s and later.
    """
    history: dict[int, Line] = {}
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if step in history:
            history = {earlier: kept for earlier, kept in history.items() if earlier < step}
        history[step] = line
    return [history[step] for step in sorted(history)]
