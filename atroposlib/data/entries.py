"""What sources give: rows with their places, and lines that cannot be used with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from atroposlib.data.registry import Row


@dataclass(frozen=True)
class Entry:
    """One row of a source as it was read."""

    place: str
    """The file and line, for messages."""
    row: Row | None
    """None where it cannot be used."""
    problem: str = ""
    """Why it cannot be used, and what was expected."""
    text: str = ""
    """The line itself where it cannot be used."""
