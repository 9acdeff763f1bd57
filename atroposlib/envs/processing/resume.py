"""The file of `process`: groups as JSON lines, beside it a journal of finished items, and how an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from atroposlib.utils.plain_json import plain

JOURNAL_SUFFIX = ".progress"


@dataclass(frozen=True)
class Finished:
    """How far an interrupted run came."""

    groups: int = 0
    items: int = 0
    """Items drawn from the environment whose groups are all in the file."""


class ProcessOutput:
    """Writes whole items: the groups, then a line of the journal. A killed run leaves at most one item half written.

    Args:
        path: of the groups. A new run leaves an existing file alone: `_1`, `_2`, ... is added to the name.
        is_resumed: go on with the newest of those files, where there is one.
    """

    def __init__(self, path: Path, *, is_resumed: bool) -> None:
        newest = newest_of_series(path)
        self.is_new = newest is None or not is_resumed
        self.path = next_of_series(path) if newest is None or not is_resumed else newest
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.finished = Finished() if self.is_new else recover(self.path)
        self._groups: TextIO = self.path.open("x" if self.is_new else "a", encoding="utf-8")
        self._journal: TextIO = journal_of(self.path).open("w" if self.is_new else "a", encoding="utf-8")

    def write(self, group: Mapping[str, Any]) -> None:
        """One group, one line, flushed."""
        self._groups.write(json.dumps(group, ensure_ascii=False, default=plain) + "\n")
        self._groups.flush()

    def end_item(self, n_groups: int, *, is_drawn: bool) -> None:
        """All groups of an item are written.

        Args:
            is_drawn: it came from get_next_item, not out of another item.
        """
        self._journal.write(json.dumps({"groups": n_groups, "drawn": is_drawn}) + "\n")
        self._journal.flush()

    def close(self) -> None:
        """Close the files."""
        self._groups.close()
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def journal_of(path: Path) -> Path:
    """Where the journal of a file of groups is."""
    return path.with_name(path.name + JOURNAL_SUFFIX)


def series(path: Path) -> list[Path]:
    """The files there are of path, path_1, path_2, ..., in that order, up to the first gap."""
    found: list[Path] = []
    candidate = path
    while candidate.exists():
        found.append(candidate)
        candidate = path.with_stem(f"{path.stem}_{len(found)}")
    return found


def newest_of_series(path: Path) -> Path | None:
    """The file that the last run wrote."""
    return next(reversed(series(path)), None)


def next_of_series(path: Path) -> Path:
    """The first name that is free."""
    count = len(series(path))
    return path if count == 0 else path.with_stem(f"{path.stem}_{count}")


def recover(path: Path) -> Finished:
    """Cut off what is half written, in the file and in its journal; say what is left.

    A file without a journal was written by something else: one item a line is assumed.
    """
    ends = _line_ends(path)
    journal = journal_of(path)
    if not journal.exists():
        finished = Finished(groups=len(ends), items=len(ends))
        kept = [{"groups": 1, "drawn": True}] * len(ends)
    else:
        kept = whole_items(_read_journal(journal), n_lines=len(ends))
        finished = Finished(
            groups=sum(entry["groups"] for entry in kept), items=sum(bool(entry["drawn"]) for entry in kept)
        )
    with path.open("r+b") as file:
        file.truncate(ends[finished.groups - 1] if finished.groups else 0)
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    return finished


def whole_items(journal: Sequence[dict[str, Any]], *, n_lines: int) -> list[dict[str, Any]]:
    """The journal's entries, in order, whose groups are all among the first n_lines lines."""
    kept, lines = [], 0
    for entry in journal:
        lines += entry["groups"]
        if lines > n_lines:
            break
        kept.append(entry)
    return kept


def _line_ends(path: Path) -> list[int]:
    """Offset behind each line that ends; what follows the last is torn."""
    ends, offset = [], 0
    with path.open("rb") as file:
        for line in file:
            offset += len(line)
            if line.endswith(b"\n"):
                ends.append(offset)
    return ends


def _read_journal(path: Path) -> list[dict[str, Any]]:
    # Split by hand: splitlines would take a torn last line for a whole one.
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]
