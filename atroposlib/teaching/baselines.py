"""Unaided attempts of the frozen student, kept over epochs and restarts: it would answer the same way again."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from atroposlib.errors import ConfigError
from atroposlib.teaching.frozen_model import ChatReply, Sampling

log = logging.getLogger(__name__)

FILE = "baselines.sqlite"
BUSY_TIMEOUT_S = 5.0
"""How long another process may hold the file."""
_TABLE = "CREATE TABLE IF NOT EXISTS baselines (key TEXT PRIMARY KEY, replies TEXT NOT NULL) WITHOUT ROWID"


@dataclass(frozen=True)
class StudentFingerprint:
    """What the student's unaided attempts depend on besides the item."""

    models: tuple[str, ...]
    template: str
    """Digest of the baseline template."""
    temperature: float
    max_tokens: int
    attempts: int

    @classmethod
    def of(cls, models: Sequence[str], template: str, sampling: Sampling, attempts: int) -> StudentFingerprint:
        """Of a student that is asked this way."""
        return cls(tuple(models), template, sampling.temperature, sampling.max_tokens, attempts)

    def key(self, prompt: str) -> str:
        """Of an item, given as the prompt that the student gets."""
        text = json.dumps([asdict(self), prompt], sort_keys=True, ensure_ascii=False)
        # A prompt may hold half of a surrogate pair.
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class BaselineCache:
    """Attempts by key, in one file.

    Args:
        path: made where it is missing; a file that is no cache is set aside. None: memory only.
    Raises:
        ConfigError: the file cannot be opened or written, for instance because another process holds it.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._reused = 0
        self._connection = _opened(path)

    def get(self, key: str) -> list[ChatReply] | None:
        """The attempts; None where there are none yet, or none that can be read."""
        try:
            row = self._connection.execute("SELECT replies FROM baselines WHERE key = ?", (key,)).fetchone()
            replies = None if row is None else [ChatReply(**reply) for reply in json.loads(row[0])]
        except (sqlite3.Error, ValueError, TypeError) as error:
            log.warning("unaided attempts in %s cannot be read and are asked again: %s", self.path, error)
            return None
        self._reused += replies is not None
        return replies

    def put(self, key: str, replies: Sequence[ChatReply]) -> None:
        """Keep attempts, in place of older ones. Where they cannot be written, they are asked again another time."""
        # In ASCII: SQLite takes no half of a surrogate pair.
        text = json.dumps([asdict(reply) for reply in replies])
        try:
            with self._connection:
                self._connection.execute("INSERT OR REPLACE INTO baselines VALUES (?, ?)", (key, text))
        except sqlite3.Error as error:
            log.warning("unaided attempts are not kept in %s: %s", self.path, error)

    def take_reused(self) -> int:
        """How many items were found since the last call."""
        taken, self._reused = self._reused, 0
        return taken

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _opened(path: Path | None) -> sqlite3.Connection:
    if path is None:
        return _connected(":memory:")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connected(str(path))
    except sqlite3.OperationalError as error:
        raise ConfigError(
            f"{path} cannot be opened: {error}; end the process that holds it, free disk space, or give another run_dir"
        ) from error
    except sqlite3.DatabaseError as error:
        aside = path.with_suffix(".broken")
        log.warning("%s is no cache of baselines (%s): set aside as %s", path, error, aside)
        path.replace(aside)
        return _connected(str(path))


def _connected(place: str) -> sqlite3.Connection:
    connection = sqlite3.connect(place, timeout=BUSY_TIMEOUT_S)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        # What a power cut takes away is asked again.
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute(_TABLE)
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection
