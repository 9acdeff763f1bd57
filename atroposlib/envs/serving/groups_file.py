"""Groups as JSON lines, in the upstream form: one dict of lists a line."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from atroposlib.type_definitions import ScoredDataGroup
from atroposlib.utils.plain_json import plain


class GroupsFile:
    """Appends groups to a new file; an existing file is left alone and `_1`, `_2`, ... is added to the name."""

    def __init__(self, path: Path) -> None:
        self.path = _unused(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("x", encoding="utf-8")

    def write(self, group: ScoredDataGroup) -> None:
        """One group, one line, flushed."""
        self._file.write(json.dumps(group, ensure_ascii=False, default=plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unused(path: Path) -> Path:
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_stem(f"{path.stem}_{count}")
    return candidate
