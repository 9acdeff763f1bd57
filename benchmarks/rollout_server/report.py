"""What a benchmark shows: a progress line while it runs, then a table, and the figures as JSON."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from benchmarks.rollout_server.processes import OUTPUT

Cell = str | int | float | None


def progress(text: str) -> None:
    """Say what runs now: one line that is overwritten on a terminal, a line each in a log."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"\x1b[2K{text}" if end == "\r" else text, end=end, file=sys.stderr, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Rows in Markdown."""
    lines = [columns, ["---"] * len(columns), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(name: str, facts: Mapping[str, Any]) -> None:
    """Write the figures, with what the machine was, to runs/benchmarks/NAME-TIME.json and say where."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
    path.write_bytes(
        msgspec.json.format(msgspec.json.encode({"machine": machine, "argv": sys.argv[1:], **facts}), indent=1)
    )
    print(
        f"\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; figures in {path.relative_to(OUTPUT.parent.parent)}"
    )


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
