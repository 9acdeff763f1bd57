"""Reads sessions page by page, in one read-only transaction that sees one state of the database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from atroposlib.data.config import DataConfig
from atroposlib.data.postgres.assembly import Page, trace_rows
from atroposlib.data.postgres.queries import (
    ATTEMPTS,
    EVENTS,
    NOTES,
    STEPS,
    Query,
    conditions,
    count_query,
    sessions_query,
)
from atroposlib.data.postgres.urls import database_url, scrubbed, without_password
from atroposlib.data.registry import Row
from atroposlib.errors import DataError

PAGE = 100
"""Sessions that are in memory at once."""
CONNECT_TIMEOUT_S = 10


class TraceDatabase:
    """An open transaction. Use it in a `with database(config) as ...`."""

    def __init__(self, connection: Any, config: DataConfig) -> None:
        self._connection = connection
        self._config = config

    def counts(self) -> dict[str, int]:
        """How many sessions there are, and how many each filter leaves, in order."""
        query = count_query(self._config)
        row = self._connection.execute(query.text, query.values).fetchone()
        stages = ["sessions", *(condition.stage for condition in conditions(self._config))]
        return dict(zip(stages, row, strict=True))

    def sessions(self) -> Iterator[Row]:
        """The sessions that pass the filters, newest first, as lines of a trace file."""
        yield from self._read(sessions_query(self._config))

    def session(self, session_id: int | str) -> Row | None:
        """One session by its id; None where there is none."""
        return next(self._read(sessions_query(self._config, session_id=session_id)), None)

    def _read(self, query: Query) -> Iterator[Row]:
        # With a name the cursor is the server's: the rows stay there until they are asked for.
        with self._connection.cursor(name="sessions", row_factory=self._as_dicts()) as cursor:
            cursor.execute(query.text, query.values)
            while sessions := cursor.fetchmany(PAGE):
                yield from trace_rows(self._page(sessions))

    def _page(self, sessions: list[Row]) -> Page:
        ids = [session["id"] for session in sessions]
        events = self._all(EVENTS, ids) if self._config.include_trajectory_events else []
        return Page(sessions, self._all(STEPS, ids), self._all(ATTEMPTS, ids), self._all(NOTES, ids), events)

    def _all(self, statement: str, ids: list[Any]) -> list[Row]:
        with self._connection.cursor(row_factory=self._as_dicts()) as cursor:
            rows: list[Row] = cursor.execute(statement, [ids]).fetchall()
        return rows

    def _as_dicts(self) -> Any:
        return import_module("psycopg.rows").dict_row


@contextmanager
def database(config: DataConfig) -> Iterator[TraceDatabase]:
    """The configured database, in a read-only transaction whose statements have a deadline.

    Raises:
        DataError: psycopg is missing, no URL is configured, or the database refuses; never shows the password.
    """
    url = database_url(config)
    psycopg = _driver()
    try:
        with psycopg.connect(url, connect_timeout=CONNECT_TIMEOUT_S) as connection:
            connection.read_only = True
            # All pages of one state: sessions that are added meanwhile shift nothing.
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            timeout_ms = str(max(1, round(config.statement_timeout_s * 1000)))
            connection.execute("SELECT set_config('statement_timeout', %s, true)", [timeout_ms])
            yield TraceDatabase(connection, config)
    except psycopg.Error as error:
        said = error.diag.message_primary or " ".join(str(error).split())
        # Not chained: the driver's own message may hold the password.
        raise DataError(f"{without_password(url)}: {scrubbed(said, url)}{_hint(psycopg, error)}") from None


def _driver() -> Any:
    try:
        return import_module("psycopg")
    except ModuleNotFoundError as error:
        raise DataError('loader=runtime_pg needs `pip install "psycopg[binary]"`') from error


def _hint(psycopg: Any, error: Exception) -> str:
    if isinstance(error, psycopg.errors.QueryCanceled):
        return "; raise statement_timeout_s, lower limit, or set include_trajectory_events: false"
    if isinstance(error, (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn)):
        return "; is this the runtime's database, and is its schema up to date?"
    return ""
