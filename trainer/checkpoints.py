"""Which checkpoint folder is whole. A marker is written when every rank has written its part."""

from __future__ import annotations

import json
import re
from pathlib import Path

MARKER = "atropos.json"


def mark_complete(folder: Path, *, step: int, run_name: str) -> None:
    """Say that the checkpoint after `step` steps is whole."""
    temporary = folder / f"{MARKER}.tmp"
    temporary.write_text(json.dumps({"step": step, "run_name": run_name}) + "\n", encoding="utf-8")
    temporary.replace(folder / MARKER)


def last_complete(output_dir: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint and the number of steps behind it; None when there is none."""
    found = [
        (int(match.group(1)), folder)
        for folder in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / MARKER).is_file()
    ]
    if not found:
        return None
    step, folder = max(found)
    return folder, step
