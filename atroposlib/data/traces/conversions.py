"""Sessions to rows, in the form that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from atroposlib.data.config import DataConfig, Form
from atroposlib.data.registry import Funnel, Row
from atroposlib.data.sources import counted
from atroposlib.data.traces.conversation import conversation_records
from atroposlib.data.traces.records import flat_records, rl_records
from atroposlib.data.traces.session import Session


def converter(config: DataConfig, default: Form) -> Callable[[Session], list[Row]]:
    """What makes rows of a session.

    Args:
        default: the form where the configuration names none.
    """
    form = config.form or default
    if form == "conversation":
        return lambda session: conversation_records(session, every_teacher_turn=config.every_teacher_turn)
    return flat_records if form == "flat" else rl_records


def rows_of_sessions(sessions: Iterator[list[Row]], config: DataConfig, funnel: Funnel) -> Iterator[Row]:
    """The rows of the sessions that have any, up to the cap of sessions."""
    used = counted((rows for rows in sessions if rows), funnel, "sessions with rows")
    capped = islice(used, config.dataset_max_sessions)
    return counted((row for rows in capped for row in rows), funnel, "rows")
