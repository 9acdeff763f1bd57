"""FILE.bad.jsonl: the lines of a file that cannot be used, with the reason."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from atroposlib.errors import DataError


class Quarantine:
    """The list of one reading. It takes the place of the list before when it is whole, in one move: of processes that read the
    same file at the same time, such as the ranks of a trainer, each leaves the same list.

    Args:
        path: where the list goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
        self._file: TextIO | None = None

    def add(self, place: str, problem: str, line: str) -> None:
        """Keep a line.

        Raises:
            DataError: it cannot be written.
        """
        try:
            self._file = self._file or self._unfinished.open("x", encoding="utf-8")
            self._file.write(json.dumps({"place": place, "problem": problem, "line": line}) + "\n")
        except OSError as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        """Put the list in its place; without a line there is none.

        Raises:
            DataError: it cannot be written.
        """
        try:
            if self._file is None:
                self.path.unlink(missing_ok=True)
            else:
                self._file.close()
                self._unfinished.replace(self.path)
        except OSError as error:
            raise self._not_written(error) from error

    def discard(self) -> None:
        """Forget the lines, after a reading that failed; the list before stays."""
        if self._file is None:
            return
        # What ended the reading matters more, and a full disk fails here too.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._unfinished.unlink()

    def _not_written(self, error: OSError) -> DataError:
        return DataError(f"cannot write {str(self.path)!r}: {error}; use on_bad_line=skip")
