"""Append-only JSON lines: the metrics of each step, and the ledger of which groups it used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError


class JsonLines:
    """A file of one JSON object a line. A line is on disk when `append` returns.

    Raises:
        TrainerError: it cannot be written; so does append.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _told_of(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            is_cut_short = _ends_within_a_line(path)
            self._file = path.open("a", encoding="utf-8")
        if is_cut_short:
            # By a kill, or a disk that was full: the next line must not become part of it.
            self._file.write("\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. Numbers that JSON has no word for (NaN, infinity) become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with _told_of(self._path):
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. What could not be written has been told of."""
        with suppress(OSError):
            self._file.close()


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Turn a disk's failure into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise TrainerError(
            f"{path} cannot be written: {error.strerror or error}; the run keeps no record without it. Mend that (free space, "
            "or allow writing) and give the same command again: it goes on from the newest checkpoint"
        ) from error


def _ends_within_a_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class TrainerLedger:
    """Which groups each step trained on: the trainer's half of the proof that each group counted once.

    A resumed run writes the steps that it repeats again; the last line of a step is the one that counts.
    """

    def __init__(self, run_dir: Path) -> None:
        self._lines = JsonLines(run_dir / "ledger" / "trainer.jsonl")

    def record(self, step: int, *, groups: Sequence[str], sequences: int, max_staleness: int | None) -> None:
        """Write down a step, before its acknowledgement."""
        self._lines.append(
            {"step": step, "groups": list(groups), "sequences": sequences, "max_staleness": max_staleness}
        )

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
