"""What becomes of lines that cannot be used: an error, a warning, or a file of their own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from atroposlib.data.entries import Entry
from atroposlib.data.quarantine import Quarantine
from atroposlib.data.registry import Row
from atroposlib.errors import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")
SHOWN = 5
"""Bad lines that are named in the log; the rest is counted."""


class BadLines:
    """Keeps or refuses the bad lines of one source.

    Args:
        action: error raises at the first; skip and quarantine go on.
        quarantine: the file that quarantine writes; None where the source is no file.
    Raises:
        DataError: the action is quarantine, and the source is no file.
    """

    def __init__(self, action: Literal["error", "skip", "quarantine"], quarantine: Path | None) -> None:
        if action == "quarantine" and quarantine is None:
            raise DataError("on_bad_line=quarantine needs a file as the source; use skip")
        self.action = action
        self.quarantine = Quarantine(quarantine) if quarantine and action == "quarantine" else None
        self.count = 0

    def good(self, entries: Iterable[Entry], parse: Callable[[Row], T]) -> Iterator[T]:
        """What parse makes of each row; the rows for which it raises DataError are bad lines.

        Raises:
            DataError: names the first bad line, where the action is error.
        """
        try:
            for entry in entries:
                if entry.row is None:
                    self._add(entry, entry.problem)
                    continue
                try:
                    parsed = parse(entry.row)
                except DataError as error:
                    self._add(entry, str(error))
                else:
                    yield parsed
        # A cap ends the loading early.
        except GeneratorExit:
            self._finish()
            raise
        except BaseException:
            if self.quarantine is not None:
                self.quarantine.discard()
            raise
        self._finish()

    def _finish(self) -> None:
        if self.quarantine is not None:
            self.quarantine.close()
        if self.count:
            where = f", kept in {self.quarantine.path}" if self.quarantine else ""
            log.warning("left out %d lines that cannot be used%s", self.count, where)

    def _add(self, entry: Entry, problem: str) -> None:
        if self.action == "error":
            raise DataError(f"{entry.place}: {problem}")
        self.count += 1
        if self.count <= SHOWN:
            log.warning("%s: %s", entry.place, problem)
        if self.quarantine is not None:
            text = entry.text or json.dumps(entry.row, ensure_ascii=False, default=str)
            self.quarantine.add(entry.place, problem, text)
