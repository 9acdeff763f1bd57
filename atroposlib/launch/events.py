"""The event log of a run: what happened to which process, one JSON line each, kept for the view and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class EventLog:
    """Appends to events.jsonl and remembers the lines of this session.

    Args:
        path: the file; its folder exists.
        on_event: called with every new event, e.g. to show it.
    """

    def __init__(self, path: Path, *, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path = path
        self.on_event = on_event
        self.events: list[dict[str, Any]] = []

    def add(self, event: str, text: str, **facts: Any) -> None:
        """Note an event: a short name for programs, a sentence for people, the facts behind it."""
        line = {"time": time.time(), "event": event, "text": text, **facts}
        self.events.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.on_event is not None:
            self.on_event(line)
