"""Runtime-trace files: one session a line, as the runtime exports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from atroposlib.data.config import DataConfig
from atroposlib.data.lines import read_lines
from atroposlib.data.registry import Funnel, Row
from atroposlib.data.sources import counted, local_file, usable_rows
from atroposlib.data.traces.conversions import converter, rows_of_sessions
from atroposlib.data.traces.filters import Test, session_tests
from atroposlib.data.traces.session import Session, session_of
from atroposlib.errors import DataError


def load(config: DataConfig, funnel: Funnel) -> Iterator[Row]:
    """RL rows of the steps; or flat rows; or a conversation for each session, or for each turn of its teacher."""
    if local_file(config) is None:
        raise DataError("loader=runtime_traces needs dataset_path: a file of sessions, one a line (.jsonl, .gz, .xz)")
    convert = converter(config, "rl")

    # Converted at once, so that a session that cannot be is a bad line too.
    def parse(row: Row) -> tuple[Session, list[Row]]:
        session = session_of(row)
        return session, convert(session)

    parsed = usable_rows(config, funnel, parse)
    for stage, test in session_tests(config):
        parsed = _only(parsed, test, funnel, stage)
    return rows_of_sessions((rows for _, rows in parsed), config, funnel)


def load_runtime_traces(path: str | Path) -> Iterator[Session]:
    """The sessions of a file, one after another.

    Raises:
        DataError: a line is no session; names file and line.
    """
    for entry in read_lines(Path(path)):
        if entry.row is None:
            raise DataError(f"{entry.place}: {entry.problem}")
        try:
            yield session_of(entry.row)
        except DataError as error:
            raise DataError(f"{entry.place}: {error}") from error


def _only(
    parsed: Iterator[tuple[Session, list[Row]]], test: Test, funnel: Funnel, stage: str
) -> Iterator[tuple[Session, list[Row]]]:
    return counted((pair for pair in parsed if test(pair[0])), funnel, stage)
