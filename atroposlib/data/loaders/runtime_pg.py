"""Runtime traces from Postgres: the sessions that the runtime stored, as the same rows that its files give."""

from __future__ import annotations

from collections.abc import Iterator

from atroposlib.data.bad_lines import BadLines
from atroposlib.data.config import DataConfig
from atroposlib.data.entries import Entry
from atroposlib.data.postgres.reader import TraceDatabase, database
from atroposlib.data.registry import Funnel, Row
from atroposlib.data.sources import check_no_splits, counted
from atroposlib.data.traces.conversions import converter, rows_of_sessions
from atroposlib.data.traces.session import session_of


def load(config: DataConfig, funnel: Funnel) -> Iterator[Row]:
    """Conversations of the sessions; or RL rows of their steps, or flat rows."""
    check_no_splits(config, "a database")
    convert = converter(config, "conversation")
    bad = BadLines(config.on_bad_line, None)
    with database(config) as opened:
        funnel.update(opened.counts())
        selected = counted(_entries(opened), funnel, "selected")
        usable = counted(bad.good(selected, lambda row: convert(session_of(row))), funnel, "usable")
        yield from rows_of_sessions(usable, config, funnel)


def _entries(opened: TraceDatabase) -> Iterator[Entry]:
    for row in opened.sessions():
        yield Entry(f"session {row['session_metadata']['session_id']}", row)
